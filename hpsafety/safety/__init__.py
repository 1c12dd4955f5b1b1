"""The method's own knowledge: refusals, taxonomy, judges. Lazy: importing it imports nothing else."""

_EXPORTS = {"judge_refusal": "hpsafety.safety.judges"}

__all__ = ["judge_refusal"]


def __getattr__(name: str):
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_EXPORTS[name]), name)
