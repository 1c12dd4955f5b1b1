"""hpsafety's log-probability tasks against lm-evaluation-harness: the same model, items and prompts; figures and time.

    python -m bench.trials.harness --data FOLDER --work DIR --json results.json [--items N N N] [--runs N] [--threads N]

FOLDER holds truthfulqa.jsonl, bbq_age.jsonl, bbq_religion.jsonl and crows_pairs.jsonl. The harness (package lm_eval)
must be importable. It runs its own tasks truthfulqa_mc1, truthfulqa_mc2, bbq and crows_pairs_english on the built-in
model, which is saved as a Hugging Face directory first; only the data is read from here. Both sides run in turn, fp32.
"""

import argparse
import json
import os
import time
from pathlib import Path

import torch

from bench.machine import machine
from hpsafety.config import EvalConfig
from hpsafety.data.batches import micro_batches
from hpsafety.data.records import write_records
from hpsafety.model.io import load_model, save_model
from hpsafety.safety.benchmarks import truthfulqa
from hpsafety.safety.eval_benchmarks import choice_columns, read_benchmarks
from hpsafety.safety.eval_metrics import estimate
from hpsafety.safety.multiple_choice import choice_logprobs, encode_choices

# our measure -> (the harness' task, its metric)
SAME = {
    "truthfulqa_mc1": ("truthfulqa_mc1", "acc"), "truthfulqa_mc2": ("truthfulqa_mc2", "acc"),
    "bbq_accuracy_ambig": ("bbq", "accuracy_amb"), "bbq_accuracy_disambig": ("bbq", "accuracy_disamb"),
    "bbq_bias_ambig": ("bbq", "amb_bias_score"), "bbq_bias_disambig": ("bbq", "disamb_bias_score"),
    "crows_pairs": ("crows_pairs_english", "pct_stereotype"),
}  # fmt: skip
TASKS = {
    "truthfulqa": ("truthfulqa_mc1", "truthfulqa_mc2"),
    "bbq": ("bbq",),
    "crows_pairs": ("crows_pairs_english",),
}
FILES = {"bbq": "bbq_multiple_choice"}  # whose name is not the task's
SPLIT = {"truthfulqa": "validation", "bbq": "test", "crows_pairs": "test"}


def rows_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def published_question(question: truthfulqa.Question) -> dict:
    """A question as Hugging Face's multiple_choice has it."""
    best, true, false = question.best, question.correct, question.incorrect
    return {
        "id": question.id, "question": question.question,
        "mc1_targets": {"choices": [best, *false], "labels": [1] + [0] * len(false)},
        "mc2_targets": {"choices": [*true, *false], "labels": [1] * len(true) + [0] * len(false)},
    }  # fmt: skip


def published(row: dict) -> dict:
    """A row of BBQ or CrowS-Pairs with its publisher's names."""
    if "sent_more" in row:
        return {k: row[k] for k in ("id", "sent_more", "sent_less")} | {"bias_type": row["category"]}
    names = {"polarity": "question_polarity", "condition": "context_condition"}
    kept = ("context", "question", "category", "label", "answer_info", *names)
    return {
        **{names.get(k, k): row[k] for k in kept}, **{f"ans{i}": text for i, text in enumerate(row["choices"])},
        "additional_metadata": {"stereotyped_groups": row["stereotyped"]}, "example_id": row["id"],
    }  # fmt: skip


def write_data(folder: Path, work: Path, items: list[int]) -> dict[str, Path]:
    """The first rows of each set, in the form both sides read."""
    limit = dict(zip(TASKS, items, strict=True))
    files = {"bbq": ["bbq_age", "bbq_religion"], "crows_pairs": ["crows_pairs"]}
    rows = {
        name: [
            published(row)
            for source in sources
            for row in rows_of(folder / f"{source}.jsonl")[: limit[name] // len(sources)]
        ]
        for name, sources in files.items()
    }
    rows["truthfulqa"] = [
        published_question(q) for q in truthfulqa.read(folder / "truthfulqa.jsonl")[: limit["truthfulqa"]]
    ]
    for name, part in rows.items():
        write_records(work / f"{name}.jsonl", part)
    return {name: work / f"{name}.jsonl" for name in TASKS}


def ours(model, data: dict[str, Path], name: str) -> tuple[dict[str, float], float, dict]:
    """(measures, seconds without loading, tokens) of one set."""
    given = {"truthfulqa": str(data[name])} if name == "truthfulqa" else {name: (str(data[name]),)}
    given = {"crows_pairs": str(data[name])} if name == "crows_pairs" else given
    started = time.perf_counter()
    found = read_benchmarks(EvalConfig(model="smollm2", out="-", **given))
    rows = found.choice_rows()
    groups = [encode_choices(model.tokenizer, row["text"], row["choices"]) for row in rows]
    logprobs = dict(zip((row["id"] for row in rows), choice_logprobs(model, groups, 2048), strict=True))
    columns = choice_columns(found, logprobs)
    seconds = time.perf_counter() - started
    tokens = {
        "computed": sum(len(g.prompt) + sum(map(len, g.responses)) for g in groups),
        "equivalent": sum(len(g.responses) * len(g.prompt) + sum(map(len, g.responses)) for g in groups),
        "micro_batches": len(micro_batches(groups, 2048)),
    }
    return {key: estimate(columns[key], 0)["value"] for key in SAME if columns[key].values}, seconds, tokens


def theirs(lm, data: dict[str, Path], name: str) -> tuple[dict[str, float], float]:
    """(measures, seconds in its loglikelihood calls) of one set by the harness; its own overhead is left out."""
    import lm_eval

    tasks = []
    for task in TASKS[name]:  # the harness' own task, included, on our file
        own = next((Path(lm_eval.__file__).parent / "tasks").rglob(f"{FILES.get(task, task)}.yaml"))
        tasks.append(data[name].with_name(f"{task}.yaml"))
        tasks[-1].write_text(
            f"include: {own}\ntask: {task}_local\ndataset_path: json\ndataset_name: null\n"
            f"dataset_kwargs:\n  data_files:\n    {SPLIT[name]}: {data[name]}\n"
        )
    settings = {"num_fewshot": 0, "bootstrap_iters": 0, "log_samples": False}
    spent, real = [], lm.loglikelihood

    def timed(requests):
        started = time.perf_counter()
        try:
            return real(requests)
        finally:
            spent.append(time.perf_counter() - started)

    lm.loglikelihood = timed
    results = lm_eval.simple_evaluate(model=lm, tasks=list(map(str, tasks)), **settings)["results"]
    lm.loglikelihood = real
    seconds = sum(spent)
    return {
        key: float(results[f"{task}_local"][f"{metric},none"])
        for key, (task, metric) in SAME.items() if f"{task}_local" in results
    }, seconds  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for flag in ("--data", "--work", "--json"):
        parser.add_argument(flag, required=True)
    parser.add_argument("--items", type=int, nargs=3, default=[100, 200, 1000], help="of each set, at most")
    parser.add_argument("--runs", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--batch", type=int, default=16, help="the harness' batch size")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
    work = Path(args.work)
    work.mkdir(parents=True, exist_ok=True)
    data = write_data(Path(args.data), work, args.items)
    model = load_model("smollm2", torch.float32)
    save_model(model, str(work / "model"))
    from lm_eval.models.huggingface import HFLM

    lm = HFLM(pretrained=str(work / "model"), device="cpu", dtype="float32", batch_size=args.batch)
    torch.set_num_threads(args.threads)
    out = {"machine": machine(args.threads), "threads": args.threads, "harness_batch": args.batch, "sets": {}}
    for name in data:
        times, tokens = {"ours": [], "theirs": []}, {}
        for _ in range(args.runs):
            mine, seconds, tokens = ours(model, data, name)
            times["ours"].append(seconds)
            other, seconds = theirs(lm, data, name)
            times["theirs"].append(seconds)
        out["sets"][name] = {
            "items": len(rows_of(data[name])), "ours": mine, "theirs": other, "seconds": times, "tokens": tokens,
            "ratio": min(times["theirs"]) / min(times["ours"]),
        }  # fmt: skip
        Path(args.json).write_text(json.dumps(out, indent=1) + "\n", encoding="utf-8")
        print(name, json.dumps(out["sets"][name]), flush=True)


if __name__ == "__main__":
    main()
