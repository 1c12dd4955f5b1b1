"""TRL's closest maintained online trainer: RLOOTrainer, one iteration.

TRL 1.16 has no PPO trainer any more. RLOOTrainer is nearest: samples from the live policy, takes old and reference
logprobs, puts the KL penalty into the reward, clips the ratio. Like `hpsafety ppo --advantages rloo` it has no critic;
its ratio and KL are those of whole responses, ours those of tokens. (GRPOTrainer skips the old logprobs where an
iteration is one step, and puts the KL into the loss.) Prompts are handed over as token ids, and both reward models are
reward functions on token ids: text would not survive the way there and back, and the functions sort their batches.
"""

import contextlib
import tempfile
import time

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import RLOOConfig, RLOOTrainer

from bench.end_to_end import score_transformers
from bench.end_to_end.common import Run, Settings, make_groups, rows
from bench.end_to_end.ppo_data import CLIP_RATIO, KL_COEF, NO_RATE, WARM_UP_TOKENS, warm_up_prompts
from bench.end_to_end.trl_common import Clock, examples_per_micro_batch, training_arguments


class Timed(RLOOTrainer):
    """RLOOTrainer on token ids, with a clock on each phase; `update` is what the others leave of an iteration."""

    prompt_tokens: list[list[int]]

    def __init__(self, *args, **kwargs):
        self.seconds = {"rollout": 0.0, "score": 0.0, "logprobs": 0.0}
        self.record: dict = {}
        super().__init__(*args, **kwargs)

    @contextlib.contextmanager
    def _phase(self, name: str):
        start = time.perf_counter()
        yield
        self.seconds[name] += time.perf_counter() - start

    def _tokenize_prompts(self, prompts):
        return [self.prompt_tokens[int(prompt)] for prompt in prompts], None, {}

    def _generate(self, prompts):
        with self._phase("rollout"):
            return super()._generate(prompts)

    def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list):
        with self._phase("score"):
            rewards = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        self.record |= {"samples": completion_ids_list, "scores": rewards}
        return rewards

    def _get_per_token_logps_and_entropies(self, *args, **kwargs):
        measuring = not torch.is_grad_enabled()
        with self._phase("logprobs") if measuring else contextlib.nullcontext():
            return super()._get_per_token_logps_and_entropies(*args, **kwargs)

    def _generate_and_score_completions(self, inputs):
        output = super()._generate_and_score_completions(inputs)
        self.record["old_logps"] = output["old_logps"]
        return output


class AfterWarmUp(TrainerCallback):
    """After the warm-up iteration: full length, the learning rate, and clocks at zero."""

    def __init__(self, settings: Settings, updates: int):
        self.settings, self.updates, self.trainer = settings, updates, None

    def on_step_end(self, args, state, control, optimizer=None, lr_scheduler=None, **_):
        if state.global_step == self.updates:
            set_length(self.trainer, self.settings.response_tokens)
            self.trainer.seconds = dict.fromkeys(self.trainer.seconds, 0.0)
            schedule = getattr(lr_scheduler, "scheduler", lr_scheduler)
            schedule.base_lrs = [self.settings.lr] * len(schedule.base_lrs)
            for group in optimizer.param_groups:
                group["lr"] = self.settings.lr


def set_length(trainer, new_tokens: int) -> None:
    """Every sample gets just so many tokens: words that end a response have no probability before."""
    length = {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens}
    trainer.generation_kwargs.update(length)
    trainer.generation_config.update(**length)


def _reward(model, prompt_tokens: list[list[int]], end: int, budget: int, name: str):
    def reward(prompts, completions, completion_ids, **_):
        texts = [prompt_tokens[int(p)] + ids + [end] for p, ids in zip(prompts, completion_ids, strict=True)]
        return score_transformers.scores_of([model], texts, budget)[0].tolist()

    reward.__name__ = name
    return reward


def _arguments(settings: Settings, out: str, timed: list) -> dict:
    """Batches in samples: a generation batch is an iteration, an optimiser step a minibatch."""
    samples, minibatch = settings.groups * settings.k, settings.batch * settings.k
    fits = settings.peer_tokens_per_batch // max(len(p) + len(r) for p, r in rows(timed))
    examples = max(n for n in range(1, minibatch + 1) if minibatch % n == 0 and n <= max(fits, 1))
    common = training_arguments(settings, out, examples_per_micro_batch(settings, timed))
    for name in ("max_length", "num_train_epochs", "train_sampling_strategy", "warmup_steps"):
        del common[name]
    updates = settings.groups // settings.batch
    return common | {
        "per_device_train_batch_size": examples, "gradient_accumulation_steps": minibatch // examples,
        "steps_per_generation": samples // examples, "max_steps": 2 * updates, "lr_scheduler_type": "constant",
        "learning_rate": NO_RATE,
        "num_generations": settings.k, "max_completion_length": WARM_UP_TOKENS, "shuffle_dataset": False,
        "beta": KL_COEF, "epsilon": CLIP_RATIO, "temperature": 1.0, "top_k": 0,
        "generation_kwargs": {"min_new_tokens": WARM_UP_TOKENS},
    }  # fmt: skip


def run(settings: Settings) -> Run:
    timed = make_groups(settings)
    prompt_tokens = [*warm_up_prompts(settings), *(prompt for prompt, _ in timed)]
    tokenizer = AutoTokenizer.from_pretrained(settings.model, padding_side="left")
    policy = AutoModelForCausalLM.from_pretrained(
        settings.model, dtype=torch.float32, attn_implementation="sdpa"
    )
    rewards = [
        _reward(model, prompt_tokens, tokenizer.eos_token_id, settings.peer_tokens_per_batch, f"reward_{i}")
        for i, model in enumerate(score_transformers.load(settings))
    ]
    updates = settings.groups // settings.batch
    clock, switch = Clock(), AfterWarmUp(settings, updates)
    with tempfile.TemporaryDirectory() as out:
        arguments = _arguments(settings, out, timed)
        trainer = Timed(
            model=policy, reward_funcs=rewards, args=RLOOConfig(**arguments), callbacks=[clock, switch],
            train_dataset=Dataset.from_dict({"prompt": [str(i) for i in range(len(prompt_tokens))]}),
            processing_class=tokenizer,
        )  # fmt: skip
        trainer.prompt_tokens = prompt_tokens
        switch.trainer = trainer
        trainer.train()
    if len(clock.times) != 2 * updates:
        raise RuntimeError(f"TRL took {len(clock.times)} steps, expected {2 * updates}")
    (start, cpu_start), (end, cpu_end) = clock.times[updates - 1], clock.times[-1]
    seconds = trainer.seconds | {"update": end - start - sum(trainer.seconds.values())}
    values = [*trainer.record["scores"].T.flatten().tolist(), *trainer.record["old_logps"].tolist()]
    note = (
        f"RLOOTrainer (no critic), left-padded, sdpa with a mask, {arguments['per_device_train_batch_size']} samples a "
        "micro-batch, no gradient checkpointing, fused AdamW; rewards sorted"
    ) + (", bf16 autocast, reward models in bf16" if settings.precision == "bf16" else "")
    return Run(values, end - start, cpu_end - cpu_start, note, seconds, trainer.record["samples"])
