"""TRL's RewardTrainer on tokenised pairs: padded, sorted by length within a step, its attention mask given."""

import tempfile

import torch
from datasets import Dataset
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from trl import RewardConfig, RewardTrainer

from bench.end_to_end.common import Group, Run, Settings, steps
from bench.end_to_end.trl_common import Clock, examples_per_micro_batch, timed_training, training_arguments


def _dataset(all_steps: list[list[Group]]) -> Dataset:
    """Steps in order; within a step by the longer of both texts, so that a micro-batch pads little."""
    pairs = [
        pair
        for step in all_steps
        for pair in sorted(step, key=lambda pair: len(pair[0]) + max(map(len, pair[1])))
    ]
    return Dataset.from_dict(
        {
            "chosen_ids": [prompt + responses[0] for prompt, responses in pairs],
            "rejected_ids": [prompt + responses[1] for prompt, responses in pairs],
        }
    )


def run(settings: Settings) -> Run:
    all_steps = steps(settings)
    examples = examples_per_micro_batch(settings, [pair for step in all_steps[1:] for pair in step])
    path, clock = settings.reward_models[0], Clock()
    model = AutoModelForSequenceClassification.from_pretrained(
        path, dtype=torch.float32, attn_implementation="sdpa"
    )
    note = f"RewardTrainer, padded, sorted by length, sdpa, {examples} pairs a micro-batch, no gradient checkpointing"
    with tempfile.TemporaryDirectory() as out:
        trainer = RewardTrainer(
            model=model, args=RewardConfig(**training_arguments(settings, out, examples)),
            train_dataset=_dataset(all_steps), processing_class=AutoTokenizer.from_pretrained(path),
            callbacks=[clock],
        )  # fmt: skip
        return timed_training(trainer, clock, len(all_steps), note)
