"""What of a pipeline is done: OUT/pipeline.json, and whether a stage's settings, inputs and outputs are what they were.

A stage is done when its manifest has ended, it was told the same, it would read the same and holds what it wrote.
One that was told or would read something else is done anew, and so is all that depends on it. One whose outputs are
no longer what it wrote is refused: nobody knows what else was changed.
"""

import dataclasses
import hashlib
import json
import os
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

from hpsafety.errors import InputError, file_error
from hpsafety.files import atomic_write
from hpsafety.model.io import SMOLLM2, locate
from hpsafety.pipeline_file import DESCRIBE, Pipeline, Stage, references
from hpsafety.train.rundir import EXECUTION, now, sha256, tree_hashes, versions

STATE = "pipeline.json"
# Fields of configs that name files or models.
FILES = ("data", "exclude", "eval", "ratings", "templates", "truthfulqa", "toxigen", "bold", "bbq", "crows_pairs",
         "sessions", "garak")  # fmt: skip
RUNS = ("pool_from", "previous")
MODELS = ("model", "base", "student", "teacher", "critic_from", "safety_rm", "helpful_rm")
DONE, GOES_ON, TO_DO, ANEW = "done", "goes on", "to do", "anew"


@dataclass(frozen=True)
class Standing:
    """Where a stage stands. why: of ANEW, the reason."""

    status: str
    why: str = ""

    def __str__(self) -> str:
        return f"{self.status}: {self.why}" if self.why else self.status


# ---- pipeline.json ----


def read_state(pipeline: Pipeline) -> dict[str, dict]:
    """Stage name -> its entry of pipeline.json; empty where there is none yet. Raises InputError for a directory that
    holds anything else."""
    out, path = pipeline.out, pipeline.out / STATE
    if out.exists() and not out.is_dir():
        raise file_error(
            out, "the pipeline's out must be a directory, but a file stands there; choose another"
        )
    if not path.exists():
        if out.is_dir() and any(out.iterdir()):
            raise file_error(out, "holds files but no pipeline.json; choose an empty directory with --out")
        return {}
    try:
        return {entry["name"]: entry for entry in json.loads(path.read_text(encoding="utf-8"))["stages"]}
    except (ValueError, OSError, KeyError, TypeError) as error:
        raise file_error(path, f"is not readable ({error}); choose another --out") from None


def new_state(
    pipeline: Pipeline, entries: dict[str, dict], standings: dict[str, Standing], device: str
) -> dict:
    """What pipeline.json will hold: every stage of the file in its order, as it stands now."""
    path, started = pipeline.out / STATE, now()
    if path.exists():
        started = json.loads(path.read_text(encoding="utf-8")).get("started", started)
    return {
        "title": pipeline.title, "seed": pipeline.seed, "config": pipeline.text, "started": started, "ended": None,
        "machine": versions() | {"cpus": os.cpu_count(), "device": device},
        "stages": [fresh_entry(stage, entries, standings[stage.name]) for stage in pipeline.stages],
    }  # fmt: skip


def fresh_entry(stage: Stage, entries: dict[str, dict], standing: Standing) -> dict:
    """A stage's entry at the start of a call: seconds so far, with those that a killed call did not come to write."""
    old = entries.get(stage.name, {})
    seconds = old.get("seconds", 0.0) if standing.status in (DONE, GOES_ON) else 0.0
    if standing.status in (DONE, GOES_ON) and old.get("status") == "running":
        times = [path.stat().st_mtime for path in stage.out.rglob("*")]
        seconds += max([0.0, *(at - old["since"] for at in times if "since" in old)])
    return {
        "name": stage.name, "run": stage.run, "out": stage.name,
        "status": "done" if standing.status == DONE else "to do",
        "seconds": round(seconds, 2), "needs": list(stage.needs), "substituted": stage.substituted,
        "settings": old.get("settings"), "inputs": old.get("inputs"),  # of what lies on the disk
    }  # fmt: skip


def write_state(pipeline: Pipeline, state: dict) -> None:
    pipeline.out.mkdir(parents=True, exist_ok=True)
    with atomic_write(pipeline.out / STATE) as handle:
        json.dump(state, handle, ensure_ascii=False, indent=1)
        handle.write("\n")


# ---- what a stage was told, and what it reads ----


def settings(stage: Stage) -> dict:
    """What a stage is told, but for what changes nothing in its results."""
    values = dataclasses.asdict(stage.raw)
    return {k: list(v) if isinstance(v, tuple) else v for k, v in values.items() if k not in EXECUTION}


def values_of(stage: Stage, fields: tuple[str, ...]) -> list[tuple[str, str, str]]:
    """(field, value as written, value as a path) of every value of these fields."""
    out = []
    for name in fields:
        raw, cfg = getattr(stage.raw, name, None), getattr(stage.cfg, name, None)
        if isinstance(raw, str):
            raw, cfg = (raw,), (cfg,)
        out += [(name, *pair) for pair in zip(raw or (), cfg or (), strict=True)]
    return out


def inputs_of(stage: Stage, manifests: dict[str, str]) -> dict[str, str]:
    """Value as written -> checksum of what it means: of other stages their manifest (which holds the checksums of what
    they wrote) and any file of theirs that is named, of everything else its files.

    manifests  stage name -> checksum of its manifest
    """
    out = {}
    for name, raw, path in values_of(stage, (*FILES, *RUNS, *MODELS)):
        refs = [ref for ref in references(raw) if ref not in ("out", "demo")]
        for ref in refs:
            out[f"{{{ref}}}"] = manifests.get(ref, "")
        if not refs or Path(path).is_file():
            out[raw] = checksum(path, name in MODELS)
    return out


def checksum(path: str, model: bool) -> str:
    """One number for a file or folder; "" for a model that is not on this disk."""
    place = Path(path)
    if model and path == SMOLLM2:
        place = locate(path)
    if not place.exists():
        return ""
    if place.is_file():
        return sha256(place)
    return hashlib.sha256(json.dumps(tree_hashes(place), sort_keys=True).encode()).hexdigest()


def check_inputs_exist(pipeline: Pipeline) -> None:
    """Raises InputError for a file or model that no stage makes and that is not there."""
    for stage in pipeline.stages:
        for name, raw, path in values_of(stage, (*FILES, *RUNS, *MODELS)):
            if any(ref != "demo" for ref in references(raw)):
                continue
            where = f"{pipeline.file}: stage {stage.name!r}: {name}"
            if name in MODELS:
                try:
                    locate(path)
                except InputError as error:
                    raise InputError(f"{where}: {error}") from None
            elif not Path(path).exists():
                raise InputError(f"{where}: {path}: no such file or folder")


# ---- where every stage stands ----


def standings(pipeline: Pipeline, entries: dict[str, dict], force_from: str | None) -> dict[str, Standing]:
    """Stage name -> where it stands. Raises InputError for an output that was changed, and for a stage to force that
    does not exist."""
    names = [stage.name for stage in pipeline.stages]
    if force_from is not None and force_from not in names:
        raise InputError(f"--force-from {force_from}: no such stage; stages: {', '.join(names)}")
    found: dict[str, Standing] = {}
    manifests: dict[str, str] = {}
    for stage in pipeline.stages:
        found[stage.name] = standing(stage, entries.get(stage.name), found, manifests, force_from)
        path = stage.out / "manifest.json"
        if path.exists():
            manifests[stage.name] = sha256(path)
    return found


def standing(
    stage: Stage, entry, found: dict[str, Standing], manifests: dict[str, str], force: str | None
) -> Standing:
    """Where one stage stands, those before it being known."""
    manifest = read_manifest(stage)
    if stage.run in DESCRIBE or manifest is None:
        return Standing(TO_DO)
    if stage.name == force:
        return Standing(ANEW, "--force-from")
    other = [name for name in stage.needs if found[name].status != DONE]
    if other:
        return Standing(
            ANEW, f"{other[0]} is not done" if found[other[0]].status != ANEW else f"{other[0]} is"
        )
    if not entry or "settings" not in entry or entry.get("inputs") is None:
        return Standing(ANEW, "this pipeline has not run it")
    mine, old = settings(stage), entry["settings"]
    changed = [k for k in sorted(mine.keys() | old.keys()) if mine.get(k) != old.get(k)]
    if entry.get("run") != stage.run:
        return Standing(ANEW, f"it was {entry.get('run')}")
    if changed:
        k = changed[0]
        more = f" and {len(changed) - 1} more" if len(changed) > 1 else ""
        return Standing(ANEW, f"{k} was {old.get(k)!r}, now {mine.get(k)!r}{more}")
    reads = inputs_of(stage, manifests)
    altered = [
        k for k in sorted(reads.keys() | entry["inputs"].keys()) if reads.get(k) != entry["inputs"].get(k)
    ]
    if altered:
        return Standing(ANEW, f"{altered[0]} has changed")
    if not manifest.get("ended"):
        return Standing(GOES_ON)
    check_outputs(stage, manifest)
    return Standing(DONE)


def read_manifest(stage: Stage) -> dict | None:
    path = stage.out / "manifest.json"
    try:
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
    except (ValueError, OSError):
        return None


def check_outputs(stage: Stage, manifest: dict) -> None:
    """Raises InputError where a file is not what the stage's manifest says that it wrote."""
    for name, wrote in manifest.get("output_hashes", {}).items():
        path = stage.out / name
        same = path.is_file() and sha256(path) == wrote
        if not same:
            what = "has been changed since" if path.is_file() else "has gone since"
            raise file_error(
                path, f"{what} stage {stage.name} wrote it; put it back, or do the stage and what depends on it anew "
                f"with --force-from {stage.name}"
            )  # fmt: skip


def clear(stage: Stage) -> None:
    """Removes a stage's directory: what is done anew inherits nothing."""
    if stage.out.is_dir():
        # The manifest goes first: what a kill leaves behind is no run that could go on.
        (stage.out / "manifest.json").unlink(missing_ok=True)
        shutil.rmtree(stage.out)


def begin_entry(stage: Stage, entry: dict) -> None:
    """Marks a stage as running, with what it is told and the checksums of what it reads."""
    paths = {name: stage.out.parent / name / "manifest.json" for name in stage.needs}
    manifests = {name: sha256(path) for name, path in paths.items() if path.exists()}
    entry |= {"status": "running", "since": time.time(), "settings": settings(stage)}
    entry["inputs"] = inputs_of(stage, manifests)
