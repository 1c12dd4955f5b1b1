"""The arithmetic of sample, as hpsafety/reference/sample.py defines it: noise from Philox, log, and exp in fixed point.

Every backend computes these bits: fp32 additions and multiplications, each rounded by itself and in this order (every
launch of a kernel that calls them has fp_fusion=False), and integers.
"""

import triton
import triton.language as tl

MASS_BITS = tl.constexpr(40)
LOG2_E = tl.constexpr(1.44269502)
SLICES_PER_BIT = tl.constexpr(0.625)  # the last slice takes what is 24 bits and more below the maximum


@triton.jit
def log2_1p(r):
    q = r * -0.0449089098 + 0.104482777
    q = q * r + -0.13162224
    q = q * r + 0.144820675
    q = q * r + -0.16647768
    q = q * r + 0.199906066
    q = q * r + -0.250000536
    q = q * r + 0.333334535
    q = q * r + -0.5
    return (r + r * r * q) * LOG2_E


@triton.jit
def log2_of(x):
    """x normal and positive: x = 2^e (1 + r) with r in [-1/4, 1/2)."""
    bits = x.to(tl.int32, bitcast=True)
    e = (bits - 0x3F400000) >> 23
    return e.to(tl.float32) + log2_1p((bits - (e << 23)).to(tl.float32, bitcast=True) - 1.0)


@triton.jit
def noise_of(word):
    """Of uint32 words."""
    v = (word.to(tl.float32) + 0.5) * 2.3283064365386963e-10
    u = ((word ^ 0xFFFFFFFF).to(tl.float32) + 0.5) * 2.3283064365386963e-10
    return -log2_of(-tl.where(word < 1073741824, log2_1p(-v), log2_of(u)))


@triton.jit
def mass_of(y):
    """round(2^y 2^40) as int64, half to even."""
    y = tl.maximum(y, -64.0)
    n = (y + 12582912.0) - 12582912.0
    r = y - n
    q = r * 0.00132647238 + 0.00967151299
    q = q * r + 0.0555073358
    q = q * r + 0.240222424
    q = q * r + 0.693147004
    power = (1.0 + r * q).to(tl.int32, bitcast=True)
    scaled = (power + ((n.to(tl.int32) + MASS_BITS) << 23)).to(tl.float32, bitcast=True)
    # from 2^23 on a float is an integer; below, adding 2^23 leaves no room for a fraction
    return tl.where(scaled < 8388608.0, (scaled + 8388608.0) - 8388608.0, scaled).to(tl.int64)


@triton.jit
def philox(seed, position, block):
    """Philox4x32-10: four tensors of uint32 words. seed, position: int64 scalars; block: uint32 counters."""
    k0, k1 = seed.to(tl.uint32), (seed >> 32).to(tl.uint32)
    x0 = tl.zeros_like(block) + position.to(tl.uint32)
    x1 = tl.zeros_like(block) + (position >> 32).to(tl.uint32)
    x2, x3 = block, tl.zeros_like(block)
    for _ in tl.static_range(10):
        a = x0.to(tl.uint64) * 0xD2511F53
        b = x2.to(tl.uint64) * 0xCD9E8D57
        x0, x1 = (b >> 32).to(tl.uint32) ^ x1 ^ k0, b.to(tl.uint32)
        x2, x3 = (a >> 32).to(tl.uint32) ^ x3 ^ k1, a.to(tl.uint32)
        k0 = (k0.to(tl.uint64) + 0x9E3779B9).to(tl.uint32)
        k1 = (k1.to(tl.uint64) + 0xBB67AE85).to(tl.uint32)
    return x0, x1, x2, x3


@triton.jit
def key_of(x):
    """Integers in the order of the floats; x is no NaN and no -0."""
    bits = x.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def slice_of(y):
    return tl.minimum(y * -SLICES_PER_BIT, 15.0).to(tl.int32)


@triton.jit
def top_p_target(total, top_p):
    """ceil(total * top_p / 2^31), below 2^63 throughout."""
    return (total >> 32) * 2 * top_p + (((total & 0xFFFFFFFF) * top_p + 2147483647) >> 31)
