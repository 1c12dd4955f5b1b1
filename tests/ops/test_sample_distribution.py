"""sample: random numbers against published vectors, and draws against exact probabilities in fp64, which owe nothing to
the reference or a backend. The bug this file must catch: words that share their noise."""

import importlib
import math

import pytest
import torch

from hpsafety import ops
from tests.ops.test_sample import draws, make_inputs

definition = importlib.import_module("hpsafety.reference.sample")


def exact_probabilities(logits_V, temperature, top_p, top_k):
    """fp64, straight from the contract: top-k, then the smallest leading set of the rest that reaches top_p."""
    p = torch.softmax(logits_V.double() / temperature, 0)
    order = sorted(range(len(p)), key=lambda i: (-float(logits_V[i]), i))[: top_k or len(p)]
    total, mass, kept = float(p[order].sum()), 0.0, []
    for i in order:
        if mass >= top_p * total:
            break
        kept.append(i)
        mass += float(p[i])
    out = torch.zeros_like(p)
    out[kept] = p[kept] / p[kept].sum()
    return out


def chi_square(counts, expected):
    """p-value; cells that expect fewer than ten are put together."""
    counts, expected = counts.double().flatten(), expected.double().flatten()
    small = expected < 10
    counts = torch.cat([counts[~small], counts[small].sum()[None]])
    expected = torch.cat([expected[~small], expected[small].sum()[None]])
    counts, expected = counts[expected > 0], expected[expected > 0]
    statistic = ((counts - expected) ** 2 / expected).sum()
    return float(torch.special.gammaincc(torch.tensor((len(counts) - 1) / 2).double(), statistic / 2))


# ---- random numbers ----


@pytest.mark.parametrize(
    "key, counter, words",
    [
        ((0, 0), (0, 0, 0, 0), "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ((2**32 - 1,) * 2, (2**32 - 1,) * 4, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (
            (0xA4093822, 0x299F31D0),
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ],
)
def test_philox_known_answers(key, counter, words):
    """The vectors that Random123 publishes for philox4x32-10."""
    got = definition.philox([torch.tensor([k]) for k in key], [torch.tensor([c]) for c in counter])
    assert " ".join(f"{int(w):08x}" for w in got) == words


def test_noise_is_gumbel_to_the_end_of_its_tail():
    """Against fp64 at 2^18 words, the outermost among them: the tail is not cut at 24 bits."""
    g = torch.Generator().manual_seed(0)
    words = torch.cat([torch.arange(1000), 2**32 - 1 - torch.arange(1000), 2**30 + torch.arange(-500, 500)])
    words = torch.cat([words, torch.randint(0, 2**32, (2**18,), generator=g)])
    exact = -torch.log2(-torch.log1p(-(words.double() + 0.5) / 2**32) / math.log(2))
    assert float((definition.noise(words) - exact).abs().max()) < 3e-6
    assert float(definition.noise(torch.tensor([0]))) * math.log(2) > 22.5


def test_words_of_neighbours_differ():
    """Every (seed, position, word) has a number of its own, whichever of the three is the neighbour."""
    seeds, positions = torch.tensor([5, 6, 5, 5 + 2**32, 5]), torch.tensor([0, 0, 1, 0, 2**32])
    words = definition.random_words(seeds, positions, 1000)
    assert len(words.unique()) >= 4998  # two of 5000 random words agree once in 300 runs


# ---- the distribution ----

DISTRIBUTIONS = [(1.0, 1.0, 0), (0.8, 1.0, 0), (1.0, 0.9, 0), (1.0, 1.0, 25), (1.2, 0.9, 40)]


def judge_draws(v, settings, n):
    row = make_inputs(1, v, scale=1.5, seed=v)[0][0]
    p = exact_probabilities(row, *settings)
    counts = draws(row, settings, n).bincount(minlength=v)
    assert int(counts[p == 0].sum()) == 0, "drew words outside of the mask"
    assert chi_square(counts, p * n) > 1e-4


@pytest.mark.parametrize("settings", DISTRIBUTIONS)
@pytest.mark.parametrize("v", [50, 300])
def test_draws_follow_the_distribution(settings, v):
    judge_draws(v, settings, 200_000)


@pytest.mark.slow
@pytest.mark.parametrize("settings", DISTRIBUTIONS)
@pytest.mark.parametrize("v", [50, 300, 1000])
def test_five_million_draws_follow_the_distribution(settings, v):
    judge_draws(v, settings, 5_000_000)


@pytest.mark.parametrize("step_seed, step_position", [(1, 0), (0, 1), (2**32, 0), (0, 2**32), (1, 1)])
def test_neighbouring_draws_are_independent(step_seed, step_position):
    """Chi-square over pairs: the draws of two neighbouring keys say nothing about each other."""
    n, v = 300_000, 12
    row = make_inputs(1, v, scale=1.0, seed=7)[0][0]
    seeds, positions = torch.arange(n) % 1000 * 2, torch.arange(n) // 1000 * 2
    rows = row.expand(n, -1)
    first = ops.sample(rows, 1.0, 1.0, 0, seeds, positions, impl="cpu")[0]
    second = ops.sample(rows, 1.0, 1.0, 0, seeds + step_seed, positions + step_position, impl="cpu")[0]
    p = exact_probabilities(row, 1.0, 1.0, 0)
    assert chi_square((first * v + second).bincount(minlength=v * v), torch.outer(p, p) * n) > 1e-4


def test_words_of_one_row_are_independent():
    """A flat row draws each word alike, whether its neighbour sits in the same Philox block, vector or group."""
    n, v = 300_000, 512
    counts = draws(torch.zeros(v), (1.0, 1.0, 0), n).bincount(minlength=v)
    assert chi_square(counts, torch.full((v,), n / v)) > 1e-4
