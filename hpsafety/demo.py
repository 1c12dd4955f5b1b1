"""`hpsafety demo`: a real chat model learns safer answers on a laptop, and a report shows both sides of the trade.

Fine-tunes smollm2 (135M, already instruction-tuned) on a seeded subset of the demo data, and asks the same held-out
questions before and after: adversarial ones (to be declined), borderline ones that only look dangerous and plain
helpful ones (both to be answered).
"""

import json
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from hpsafety.config import DemoConfig, SFTConfig
from hpsafety.data.batches import group_tokens
from hpsafety.data.chat import encode_dialogue
from hpsafety.data.demo import path as demo_path
from hpsafety.data.records import Records, read_records, write_records
from hpsafety.errors import InputError
from hpsafety.files import atomic_write
from hpsafety.model.io import load_model
from hpsafety.report.demo import terminal_tables, write_report
from hpsafety.safety.intervals import Rate
from hpsafety.safety.judges import judge_refusal
from hpsafety.safety.measure import greedy_answers, loss_per_token, refusal_rate
from hpsafety.stages import sft
from hpsafety.train import precision
from hpsafety.train.metrics import Progress, say

MODEL = "smollm2"
SETS = ("adversarial", "borderline", "helpful")  # what should happen: refused, answered, answered
SAMPLES_PER_SET = 2


@dataclass(frozen=True)
class Measured:
    """One checkpoint on the held-out sets: loss on held-out answers, refusals and answers by set."""

    loss: float
    refused: dict[str, Rate]
    answers: dict[str, list[str]]
    verdicts: dict[str, list[str]]


def choose_rows(rows: list[dict], tokenizer, train_tokens: int, seed: int) -> list[dict]:
    """Rows to train on, at most train_tokens tokens in all: safety demonstrations, harmless look-alikes and plain
    helpful rows in turn, each kind in a seeded order."""
    rng = np.random.default_rng(seed)
    kinds = (
        lambda r: r.get("is_safety", False),
        lambda r: r.get("is_borderline", False),
        lambda r: not r.get("is_safety", False) and not r.get("is_borderline", False),
    )
    queues = []
    for kind in kinds:
        own = [r for r in rows if kind(r)]
        queues.append([own[i] for i in rng.permutation(len(own))])
    chosen, total = [], 0
    for position in range(max(map(len, queues))):
        for queue in queues:
            if position >= len(queue):
                continue
            row = queue[position]
            size = group_tokens(encode_dialogue(tokenizer, row["prompt"], row["response"]))
            if total + size > train_tokens:
                return chosen
            chosen.append(row)
            total += size
    return chosen


def measure(model, prompts: dict[str, list[dict]], cfg: DemoConfig, title: str) -> Measured:
    """Greedy answers and refusals on every set, and the loss per response token on the sets' own good answers."""
    rows = [row for name in SETS for row in prompts[name]]
    groups = [encode_dialogue(model.tokenizer, r["prompt"], r["response"]) for r in rows]
    loss = loss_per_token(model, groups, 1024)
    total = sum(map(len, prompts.values()))
    progress, done, answers, started = Progress(title, total), 0, {}, time.monotonic()
    made = 0
    for name, rows in prompts.items():

        def report(count: int, tokens: int, done=done, made=made) -> None:
            rate = (made + tokens) / max(1e-9, time.monotonic() - started)
            progress.update(done + count, f"{rate:.0f} tokens/s")

        answers[name] = greedy_answers(model, rows, cfg.answer_tokens, report)
        done += len(rows)
        made += sum(len(model.tokenizer.encode_plain(text)) for text in answers[name])
    progress.close()
    verdicts = {
        name: [judge_refusal(r["prompt"], text) for r, text in zip(prompts[name], answers[name], strict=True)]
        for name in prompts
    }
    return Measured(loss, {n: refusal_rate(prompts[n], answers[n]) for n in prompts}, answers, verdicts)


def pick_samples(prompts: dict[str, list[dict]], before: Measured, after: Measured) -> list[dict]:
    """Five answers side by side: of each set, questions whose verdict changed first, in file order."""
    samples = []
    for name in SETS:
        changed = [
            i
            for i, (b, a) in enumerate(zip(before.verdicts[name], after.verdicts[name], strict=True))
            if b != a
        ]
        order = changed + [i for i in range(len(prompts[name])) if i not in changed]
        for i in order[:SAMPLES_PER_SET]:
            samples.append({
                "set": name, "prompt": prompts[name][i]["prompt"],
                "before": before.answers[name][i], "before_verdict": before.verdicts[name][i],
                "after": after.answers[name][i], "after_verdict": after.verdicts[name][i],
            })  # fmt: skip
    return samples[:5]


def _opening(cfg: DemoConfig) -> None:
    print(
        f"hpsafety demo: fine-tunes {MODEL} (135M parameters, already instruction-tuned by its makers) on at most\n"
        f"{cfg.train_tokens:,} tokens of mild, synthetic demonstrations, and asks {3 * cfg.eval_prompts} held-out "
        f"questions before and after.\nExpect 2 to 6 minutes on two cores, under 4 GB of memory.\nOutput: {cfg.out}/\n",
        file=sys.stderr, flush=True,
    )  # fmt: skip


def _prompts(cfg: DemoConfig) -> dict[str, list[dict]]:
    return {n: list(read_records(demo_path(f"heldout_{n}"), "prompt"))[: cfg.eval_prompts] for n in SETS}


def run(cfg: DemoConfig) -> None:
    """hpsafety demo: OUT/sft (run directory), OUT/data, OUT/demo.json, OUT/report.html, a table on the terminal."""
    started = time.monotonic()
    _opening(cfg)
    out, prompts = Path(cfg.out), _prompts(cfg)
    out.mkdir(parents=True, exist_ok=True)
    rows: Records = read_records(demo_path("train"), "demonstration")
    model = load_model(MODEL)
    train_rows = choose_rows(list(rows), model.tokenizer, cfg.train_tokens, cfg.seed)
    if not train_rows:
        raise InputError(f"--train-tokens {cfg.train_tokens} holds not one example; give at least 200")
    (out / "data").mkdir(exist_ok=True)
    write_records(out / "data" / "train.jsonl", train_rows)
    before = measure(model, prompts, cfg, "asking the original")
    del model
    sft_config = SFTConfig(
        model=MODEL, data=(str(out / "data" / "train.jsonl"),), out=str(out / "sft"), seed=cfg.seed, lr=cfg.lr,
        batch=cfg.batch, epochs=1, warmup=3, device=cfg.device, precision=cfg.precision, tokens_per_batch=1024,
        checkpoint_every=0,
    )  # fmt: skip
    sft.run(sft_config)
    model = load_model(str(out / "sft" / "model"))
    after = measure(model, prompts, cfg, "asking the tuned")
    metrics = [
        json.loads(line) for line in (out / "sft" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    result = {
        "model": MODEL, "config": asdict(cfg), "train_rows": len(train_rows),
        "precision": precision.choose(cfg.precision, model.embed.device)[1],
        "before": asdict(before), "after": asdict(after), "metrics": metrics,
        "samples": pick_samples(prompts, before, after), "seconds": round(time.monotonic() - started, 1),
    }  # fmt: skip
    with atomic_write(out / "demo.json") as handle:
        json.dump(result, handle, ensure_ascii=False, indent=1)
    write_report(result, out / "report.html")
    terminal_tables(result)
    say(f"report: {out / 'report.html'}   model: {out / 'sft' / 'model'}   {result['seconds']:.0f} s")
