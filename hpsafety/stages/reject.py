"""Rejection sampling: K samples per prompt, the best of the pool becomes a demonstration (spec section 4, RS-1..7).

OUT/iteration-V/temperature.json  the search over the grid on validation prompts, and its choice
                samples.jsonl     group records: K samples per training prompt
                scores.jsonl      score records of those samples, line by line
                selected.jsonl    demonstrations: the winner of each prompt's pool
                tune/             run directory of the fine-tuning from the base weights
OUT/model/                        the last iteration's; OUT/report.json, report.html: curves, searches, winners
"""

import dataclasses
import json
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import torch

from hpsafety.config import SampleConfig, ScoreConfig
from hpsafety.data.batches import nested_subset
from hpsafety.data.chat import encode_prompt
from hpsafety.data.records import iter_records, normalise_prompt, read_records, write_records
from hpsafety.data.sources import load_rows
from hpsafety.errors import InputError
from hpsafety.files import atomic_write
from hpsafety.model.io import load_model
from hpsafety.safety.rejection import Winner, best_of_prefixes, choose_temperature, select
from hpsafety.safety.rejection_page import show_table, write_page
from hpsafety.safety.sampling_job import sample_file
from hpsafety.safety.scoring_job import load_scorer, score_file
from hpsafety.train import distributed, precision, stage
from hpsafety.train.finetune import build_groups, finetune, longest
from hpsafety.train.metrics import close_log, say
from hpsafety.train.rundir import RunDir, model_hashes

SEARCH_SHARE = 0.1  # of the prompts, where none is marked valid
SEED_STEP = 1_000_003  # between the seeds of two iterations
POOL_SCORES = "pool-scores.jsonl"  # of the samples that --pool-from brings


def run(cfg) -> None:
    """hpsafety reject: see RejectConfig. Writes the run directory of design.md section 8 to cfg.out."""
    with stage.ranks(cfg.device) as world:
        _run(cfg, world)


def _run(cfg, world) -> None:
    records = load_rows(cfg.data, "prompt")
    earlier = [read_pool(path) for path in cfg.pool_from]
    out = stage.run_directory(cfg, "reject", [*cfg.data, *earlier], world, models_of(cfg))
    if out is None:
        return
    dtype, why = precision.choose(cfg.precision, world.device)
    torch.manual_seed(cfg.seed)
    train, search, counts = split_prompts(list(records), cfg)
    counts |= stage.plain_counts(records.counts)
    check_models([*train, *search], cfg, dtype, world)
    headline = f"reject: {len(train)} prompts, {cfg.k} samples each, {cfg.iterations} iteration(s); {why}"
    stage.begin(out, headline, counts, world)
    if world.is_main:
        prepare_folder(out, train, search)
    distributed.barrier(world)
    if earlier:  # by today's reward models (RS-3)
        score_file(scoring(cfg, dtype, tuple(earlier), out.path / POOL_SCORES), world)
    results = [iterate(v, cfg, dtype, out, earlier, world) for v in range(1, cfg.iterations + 1)]
    if world.is_main:
        gather_results(results, cfg, out)
    searches = {r["iteration"]: {"chosen": r["temperature"], "mean_best_of_k": r["search"]} for r in results}
    out.finish(counts | {"iterations": cfg.iterations, "temperature_search": searches})
    if world.is_main:
        say(f"reject: wrote {out.path / 'model'} and {out.path / 'report.html'}")
    distributed.barrier(world)


def check_models(rows: list[dict], cfg, dtype: torch.dtype, world) -> None:
    """Everything that could stop the run later for a fault in its input, before anything is written.

    Raises InputError for reward models that do not go together and for a prompt that leaves no room for an answer.
    """
    load_scorer(cfg, dtype, world.device)
    model = load_model(cfg.model, dtype)
    room = model.config.max_positions - cfg.max_new_tokens
    for row in rows:
        length = len(encode_prompt(model.tokenizer, row["prompt"]))
        if length > room:
            raise InputError(
                f"prompt {row.get('id', row['prompt'])!r} has {length} tokens, which with {cfg.max_new_tokens} new "
                f"ones exceed the context of {model.config.max_positions}; shorten it or lower --max-new-tokens"
            )


def read_pool(path: str) -> Path:
    """The samples file that --pool-from names: a group file, or the newest of an earlier run's folder."""
    place = Path(path)
    if place.is_dir():
        found = sorted(
            place.glob("iteration-*/samples.jsonl"), key=lambda p: int(p.parent.name.split("-")[1])
        )
        if not found:
            raise InputError(f"--pool-from {path}: holds no iteration-N/samples.jsonl; give a run of reject")
        return found[-1]
    if not place.is_file():
        raise InputError(f"--pool-from {path}: no such file or folder")
    return place


def models_of(cfg) -> dict[str, str]:
    """Checksums of every model the run reads, under names that tell which it is."""
    named = {
        "model": cfg.model,
        "base": base_of(cfg),
        "safety_rm": cfg.safety_rm,
        "helpful_rm": cfg.helpful_rm,
    }
    return model_hashes(named)


def base_of(cfg) -> str:
    """The weights every iteration is fine-tuned from (RS-7): the student's in distillation mode (RS-6)."""
    return cfg.student or cfg.base or cfg.model


def split_prompts(rows: list[dict], cfg) -> tuple[list[dict], list[dict], dict]:
    """(prompts to train on, prompts of the temperature search, counts). The search never sees a training prompt.

    Rows with split valid serve the search; without any, a seeded tenth of the training prompts does. A grid of one
    temperature needs none. Rows of other held-out splits are left out.
    """
    unique: dict[str, dict] = {}
    for row in rows:
        unique.setdefault(normalise_prompt(row["prompt"]), row)
    usable = [r for r in unique.values() if r.get("split") in (None, "train", "rt_train", "valid")]
    search = [r for r in usable if r.get("split") == "valid"]
    train = [r for r in usable if r.get("split") != "valid"]
    if len(cfg.temperatures) > 1 and not search:
        taken = set(nested_subset(len(train), SEARCH_SHARE, cfg.seed).tolist()) or {0}
        search = [r for i, r in enumerate(train) if i in taken]
        train = [r for i, r in enumerate(train) if i not in taken]
    if not train:
        raise InputError(
            "no prompt is left to train on: all are held out by their split or by the temperature search"
        )
    counts = {"train_prompts": len(train), "search_prompts": min(len(search), cfg.search_prompts)}
    counts |= {"repeated_prompts": len(rows) - len(unique), "other_splits": len(unique) - len(usable)}
    return train, search[: cfg.search_prompts], counts


def prepare_folder(out: RunDir, train: list[dict], search: list[dict]) -> None:
    """Writes both prompt files; a fresh start inherits no iteration."""
    if out.fresh:
        for folder in out.path.glob("iteration-*"):
            shutil.rmtree(folder)
    for name, rows in (("prompts", train), ("search", search)):
        if rows:
            write_records(out.path / f"{name}.jsonl", rows)


# ---- one iteration ----


def iterate(v: int, cfg, dtype: torch.dtype, out: RunDir, earlier: list[Path], world) -> dict:
    """Samples, scores, selects and fine-tunes; what an interruption has left finished is taken over."""
    folder = out.path / f"iteration-{v}"
    if world.is_main:
        folder.mkdir(exist_ok=True)
        say(f"iteration {v} of {cfg.iterations}")
    distributed.barrier(world)
    temperature, means = search_temperature(v, cfg, dtype, folder, world)
    samples, scores = folder / "samples.jsonl", folder / "scores.jsonl"
    sample_file(sampling(v, cfg, dtype, temperature, out.path / "prompts.jsonl", samples), world)
    score_file(scoring(cfg, dtype, (samples,), scores), world)
    if world.is_main:
        pool = pool_files(v, cfg, out.path, earlier)
        write_records(folder / "selected.jsonl", winners(out.path / "prompts.jsonl", pool))
    distributed.barrier(world)
    tune(v, cfg, dtype, folder, world)
    return describe(v, cfg, temperature, means, folder)


def policy_of(v: int, cfg) -> str:
    """The newest model, which samples in iteration v; in distillation mode always the large one (RS-6)."""
    if v == 1 or cfg.student:
        return cfg.model
    return str(Path(cfg.out) / f"iteration-{v - 1}" / "tune" / "model")


def sampling(v: int, cfg, dtype: torch.dtype, temperature: float, prompts: Path, out: Path) -> SampleConfig:
    """What `hpsafety sample` would be told. Each iteration draws from a seed of its own."""
    return SampleConfig(
        model=policy_of(v, cfg), data=(str(prompts),), out=str(out), k=cfg.k, temperature=temperature, top_p=cfg.top_p,
        top_k=cfg.top_k, max_new_tokens=cfg.max_new_tokens, seed=(cfg.seed + SEED_STEP * v) % 2**63,
        kv_memory=cfg.kv_memory, max_batch=cfg.max_batch, device=cfg.device, precision=precision.name(dtype),
    )  # fmt: skip


def scoring(cfg, dtype: torch.dtype, groups: tuple[Path, ...], out: Path) -> ScoreConfig:
    """What `hpsafety score` would be told."""
    return ScoreConfig(
        safety_rm=cfg.safety_rm, helpful_rm=cfg.helpful_rm, data=tuple(map(str, groups)), out=str(out),
        device=cfg.device, precision=precision.name(dtype), all_safety=cfg.all_safety,
    )  # fmt: skip


def search_temperature(v: int, cfg, dtype, folder: Path, world) -> tuple[float, dict | None]:
    """(the temperature of this iteration, mean best-of-K score per temperature of the grid, or None) (RS-4)."""
    grid = sorted(set(cfg.temperatures))
    if len(grid) == 1:
        return grid[0], None
    files = tuple(folder / f"search-{t:g}.jsonl" for t in grid)
    for t, samples in zip(grid, files, strict=True):
        sample_file(sampling(v, cfg, dtype, t, folder.parent / "search.jsonl", samples), world)
    score_file(scoring(cfg, dtype, files, folder / "search-scores.jsonl"), world)
    best_of = [row["combined"] for row in iter_records(folder / "search-scores.jsonl", "score")]
    each = len(best_of) // len(grid)
    chosen, means = choose_temperature({t: best_of[i * each : (i + 1) * each] for i, t in enumerate(grid)})
    if world.is_main:
        with atomic_write(folder / "temperature.json") as handle:
            json.dump(
                {"chosen": chosen, "mean_best_of_k": {f"{t:g}": m for t, m in means.items()}},
                handle,
                indent=1,
            )
        say(
            f"temperature {chosen:g}, by the mean best of {cfg.k}: "
            + ", ".join(f"{t:g} {m:.4f}" for t, m in means.items())
        )
    return chosen, means


Files = tuple[list[Path], Path]  # group files, and the scores of all their lines in one file


def pool_files(v: int, cfg, folder: Path, earlier: list[Path]) -> list[tuple[int, Files]]:
    """(iteration number of the first file, Files) of iteration v's pool; earlier runs' files count up to 0.

    The old mode (`--pool last`) holds the samples of this iteration alone.
    """
    own = [(i, ([folder / f"iteration-{i}" / "samples.jsonl"], folder / f"iteration-{i}" / "scores.jsonl"))
           for i in range(1, v + 1)]  # fmt: skip
    if cfg.pool == "last":
        return own[-1:]
    return ([(1 - len(earlier), (earlier, folder / POOL_SCORES))] if earlier else []) + own


def candidates(pool: list[tuple[int, Files]]) -> Iterator[tuple[int, dict, dict]]:
    """(iteration number, group row, its score row) of everything in the pool."""
    for first, (groups, scores) in pool:
        scored = iter_records(scores, "score")
        for number, path in enumerate(groups, start=first):
            for row in iter_records(path, "group"):
                yield number, row, next(scored)


def winners(prompts: Path, pool: list[tuple[int, Files]]) -> list[dict]:
    """One demonstration per prompt, in the prompts' order: the best of its pool (RS-2). A prompt whose winner is empty
    has none. Scores are read first, so that only winners' texts are held."""
    wanted = {normalise_prompt(row["prompt"]): i for i, row in enumerate(iter_records(prompts, "prompt"))}
    scores: dict[int, dict[int, list[float]]] = {}
    for number, row, score in candidates(pool):
        index = wanted.get(normalise_prompt(row["prompt"]))
        if index is not None:
            scores.setdefault(index, {})[number] = score["combined"]
    best = {index: select(by_iteration) for index, by_iteration in scores.items()}
    chosen: dict[int, dict] = {}
    for number, row, score in candidates(pool):
        index = wanted.get(normalise_prompt(row["prompt"]))
        if index is not None and best[index].iteration == number:
            chosen[index] = demonstration(row, score, best[index])
    return [chosen[index] for index in sorted(chosen) if chosen[index]["response"].strip()]


def demonstration(row: dict, score: dict, winner: Winner) -> dict:
    """The winner as a training row: the prompt's fields, the answer, and where it came from (RS-1's record)."""
    k = winner.sample_index
    sample = row["samples"][k] if row.get("samples") else {}
    fields = {name: value for name, value in row.items() if name not in ("responses", "samples")}
    return fields | {
        "response": row["responses"][k], "iteration": winner.iteration, "sample_index": k,
        "r_c": winner.score, "r_s": score["safety"][k], "r_h": score["helpful"][k],
        **{name: sample[name] for name in ("seed", "temperature", "finish") if name in sample},
    }  # fmt: skip


def tune(v: int, cfg, dtype: torch.dtype, folder: Path, world) -> None:
    """Fine-tunes the base weights on this iteration's winners, as in SFT (RS-7)."""
    selected, base = folder / "selected.jsonl", base_of(cfg)
    here = dataclasses.replace(cfg, out=str(folder / "tune"))
    out = stage.run_directory(here, "reject", [selected], world, model_hashes({"base": base}))
    if out is None:
        return
    model = load_model(base)
    rows = list(iter_records(selected, "demonstration"))
    groups, counts = build_groups(rows, model.tokenizer, longest(cfg, model))
    counts |= {"cut_winners": sum(row.get("finish") == "length" for row in rows)}
    stage.begin(out, f"fine-tuning the base weights on {len(groups)} winners", counts, world)
    done = finetune(model, groups, [], here, dtype, out, world, f"iteration {v}")
    out.finish(counts | done)
    close_log(out.log)
    distributed.barrier(world)


# ---- what came out ----


def describe(v: int, cfg, temperature: float, means: dict | None, folder: Path) -> dict:
    """Figures of one iteration for the report: search, curves over N, winners."""
    scores = [row["combined"] for row in iter_records(folder / "scores.jsonl", "score")]
    selected = list(read_records(folder / "selected.jsonl", "demonstration"))
    largest, median = best_of_prefixes(scores)
    came_from = Counter(row["iteration"] for row in selected)
    averages = {name: sum(row[name] for row in selected) / len(selected) for name in ("r_c", "r_s", "r_h")}
    return {
        "iteration": v, "model": policy_of(v, cfg), "base": base_of(cfg), "temperature": temperature,
        "search": means and {f"{t:g}": mean for t, mean in means.items()}, "max": largest, "median": median,
        "winners": {
            "count": len(selected), "empty": len(scores) - len(selected),
            "from_iteration": dict(sorted(came_from.items())), **averages,
        },
    }  # fmt: skip


def gather_results(results: list[dict], cfg, out: RunDir) -> None:
    """OUT/model, OUT/metrics.jsonl and the report from the iterations' folders."""
    last = out.path / f"iteration-{cfg.iterations}" / "tune" / "model"
    shutil.rmtree(out.path / "model", ignore_errors=True)
    shutil.copytree(last, out.path / "model")
    step = 0
    with atomic_write(out.path / "metrics.jsonl") as handle:
        for v in range(1, cfg.iterations + 1):
            rows = (
                (out.path / f"iteration-{v}" / "tune" / "metrics.jsonl")
                .read_text(encoding="utf-8")
                .splitlines()
            )
            for row in map(json.loads, rows):
                step += 1
                handle.write(json.dumps(row | {"step": step, "iteration": v}) + "\n")
    result = {"k": cfg.k, "pool": cfg.pool, "student": cfg.student, "iterations": results}
    with atomic_write(out.path / "report.json") as handle:
        json.dump(result, handle, indent=1, allow_nan=False)
    write_page(result, out.path / "report.html")
    show_table(result)
