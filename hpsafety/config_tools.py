"""What profile, bench and plan can be told; hpsafety.config hands them out with the others."""

import dataclasses
import math
from typing import Literal

from hpsafety.config import option, require, require_at_least, require_device, require_seed


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ProfileConfig:
    """What `hpsafety profile <stage>` takes beside the stage's own flags."""

    profile_steps: int = option("optimiser steps to record", 3)
    profile_warmup: int = option("steps before them that are not recorded", 1)

    def __post_init__(self):
        require_at_least(self, 1, "profile_steps")
        require_at_least(self, 0, "profile_warmup")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class BenchConfig:
    """Microbenchmarks of the ops, each against its peers and against what the machine can do."""

    ops: tuple[str, ...] = option("ops by name, or all (first shape of each, 4 minutes)", positional="OP")
    shape: tuple[str, ...] = option(
        "shapes as NAME=NUMBER,... (N=64,D=576); sizes left out as by default", ()
    )
    dtype: str = option("float32, bfloat16, or both with a comma", "float32")
    impl: str | None = option(
        "contenders with commas: backends, reference, peers; all but the slow ones if absent", None
    )
    direction: str | None = option("forward, both (with backward), or both words with a comma", None)
    device: str = option("auto, cpu, cuda or cuda:N", "auto")
    threads: int | None = option("CPU threads; torch's own number if absent", None)
    seconds: float | None = option("seconds of timed calls per contender; 2 if absent, less for all", None)
    cache: Literal["auto", "cold", "warm"] = option(
        "state of the caches before a call; auto: warm for cases that move less than 4 MiB", "auto"
    )
    memory: bool = option(
        "also each contender's peak memory beyond its inputs, in a process of its own", False
    )
    seed: int = option("seed of the inputs", 0)
    json: str | None = option("file for machine, limits, rows and all samples", None)
    plot: str | None = option("file for the roofline picture, .png or .svg", None)

    @property
    def dtypes(self) -> tuple[str, ...]:
        return words(self.dtype)

    @property
    def impls(self) -> tuple[str, ...] | None:
        return None if self.impl is None else words(self.impl)

    @property
    def directions(self) -> tuple[str, ...]:
        return () if self.direction is None else words(self.direction)

    def __post_init__(self):
        require(
            self, "dtype", {*self.dtypes} <= {"float32", "bfloat16"} and self.dtypes, "float32 or bfloat16"
        )
        require(self, "impl", self.impls != (), "one name or more")
        known = {*self.directions} <= {"forward", "both"} and (self.direction is None or self.directions)
        require(self, "direction", known, "forward, both or forward,both")
        require_device(self)
        require_seed(self)
        require_at_least(self, 1, "threads")
        bounded = self.seconds is None or 0 < self.seconds < math.inf
        require(self, "seconds", bounded, "a number greater than 0")
        require(self, "cache", self.cache in ("auto", "cold", "warm"), "auto, cold or warm")
        require(self, "json", self.json != "", "a file")
        pictures = self.plot is None or self.plot.endswith((".png", ".svg"))
        require(self, "plot", pictures, "a file that ends in .png or .svg")


def words(text: str) -> tuple[str, ...]:
    """'a, b' as ('a', 'b'), each once."""
    return tuple(dict.fromkeys(word.strip() for word in text.split(",") if word.strip()))


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class BenchCompareConfig:
    """Two result files of hpsafety bench --json against each other."""

    old: str = option("result file to compare with", positional="OLD")
    new: str = option("result file in question", positional="NEW")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class PlanConfig:
    """What hardware will do, on paper, before it is bought."""

    kernels: bool = option(
        "time of each GPU kernel on an A100 and an H100, by a model of the compiled code", False
    )
    op: tuple[str, ...] = option("ops to show; all if absent", ())
    size: tuple[str, ...] = option("Llama sizes whose shapes to show: 7B, 13B, 70B or 1B", ("7B",))
    json: str | None = option("file for the assumptions and all predictions, of all sizes and ops", None)

    def __post_init__(self):
        known = ("7B", "13B", "70B", "1B")
        require(self, "size", {*self.size} <= {*known} and bool(self.size), "of 7B, 13B, 70B, 1B")
        require(self, "json", self.json != "", "a file")
