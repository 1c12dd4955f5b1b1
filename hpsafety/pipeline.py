"""`hpsafety pipeline FILE.toml`: every stage of the file in its order, in this process, resumable stage by stage.

A stage is the command of its name with its own run directory below OUT; OUT/pipeline.json says how far it has come.
Under torchrun every rank walks the same list, rank 0 decides what is done; stages of a single process run on rank 0
while the others wait.
"""

import contextlib
import gc
import importlib
import time

from hpsafety import cli, pipeline_state
from hpsafety.errors import InputError, RunError
from hpsafety.model.mapped import give_back
from hpsafety.pipeline_file import DESCRIBE, Pipeline, Stage, read_pipeline
from hpsafety.pipeline_state import ANEW, DONE, TO_DO, Standing
from hpsafety.train import distributed
from hpsafety.train.metrics import say

SINGLE = ("audit", "select", "report", "card")  # commands of one process


def run(cfg) -> None:
    """hpsafety pipeline: see PipelineConfig."""
    changes = {name: getattr(cfg, name) for name in ("out", "seed", "device", "precision")}
    follow(read_pipeline(cfg.file, changes), cfg.plan, cfg.force_from)


def follow(pipeline: Pipeline, plan: bool, force_from: str | None) -> None:
    """Shows the plan, and unless it is only asked for that runs what is not done, to the end."""
    from hpsafety.pipeline_plan import show_plan

    if plan:
        entries = pipeline_state.read_state(pipeline)
        show_plan(pipeline, pipeline_state.standings(pipeline, entries, force_from))
        return
    with distributed.held(pipeline.device) as world:
        state, found = None, None
        if world.is_main:
            pipeline_state.check_inputs_exist(pipeline)
            entries = pipeline_state.read_state(pipeline)
            found = pipeline_state.standings(pipeline, entries, force_from)
            show_plan(pipeline, found)
            state = pipeline_state.new_state(pipeline, entries, found, str(world.device))
            pipeline_state.write_state(pipeline, state)
        found = distributed.broadcast_object(
            found and {k: (s.status, s.why) for k, s in found.items()}, world
        )
        for place, stage in enumerate(pipeline.stages):
            standing = Standing(*found[stage.name])
            if standing.status != DONE:
                entry = state["stages"][place] if world.is_main else None
                run_stage(pipeline, place, standing, state, entry, world)
        if world.is_main:
            state["ended"] = pipeline_state.now()
            pipeline_state.write_state(pipeline, state)
            from hpsafety.report.demo import show_end

            show_end(pipeline, state)
        distributed.barrier(world)


def run_stage(pipeline: Pipeline, place: int, standing: Standing, state, entry, world) -> None:
    """One stage from its beginning, or from where it stopped; its entry of pipeline.json is kept up to date."""
    stage, wait = pipeline.stages[place], distributed.long_barrier(world)
    started = time.monotonic()
    if world.is_main:
        say(f"\n[{place + 1}/{len(pipeline.stages)}] {stage.name}: hpsafety {stage.run}, {standing}")
        if standing.status in (ANEW, TO_DO):
            pipeline_state.clear(stage)
        pipeline_state.begin_entry(stage, entry)
        pipeline_state.write_state(pipeline, state)
    distributed.barrier(world)
    skipped = None
    try:
        if stage.run not in SINGLE:
            skipped = call(stage)
        elif world.is_main:
            with distributed.alone() if world.size > 1 else contextlib.nullcontext():
                skipped = call(stage)
        wait()
        if world.is_main and skipped is None:
            check_ended(stage)
    except Exception as error:
        if world.is_main:
            close_entry(pipeline, state, entry, "failed", started)
        if isinstance(error, InputError | RunError):
            raise type(error)(f"stage {stage.name}: {error}") from error
        raise
    if world.is_main:
        if skipped:
            say(f"{stage.name} is left out: {skipped}")
            entry["substituted"] = skipped
        close_entry(pipeline, state, entry, "skipped" if skipped else "done", started)
    gc.collect()
    give_back()


def call(stage: Stage) -> str | None:
    """Runs a stage's command. Why it was left out, where it may be and lacks a package; None when it ran."""
    module, function = cli.COMMANDS[stage.run][2].split(":")
    try:
        getattr(importlib.import_module(module), function)(stage.cfg)
    except (InputError, ModuleNotFoundError) as error:
        if not stage.optional or not lacks_package(error):
            raise
        return str(error)
    return None


def lacks_package(error: BaseException | None) -> bool:
    """Whether an exception, or what caused it, is a package of others that is not installed."""
    while error is not None:
        if isinstance(error, ModuleNotFoundError) and not (error.name or "hpsafety").startswith("hpsafety"):
            return True
        error = error.__cause__ or error.__context__
    return False


def check_ended(stage: Stage) -> None:
    """RunError where a command came back without having ended its run."""
    manifest = pipeline_state.read_manifest(stage)
    if stage.run not in DESCRIBE and not (manifest or {}).get("ended"):
        raise RunError(f"{stage.out}: the command came back and its run has not ended; see log.txt there")


def close_entry(pipeline: Pipeline, state: dict, entry: dict, status: str, started: float) -> None:
    entry.pop("since", None)
    entry |= {"status": status, "seconds": round(entry["seconds"] + time.monotonic() - started, 2)}
    pipeline_state.write_state(pipeline, state)
