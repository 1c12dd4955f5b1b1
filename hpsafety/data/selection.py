"""Choosing rows: a seeded order in which the kinds take turns, cut where a budget of tokens ends."""

from collections.abc import Callable, Sequence
from itertools import zip_longest

import numpy as np

from hpsafety.data.batches import group_tokens
from hpsafety.data.chat import encode_dialogue, encode_prompt, encode_response

KINDS = ("safety", "borderline", "helpful")


def kind_of(row: dict) -> str:
    """One of KINDS: by is_safety, is_borderline, or neither."""
    return "safety" if row.get("is_safety") else "borderline" if row.get("is_borderline") else "helpful"


def shuffled(rows: list[dict], seed: int) -> list[dict]:
    return [rows[i] for i in np.random.default_rng(seed).permutation(len(rows))]


def in_turn(rows: list[dict], seed: int) -> list[dict]:
    """Safety rows, harmless look-alikes and plain helpful rows in turn, each kind in a seeded order."""
    rng, kinds = np.random.default_rng(seed), {kind: [] for kind in KINDS}
    for row in rows:
        kinds[kind_of(row)].append(row)
    queues = [[kind[i] for i in rng.permutation(len(kind))] for kind in kinds.values()]
    return [row for turn in zip_longest(*queues) for row in turn if row is not None]


def in_blocks(rows: list[dict], shares: tuple[int, int], seed: int) -> list[list[dict]]:
    """Blocks of shares[0] safety rows and shares[1] others, so that every beginning of the list holds that mix."""
    safety = shuffled([row for row in rows if row.get("is_safety")], seed)
    other = shuffled([row for row in rows if not row.get("is_safety")], seed)
    s, o = shares
    count = min(len(part) // share for part, share in ((safety, s), (other, o)) if share)
    return [safety[i * s : (i + 1) * s] + other[i * o : (i + 1) * o] for i in range(count)]


def within(items: Sequence, size: Callable[..., int], tokens: int) -> list:
    """The first items that together hold at most `tokens` tokens; size(item) counts one's."""
    chosen, total = [], 0
    for item in items:
        total += size(item)
        if total > tokens:
            break
        chosen.append(item)
    return chosen


def row_tokens(tokenizer, row: dict, record: str) -> int:
    """Tokens a row of this kind of record is computed with: a prompt once, with every answer that stands in it."""
    if record == "document":
        return len(tokenizer.encode_plain(row["text"]))
    if record == "demonstration":
        return group_tokens(encode_dialogue(tokenizer, row["prompt"], row["response"]))
    prompt = len(encode_prompt(tokenizer, row["prompt"]))
    if record == "prompt":
        return prompt
    return prompt + sum(len(encode_response(tokenizer, row[name])) for name in ("chosen", "rejected"))
