"""What all contenders share: settings, data, the strictly needed FLOPs, timing and peak memory."""

import dataclasses
import json
import resource
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

# The Llama 2 paper's optimiser constants; weight decay acts on matrices and embeddings, not on norms.
BETAS, EPS, WEIGHT_DECAY, MAX_NORM = (0.9, 0.95), 1e-5, 0.1, 1.0
PROMPT_TOKENS, RESPONSE_TOKENS = (16, 512), (8, 512)

Group = tuple[list[int], list[list[int]]]  # token ids of a prompt and of each of its responses


@dataclass(frozen=True)
class Settings:
    """One benchmark: model is a Hugging Face directory; the micro-batch budgets change speed and memory only.

    work    sft, reward, score, ppo or distill: a contender NAME is run by the file WORK_NAME.py
    part    of ppo: iteration, update or logprobs
    groups  prompts of k responses each; batch: groups per optimiser step (not for score)
    prompt_tokens, response_tokens  median lengths of a log-normal distribution; spread: its sigma
    equal_responses                 every response has just response_tokens
    reward_models                   directories of sequence classifiers, of the same shape as `model`
    preprompt_tokens                before every prompt that distillation's teacher reads
    experience                      file of what PPO's update is given per token (ppo_data.py)
    """

    model: str
    work: str = "sft"
    part: str = ""
    groups: int = 256
    k: int = 1
    batch: int = 32
    prompt_tokens: int = 48
    response_tokens: int = 40
    spread: float = 1.0
    equal_responses: bool = False
    reward_models: tuple[str, ...] = ()
    preprompt_tokens: int = 0
    experience: str = ""
    tokens_per_batch: int = 2048
    peer_tokens_per_batch: int = 2048
    precision: str = "fp32"
    threads: int = 2
    lr: float = 1e-5
    seed: int = 0

    @property
    def config(self) -> dict:
        return json.loads((Path(self.model) / "config.json").read_text(encoding="utf-8"))


@dataclass(frozen=True)
class Run:
    """One run of one contender. values: what must agree: the loss per timed step, the first before any update; or
    every response's scores."""

    values: list[float]
    seconds: float
    cpu_seconds: float
    note: str  # the settings that matter for this contender's speed
    phases: dict[str, float] = field(default_factory=dict)  # seconds of each phase
    samples: list[list[int]] = field(default_factory=list)  # what it sampled itself


def make_groups(settings: Settings) -> list[Group]:
    """Seeded random token ids with long-tailed (log-normal, clipped) lengths; the ids do not matter for speed."""
    rng = np.random.default_rng(settings.seed)
    vocab, count, k = settings.config["vocab_size"], settings.groups, settings.k
    prompts = _lengths(rng, settings.prompt_tokens, settings.spread, PROMPT_TOKENS, count)
    spread = 0.0 if settings.equal_responses else settings.spread
    responses = _lengths(rng, settings.response_tokens, spread, RESPONSE_TOKENS, count * k)
    return [
        (_ids(rng, vocab, p), [_ids(rng, vocab, r) for r in rs])
        for p, rs in zip(prompts, responses.reshape(count, k), strict=True)
    ]


def _lengths(rng, median: int, spread: float, limits: tuple[int, int], count: int) -> np.ndarray:
    if not spread:
        return np.full(count, median)
    return np.clip(rng.lognormal(np.log(median), spread, count).astype(int), *limits)


def _ids(rng, vocab: int, count: int) -> list[int]:
    return rng.integers(vocab // 8, vocab, count).tolist()  # the first ids are special tokens and bytes


def warm_up_groups(settings: Settings) -> list[Group]:
    """One step of the shortest groups: it allocates gradients and optimiser state and runs with learning rate 0."""
    rng = np.random.default_rng(settings.seed + 1)
    vocab, short = settings.config["vocab_size"], (PROMPT_TOKENS[0], RESPONSE_TOKENS[0])
    return [
        (_ids(rng, vocab, short[0]), [_ids(rng, vocab, short[1]) for _ in range(settings.k)])
        for _ in range(settings.batch)
    ]


def preprompt(settings: Settings) -> list[int]:
    """What distillation's teacher reads before every prompt."""
    rng = np.random.default_rng(settings.seed + 2)
    return _ids(rng, settings.config["vocab_size"], settings.preprompt_tokens)


def steps(settings: Settings) -> list[list[Group]]:
    """The warm-up step, then the data in order, `batch` groups a step."""
    groups = make_groups(settings)
    timed = [groups[i : i + settings.batch] for i in range(0, len(groups), settings.batch)]
    return [warm_up_groups(settings), *timed]


def rows(groups: list[Group]) -> list[tuple[list[int], list[int]]]:
    """(prompt, response) of every response: what a trainer without prompt groups computes."""
    return [(prompt, response) for prompt, responses in groups for response in responses]


def count_tokens(groups: list[Group]) -> int:
    """Tokens with the prompt once per response (tokens_equiv)."""
    return sum(len(prompt) + len(response) for prompt, response in rows(groups))


def needed_flops(settings: Settings) -> float:
    """Strictly needed FLOPs of the timed work, nothing recomputed, nothing padded; training is 3 x forward.

    Forward: linear layers once per token, attention's causal pairs; SFT's head on response tokens only.
    Distillation adds its teacher's forward, behind the preprompt. A reward model has no token head and is read at last
    rows: other rows of the last block need their keys and values alone.
    """
    from hpsafety import PromptGroup
    from hpsafety.model.config import from_hf
    from hpsafety.train.work import forward_flops

    config = from_hf(settings.config)
    trained = settings.work in ("sft", "distill")
    passes = len(settings.reward_models) if settings.work == "score" else 3
    total = 0.0
    for prompt, responses in make_groups(settings):
        masks = [[trained] * len(response) for response in responses]
        total += forward_flops(config, PromptGroup(prompt, responses, masks))
        total -= 0 if trained else _not_needed_in_the_last_block(config, prompt, responses)
        if settings.work == "distill":  # the teacher's forward, a third of the student's passes
            behind = PromptGroup([*preprompt(settings), *prompt], responses)
            total += forward_flops(config, behind) / passes
    return passes * total


def _not_needed_in_the_last_block(config, prompt: list[int], responses: list[list[int]]) -> float:
    """FLOPs of queries, attention, o-projection and mlp of all rows but each response's last."""
    p, lengths, heads = len(prompt), [len(r) for r in responses], config.num_heads * config.head_dim
    others = p + sum(lengths) - len(lengths)
    pairs = p * (p + 1) / 2 + sum(r * p + r * (r + 1) / 2 - (p + r) for r in lengths)
    linear = 2.0 * others * config.width * (2 * heads + 3 * config.mlp_width)
    return linear + 4.0 * heads * pairs


def timed_run(step, all_steps: list[list[Group]], lr: float, note: str) -> Run:
    """Runs step(groups, lr) -> loss over all steps; the first, with learning rate 0, is not timed."""
    step(all_steps[0], 0.0)
    start, cpu_start = time.perf_counter(), time.process_time()
    losses = [step(groups, lr) for groups in all_steps[1:]]
    return Run(losses, time.perf_counter() - start, time.process_time() - cpu_start, note)


def timed_scores(score, settings: Settings, note: str) -> Run:
    """Runs score(groups) -> scores once on a few groups, which is not timed, and then on all."""
    score(warm_up_groups(settings))
    groups = make_groups(settings)
    start, cpu_start = time.perf_counter(), time.process_time()
    scores = score(groups)
    return Run(scores, time.perf_counter() - start, time.process_time() - cpu_start, note)


def peak_rss_mb() -> float:
    """The most memory this process has held. VmHWM starts anew with each program; ru_maxrss is inherited."""
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) / 1024
    except OSError:
        pass
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


def read_settings(path: str) -> Settings:
    fields = json.loads(Path(path).read_text(encoding="utf-8"))
    return Settings(**fields | {"reward_models": tuple(fields["reward_models"])})


def write_json(path: str | Path, value) -> None:
    text = json.dumps(dataclasses.asdict(value) if dataclasses.is_dataclass(value) else value, indent=1)
    Path(path).write_text(text + "\n", encoding="utf-8")
