"""hpsafety: a lean trainer with kernels of its own that makes a language model safe.

Importing this package imports nothing else: the names below load their module, and torch, at first use.
"""

import importlib

__version__ = "0.1.0"

_HOME = {
    "PromptGroup": "hpsafety.data.groups",
    "Batch": "hpsafety.data.groups",
    "pack": "hpsafety.data.groups",
    "load_model": "hpsafety.model.io",
    "save_model": "hpsafety.model.io",
    "generate": "hpsafety.rollout.generate",
}
__all__ = ["__version__", *_HOME]


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module 'hpsafety' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
