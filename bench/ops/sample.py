"""sample: one word per row and its logprob, from logits that stand in memory."""

import torch

from bench.ops.case import Case
from hpsafety import ops, reference
from hpsafety.ops.sample import BACKENDS

# top_p in percent, 100 is off; top_k 0 is off
SHAPES = (
    {"B": 16, "V": 49152, "top_p": 100, "top_k": 0},  # smollm2, PPO's rollouts
    {"B": 16, "V": 49152, "top_p": 90, "top_k": 0},
    {"B": 16, "V": 49152, "top_p": 90, "top_k": 50},
    {"B": 64, "V": 128256, "top_p": 100, "top_k": 0},  # Llama 3
    {"B": 64, "V": 128256, "top_p": 90, "top_k": 0},
)
# With one word allowed, every sampler must find the same one, whatever its random numbers
CHECK = {"B": 5, "V": 1003, "top_p": 90, "top_k": 1}
DIRECTIONS = ("forward",)
TEMPERATURE = 0.8


def _kept(scaled, top_p, top_k):
    """Masked by top-k, then top-p, through a sort of the whole vocabulary: what transformers' generate does."""
    if top_k:
        scaled = scaled.masked_fill(scaled < scaled.topk(top_k, 1).values[:, -1:], -torch.inf)
    if top_p < 1:
        values, order = scaled.sort(dim=1, descending=True)
        p = values.softmax(1)
        values = values.masked_fill(p.cumsum(1) - p >= top_p, -torch.inf)
        scaled = torch.full_like(scaled, -torch.inf).scatter(1, order, values)
    return scaled


def _torch(logits, top_p, top_k, draw):
    scaled = logits.float() / TEMPERATURE
    tokens = draw(_kept(scaled, top_p, top_k).softmax(1))
    return tokens, scaled.log_softmax(1).gather(1, tokens[:, None])[:, 0]


def case(shape, dtype, device, direction, seed=0):
    b, v, top_p, top_k = shape["B"], shape["V"], shape["top_p"] / 100, shape["top_k"]
    generator = torch.Generator(device).manual_seed(seed)
    logits = torch.randn(b, v, generator=generator, device=device) * 3
    logits.scatter_add_(
        1, logits.argmax(1, keepdim=True), logits.new_ones(b, 1)
    )  # no ties at the top in bf16
    logits = logits.to(dtype)
    seeds, positions = torch.arange(2 * b, device=device).view(2, b)
    settings = (TEMPERATURE, top_p, top_k)

    def exact():
        tokens = reference.sample(logits, *settings, seeds, positions)[0]
        logprobs = (logits.double() / TEMPERATURE).log_softmax(1).gather(1, tokens[:, None])[:, 0]
        return tokens, logprobs

    multinomial, race = (
        lambda p: p.multinomial(1)[:, 0],
        lambda p: (p / torch.empty_like(p).exponential_()).argmax(1),
    )
    return Case(
        op="sample",
        shape=shape,
        dtype=dtype,
        device=device,
        direction=direction,
        run=lambda impl: ops.sample(logits, *settings, seeds, positions, impl=impl),
        impls=BACKENDS,
        peers={
            "torch multinomial": lambda: _torch(logits, top_p, top_k, multinomial),
            "torch exponential race": lambda: _torch(logits, top_p, top_k, race),
        },
        exact=exact,
        flops=0.0,
        bytes=logits.numel() * logits.element_size() + b * (8 + 8 + 8 + 4),
        note="bound by Philox and the fixed-point exp, not by bytes; normal logits of spread 3",
    )
