"""The run directory: what made it (manifest.json), where a killed run goes on, and whether OUT is this run's at all."""

import dataclasses
import datetime
import hashlib
import json
import platform
import shutil
from collections import Counter
from pathlib import Path

from hpsafety.errors import file_error
from hpsafety.files import atomic_write
from hpsafety.model.io import locate
from hpsafety.train import checkpoint

# Fields that change how a run is executed, not what it computes: a run may be resumed under other values of these.
EXECUTION = (
    "resume", "out", "device", "tokens_per_batch", "checkpoint_every", "recompute", "kv_memory", "max_batch", "workers",
    "keep_going",
)  # fmt: skip
OURS = (
    "model", "metrics.jsonl", "manifest.json", "checkpoints", "log.txt", "tb", "report.json", "report.html",
)  # fmt: skip


def sha256(path: Path) -> str:
    """Hex digest of a file's bytes."""
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def input_hashes(paths) -> dict[str, str]:
    """File name -> sha256 of each data file; a folder stands with all its files; files of one name by their paths."""
    paths = [Path(path) for path in paths]
    names = Counter(path.name for path in paths)
    out = {}
    for path in paths:
        name = path.name if names[path.name] == 1 else str(path)
        out |= tree_hashes(path) if path.is_dir() else {name: sha256(path)}
    return out


def model_hashes(models: dict[str, str]) -> dict[str, str]:
    """name/FILE -> sha256 of every file of each model directory; a model that is one file stands as its name.

    models  name -> model as load_model takes it. Raises InputError where there is none.
    """
    out = {}
    for name, path in ((name, locate(model)) for name, model in models.items()):
        files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
        out |= {name if p == path else f"{name}/{p.relative_to(path)}": sha256(p) for p in files}
    return out


def tree_hashes(folder: Path) -> dict[str, str]:
    """Relative path -> sha256 of every file below `folder`, sorted."""
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    return {str(p.relative_to(folder.parent)): sha256(p) for p in files}


def versions() -> dict[str, str]:
    """Versions and machine that a number depends on."""
    import torch

    import hpsafety

    return {
        "hpsafety": hpsafety.__version__, "torch": torch.__version__, "python": platform.python_version(),
        "system": platform.platform(), "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": str(torch.get_num_threads()),
    }  # fmt: skip


def now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def refuse_other(mine: dict, old: dict) -> str | None:
    """Why the run of manifest `old` is not the run of manifest `mine`: its stage, config or data; None when it is."""
    if old.get("stage") != mine["stage"]:
        return f"stage ({old.get('stage')}, not {mine['stage']})"
    ours, theirs = ({k: v for k, v in m.get("config", {}).items() if k not in EXECUTION} for m in (mine, old))
    names = [k for k in sorted(ours.keys() | theirs.keys()) if ours.get(k) != theirs.get(k)]
    if names:
        shown = ", ".join(f"{k} was {theirs.get(k)!r}, now {ours.get(k)!r}" for k in names[:4])
        return f"config ({shown})"
    hashes, before = mine["input_hashes"], old.get("input_hashes", {})
    changed = [k for k, v in hashes.items() if before.get(k) != v]
    if hashes != before:
        return f"data ({', '.join(changed) or 'an input'} has changed since)"
    return None


class RunDir:
    """OUT of one stage. Only rank 0 writes; every rank reads.

    `resume_step` is the step to go on from (0: a fresh start); `complete` is True when the stage has ended before.
    Raises InputError when OUT holds something else or a run of another config.
    """

    def __init__(self, out: str, stage: str, config, inputs: dict[str, str], world):
        self.path, self.stage, self.world = Path(out), stage, world
        self.checkpoints = self.path / "checkpoints"
        self.config = {
            k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(config).items()
        }
        self.manifest = {
            "stage": stage, "config": self.config, "code_version": versions()["hpsafety"], "seed": config.seed,
            "versions": versions(), "world_size": world.size, "input_hashes": inputs, "output_hashes": {},
            "counts": {}, "started": now(), "ended": None,
        }  # fmt: skip
        old = self._old_manifest()
        self.complete = bool(old and config.resume and old.get("ended"))
        self.resume_step, self.log = 0, None
        self.fresh = old is None or not config.resume  # nothing that OUT holds is taken over
        if old is not None and config.resume:
            self._refuse_other(old)
            self.manifest["started"] = old["started"]
            found = checkpoint.steps(self.checkpoints)
            self.resume_step = found[-1] if found else 0

    def _old_manifest(self) -> dict | None:
        path = self.path / "manifest.json"
        if self.path.exists() and not self.path.is_dir():
            raise file_error(self.path, "--out must be a directory, but a file stands there; choose another")
        if not path.exists():
            if self.path.is_dir() and not all(p.name.endswith(".tmp") for p in self.path.iterdir()):
                raise file_error(
                    self.path, "--out holds files but no run of hpsafety; choose an empty directory"
                )
            return None
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except (ValueError, OSError) as error:
            raise file_error(path, f"is not readable ({error}); choose another --out") from error

    def _refuse_other(self, old: dict) -> None:
        why = refuse_other(self.manifest, old)
        if why:
            raise file_error(
                self.path, f"holds a run of another {why}; choose another --out, or --no-resume to start it anew"
            )  # fmt: skip

    def open(self) -> None:
        """Makes OUT, clears what a fresh start must not inherit, and writes the manifest."""
        if not self.world.is_main:
            return
        self.path.mkdir(parents=True, exist_ok=True)
        if not self.resume_step:
            for name in OURS:
                stale = self.path / name
                shutil.rmtree(stale) if stale.is_dir() else stale.unlink(missing_ok=True)
        self._write()
        self.checkpoints.mkdir(exist_ok=True)

    def finish(self, counts: dict, files: tuple[str, ...] = ()) -> None:
        """Writes output hashes, counts and the end time, and then drops what only training needs: killed in between,
        the run is complete, with some files too many.

        files  outputs of OUT beside model/ that a later stage may read
        """
        if not self.world.is_main:
            return
        self.manifest |= {
            "output_hashes": tree_hashes(self.path / "model")
            | {name: sha256(self.path / name) for name in files},
            "counts": counts,
            "ended": now(),
        }
        self._write()
        checkpoint.drop_training_state(self.checkpoints)

    def _write(self) -> None:
        with atomic_write(self.path / "manifest.json") as handle:
            json.dump(self.manifest, handle, indent=2)
            handle.write("\n")
