"""A pipeline's TOML file: an ordered list of stages, each a command with its flags, checked as a whole before any runs.

[pipeline]          title, out, and defaults (seed, device, precision, ...) for every stage that has such a field
[plan]              what --plan shall assume: see hpsafety/pipeline_plan.py
[[stage]]           name, run (the command), optionally substituted (why it stands in for the paper's stage) and
                    optional (left out where a package it needs is not installed); then the command's own flags

In a value "{NAME}" is the directory of the stage NAME, "{out}" that of the pipeline, "{demo}" the built-in demo data.
What a stage needs follows from these references; it must stand after what it needs.
"""

import dataclasses
import re
from dataclasses import dataclass, field
from pathlib import Path

from hpsafety import cli, config
from hpsafety.data import demo
from hpsafety.errors import InputError, file_error
from hpsafety.flags import load_toml, missing_fields, nearest, table_values

# Commands that write a run directory of their own.
COMMANDS = (
    "audit", "select", "sft", "reward", "reject", "ppo", "gatt", "distill", "dpo", "scaling", "redteam", "eval",
    "report", "card",
)  # fmt: skip
DESCRIBE = ("report", "card")  # they describe the run as it stands, so they are made anew each time
OWN = ("name", "run", "substituted", "optional")
GIVEN = ("out", "resume")  # the pipeline's own business
REFERENCE = re.compile(r"\{([^{}]*)\}")
DEMO_DATA = Path(demo.__file__).parent


@dataclass(frozen=True)
class Stage:
    """One stage. raw: its config with the references as written; cfg: with the paths they mean."""

    name: str
    run: str
    raw: object
    cfg: object
    out: Path
    needs: tuple[str, ...] = ()
    substituted: str | None = None
    optional: bool = False


@dataclass(frozen=True)
class Pipeline:
    title: str
    file: str
    text: str
    out: Path
    seed: int
    device: str
    precision: str
    stages: tuple[Stage, ...]
    plan: dict = field(default_factory=dict)


def read_pipeline(file: str, changes: dict | None = None, stage_changes: dict | None = None) -> Pipeline:
    """The pipeline of a TOML file. Raises InputError for whatever is wrong in it, before anything runs.

    changes        values over [pipeline]'s, as the command line gives them
    stage_changes  stage name -> values over its own
    """
    table = load_toml(file, "; pipeline takes a TOML file of stages")
    for name in table.keys() - {"pipeline", "plan", "stage"}:
        raise file_error(
            file, f"unknown table {name!r}{nearest(name, ('pipeline', 'plan', 'stage'), 'tables')}"
        )
    head, rows = table.get("pipeline", {}), table.get("stage", [])
    if not isinstance(head, dict) or not isinstance(table.get("plan", {}), dict):
        raise file_error(file, "[pipeline] and [plan] must be tables, each once")
    if not isinstance(rows, list) or not rows or not all(isinstance(row, dict) for row in rows):
        raise file_error(file, "a pipeline needs stages: [[stage]] tables, each with name and run")
    head = head | {name: value for name, value in (changes or {}).items() if value is not None}
    out = head.get("out")
    if not isinstance(out, str) or not out:
        raise file_error(file, "[pipeline] out is missing: the directory to write; or give --out")
    names = stage_names(file, rows)
    check_order(file, rows, names)
    defaults = {name: value for name, value in head.items() if name not in ("title", "out")}
    check_defaults(file, defaults, rows)
    stages = []
    for name, row in zip(names, rows, strict=True):
        row = row | (stage_changes or {}).get(name, {})
        stages.append(make_stage(file, name, row, names, defaults, Path(out)))
    return Pipeline(
        str(head.get("title", Path(file).stem)), file, Path(file).read_text(encoding="utf-8"), Path(out),
        int(defaults.get("seed", 0)), str(defaults.get("device", "auto")),
        str(defaults.get("precision", "auto")), tuple(stages), table.get("plan", {}),
    )  # fmt: skip


def stage_names(file: str, rows: list[dict]) -> list[str]:
    """The names of all stages: words that can be directories, each once."""
    names: list[str] = []
    for number, row in enumerate(rows, start=1):
        name = row.get("name")
        if not isinstance(name, str) or not re.fullmatch(r"[a-z0-9][a-z0-9._-]*", name):
            text = f"stage number {number}: name must be small letters, digits, - and _, got {name!r}"
            raise file_error(file, text if "name" in row else f"stage number {number}: name is missing")
        if name in ("out", "demo", "pipeline.json", "report.html"):
            raise file_error(
                file, f"stage {name!r}: the name is taken by the pipeline itself; choose another"
            )
        if name in names:
            raise file_error(file, f"stage {name!r}: the name is used twice; {{{name}}} must mean one stage")
        names.append(name)
    return names


def config_of(file: str, name: str, row: dict) -> type:
    """The config dataclass of the command that a stage runs."""
    run = row.get("run")
    known = tuple(command for command in COMMANDS if command in cli.COMMANDS)
    if run not in known:
        told = "run is missing" if run is None else f"run names no command of a pipeline: {run!r}"
        raise file_error(file, f"stage {name!r}: {told}{nearest(str(run), known, 'commands')}")
    return getattr(config, cli.COMMANDS[run][1])


def check_defaults(file: str, defaults: dict, rows: list[dict]) -> None:
    """Every key of [pipeline] is a flag of some stage."""
    fields = {
        field.name for row in rows for field in dataclasses.fields(config_of(file, str(row["name"]), row))
    }
    for name in defaults:
        if name.replace("-", "_") not in fields - {*GIVEN}:
            known = ("title", "out", "seed", "device", "precision")
            raise file_error(file, f"[pipeline]: no stage has a flag {name!r}{nearest(name, known)}")


def references(value) -> list[str]:
    """The names in braces of a string, or of the strings of a list."""
    items = value if isinstance(value, (list, tuple)) else [value]
    return [name for item in items if isinstance(item, str) for name in REFERENCE.findall(item)]


def check_order(file: str, rows: list[dict], names: list[str]) -> None:
    """Every reference means a stage that stands before; a ring of stages is told as such."""
    needs = {
        name: {ref: key for key, value in row.items() if key not in OWN for ref in references(value)}
        for name, row in zip(names, rows, strict=True)
    }
    for place, name in enumerate(names):
        for ref, key in needs[name].items():
            if ref in ("out", "demo"):
                continue
            where = f"stage {name!r}: {key} = {{{ref}}}"
            if ref not in names:
                raise file_error(file, f"{where}: no such stage{nearest(ref, names, 'stages')}")
            if names.index(ref) >= place:
                ring = path_between(ref, name, needs)
                why = (
                    f"a ring: {' needs '.join([name, *ring])}"
                    if ring
                    else f"{ref!r} stands after it; move it before"
                )
                raise file_error(file, f"{where}: {why}")


def path_between(start: str, end: str, needs: dict[str, dict]) -> list[str]:
    """Stages from start to end along what they need; empty where there is no way."""
    paths, seen = [[start]], {start}
    while paths:
        path = paths.pop(0)
        if path[-1] == end:
            return path
        for ref in needs.get(path[-1], {}):
            if ref not in seen:
                seen.add(ref)
                paths.append([*path, ref])
    return []


def make_stage(file: str, name: str, row: dict, names: list[str], defaults: dict, out: Path) -> Stage:
    """A stage with its config, made twice: as written, and with the paths its references mean."""
    kind, where = config_of(file, name, row), f"{file}: stage {name!r}"
    for key in GIVEN:
        if key in row:
            raise InputError(f"{where}: {key} is given by the pipeline; leave it out")
    for key, form in (("substituted", str), ("optional", bool)):
        if not isinstance(row.get(key, form()), form):
            raise InputError(f"{where}: {key} must be {'text' if form is str else 'true or false'}")
    fields = {field.name for field in dataclasses.fields(kind)}
    own = table_values(where, {key: value for key, value in row.items() if key not in OWN}, kind)
    shared = {key: value for key, value in defaults.items() if key.replace("-", "_") in fields}
    values = table_values(f"{file}: [pipeline], for stage {name!r}", shared, kind) | own
    if row["run"] != "report":  # whose out is a file beside the stages
        values["out"] = f"{{{name}}}"
    for missing in missing_fields(kind, values):
        raise InputError(f"{where}: {missing.name} is missing ({missing.metadata['help']})")
    refs = [ref for key, value in values.items() if key != "out" for ref in references(value)]
    before = names[: names.index(name)]
    needs = [ref for ref in before if ref in refs or "out" in refs]
    made = []
    for resolve in (lambda value: value, lambda value: resolved(value, out)):
        try:
            made.append(kind(**{key: resolve(value) for key, value in values.items()}))
        except InputError as error:
            raise InputError(f"{where}: {error}") from None
    optional = row.get("optional", False)
    return Stage(name, row["run"], *made, out / name, tuple(needs), row.get("substituted"), optional)


def resolved(value, out: Path):
    """A value with its references replaced by the paths they mean."""
    if isinstance(value, tuple):
        return tuple(resolved(item, out) for item in value)
    if not isinstance(value, str):
        return value

    def path(match: re.Match) -> str:
        return str({"out": out, "demo": DEMO_DATA}.get(match[1], out / match[1]))

    return REFERENCE.sub(path, value)
