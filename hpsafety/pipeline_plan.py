"""`hpsafety pipeline FILE --plan`: every stage with where it stands, what it needs, and a model of its time and memory.

    seconds = train FLOPs / (devices x rate x TRAINING) + forward FLOPs / (devices x rate x FORWARD)
            + bytes of optimiser steps / (devices x bandwidth x STREAMING) + decoding
            + bytes of weights / DISK + bytes of text / TEXT + OVERHEAD
    decoding: prompts as forward FLOPs; then steps of a batch of B sequences, each the longer of
              2 B parameters / (rate x FORWARD) and (parameters + keys and values) in bytes / (bandwidth x STREAMING)

rate       of this machine the best GEMM rate at the model's shapes, measured now (train/gemm_limit.py); of a chip that
           [plan] names its bf16 peak, from its maker's data sheet
bandwidth  of this machine measured by a copy; of a chip its data sheet's

It is a model: answers count as long as max_new_tokens allows, and a batch's ragged end is not seen.
"""

import math
import os
import sys
import time
from dataclasses import dataclass

import torch

from hpsafety.errors import InputError
from hpsafety.flags import nearest
from hpsafety.model.config import LlamaConfig
from hpsafety.pipeline_file import Pipeline, Stage
from hpsafety.pipeline_sizes import Sizes
from hpsafety.pipeline_state import DONE, Standing
from hpsafety.pipeline_work import Decoding, Place, Work, forward, work_of
from hpsafety.rollout.kv_cache import free_memory
from hpsafety.safety.ppo_memory import num_parameters
from hpsafety.train import gemm_limit, precision

GB = 1e9
MEASURED_ROWS = 512  # of a micro-batch, at which this machine's GEMMs are measured
OVERHEAD = {
    "here": 3.0,
    "cluster": 120.0,
}  # seconds of a stage beside its work: loading, reports, ranks that meet


@dataclass(frozen=True)
class Chip:
    flops: float  # dense bf16, a second
    bandwidth: float  # bytes a second
    memory: float  # bytes


CHIPS = {
    "A100-80GB": Chip(312e12, 2.0e12, 80e9),
    "H100-80GB": Chip(989e12, 3.35e12, 80e9),
    "H200-141GB": Chip(989e12, 4.8e12, 141e9),
}


@dataclass(frozen=True)
class Machine:
    """What a stage runs on. rate, bandwidth, memory: of one device. The shares are of rate and bandwidth."""

    name: str
    rate: float
    bandwidth: float
    memory: float
    place: Place
    training: float
    forward: float
    streaming: float
    disk: float  # bytes a second of weights, read or written
    text: float  # bytes a second of a corpus
    overhead: float


def machine_of(pipeline: Pipeline, sizes: Sizes) -> Machine:
    """The chips that [plan] names, or this machine, measured."""
    name, gpus = sizes.plan["chips"], sizes.plan["gpus"]
    if name is None:
        return measured(pipeline, sizes)
    if name not in CHIPS:
        raise InputError(
            f"{pipeline.file}: [plan]: chips must be known, got {name!r}{nearest(name, CHIPS, 'chips')}"
        )
    chip = CHIPS[name]
    # Shares of a peak that large trainings and inference report; not measured by this project.
    return Machine(
        f"{gpus} x {name}, on paper", chip.flops, chip.bandwidth, chip.memory,
        Place(torch.bfloat16, gpus, host=False), training=0.40, forward=0.45, streaming=0.60, disk=2 * GB, text=50e6,
        overhead=OVERHEAD["cluster"],
    )  # fmt: skip


def measured(pipeline: Pipeline, sizes: Sizes) -> Machine:
    """This machine: GEMMs at the largest model's shapes, a copy, the free memory. Takes a few seconds."""
    wanted = pipeline.device
    if wanted == "auto":
        wanted = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(wanted)
    dtype, _ = precision.choose(pipeline.precision, device)
    config, rate = largest(pipeline, sizes), GB  # without a model nothing is computed at any rate
    if config is not None:
        shapes = gemm_limit.shapes(config, 1, 1, MEASURED_ROWS)
        rate = gemm_limit.combine(shapes, gemm_limit.measure(shapes, dtype, str(device))) * GB
    bandwidth = copied(device)
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        name = f"this machine, {torch.get_num_threads()} of {os.cpu_count()} cores"
    figures = f"measured: {rate / GB:,.0f} GFLOP/s, {bandwidth / GB:,.1f} GB/s"
    return Machine(
        f"{name}, {figures}", rate, bandwidth,
        free_memory(device), Place(dtype, int(os.environ.get("WORLD_SIZE", 1)), device.type == "cpu"),
        training=0.70, forward=0.70, streaming=0.70, disk=0.5 * GB, text=3e6, overhead=OVERHEAD["here"],
    )  # fmt: skip


def largest(pipeline: Pipeline, sizes: Sizes) -> LlamaConfig | None:
    """The largest model a stage trains or asks."""
    found = [config for stage in pipeline.stages if (config := sizes.of(stage, "model")) is not None]
    return max(found, key=num_parameters, default=None)


def copied(device: torch.device) -> float:
    """Bytes a second that a copy reads and writes."""
    source = torch.zeros(2**26, dtype=torch.uint8, device=device)
    target, best = torch.empty_like(source), math.inf
    for _ in range(4):
        started = time.perf_counter()
        target.copy_(source)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - started)
    return 2 * source.numel() / best


def decoding_seconds(d: Decoding, machine: Machine) -> float:
    """A rank's share of the samples: their prompts, then batch after batch, token after token."""
    own = math.ceil(d.samples / machine.place.ranks)
    running, size = min(d.batch, max(1, own)), machine.place.dtype.itemsize
    parameters = num_parameters(d.config)
    cache = 2 * d.config.num_layers * d.config.num_kv_heads * d.config.head_dim * size
    computed = 2 * running * parameters / (machine.rate * machine.forward)
    moved = (parameters * size + running * (d.prompt + d.new / 2) * cache) / (
        machine.bandwidth * machine.streaming
    )
    prompts = own * forward(d.config, d.prompt, [1]) / (machine.rate * machine.forward)
    return prompts + own / running * d.new * max(computed, moved)


def seconds(work: Work, machine: Machine) -> float:
    """The time model of the top of this file."""
    rate = machine.rate * machine.place.ranks
    return (
        work.train / (rate * machine.training) + work.forward / (rate * machine.forward)
        + work.updates / (machine.place.ranks * machine.bandwidth * machine.streaming)
        + sum(decoding_seconds(d, machine) for d in work.decoding)
        + work.disk / machine.disk + work.text / machine.text + machine.overhead
    )  # fmt: skip


# ---- the table ----


@dataclass(frozen=True)
class Line:
    stage: Stage
    standing: Standing
    work: Work
    seconds: float


def make_plan(pipeline: Pipeline, standings: dict[str, Standing]) -> tuple[Machine, list[Line]]:
    """The machine, and a line per stage."""
    sizes = Sizes(pipeline)
    machine, lines = machine_of(pipeline, sizes), []
    for stage in pipeline.stages:
        work = work_of(stage, sizes, machine.place)
        lines.append(Line(stage, standings[stage.name], work, seconds(work, machine)))
    return machine, lines


def span(value: float) -> str:
    """Seconds as a person says them."""
    if value < 90:
        return f"{value:.0f} s"
    if value < 90 * 60:
        return f"{value / 60:.0f} min"
    return f"{value / 3600:,.1f} h" if value < 96 * 3600 else f"{value / 86400:,.1f} days"


def cells(line: Line, machine: Machine) -> tuple[str, ...]:
    """stage, command, status, needs, tokens, time, memory."""
    over = line.work.memory > machine.memory
    memory = f"{line.work.memory / GB:,.1f} GB{' !' if over else ''}" if line.work.memory else ""
    about = "~" if line.work.assumed else ""
    tokens = f"{about}{line.work.tokens:,.0f}" if line.work.tokens else ""
    return (
        line.stage.name, line.stage.run, str(line.standing), " ".join(line.stage.needs), tokens,
        "" if line.standing.status == DONE else span(line.seconds), memory,
    )  # fmt: skip


def totals(machine: Machine, lines: list[Line]) -> list[str]:
    """What the table comes to, and what does not fit."""
    left = [line for line in lines if line.standing.status != DONE]
    time_left = sum(line.seconds for line in left)
    out = [f"{len(left)} of {len(lines)} stages to do"]
    if left:
        peak = max(left, key=lambda line: line.work.memory)
        ranks = machine.place.ranks
        hours = f" ({ranks * time_left / 3600:,.0f} GPU hours)" if ranks > 1 else ""
        memory = f"{peak.work.memory / GB:,.1f} GB at most{' a rank' if ranks > 1 else ''}"
        out[0] += f": about {span(time_left)}{hours}, {memory}, in {peak.stage.name}"
    out.append(f"{machine.name}; a model, not a promise; ~ from data that is assumed or not written yet")
    over = [line.stage.name for line in left if line.work.memory > machine.memory]
    if over:
        out.append(
            f"! more than the {machine.memory / GB:,.0f} GB of a device: {', '.join(over)}; every rank holds the whole "
            "model that samples or scores"
        )
    return out


def show_plan(pipeline: Pipeline, standings: dict[str, Standing]) -> None:
    """The plan: a table on a terminal, tab-separated lines elsewhere, the totals below on stderr."""
    machine, lines = make_plan(pipeline, standings)
    print(f"{pipeline.title}: {len(pipeline.stages)} stages, to {pipeline.out}", file=sys.stderr, flush=True)
    head = ("stage", "command", "status", "needs", "tokens", "time", "memory")
    rows = [cells(line, machine) for line in lines]
    if sys.stdout.isatty():
        from rich import box
        from rich.console import Console
        from rich.table import Table

        table = Table(*head[:3], *head[4:], title=pipeline.title, box=box.SIMPLE, pad_edge=False)
        for row in rows:
            table.add_row(*row[:3], *row[4:], style="dim" if row[2] == DONE else None)
        Console().print(table)
    else:
        print("\n".join("\t".join(row) for row in [head, *rows]), flush=True)
    print("\n".join(totals(machine, lines)), file=sys.stderr, flush=True)
