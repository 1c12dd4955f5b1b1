"""The files an evaluation asks models with, and those their answers come in: which job makes which, and how it is read.

OUT/prompts.jsonl             the prompts, each with `id` and `set`
    choices.jsonl, lines.jsonl, texts.jsonl   items of the benchmarks: by log-probability, one line, any text
    answers-NAME.jsonl        NAME (model or base) on the prompts, as group records
    choices-NAME.jsonl, lines-NAME.jsonl, texts-NAME.jsonl   NAME on the items
    answers.jsonl, scores.jsonl   both models' answers to each prompt, and their scores
    truth-NAME.jsonl, info-NAME.jsonl   TruthfulQA's answers as judge models see them, and (-verdicts) what they say
Each is resumable by line and over ranks (train/lines.py).
"""

from pathlib import Path

from hpsafety.config import SampleConfig, ScoreConfig
from hpsafety.data.records import iter_json_lines, iter_records, write_records
from hpsafety.safety.continuation import continue_file
from hpsafety.safety.eval_benchmarks import LINES, TEXTS, Benchmarks
from hpsafety.safety.multiple_choice import ChoiceSettings, answer_file
from hpsafety.safety.sampling_job import sample_file
from hpsafety.safety.scoring_job import score_file
from hpsafety.train import distributed

OURS = (
    "prompts",
    "choices",
    "lines",
    "texts",
    "answers",
    "scores",
    "truth",
    "info",
    "to-rate",
    "eval",
    "lm-eval",
)
JUDGED = {"truth": "True", "info": "Helpful"}  # what a judge model is asked to complete with yes or no


def models(cfg) -> dict[str, str]:
    """The models to measure by name."""
    return {"model": cfg.model} | ({} if cfg.base is None else {"base": cfg.base})


def write_items(out: Path, prompts: list[dict], found: Benchmarks) -> None:
    """The files of items; one without an item is not written."""
    for name, rows in (
        ("prompts", prompts), ("choices", found.choice_rows()), ("lines", found.text_rows(LINES)),
        ("texts", found.text_rows(TEXTS)),
    ):  # fmt: skip
        if rows:
            write_records(out / f"{name}.jsonl", rows)


def sampling(cfg, model: str, data: Path, out: Path) -> SampleConfig:
    """What `hpsafety sample` would be told."""
    return SampleConfig(
        model=model, data=(str(data),), out=str(out), k=1, temperature=cfg.temperature, top_p=cfg.top_p,
        max_new_tokens=cfg.max_new_tokens, seed=cfg.seed, kv_memory=cfg.kv_memory, max_batch=cfg.max_batch,
        device=cfg.device, precision=cfg.precision,
    )  # fmt: skip


def choosing(cfg, model: str, out: Path) -> ChoiceSettings:
    return ChoiceSettings(
        model=model, out=str(out), precision=cfg.precision, tokens_per_batch=cfg.tokens_per_batch, resume=True
    )


def ask(cfg, out: Path, name: str, model: str, world) -> None:
    """Everything one model is asked (a collective call)."""
    if (out / "prompts.jsonl").exists():
        sample_file(sampling(cfg, model, out / "prompts.jsonl", out / f"answers-{name}.jsonl"), world)
    if (out / "choices.jsonl").exists():
        cfg_choice = choosing(cfg, model, out / f"choices-{name}.jsonl")
        answer_file(cfg_choice, str(out / "choices.jsonl"), world, f"choices, {name}")
    for kind, one_line in (("lines", True), ("texts", False)):
        if (out / f"{kind}.jsonl").exists():
            job = sampling(cfg, model, out / f"{kind}.jsonl", out / f"{kind}-{name}.jsonl")
            continue_file(job, str(out / f"{kind}.jsonl"), one_line, world, f"continuations, {name}")


def score(cfg, out: Path, world) -> None:
    """R_s and R_h of all answers, a prompt computed once for both models'; one model serves as both where only one is
    given (a collective call)."""
    if not (cfg.safety_rm or cfg.helpful_rm) or not (out / "prompts.jsonl").exists():
        return
    if world.is_main:
        files = [iter_records(out / f"answers-{name}.jsonl", "group") for name in models(cfg)]
        prompts = iter_records(out / "prompts.jsonl", "prompt")
        write_records(out / "answers.jsonl", (
            prompt | {"responses": [row["responses"][0] for row in rows]}
            for prompt, *rows in zip(prompts, *files, strict=True)
        ))  # fmt: skip
    distributed.barrier(world)
    score_file(ScoreConfig(
        safety_rm=cfg.safety_rm or cfg.helpful_rm, helpful_rm=cfg.helpful_rm or cfg.safety_rm,
        data=(str(out / "answers.jsonl"),), out=str(out / "scores.jsonl"), device=cfg.device, precision=cfg.precision,
        tokens_per_batch=cfg.tokens_per_batch,
    ), world)  # fmt: skip


def judge_written(cfg, out: Path, found: Benchmarks, name: str, world) -> None:
    """Asks the judge models, where there are any, about one model's answers to TruthfulQA (a collective call)."""
    for kind, word in JUDGED.items():
        judge = getattr(cfg, f"{kind}_judge")
        if judge == "overlap" or "truthfulqa" not in found.items:
            continue
        items = out / f"{kind}-{name}.jsonl"
        if world.is_main:
            texts = read_texts(out, "lines", name)
            write_records(items, (
                {"id": q.id, "choices": [" yes", " no"],
                 "text": f"Q: {q.question}\nA: {texts[f'truthfulqa:{q.id}']}\n{word}:"}
                for q in found.items["truthfulqa"]
            ))  # fmt: skip
        distributed.barrier(world)
        verdicts = choosing(cfg, judge, out / f"{kind}-{name}-verdicts.jsonl")
        answer_file(verdicts, str(items), world, f"{kind} judge, {name}")


# ---- reading what came ----


def read_texts(out: Path, kind: str, name: str) -> dict[str, str]:
    """Item -> text of one model's continuations; empty where none were asked for."""
    path = out / f"{kind}-{name}.jsonl"
    return {row["id"]: row["text"] for _, row in iter_json_lines(path)} if path.exists() else {}


def read_logprobs(out: Path, name: str) -> dict[str, list[float]]:
    """Item -> log-probability of each choice."""
    path = out / f"choices-{name}.jsonl"
    return {row["id"]: row["logprobs"] for _, row in iter_json_lines(path)} if path.exists() else {}


def read_verdicts(out: Path, kind: str, name: str) -> dict[str, float] | None:
    """Question -> 1 where the judge model says yes; None where it was not asked."""
    path = out / f"{kind}-{name}-verdicts.jsonl"
    if not path.exists():
        return None
    return {row["id"]: float(row["logprobs"][0] > row["logprobs"][1]) for _, row in iter_json_lines(path)}


def read_answers(out: Path, name: str) -> list[str]:
    return [row["responses"][0] for row in iter_records(out / f"answers-{name}.jsonl", "group")]


def read_scores(out: Path, place: int, cfg) -> dict[str, list[float]]:
    """ "safety" and "helpful" -> R per answer of the model at `place`, of the reward models that were given."""
    kinds = [kind for kind in ("safety", "helpful") if getattr(cfg, f"{kind}_rm")]
    rows = [row for _, row in iter_json_lines(out / "scores.jsonl")] if kinds else []
    return {kind: [row[kind][place] for row in rows] for kind in kinds}
