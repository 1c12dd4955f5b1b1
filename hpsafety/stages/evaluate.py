"""The safety evaluation of a checkpoint, and of another, the base, in the same table (spec section 9, EVAL-1 to 10).

OUT/eval.json        a metric per key: value, n, low, high, judge; with a base its figures and the paired change
    report.json      settings, scores before and after, what was left out; report.html: tables and figures
    lm-eval-NAME.json   the same in lm-evaluation-harness' form
    to-rate.jsonl    the answers to adversarial prompts, for people to rate; --ratings brings what they say
and the files of hpsafety/safety/eval_jobs.py, from which all of it follows.
"""

import dataclasses
import json
import time
from pathlib import Path

from hpsafety.data.records import write_records
from hpsafety.data.sources import load_rows
from hpsafety.errors import InputError
from hpsafety.files import atomic_write
from hpsafety.safety import eval_jobs
from hpsafety.safety.eval_answers import SETS, Answers, agreement_entries, answer_columns
from hpsafety.safety.eval_benchmarks import (
    Benchmarks,
    bold_columns,
    choice_columns,
    choose,
    read_benchmarks,
    toxigen_columns,
    written_columns,
)
from hpsafety.safety.eval_harness import harness_form
from hpsafety.safety.eval_metrics import Column, metrics
from hpsafety.safety.eval_page import show_table, write_page
from hpsafety.safety.intervals import wilson
from hpsafety.safety.ratings import Ratings, read_ratings
from hpsafety.safety.toxicity import BUILT_IN, load_classifier
from hpsafety.safety.violation import load_judge, response_id, set_of
from hpsafety.train import distributed, precision, stage
from hpsafety.train.metrics import say
from hpsafety.train.rundir import RunDir, input_hashes, model_hashes, tree_hashes

MODELS = ("model", "base", "safety_rm", "helpful_rm", "truth_judge", "info_judge")
SHOWN = ("model", "base", "safety_rm", "helpful_rm", "judge", "truth_judge", "info_judge", "temperature", "top_p",
         "max_new_tokens", "seed", "limit", "precision")  # fmt: skip  # settings that report.json repeats
OUTPUTS = ("eval.json", "report.json", "report.html", "to-rate.jsonl")


def run(cfg) -> None:
    """hpsafety eval: see EvalConfig. Writes the files named above to cfg.out."""
    with stage.ranks(cfg.device) as world:
        _run(cfg, world)


def _run(cfg, world) -> None:
    found = read_benchmarks(cfg)
    prompts = read_prompts(cfg)
    if cfg.judge != "rule":
        load_judge(cfg.judge)
    if cfg.classifier != BUILT_IN:  # the built-in one may be missing; one that was asked for may not
        load_classifier(cfg.classifier, cfg.toxic_label)
    given = {name: getattr(cfg, name) for name in MODELS}
    hashes = model_hashes({name: path for name, path in given.items() if path not in (None, "overlap")})
    # Ratings come after the answers: they are no part of what makes an evaluation another one.
    inputs = input_hashes([*cfg.data, *found.files]) | hashes
    if Path(cfg.classifier).is_dir():
        inputs |= tree_hashes(Path(cfg.classifier))
    out = RunDir(cfg.out, "eval", dataclasses.replace(cfg, ratings=()), inputs, world)
    if out.complete and not cfg.ratings:
        if world.is_main:
            say(f"{cfg.out}: this evaluation is complete; nothing to do (--no-resume makes it anew)")
        return
    if out.complete:  # ratings that do not fit must not cost the report that is there
        read_ratings(cfg.ratings, set(to_rate(prompts, read_texts(cfg, out.path))))
    dtype, why = precision.choose(cfg.precision, world.device)
    cfg = dataclasses.replace(cfg, precision=precision.name(dtype))
    counts = {name: len(items) for name, items in found.items.items()}
    counts |= {part: sum(row["set"] == part for row in prompts) for part in SETS} if prompts else {}
    parts = ", ".join(f"{count} {name}" for name, count in counts.items())
    decoding = f"temperature {cfg.temperature}, top-p {cfg.top_p}"
    stage.begin(out, f"eval: {parts or 'nothing'}; {decoding}; {why}", counts, world)
    if world.is_main:
        for name, reason in found.why.items():
            if cfg.benchmark_files(name):
                say(f"eval: {name} is not measured: {reason}")
        prepare(out, prompts, found)
    distributed.barrier(world)
    for name, model in eval_jobs.models(cfg).items():
        eval_jobs.ask(cfg, out.path, name, model, world)
        eval_jobs.judge_written(cfg, out.path, found, name, world)
    eval_jobs.score(cfg, out.path, world)
    if world.is_main:
        report(cfg, prompts, found, out.path)
    out.finish(counts, tuple(name for name in OUTPUTS if (out.path / name).exists()))
    if world.is_main:
        out.checkpoints.rmdir()  # an evaluation has none
        say(f"eval: wrote {out.path / 'report.html'} and eval.json")
    distributed.barrier(world)


def read_prompts(cfg) -> list[dict]:
    """The rows of --data, each with its set and an id of its own, at most --limit of each set."""
    if not cfg.data:
        return []
    rows, seen = [], set()
    for number, row in enumerate(load_rows(cfg.data, "prompt"), start=1):
        name = str(row["id"]) if row.get("id") is not None else f"row-{number}"
        name = name if name not in seen else f"{name}#{number}"
        seen.add(name)
        kept = {k: v for k, v in row.items() if k not in ("response", "split", "responses", "samples")}
        rows.append(kept | {"id": name, "set": set_of(row, cfg.all_safety)})
    return [
        row for part in SETS for row in choose([r for r in rows if r["set"] == part], cfg.limit, cfg.seed)
    ]


def prepare(out: RunDir, prompts: list[dict], found: Benchmarks) -> None:
    """Writes the items; a fresh start inherits nothing."""
    if out.fresh:
        for path in [p for name in eval_jobs.OURS for p in out.path.glob(f"{name}*.json*")]:
            if path.is_dir():
                for part in path.iterdir():
                    part.unlink()
                path.rmdir()
            else:
                path.unlink()
    eval_jobs.write_items(out.path, prompts, found)


# ---- what came out ----


def report(cfg, prompts: list[dict], found: Benchmarks, out: Path) -> None:
    """eval.json, report.json, report.html, lm-eval-*.json and the table, from the files of all jobs."""
    classifier, scores = load_toxicity(cfg)
    texts = read_texts(cfg, out) if prompts else {}
    rated = to_rate(prompts, texts)
    if rated:
        write_records(out / "to-rate.jsonl", rated.values())
    ratings = read_ratings(cfg.ratings, set(rated)) if cfg.ratings else None
    columns, answers = {}, {}
    for place, name in enumerate(eval_jobs.models(cfg)):
        columns[name] = {}
        if prompts:
            answers[name] = Answers(
                prompts, texts[name], eval_jobs.read_scores(out, place, cfg), scores and toxicity(scores, texts[name]),
                classifier,
            )  # fmt: skip
            names = {"safety": cfg.safety_rm, "helpful": cfg.helpful_rm}
            columns[name] |= answer_columns(answers[name], cfg.judge, ratings, names)
        columns[name] |= benchmark_columns(cfg, found, out, name, classifier, scores)
    result = metrics(columns["model"], columns.get("base"), cfg.seed)
    if ratings is not None:
        result |= agreement_entries(ratings)
    told = {
        "settings": {name: getattr(cfg, name) for name in SHOWN}, "notes": notes(found, ratings),
        "prompts": {part: sum(row["set"] == part for row in prompts) for part in SETS} if prompts else None,
        "scatter": scatter(answers, cfg.seed) if cfg.base else {},
    }  # fmt: skip
    for name, content in {"eval.json": result, "report.json": told, **harness_files(columns, cfg)}.items():
        with atomic_write(out / name) as handle:
            json.dump(content, handle, ensure_ascii=False, indent=1, allow_nan=False)
    write_page(result, told, out / "report.html")
    show_table(result, cfg.base is not None)


def benchmark_columns(
    cfg, found: Benchmarks, out: Path, name: str, classifier: str, scores
) -> dict[str, Column]:
    """One model's columns of all benchmarks, measured or not."""
    lines, texts = eval_jobs.read_texts(out, "lines", name), eval_jobs.read_texts(out, "texts", name)
    verdicts = [eval_jobs.read_verdicts(out, kind, name) for kind in eval_jobs.JUDGED]
    return (
        choice_columns(found, eval_jobs.read_logprobs(out, name))
        | written_columns(found, lines, *verdicts, (cfg.truth_judge, cfg.info_judge))
        | toxigen_columns(found, lines, scores, classifier)
        | bold_columns(found, texts)
    )


def load_toxicity(cfg):
    """(name, function from texts to p(toxic)) of the classifier; (why not, None) where it is not installed."""
    try:
        found = load_classifier(cfg.classifier, cfg.toxic_label)
    except ModuleNotFoundError as error:
        return f"the classifier needs the package {error.name}", None
    except InputError as error:
        return str(error), None
    return found.name, found.scores


def toxicity(scores, texts: list[str]) -> list[float]:
    """p(toxic) of each text; an empty one is not toxic."""
    found = iter(scores([text for text in texts if text.strip()]))
    return [float(next(found)) if text.strip() else 0.0 for text in texts]


def read_texts(cfg, out: Path) -> dict[str, list[str]]:
    """Each model's answers to the prompts."""
    return {name: eval_jobs.read_answers(out, name) for name in eval_jobs.models(cfg)}


def to_rate(prompts: list[dict], texts: dict[str, list[str]]) -> dict[str, dict]:
    """response_id -> row of each answer to an adversarial prompt, in an order that does not tell whose it is."""
    rows = {}
    for said in texts.values():
        for prompt, text in zip(prompts, said, strict=True):
            if prompt["set"] == "adversarial":
                row = {"prompt_id": prompt["id"], "response_id": response_id(prompt["id"], text)}
                rows[row["response_id"]] = row | {"prompt": prompt["prompt"], "response": text}
    return dict(sorted(rows.items()))


def scatter(answers: dict[str, Answers], seed: int) -> dict[str, dict]:
    """Scores before and after of each reward model on its own set, and the share of points above y = x (EVAL-9)."""
    out = {}
    for kind, part in (("safety", "adversarial"), ("helpful", "helpful")):
        sides = [answers[name] for name in ("base", "model") if name in answers]
        if len(sides) < 2 or kind not in sides[0].scores or not sides[0].of(part):
            continue
        before, after = ([side.scores[kind][i] for i in side.of(part)] for side in sides)
        above = wilson(sum(y > x for x, y in zip(before, after, strict=True)), len(before))
        out[f"{kind} score, {part} prompts"] = {
            "before": before, "after": after,
            "above": {"value": above.value, "n": above.total, "low": above.low, "high": above.high},
        }  # fmt: skip
    return out


def notes(found: Benchmarks, ratings: Ratings | None) -> list[str]:
    """What a reader of the figures must know about the items."""
    told = {
        "toxigen": "{} prompts of ToxiGen on groups outside the paper's 13 were left out.",
        "bold": "{} prompts of BOLD on Hinduism and Atheism were left out: too few, as in Llama 2.",
    }
    out = [told[name].format(count) for name, count in found.left_out.items() if count]
    if ratings is not None:
        out.append(
            f"{len(ratings.of)} answers were rated by {ratings.label()}; raters in all: {ratings.raters}."
        )
    return out


def harness_files(columns: dict[str, dict[str, Column]], cfg) -> dict[str, dict]:
    ended = time.time()
    return {
        f"lm-eval-{name}.json": harness_form(
            metrics(own, None, cfg.seed),
            {"model": getattr(cfg, name), "limit": cfg.limit, "seed": cfg.seed},
            ended,
        )
        for name, own in columns.items()
    }
