"""Two reward models on the demo's preference pairs, for the study of `hpsafety scaling --demo`."""

from pathlib import Path

from hpsafety.config import RewardConfig
from hpsafety.data.demo import path as demo_path
from hpsafety.data.records import read_records, write_records
from hpsafety.data.selection import in_blocks, row_tokens, shuffled, within
from hpsafety.stages import reward

KINDS = ("safety", "helpfulness")
SHARES = {"safety": (9, 1), "helpfulness": (1, 1)}  # safety pairs to helpfulness pairs (RM-6)
REWARD_TOKENS = 10_000  # of pairs, at most
HELD_PAIRS = 48


def choose_pairs(rows: list[dict], tokenizer, kind: str, tokens: int, seed: int) -> list[dict]:
    """Preference pairs for one reward model, at most `tokens` tokens, safety and other data mixed as RM-6 asks."""

    def size(block):
        return sum(row_tokens(tokenizer, row, "preference") for row in block)

    return [row for block in within(in_blocks(rows, SHARES[kind], seed), size, tokens) for row in block]


def train_judge(kind: str, tokenizer, cfg, out: Path, start: str) -> None:
    """One reward model on the chat model `start`; its own report stands in its run directory.

    cfg  a config with seed, device and precision
    """
    rows = list(read_records(demo_path("preferences"), "preference"))
    train = [row for row in rows if row["split"] == "train"]
    held = shuffled([row for row in rows if row["split"] == "valid"], cfg.seed)[:HELD_PAIRS]
    data = out / "data" / f"pairs-{kind}.jsonl"
    write_records(data, choose_pairs(train, tokenizer, kind, REWARD_TOKENS, cfg.seed) + held)
    reward.run(RewardConfig(
        model=start, data=(str(data),), out=str(out / f"reward-{kind}"), kind=kind, seed=cfg.seed,
        batch=4, lr=1e-4, epochs=1, device=cfg.device, precision=cfg.precision, tokens_per_batch=1024,
        checkpoint_every=0,
    ))  # fmt: skip


def judges(out: Path) -> dict[str, str]:
    """The reward models' directories."""
    kinds = {"safety": "safety", "helpful": "helpfulness"}
    return {name: str(out / f"reward-{kind}" / "model") for name, kind in kinds.items()}
