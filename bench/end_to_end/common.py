"""What all contenders share: settings, data, the strictly needed FLOPs, timing and peak memory."""

import dataclasses
import json
import resource
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

# The Llama 2 paper's optimiser constants; weight decay acts on matrices and embeddings, not on norms.
BETAS, EPS, WEIGHT_DECAY, MAX_NORM = (0.9, 0.95), 1e-5, 0.1, 1.0
PROMPT_TOKENS, RESPONSE_TOKENS = (16, 512), (8, 512)

Pair = tuple[list[int], list[int]]  # token ids of a prompt and of its response


@dataclass(frozen=True)
class Settings:
    """One benchmark: model is a Hugging Face directory; the micro-batch budgets change speed and memory only."""

    model: str
    pairs: int = 256
    batch: int = 32
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
    """One run of one contender. losses: one per timed step, the first before any update."""

    losses: list[float]
    seconds: float
    cpu_seconds: float
    note: str  # the settings that matter for this contender's speed


def make_pairs(settings: Settings) -> list[Pair]:
    """Seeded random token ids with long-tailed (log-normal, clipped) lengths; the ids do not matter for speed."""
    rng = np.random.default_rng(settings.seed)
    vocab = settings.config["vocab_size"]
    prompts = _lengths(rng, 48, PROMPT_TOKENS, settings.pairs)
    responses = _lengths(rng, 40, RESPONSE_TOKENS, settings.pairs)
    return [(_ids(rng, vocab, p), _ids(rng, vocab, r)) for p, r in zip(prompts, responses, strict=True)]


def _lengths(rng, median: int, limits: tuple[int, int], count: int) -> np.ndarray:
    return np.clip(rng.lognormal(np.log(median), 1.0, count).astype(int), *limits)


def _ids(rng, vocab: int, count: int) -> list[int]:
    return rng.integers(vocab // 8, vocab, count).tolist()  # the first ids are special tokens and bytes


def warm_up_pairs(settings: Settings) -> list[Pair]:
    """One step of the shortest pairs: it allocates gradients and optimiser state and runs with learning rate 0."""
    rng = np.random.default_rng(settings.seed + 1)
    vocab = settings.config["vocab_size"]
    return [
        (_ids(rng, vocab, PROMPT_TOKENS[0]), _ids(rng, vocab, RESPONSE_TOKENS[0]))
        for _ in range(settings.batch)
    ]


def steps(settings: Settings) -> list[list[Pair]]:
    """The warm-up step, then the data in order, `batch` pairs a step."""
    pairs = make_pairs(settings)
    timed = [pairs[i : i + settings.batch] for i in range(0, len(pairs), settings.batch)]
    return [warm_up_pairs(settings), *timed]


def count_tokens(pairs: list[Pair]) -> int:
    return sum(len(prompt) + len(response) for prompt, response in pairs)


def needed_flops(settings: Settings) -> float:
    """Strictly needed FLOPs of the timed steps: 3 x forward, nothing recomputed, nothing padded.

    Forward: linear layers once per token, attention's causal pairs, the head on response tokens only.
    """
    from hpsafety import PromptGroup
    from hpsafety.model.config import from_hf
    from hpsafety.train.work import forward_flops

    config = from_hf(settings.config)
    return 3 * sum(forward_flops(config, PromptGroup(p, [r])) for p, r in make_pairs(settings))


def timed_run(step, all_steps: list[list[Pair]], lr: float, note: str) -> Run:
    """Runs step(pairs, lr) -> loss over all steps; the first, with learning rate 0, is not timed."""
    step(all_steps[0], 0.0)
    start, cpu_start = time.perf_counter(), time.process_time()
    losses = [step(pairs, lr) for pairs in all_steps[1:]]
    return Run(losses, time.perf_counter() - start, time.process_time() - cpu_start, note)


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
    return Settings(**json.loads(Path(path).read_text(encoding="utf-8")))


def write_json(path: str | Path, value) -> None:
    text = json.dumps(dataclasses.asdict(value) if dataclasses.is_dataclass(value) else value, indent=1)
    Path(path).write_text(text + "\n", encoding="utf-8")
