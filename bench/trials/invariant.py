"""The sampler's log-probabilities against the training pass's, default and --batch-invariant, and the latter's cost.

    OMP_NUM_THREADS=1 python -m bench.trials.invariant --json bench/results/invariant.json

The built-in model answers the built-in prompts; nothing stops early, so that both modes do the same work. The training
pass is PPO's: packed micro-batches, log-probabilities with entropies, no gradients. Modes alternate and the least time
of each counts: CPU seconds of all threads, which other programs disturb less than the clock, beside seconds by the
clock. Runs of one mode must repeat to the bit, or the trial stops.
"""

import argparse
import itertools
import json
import time
from pathlib import Path

import torch

from bench.machine import machine
from hpsafety.data.chat import encode_prompt
from hpsafety.data.demo import path as demo_path
from hpsafety.data.groups import PromptGroup
from hpsafety.data.records import read_records
from hpsafety.files import atomic_write
from hpsafety.model.io import load_model
from hpsafety.rollout import invariance
from hpsafety.rollout.engine import Engine, Request
from hpsafety.rollout.sampler import Settings
from hpsafety.train.distributed import World
from hpsafety.train.ppo_step import measure, pack_minibatches

WORLD = World(0, 1, torch.device("cpu"))
TOKENS_PER_BATCH = 1024
MODES = {"default": False, "batch-invariant": True}
TITLES = (
    "precision",
    "k",
    "mode",
    "mean difference",
    "largest",
    "bit-equal",
    "rollout, CPU s",
    "logprobs, CPU s",
    "cost",
)


def now() -> tuple[float, float]:
    """CPU seconds of this process, seconds by the clock."""
    return time.process_time(), time.perf_counter()


def run_once(model, prompts, k: int, tokens: int, invariant: bool) -> dict:
    """A rollout and a training pass over it: both sides' logprobs in order (group, response, token), and seconds."""
    settings = Settings(max_new_tokens=tokens, seed=0, batch_invariant=invariant, kv_memory=2**30)
    marks = [now()]
    engine = Engine(model, settings)
    found = dict(engine.groups(Request(prompt, k, i) for i, prompt in enumerate(prompts)))
    marks.append(now())
    samples = [found[i] for i in range(len(prompts))]
    groups = [PromptGroup(p, [s.tokens for s in own]) for p, own in zip(prompts, samples, strict=True)]
    parts = pack_minibatches(model, groups, len(groups), TOKENS_PER_BATCH, WORLD, join_single=not invariant)
    count = len(prompts) * k * tokens
    trained, _ = measure(parts, lambda batch: model.logprobs(batch, 1.0, True), 2, count, WORLD)
    marks.append(now())
    seconds = [[b - a for a, b in zip(*pair, strict=True)] for pair in itertools.pairwise(marks)]
    return {
        "sampler": torch.tensor([x for own in samples for s in own for x in s.logprobs]), "trainer": trained,
        "rollout": seconds[0], "logprobs": seconds[1],
    }  # fmt: skip


def compare(model, prompts, k: int, tokens: int, runs: int) -> list[dict]:
    """One row per mode."""
    done = {mode: [run_once(model, prompts, k, 2, invariant)] for mode, invariant in MODES.items()}  # warm-up
    for _, (mode, invariant) in itertools.product(range(runs), MODES.items()):
        done[mode].append(run_once(model, prompts, k, tokens, invariant))
    rows = []
    for mode, (_, *timed) in done.items():
        if any(
            not torch.equal(run[side], timed[0][side]) for run in timed for side in ("sampler", "trainer")
        ):
            raise SystemExit(f"{mode}: two runs differ; nothing is reported")
        gap = (timed[0]["sampler"].double() - timed[0]["trainer"].double()).abs()
        rows.append({
            "mode": mode, "k": k, "tokens": len(gap), "mean": float(gap.mean()), "max": float(gap.max()),
            "bit_equal": float((gap == 0).double().mean()),
            **{f"{name}_{what}": [round(run[name][at], 3) for run in timed]
               for name in ("rollout", "logprobs") for at, what in enumerate(("cpu_s", "s"))},
        })  # fmt: skip
    return rows


def table(rows: list[dict]) -> str:
    """Markdown; cost: least times of rollout and logprobs, over those of the default."""
    lines = [" | ".join(TITLES), " | ".join(["---"] * len(TITLES))]
    for row in rows:
        (base,) = (
            r for r in rows if (r["precision"], r["k"], r["mode"]) == (row["precision"], row["k"], "default")
        )
        rollout, logprobs = (min(row[name]) / min(base[name]) for name in ("rollout_cpu_s", "logprobs_cpu_s"))
        cells = [
            row["precision"], str(row["k"]), row["mode"], f"{row['mean']:.1e}", f"{row['max']:.1e}",
            f"{100 * row['bit_equal']:.2f} %", f"{min(row['rollout_cpu_s']):.1f}", f"{min(row['logprobs_cpu_s']):.1f}",
            f"x{rollout:.2f}, x{logprobs:.2f}",
        ]  # fmt: skip
        lines.append(" | ".join(cells))
    return "\n".join(f"| {line} |" for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--samples", type=int, default=64, help="samples in all, for every k")
    parser.add_argument("--tokens", type=int, default=64, help="tokens per sample")
    parser.add_argument("--runs", type=int, default=3, help="timed runs of each mode")
    parser.add_argument("--json", type=Path, required=True, help="file for the results")
    args = parser.parse_args()
    facts, rows = machine(torch.get_num_threads()), []
    texts = [row["prompt"] for row in read_records(demo_path("heldout_helpful"), "prompt")]
    for dtype, name in ((torch.float32, "fp32"), (torch.bfloat16, "bf16")):
        model = load_model("smollm2", dtype)
        why = invariance.fault(model)
        print(f"{name}: {why or 'rows do not depend on their neighbours'}", flush=True)
        k = args.samples // args.prompts
        prompts = [encode_prompt(model.tokenizer, text) for text in texts[: args.prompts]]
        for row in compare(model, prompts, k, args.tokens, args.runs):
            rows.append({"precision": name, "fault": why} | row)
        print(table([row for row in rows if row["precision"] == name]), flush=True)
    with atomic_write(args.json, "w") as handle:
        handle.write(json.dumps({"machine": facts, "prompts": args.prompts, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
