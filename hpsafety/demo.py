"""`hpsafety demo`: a real chat model learns safer answers on a laptop, and a report shows both sides of the trade.

smollm2 (135M, already instruction-tuned) is fine-tuned on a seeded subset of the demo data; two reward models learn
from the demo's preference pairs; the fine-tuned model answers prompts several times, and learns from its best answers;
a few iterations of PPO go on from there, and at last the effect of preprompts is distilled into the weights.
`hpsafety eval` ends it: violations beside false refusals, before and after.
The same held-out questions are asked at each step: adversarial ones (to be declined), borderline ones that only look
dangerous and plain helpful ones (both to be answered).
"""

import json
import sys
import time
from dataclasses import asdict
from pathlib import Path

import torch

from hpsafety.config import DemoConfig, DistillConfig, EvalConfig, PPOConfig, RejectConfig, SFTConfig
from hpsafety.data.chat import encode_prompt
from hpsafety.data.demo import path as demo_path
from hpsafety.data.records import read_records, write_records
from hpsafety.demo_parts import KINDS, MODEL, choose_rows, in_turn, judges, train_judge, within
from hpsafety.errors import InputError
from hpsafety.files import atomic_write
from hpsafety.model.io import load_model
from hpsafety.report.demo import terminal_tables, write_report
from hpsafety.safety.measure import SETS, Measured, measure, score_answers
from hpsafety.stages import distill, evaluate, ppo, reject, sft
from hpsafety.train import precision
from hpsafety.train.metrics import read_metrics, say

RUNS = ("sft", "reward-safety", "reward-helpfulness", "reject", "ppo", "distill")
PREPROMPT_TOKENS = 150  # of a prompt with a preprompt, about
LORA_RANK = 16  # of PPO
PPO_GROUPS = 8  # prompts per iteration of PPO, cfg.k answers each
SAMPLES_PER_SET = 2


def choose_prompts(
    rows: list[dict], used: list[dict], tokenizer, tokens: int, cfg: DemoConfig, own: int | None = None
) -> list[dict]:
    """Prompts to sample from, the kinds in turn, none of those used; all their samples together hold at most `tokens`
    tokens. own: tokens of a prompt's samples; cfg.k full answers if absent."""
    seen = {row["id"] for row in used}
    fresh = [row for row in rows if row["id"] not in seen]

    def size(row):
        return len(encode_prompt(tokenizer, row["prompt"])) + (own or cfg.k * cfg.answer_tokens)

    chosen = within(in_turn(fresh, cfg.seed + 1), size, tokens)
    return [{name: value for name, value in row.items() if name != "response"} for row in chosen]


def distilled_tokens(cfg: DemoConfig) -> int:
    """Of one prompt in distillation, about: four answers, two of them behind a preprompt too."""
    return 4 * cfg.answer_tokens + 2 * PREPROMPT_TOKENS


# ---- the steps ----


def fine_tune(rows: list[dict], cfg: DemoConfig, out: Path) -> None:
    write_records(out / "data" / "train.jsonl", rows)
    sft.run(SFTConfig(
        model=MODEL, data=(str(out / "data" / "train.jsonl"),), out=str(out / "sft"), seed=cfg.seed, lr=cfg.lr,
        batch=cfg.batch, epochs=1, warmup=3, device=cfg.device, precision=cfg.precision, tokens_per_batch=1024,
        checkpoint_every=0,
    ))  # fmt: skip


def best_of_k(prompts: list[dict], cfg: DemoConfig, out: Path) -> None:
    """One iteration of rejection sampling, at its own default rate. It goes on from the fine-tuned model, since so few
    winners cannot replace the demonstrations."""
    write_records(out / "data" / "prompts.jsonl", prompts)
    reject.run(RejectConfig(
        model=str(out / "sft" / "model"), data=(str(out / "data" / "prompts.jsonl"),), out=str(out / "reject"), k=cfg.k,
        temperatures=(1.0,), max_new_tokens=cfg.answer_tokens, seed=cfg.seed, batch=cfg.batch, epochs=1,
        warmup=3, device=cfg.device, precision=cfg.precision, tokens_per_batch=1024,
        checkpoint_every=0, **{f"{name}_rm": path for name, path in judges(out).items()},
    ))  # fmt: skip


def reinforce(prompts: list[dict], cfg: DemoConfig, out: Path) -> None:
    """PPO from the best-of-K model, once over the prompts, PPO_GROUPS of them an iteration; on adapters, so that a
    laptop's memory holds all five roles."""
    write_records(out / "data" / "prompts-ppo.jsonl", prompts)
    batch = PPO_GROUPS * cfg.k
    ppo.run(PPOConfig(
        model=str(out / "reject" / "model"), data=(str(out / "data" / "prompts-ppo.jsonl"),), out=str(out / "ppo"),
        k=cfg.k, batch=batch, minibatch=batch // 2, iterations=len(prompts) // PPO_GROUPS, lr=cfg.ppo_lr,
        max_new_tokens=cfg.answer_tokens, seed=cfg.seed, device=cfg.device, precision=cfg.precision,
        checkpoint_every=0, lora_rank=LORA_RANK, frozen="mapped",
        **{f"{name}_rm": path for name, path in judges(out).items()},
    ))  # fmt: skip


def distil(prompts: list[dict], cfg: DemoConfig, out: Path) -> None:
    """Safety context distillation on adversarial prompts: what answer templates add goes into the PPO model's weights,
    where the safety reward model prefers it."""
    write_records(out / "data" / "prompts-distill.jsonl", prompts)
    distill.run(DistillConfig(
        model=str(out / "ppo" / "model"), data=(str(out / "data" / "prompts-distill.jsonl"),),
        out=str(out / "distill"), safety_rm=judges(out)["safety"], max_new_tokens=cfg.answer_tokens, seed=cfg.seed,
        batch=cfg.batch, epochs=1, device=cfg.device, precision=cfg.precision, checkpoint_every=0,
    ))  # fmt: skip


def judge_both(prompts: dict[str, list[dict]], cfg: DemoConfig, out: Path) -> dict:
    """`hpsafety eval` of the last model beside the original one, on the held-out prompts, greedy; its eval.json."""
    write_records(out / "data" / "heldout.jsonl", [row for part in prompts.values() for row in part])
    evaluate.run(EvalConfig(
        model=str(out / "distill" / "model"), base=MODEL, data=(str(out / "data" / "heldout.jsonl"),),
        out=str(out / "eval"), temperature=0.0, max_new_tokens=cfg.answer_tokens, seed=cfg.seed,
        device=cfg.device, precision=cfg.precision, **{f"{name}_rm": path for name, path in judges(out).items()},
    ))  # fmt: skip
    return json.loads((out / "eval" / "eval.json").read_text(encoding="utf-8"))


def pick_samples(prompts: dict[str, list[dict]], models: list[Measured]) -> list[dict]:
    """Five questions and every model's answer: of each set, those whose verdict changed first, in file order."""
    samples = []
    for name in SETS:
        changed = [i for i in range(len(prompts[name])) if len({m.verdicts[name][i] for m in models}) > 1]
        order = changed + [i for i in range(len(prompts[name])) if i not in changed]
        for i in order[:SAMPLES_PER_SET]:
            answers = [
                {"model": m.name, "verdict": m.verdicts[name][i], "text": m.answers[name][i]} for m in models
            ]
            samples.append({"set": name, "prompt": prompts[name][i]["prompt"], "answers": answers})
    return samples[:5]


def _opening(cfg: DemoConfig) -> None:
    print(
        f"hpsafety demo: {MODEL} (135M parameters, already instruction-tuned by its makers), mild synthetic data.\n"
        f"  1. fine-tuning on at most {cfg.train_tokens:,} tokens of demonstrations\n"
        f"  2. two reward models, of safety and of helpfulness, each on at most {cfg.reward_tokens:,} tokens of pairs\n"
        f"  3. rejection sampling: {cfg.k} answers a prompt, {cfg.reject_tokens:,} tokens at most, the best is learnt\n"
        f"  4. PPO with both reward models, on low-rank adapters, {cfg.ppo_tokens:,} sampled tokens at most\n"
        f"  5. distillation of safety preprompts, {cfg.distill_tokens:,} sampled tokens at most\n"
        "  6. the safety evaluation of the last model beside the original one\n"
        f"{3 * cfg.eval_prompts} held-out questions are asked before, and after 1, 3, 4 and 5.\n"
        f"Expect 7 to 13 minutes on two cores, under 5 GB of memory.\nOutput: {cfg.out}/\n",
        file=sys.stderr, flush=True,
    )  # fmt: skip


def run(cfg: DemoConfig) -> None:
    """hpsafety demo: OUT/sft, OUT/reward-*, OUT/reject, OUT/ppo, OUT/distill, OUT/eval (run directories), OUT/data,
    OUT/demo.json, OUT/report.html, a table on the terminal."""
    started = time.monotonic()
    _opening(cfg)
    out = Path(cfg.out)
    prompts = {n: list(read_records(demo_path(f"heldout_{n}"), "prompt"))[: cfg.eval_prompts] for n in SETS}
    (out / "data").mkdir(parents=True, exist_ok=True)
    rows = list(read_records(demo_path("train"), "demonstration"))
    dtype, why = precision.choose(cfg.precision, torch.device("cpu"))
    model = load_model(MODEL, dtype)
    tokenizer = model.tokenizer
    train_rows = choose_rows(rows, tokenizer, cfg.train_tokens, cfg.seed)
    if not train_rows:
        raise InputError(f"--train-tokens {cfg.train_tokens} holds not one example; give at least 200")
    asked = choose_prompts(rows, train_rows, tokenizer, cfg.reject_tokens, cfg)
    if not asked:
        raise InputError(f"--reject-tokens {cfg.reject_tokens} holds not one prompt; give at least 1000")
    practised = choose_prompts(rows, train_rows + asked, tokenizer, cfg.ppo_tokens, cfg)
    if len(practised) < PPO_GROUPS:
        raise InputError(
            f"--ppo-tokens {cfg.ppo_tokens} holds less than {PPO_GROUPS} prompts; give at least 3000"
        )
    adversarial = [row for row in rows if row.get("is_safety")]
    used = train_rows + asked + practised
    dangerous = choose_prompts(adversarial, used, tokenizer, cfg.distill_tokens, cfg, distilled_tokens(cfg))
    if not dangerous:
        raise InputError(f"--distill-tokens {cfg.distill_tokens} holds not one prompt; give at least 1000")
    models = [measure(model, "original", prompts, cfg.answer_tokens)]
    del model

    def ask(name: str, run: str) -> None:
        model = load_model(str(out / run / "model"), dtype)
        models.append(measure(model, name, prompts, cfg.answer_tokens))

    fine_tune(train_rows, cfg, out)
    ask("fine-tuned", "sft")
    for kind in KINDS:
        train_judge(kind, tokenizer, cfg, out, str(out / "sft" / "model"))
    best_of_k(asked, cfg, out)
    ask("best of K", "reject")
    reinforce(practised, cfg, out)
    ask("PPO", "ppo")
    distil(dangerous, cfg, out)
    ask("distilled", "distill")
    models = score_answers(models, prompts, judges(out), dtype)
    result = {
        "model": MODEL, "config": asdict(cfg), "train_rows": len(train_rows), "prompts": len(asked),
        "ppo_prompts": len(practised),
        "eval": judge_both(prompts, cfg, out),
        "distill": json.loads((out / "distill" / "report.json").read_text(encoding="utf-8")),
        "precision": why, "models": [asdict(m) for m in models],
        "judges": {k: json.loads((out / f"reward-{k}" / "report.json").read_text(encoding="utf-8")) for k in KINDS},
        "best_of_k": json.loads((out / "reject" / "report.json").read_text(encoding="utf-8")),
        "metrics": {name: read_metrics(out / name) for name in RUNS},
        "samples": pick_samples(prompts, models), "seconds": round(time.monotonic() - started, 1),
    }  # fmt: skip
    with atomic_write(out / "demo.json") as handle:
        json.dump(result, handle, ensure_ascii=False, indent=1)
    write_report(result, out / "report.html")
    terminal_tables(result)
    say(f"report: {out / 'report.html'}   model: {out / 'distill' / 'model'}   {result['seconds']:.0f} s")
