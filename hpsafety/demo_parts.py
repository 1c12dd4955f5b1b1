"""What the demos share: their model, rows chosen from the demo's data, and two reward models trained on its pairs."""

from itertools import zip_longest
from pathlib import Path

import numpy as np

from hpsafety.config import DemoConfig, RewardConfig
from hpsafety.data.batches import group_tokens
from hpsafety.data.chat import encode_dialogue, encode_prompt, encode_response
from hpsafety.data.demo import path as demo_path
from hpsafety.data.records import read_records, write_records
from hpsafety.stages import reward

MODEL = "smollm2"
KINDS = ("safety", "helpfulness")
SHARES = {"safety": (9, 1), "helpfulness": (1, 1)}  # safety pairs to helpfulness pairs (RM-6)


def shuffled(rows: list[dict], seed: int) -> list[dict]:
    return [rows[i] for i in np.random.default_rng(seed).permutation(len(rows))]


def in_turn(rows: list[dict], seed: int) -> list[dict]:
    """Safety rows, harmless look-alikes and plain helpful rows in turn, each kind in a seeded order."""
    rng, kinds = np.random.default_rng(seed), ([], [], [])
    for row in rows:
        kinds[0 if row.get("is_safety") else 1 if row.get("is_borderline") else 2].append(row)
    queues = [[kind[i] for i in rng.permutation(len(kind))] for kind in kinds]
    return [row for turn in zip_longest(*queues) for row in turn if row is not None]


def within(rows: list[dict], size, tokens: int) -> list[dict]:
    """The first rows that together hold at most `tokens` tokens; size(row) counts a row's."""
    chosen, total = [], 0
    for row in rows:
        total += size(row)
        if total > tokens:
            break
        chosen.append(row)
    return chosen


def choose_rows(rows: list[dict], tokenizer, train_tokens: int, seed: int) -> list[dict]:
    """Demonstrations to train on, at most train_tokens tokens in all, the kinds in turn."""

    def size(row):
        return group_tokens(encode_dialogue(tokenizer, row["prompt"], row["response"]))

    return within(in_turn(rows, seed), size, train_tokens)


def choose_pairs(rows: list[dict], tokenizer, kind: str, tokens: int, seed: int) -> list[dict]:
    """Preference pairs for one reward model, at most `tokens` tokens, safety and other data mixed as RM-6 asks."""

    def size(block):
        texts = [row[name] for row in block for name in ("chosen", "rejected")]
        answers = sum(len(encode_response(tokenizer, text)) for text in texts)
        return sum(len(encode_prompt(tokenizer, row["prompt"])) for row in block) + answers

    safety = shuffled([r for r in rows if r.get("is_safety")], seed)
    other = shuffled([r for r in rows if not r.get("is_safety")], seed)
    s, o = SHARES[kind]
    count = min(len(safety) // s, len(other) // o)
    blocks = [safety[i * s : (i + 1) * s] + other[i * o : (i + 1) * o] for i in range(count)]
    return [row for block in within(blocks, size, tokens) for row in block]


def train_judge(kind: str, tokenizer, cfg: DemoConfig, out: Path, start: str) -> None:
    """One reward model on the chat model `start`; its own report stands in its run directory."""
    rows = list(read_records(demo_path("preferences"), "preference"))
    train = [row for row in rows if row["split"] == "train"]
    held = shuffled([row for row in rows if row["split"] == "valid"], cfg.seed)[: cfg.held_pairs]
    data = out / "data" / f"pairs-{kind}.jsonl"
    write_records(data, choose_pairs(train, tokenizer, kind, cfg.reward_tokens, cfg.seed) + held)
    reward.run(RewardConfig(
        model=start, data=(str(data),), out=str(out / f"reward-{kind}"), kind=kind, seed=cfg.seed,
        batch=cfg.batch, lr=cfg.lr, epochs=1, device=cfg.device, precision=cfg.precision, tokens_per_batch=1024,
        checkpoint_every=0,
    ))  # fmt: skip


def judges(out: Path) -> dict[str, str]:
    """The reward models' directories."""
    kinds = {"safety": "safety", "helpful": "helpfulness"}
    return {name: str(out / f"reward-{kind}" / "model") for name, kind in kinds.items()}
