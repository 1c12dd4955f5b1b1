"""sample. The bugs this file must catch: noise that depends on where the vocabulary is cut (a counter that restarts in
each group of words), and a border of top-k or top-p that is off by one among equals.

The reference defines the arithmetic, so cpu must equal it to the bit. Whether what both draw follows the distribution
is judged in test_sample_distribution.py."""

import importlib
import math
import random

import pytest
import torch

from hpsafety import ops, reference

definition = importlib.import_module("hpsafety.reference.sample")


def make_inputs(b, v, dtype=torch.float32, scale=3.0, seed=0):
    g = torch.Generator().manual_seed(seed)
    logits = (torch.randn(b, v, generator=g) * scale).to(dtype)
    seeds = torch.randint(-(2**63), 2**63 - 1, (b,), generator=g)
    return logits, seeds, torch.randint(0, 2**40, (b,), generator=g)


def both(logits, settings, seeds, positions):
    """(tokens, logprobs) of cpu, after they were found equal to the reference's in every bit."""
    before = reference.calls["sample"]
    ours = ops.sample(logits, *settings, seeds, positions, impl="cpu")
    assert reference.calls["sample"] == before, "the cpu backend of sample called the reference"
    exact = ops.sample(logits, *settings, seeds, positions, impl="reference")
    assert torch.equal(ours[0], exact[0]), settings
    assert torch.equal(ours[1].view(torch.int32), exact[1].view(torch.int32)), settings
    return ours


def draws(logits_V, settings, n, seed=11):
    """n draws from one row: 1000 seeds, or fewer, and as many positions as it takes."""
    index = torch.arange(n)
    rows = logits_V.expand(n, -1)
    return ops.sample(rows, *settings, seed + index % 1000, index // 1000, impl="cpu")[0]


# ---- cpu against the definition ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("b, v", [(0, 5), (1, 1), (3, 127), (2, 128), (2, 129), (1, 4095), (1, 4097)])
@pytest.mark.parametrize(
    "settings", [(1.0, 1.0, 0), (0.7, 0.9, 0), (1.3, 1.0, 50), (1.0, 0.8, 20), (0.0, 1.0, 0)]
)
def test_equals_the_definition(dtype, b, v, settings):
    """KER-2: tokens and logprobs to the bit."""
    logits, seeds, positions = make_inputs(b, v, dtype)
    tokens, logprobs = both(logits, settings, seeds, positions)
    assert tokens.dtype == torch.int64 and logprobs.dtype == torch.float32 and tokens.shape == (b,)


@pytest.mark.parametrize("settings", [(1.0, 1.0, 0), (1.0, 0.9, 0), (1.0, 0.9, 500)])
def test_equals_the_definition_over_a_whole_vocabulary(settings):
    logits, seeds, positions = make_inputs(1, 49_152)
    both(logits, settings, seeds, positions)


@pytest.mark.parametrize("seed", range(60))
def test_ragged_sweep_equals_the_definition(seed):
    """Random sizes, spreads, settings, ties and -inf: every path of the selection."""
    r = random.Random(seed)
    v = r.choice([1, 2, 31, 33, 127, 129, r.randrange(1, 6000)])
    logits, seeds, positions = make_inputs(
        r.choice([1, 2, 5]),
        v,
        r.choice([torch.float32, torch.bfloat16]),
        r.choice([0, 1e-3, 0.3, 3, 30, 1e4]),
        seed,
    )
    if r.random() < 0.3:
        logits = logits.round()
    if r.random() < 0.3:
        logits[torch.rand(logits.shape, generator=torch.Generator().manual_seed(seed)) < 0.5] = -math.inf
        logits[:, r.randrange(v)] = 0.0
    for _ in range(4):
        temperature = r.choice([0.0, 1e-30, 0.1, 1.0, 1.3, 5.0, 1e30])
        top_p, top_k = (
            r.choice([1.0, 1.0, 0.9, 0.5, 0.01, 0.999, 1e-9]),
            r.choice([0, 0, 1, 5, 50, 1000, 10**6]),
        )
        both(logits, (temperature, top_p, top_k), seeds, positions)


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
@pytest.mark.parametrize("scale", [1.0, 5.0, 100.0])
def test_logprobs_are_of_the_full_vocabulary(temperature, scale):
    """At the temperature, before top-k and top-p, within 1e-5 of log_softmax, never above 0."""
    logits, seeds, positions = make_inputs(64, 5003, scale=scale)
    tokens, logprobs = ops.sample(logits, temperature, 0.9, 100, seeds, positions, impl="cpu")
    exact = (logits.double() / temperature).log_softmax(1).gather(1, tokens[:, None])[:, 0]
    assert float((logprobs - exact).abs().max()) < 1e-5 and bool((logprobs <= 0).all())


def test_agrees_with_transformers_on_what_is_allowed():
    """Order of the filters and what they keep: temperature, top-k, top-p, as transformers' own warpers."""
    transformers = pytest.importorskip("transformers")
    logits, _, _ = make_inputs(40, 700, scale=2.0, seed=3)
    x = logits / 0.8
    for top_p, top_k in [(0.9, 0), (1.0, 40), (0.7, 40), (0.3, 5), (0.05, 200)]:
        warped = transformers.TopKLogitsWarper(top_k)(None, x) if top_k else x
        warped = transformers.TopPLogitsWarper(top_p)(None, warped) if top_p < 1 else warped
        masses = definition.mass((x - x.amax(1, keepdim=True)) * definition.LOG2_E)
        assert torch.equal(definition._allowed(x, masses, top_p, top_k), warped.isfinite()), (top_p, top_k)


# ---- what a draw depends on ----


@pytest.mark.parametrize("settings", [(1.0, 1.0, 0), (1.0, 0.9, 0), (0.9, 0.95, 300)])
def test_a_row_depends_on_its_key_alone(settings):
    """Batch, order, words of -inf behind the vocabulary: the same token."""
    logits, seeds, positions = make_inputs(9, 3001)
    whole, logprobs = ops.sample(logits, *settings, seeds, positions, impl="cpu")
    order = torch.randperm(9, generator=torch.Generator().manual_seed(1))
    assert torch.equal(ops.sample(logits[order], *settings, seeds[order], positions[order])[0], whole[order])
    for i in range(9):
        alone = ops.sample(logits[i : i + 1], *settings, seeds[i : i + 1], positions[i : i + 1])
        assert alone[0] == whole[i] and alone[1] == logprobs[i]
    padded = torch.cat([logits, torch.full((9, 777), -math.inf)], 1)
    assert torch.equal(ops.sample(padded, *settings, seeds, positions)[0], whole)


@pytest.mark.parametrize("b", [1, 2, 8])
@pytest.mark.parametrize("settings", [(1.0, 1.0, 0), (1.0, 0.9, 0), (1.0, 1.0, 50), (0.0, 1.0, 0)])
def test_threads_and_repeats_change_no_bit(b, settings):
    """1, 2 and 3 threads, over rows and within one; 100 repeats."""
    logits, seeds, positions = make_inputs(b, 20_001)
    threads, first = torch.get_num_threads(), None
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            for _ in range(100 if n == 2 and settings[1] < 1 else 5):
                out = ops.sample(logits, *settings, seeds, positions, impl="cpu")
                first = first or out
                assert torch.equal(out[0], first[0]) and torch.equal(out[1], first[1]), n
    finally:
        torch.set_num_threads(threads)


def test_strides():
    """Rows any distance apart, one row many times, columns apart, seeds apart."""
    logits, seeds, positions = make_inputs(6, 400)
    plain = ops.sample(logits, 1.0, 0.9, 0, seeds, positions, impl="cpu")
    wide = torch.randn(6, 1000)
    wide[:, 100:500] = logits
    apart = torch.stack([seeds, positions], 1)
    for view in (wide[:, 100:500], logits.t().contiguous().t()):
        out = ops.sample(view, 1.0, 0.9, 0, apart[:, 0], apart[:, 1], impl="cpu")
        assert torch.equal(out[0], both(view.contiguous(), (1.0, 0.9, 0), seeds, positions)[0])
    assert torch.equal(ops.sample(wide[:, 100:500], 1.0, 0.9, 0, seeds, positions)[0], plain[0])
    same = ops.sample(logits[:1].expand(6, -1), 1.0, 1.0, 0, seeds, positions, impl="cpu")[0]
    assert torch.equal(same, both(logits[:1].repeat(6, 1), (1.0, 1.0, 0), seeds, positions)[0])


def test_offsets_past_two_to_the_31():
    """Rows 2^31 + 7 elements apart, read in place: a copy, or an offset in 32 bits, would not get here."""
    stride, v = 2**31 + 7, 300
    try:
        huge = torch.empty(stride + v, dtype=torch.bfloat16)
    except RuntimeError:
        pytest.skip("4.3 GB of address space cannot be reserved")
    logits, seeds, positions = make_inputs(2, v, torch.bfloat16)
    view = huge.as_strided((2, v), (stride, 1))
    view.copy_(logits)
    assert torch.equal(
        ops.sample(view, 1.0, 0.9, 0, seeds, positions, impl="cpu")[0],
        ops.sample(logits, 1.0, 0.9, 0, seeds, positions, impl="cpu")[0],
    )


# ---- edges of the contract ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_greedy_takes_the_lowest_of_the_largest(dtype):
    logits, seeds, positions = make_inputs(20, 1000, dtype)
    logits = logits.round()  # many ties
    logits[0], logits[0, 5] = -0.0, 0.0  # equals all
    tokens, logprobs = both(logits, (0.0, 0.5, 3), seeds, positions)
    assert torch.equal(tokens, logits.argmax(1)) and tokens[0] == 0
    exact = logits.double().log_softmax(1).amax(1)  # of temperature 1
    assert float((logprobs - exact).abs().max()) < 1e-5


@pytest.mark.parametrize(
    "settings, allowed", [((1.0, 1.0, 3), 3), ((1.0, 0.5, 0), 100), ((1.0, 0.5, 8), 4), ((1.0, 1e-12, 0), 1)]
)
def test_ties_at_the_border_go_by_index(settings, allowed):
    """Equal words: exactly k of them, and no more of them than top_p needs; -0 equals 0."""
    row = torch.zeros(200)
    row[::2] = -0.0
    drawn = draws(row, settings, 5000).unique()
    assert torch.equal(drawn, torch.arange(allowed))


def test_equal_scores_go_to_the_lowest_index():
    """Two words, of two groups, whose logits undo the difference of their noise to the bit."""
    seeds, positions, pair = torch.full((64,), 5), torch.arange(64), torch.tensor([3, 200])
    noise = definition.noise(definition.random_words(seeds, positions, 256))[:, pair]
    least = noise.amin(1, keepdim=True)
    logits = torch.full((64, 256), -torch.inf)
    logits[:, pair] = least - noise
    equal = (logits[:, pair] + noise == least).all(1)
    assert equal.sum() > 16
    temperature = math.log2(math.e)  # so that the logits are in bits already
    tokens, _ = both(logits[equal], (temperature, 1.0, 0), seeds[equal], positions[equal])
    assert (tokens == 3).all()


def test_top_p_takes_one_word_more_only_when_it_must():
    """Masses 1/2, 1/4, 1/8, 1/8: a share that is reached exactly needs no further word."""
    row = torch.log(torch.tensor([0.125, 0.5, 0.125, 0.25]))
    for top_p, words in [
        (0.5, [1]),
        (0.75, [1, 3]),
        (0.7501, [0, 1, 3]),
        (0.875, [0, 1, 3]),
        (0.8751, [0, 1, 2, 3]),
    ]:
        assert draws(row, (1.0, top_p, 0), 3000).unique().tolist() == words, top_p


@pytest.mark.parametrize("impl", ["cpu", "reference"])
def test_rows_without_a_softmax(impl):
    """NaN or +inf: the lowest index of one; -inf alone: 0; logprob NaN, and the other rows as if alone."""
    logits, seeds, positions = make_inputs(6, 300)
    logits[1, 200], logits[1, 250] = math.nan, math.inf
    logits[2, 140] = math.inf
    logits[3] = -math.inf
    logits[4, 299] = math.nan
    for settings in [(1.0, 1.0, 0), (1.0, 0.9, 10), (0.0, 1.0, 0)]:
        tokens, logprobs = ops.sample(logits, *settings, seeds, positions, impl=impl)
        assert tokens[1:5].tolist() == [200, 140, 0, 299]
        assert logprobs.isnan().tolist() == [False, True, True, True, True, False]
        clean = ops.sample(logits[[0, 5]], *settings, seeds[[0, 5]], positions[[0, 5]], impl=impl)
        assert torch.equal(tokens[[0, 5]], clean[0]) and torch.equal(logprobs[[0, 5]], clean[1])


def test_words_of_minus_infinity_are_never_drawn():
    row = torch.full((300,), -math.inf)
    row[[3, 130, 299]] = torch.tensor([0.0, -1.0, -20.0])
    for settings in [(1.0, 1.0, 0), (1.0, 0.999999, 0), (1.0, 1.0, 200), (1e6, 1.0, 0)]:
        assert set(draws(row, settings, 2000).tolist()) <= {3, 130, 299}


def test_default_backend():
    logits, seeds, positions = make_inputs(2, 40)
    before = reference.calls["sample"]
    default = ops.sample(logits, 1.0, 1.0, 0, seeds, positions)
    assert reference.calls["sample"] == before
    forced = ops.sample(logits.requires_grad_(), 1.0, 1.0, 0, seeds, positions, impl="reference")
    assert reference.calls["sample"] == before + 1 and torch.equal(default[0], forced[0])
    assert not forced[1].requires_grad
    assert not ops.sample(logits, 1.0, 1.0, 0, seeds, positions, impl="cpu")[1].requires_grad


def test_opcheck():
    logits, seeds, positions = make_inputs(3, 200)
    eager = ops.sample(logits, 0.9, 0.8, 20, seeds, positions, impl="cpu")  # loads the kernels
    args = (logits, 0.9, 0.8, 20, seeds, positions, "cpu")
    torch.library.opcheck(torch.ops.hpsafety.sample.default, args)
    assert torch.equal(torch.ops.hpsafety.sample(*args)[0], eager[0])


@pytest.mark.slow
def test_compile():
    logits, seeds, positions = make_inputs(3, 200)
    compiled = torch.compile(lambda *args: ops.sample(*args, impl="cpu"), fullgraph=True)
    ours, plain = (f(logits, 0.9, 0.8, 20, seeds, positions) for f in (compiled, ops.sample))
    assert torch.equal(ours[0], plain[0]) and torch.equal(ours[1], plain[1])


@pytest.mark.parametrize(
    "change, message",
    [
        ({"logits": torch.zeros(3)}, r"logits must be \(B, V\)"),
        ({"logits": torch.zeros(3, 5, dtype=torch.float64)}, "float32 or bfloat16, got .* torch.float64"),
        ({"logits": torch.zeros(3, 0)}, r"1 to 2\^23 columns, got shape \(3, 0\)"),
        ({"logits": torch.zeros(3, 1).expand(3, 2**23 + 1)}, r"1 to 2\^23 columns"),
        ({"seeds": torch.zeros(2, dtype=torch.int64)}, r"seeds must be \(3,\) int64 on cpu, got \(2,\)"),
        ({"seeds": torch.zeros(3, dtype=torch.int32)}, "seeds must be .* torch.int32"),
        ({"positions": torch.zeros(3, 1, dtype=torch.int64)}, r"positions must be .* got \(3, 1\)"),
        ({"positions": torch.tensor([0, -2, 1])}, "positions must be >= 0, got -2"),
        ({"temperature": -1.0}, "temperature must be a finite number >= 0, got -1.0"),
        ({"temperature": math.nan}, "temperature must be"),
        ({"temperature": math.inf}, "temperature must be"),
        ({"top_p": 0.0}, r"top_p must lie in \(0, 1\], got 0.0"),
        ({"top_p": 1.5}, "top_p must lie in"),
        ({"top_p": math.nan}, "top_p must lie in"),
        ({"top_k": -1}, "top_k must be an integer >= 0"),
        ({"top_k": 2.5}, "top_k must be an integer >= 0"),
    ],
)
def test_bad_arguments(change, message):
    numbers = torch.zeros(3, dtype=torch.int64)
    args = {"logits": torch.zeros(3, 5), "temperature": 1.0, "top_p": 1.0, "top_k": 0, "seeds": numbers}
    with pytest.raises(ValueError, match=message):
        ops.sample(**({**args, "positions": numbers} | change))


def test_kernel_refuses_what_it_would_read_past():
    """A compiled graph skips the checks in Python."""
    numbers = torch.zeros(3, dtype=torch.int64)
    with pytest.raises(ValueError, match="one seed and one position per row"):
        torch.ops.hpsafety.sample(torch.zeros(3, 8), 1.0, 1.0, 0, numbers[:2], numbers, "cpu")
    with pytest.raises(ValueError, match="columns"):
        torch.ops.hpsafety.sample(torch.zeros(3, 0), 1.0, 1.0, 0, numbers, numbers, "cpu")
