"""The safety-data-scaling study: one fine-tuning per share of the safety rows (spec section 2, SFT-7, SFT-8).

OUT/prompts.jsonl      the held-out prompts, set after set
    fraction-P/        run directory of the variant on P percent of the safety rows: what `hpsafety sft` would write
              answers.jsonl   group records: its answer to every prompt
    answers.jsonl      group records: all variants' answers to each prompt, in the order of --fractions
    scores.jsonl       score records of these, line by line
    scaling.json, scaling.csv, report.html

Under torchrun each variant is made whole by one rank, alone: its bits are those of a single process. The last step, the
scoring, is shared line by line, and does not depend on the ranks either.
"""

import dataclasses
import json
import shutil
from pathlib import Path

import torch

from hpsafety.config import SampleConfig, ScoreConfig, SFTConfig
from hpsafety.config_scaling import percent
from hpsafety.data.batches import balance, group_tokens
from hpsafety.data.chat import encode_prompt
from hpsafety.data.records import TRAIN_SPLITS, check_disjoint, iter_records, write_records
from hpsafety.data.sources import load_rows
from hpsafety.errors import InputError
from hpsafety.files import atomic_write
from hpsafety.model.io import load_model
from hpsafety.safety.sampling_job import sample_file
from hpsafety.safety.scaling_page import show_tables, write_page
from hpsafety.safety.scaling_report import choose_prompts, summarise, write_csv
from hpsafety.safety.scoring_job import load_scorer, score_file
from hpsafety.train import distributed, precision, stage
from hpsafety.train.finetune import build_groups, count_trained, encode, finetune, longest, select_rows
from hpsafety.train.metrics import close_log, read_metrics, say
from hpsafety.train.rundir import RunDir, model_hashes

MODELS = ("model", "safety_rm", "helpful_rm")
SHOWN = ("model", "safety_rm", "helpful_rm", "seed", "precision", "batch", "epochs", "steps", "lr", "warmup",
         "max_new_tokens", "temperature")  # fmt: skip  # settings that scaling.json repeats


def run(cfg) -> None:
    """hpsafety scaling: see ScalingConfig. Writes the files named above to cfg.out."""
    with stage.ranks(cfg.device) as world:
        _run(cfg, world)


def _run(cfg, world) -> None:
    rows = list(load_rows(cfg.data, "demonstration"))
    _, counts = select_rows(rows, 1.0, cfg.seed, cfg.all_safety)
    prompts = choose_prompts(eval_rows(rows, cfg), cfg.eval_prompts)
    check_rows(rows, prompts, counts, cfg)
    models = model_hashes({name: getattr(cfg, name) for name in MODELS})
    out = stage.run_directory(cfg, "scaling", [*cfg.data, *cfg.eval], world, models)
    if out is None:
        return
    dtype, why = precision.choose(cfg.precision, world.device)
    cfg = dataclasses.replace(
        cfg, precision=precision.name(dtype)
    )  # of all variants, also if one is resumed elsewhere
    check_models(rows, prompts, cfg, dtype, world)
    meet = distributed.long_barrier(world)
    headline = (
        f"scaling: {len(cfg.fractions)} variants on {counts['helpful_rows']} helpful rows and a share of "
        f"{counts['safety_rows']} safety rows, {len(prompts)} held-out prompts; {why}"
    )
    stage.begin(out, headline, counts, world)
    if world.is_main:
        prepare_folder(out, prompts)
    distributed.barrier(world)
    alone = distributed.World(0, 1, world.device)
    for fraction in shared_out(cfg.fractions, counts, world.size)[world.rank]:
        train_variant(fraction, rows, cfg, dtype, alone)
        sample_file(sampling(fraction, cfg, out.path), alone)
    meet()
    if world.is_main:
        write_records(out.path / "answers.jsonl", side_by_side(out.path, cfg.fractions))
    distributed.barrier(world)
    score_file(scoring(cfg, out.path), world)
    if world.is_main:
        report(cfg, counts, out.path)
    out.finish(counts | {"variants": len(cfg.fractions), "prompts": len(prompts)})
    if world.is_main:
        say(f"scaling: wrote {out.path / 'report.html'}, scaling.json and scaling.csv")
    distributed.barrier(world)


# ---- what goes in ----


def eval_rows(rows: list[dict], cfg) -> list[dict]:
    """Prompt records to ask: those of --eval, or the rows of --data that are held out."""
    if cfg.eval:
        return list(load_rows(cfg.eval, "prompt"))
    return [row for row in rows if row.get("split") not in (None, *TRAIN_SPLITS)]


def check_rows(rows: list[dict], prompts: list[dict], counts: dict, cfg) -> None:
    """InputError where a kind of row is missing, or a prompt is asked that is also trained on (DATA-3)."""
    if not counts["safety_rows"]:
        raise InputError(
            "--data holds no safety row to train on (is_safety: true); --all-safety takes untagged rows as such"
        )
    if not counts["helpful_rows"]:
        raise InputError(
            "--data holds no helpful row to train on (is_safety: false or absent); the variants need one set in common"
        )
    check_disjoint([row for row in rows if row.get("split") in (None, *TRAIN_SPLITS)], prompts)


def check_models(rows: list[dict], prompts: list[dict], cfg, dtype: torch.dtype, world) -> None:
    """Everything that could stop the study later for a fault in its input, before anything is written.

    Raises InputError for reward models that do not go together, for prompts that leave no room for an answer, and where
    no helpful row is short enough.
    """
    scorer = load_scorer(cfg, dtype, world.device)
    model = load_model(cfg.model, dtype)
    if model.tokenizer is None:
        raise InputError(f"{cfg.model}: has no tokenizer.json; the study needs one for its rows")
    for row in prompts:
        for tokenizer, context, whose in (
            (model.tokenizer, model.config.max_positions, "the model's"),
            (scorer.tokenizer, scorer.context, "the reward models'"),
        ):
            length = len(encode_prompt(tokenizer, row["prompt"]))
            if length + cfg.max_new_tokens > context:
                raise InputError(
                    f"prompt {row.get('id', row['prompt'])!r} has {length} tokens, which with {cfg.max_new_tokens} new "
                    f"ones exceed {whose} context of {context}; shorten it or lower --max-new-tokens"
                )
    helpful, _ = select_rows(rows, 0.0, cfg.seed, cfg.all_safety)
    if not any(group_tokens(encode(model.tokenizer, row)) <= longest(cfg, model) for row in helpful):
        build_groups(helpful, model.tokenizer, longest(cfg, model))  # raises, with what to do


def prepare_folder(out: RunDir, prompts: list[dict]) -> None:
    """Writes the prompts; a fresh start inherits no variant and no answer."""
    if out.fresh:
        for name in ("fraction-*", "answers.jsonl*", "scores.jsonl*", "scaling.*"):
            for stale in out.path.glob(name):
                shutil.rmtree(stale) if stale.is_dir() else stale.unlink()
    write_records(out.path / "prompts.jsonl", prompts)


def shared_out(fractions: tuple[float, ...], counts: dict, ranks: int) -> list[list[float]]:
    """The variants each rank makes, so that they train about as many rows."""
    costs = [counts["helpful_rows"] + fraction * counts["safety_rows"] for fraction in fractions]
    return [[fractions[i] for i in sorted(part)] for part in balance(costs, ranks)]


# ---- a variant ----


def folder(out: Path, fraction: float) -> Path:
    return out / f"fraction-{percent(fraction)}"


def train_variant(fraction: float, rows: list[dict], cfg, dtype: torch.dtype, world) -> None:
    """One fine-tuning from the model, as `hpsafety sft --safety-fraction` does it; nothing where it is done already.

    Held-out rows do not stop it early: every variant takes its passes over its data.
    """
    here = SFTConfig(
        **{f.name: getattr(cfg, f.name) for f in dataclasses.fields(SFTConfig) if hasattr(cfg, f.name)}
        | {"out": str(folder(Path(cfg.out), fraction)), "safety_fraction": fraction, "resume": True}
    )
    out = stage.run_directory(here, "sft", cfg.data, world)
    if out is None:
        return
    model = load_model(cfg.model)  # fp32: the masters of a bf16 run
    kept, counts = select_rows(rows, fraction, cfg.seed, cfg.all_safety)
    groups, dropped = build_groups(kept, model.tokenizer, longest(cfg, model))
    trained = count_trained(groups)
    name, used = out.path.name, counts["safety_rows_used"]
    headline = f"{name}: {used} safety rows, {len(groups)} examples, {trained} trained tokens"
    stage.begin(out, headline, counts | dropped, world)
    done = finetune(model, groups, [], here, dtype, out, world, name)
    out.finish(counts | dropped | {"trained_tokens": trained} | done)
    close_log(out.log)


def sampling(fraction: float, cfg, out: Path) -> SampleConfig:
    """What `hpsafety sample` would be told. All variants draw with the same seed."""
    here = folder(out, fraction)
    return SampleConfig(
        model=str(here / "model"), data=(str(out / "prompts.jsonl"),), out=str(here / "answers.jsonl"), k=1,
        temperature=cfg.temperature, max_new_tokens=cfg.max_new_tokens, seed=cfg.seed, kv_memory=cfg.kv_memory,
        max_batch=cfg.max_batch, device=cfg.device, precision=cfg.precision,
    )  # fmt: skip


def side_by_side(out: Path, fractions: tuple[float, ...]) -> list[dict]:
    """A group record per prompt with every variant's answer, so that scoring computes the prompt once."""
    files = [iter_records(folder(out, fraction) / "answers.jsonl", "group") for fraction in fractions]
    return [
        prompt | {"responses": [row["responses"][0] for row in rows]}
        for prompt, *rows in zip(iter_records(out / "prompts.jsonl", "prompt"), *files, strict=True)
    ]


def scoring(cfg, out: Path) -> ScoreConfig:
    """What `hpsafety score` would be told."""
    return ScoreConfig(
        safety_rm=cfg.safety_rm, helpful_rm=cfg.helpful_rm, data=(str(out / "answers.jsonl"),),
        out=str(out / "scores.jsonl"), device=cfg.device, precision=cfg.precision,
    )  # fmt: skip


# ---- what came out ----


def describe(fraction: float, out: Path) -> dict:
    """What a variant was trained on, and how it ended."""
    here = folder(out, fraction)
    counts = json.loads((here / "manifest.json").read_text(encoding="utf-8"))["counts"]
    answers = [row["samples"][0] for row in iter_records(here / "answers.jsonl", "group")]
    names = ("safety_rows_used", "helpful_rows", "groups", "trained_tokens", "tokens", "steps")
    return {
        "fraction": fraction, "run": here.name, **{name: counts[name] for name in names},
        "loss": read_metrics(here)[-1]["loss"], "cut_answers": sum(s["finish"] == "length" for s in answers),
        "mean_answer_tokens": sum(len(s["tokens"]) for s in answers) / len(answers),
    }  # fmt: skip


def report(cfg, counts: dict, out: Path) -> None:
    """scaling.json, scaling.csv, report.html and the tables, from the files of all variants."""
    groups = list(iter_records(out / "answers.jsonl", "group"))
    scores = list(iter_records(out / "scores.jsonl", "score"))
    runs = [describe(fraction, out) for fraction in cfg.fractions]
    result = {
        "settings": {name: getattr(cfg, name) for name in SHOWN},
        "data": {name: counts[name] for name in ("safety_rows", "helpful_rows")},
        **summarise(groups, [row["responses"] for row in groups], scores, runs, cfg.seed),
    }
    with atomic_write(out / "scaling.json") as handle:
        json.dump(result, handle, ensure_ascii=False, indent=1, allow_nan=False)
    write_csv(result, out / "scaling.csv")
    write_page(result, out / "report.html")
    show_tables(result)
