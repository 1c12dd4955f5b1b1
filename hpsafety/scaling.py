"""`hpsafety scaling`: the study on the data it is given, or with --demo a small one on what comes with the package.

The demo is here and not in the stage, because it trains its two reward models first, which is another stage's work.
"""

import dataclasses
import os
import shutil
import sys
import time
from itertools import chain
from pathlib import Path

from hpsafety.config_scaling import percent
from hpsafety.data.demo import path as demo_path
from hpsafety.data.records import read_records, write_records
from hpsafety.data.selection import in_turn
from hpsafety.demo_parts import KINDS, REWARD_TOKENS, judges, train_judge
from hpsafety.errors import InputError
from hpsafety.model.io import load_model
from hpsafety.safety.eval_answers import SETS
from hpsafety.stages import scaling
from hpsafety.train.metrics import say

SAFETY_ROWS, HELPFUL_ROWS = 50, 40  # so that 1 % is a row; 8,400 tokens in all, prompts and answers


def run(cfg) -> None:
    """hpsafety scaling: see ScalingConfig and stages/scaling.py."""
    if cfg.demo:
        demo(cfg)
    else:
        scaling.run(cfg)


def demo(cfg) -> None:
    """Two reward models on the base model and the demo's pairs, then the study: OUT/study beside OUT/reward-*."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:  # a process cannot join its peers once for each stage
        raise InputError(
            "--demo runs in one process: start it without torchrun, which is for a study of your own"
        )
    started = time.monotonic()
    out = Path(cfg.out)
    _opening(cfg)
    if not cfg.resume:
        for stale in out.glob("reward-*"):
            shutil.rmtree(stale)
    (out / "data").mkdir(parents=True, exist_ok=True)
    tokenizer = load_model(cfg.model).tokenizer
    rows = list(read_records(demo_path("train"), "demonstration"))
    held_out = chain(*(read_records(demo_path(f"heldout_{name}"), "prompt") for name in SETS))
    write_records(out / "data" / "train.jsonl", choose_rows(rows, cfg.seed))
    write_records(out / "data" / "eval.jsonl", held_out)
    for kind in KINDS:
        train_judge(kind, tokenizer, cfg, out, cfg.model)
    scaling.run(dataclasses.replace(
        cfg, demo=False, data=(str(out / "data" / "train.jsonl"),), eval=(str(out / "data" / "eval.jsonl"),),
        out=str(out / "study"), **{f"{name}_rm": path for name, path in judges(out).items()},
    ))  # fmt: skip
    say(f"report: {out / 'study' / 'report.html'}   {time.monotonic() - started:.0f} s")


def choose_rows(rows: list[dict], seed: int) -> list[dict]:
    """Safety rows, and as the helpful ones harmless look-alikes and plain help in turn, each kind in a seeded order."""
    ordered = in_turn(rows, seed)
    safety = [row for row in ordered if row["is_safety"]]
    helpful = [row for row in ordered if not row["is_safety"]]
    return safety[:SAFETY_ROWS] + helpful[:HELPFUL_ROWS]


def _opening(cfg) -> None:
    shares, asked = ", ".join(map(percent, cfg.fractions)), len(SETS) * cfg.eval_prompts
    print(
        f"hpsafety scaling --demo: {cfg.model}, mild synthetic data that comes with the package.\n"
        f"  1. a safety and a helpfulness reward model, on at most {REWARD_TOKENS:,} tokens of pairs each\n"
        f"  2. {len(cfg.fractions)} fine-tunings of the same model: {HELPFUL_ROWS} helpful rows, and {shares} % of\n"
        f"     {SAFETY_ROWS} safety rows (9,000 tokens at most); each answers {asked} held-out questions\n"
        "  3. all answers scored by both reward models: what more safety data buys, and what it costs\n"
        f"Expect 5 to 14 minutes on two cores, under 5 GB of memory.\nOutput: {cfg.out}/\n",
        file=sys.stderr, flush=True,
    )  # fmt: skip
