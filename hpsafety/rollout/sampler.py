"""What a run of the engine draws and under which keys: settings, the key of a response, the finished response."""

import math
from dataclasses import dataclass

_MASK = 2**64 - 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """What is drawn (the first seven) and the room it is drawn in (the others, which never change a bit of it).

    Raises ValueError for a value out of range.
    """

    max_new_tokens: int = 64
    temperature: float = 1.0  # 0 is greedy
    top_p: float = 1.0
    top_k: int = 0  # 0: all words
    seed: int = 0
    stop: frozenset[int] = frozenset()  # token ids that end a response
    batch_invariant: bool = False  # compute as training does: logprobs equal model.logprobs to the bit
    max_batch: int = 64  # sequences decoded at once, at most
    kv_memory: int | None = None  # bytes of keys and values; None: a quarter of the memory that is free
    page_size: int = 16  # tokens
    prefill_tokens: int = 2048  # prompt tokens computed at once; a longer prompt goes alone

    def __post_init__(self):
        for name in ("max_new_tokens", "max_batch", "page_size", "prefill_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"generate: {name} must be at least 1, got {getattr(self, name)}")
        if not 0.0 <= self.temperature < math.inf or not 0.0 < self.top_p <= 1.0 or self.top_k < 0:
            raise ValueError(
                "generate: need a finite temperature >= 0, 0 < top_p <= 1, top_k >= 0; got "
                f"{self.temperature}, {self.top_p}, {self.top_k}"
            )


@dataclass(frozen=True, slots=True)
class Rollout:
    """One sampled response. `tokens` includes the stop token when finish is "stop"; `logprobs` are of the full
    vocabulary at the sampling temperature (1 where it is 0), one per token."""

    prompt_index: int
    sample_index: int
    tokens: list[int]
    logprobs: list[float]
    finish: str  # "stop" or "length"


def stop_ids(model) -> frozenset[int]:
    """The model's end-of-turn and eos ids (generation_config)."""
    if model.tokenizer is not None:
        return frozenset(model.tokenizer.stop_ids)
    ids = model.generation.get("eos_token_id")
    return frozenset(() if ids is None else ids if isinstance(ids, list) else (ids,))


def _mix(x: int) -> int:
    """The output step of splitmix64: a bijection of 64-bit integers that changes half of the bits for any one."""
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & _MASK
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB & _MASK
    return x ^ (x >> 31)


def row_seed(seed: int, prompt_index: int, sample_index: int) -> int:
    """The int64 key of one response's draws.

    Each number is added, times splitmix64's odd increment, to the mix of those before it. So the samples of one prompt
    never share a key, nor do the prompts of one seed at the same sample; the rest meet by chance, one pair in 2^64.
    """
    state = seed & _MASK
    for number in (prompt_index, sample_index):
        state = _mix(state) + (number + 1) * 0x9E3779B97F4A7C15 & _MASK
    state = _mix(state)
    return state - 2**64 if state >= 2**63 else state
