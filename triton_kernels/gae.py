"""gae: a program for each response, from its last token back in blocks, each a scan in fp64. Limit: bytes, 16 a token.

A token maps what comes after it, A, to delta + c A with c = gamma lam; such maps compose, which is what is scanned.
Where the blocks lie depends on the response's length alone, so that it has the same bits in every batch.
"""

import torch
import triton
import triton.language as tl

from hpsafety.triton_kernels.launch import launch

SHARED_BYTES = (2048, 2048)  # a block's at most, on sm_80 and on sm_90
BLOCK = 512  # tokens at a time


@triton.jit
def _compose(later_factor, later, factor, delta):
    return later_factor * factor, delta + factor * later


@triton.jit
def gae_responses(
    rewards_ptr, values_ptr, offsets_ptr, advantages_ptr, returns_ptr, gamma: tl.float64, decay: tl.float64,
    BLOCK: tl.constexpr,
):  # fmt: skip
    response = tl.program_id(0).to(tl.int64)
    begin = tl.load(offsets_ptr + response).to(tl.int64)
    end = tl.load(offsets_ptr + response + 1).to(tl.int64)
    lane = tl.arange(0, BLOCK)
    next_advantage = tl.full([], 0.0, tl.float64)
    next_value = tl.full([], 0.0, tl.float32)
    for done in range(0, end - begin, BLOCK):
        at = end - done - BLOCK + lane  # the last token ends a block; what stands before the first is masked
        inside = at >= begin
        r = tl.load(rewards_ptr + at, mask=inside, other=0.0).to(tl.float32).to(tl.float64)
        v = tl.load(values_ptr + at, mask=inside, other=0.0).to(tl.float32)
        after = tl.gather(v, tl.minimum(lane + 1, BLOCK - 1), 0)  # out of registers: values are read once
        after = tl.where(lane == BLOCK - 1, next_value, after)
        wide = v.to(tl.float64)
        delta = tl.where(inside, r + gamma * after.to(tl.float64) - wide, 0.0)
        factor = tl.zeros([BLOCK], tl.float64) + decay
        power, advantage = tl.associative_scan((factor, delta), 0, _compose, reverse=True)
        advantage += power * next_advantage
        tl.store(advantages_ptr + at, advantage.to(tl.float32), mask=inside)
        tl.store(returns_ptr + at, (advantage + wide).to(tl.float32), mask=inside)
        next_advantage = tl.sum(tl.where(lane == 0, advantage, 0.0), 0)
        next_value = tl.sum(tl.where(lane == 0, v, 0.0), 0)


def gae(rewards, values, cu_responses, gamma, lam):
    """(advantages, returns), fp32; arguments as in hpsafety::gae."""
    n = rewards.shape[0]
    advantages, returns = (rewards.new_empty(n, dtype=torch.float32) for _ in range(2))
    launch(
        gae_responses, cu_responses.shape[0] - 1, rewards.contiguous(), values.contiguous(),
        cu_responses.contiguous(), advantages, returns, gamma, gamma * lam, BLOCK=BLOCK,
    )  # fmt: skip
    return advantages, returns
