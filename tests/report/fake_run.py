"""A run directory made by hand: a pipeline of six stages with evaluations of four models, as the commands write them.

HOSTILE stands in every place where text of others gets into a run.
"""

import hashlib
import json
import random
import struct

from hpsafety.safety.eval_metrics import Column, metrics

SCRIPT = "<script>window.HACKED=1;document.title='HACKED'</script><img src=x onerror=window.HACKED=1>"
ANSI, BIDI = "\x1b[31mred\x1b[0m\x1b]0;owned\x07", "abc\u202edcba\u2066x\u2069"
LONG = "long " * 200_000  # 1 MB
HOSTILE = f"=HYPERLINK(1) {SCRIPT} {ANSI} {BIDI} [click](https://evil.example) `tick` $\\frac{{ </title>"
SETS = ("adversarial", "borderline", "helpful")
# model -> share refused of each set, mean safety score
MODELS = {"original": (0.1, 0.0, 0.0, 0.3), "sft": (0.8, 0.6, 0.1, 0.6), "ppo": (0.9, 0.2, 0.05, 0.8)}
REFUSAL, ANSWER = "I can't help with that.", "Sure, here is how: start with a plan."


def write(path, content) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, list):
        path.write_text("".join(json.dumps(row) + "\n" for row in content), encoding="utf-8")
    else:
        path.write_text(json.dumps(content), encoding="utf-8")


def manifest(folder, stage: str, config: dict, outputs=(), minute: int = 0, **more) -> None:
    digests = {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in outputs}
    write(folder / "manifest.json", {
        "stage": stage, "config": {"device": "cpu"} | config, "seed": 0, "versions": {"torch": "2.13"},
        "input_hashes": {"train.jsonl": "ab" * 32}, "output_hashes": digests, "counts": {"rows": 12},
        "started": f"2026-01-01T00:{minute:02d}:00+00:00", "ended": f"2026-01-01T00:{minute + 3:02d}:00+00:00",
    } | more)  # fmt: skip


def weights(folder, count: int) -> None:
    """A safetensors file's header alone: what counting reads."""
    header = json.dumps({"w": {"dtype": "F32", "shape": [count, 10], "data_offsets": [0, 0]}}).encode()
    (folder / "model").mkdir(parents=True, exist_ok=True)
    (folder / "model" / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)


def prompts(n: int, hostile: str = "") -> list[dict]:
    rows = []
    for part in SETS:
        for i in range(n):
            risky = {
                "category": ("illicit", "hateful")[i % 2],
                "attack": ("logic", "semantic", "other")[i % 3],
            }
            text = f"{part} question {i} ({part[0]}{i}only) {hostile if i == 0 else ''}"
            row = {"id": f"{part}-{i}", "set": part, "prompt": text}
            rows.append(row | (risky if part == "adversarial" else {}))
    return rows


def evaluation(folder, model: str, shares, n: int, hostile: str = "", minute: int = 20) -> None:
    rng, asked = random.Random(model), prompts(n, hostile)
    columns, answers, scores = {}, [], []
    refused = {row["id"]: float(i % n < shares[SETS.index(row["set"])] * n) for i, row in enumerate(asked)}
    for row in asked:
        text = REFUSAL if refused[row["id"]] else ANSWER
        answers.append(row | {"responses": [f"{text} {hostile if row['id'].endswith('-0') else ''}"]})
        value = min(0.99, max(0.01, rng.gauss(shares[3], 0.1)))
        scores.append({"id": row["id"], "safety": [value], "helpful": [1 - value]})
    keys = ("refused/adversarial", "false_refusal/borderline", "false_refusal/helpful")
    for part, key in zip(SETS, keys, strict=True):
        own = {name: v for name, v in refused.items() if name.startswith(part)}
        columns[key] = Column("judge_refusal (rules on the text)", "rate", own)
    bad = {row["id"]: 1 - refused[row["id"]] for row in asked if row["set"] == "adversarial"}
    columns["violation"] = Column(f"rule {hostile}", "rate", bad)
    for facet in ("category", "attack"):
        for name in sorted({row[facet] for row in asked if facet in row}):
            some = {row["id"]: bad[row["id"]] for row in asked if row.get(facet) == name}
            columns[f"violation/{facet}/{name}"] = Column("rule", "rate", some)
    for kind, part in (("safety", "adversarial"), ("helpful", "helpful"), ("helpful", "borderline")):
        found = {s["id"]: s[kind][0] for s in scores if s["id"].startswith(part)}
        columns[f"{kind}_score/{part}"] = Column(f"{kind} RM", "mean", found)
    columns["toxigen"] = Column("none", why="give --toxigen")
    write(folder / "prompts.jsonl", asked)
    write(folder / "answers-model.jsonl", answers)
    write(folder / "scores.jsonl", scores)
    write(folder / "eval.json", metrics(columns, None, 0))
    path = "smollm2" if model == "original" else f"somewhere/{model}/model"
    manifest(folder, "eval", {"model": path, "base": None}, ["eval.json"], minute)


def redteam(folder, hostile: str = "") -> None:
    rate = {"value": 0.25, "n": 40, "low": 0.14, "high": 0.40, "count": 10, "judge": f"rule {hostile}"}
    gamma = {
        "value": 3.0,
        "attempts_per_hour": 12,
        "attempts": 40,
        "hours": 3.33,
        "label": f"automatic {hostile}",
    }
    rounds = [{"round": 1, "model": "m", "gamma_auto": 6.0, "violations": rate | {"value": 0.5}, "rejection": None},
              {"round": 2, "model": "m", "gamma_auto": 3.0, "violations": rate, "rejection": rate}]  # fmt: skip
    by = [{"vector": f"logic{hostile}", "category": "illicit", "n": 40, "violations": 10}]
    write(folder / "redteam.json", {"round": 2, "model": "m", "violations": rate, "gamma_auto": gamma, "gamma": None,
                                    "rejection": rate, "by": by, "rounds": rounds})  # fmt: skip
    manifest(folder, "redteam", {"model": "m"}, ["redteam.json"], 40)


def make_run(path, n: int = 12, hostile: str = "", shift: float = 0.0, size: int = 1000):
    """The run; `hostile` is planted everywhere, `shift` raises all shares of refused adversarial prompts."""
    rows = [{"step": i + 1, "loss": 3.0 - i / 10} for i in range(5)]
    write(path / "sft" / "metrics.jsonl", rows)
    manifest(path / "sft", "sft", {"model": f"base{hostile}", "note": hostile}, minute=1)
    accuracy = {"count": 40, "total": 48, "value": 40 / 48, "low": 0.7, "high": 0.91}
    write(
        path / "reward-safety" / "report.json",
        {"kind": "safety", "held_out": {"accuracy": {"all": accuracy}}},
    )
    manifest(path / "reward-safety", "reward", {"model": "base", "kind": "safety"}, ["report.json"], 5)
    ppo = [{"step": i, "iteration": i, "loss": 0.1, "reward": 0.5 + i / 10, "reward_safety": 0.6, "reward_helpful": 0.4,
            "kl": i / 100, "length": 30.0} for i in range(1, 5)]  # fmt: skip
    write(path / "ppo" / "metrics.jsonl", ppo)
    weights(path / "ppo", size)
    manifest(path / "ppo", "ppo", {"model": "somewhere/sft/model"}, minute=10)
    for place, (model, shares) in enumerate(MODELS.items()):
        moved = (min(1.0, shares[0] + shift), *shares[1:])
        evaluation(path / f"eval-{model}", model, moved, n, hostile, 20 + 5 * place)
    redteam(path / "redteam", hostile)
    names = ["sft", "reward-safety", "ppo", *(f"eval-{model}" for model in MODELS), "redteam"]
    stages = [{"name": name, "run": name.split("-")[0], "out": name, "status": "done", "seconds": 180.0, "needs": [],
               "substituted": None} for name in names]  # fmt: skip
    stages.append({"name": "distill", "run": "distill", "out": "distill", "status": "skipped", "seconds": 0.0,
                   "needs": [], "substituted": f"no larger model {hostile}"})  # fmt: skip
    write(path / "pipeline.json", {"title": f"a run {hostile}", "seed": 0, "config": f"[pipeline]\n# {hostile}\n",
                                   "started": "x", "ended": None, "machine": {"cpus": 2, "device": "cpu"},
                                   "stages": stages})  # fmt: skip
    return path
