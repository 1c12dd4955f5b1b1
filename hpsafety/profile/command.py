"""The command `hpsafety profile <stage> [flags of the stage]`.

The stage runs as it is: its own `run` on its own config, of which only these fields are replaced: `out` (a scratch
folder inside OUT that is removed), `steps` or `iterations` (one more than are wanted), `checkpoint_every` (0) and
`resume` (off). It is left after the last recorded step (hpsafety.train.phases.Enough), so that it neither validates nor
writes a model.
"""

import dataclasses
import difflib
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from hpsafety import config, flags
from hpsafety.config import ProfileConfig, flag
from hpsafety.errors import InputError, file_error

UNMARKED = (
    "select",
    "sample",
    "audit",
    "eval",
)  # no optimiser steps; of sample, a step is one token per sequence: bench/end_to_end/generate.py times it as a whole
SUMMARY = "where a step's time goes: a few steps of a stage under torch.profiler"
PROG = "hpsafety profile"
SCRATCH = ".run"


def stage_names(commands: dict) -> list[str]:
    """The commands that are stages and mark their steps (hpsafety/train/phases.py)."""
    stages = [name for name, (_, _, target) in commands.items() if target.startswith("hpsafety.stages.")]
    return [name for name in stages if name not in UNMARKED]


def parse(args: list[str], commands: dict):
    """(stage's name, ProfileConfig, the stage's config) of the words after `hpsafety profile`.

    commands  hpsafety.cli.COMMANDS. Raises InputError on bad usage, SystemExit for --help.
    """
    known = stage_names(commands)
    usage = f"usage: {PROG} <stage> [flags of the stage] [--profile-steps N] [--profile-warmup N]"
    own = {field.name: field for field in dataclasses.fields(ProfileConfig)}
    lines = [f"  {flag(name)} N  {f.metadata['help']} (default {f.default})" for name, f in own.items()]
    if args and args[0] in ("--help", "-h"):
        print("\n".join([usage, "", SUMMARY, "", "stages: " + ", ".join(known), "", *lines]))
        raise SystemExit(0)
    if not args or args[0].startswith("-"):
        raise InputError(f"give a stage after {PROG}: {', '.join(known)}. See {PROG} --help")
    stage, rest = args[0], args[1:]
    if stage not in known:
        near = difflib.get_close_matches(stage, known, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]}?" if near else f"there are: {', '.join(known)}."
        raise InputError(f"no stage {stage!r} to profile; {hint} See {PROG} --help")
    mine, rest = _split(rest, own)
    settings = flags.parse(ProfileConfig, PROG, SUMMARY, mine)
    summary, name, _ = commands[stage]
    told = f"{summary}; profiled, with --profile-steps N and --profile-warmup N"
    return stage, settings, flags.parse(getattr(config, name), f"{PROG} {stage}", told, rest)


def _split(words: list[str], own: dict) -> tuple[list[str], list[str]]:
    """(the words of our own flags and their values, the others)."""
    mine, others, values = [], [], iter(words)
    for word in values:
        if word.split("=")[0] in map(flag, own):
            mine += [word] if "=" in word else [word, *([v] if (v := next(values, None)) is not None else [])]
        else:
            others.append(word)
    return mine, others


def check_out(path: Path) -> None:
    """InputError unless `path` is new, empty, or holds an earlier profile."""
    if path.exists() and not path.is_dir():
        raise file_error(path, "--out must be a directory, but a file stands there; choose another")
    if path.is_dir() and any(path.iterdir()) and not (path / "profile.json").is_file():
        raise file_error(path, "--out holds files but no profile; choose an empty directory")


def run(stage: str, settings: ProfileConfig, cfg, call: Callable) -> None:
    """Profiles call(cfg). Writes OUT/trace.json.gz (of ranks: trace_rankN.json.gz), profile.json and profile.txt."""
    from hpsafety.profile.recorder import Recorder
    from hpsafety.train import phases

    out = Path(cfg.out)
    rank = int(os.environ.get("RANK", 0))
    if rank == 0:
        check_out(out)
        out.mkdir(parents=True, exist_ok=True)
        for old in [*out.glob("trace*.json.gz"), *out.glob("profile.*")]:
            old.unlink()
    wanted = {
        "out": str(out / SCRATCH), "checkpoint_every": 0, "resume": False,
        **dict.fromkeys(("steps", "iterations"), settings.profile_warmup + settings.profile_steps + 1),
    }  # fmt: skip
    fields = {field.name for field in dataclasses.fields(cfg)}
    limited = dataclasses.replace(cfg, **{k: v for k, v in wanted.items() if k in fields})
    recorder = Recorder(stage, limited, settings, out)
    try:
        with phases.recorded_by(recorder), recorder:
            call(limited)
    except phases.Enough:
        if rank == 0:
            print(recorder.text)
        return
    finally:
        if rank == 0:
            for left in out.glob(SCRATCH + "*"):  # a stage of lines in and out leaves SCRATCH.part
                shutil.rmtree(left, ignore_errors=True)
    need = settings.profile_warmup + settings.profile_steps
    raise InputError(
        f"{stage} ended after {recorder.seen} steps, but {need} were to be run; give more data or a smaller "
        "--profile-steps"
    )
