"""Safety context distillation: a preprompt's effect, where the safety reward model wants it, goes into the weights
(spec section 7, CD-1..8).

OUT/samples/        the arms: plain.jsonl (y0), none.jsonl (a second plain sample: the control), generic.jsonl and
                    template.jsonl, answers.jsonl and scores.jsonl of all of them behind the bare prompts
OUT/decisions.jsonl one line per sample of the chosen arm; OUT/train.jsonl  the rows trained on, without preprompt
OUT/model/          the model that learnt them
OUT/heldout/        greedy answers on held-out rows: the model before, with each preprompt, and after
OUT/report.json, report.html
"""

import json
import shutil
from collections import Counter
from itertools import groupby
from pathlib import Path

import torch

from hpsafety.data.batches import drop_long
from hpsafety.data.chat import encode_prompt
from hpsafety.data.records import write_records
from hpsafety.data.sources import load_rows
from hpsafety.errors import InputError, RunError
from hpsafety.files import atomic_write
from hpsafety.model.io import load_model
from hpsafety.rollout.scoring import check_encoding
from hpsafety.safety import distill_arms, distill_report
from hpsafety.safety.distill_arms import ARMS, PLAIN, Asked, Condition
from hpsafety.safety.distill_page import decided, show_tables, write_page
from hpsafety.safety.distillation import check_free, decide, leaks, sort_rows, training_row
from hpsafety.safety.preprompts import SHIPPED, load_library, said_risk
from hpsafety.safety.scoring_job import load_scorer
from hpsafety.train import distributed, precision, stage
from hpsafety.train.distill_step import distill_group, divergence_loss
from hpsafety.train.finetune import build_groups, finetune, fitting, longest, nll
from hpsafety.train.metrics import log, say
from hpsafety.train.rundir import RunDir, model_hashes

ARM_SEED = 1_000_003  # between the seed of the plain answers and that of the arms


def run(cfg) -> None:
    """hpsafety distill: see DistillConfig. Writes the run directory of design.md section 8 to cfg.out."""
    with stage.ranks(cfg.device) as world:
        _run(cfg, world)


def _run(cfg, world) -> None:
    records = load_rows(cfg.data, "prompt")
    library = load_library(cfg.templates)
    files = [*cfg.data, SHIPPED, *([cfg.templates] if cfg.templates else [])]
    out = stage.run_directory(cfg, "distill", files, world, models_of(cfg))
    if out is None:
        return
    dtype, why = precision.choose(cfg.precision, world.device)
    torch.manual_seed(cfg.seed)
    rows, held, counts = sort_rows(list(records), cfg.all_safety)
    tokenizer, fits = check_models(cfg, dtype, world)
    asked = distill_arms.prepare(rows, library, tokenizer, cfg.seed, cfg.system)
    held = {
        part: distill_arms.prepare(found, library, tokenizer, cfg.seed, cfg.system)
        for part, found in held.items()
    }
    asked, held, dropped = drop_too_long(asked, held, fits)
    counts |= dropped | stage.plain_counts(records.counts)
    counts["without_answer_template"] = sum(one.fallback for one in asked)
    headline = f"distill: {len(asked)} adversarial prompts, {cfg.k} sample(s) each from 4 arms"
    stage.begin(
        out,
        f"{headline}; preprompt {cfg.preprompt}, select {cfg.select}, target {cfg.target}; {why}",
        counts,
        world,
    )
    start_anew(out, world)
    answers = sample_arms(asked, out, cfg, dtype, world)
    decisions, rows = choose(asked, answers, tokenizer, cfg)
    result = describe(asked, answers, decisions, tokenizer, cfg)
    write_decisions(decisions, rows, asked, tokenizer, cfg, result, out, world)
    done = train(rows, asked, cfg, dtype, out, world)
    result["heldout"] = ask_held_out(held, out, cfg, dtype, world)
    if world.is_main:
        write_report(result, out)
    out.finish(counts | done | {"kept": len(rows), "decisions": result["decisions"]})
    if world.is_main:
        say(f"distill: wrote {out.path / 'model'} and {out.path / 'report.html'}")
    distributed.barrier(world)


# ---- before anything is written ----


def models_of(cfg) -> dict[str, str]:
    """Checksums of every model the run reads, under names that tell which it is."""
    named = {"model": cfg.model, "safety_rm": cfg.safety_rm} | (
        {"teacher": cfg.teacher} if cfg.teacher else {}
    )
    return model_hashes(named)


def check_models(cfg, dtype: torch.dtype, world):
    """(tokenizer, fits): fits(one: Asked) says whether every arm's prompt leaves room for an answer in every model.

    Raises InputError for a model without tokenizer, a reward model that is none, and a teacher that encodes otherwise.
    """
    model = load_model(cfg.model, dtype)
    if model.tokenizer is None:
        raise InputError(f"{cfg.model}: has no tokenizer.json; distill needs one for the prompts' text")
    judge = load_scorer(distill_arms.scoring(Path(cfg.out), cfg, dtype), dtype, "cpu")
    context = longest(cfg, model)
    if cfg.teacher:
        teacher = load_model(cfg.teacher, dtype)
        check_encoding(model, teacher, (f"--model {cfg.model}", f"--teacher {cfg.teacher}"))
        words, others = model.config.vocab_size, teacher.config.vocab_size
        if words != others:
            raise InputError(
                f"--teacher {cfg.teacher} has a head of {others} words, --model {cfg.model} one of {words}"
            )
        context = min(context, teacher.config.max_positions)
    tokenizer, judges, new = (
        model.tokenizer,
        judge.tokenizer,
        cfg.max_new_tokens + 1,
    )  # 1: an end of turn of its own

    def fits(one: Asked) -> bool:
        ours = max(len(encode_prompt(tokenizer, prompt)) for prompt in one.prompts.values())
        return ours + new <= context and len(encode_prompt(judges, one.row["prompt"])) + new <= judge.context

    return tokenizer, fits


def drop_too_long(asked: list[Asked], held: dict[str, list[Asked]], fits):
    """(those that fit, held-out ones that fit by set, counts). Raises InputError where none is left to distill."""
    kept = [one for one in asked if fits(one)]
    kept_held = {part: [one for one in found if fits(one)] for part, found in held.items()}
    if not kept:
        raise InputError(
            f"no prompt is left: all {len(asked)} are too long with their preprompts and --max-new-tokens; lower "
            "--max-new-tokens, raise --max-length or give shorter prompts"
        )
    lost = sum(map(len, held.values())) - sum(map(len, kept_held.values()))
    return (
        kept,
        kept_held,
        {"prompts_dropped_too_long": len(asked) - len(kept), "held_out_dropped_too_long": lost},
    )


def start_anew(out: RunDir, world) -> None:
    """A fresh start inherits no sample and no decision."""
    if out.fresh and world.is_main:
        for folder in ("samples", "heldout"):
            shutil.rmtree(out.path / folder, ignore_errors=True)
        for name in ("decisions.jsonl", "train.jsonl"):
            (out.path / name).unlink(missing_ok=True)
    distributed.barrier(world)


# ---- samples and decisions ----


def sample_arms(asked: list[Asked], out: RunDir, cfg, dtype: torch.dtype, world):
    """Per prompt the plain answers and every arm's. The three arms share one seed and differ in the prompt alone."""
    seed = (cfg.seed + ARM_SEED) % 2**63
    conditions = {PLAIN: Condition(cfg.model, "none", cfg.seed)}
    conditions |= {arm: Condition(cfg.model, arm, seed) for arm in ARMS}
    return distill_arms.ask(
        asked, conditions, out.path / "samples", cfg, dtype, world, cfg.k, cfg.temperature
    )


def choose(asked: list[Asked], answers, tokenizer, cfg) -> tuple[list[dict], list[dict]]:
    """(lines of decisions.jsonl, rows of train.jsonl), prompt after prompt, sample after sample."""
    decisions, rows = [], []
    for one, found in zip(asked, answers, strict=True):
        preprompt = one.preprompts[cfg.preprompt]
        name = preprompt.id if preprompt else "none"
        for index, (first, sample) in enumerate(zip(found[PLAIN], found[cfg.preprompt], strict=True)):
            row = training_row(one.row, index, sample)
            leaked = leaks(row, preprompt, tokenizer)
            decisions.append(decide(one.row["id"], index, first, sample, name, leaked, cfg.select))
            if decisions[-1]["kept"]:
                rows.append(row)
    return decisions, rows


def describe(asked, answers, decisions, tokenizer, cfg) -> dict:
    """The report's data but for the held-out answers; both prompts exactly as the model reads them."""
    one, arm = asked[0], cfg.preprompt if cfg.preprompt != "none" else "template"
    exact = {name: tokenizer.decode(encode_prompt(tokenizer, one.prompts[a]), skip_special=False)
             for name, a in (("plain", "none"), ("preprompted", arm))}  # fmt: skip
    names = (
        "model",
        "preprompt",
        "select",
        "target",
        "divergence",
        "teacher",
        "system",
        "k",
        "temperature",
        "seed",
    )
    return {
        "settings": {name: getattr(cfg, name) for name in names},
        "prompts": len(asked),
        "fallbacks": Counter(said_risk(one.row) for one in asked if one.fallback),
        "example": {"id": str(one.row["id"]), "preprompt_id": one.preprompts[arm].id} | exact,
    } | distill_report.sampled(asked, answers, decisions, cfg)  # fmt: skip


def write_decisions(decisions, rows, asked, tokenizer, cfg, result: dict, out: RunDir, world) -> None:
    """decisions.jsonl and train.jsonl. Raises RunError, after the log and the scores are there to be read, where no
    sample is kept."""
    if world.is_main:
        preprompts = {one.row["id"]: one.preprompts[cfg.preprompt] for one in asked}
        check_free(rows, preprompts, tokenizer)
        write_records(out.path / "decisions.jsonl", decisions)
        write_records(out.path / "train.jsonl", rows)
        log.info("%s", decided(result))
        if not rows:
            show_tables(result)
    distributed.barrier(world)
    if not rows:
        raise RunError(
            f"nothing to learn: {decided(result)}; the scores stand above and in {out.path / 'decisions.jsonl'}. Try "
            "another --preprompt, more samples (--k), or --select all"
        )


# ---- training, and what it did ----


def train(rows: list[dict], asked: list[Asked], cfg, dtype: torch.dtype, out: RunDir, world) -> dict:
    """OUT/model from the kept samples; counts for the manifest."""
    model = load_model(cfg.model)
    limit = longest(cfg, model)
    if cfg.target == "text":
        groups, counts = build_groups(rows, model.tokenizer, limit, "last")
        return counts | finetune(model, groups, [], cfg, dtype, out, world, "distill", nll)
    prompts = {one.row["id"]: one.prompts[cfg.preprompt] for one in asked}
    groups = [
        distill_group(model.tokenizer, same[0]["prompt"], prompts[id], same)
        for id, same in ((id, list(found)) for id, found in groupby(rows, lambda row: row["id"]))
    ]
    source = cfg.teacher or cfg.model
    teacher = load_model(source, torch.float32 if world.size > 1 else dtype, world.device)
    kept, dropped = drop_long([group.teacher for group in groups], min(limit, teacher.config.max_positions))
    groups, counts = fitting([groups[i] for i in kept], limit)
    counts["dropped_too_long"] += dropped
    teacher = distributed.shard(teacher.requires_grad_(False), world, dtype)
    loss = divergence_loss(teacher, cfg.divergence)
    return counts | finetune(model, groups, [], cfg, dtype, out, world, "distill", loss)


def ask_held_out(held: dict[str, list[Asked]], out: RunDir, cfg, dtype: torch.dtype, world) -> dict:
    """set -> condition -> measures of greedy answers: the model before, with each preprompt, and after without any."""
    conditions = {arm: Condition(cfg.model, arm, cfg.seed) for arm in ARMS}
    conditions["distilled"] = Condition(str(out.path / "model"), "none", cfg.seed)
    asked = [one for found in held.values() for one in found]
    if not asked:
        return {}
    answers = distill_arms.ask(asked, conditions, out.path / "heldout", cfg, dtype, world, 1, 0.0)
    measured, start = {}, 0
    for part, found in held.items():
        end = start + len(found)
        if found and world.is_main:
            measured[part] = distill_report.conditions(found, answers[start:end], list(conditions))
        start = end
    return measured


def write_report(result: dict, out: RunDir) -> None:
    with atomic_write(out.path / "report.json") as handle:
        json.dump(result, handle, indent=1, allow_nan=False)
        handle.write("\n")
    write_page(result, out.path / "report.html")
    show_tables(result)
