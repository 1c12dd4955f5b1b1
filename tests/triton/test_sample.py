"""sample in Triton. The bugs this file must catch: a bit of the arithmetic that differs from the definition; noise or a
border that depends on where chunks begin; a border that is off by one among equals.

cpu equals the definition to the bit (tests/ops/test_sample.py), so Triton must equal cpu."""

import importlib
import math
import random

import pytest
import torch
import triton
import triton.language as tl
from torch._subclasses.fake_tensor import FakeTensorMode

from hpsafety import ops, reference
from hpsafety.triton_kernels import launch
from hpsafety.triton_kernels import sample as kernels
from hpsafety.triton_kernels import sample_arithmetic as arithmetic
from tests.ops.test_sample import make_inputs
from tests.triton.audit import audit
from tests.triton.device import DEVICE

definition = importlib.import_module("hpsafety.reference.sample")
DTYPES = [torch.float32, torch.bfloat16]
ALL_SETTINGS = [(1.0, 1.0, 0), (0.7, 0.9, 0), (1.3, 1.0, 50), (1.0, 0.8, 20), (0.0, 1.0, 0)]


def draw(logits, settings, seeds, positions):
    there = (x.to(DEVICE) for x in (seeds, positions))
    return tuple(x.cpu() for x in ops.sample(logits.to(DEVICE), *settings, *there, impl="triton"))


def both(logits, settings, seeds, positions):
    """(tokens, logprobs), after they were found equal to cpu's in every bit."""
    before = reference.calls["sample"]
    ours = draw(logits, settings, seeds, positions)
    assert reference.calls["sample"] == before, "the triton backend of sample called the reference"
    exact = ops.sample(logits, *settings, seeds, positions, impl="cpu")
    assert torch.equal(ours[0], exact[0]), settings
    assert torch.equal(ours[1].view(torch.int32), exact[1].view(torch.int32)), settings
    return ours


@pytest.fixture
def small(monkeypatch):
    """Chunks of 256 words, and lists that a few hundred words do not fit into."""
    monkeypatch.setattr(kernels, "_chunk", lambda: 256)
    monkeypatch.setattr(kernels, "LIST", 128)


# ---- the arithmetic ----


@triton.jit
def _arithmetic(y_ptr, word_ptr, mass_ptr, noise_ptr, N: tl.constexpr):
    at = tl.arange(0, N)
    tl.store(mass_ptr + at, arithmetic.mass_of(tl.load(y_ptr + at)))
    tl.store(noise_ptr + at, arithmetic.noise_of(tl.load(word_ptr + at).to(tl.uint32)))


def test_masses_and_noise_are_the_definitions():
    """Over exponents, ends and halves: masses that end in .5 go to the even one."""
    g = torch.Generator().manual_seed(0)
    words = torch.randint(0, 2**32, (8192,), generator=g) >> torch.randint(0, 32, (8192,), generator=g)
    words[:4] = torch.tensor([0, 2**30 - 1, 2**30, 2**32 - 1])
    y = -torch.rand(8192, generator=g) * 2.0 ** torch.randint(-12, 8, (8192,), generator=g)
    y[:6] = torch.tensor([0.0, -40.0, -41.0, -torch.inf, -17.5, -3e38])
    y[6:4000] = -17 - torch.rand(3994, generator=g)  # masses below 2^23, some of which end in .5
    masses, noise = torch.empty(8192, dtype=torch.int64, device=DEVICE), torch.empty(8192, device=DEVICE)
    launch.launch(_arithmetic, 1, y.to(DEVICE), words.to(DEVICE), masses, noise, N=8192, fp_fusion=False)
    assert torch.equal(masses.cpu(), definition.mass(y))
    assert torch.equal(noise.cpu(), definition.noise(words))


# ---- tokens and logprobs ----


@pytest.mark.parametrize("b, v, settings", [
    *((1, 257, settings) for settings in ALL_SETTINGS), *((1, 1, settings) for settings in ALL_SETTINGS[:4]),
    (0, 5, ALL_SETTINGS[3]), (1, 256, ALL_SETTINGS[2]), (1, 1000, ALL_SETTINGS[0]),
])  # fmt: skip
def test_equals_cpu(small, b, v, settings):
    for dtype in DTYPES:
        tokens, logprobs = both(*_around(make_inputs(b, v, dtype), settings))
    assert tokens.dtype == torch.int64 and logprobs.dtype == torch.float32 and tokens.shape == (b,)


def _around(inputs, settings):
    logits, seeds, positions = inputs
    return logits, settings, seeds, positions


@pytest.mark.parametrize("settings", [(1.0, 1.0, 0), (1.0, 0.9, 500)])
def test_equals_cpu_over_a_whole_vocabulary(settings):
    """The shipped chunks: 12 of them."""
    both(*_around(make_inputs(1, 49_152), settings))


def allowed_words(logits, settings, monkeypatch):
    """(B, V) bool: what the borders that the kernels found allow."""
    found = []

    def watch(kernel, programs, *arguments, **constants):
        launch.launch(kernel, programs, *arguments, **constants)
        if kernel is kernels.find_border:
            found.append(arguments[7].cpu())

    monkeypatch.setattr(kernels, "launch", watch)
    draw(logits, settings, *(torch.zeros(len(logits), dtype=torch.int64),) * 2)
    key, word = found[-1][:, :1], found[-1][:, 1:]
    bits = (logits.float() + 0.0).view(torch.int32)
    keys = bits ^ (bits >> 31 & 0x7FFFFFFF)
    return (keys > key) | (keys == key) & (torch.arange(logits.shape[1]) <= word)


@pytest.mark.parametrize("settings", [(1.0, 0.9, 0), (1.0, 1.0, 50), (1.0, 0.8, 20), (1.0, 1e-9, 0)])
@pytest.mark.parametrize("ties", [False, True])
def test_borders_are_the_definitions(small, monkeypatch, settings, ties):
    """Every word, also those that are hardly ever drawn."""
    logits, _, _ = make_inputs(1, 400)
    logits = logits.round() if ties else logits
    scale = torch.tensor(math.log2(math.e), dtype=torch.float32)
    masses = definition.mass((logits - logits.amax(1, keepdim=True)) * scale)
    wanted = definition._allowed(logits + 0.0, masses, *settings[1:])
    assert torch.equal(allowed_words(logits, settings, monkeypatch), wanted)


def test_slices_beyond_the_list_and_the_last_slice(small, monkeypatch):
    """A border among 700 words of one slice, looked at in steps; and one below the 24 bits that slices tell apart."""
    monkeypatch.setattr(kernels, "BLOCK", 512)
    flat, seeds, positions = make_inputs(1, 900, scale=0.02)
    both(flat, (1.0, 0.7, 333), seeds, positions)
    steep, seeds, positions = make_inputs(1, 700, scale=30.0)
    both(steep, (1.0, 0.5, 600), seeds, positions)


@pytest.mark.parametrize("words, v", [(60, 300), (300, 600)])
def test_ties_at_the_border_go_by_index(small, words, v):
    """Equal words, in several chunks, and more of them than a list holds; -0 equals 0."""
    _, seeds, positions = make_inputs(1, 1)
    row = torch.full((v,), -3.0)
    row[torch.randperm(v, generator=torch.Generator().manual_seed(v))[:words]] = 0.0
    row[::2] *= -1.0  # -0 beside 0, and 3 on top
    row[row == 3.0] = 1.0
    count = int((row == 1.0).sum())
    for settings in ((1.0, 0.9, count + 7), (2.0, 0.97, 0)):
        both(row[None], settings, seeds, positions)


def test_exactly_k_of_equals(small):
    _, seeds, positions = make_inputs(8, 1)
    zeros = torch.zeros(300)
    zeros[::2] = -0.0
    drawn, _ = both(zeros.expand(8, -1), (1.0, 1.0, 3), seeds, positions)
    assert set(drawn.tolist()) <= {0, 1, 2}


@pytest.mark.parametrize("second", [35, 300])
def test_equal_scores_go_to_the_lowest_index(small, second):
    """Two words, of two chunks or of one lane, whose logits undo the difference of their noise to the bit."""
    seeds, positions, pair = torch.full((16,), 5), torch.arange(16), torch.tensor([3, second])
    noise = definition.noise(definition.random_words(seeds, positions, 512))[:, pair]
    least = noise.amin(1, keepdim=True)
    logits = torch.full((16, 512), -torch.inf)
    logits[:, pair] = least - noise
    equal = (logits[:, pair] + noise == least).all(1)
    assert equal.sum() > 3
    bits = math.log2(math.e)  # the temperature for which logits are in bits already
    tokens, _ = both(logits[equal], (bits, 1.0, 0), seeds[equal], positions[equal])
    assert (tokens == 3).all()


def test_greedy_takes_the_lowest_of_the_largest(small):
    logits, seeds, positions = make_inputs(3, 1000)
    logits = logits.round()  # many ties
    logits[0], logits[0, 5] = -0.0, 0.0  # equals all
    tokens, _ = both(logits, (0.0, 0.5, 3), seeds, positions)
    assert torch.equal(tokens, logits.argmax(1)) and tokens[0] == 0


def test_rows_without_a_softmax(small):
    """NaN or +inf: the lowest index of one; -inf alone: 0; logprob NaN, and the other rows as if alone."""
    logits, seeds, positions = make_inputs(5, 300)
    logits[1, 270], logits[1, 290] = math.nan, math.inf
    logits[2, 140] = math.inf
    logits[3] = -math.inf
    logits[4, 299], logits[4, :260] = math.nan, -math.inf
    for settings in [(1.0, 0.9, 10), (0.0, 1.0, 0)]:
        tokens, logprobs = draw(logits, settings, seeds, positions)
        assert tokens[1:].tolist() == [270, 140, 0, 299]
        assert logprobs.isnan().tolist() == [False, True, True, True, True]
        clean = both(logits[:1], settings, seeds[:1], positions[:1])
        assert tokens[0] == clean[0] and logprobs[0] == clean[1]


def test_chunks_and_neighbours_change_no_bit(monkeypatch):
    """Chunks of 128 and 4096 words; order of the batch; words of -inf behind the vocabulary."""
    logits, seeds, positions = make_inputs(2, 700)
    order = torch.tensor([1, 0])
    padded = torch.cat([logits, torch.full((2, 500), -math.inf)], 1)[order]
    for settings in [(1.0, 1.0, 0), (0.9, 0.95, 0)]:
        outs = []
        for chunk in (128, 4096):
            monkeypatch.setattr(kernels, "_chunk", lambda chunk=chunk: chunk)
            outs.append(both(logits, settings, seeds, positions))
        assert all(torch.equal(a, b) for out in outs[1:] for a, b in zip(out, outs[0], strict=True))
        assert torch.equal(draw(padded, settings, seeds[order], positions[order])[0], outs[0][0][order])


def test_strides(small):
    """Rows any distance apart, one row many times, columns apart, seeds apart."""
    logits, seeds, positions = make_inputs(2, 400)
    settings, apart = (1.0, 1.0, 0), torch.stack([seeds, positions], 1)
    plain = both(logits, settings, seeds, positions)
    wide = torch.randn(2, 1000)
    wide[:, 100:500] = logits
    for view in (wide[:, 100:500], logits.t().contiguous().t()):
        out = draw(view, settings, apart[:, 0], apart[:, 1])
        assert torch.equal(out[0], plain[0]) and torch.equal(out[1], plain[1])
    same = draw(logits[:1].expand(2, -1), settings, seeds, positions)
    repeated = both(logits[:1].repeat(2, 1), settings, seeds, positions)
    assert torch.equal(same[0], repeated[0]) and torch.equal(same[1], repeated[1])


def test_offsets_past_two_to_the_31(small):
    """Rows 2^31 + 7 elements apart, read in place: a copy, or an offset in 32 bits, would not get here."""
    stride, v = 2**31 + 7, 300
    try:
        huge = torch.empty(stride + v, dtype=torch.bfloat16, device=DEVICE)
    except RuntimeError:
        pytest.skip("4.3 GB of address space cannot be reserved")
    logits, seeds, positions = make_inputs(2, v, torch.bfloat16)
    view = huge.as_strided((2, v), (stride, 1))
    view.copy_(logits)
    out, wanted = (draw(x, (1.0, 0.9, 0), seeds, positions) for x in (view, logits))
    assert torch.equal(out[0], wanted[0]) and torch.equal(out[1], wanted[1])


@pytest.mark.parametrize("settings, passes", [((1.0, 1.0, 0), 2), ((0.0, 1.0, 0), 2), ((1.0, 0.8, 0), 0)])
def test_memory_and_traffic(small, settings, passes):
    """Without top-k and top-p logits are read twice, and the drawn ones once more; whatever the order of programs."""
    logits, seeds, positions = make_inputs(2, 600, torch.bfloat16)
    outs = [draw(logits, settings, seeds, positions)]
    with audit(2, logits=logits, seeds=seeds, positions=positions) as seen:
        outs.append(draw(logits, settings, seeds, positions))
    seen.check()
    assert all(torch.equal(a, b) for a, b in zip(*outs, strict=True))
    traffic = seen.traffic["logits"]
    assert traffic.load_unique == logits.numel() * 2 and traffic.store_bytes == 0
    if passes:
        assert traffic.load_bytes == (passes * logits.numel() + 2) * 2
        # 3 chunks a row: (maximum, first bad word), then (total, score, word); then (token, logprob)
        stored = sum(t.store_bytes for t in seen.traffic.values())
        assert stored == 2 * 3 * (4 + 4 + 8 + 4 + 4) + 2 * (8 + 4)


def test_launches_do_not_depend_on_values():
    """Fake CUDA tensors have none, so nothing is read on the host, and a CUDA graph can replay the launches."""
    names = {}
    for settings in ((1.0, 1.0, 0), (1.0, 0.9, 0), (1.0, 0.9, 50)):
        with FakeTensorMode(), launch.record((9, 0)) as launches:
            logits = torch.empty((20_000, 128_256), device="cuda")
            ints = torch.empty(20_000, dtype=torch.int64, device="cuda")
            tokens, logprobs = kernels.sample(logits, *settings, ints, ints)
        assert (tokens.shape, tokens.dtype, logprobs.dtype) == ((20_000,), torch.int64, torch.float32)
        assert not any(one.fp_fusion for one in launches)
        assert launches[0].programs == 20_000 * math.ceil(128_256 / kernels._chunk())
        names[settings] = [one.kernel.__name__ for one in launches]
    search = ["slice_weights", "collect", "find_border"]
    assert list(names.values()) == [["row_maxima", *search * count, "draw", "finish"] for count in (0, 1, 2)]


def test_opcheck(small):
    logits, seeds, positions = (x.to(DEVICE) for x in make_inputs(1, 100))
    torch.library.opcheck(
        torch.ops.hpsafety.sample.default, (logits, 0.9, 0.8, 20, seeds, positions, "triton")
    )


def test_kernel_refuses_what_it_would_read_past():
    """A compiled graph skips the checks in Python."""
    numbers = torch.zeros(3, dtype=torch.int64)
    with pytest.raises(ValueError, match="one seed and one position per row"):
        torch.ops.hpsafety.sample(torch.zeros(3, 8), 1.0, 1.0, 0, numbers[:2], numbers, "triton")
    with pytest.raises(ValueError, match="columns"):
        torch.ops.hpsafety.sample(torch.zeros(3, 0), 1.0, 1.0, 0, numbers, numbers, "triton")


@pytest.mark.sweep
@pytest.mark.parametrize("seed", range(80))
def test_drawn_shapes(seed, monkeypatch):
    """Random sizes, spreads, settings, ties and -inf: every path of the selection."""
    r = random.Random(seed)
    monkeypatch.setattr(kernels, "_chunk", lambda: r.choice([128, 512, 4096]))
    monkeypatch.setattr(kernels, "LIST", r.choice([16, 128, 4096]))
    v = r.choice([1, 2, 31, 33, 127, 129, r.randrange(1, 6000)])
    scale = r.choice([0, 1e-3, 0.3, 3, 30, 1e4])
    logits, seeds, positions = make_inputs(r.choice([1, 2, 3]), v, r.choice(DTYPES), scale, seed)
    if r.random() < 0.3:
        logits = logits.round()
    if r.random() < 0.3:
        logits[torch.rand(logits.shape, generator=torch.Generator().manual_seed(seed)) < 0.5] = -math.inf
        logits[:, r.randrange(v)] = 0.0
    if r.random() < 0.2:
        logits[0, r.randrange(v)] = r.choice([math.nan, math.inf, -3e38])
    for _ in range(3):
        temperature = r.choice([0.0, 1e-30, 0.1, 1.0, 1.3, 5.0, 1e30])
        top_p, top_k = (
            r.choice([1.0, 1.0, 0.9, 0.5, 0.01, 0.999, 1e-9]),
            r.choice([0, 0, 1, 5, 50, 1000, 10**6]),
        )
        both(logits, (temperature, top_p, top_k), seeds, positions)
