"""`hpsafety demo`: a real chat model learns safer answers on a laptop, and a report shows both sides of the trade.

It is the pipeline of configs/demo.toml: smollm2 (135M, already instruction-tuned by its makers) is fine-tuned on a
seeded subset of the demo data; two reward models learn from the demo's preference pairs; the fine-tuned model answers
prompts several times and learns from its best answers; a few iterations of PPO go on from there, and at last the
effect of preprompts is distilled into the weights. The same held-out questions are asked after each stage: adversarial
ones (to be declined), borderline ones that only look dangerous and plain helpful ones (both to be answered).
"""

from pathlib import Path

from hpsafety.pipeline import follow
from hpsafety.pipeline_file import read_pipeline

DEMO = Path(__file__).parent / "configs" / "demo.toml"
# flag of the demo -> (stages, field) that it sets
BUDGETS = {
    "train_tokens": (("select-sft",), "tokens"),
    "reward_tokens": (("select-safety-pairs", "select-helpfulness-pairs"), "tokens"),
    "reject_tokens": (("select-reject",), "tokens"),
    "ppo_tokens": (("select-ppo",), "tokens"),
    "distill_tokens": (("select-distill",), "tokens"),
    "eval_prompts": (("eval-original", "eval-sft", "eval-reject", "eval-ppo", "eval-distill"), "limit"),
}


def run(cfg) -> None:
    """hpsafety demo: see DemoConfig and hpsafety/pipeline.py."""
    changes = {name: getattr(cfg, name) for name in ("out", "seed", "device", "precision")}
    follow(read_pipeline(str(DEMO), changes, budgets(cfg)), cfg.plan, cfg.force_from)


def budgets(cfg) -> dict[str, dict]:
    """Stage -> values over the file's own, of the budgets that were given."""
    out: dict[str, dict] = {}
    for name, (stages, field) in BUDGETS.items():
        if getattr(cfg, name) is not None:
            for stage in stages:
                out.setdefault(stage, {})[field] = getattr(cfg, name)
    return out
