"""`hpsafety <command> [--config FILE.toml] [--flags]`.

Each command imports what it needs when it runs, so that --help needs no torch. Exit codes: 0 done, 1 failed in
running, 2 bad input or usage, 130 interrupted after a clean checkpoint. HPSAFETY_DEBUG=1 shows every traceback.
"""

import difflib
import errno
import functools
import importlib
import os
import sys
import traceback

from hpsafety import __version__
from hpsafety.errors import InputError, RunError

# name -> (summary, config dataclass in hpsafety.config or None, module and function that runs it)
COMMANDS = {
    "demo": (
        "the whole pipeline small, on the built-in model and data; a few minutes on a CPU",
        "DemoConfig",
        "hpsafety.demo:run",
    ),
    "pipeline": (
        "all stages of a TOML file in its order, resumable stage by stage; --plan for a dry run",
        "PipelineConfig",
        "hpsafety.pipeline:run",
    ),
    "select": (
        "a seeded part of record files, the kinds in turn, within a budget of tokens",
        "SelectConfig",
        "hpsafety.stages.select:run",
    ),
    "sft": (
        "supervised fine-tuning on demonstrations, helpful and safe mixed",
        "SFTConfig",
        "hpsafety.stages.sft:run",
    ),
    "reward": (
        "one reward model, of safety or of helpfulness, from preference pairs",
        "RewardConfig",
        "hpsafety.stages.reward:run",
    ),
    "score": (
        "scores of groups of responses by a safety and a helpfulness reward model",
        "ScoreConfig",
        "hpsafety.stages.score:run",
    ),
    "sample": (
        "K responses per prompt, as groups; resumable, over ranks",
        "SampleConfig",
        "hpsafety.stages.sample:run",
    ),
    "chat": (
        "talk to a checkpoint in the terminal, --against DIR side by side",
        "ChatConfig",
        "hpsafety.chat:run",
    ),
    "reject": (
        "rejection sampling: sample, score, keep the best of the pool, fine-tune on it",
        "RejectConfig",
        "hpsafety.stages.reject:run",
    ),
    "ppo": (
        "PPO with both reward models: sample, score, penalise the KL to the start, update",
        "PPOConfig",
        "hpsafety.stages.ppo:run",
    ),
    "gatt": (
        "ghost attention: an instruction of the first turn that holds in all of them",
        "GAttConfig",
        "hpsafety.stages.gatt:run",
    ),
    "scaling": (
        "the safety-data-scaling study: what more safety data buys, and what it costs; --demo for a small one",
        "ScalingConfig",
        "hpsafety.scaling:run",
    ),
    "distill": (
        "safety context distillation: sample with a preprompt, learn without it what the safety model prefers",
        "DistillConfig",
        "hpsafety.stages.distill:run",
    ),
    "dpo": (
        "direct preference optimisation: a policy from preference pairs, without a reward model",
        "DPOConfig",
        "hpsafety.stages.dpo:run",
    ),
    "audit": (
        "a corpus described: languages, pronouns, identity terms, toxicity; nothing is filtered",
        "AuditConfig",
        "hpsafety.stages.audit:run",
    ),
    "eval": (
        "violations beside false refusals, truthfulness, toxicity and bias of a checkpoint",
        "EvalConfig",
        "hpsafety.stages.evaluate:run",
    ),
    "redteam": (
        "a red-team round: attacks on all vectors, judge, gamma, replay of earlier violations",
        "RedteamConfig",
        "hpsafety.stages.redteam:run",
    ),
    "report": (
        "one HTML file of all that a run measured; a second run stands beside it",
        "ReportConfig",
        "hpsafety.report.run_page:run",
    ),
    "card": (
        "the model card of a run, Markdown for Hugging Face and HTML; every number with its manifest's hash",
        "CardConfig",
        "hpsafety.report.card:run",
    ),
    "profile": (
        "where a step's time goes: profile STAGE [flags of the stage]",
        None,
        "hpsafety.profile.command:run",
    ),
    "bench": (
        "times the ops against their peers and the machine's limit",
        "BenchConfig",
        "hpsafety.bench_command:run",
    ),
    "bench compare": (
        "two result files of bench --json: faster, slower or no difference, row by row",
        "BenchCompareConfig",
        "hpsafety.bench_command:compare",
    ),
    "plan": (
        "what hardware will do, on paper: --kernels for the time of each GPU kernel, by a model",
        "PlanConfig",
        "hpsafety.planner:run",
    ),
    "ops": ("which backend serves each op, and why not the others", None, "hpsafety.cli:show_ops"),
    "doctor": ("what is installed and built, and what is wrong with it", None, "hpsafety.doctor:run"),
    "version": ("the version", None, "hpsafety.cli:show_version"),
}
DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
NOT_WRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS)
WRONG_PATH = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENAMETOOLONG)


def usage() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {summary}" for name, (summary, _, _) in COMMANDS.items()]
    return "\n".join(
        ["usage: hpsafety <command> [--config FILE.toml] [--flags]", "", "commands:", *lines, ""]
        + ["hpsafety <command> --help shows the flags with their defaults and units."]
    )


def show_version() -> None:
    print(f"hpsafety {__version__}")


def show_ops() -> None:
    """One row per op and backend; a table on a terminal, tab-separated lines elsewhere."""
    from hpsafety import ops

    columns = ("op", "backend", "available", "why")
    rows = [
        [row["op"], row["backend"], "yes" if row["available"] else "no", row["why"]] for row in ops.table()
    ]
    if not sys.stdout.isatty():
        print("\n".join("\t".join(row) for row in [columns, *rows]))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(*columns)
    for row in rows:
        table.add_row(*row, style=None if row[2] == "yes" else "dim")
    Console().print(table)


def say(command: str, text: str) -> None:
    """One line on stderr; under torchrun once per machine."""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        print(f"{command}: {text}", file=sys.stderr, flush=True)


def disk_full(error: BaseException | None) -> bool:
    """Whether an exception, or what caused it, says that the disk is full; safetensors and torch wrap the errno."""
    while error is not None:
        if getattr(error, "errno", None) in DISK_FULL or "No space left on device" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False


def explain(error: Exception, out: str | None) -> tuple[int, str] | None:
    """(exit code, line) of an exception that needs no traceback; None for the others. out: the run's output path."""
    if isinstance(error, InputError):
        return 2, str(error)
    path = getattr(error, "filename", None) or out or "the output"
    if disk_full(error):
        return 1, f"disk full while writing {path}: free space and run the same command again; it resumes"
    if isinstance(error, OSError) and error.errno in NOT_WRITABLE:
        return 2, f"{path}: {error.strerror}; choose another path or change its permissions"
    if isinstance(error, OSError) and error.errno in WRONG_PATH and error.filename is not None:
        return 2, f"{path}: {error.strerror}"
    if isinstance(error, FloatingPointError | RunError):
        return 1, str(error)
    if isinstance(error, ModuleNotFoundError) and not (error.name or "hpsafety").startswith("hpsafety"):
        return 1, f"the package {error.name} is not installed: run make, or see hpsafety doctor"
    return None


def prepare_profile(args: list[str]):
    """(the function that profiles a stage's own function, the stage's config); `profile` takes a stage's flags."""
    from hpsafety.profile import command

    stage, settings, cfg = command.parse(args, COMMANDS)
    module, function = COMMANDS[stage][2].split(":")
    call = getattr(importlib.import_module(module), function)
    return functools.partial(command.run, stage, settings, call=call), cfg


def prepare(command: str, args: list[str]):
    """(the function that runs `command`, its config or None). Imports what the command needs."""
    from hpsafety import config, flags

    if command == "profile":
        return prepare_profile(args)
    summary, config_name, target = COMMANDS[command]
    prog, cfg = f"hpsafety {command}", None
    if config_name is not None:
        cfg = flags.parse(getattr(config, config_name), prog, summary, args)
    elif args in (["--help"], ["-h"]):
        print(f"usage: {prog}\n\n{summary}")
        raise SystemExit(0)
    elif args:
        raise InputError(f"unexpected argument {args[0]!r}; this command takes none. See hpsafety --help")
    module, function = target.split(":")
    return getattr(importlib.import_module(module), function), cfg


def guarded(command: str, args: list[str]) -> int:
    """Run a command; its exceptions become one line and an exit code."""
    prog, out = f"hpsafety {command}", None
    try:
        call, cfg = prepare(command, args)
        out = getattr(cfg, "out", None)
        call() if cfg is None else call(cfg)
        return 0
    except SystemExit as stop:  # --help
        return stop.code
    except KeyboardInterrupt as error:  # also train's own, raised after the checkpoint is written
        say(prog, str(error) or "interrupted; run the same command again to go on")
        return 130
    except BrokenPipeError:  # the reader of a pipe has gone: `hpsafety ops | head -1`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        known = explain(error, out)
        if known is None or os.environ.get("HPSAFETY_DEBUG") == "1":
            traceback.print_exc()
        if known is None:
            return 1
        say(prog, known[1])
        return known[0]


def main(args: list[str] | None = None) -> int:
    """The program; returns its exit code. args: the words after `hpsafety`, sys.argv by default."""
    args = sys.argv[1:] if args is None else args
    if not args or args[0] in ("-h", "--help", "help"):
        print(usage())
        return 0 if args else 2
    length = 2 if " ".join(args[:2]) in COMMANDS else 1  # "bench compare" is a command of two words
    command, rest = " ".join(args[:length]), args[length:]
    command = "version" if command in ("--version", "-V") else command
    if command not in COMMANDS:
        near = difflib.get_close_matches(command, COMMANDS, n=1, cutoff=0.5)
        hint = f"; did you mean {near[0]}?" if near else "."
        say("hpsafety", f"unknown command {command!r}{hint} See hpsafety --help")
        return 2
    return guarded(command, rest)
