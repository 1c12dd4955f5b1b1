"""The keys of generate's draws. The bug this file must catch: two responses of one run that share their noise."""

from hpsafety.rollout.sampler import _mix, row_seed


def test_mix_is_splitmix64():
    """The first outputs of splitmix64 seeded with 0."""
    step = 0x9E3779B97F4A7C15
    outputs = [_mix(step * n % 2**64) for n in (1, 2, 3)]
    assert outputs == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]


def test_row_seeds_are_int64_and_apart():
    """Every (seed, prompt, sample) has its own, also where the numbers are swapped or add up alike."""
    keys = [(s, p, k) for s in (0, 1, 2, -1, 2**63) for p in range(60) for k in range(60)]
    seeds = {row_seed(*key) for key in keys}
    assert len(seeds) == len(keys)
    assert all(-(2**63) <= s < 2**63 for s in seeds)
