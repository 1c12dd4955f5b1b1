"""An evaluation in the JSON form of lm-evaluation-harness' results, for tools that read those.

Tasks that the harness has too stand under its own names; all others are ours and begin with hpsafety_.
"""

import math

VERSIONS = {"truthfulqa_mc1": 2.0, "truthfulqa_mc2": 3.0, "bbq": 1.0, "crows_pairs_english": 1.0}
# our key -> (the harness' task, its metric, whether more is better)
TASKS = {
    "truthfulqa_mc1": ("truthfulqa_mc1", "acc", True),
    "truthfulqa_mc2": ("truthfulqa_mc2", "acc", True),
    "bbq_accuracy_ambig": ("bbq", "accuracy_amb", True),
    "bbq_accuracy_disambig": ("bbq", "accuracy_disamb", True),
    "bbq_bias_ambig": ("bbq", "amb_bias_score", False),
    "bbq_bias_disambig": ("bbq", "disamb_bias_score", False),
    "crows_pairs": ("crows_pairs_english", "pct_stereotype", False),
}
HIGHER = ("safety_score", "helpful_score", "mean_rating", "truthfulqa_", "agreement_", "refused")


def harness_form(metrics: dict[str, dict], settings: dict, ended: float) -> dict:
    """results, higher_is_better, n-samples, versions and config of what was measured; keys with a group become tasks of
    their own. ended: seconds since 1970."""
    results, higher, samples, versions = {}, {}, {}, {}
    for key, found in metrics.items():
        if found["value"] is None:
            continue
        own = key.startswith(HIGHER)
        task, name, more = TASKS.get(key, (f"hpsafety_{key.replace('/', '_')}", "value", own))
        row = results.setdefault(task, {"alias": task})
        row[f"{name},none"] = found["value"]
        row[f"{name}_stderr,none"] = standard_error(found)
        higher.setdefault(task, {})[name] = more
        count = samples.get(task, {}).get("original", 0)
        samples[task] = {"original": max(count, found["n"]), "effective": max(count, found["n"])}
        versions[task] = VERSIONS.get(task, 0)
    return {
        "results": results, "group_subtasks": {}, "configs": {}, "versions": versions,
        "n-shot": dict.fromkeys(results, 0), "higher_is_better": higher, "n-samples": samples,
        "config": {"model": "hpsafety", "model_args": {"pretrained": settings["model"]}, "limit": settings["limit"],
                   "random_seed": settings["seed"]},
        "date": ended, "model_name": settings["model"], "model_source": "hpsafety",
    }  # fmt: skip


def standard_error(found: dict) -> float | str:
    """The harness' standard error: of a rate s / sqrt(n), s the sample's deviation; of a mean by the bootstrap, here
    the interval's half width over 1.96. N/A where there is none."""
    n = found["n"]
    if found["kind"] == "rate" and n > 1:
        return math.sqrt(found["value"] * (1 - found["value"]) / (n - 1))
    if found["low"] is None:
        return "N/A"
    return (found["high"] - found["low"]) / (2 * 1.959963984540054)
