"""Reward models on a few hundred pairs, with the built-in model: what the auxiliary loss and the margin do.

    python -m bench.trials.reward --data FOLDER --work DIR --json results.json

FOLDER holds hh_harmless_pairs.jsonl ({prompt, chosen, rejected}) and diasafety.jsonl ({prompt, response, label safe or
unsafe}). A run that is finished is not repeated, one that was interrupted goes on: start the same command again.

harmless   300 pairs of hh_harmless_pairs, 200 held out: ranking alone (its rows have no safety bins)
auxiliary  every safe answer of diasafety against every unsafe one to the same prompt (bin 1), five folds by prompt, so
           that each pair is held out once; the auxiliary loss off and on, three seeds
margin     the repository's own rated pairs, its split valid held out; margins none, small, large, three seeds
"""

import argparse
import json
import random
import shutil
import time
from pathlib import Path

from bench.machine import machine
from hpsafety.config import RewardConfig
from hpsafety.data.demo import path as demo_path
from hpsafety.data.records import normalise_prompt, read_records, write_records
from hpsafety.safety.intervals import wilson
from hpsafety.stages import reward

SEEDS, FOLDS = (0, 1, 2), 5
SETTINGS = {"model": "smollm2", "lr": 5e-5, "epochs": 1, "checkpoint_every": 20, "max_length": 512}
BATCH = {"harmless": 8, "auxiliary": 4, "margin": 8}


def rows_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def harmless(folder: Path) -> list[dict]:
    """300 rows to train on, 200 held out, drawn by prompt."""
    rows = [
        {k: row[k] for k in ("prompt", "chosen", "rejected", "id")}
        for row in rows_of(folder / "hh_harmless_pairs.jsonl")
    ]
    seen, kept = set(), []
    for row in random.Random(0).sample(rows, len(rows)):
        prompt = normalise_prompt(row["prompt"])
        if prompt not in seen and row["chosen"] != row["rejected"] and len(prompt) < 1200:
            seen.add(prompt)
            kept.append(row)
    return [row | {"split": "train" if i < 300 else "valid"} for i, row in enumerate(kept[:500])]


def two_sided(folder: Path) -> list[list[dict]]:
    """Pairs of bin 1 by prompt: every safe against every unsafe answer."""
    answers: dict[str, dict] = {}
    for row in rows_of(folder / "diasafety.jsonl"):
        of = answers.setdefault(
            normalise_prompt(row["prompt"]), {"prompt": row["prompt"], "safe": [], "unsafe": []}
        )
        of[row["label"]].append(row["response"])
    return [
        [
            {"prompt": of["prompt"], "chosen": good, "rejected": bad, "safety_bin": 1}
            for good in of["safe"]
            for bad in of["unsafe"]
            if good != bad
        ]
        for of in answers.values()
        if of["safe"] and of["unsafe"]
    ]


def plan(folder: Path, work: Path) -> list[dict]:
    """The runs, in order: {trial, variant, seed, fold, data, flags}; writes their data files."""
    files = work / "data"
    files.mkdir(parents=True, exist_ok=True)
    write_records(files / "harmless.jsonl", harmless(folder))
    write_records(files / "margin.jsonl", read_records(demo_path("preferences"), "preference"))
    prompts = two_sided(folder)
    order = random.Random(0).sample(range(len(prompts)), len(prompts))
    for fold in range(FOLDS):
        held = {*order[fold::FOLDS]}
        pairs = [
            row | {"split": "valid" if i in held else "train"}
            for i, group in enumerate(prompts)
            for row in group
        ]
        write_records(files / f"auxiliary-{fold}.jsonl", pairs)
    runs = [
        {"trial": "auxiliary", "variant": f"weight {weight}", "seed": seed, "fold": fold,
         "data": f"auxiliary-{fold}.jsonl", "flags": {"kind": "safety", "aux_weight": float(weight)}}
        for seed in SEEDS for weight in (0, 1) for fold in range(FOLDS)
    ]  # fmt: skip
    runs += [
        {"trial": "harmless", "variant": "ranking alone", "seed": 0, "fold": 0, "data": "harmless.jsonl",
         "flags": {"kind": "safety", "aux_weight": 0.0}}
    ]  # fmt: skip
    runs += [
        {"trial": "margin", "variant": margin, "seed": seed, "fold": 0, "data": "margin.jsonl",
         "flags": {"kind": "helpfulness", "margin": margin}}
        for seed in SEEDS for margin in ("none", "small", "large")
    ]  # fmt: skip
    # Every variant once before any a second time; then the margins, whose effect is the smallest against the seeds'.
    return sorted(runs, key=lambda spec: (spec["seed"] > 0, spec["trial"] != "margin", spec["seed"]))


def run_one(spec: dict, work: Path) -> dict:
    """Trains one model, or finds it trained; returns its held-out measures. Only the report is kept of the run."""
    name = f"{spec['trial']}-{spec['variant'].replace(' ', '_')}-seed{spec['seed']}-fold{spec['fold']}"
    out, started = work / name, time.perf_counter()
    config = RewardConfig(
        data=(str(work / "data" / spec["data"]),), out=str(out), seed=spec["seed"], batch=BATCH[spec["trial"]],
        **SETTINGS, **spec["flags"],
    )  # fmt: skip
    reward.run(config)
    for folder in ("model", "checkpoints", "tb"):
        shutil.rmtree(out / folder, ignore_errors=True)
    manifest = json.loads((out / "manifest.json").read_text())
    metrics = rows_of(out / "metrics.jsonl")
    held = json.loads((out / "report.json").read_text())["held_out"]
    return {k: v for k, v in spec.items() if k != "data"} | {
        "steps": len(metrics), "groups": manifest["counts"]["groups"], "train_s": round(metrics[-1]["elapsed_s"], 1),
        "tokens": metrics[-1]["tokens"], "all_s": round(time.perf_counter() - started, 1),
        "held_out": {k: held[k] for k in ("pairs", "loss", "accuracy", "unsafe", "histogram", "mean_score")},
    }  # fmt: skip


def pooled(rows: list[dict], *path: str) -> tuple[int, int]:
    """(count, total) of a rate, summed over rows (folds)."""
    count = total = 0
    for row in rows:
        rate = row["held_out"]
        for key in path:
            rate = rate[key]
        count, total = count + rate["count"], total + rate["total"]
    return count, total


def share(results: list[dict], trial: str, variant: str, *path: str) -> str:
    """'63.1 % (57.0-68.8; seeds 61.2 63.5 64.6)': the mean over seeds with the Wilson interval of one seed's number of
    examples, since all seeds see the same ones."""
    rows = [row for row in results if (row["trial"], row["variant"]) == (trial, variant)]
    per_seed = [pooled([r for r in rows if r["seed"] == s], *path) for s in sorted({r["seed"] for r in rows})]
    values = [count / total for count, total in per_seed if total]
    if not values:
        return "none"
    total = max(total for _, total in per_seed)
    rate = wilson(round(sum(values) / len(values) * total), total)
    seeds = " ".join(f"{100 * value:.1f}" for value in values)
    mean = 100 * sum(values) / len(values)
    return f"{mean:.1f} % ({100 * rate.low:.1f}-{100 * rate.high:.1f}; n = {total}; seeds {seeds})"


def tables(results: list[dict]) -> str:
    """Everything that came out, as text."""
    lines = []
    for trial in ("harmless", "auxiliary", "margin"):
        variants = list(dict.fromkeys(row["variant"] for row in results if row["trial"] == trial))
        measures = {"held-out pair accuracy": ("accuracy", "all")}
        if trial == "auxiliary":
            measures |= {
                f"unsafe {word} at R < {t}": ("unsafe", f"{word}_below_{t}")
                for t in (0.5, 0.15)
                for word in ("recall", "precision")
            }
        if trial == "margin":
            names = ("significantly", "better", "slightly", "negligibly")
            measures |= {f"accuracy, {name}": ("accuracy", "rating", name) for name in names}
        for label, path in measures.items():
            for variant in variants:
                lines.append(f"{trial:10} {variant:14} {label:30} {share(results, trial, variant, *path)}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="folder of the public sets")
    parser.add_argument("--work", type=Path, required=True, help="folder for data files and runs")
    parser.add_argument("--json", type=Path, required=True, help="file for the results")
    args = parser.parse_args()
    import torch

    facts, results = machine(torch.get_num_threads()), []
    for spec in plan(args.data, args.work):
        results.append(run_one(spec, args.work))
        record = {"machine": facts, "settings": SETTINGS | {"batch": BATCH}, "runs": results}
        args.json.write_text(json.dumps(record, indent=None) + "\n", encoding="utf-8")
    print(tables(results))


if __name__ == "__main__":
    main()
