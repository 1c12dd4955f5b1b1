"""Every number of a run with what it rests on: n, interval, judge and manifest. report.csv, comparisons and the card's
results are made of these."""

from dataclasses import dataclass

from hpsafety.report.collect import Run, Stage, number
from hpsafety.report.text import line, said
from hpsafety.safety.eval_page import HEADLINES
from hpsafety.safety.judges import judge_refusal

COLUMNS = ("metric", "stage", "value", "n", "low", "high", "judge", "manifest")
SAMPLE_COLUMNS = ("id", "set", "category", "attack", "prompt", "model", "verdict", "safety_score", "helpful_score",
                  "answer", "manifest")  # fmt: skip
REFUSALS = "judge_refusal (rules on the text)"


@dataclass(frozen=True)
class Number:
    """stage: the stage whose model, or data, it describes; n, low and high are None where there are none."""

    metric: str
    stage: str
    value: float
    n: int | None
    low: float | None
    high: float | None
    judge: str
    hash: str

    def row(self) -> tuple:
        return (self.metric, self.stage, self.value, self.n, self.low, self.high, self.judge, self.hash)


def numbers(run: Run) -> list[Number]:
    """All numbers of the run, evaluations first, then in the order of the stages."""
    out = [
        Number(
            key, found.model, m["value"], m["n"], m["low"], m["high"], m["judge"], found.stage.hash or "none"
        )
        for found in run.evaluated
        for key, m in found.metrics.items()
        if m["value"] is not None
    ]
    for stage in run.of("reward"):
        out += _plain(stage, "held_out_accuracy", held_out(stage), "held-out pairs")
    for stage in run.of("redteam"):
        red = stage.result
        out += _plain(stage, "redteam/violation", measure(red.get("violations")), None)
        out += _plain(stage, "redteam/rejection", measure(red.get("rejection")), None)
        for name in ("gamma_auto", "gamma"):
            found = red.get(name)
            label = found.get("label") if isinstance(found, dict) else None
            out += _plain(stage, f"redteam/{name}", measure(found), label)
    for stage in run.of("audit"):
        out += _audit(stage)
    for stage in run.of("ppo"):
        rows = [row for row in stage.metrics if number(row.get("reward")) is not None]
        for name in ("reward", "reward_safety", "reward_helpful", "kl", "length"):
            last = number(rows[-1].get(name)) if rows else None
            judge = "the reward models that are optimised" if name.startswith("reward") else "the run itself"
            out += _plain(stage, f"ppo/{name}, last iteration", {"value": last}, judge)
    for stage in run.stages:
        losses = [x for x in (number(row.get("loss")) for row in stage.metrics) if x is not None]
        if losses:
            out += _plain(stage, "loss, last step", {"value": losses[-1]}, "the run itself")
    return out


def measure(found) -> dict:
    """value, n, low, high of an entry of a stage's file, None where it is not a number."""
    found = found if isinstance(found, dict) else {}
    out = {name: number(found.get(name)) for name in ("value", "low", "high", "n", "count")}
    if out["n"] is None:
        out["n"] = number(found.get("total"))
    out["n"], out["count"] = (None if out[key] is None else int(out[key]) for key in ("n", "count"))
    if None in (out["low"], out["high"]):
        out["low"] = out["high"] = None
    return out | {"judge": line(found["judge"]) if isinstance(found.get("judge"), str) else None}


def held_out(stage: Stage) -> dict:
    """A reward model's accuracy on held-out pairs."""
    found = stage.result.get("held_out")
    found = found.get("accuracy") if isinstance(found, dict) else None
    return measure(found.get("all") if isinstance(found, dict) else None)


def _plain(stage: Stage, metric: str, found: dict, judge: str | None) -> list[Number]:
    if found.get("value") is None or not stage.hash:
        return []
    said_by = found.get("judge") or line(judge or "not named")
    return [
        Number(metric, stage.name, found["value"], found.get("n"), found.get("low"), found.get("high"), said_by,
               stage.hash)
    ]  # fmt: skip


def _audit(stage: Stage) -> list[Number]:
    def at(*keys):
        found = stage.result
        for key in keys:
            found = found.get(key) if isinstance(found, dict) else None
        return found

    toxic = at("toxicity", "share")
    toxic = measure(toxic | {"n": toxic.get("of")} if isinstance(toxic, dict) else None)
    out = _plain(stage, "audit/documents", {"value": number(at("corpus", "counts", "documents"))}, "count")
    english = {"value": number(at("corpus", "counts", "english_documents"))}
    out += _plain(stage, "audit/english documents", english, str(at("tools", "language")))
    return out + _plain(stage, "audit/toxic documents", toxic, str(at("toxicity", "judge")))


def sample_rows(run: Run):
    """One row of SAMPLE_COLUMNS per answer."""
    for found in run.evaluated:
        for item in found.items:
            yield (
                item.id, item.part, item.category, item.attack, said(item.prompt), found.model,
                verdict(item), item.scores.get("safety"), item.scores.get("helpful"), item.text, found.stage.hash,
            )  # fmt: skip


def verdict(item) -> str:
    """What judge_refusal says of an answer; 'not judged' where the prompt is none."""
    try:
        return judge_refusal(item.prompt, item.text)
    except (TypeError, KeyError, IndexError, AttributeError, ValueError):
        return "not judged"


def headline(metrics: dict) -> list[str]:
    """The keys of HEADLINES that were measured, in its order."""
    return [key for key in HEADLINES if metrics.get(key, {}).get("value") is not None]
