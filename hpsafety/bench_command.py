"""`hpsafety bench` and `hpsafety bench compare`: the package's only door to bench/.

That folder comes with the source checkout and not with the installed package. Nobody imports it (tests/test_layers.py);
this file loads its modules by name from the folder beside the package.
"""

import importlib
import os
import sys
from pathlib import Path
from types import ModuleType

from hpsafety.errors import InputError

ROOT = Path(__file__).resolve().parent.parent


def load(name: str, folder: str = "harness") -> ModuleType:
    """The module bench.<folder>.<name> of this checkout. InputError where there is none."""
    if not (ROOT / "bench" / folder).is_dir():
        raise InputError(
            "benchmarks come with the source checkout, not with the installed package: run it there"
        )
    if str(ROOT) not in sys.path:
        sys.path.insert(0, str(ROOT))
    module = importlib.import_module(f"bench.{folder}.{name}")
    if not Path(module.__file__).resolve().is_relative_to(ROOT):
        raise InputError(f"another package named bench is in the way: {module.__file__}")
    return module


def run(cfg) -> None:
    """cfg: a BenchConfig. Exits 1 when a contender computed something wrong."""
    if cfg.threads is not None:  # numpy's BLAS reads it once, when it is loaded
        os.environ.update(dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"), str(cfg.threads)))
    if load("run").main(cfg):
        raise SystemExit(1)


def compare(cfg) -> None:
    """cfg: a BenchCompareConfig."""
    load("compare").main(cfg)
