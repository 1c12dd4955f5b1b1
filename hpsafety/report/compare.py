"""Two runs side by side: each measure's difference, paired where both asked the same prompts, and said to be so."""

import math
from dataclasses import dataclass

from hpsafety.report.collect import Evaluated, Run
from hpsafety.report.rows import Number, numbers, verdict
from hpsafety.safety.eval_page import HEADLINES
from hpsafety.safety.paired import change

SEED = 0  # of the bootstrap
CLASSES = {  # key of eval.json -> set, class of judge_refusal
    "refused/adversarial": ("adversarial", "refusal"), "false_refusal/borderline": ("borderline", "refusal"),
    "false_refusal/helpful": ("helpful", "refusal"),
    **{f"inability/{part}": (part, "inability") for part in ("adversarial", "borderline", "helpful")},
}  # fmt: skip
SCORED = {
    "safety_score/adversarial": ("adversarial", "safety", "safety_rm"),
    "helpful_score/helpful": ("helpful", "helpful", "helpful_rm"),
    "helpful_score/borderline": ("borderline", "helpful", "helpful_rm"),
}


@dataclass(frozen=True)
class Difference:
    """B minus A. how: 'paired', 'unpaired', or why there is none (value None)."""

    value: float | None
    low: float | None
    high: float | None
    n: int | None
    how: str


@dataclass(frozen=True)
class Line:
    metric: str
    stage: str
    a: Number | None
    b: Number | None
    difference: Difference


def compare(a: Run, b: Run) -> list[Line]:
    """The headline measures of every model that both runs have, by the name of its stage, and the last models' as
    'last model' where the names differ."""
    sides = [{(n.metric, n.stage): n for n in numbers(run)} for run in (a, b)]
    models = [{found.model: found for found in run.evaluated} for run in (a, b)]
    pairs = [(name, name, name) for name in models[0] if name in models[1]]
    if a.evaluated and b.evaluated and a.evaluated[-1].model != b.evaluated[-1].model:
        pairs.append(("last model", a.evaluated[-1].model, b.evaluated[-1].model))
    out = []
    for title, mine, theirs in pairs:
        for metric in HEADLINES:
            x, y = sides[0].get((metric, mine)), sides[1].get((metric, theirs))
            if x or y:
                found = difference(metric, x, y, models[0][mine], models[1][theirs])
                out.append(Line(metric, title, x, y, found))
    known = {
        (metric, name) for side, of in zip(sides, models, strict=True) for metric, name in side if name in of
    }
    for key in sorted((sides[0].keys() | sides[1].keys()) - known):
        x, y = (side.get(key) for side in sides)
        out.append(Line(*key, x, y, unpaired(x, y) if x and y else _none("measured in one run only")))
    return out


def difference(
    metric: str, a: Number | None, b: Number | None, mine: Evaluated, theirs: Evaluated
) -> Difference:
    """Paired where the answers to the same prompts are there and the judge is the same; else from the intervals."""
    if not a or not b:
        return _none("measured in one run only")
    if metric in SCORED or metric.startswith("violation"):
        role = SCORED[metric][2] if metric in SCORED else "safety_rm"
        same = _judge_files(mine, role) == _judge_files(theirs, role)
        if not same:
            return _none("not comparable: other reward models")
    elif a.judge != b.judge:
        return _none("not comparable: other judges")
    columns = [_column(metric, found) for found in (mine, theirs)]
    if columns[0] and columns[0].keys() == columns[1].keys():
        found = change(*columns, SEED)
        return Difference(found.value, found.low, found.high, found.n, "paired")
    return unpaired(a, b)


def _judge_files(found: Evaluated, role: str) -> dict:
    hashes = found.stage.manifest.get("input_hashes")
    hashes = hashes if isinstance(hashes, dict) else {}
    return {k: v for k, v in hashes.items() if k == role or k.startswith(f"{role}/")}


def _column(metric: str, found: Evaluated) -> dict:
    """(id, prompt) -> value of the answers that a measure is made of; {} where it is not made of stored answers."""
    if metric in CLASSES:
        part, wanted = CLASSES[metric]
        return {(i.id, str(i.prompt)): float(verdict(i) == wanted) for i in found.items if i.part == part}
    if metric in SCORED:
        part, kind, _ = SCORED[metric]
        return {
            (i.id, str(i.prompt)): i.scores[kind] for i in found.items if i.part == part and kind in i.scores
        }
    return {}


def unpaired(a: Number, b: Number) -> Difference:
    """b - a with an interval from both intervals as if the samples were independent (Zou and Donner 2008; for Wilson's
    intervals Newcombe's method of 1998)."""
    value = b.value - a.value
    if None in (a.low, a.high, b.low, b.high):
        return Difference(value, None, None, None, "unpaired, no interval")
    low = value - math.hypot(b.value - b.low, a.high - a.value)
    high = value + math.hypot(b.high - b.value, a.value - a.low)
    return Difference(value, low, high, None, "unpaired")


def _none(why: str) -> Difference:
    return Difference(None, None, None, None, why)
