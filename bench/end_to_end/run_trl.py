"""TRL's SFTTrainer, completion-only loss, in its padding-free mode or padded.

TRL supports padding-free with FlashAttention only, which has no CPU build. With sdpa transformers makes a mask from the
position ids, so that the answer is right, and attention costs the square of the micro-batch's length.
"""

import tempfile
import time

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import SFTConfig, SFTTrainer

from bench.end_to_end.common import (
    BETAS,
    EPS,
    MAX_NORM,
    WEIGHT_DECAY,
    Pair,
    Run,
    Settings,
    count_tokens,
    steps,
)


class _Clock(TrainerCallback):
    """Wall and CPU time at the end of each optimiser step."""

    def __init__(self):
        self.times: list[tuple[float, float]] = []

    def on_step_end(self, args, state, control, **_):
        self.times.append((time.perf_counter(), time.process_time()))


def _dataset(all_steps: list[list[Pair]]) -> Dataset:
    """Steps in order; within a step by length, which TRL's fixed micro-batches profit from."""
    pairs = [
        pair for step in all_steps for pair in sorted(step, key=lambda pair: len(pair[0]) + len(pair[1]))
    ]
    return Dataset.from_dict(
        {
            "input_ids": [prompt + response for prompt, response in pairs],
            "labels": [[-100] * len(prompt) + response for prompt, response in pairs],
        }
    )


def _examples_per_micro_batch(settings: Settings, timed: list[Pair]) -> int:
    """TRL counts a micro-batch in examples: the largest divisor of the batch whose mean size is in the budget."""
    fits = settings.peer_tokens_per_batch * len(timed) // count_tokens(timed)
    return max(n for n in range(1, settings.batch + 1) if settings.batch % n == 0 and n <= max(fits, 1))


def _config(settings: Settings, out: str, padding_free: bool, examples: int) -> SFTConfig:
    return SFTConfig(
        output_dir=out, use_cpu=True, bf16=settings.precision == "bf16", fp16=False,
        padding_free=padding_free, max_length=None, dataset_kwargs={"skip_prepare_dataset": True},
        per_device_train_batch_size=examples, gradient_accumulation_steps=settings.batch // examples,
        num_train_epochs=1, train_sampling_strategy="sequential",
        # One step of warm-up is one step with learning rate 0, the untimed one.
        learning_rate=settings.lr, lr_scheduler_type="constant_with_warmup", warmup_steps=1,
        optim="adamw_torch_fused", adam_beta1=BETAS[0], adam_beta2=BETAS[1], adam_epsilon=EPS,
        weight_decay=WEIGHT_DECAY, max_grad_norm=MAX_NORM,
        gradient_checkpointing=False,  # on by default: less memory, a third more work
        dataloader_pin_memory=False, logging_steps=1, save_strategy="no", report_to="none", disable_tqdm=True,
        seed=settings.seed,
    )  # fmt: skip


def run(settings: Settings, padding_free: bool = True) -> Run:
    all_steps = steps(settings)
    examples = _examples_per_micro_batch(settings, [pair for step in all_steps[1:] for pair in step])
    model = AutoModelForCausalLM.from_pretrained(
        settings.model, dtype=torch.float32, attn_implementation="sdpa"
    )
    clock = _Clock()
    with tempfile.TemporaryDirectory() as out:
        trainer = SFTTrainer(
            model=model, args=_config(settings, out, padding_free, examples), train_dataset=_dataset(all_steps),
            processing_class=AutoTokenizer.from_pretrained(settings.model), callbacks=[clock],
        )  # fmt: skip
        trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    if not len(losses) == len(clock.times) == len(all_steps):
        raise RuntimeError(
            f"TRL took {len(clock.times)} steps and logged {len(losses)}, expected {len(all_steps)}"
        )
    (start, cpu_start), (end, cpu_end) = clock.times[0], clock.times[-1]
    mode = (
        "padding-free over a block mask (no FlashAttention on CPUs)"
        if padding_free
        else "padded, sorted by length"
    )
    note = (
        f"SFTTrainer, {mode}, sdpa, {examples} examples a micro-batch, no gradient checkpointing, fused AdamW"
    )
    return Run(losses[1:], end - start, cpu_end - cpu_start, note)
