"""TRL's SFTTrainer, completion-only loss, in its padding-free mode or padded.

TRL supports padding-free with FlashAttention only, which has no CPU build. With sdpa transformers makes a mask from the
position ids, so that the answer is right, and attention costs the square of the micro-batch's length.
"""

import tempfile

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

from bench.end_to_end.common import Group, Run, Settings, rows, steps
from bench.end_to_end.trl_common import Clock, examples_per_micro_batch, timed_training, training_arguments


def _dataset(all_steps: list[list[Group]]) -> Dataset:
    """Steps in order; within a step by length, which TRL's fixed micro-batches profit from."""
    pairs = [
        pair
        for step in all_steps
        for pair in sorted(rows(step), key=lambda pair: len(pair[0]) + len(pair[1]))
    ]
    return Dataset.from_dict(
        {
            "input_ids": [prompt + response for prompt, response in pairs],
            "labels": [[-100] * len(prompt) + response for prompt, response in pairs],
        }
    )


def run(settings: Settings, padding_free: bool = True) -> Run:
    all_steps = steps(settings)
    examples = examples_per_micro_batch(settings, [pair for step in all_steps[1:] for pair in step])
    model = AutoModelForCausalLM.from_pretrained(
        settings.model, dtype=torch.float32, attn_implementation="sdpa"
    )
    clock = Clock()
    mode = (
        "padding-free over a block mask (no FlashAttention on CPUs)"
        if padding_free
        else "padded, sorted by length"
    )
    note = (
        f"SFTTrainer, {mode}, sdpa, {examples} examples a micro-batch, no gradient checkpointing, fused AdamW"
    )
    with tempfile.TemporaryDirectory() as out:
        arguments = training_arguments(settings, out, examples)
        trainer = SFTTrainer(
            model=model,
            args=SFTConfig(**arguments, padding_free=padding_free, dataset_kwargs={"skip_prepare_dataset": True}),
            train_dataset=_dataset(all_steps), processing_class=AutoTokenizer.from_pretrained(settings.model),
            callbacks=[clock],
        )  # fmt: skip
        return timed_training(trainer, clock, len(all_steps), note)
