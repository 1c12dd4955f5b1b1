"""Metrics of an evaluation: a number per item becomes a value with n, interval and judge, beside the base's.

A `Column` holds one measure of one model, item by item, so that two checkpoints are compared on the items both have.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Literal

from hpsafety.safety.intervals import bootstrap, wilson
from hpsafety.safety.paired import change

FEW = 30  # items below which a group's figure is marked (EVAL-8)
NUMBERS = ("value", "n", "low", "high")


@dataclass(frozen=True)
class Column:
    """values  item -> 0 or 1 (a rate: Wilson's interval) or any number (a mean: by bootstrap over the items)
    judge    who or what says so
    why      where there are no values, why, and how to get them
    """

    judge: str
    kind: Literal["rate", "mean"] = "rate"
    values: Mapping[str, float] = field(default_factory=dict)
    why: str | None = None


def missing(judge: str, why: str) -> Column:
    """A measure that was not taken; it is reported as such, never as 0."""
    return Column(judge, why=why)


def estimate(column: Column, seed: int) -> dict:
    """value, n, low, high (None where there is nothing) and, of a rate, count."""
    values = list(column.values.values())
    if column.kind == "rate":
        rate = wilson(round(sum(values)), len(values))
        found = {"value": rate.value, "n": rate.total, "low": rate.low, "high": rate.high}
        return _plain(found) | ({"count": rate.count} if rate.total else {})
    found = asdict(bootstrap(values, lambda x: x.mean(axis=-1), seed))
    return _plain({name: found[name] for name in NUMBERS})


def _plain(found: dict) -> dict:
    return {k: None if isinstance(v, float) and math.isnan(v) else v for k, v in found.items()}


def metric(column: Column, base: Column | None, seed: int) -> dict:
    """One entry of eval.json: value, n, low, high, judge; kind; with a base its figures and the paired change."""
    out = estimate(column, seed) | {"judge": column.judge, "kind": column.kind}
    if not column.values:
        out["why"] = column.why or "no item"
    elif len(column.values) < FEW:
        out["few"] = True
    if base is not None:
        out["base"] = estimate(base, seed) | ({} if base.judge == column.judge else {"judge": base.judge})
        out["change"] = _plain(asdict(change(base.values, column.values, seed)))
    return out


def metrics(columns: dict[str, Column], base: dict[str, Column] | None, seed: int) -> dict[str, dict]:
    """key -> entry, in the columns' order."""
    return {
        key: metric(column, None if base is None else base.get(key, Column(column.judge)), seed)
        for key, column in columns.items()
    }


def by_group(key: str, column: Column, group_of: Callable[[str], str | None]) -> dict[str, Column]:
    """`key` itself and key/GROUP for every group, sorted; items without one (None) count in `key` alone."""
    parts: dict[str, dict[str, float]] = {}
    for item, value in column.values.items():
        name = group_of(item)
        if name is not None:
            parts.setdefault(name, {})[item] = value
    groups = {f"{key}/{n}": Column(column.judge, column.kind, parts[n]) for n in sorted(parts)}
    return {key: column} | groups
