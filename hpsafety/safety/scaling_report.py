"""What the safety-data-scaling study measures of every variant (spec section 2, SFT-8), as plain JSON data.

Each measure has a value, n and a 95 % interval: by bootstrap over the prompts for scores, Wilson's for refusals. All
variants answer the same prompts, so a change against the base variant is a paired difference.
"""

import csv
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np

from hpsafety.errors import InputError
from hpsafety.files import atomic_write
from hpsafety.safety.eval_answers import SETS
from hpsafety.safety.intervals import bootstrap, wilson
from hpsafety.safety.judges import judge_refusal

PERCENTILES = (1, 5, 10)
JUDGED = (("safety", "adversarial"), ("helpful", "helpful"), ("helpful", "borderline"))  # reward model, set
CSV_FIELDS = ("fraction", "measure", "set", "judge", "value", "n", "low", "high")
SAMPLES_PER_SET = 2
TRENDS = ("safety_score", "refused_adversarial", "helpful_score", "refused_borderline")  # rank correlations


def set_of(row: dict) -> str:
    """The held-out set a prompt belongs to: one of eval_answers.SETS."""
    return "adversarial" if row.get("is_safety") else "borderline" if row.get("is_borderline") else "helpful"


def choose_prompts(rows: Sequence[dict], most: int | None) -> list[dict]:
    """Prompt records of the three sets, one set after the other, the first `most` of each (None: all).

    Raises InputError without an adversarial or without a helpful prompt: the study would have one side only.
    """
    sets = {name: [row for row in rows if set_of(row) == name][:most] for name in SETS}
    for name, tag in (("adversarial", "is_safety: true"), ("helpful", "neither is_safety nor is_borderline")):
        if not sets[name]:
            raise InputError(
                f"no held-out {name} prompt ({tag}); give --eval, or rows of --data with split valid or test_…"
            )
    return [
        {name: value for name, value in row.items() if name not in ("response", "split")}
        for part in sets.values()
        for row in part
    ]


def by_set(prompts: Sequence[dict], values: Sequence) -> dict[str, list]:
    """The values of all prompts, set by set."""
    out: dict[str, list] = {name: [] for name in SETS}
    for row, value in zip(prompts, values, strict=True):
        out[set_of(row)].append(value)
    return out


def summarise(
    prompts: Sequence[dict], answers: list[list[str]], scores: Sequence[dict], runs: list[dict], seed: int
) -> dict:
    """The study's data: `sets`, `variants` (each of `runs` with its measures and scores), `trend`, `samples`.

    prompts  (P,) prompt records
    answers  (P, V) an answer per prompt and variant
    scores   (P,) score records, whose lists hold a number per variant
    runs     (V,) dicts with `fraction`; the smallest fraction is the base of the changes
    """
    verdicts = [
        [judge_refusal(row["prompt"], text) for text in texts]
        for row, texts in zip(prompts, answers, strict=True)
    ]
    base = min(range(len(runs)), key=lambda v: runs[v]["fraction"])
    columns = [
        {judge: by_set(prompts, [row[judge][v] for row in scores]) for judge in ("safety", "helpful")}
        for v in range(len(runs))
    ]
    variants = [
        run | {
            "measures": measures(columns[v], by_set(prompts, [row[v] for row in verdicts]), columns[base], seed),
            "scores": {part: {judge: columns[v][judge][part] for judge in columns[v]} for part in SETS},
        }
        for v, run in enumerate(runs)
    ]  # fmt: skip
    fractions = [run["fraction"] for run in runs]
    trend = {name: spearman(fractions, [v["measures"][name]["value"] for v in variants]) for name in TRENDS}
    return {
        "sets": {name: len(part) for name, part in by_set(prompts, prompts).items()},
        "base_fraction": runs[base]["fraction"], "trend": trend, "variants": variants,
        "samples": pick_samples(prompts, answers, verdicts),
    }  # fmt: skip


def measures(scores: dict, verdicts: dict[str, list[str]], base: dict, seed: int) -> dict[str, dict]:
    """name -> set, judge, value, n, low, high of one variant; value is None where there is nothing to measure.

    scores, base  judge -> set -> R in (0, 1) per prompt, of this variant and of the one it is compared with
    """
    out = {}
    for judge, part in JUDGED:
        name = f"{judge}_score" if (judge, part) != ("helpful", "borderline") else "helpful_score_borderline"
        out[name] = _plain(part, f"{judge}_rm", bootstrap(scores[judge][part], _mean, seed))
    for percent in PERCENTILES:
        found = bootstrap(
            scores["safety"]["adversarial"], lambda x, p=percent: np.percentile(x, p, axis=-1), seed
        )
        out[f"safety_p{percent}"] = _plain("adversarial", "safety_rm", found)
    change = np.subtract(scores["helpful"]["helpful"], base["helpful"]["helpful"])
    out["helpful_change"] = _plain("helpful", "helpful_rm", bootstrap(change, _mean, seed))
    for part, found in verdicts.items():
        rate = wilson(found.count("refusal"), len(found))
        out[f"refused_{part}"] = _plain(part, "judge_refusal", rate) | {"n": rate.total}
    return out


def _mean(samples: np.ndarray) -> np.ndarray:
    return samples.mean(axis=-1)


def _plain(part: str, judge: str, estimate) -> dict:
    numbers = {k: v for k, v in asdict(estimate).items() if k in ("value", "n", "low", "high")}
    numbers = {k: None if isinstance(v, float) and math.isnan(v) else v for k, v in numbers.items()}
    return {"set": part, "judge": judge, **numbers}


def spearman(x: Sequence[float], y: Sequence[float | None]) -> float | None:
    """Spearman's rank correlation, equals sharing their mean rank; None where one side does not vary."""
    if len(x) < 2 or None in y or len(set(x)) == 1 or len(set(y)) == 1:
        return None
    return float(np.corrcoef(_ranks(x), _ranks(y))[0, 1])


def _ranks(values: Sequence[float]) -> np.ndarray:
    values = np.asarray(values, dtype=np.float64)
    below = (values[None] < values[:, None]).sum(1)
    equal = (values[None] == values[:, None]).sum(1)
    return below + (equal + 1) / 2


def pick_samples(prompts: Sequence[dict], answers: list[list[str]], verdicts: list[list[str]]) -> list[dict]:
    """Prompts with every variant's answer: of each set, those whose verdict changes first, in file order."""
    samples = []
    for name in SETS:
        mine = [i for i, row in enumerate(prompts) if set_of(row) == name]
        mine.sort(key=lambda i: len(set(verdicts[i])) == 1)
        for i in mine[:SAMPLES_PER_SET]:
            sides = [{"verdict": v, "text": t} for v, t in zip(verdicts[i], answers[i], strict=True)]
            samples.append({"set": name, "prompt": prompts[i]["prompt"], "answers": sides})
    return samples


def write_csv(result: dict, path: Path) -> None:
    """One row per variant and measure, the numbers as in the JSON; empty where there is none."""
    with atomic_write(path) as handle:
        table = csv.writer(handle, lineterminator="\n")
        table.writerow(CSV_FIELDS)
        for variant in result["variants"]:
            for name, found in variant["measures"].items():
                table.writerow([variant["fraction"], name, *(found[field] for field in CSV_FIELDS[2:])])
