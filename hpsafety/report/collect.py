"""A run read for the report and the card: its stages with their manifests, what evaluations say of each model, answers.

A run is a directory with pipeline.json; or one whose sub-directories hold manifest.json, in order of their start; or
one run directory. What is missing is not there (None, an empty list) and no error; what is there and cannot be read, or
has changed since its run wrote it, is told in `faults`.
"""

import hashlib
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from hpsafety.errors import file_error
from hpsafety.report.text import line
from hpsafety.train.rundir import sha256

HASH_DIGITS = 12
OWN = ("report", "card")  # commands that tell of a run and are no part of it
STATED = {"eval": "eval.json", "audit": "audit.json", "scaling": "scaling.json", "redteam": "redteam.json"}
START = "original"  # the model a run begins with


@dataclass(frozen=True)
class Stage:
    """One run directory. hash: first 12 hex digits of the sha256 of manifest.json's bytes; None without one.

    result   the file that holds its numbers (STATED, report.json elsewhere); {} where there is none
    metrics  its lines of metrics.jsonl
    """

    name: str
    command: str
    folder: Path
    status: str
    manifest: dict
    hash: str | None
    seconds: float | None
    substituted: str | None
    result: dict
    metrics: list[dict]

    @property
    def config(self) -> dict:
        found = self.manifest.get("config")
        return found if isinstance(found, dict) else {}

    @property
    def ran(self) -> bool:
        """Whether it came to its end, in this call of the pipeline or in an earlier one."""
        return bool(self.manifest.get("ended"))


@dataclass(frozen=True)
class Item:
    """One prompt of an evaluation and the model's answer. scores: "safety", "helpful" -> R in (0, 1)."""

    id: str
    part: str  # adversarial, borderline, helpful
    prompt: object
    category: str | None
    attack: str | None
    text: str
    scores: dict[str, float]


@dataclass(frozen=True)
class Evaluated:
    """One model in one evaluation. model: the stage that made it, or "original"; metrics: key -> value, n, low, high,
    judge and, of a rate, count; value is None where it was not measured."""

    model: str
    stage: Stage
    metrics: dict[str, dict]
    items: list[Item] = field(repr=False, default_factory=list)


@dataclass(frozen=True)
class Run:
    path: Path
    title: str
    pipeline: dict
    stages: list[Stage]
    evaluated: list[Evaluated]
    faults: list[str]

    def of(self, *commands: str) -> list[Stage]:
        """Stages of these commands that left a manifest."""
        return [stage for stage in self.stages if stage.command in commands and stage.hash]


def collect(path) -> Run:
    """The run at `path`. Raises InputError where nothing of hpsafety lies there."""
    path, faults = Path(path), []
    if not path.is_dir():
        raise file_error(line(path), "no such directory; give a run directory of hpsafety")
    pipeline = read_object(path / "pipeline.json", faults) or {}
    listed = [row for row in _list(pipeline.get("stages")) if isinstance(row, dict)]
    if listed:
        stages = [_listed(path, row, faults) for row in listed]
    elif (path / "manifest.json").exists():
        stages = [_stage(path.resolve().name, path, {}, faults)]
    else:
        folders = sorted(found.parent for found in path.glob("*/manifest.json"))
        stages = [_stage(folder.name, folder, {}, faults) for folder in folders]
        stages.sort(key=lambda stage: (str(stage.manifest.get("started")), stage.name))
    if not stages:
        raise file_error(
            line(path), "holds no pipeline.json and no directory with a manifest.json; give a run of hpsafety"
        )
    stages = [stage for stage in stages if stage.command not in OWN]
    title = pipeline.get("title")
    title = line(title if isinstance(title, str) and title.strip() else path.resolve().name)
    return Run(path, title, pipeline, stages, _evaluations(stages, faults), faults)


# ---- stages ----


def _listed(path: Path, row: dict, faults: list[str]) -> Stage:
    """A stage of pipeline.json; its folder must lie below the run."""
    name = line(row.get("name", "unnamed"), 60)
    out = row.get("out", row.get("name", ""))
    folder = path / out if isinstance(out, str) and "\0" not in out else path
    if not folder.resolve().is_relative_to(path.resolve()) or folder.resolve() == path.resolve():
        faults.append(f"stage {name}: its folder {line(out)} does not lie below the run; not read")
        folder = path / ".nowhere"
    return _stage(name, folder, row, faults)


def _stage(name: str, folder: Path, row: dict, faults: list[str]) -> Stage:
    file = folder / "manifest.json"
    manifest = read_object(file, faults) or {}
    digest = hashlib.sha256(file.read_bytes()).hexdigest()[:HASH_DIGITS] if manifest else None
    command = row.get("run") or manifest.get("stage") or name
    command = line(command, 40)
    status = row.get("status") or ("done" if manifest.get("ended") else "not finished")
    seconds, why = row.get("seconds"), row.get("substituted")
    result = folder / STATED.get(command, "report.json")
    if command == "scaling" and not result.exists():
        result = folder / "report.json"
    stage = Stage(
        line(name, 60), command, folder, line(status, 20), manifest, digest,
        float(seconds) if number(seconds) is not None else None, line(why, 500) if why else None,
        read_object(result, faults) or {}, read_lines(folder / "metrics.jsonl", faults),
    )  # fmt: skip
    written = _object(manifest.get("output_hashes")).get(result.name)
    if stage.result and isinstance(written, str) and sha256(result) != written:
        faults.append(f"{_where(result)} has changed since its run wrote it: its numbers are not the run's")
    return stage


# ---- evaluations ----


def _evaluations(stages: list[Stage], faults: list[str]) -> list[Evaluated]:
    """Each model once, in the order of the stages that made them: what was measured as `--model` and later goes before
    what was measured as `--base` or earlier."""
    best: dict[str, Evaluated] = {}
    for role in ("base", "model"):
        for stage in stages:
            if stage.command != "eval" or not stage.result or not stage.config.get(role):
                continue
            name = made_by(stage.config[role])
            if role == "base" and name == made_by(stage.config.get("model")):
                name = f"{name} (base)"
            metrics = {line(k): m for k, m in ((k, _metric(v, role)) for k, v in stage.result.items()) if m}
            best[name] = Evaluated(name, stage, metrics, _items(stage.folder, role, faults))
    order = {START: -1} | {stage.name: place for place, stage in enumerate(stages)}
    return sorted(best.values(), key=lambda found: order.get(found.model, len(order)))


def made_by(model) -> str:
    """The stage that wrote a model: the folder above .../model; "original" for any other."""
    parts = Path(str(model)).parts
    return line(parts[-2], 60) if len(parts) > 1 and parts[-1] == "model" else START


def _metric(found, role: str) -> dict | None:
    """One entry of eval.json for --model or --base, numbers checked; None where it is no measure of this model."""
    if not isinstance(found, dict):
        return None
    own = found if role == "model" else found.get("base")
    if not isinstance(own, dict):
        return None
    out = {name: number(own.get(name)) for name in ("value", "low", "high")}
    if out["low"] is None or out["high"] is None:
        out["low"] = out["high"] = None
    n = number(own.get("n"))
    out |= {
        "n": 0 if n is None else int(n),
        "judge": line(own.get("judge") or found.get("judge") or "not named"),
    }
    if number(own.get("count")) is not None:
        out["count"] = int(own["count"])
    if isinstance(found.get("why"), str):
        out["why"] = line(found["why"])
    return out


def _items(folder: Path, role: str, faults: list[str]) -> list[Item]:
    """The prompts with this model's answers, as far as both are there."""
    prompts = read_lines(folder / "prompts.jsonl", faults)
    answers = read_lines(folder / f"answers-{role}.jsonl", faults)
    scores = read_lines(folder / "scores.jsonl", faults)
    if len(prompts) != len(answers):
        if answers:
            faults.append(
                f"{_where(folder)}: as many answers as prompts were expected; answers are not shown"
            )
        return []
    scores = scores if len(scores) == len(prompts) else [{}] * len(prompts)
    place = 0 if role == "model" else 1
    out = []
    for row, answer, scored in zip(prompts, answers, scores, strict=True):
        text = (_list(answer.get("responses")) or [""])[0]
        found = {kind: _list(scored.get(kind)) for kind in ("safety", "helpful")}
        kept = {k: number(v[place]) for k, v in found.items() if len(v) > place}
        names = (row.get(key) if isinstance(row.get(key), str) else None for key in ("category", "attack"))
        out.append(Item(
            str(row.get("id")), line(row.get("set"), 20), row.get("prompt"), *names,
            text if isinstance(text, str) else str(text), {k: v for k, v in kept.items() if v is not None},
        ))  # fmt: skip
    return out


# ---- files ----


def read_object(path: Path, faults: list[str]) -> dict | None:
    """A JSON object; None where there is no such file, or, with a fault, no such object."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        faults.append(f"{_where(path)} cannot be read ({line(error, 120)}); what it holds is not measured")
        return None
    if not isinstance(found, dict):
        faults.append(f"{_where(path)} must hold a JSON object; what it holds is not measured")
        return None
    return found


def read_lines(path: Path, faults: list[str]) -> list[dict]:
    """The objects of a JSON-lines file; [] where there is none. Other lines are left out, with a fault."""
    if not path.is_file():
        return []
    found, bad = [], 0
    with open(path, encoding="utf-8", errors="replace") as handle:
        for row in map(_parsed, handle):
            found.append(row)
            bad += row is None
    if bad:
        faults.append(f"{_where(path)}: {bad} of {len(found)} lines are no JSON objects and are left out")
    return [row for row in found if row is not None]


def _parsed(text: str) -> dict | None:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def number(value) -> float | None:
    """A finite number; None for anything else."""
    fine = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if fine else None


def _where(path: Path) -> str:
    return line(Path(*path.parts[-2:]))


def _list(found) -> list:
    return found if isinstance(found, list) else []


def _object(found) -> dict:
    return found if isinstance(found, dict) else {}


def prompts_of(run: Run) -> Iterator[tuple[Item, list[tuple[str, Item]]]]:
    """(one prompt, [(model, its item), ...]) over all models, in the order of the last evaluation's file."""
    asked: dict[tuple, list] = {}
    for found in reversed(run.evaluated):
        for item in found.items:
            key = (item.part, item.id, json.dumps(item.prompt, sort_keys=True))
            asked.setdefault(key, []).insert(0, (found.model, item))
    for answers in asked.values():
        yield answers[-1][1], answers
