"""The arms of context distillation: the same prompts asked with and without preprompts, all answers scored together.

Each arm is a job on files (sampling_job), so that ranks share it and an interruption loses little. All answers to one
prompt then form one group behind the bare prompt, which the safety reward model reads once.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from hpsafety.config import SampleConfig, ScoreConfig
from hpsafety.data.records import iter_records, write_records
from hpsafety.safety.distillation import Answer
from hpsafety.safety.preprompts import Library, Preprompt, attach, choose_answer, choose_generic
from hpsafety.safety.sampling_job import sample_file
from hpsafety.safety.scoring_job import score_file
from hpsafety.train import distributed, precision

ARMS = ("none", "generic", "template")
PLAIN = "plain"  # y0: drawn from a seed of its own, so that every arm's sample is independent of it


@dataclass(frozen=True, slots=True)
class Asked:
    """One prompt as each arm asks it. preprompts: arm -> its Preprompt, None for the arm none; fallback: the arm
    template had no answer template for its label."""

    row: dict
    prompts: dict[str, str | list[dict]]
    preprompts: dict[str, Preprompt | None]

    @property
    def fallback(self) -> bool:
        return self.preprompts["template"] is self.preprompts["generic"]


@dataclass(frozen=True, slots=True)
class Condition:
    """Who answers, which of the arms' prompts, from which seed."""

    model: str
    arm: str
    seed: int


def prepare(rows: Sequence[dict], library: Library, tokenizer, seed: int, in_system: bool) -> list[Asked]:
    """Every arm's prompt of every row. The generic preprompt is drawn by (seed, number of the row)."""
    out = []
    for index, row in enumerate(rows):
        generic = choose_generic(library, index, seed)
        preprompts = {"none": None, "generic": generic, "template": choose_answer(library, row, generic)}
        prompts = {
            arm: row["prompt"] if p is None else attach(tokenizer, row["prompt"], p.text, in_system)
            for arm, p in preprompts.items()
        }
        out.append(Asked(row, prompts, preprompts))
    return out


def ask(
    asked: Sequence[Asked], conditions: dict[str, Condition], folder: Path, cfg, dtype: torch.dtype, world, k: int,
    temperature: float,
) -> list[dict[str, list[Answer]]]:  # fmt: skip
    """Per prompt: condition -> its k answers with their scores (a collective call; every rank gets all).

    Written to `folder`, where an interrupted call goes on: ARM-prompts.jsonl, NAME.jsonl per condition (group records
    with the prompt as it was asked), answers.jsonl (all answers behind the bare prompt), scores.jsonl
    """
    if world.is_main:
        folder.mkdir(exist_ok=True)
        for arm in {condition.arm for condition in conditions.values()}:
            write_records(folder / f"{arm}-prompts.jsonl", (_as_asked(one, arm) for one in asked))
    distributed.barrier(world)
    files = [folder / f"{name}.jsonl" for name in conditions]
    for condition, path in zip(conditions.values(), files, strict=True):
        prompts = folder / f"{condition.arm}-prompts.jsonl"
        sample_file(_sampling(condition, prompts, path, cfg, dtype, k, temperature), world)
    if world.is_main:
        write_records(folder / "answers.jsonl", _joined(asked, files))
    distributed.barrier(world)
    score_file(scoring(folder, cfg, dtype), world)
    return _read(folder, list(conditions), files, k)


def _as_asked(one: Asked, arm: str) -> dict:
    preprompt = one.preprompts[arm]
    return one.row | {"prompt": one.prompts[arm]} | ({"preprompt_id": preprompt.id} if preprompt else {})


def _sampling(
    condition: Condition, prompts: Path, out: Path, cfg, dtype, k: int, temperature: float
) -> SampleConfig:
    return SampleConfig(
        model=condition.model, data=(str(prompts),), out=str(out), k=k, temperature=temperature, top_p=cfg.top_p,
        top_k=cfg.top_k, max_new_tokens=cfg.max_new_tokens, seed=condition.seed, kv_memory=cfg.kv_memory,
        max_batch=cfg.max_batch, device=cfg.device, precision=precision.name(dtype),
    )  # fmt: skip


def scoring(folder: Path, cfg, dtype) -> ScoreConfig:
    """The safety model stands in both places: one trunk, so one pass, and nobody else has a say. `helpful` and
    `combined` in scores.jsonl then repeat `safety`."""
    return ScoreConfig(
        safety_rm=cfg.safety_rm, helpful_rm=cfg.safety_rm, data=(str(folder / "answers.jsonl"),),
        out=str(folder / "scores.jsonl"), device=cfg.device, precision=precision.name(dtype),
    )  # fmt: skip


def _joined(asked: Sequence[Asked], files: Sequence[Path]):
    """One group per prompt: its bare prompt and the answers of all conditions, in their order."""
    for one, *groups in zip(asked, *(iter_records(path, "group") for path in files), strict=True):
        yield one.row | {"responses": [text for group in groups for text in group["responses"]]}


def _read(folder: Path, names: list[str], files: Sequence[Path], k: int) -> list[dict[str, list[Answer]]]:
    out = []
    scores = iter_records(folder / "scores.jsonl", "score")
    for score, *groups in zip(scores, *(iter_records(path, "group") for path in files), strict=True):
        found = {}
        for place, (name, group) in enumerate(zip(names, groups, strict=True)):
            found[name] = [
                Answer(s["text"], s["finish"], len(s["tokens"]), s["seed"], s["temperature"], r)
                for s, r in zip(group["samples"], score["safety"][place * k : (place + 1) * k], strict=True)
            ]
        out.append(found)
    return out
