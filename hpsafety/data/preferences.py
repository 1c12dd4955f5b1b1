"""Preference pairs: from rows to prompt groups of [chosen, rejected], what is held out of training, and the mix of
safety and helpfulness data (spec section 3: PREF-1..3, RM-6)."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from hpsafety.data.chat import encode_prompt, encode_response, prompt_messages
from hpsafety.data.groups import PromptGroup
from hpsafety.data.records import check_disjoint, normalise_prompt
from hpsafety.data.schemas import RATINGS, TRAIN_SPLITS

# m(rating): how far apart the scores shall be, in logits
MARGINS = {
    "none": dict.fromkeys(RATINGS, 0.0),
    "small": dict(zip(RATINGS, (1.0, 2 / 3, 1 / 3, 0.0), strict=True)),
    "large": dict(zip(RATINGS, (3.0, 2.0, 1.0, 0.0), strict=True)),
}
# bin: is the chosen, is the rejected response safe (1) or unsafe (0); -1 where nobody said
SAFE_BY_BIN = {1: (1, 0), 2: (1, 1), 3: (0, 0), None: (-1, -1)}
OTHER_SHARE = {
    "helpfulness": 0.5,
    "safety": 0.1,
}  # of a kind's training pairs, the share of the other kind's (RM-6)
HELD_OUT_MOST, HELD_OUT_PART = (
    1000,
    10,
)  # per batch of annotations: at most 1000 pairs, at most every 10th (PREF-2)
_HOLD_OUT, _MIX = 101, 102  # what the seed's numbers are drawn for


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair(PromptGroup):
    """Two responses to one prompt, [chosen, rejected], and what people said of them.

    margin      logits; 0 for rows without a rating
    safe        SAFE_BY_BIN of safety_bin
    name        the row's id, or its number: how a message names the pair
    reference   nats: both responses' logprob under the frozen start, where a stage has measured it (DPO)
    """

    margin: float
    safe: tuple[int, int]
    rating: str | None
    safety_bin: int | None
    is_safety: bool
    name: str
    reference: tuple[float, float] = (0.0, 0.0)


def is_safety(row: dict) -> bool:
    """Whether a row counts as safety data: what it says; where it says nothing, whether it has a safety bin."""
    said = row.get("is_safety")
    return row.get("safety_bin") is not None if said is None else said


def drop_equal(rows: Sequence[dict]) -> tuple[list[dict], dict[str, int]]:
    """(rows whose two responses differ, counts): equal ones teach nothing."""
    kept = [row for row in rows if row["chosen"] != row["rejected"]]
    return kept, {"excluded: equal responses": len(rows) - len(kept)}


def hold_out(rows: Sequence[dict], seed: int) -> tuple[list[dict], list[dict], dict[str, int]]:
    """(rows to train on, rows held out, counts), disjoint by prompt (PREF-2, DATA-3).

    Rows with split valid are held out where there are any. Otherwise of each `batch` at most min(1000, 10 %) are
    drawn under `seed`, prompt by prompt: all rows of a prompt go together, so a prompt that would overfill a batch's
    share stays in training. Rows of the test splits are left out of both.
    Raises InputError, naming both rows, when a prompt is both trained on and held out by its split.
    """
    train = [row for row in rows if row.get("split") in (None, *TRAIN_SPLITS)]
    valid = [row for row in rows if row.get("split") == "valid"]
    test = [row for row in rows if row.get("split") not in (None, "valid", *TRAIN_SPLITS)]
    check_disjoint(train, [*valid, *test])
    if not valid:
        prompts = [normalise_prompt(row["prompt"]) for row in train]
        drawn = _draw_prompts(prompts, [batch_of(row) for row in train], seed)
        valid = [row for row, prompt in zip(train, prompts, strict=True) if prompt in drawn]
        train = [row for row, prompt in zip(train, prompts, strict=True) if prompt not in drawn]
    return train, valid, {"held_out": len(valid), "rows_of_test_splits": len(test)}


def batch_of(row: dict) -> str:
    """The name of the batch of annotations a row belongs to; rows without one form a batch."""
    return "all" if row.get("batch") is None else str(row["batch"])


def _draw_prompts(prompts: list[str], batches: list[str], seed: int) -> set[str]:
    sizes: dict[str, Counter] = {}  # prompt: rows it has in each batch
    for prompt, batch in zip(prompts, batches, strict=True):
        sizes.setdefault(prompt, Counter())[batch] += 1
    room = {batch: min(HELD_OUT_MOST, n // HELD_OUT_PART) for batch, n in Counter(batches).items()}
    names, drawn = list(sizes), set()
    for index in np.random.default_rng([seed, _HOLD_OUT]).permutation(len(names)):
        counts = sizes[names[index]]
        if all(n <= room[batch] for batch, n in counts.items()):
            drawn.add(names[index])
            for batch, n in counts.items():
                room[batch] -= n
    return drawn


def encode_pairs(tokenizer, rows: Sequence[dict], margin: Literal["none", "small", "large"]) -> list[Pair]:
    """A Pair of each row, the prompt encoded once. Raises InputError as encode_prompt does."""
    margins = MARGINS[margin]
    return [
        Pair(
            encode_prompt(tokenizer, row["prompt"]),
            [encode_response(tokenizer, row["chosen"]), encode_response(tokenizer, row["rejected"])],
            margin=margins.get(row.get("rating"), 0.0),
            safe=SAFE_BY_BIN[row.get("safety_bin")],
            rating=row.get("rating"),
            safety_bin=row.get("safety_bin"),
            is_safety=is_safety(row),
            name=str(row["id"]) if row.get("id") is not None else f"number {index + 1}",
        )
        for index, row in enumerate(rows)
    ]


def mix(pairs: Sequence[Pair], kind: Literal["safety", "helpfulness"], seed: int) -> tuple[list[Pair], dict]:
    """(pairs to train on, in the order given; counts): all of the model's own kind and OTHER_SHARE of the other (RM-6).

    The other kind's pairs are drawn uniformly under `seed`. Where they are too few, all are used and the model's own
    are drawn until the shares hold. With one kind alone nothing is left out.
    """
    own = [i for i, pair in enumerate(pairs) if pair.is_safety == (kind == "safety")]
    other = [i for i, pair in enumerate(pairs) if pair.is_safety != (kind == "safety")]
    share = OTHER_SHARE[kind]
    num_own, num_other = len(own), len(other)
    if own and other:
        num_other = min(len(other), round(len(own) * share / (1 - share)))
        if num_other == len(other):
            num_own = min(len(own), round(len(other) * (1 - share) / share))
    rng = np.random.default_rng([seed, _MIX])
    used = {*rng.permutation(own)[:num_own].tolist(), *rng.permutation(other)[:num_other].tolist()}
    names = ("safety", "helpful") if kind == "safety" else ("helpful", "safety")
    counts = {
        f"{names[0]}_pairs": num_own, f"{names[0]}_left_out_of_mix": len(own) - num_own,
        f"{names[1]}_pairs": num_other, f"{names[1]}_left_out_of_mix": len(other) - num_other,
    }  # fmt: skip
    return [pair for i, pair in enumerate(pairs) if i in used], counts


def describe(rows: Sequence[dict], pairs: Sequence[Pair]) -> dict:
    """What the loader found (PREF-3): shares of bins, shares of ratings per batch, turns and tokens per example.

    rows, pairs  the same examples, in the same order
    A turn is a user's message and its answer. Shares are of the examples that have a bin or a rating.
    """
    ratings: dict[str, list] = {}
    for row in rows:
        ratings.setdefault(batch_of(row), []).append(row.get("rating"))
    turns = [sum(m["role"] == "user" for m in prompt_messages(row["prompt"])) for row in rows]
    lengths = [(len(pair.prompt), *map(len, pair.responses)) for pair in pairs]
    mean = [sum(column) / len(lengths) for column in zip(*lengths, strict=True)] if lengths else [0.0] * 3
    return {
        "examples": len(rows),
        "bins": _shares([pair.safety_bin for pair in pairs], (1, 2, 3)),
        "ratings": {batch: _shares(values, RATINGS) for batch, values in sorted(ratings.items())},
        "turns": sum(turns) / max(1, len(turns)),
        "tokens": dict(zip(("prompt", "chosen", "rejected"), mean, strict=True)),
    }


def _shares(values: list, names: Sequence) -> dict:
    """{name: share of the values that are not None, "none": number of those that are, "labelled": of the others}."""
    counts = Counter(values)
    total = len(values) - counts[None]
    return {str(n): counts[n] / total if total else 0.0 for n in names} | {
        "labelled": total,
        "none": counts[None],
    }
