"""Checkpoints that are whole or absent: written beside, flushed, then renamed to step-N.

step-N/weights/, step-N/optimizer/   safetensors written by torch.distributed.checkpoint, one part per rank, readable
                                     by any number of ranks; no pickles
step-N/trainer.json                  step, counters, random state
The optimiser's part is dropped when a stage ends; the last two checkpoints are kept.
"""

import contextlib
import json
import os
import re
import shutil
import warnings
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter

from hpsafety.errors import file_error
from hpsafety.files import fsync_dir
from hpsafety.model.mapped import give_back
from hpsafety.train import distributed

KEEP = 2
FILE_BYTES = 256 * 2**20  # a file is built in memory before it is written


def _file_of(tensors: dict[str, torch.Tensor]) -> dict[str, int]:
    """Tensor name -> file number, so that no file much exceeds FILE_BYTES."""
    out, number, size = {}, 1, 0
    for name, tensor in tensors.items():
        nbytes = tensor.numel() * tensor.element_size()
        if size and size + nbytes > FILE_BYTES:
            number, size = number + 1, 0
        out[name], size = number, size + nbytes
    return out


@contextlib.contextmanager
def _plain_errors():
    """torch wraps what went wrong on a rank in a BaseException; here the first cause itself is raised.

    Its warning that a single process is single is dropped: that is meant.
    """
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            yield
    except dcp.CheckpointException as error:
        raise next(iter(error.failures.values()))[0] from None


def _save_tensors(tensors: dict[str, torch.Tensor], folder: Path, world) -> None:
    writer = HuggingFaceStorageWriter(
        str(folder), fqn_to_index_mapping=_file_of(tensors), save_distributed=True, enable_consolidation=False
    )
    with _plain_errors():
        dcp.save(tensors, storage_writer=writer, no_dist=world.size == 1)


def _load_tensors(tensors: dict[str, torch.Tensor], folder: Path, world) -> None:
    with _plain_errors():
        dcp.load(tensors, storage_reader=HuggingFaceStorageReader(str(folder)), no_dist=world.size == 1)


def _weights(model) -> dict[str, torch.Tensor]:
    """Parameters that train: a frozen one is what the run read it as."""
    return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}


def steps(folder: Path) -> list[int]:
    """Steps of the complete checkpoints in `folder`, ascending."""
    found = [re.fullmatch(r"step-(\d+)", p.name) for p in folder.glob("step-*")] if folder.is_dir() else []
    return sorted(int(m[1]) for m in found if m and (folder / m[0] / "trainer.json").is_file())


def save(folder: Path, step: int, model, optimizer, trainer: dict, world, spared: int | None = None) -> Path:
    """Writes folder/step-N (a collective call) and removes all but the last two and `spared`. OSError passes through.

    trainer  small JSON data: counters that the next step needs; torch's random state is added
    """
    target, temporary = folder / f"step-{step}", folder / f".step-{step}.tmp"
    if world.is_main:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    distributed.barrier(world)
    give_back()
    try:
        _save_tensors(_weights(model), temporary / "weights", world)
        _save_tensors(optimizer.state(), temporary / "optimizer", world)
        distributed.barrier(world)
        if world.is_main:
            state = trainer | {"step": step, "rng": bytes(torch.get_rng_state().tolist()).hex()}
            (temporary / "trainer.json").write_text(json.dumps(state), encoding="utf-8")
            _flush(temporary)
            shutil.rmtree(target, ignore_errors=True)
            temporary.rename(target)
            fsync_dir(folder)
            for old in set(steps(folder)[:-KEEP]) - {spared}:
                shutil.rmtree(folder / f"step-{old}")
    except BaseException:
        if world.is_main:
            shutil.rmtree(temporary, ignore_errors=True)
        raise
    distributed.barrier(world)
    return target


def _flush(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            with open(path, "rb+") as handle:
                os.fsync(handle.fileno())


def save_best(folder: Path, model, world) -> None:
    """The weights of the best pass so far, in folder/best (a collective call)."""
    target, temporary = folder / "best", folder / ".best.tmp"
    if world.is_main:
        shutil.rmtree(temporary, ignore_errors=True)
    distributed.barrier(world)
    _save_tensors(_weights(model), temporary, world)
    distributed.barrier(world)
    if world.is_main:
        shutil.rmtree(target, ignore_errors=True)
        temporary.rename(target)
    distributed.barrier(world)


def load_best(folder: Path, model, world) -> None:
    """Fills model with what save_best wrote (a collective call)."""
    _load_tensors(_weights(model), folder / "best", world)


def load(path: Path, model, optimizer, world) -> dict:
    """Fills model and optimizer from a checkpoint (a collective call); returns the trainer's data.

    Raises InputError when the checkpoint is of another model or was cut down after its stage ended.
    """
    if not (path / "optimizer").is_dir():
        raise file_error(path, "holds no optimiser state (its stage ended); start anew with --no-resume")
    try:
        _load_tensors(_weights(model), path / "weights", world)
        _load_tensors(optimizer.state(), path / "optimizer", world)
    except (RuntimeError, ValueError, AssertionError, KeyError, SafetensorError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise file_error(
            path, f"cannot be read into this model ({reason}); start anew with --no-resume"
        ) from error
    trainer = json.loads((path / "trainer.json").read_text(encoding="utf-8"))
    torch.set_rng_state(torch.tensor(list(bytes.fromhex(trainer.pop("rng"))), dtype=torch.uint8))
    return trainer


def drop_training_state(folder: Path) -> None:
    """Removes the optimiser's part of every checkpoint, the best weights, PPO's rollouts and parked models, and DPO's
    reference: a finished stage has its model."""
    for path in [
        f for name in ("experience-*", "frozen-*", "reference.safetensors") for f in folder.glob(name)
    ]:
        path.unlink()
    for step in steps(folder):
        shutil.rmtree(folder / f"step-{step}" / "optimizer", ignore_errors=True)
    shutil.rmtree(folder / "best", ignore_errors=True)
