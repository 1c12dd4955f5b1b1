"""Throughput and memory of an audit on a synthetic corpus, and its built-in classifier against people's labels.

    python -m bench.trials.audit --data FOLDER --work DIR --json results.json [--mb 1000] [--workers N ...]

FOLDER holds c4_demo_docs.jsonl ({text}), whose lines the corpus is drawn from, and the labelled sets surge_toxicity
({text, label Toxic or Not Toxic}), hatecheck ({text, label hateful or non-hateful, category}) and openai_moderation
({text, labels of 0 and 1}). The corpus is removed at the end.

throughput  wall time of the whole command, and its processor time, which others' work on the machine touches less;
            memory is the resident memory of all its processes together, twice a second
agreement   AUC of the document score, and at the threshold 0.5 precision and recall: 95 % intervals by bootstrap and
            Wilson
"""

import argparse
import json
import os
import random
import resource
import shutil
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np

from bench.machine import machine
from hpsafety.safety.intervals import bootstrap, wilson
from hpsafety.safety.toxicity import BUILT_IN, load_classifier, score_documents

THRESHOLD = 0.5


def rows_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


# ---- agreement ----


def labelled(folder: Path) -> dict[str, list[tuple[str, bool, str]]]:
    """(text, toxic as people say, group of rows) of each set. Moderation: any attribute of 1 is toxic."""
    moderation = rows_of(folder / "openai_moderation.jsonl")
    return {
        "surge_toxicity": [
            (r["text"], r["label"] == "Toxic", "") for r in rows_of(folder / "surge_toxicity.jsonl")
        ],
        "hatecheck": [
            (r["text"], r["label"] == "hateful", r["category"]) for r in rows_of(folder / "hatecheck.jsonl")
        ],
        "openai_moderation": [(r["text"], any(r["labels"].values()), "") for r in moderation],
        "openai_moderation, hate or violence": [
            (r["text"], any(r["labels"].get(k, 0) for k in ("H", "H2", "V", "V2", "HR")), "")
            for r in moderation
        ],
    }


def auc(scores: np.ndarray, toxic: np.ndarray) -> float:
    """Chance that a toxic text scores above another one, ties by half; nan without one of both."""
    ranked = np.unique(scores, return_inverse=True)[1]
    n, m = int(toxic.sum()), int((~toxic).sum())
    if not n or not m:
        return float("nan")
    other = np.bincount(ranked[~toxic], minlength=ranked.max() + 1)
    below = np.cumsum(other) - other
    return float((below[ranked[toxic]] + other[ranked[toxic]] / 2).sum() / (n * m))


def agreement(rows: list[tuple[str, bool, str]], scores: np.ndarray) -> dict:
    """n, AUC, precision, recall and false positives of the scores against the labels."""
    toxic = np.array([label for _, label, _ in rows])
    flagged = scores >= THRESHOLD

    def statistic(samples):
        return np.array([auc(scores[i], toxic[i]) for i in samples.astype(int)])

    hits = int((flagged & toxic).sum())
    return {
        "n": len(rows), "toxic": int(toxic.sum()),
        "auc": asdict(bootstrap(np.arange(len(rows)), statistic, seed=0, resamples=1000)),
        "precision": asdict(wilson(hits, int(flagged.sum()))), "recall": asdict(wilson(hits, int(toxic.sum()))),
        "false_positives": asdict(wilson(int((flagged & ~toxic).sum()), int((~toxic).sum()))),
    }  # fmt: skip


def measure_agreement(folder: Path) -> dict:
    classifier, out = load_classifier(BUILT_IN), {}
    for name, rows in labelled(folder).items():
        scores = np.array([score for score, _ in score_documents([text for text, _, _ in rows], classifier)])
        out[name] = agreement(rows, scores)
        groups = sorted({group for _, _, group in rows} - {""})
        flagged = {
            g: [s >= THRESHOLD for s, row in zip(scores, rows, strict=True) if row[2] == g] for g in groups
        }
        if groups:
            out[name]["flagged_by_category"] = {
                g: asdict(wilson(int(sum(f)), len(f))) for g, f in flagged.items()
            }
    return {"classifier": classifier.name, "threshold": THRESHOLD, "sets": out}


# ---- throughput ----


def write_corpus(path: Path, source: Path, megabytes: float) -> int:
    """JSON lines of documents drawn line by line from `source`, of C4's spread of lengths; the number of documents."""
    lines = [line for row in rows_of(source) for line in row["text"].split("\n") if line.strip()]
    rng, written, count = random.Random(0), 0, 0
    with open(path, "w", encoding="utf-8") as handle:
        while written < megabytes * 1e6:
            text = "\n".join(rng.choices(lines, k=max(1, int(rng.lognormvariate(1.6, 1.0)))))
            written += handle.write(json.dumps({"id": count, "text": text}) + "\n")
            count += 1
    return count


def resident_mb(root: int) -> float:
    """Resident memory of a process and all below it, MB (proportional: shared pages are counted once)."""
    parents = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parents[int(entry.name)] = int((entry / "stat").read_text().rsplit(")", 1)[1].split()[1])
            except OSError:
                continue
    mine, total = {root}, 0.0
    for _ in range(4):
        mine |= {pid for pid, parent in parents.items() if parent in mine}
    for pid in mine:
        try:
            rows = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
        except OSError:
            continue
        total += next((int(row.split()[1]) / 1000 for row in rows if row.startswith("Pss:")), 0.0)
    return total


def cpu_seconds() -> float:
    """Of all processes that have ended below this one."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def measure_throughput(corpus: Path, work: Path, workers: int) -> dict:
    """One whole command: seconds, MB/s and the memory of all its processes at ten moments and at most."""
    out = work / f"out-{workers}"
    shutil.rmtree(out, ignore_errors=True)
    command = [sys.executable, "-m", "hpsafety", "audit", "--data", str(corpus), "--out", str(out)]
    started, before, memory = time.monotonic(), cpu_seconds(), []
    with open(work / "audit.log", "a") as log:
        process = subprocess.Popen([*command, "--workers", str(workers)], stdout=log, stderr=log)
        while process.poll() is None:
            memory.append(resident_mb(process.pid))
            time.sleep(0.5)
    if process.returncode:
        raise SystemExit(f"the audit ended with {process.returncode}; see {work / 'audit.log'}")
    cpu = cpu_seconds() - before
    seconds, megabytes = time.monotonic() - started, corpus.stat().st_size / 1e6
    counts = json.loads((out / "audit.json").read_text())["corpus"]["counts"]
    tenths = [max(memory[len(memory) * i // 10 : len(memory) * (i + 1) // 10] or [0.0]) for i in range(10)]
    return {
        "workers": workers, "mb": megabytes, "documents": counts["documents"], "seconds": round(seconds, 1),
        "mb_per_s": round(megabytes / seconds, 2),
        "cpu_seconds": round(cpu, 1), "mb_per_cpu_second": round(megabytes / cpu, 2), "load_average": os.getloadavg(),
        "peak_mb": round(max(memory)),
        "peak_mb_by_tenth_of_the_time": [round(value) for value in tenths],
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--mb", type=float, nargs="+", default=[100.0, 1000.0])
    parser.add_argument("--workers", type=int, nargs="+", default=[os.cpu_count() or 1])
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    result = {
        "machine": machine(max(args.workers)),
        "agreement": measure_agreement(args.data),
        "throughput": [],
    }
    corpus = args.work / "synthetic.jsonl"
    for megabytes in args.mb:
        write_corpus(corpus, args.data / "c4_demo_docs.jsonl", megabytes)
        result["throughput"] += [measure_throughput(corpus, args.work, n) for n in args.workers]
        corpus.unlink()
    args.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
