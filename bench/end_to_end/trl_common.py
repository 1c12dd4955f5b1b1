"""What both of TRL's trainers are given, and how they are timed."""

import time

from transformers import TrainerCallback

from bench.end_to_end.common import BETAS, EPS, MAX_NORM, WEIGHT_DECAY, Group, Run, Settings, count_tokens


class Clock(TrainerCallback):
    """Wall and CPU time at the end of each optimiser step."""

    def __init__(self):
        self.times: list[tuple[float, float]] = []

    def on_step_end(self, args, state, control, **_):
        self.times.append((time.perf_counter(), time.process_time()))


def examples_per_micro_batch(settings: Settings, timed: list[Group]) -> int:
    """TRL counts a micro-batch in examples: the largest divisor of the batch whose mean size is in the budget."""
    fits = settings.peer_tokens_per_batch * len(timed) // count_tokens(timed)
    return max(n for n in range(1, settings.batch + 1) if settings.batch % n == 0 and n <= max(fits, 1))


def training_arguments(settings: Settings, out: str, examples: int) -> dict:
    """Arguments that SFTConfig and RewardConfig share."""
    return {
        "output_dir": out, "use_cpu": True, "bf16": settings.precision == "bf16", "fp16": False, "max_length": None,
        "per_device_train_batch_size": examples, "gradient_accumulation_steps": settings.batch // examples,
        "num_train_epochs": 1, "train_sampling_strategy": "sequential",
        # One step of warm-up is one step with learning rate 0, the untimed one.
        "learning_rate": settings.lr, "lr_scheduler_type": "constant_with_warmup", "warmup_steps": 1,
        "optim": "adamw_torch_fused", "adam_beta1": BETAS[0], "adam_beta2": BETAS[1], "adam_epsilon": EPS,
        "weight_decay": WEIGHT_DECAY, "max_grad_norm": MAX_NORM,
        "gradient_checkpointing": False,  # on by default: less memory, a third more work
        "dataloader_pin_memory": False, "logging_steps": 1, "save_strategy": "no", "report_to": "none",
        "disable_tqdm": True, "seed": settings.seed,
    }  # fmt: skip


def timed_training(trainer, clock: Clock, num_steps: int, note: str) -> Run:
    """Trains; the first step is not timed."""
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    if not len(losses) == len(clock.times) == num_steps:
        raise RuntimeError(
            f"TRL took {len(clock.times)} steps and logged {len(losses)}, expected {num_steps}"
        )
    (start, cpu_start), (end, cpu_end) = clock.times[0], clock.times[-1]
    return Run(losses[1:], end - start, cpu_end - cpu_start, note)
