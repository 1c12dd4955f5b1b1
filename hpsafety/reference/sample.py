"""Oracle of sample, and THE definition of its arithmetic: every backend repeats it to the bit.

A draw must be the same on any machine, in any batch, order or tiling, so nothing here is left to a library: random
words come from Philox, log and exp from fp32 additions and multiplications (each rounded by itself, never fused) and
integer operations, in the order written; sums are sums of integers, which have no order.

    M       largest logit of the row
    y       (logit - M) * fp32(log2(e) / temperature): 0 for the most likely word, negative for the others; in bits
    mass    round(2^y * 2^40) as int64, half to even: what softmax, top-p and the logprob are made of
    word    t of the vocabulary gets output j = t % 128 // 32 of Philox4x32-10 with the seed as key and the counter
            (position low, position high, t // 128 * 32 + t % 32, 0): one draw per (seed, position, t), whatever V is.
            32 lanes of 4 outputs serve 128 neighbouring words with contiguous loads in a vector unit and in a warp
    noise   -log2(-log2(1 - v)) with v = (word + 1/2) / 2^32: Gumbel noise in bits, but for a constant
    token   the allowed word with the largest y + noise, the lowest index among equals: Gumbel-max, which draws from
            softmax(logits / temperature) over the allowed words (exactly so, but for rounding and the grid of v)

An unlikely word is drawn when its noise is large, that is when v is small. There v has the full precision of a float,
down to 2^-33, so that the noise reaches 33 bits (22.9 nats) and words of probability 1e-9 keep theirs. A uniform number
of 24 bits near 1 would end at 25 (17 nats) and never draw a word below 4e-8, be there ever so many of them.
"""

import math

import torch

ROUND, KEY_STEP = (0xD2511F53, 0xCD9E8D57), (0x9E3779B9, 0xBB67AE85)  # Salmon et al., SC 2011
LOG2_E, LN2 = 1.44269502, 0.693147182
# (log(1 + r) - r) / r^2 on [-1/4, 1/2], to 5e-9 of the logarithm; (2^r - 1) / r on |r| <= 1/2, to 9e-8 of the power
LOG = (
    -0.5,
    0.333334535,
    -0.250000536,
    0.199906066,
    -0.16647768,
    0.144820675,
    -0.13162224,
    0.104482777,
    -0.0449089098,
)
EXP2 = (0.693147004, 0.240222424, 0.0555073358, 0.00967151299, 0.00132647238)
MASS_BITS = 40  # finer than any noise reaches, and 2^23 words still sum below 2^63
MASK = 0xFFFFFFFF


def _horner(x, coefficients):
    value = torch.full_like(x, coefficients[-1])
    for c in reversed(coefficients[:-1]):
        value = value * x + c
    return value


def _log2_1p(r):
    return (r + r * r * _horner(r, LOG)) * LOG2_E


def _log2(x):
    """x normal and positive: x = 2^e (1 + r) with r in [-1/4, 1/2)."""
    bits = x.view(torch.int32)
    e = (bits - 0x3F400000) >> 23
    return e.float() + _log2_1p((bits - (e << 23)).view(torch.float32) - 1.0)


def mass(y):
    """round(2^y 2^40), int64, for y <= 0; 0 from -41 down."""
    y = y.clamp(min=-64.0)
    n = (
        y + 12582912.0
    ) - 12582912.0  # the nearest integer: beside 1.5 * 2^23 a float has no room for a fraction
    power = 1.0 + (y - n) * _horner(y - n, EXP2)
    scaled = (power.view(torch.int32) + ((n.int() + MASS_BITS) << 23)).view(torch.float32)
    return scaled.round().long()


def philox(key, counter):
    """Four int64 tensors of 32-bit words; key: two and counter: four int64 tensors of 32-bit words."""
    (k0, k1), (x0, x1, x2, x3) = key, counter
    for _ in range(10):
        a, b = x0 * ROUND[0], x2 * ROUND[1]  # modulo 2^64: the bits are those of the unsigned product
        x0, x1, x2, x3 = (b >> 32 & MASK) ^ x1 ^ k0, b & MASK, (a >> 32 & MASK) ^ x3 ^ k1, a & MASK
        k0, k1 = k0 + KEY_STEP[0] & MASK, k1 + KEY_STEP[1] & MASK
    return x0, x1, x2, x3


def random_words(seeds, positions, v):
    """(B, V) int64: the 32-bit word of each (seed, position, word of the vocabulary)."""
    blocks = torch.arange((v + 127) // 128 * 32, device=seeds.device).expand(len(seeds), -1)
    low, high = (lambda x: (x & MASK)[:, None].expand_as(blocks)), (lambda x: low(x >> 32))
    counter = (low(positions), high(positions), blocks, torch.zeros_like(blocks))
    words = philox((low(seeds), high(seeds)), counter)
    return torch.stack([w.unflatten(1, (-1, 32)) for w in words], 2).flatten(1)[:, :v]


def noise(words):
    """Of 32-bit words: from 32.47 at 0 to -5.04 at 2^32 - 1; 1 - v is formed where it loses no digit."""
    v, u = ((w.float() + 0.5) * 2.0**-32 for w in (words, MASK - words))
    return -_log2(-torch.where(words < 2**30, _log2_1p(-v), _log2(u)))


def top_p_target(total, top_p):
    """ceil(total * P / 2^31) with P = ceil(top_p * 2^31), in integers below 2^63."""
    p = math.ceil(top_p * 2**31)
    return (total >> 32) * 2 * p + ((total & MASK) * p + 2**31 - 1 >> 31)


def _allowed(x, masses, top_p, top_k):
    order = x.sort(dim=1, descending=True, stable=True).indices
    keep = torch.arange(x.shape[1], device=x.device) < (top_k or x.shape[1])
    kept = masses.gather(1, order) * keep
    before = kept.cumsum(1) - kept
    if top_p < 1.0:
        keep = keep & (before < top_p_target(kept.sum(1, keepdim=True), top_p))
    return torch.zeros_like(x, dtype=torch.bool).scatter(1, order, keep.expand_as(x))


def sample(logits, temperature, top_p, top_k, seeds, positions):
    """One word per row and its log-probability.

    logits      (B, V), any float dtype, taken as fp32; V <= 2^23
    temperature >= 0; 0 takes the largest logit, the lowest index among equals, and logprobs of temperature 1
    top_p       in (0, 1]: of the words that top_k left, the smallest set of most likely ones with that share of their
                mass (top_p in steps of 2^-31, rounded up); equals go by index; at least one word
    top_k       the k most likely words, equals by index; 0: all
    seeds, positions   (B,) int64
    returns     tokens (B,) int64, logprobs (B,) fp32 of the full vocabulary at the temperature
    A row with a NaN or +inf gives the lowest index of one and logprob NaN, a row of -inf alone 0 and NaN.
    """
    x = logits.float() + 0.0  # -0 becomes 0: they are equals
    bad = x.isnan() | (x == torch.inf)
    broken = bad.any(1) | (x == -torch.inf).all(1)
    x = x.masked_fill(broken[:, None], 0.0)
    scale = min(max(math.log2(math.e) / (temperature or 1.0), 2.0**-126), torch.finfo(torch.float32).max)
    y = (x - x.amax(1, keepdim=True)) * torch.tensor(scale, dtype=torch.float32, device=x.device)
    masses = mass(y)
    if temperature == 0:
        tokens = x.argmax(1)
    else:
        scores = y + noise(random_words(seeds, positions, x.shape[1]))
        tokens = scores.masked_fill(~_allowed(x, masses, top_p, top_k), -torch.inf).argmax(1)
    bits = y.gather(1, tokens[:, None])[:, 0] - _log2(masses.sum(1).float() * 2.0**-MASS_BITS)
    return torch.where(broken, bad.int().argmax(1), tokens), (bits * LN2).masked_fill(broken, torch.nan)
