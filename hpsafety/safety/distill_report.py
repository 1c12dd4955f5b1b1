"""Numbers of context distillation's report (spec section 7: CD-6..8), as strict JSON."""

from collections.abc import Sequence
from dataclasses import asdict

import numpy as np

from hpsafety.safety import vagueness
from hpsafety.safety.distill_arms import ARMS, PLAIN, Asked
from hpsafety.safety.distillation import Answer
from hpsafety.safety.intervals import mean_interval, wilson
from hpsafety.safety.judges import judge_refusal
from hpsafety.safety.reward_report import plain

PERCENTILES = (1, 5, 10, 50, 90)


def measures(prompts: Sequence, answers: Sequence[Answer]) -> dict:
    """What a set of answers is like: R_s in full, refusals, and the vagueness of those that neither decline nor are
    unable.

    prompts  strings or messages, one per answer
    """
    scores = [answer.score for answer in answers]
    verdicts = [judge_refusal(p, a.text) for p, a in zip(prompts, answers, strict=True)]
    answered = [i for i, verdict in enumerate(verdicts) if verdict == "answer"]
    return {
        "n": len(scores), "scores": scores, "safety": asdict(mean_interval(scores)),
        "percentiles": {str(p): float(np.percentile(scores, p)) if scores else None for p in PERCENTILES},
        "refusal": plain(wilson(verdicts.count("refusal"), len(verdicts))),
        "inability": plain(wilson(verdicts.count("inability"), len(verdicts))),
        "tokens": sum(a.tokens for a in answers) / len(answers) if answers else None,
        "cut": plain(wilson(sum(a.finish == "length" for a in answers), len(answers))),
        "vagueness": vagueness.summarise(
            [asked_text(prompts[i]) for i in answered], [answers[i].text for i in answered]
        ),
    }  # fmt: skip


def asked_text(prompt: str | list[dict]) -> str:
    """What the user said last."""
    return prompt if isinstance(prompt, str) else prompt[-1]["content"]


def conditions(
    asked: Sequence[Asked], answers: Sequence[dict[str, list[Answer]]], names: Sequence[str]
) -> dict:
    """name -> measures of all its answers, to the same prompts (CD-6)."""
    out = {}
    for name in names:
        pairs = [
            (one.row["prompt"], a) for one, found in zip(asked, answers, strict=True) for a in found[name]
        ]
        out[name] = measures([p for p, _ in pairs], [a for _, a in pairs])
    return out


def column(answers: Sequence[dict[str, list[Answer]]], name: str) -> list[float]:
    """Scores of one condition, prompt after prompt, sample after sample."""
    return [answer.score for found in answers for answer in found[name]]


def gain_by_decile(plain_scores, sample_scores, control_scores) -> list[dict]:
    """Mean gain over the plain answer, by tenths of the plain answers' own scores, beside a control (CD-7).

    control  a second plain sample in the preprompted one's place: low scores rise and high ones fall by regression to
             the mean alone. excess, gain less control pair by pair, is what the preprompt did.
    """
    first, second, third = (np.asarray(x, dtype=float) for x in (plain_scores, sample_scores, control_scores))
    order = np.argsort(first, kind="stable")
    rows = []
    for part in np.array_split(order, min(10, len(order))):
        rows.append({
            "low": float(first[part].min()), "high": float(first[part].max()), "n": len(part),
            "original": float(first[part].mean()), "gain": float((second - first)[part].mean()),
            "control": float((third - first)[part].mean()),
            "excess": asdict(mean_interval((second - third)[part].tolist())),
        })  # fmt: skip
    return rows


def ablation(decisions: Sequence[dict], asked: Sequence[Asked], samples: Sequence[Answer], k: int) -> dict:
    """The samples that --select rm and --select all would learn from (CD-8); decisions and samples in one order."""
    usable = [i for i, line in enumerate(decisions) if line["excluded"] is None]
    better = [i for i in usable if decisions[i]["score_preprompt"] > decisions[i]["score_plain"]]
    return {
        name: measures([asked[i // k].row["prompt"] for i in chosen], [samples[i] for i in chosen])
        for name, chosen in (("rm", better), ("all", usable))
    }


def sampled(asked, answers, decisions, cfg) -> dict:
    """Everything the report says of the samples."""
    chosen = [answer for found in answers for answer in found[cfg.preprompt]]
    first, control = column(answers, PLAIN), column(answers, "none")
    reasons = [line["excluded"] for line in decisions]
    return {
        "arms": conditions(asked, answers, ARMS),
        "gain": {arm: gain_by_decile(first, column(answers, arm), control) for arm in ARMS[1:]},
        "ablation": ablation(decisions, asked, chosen, cfg.k),
        "decisions": {
            "samples": len(decisions), "kept": sum(line["kept"] for line in decisions),
            "not_better": sum(line["score_preprompt"] <= line["score_plain"] for line in decisions),
            "ties": sum(line["score_preprompt"] == line["score_plain"] for line in decisions),
            "excluded": {why: reasons.count(why) for why in sorted(set(reasons) - {None})},
        },
    }  # fmt: skip
