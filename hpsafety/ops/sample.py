"""sample: contract, checks and backends. The arithmetic is defined in hpsafety/reference/sample.py."""

import math

import torch

from hpsafety import reference
from hpsafety.ops import backends
from hpsafety.ops.registration import Op, check
from hpsafety.ops.rows import values_readable

BACKENDS = ("cpu", "triton", "cuda")
MAX_WORDS = 1 << 23  # masses are integers of up to 2^40 that must sum below 2^63


def _fake(logits, temperature, top_p, top_k, seeds, positions):
    b = logits.shape[0]
    return logits.new_empty(b, dtype=torch.int64), logits.new_empty(b, dtype=torch.float32)


_op = Op(
    "sample",
    "(Tensor logits, float temperature, float top_p, int top_k, Tensor seeds, Tensor positions) -> (Tensor, Tensor)",
    {
        "cpu": lambda *args: backends.cpu().sample(*args),
        "triton": lambda *args: backends.triton("sample").sample(*args),
        "cuda": lambda *args: backends.cuda("sample").sample(*args),
    },
    _fake,
)


def _check(logits, temperature, top_p, top_k, seeds, positions):
    check(
        logits.dim() == 2 and logits.dtype in (torch.float32, torch.bfloat16),
        "sample: logits must be (B, V) float32 or bfloat16, got {} {}", tuple(logits.shape), logits.dtype,
    )  # fmt: skip
    b, v = logits.shape
    check(
        0 < v <= MAX_WORDS or b == 0, "sample: logits must have 1 to 2^23 columns, got shape ({}, {})", b, v
    )
    for name, x in (("seeds", seeds), ("positions", positions)):
        check(
            x.shape == (b,) and x.dtype == torch.int64 and x.device == logits.device,
            "sample: {} must be ({},) int64 on {}, got {} {} on {}",
            name, b, logits.device, tuple(x.shape), x.dtype, x.device,
        )  # fmt: skip
    check(
        0 <= temperature < math.inf, "sample: temperature must be a finite number >= 0, got {}", temperature
    )
    check(0 < top_p <= 1, "sample: top_p must lie in (0, 1], got {}", top_p)
    check(
        top_k >= 0 and top_k == int(top_k),
        "sample: top_k must be an integer >= 0 (0: all words), got {}",
        top_k,
    )
    if b and values_readable(positions):
        lowest = int(positions.min())
        check(lowest >= 0, "sample: positions must be >= 0, got {}", lowest)


def sample(logits, temperature, top_p, top_k, seeds, positions, *, impl=None):
    """One word per row from softmax(logits / temperature) under top-k, then top-p; and its log-probability.

    logits       (B, V) fp32 or bf16, V <= 2^23; rows may be any distance apart (other column strides are copied)
    temperature  float >= 0; 0 is greedy: the largest logit, the lowest index among equals
    top_p        float in (0, 1]; 1 is off. Of the words that top-k left, renormalised, the smallest set of most likely
                 ones whose probability reaches top_p; equals go by index; at least one word
    top_k        int >= 0; 0 is off. Exactly the k most likely words, equals by index
    seeds        (B,) int64, any value
    positions    (B,) int64 >= 0, of the new token in its sequence
    returns      (tokens (B,) int64, logprobs (B,) fp32 <= 0)

    Logprobs are of the full vocabulary at the temperature (1 where it is 0), before top-k and top-p, within 1e-5 of
    log_softmax. The noise of a word depends on (seed, position, word) alone: a row draws the same token in any batch,
    with words of -inf added at the end of the vocabulary, and with any number of threads; and every backend draws the
    same tokens, and returns the same bits of the logprobs. Words of -inf are never drawn.
    A row with a NaN or +inf gives the lowest index of one and logprob NaN; a row of -inf alone gives 0 and NaN.
    Saves nothing and has no gradient. Raises ValueError on shapes, dtypes and settings that do not fit.
    """
    _check(logits, temperature, top_p, top_k, seeds, positions)
    impl = backends.resolve("sample", impl, BACKENDS, logits.device.type)
    args = (logits.detach(), float(temperature), float(top_p), int(top_k), seeds, positions)
    return reference.sample(*args) if impl == "reference" else _op(*args, impl)
