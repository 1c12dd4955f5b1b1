"""sample in CUDA. The bugs this file must catch: a bit of the arithmetic that differs from the definition; noise or a
border that depends on where chunks begin; a border that is off by one among equals; a word that the bound of its noise
throws out although it wins.

cpu equals the definition to the bit (tests/ops/test_sample.py), so CUDA must equal cpu."""

import importlib
import math
import random
import re
import shutil
import subprocess

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from hpsafety import ops, reference
from hpsafety.cuda_kernels import library
from hpsafety.cuda_kernels import sample as kernels
from tests.cuda import emulation, programs, replay
from tests.cuda.conftest import DEVICE
from tests.ops.test_sample import make_inputs

definition = importlib.import_module("hpsafety.reference.sample")
DTYPES = [torch.float32, torch.bfloat16]
CHUNK, LIST = kernels.CHUNK, 2048
ALL_SETTINGS = [(1.0, 1.0, 0), (0.7, 0.9, 0), (1.3, 1.0, 50), (1.0, 0.8, 20), (0.0, 1.0, 0)]
PLACES = 13  # of the launcher's arguments
WORKSPACE = (11, 12, PLACES, 14, 15)  # written by one of its launches, read by another
emulated_only = pytest.mark.skipif(DEVICE == "cuda", reason="checks the emulated kernels")


def draw(logits, settings, seeds, positions):
    there = (x.to(DEVICE) for x in (seeds, positions))
    return tuple(x.cpu() for x in ops.sample(logits.to(DEVICE), *settings, *there, impl="cuda"))


def both(logits, settings, seeds, positions):
    """(tokens, logprobs), after they were found equal to cpu's in every bit."""
    before = reference.calls["sample"]
    ours = draw(logits, settings, seeds, positions)
    assert reference.calls["sample"] == before, "the cuda backend of sample called the reference"
    exact = ops.sample(logits, *settings, seeds, positions, impl="cpu")
    assert torch.equal(ours[0], exact[0]), settings
    assert torch.equal(ours[1].view(torch.int32), exact[1].view(torch.int32)), settings
    return ours


# ---- tokens and logprobs ----


@pytest.mark.parametrize("b, v, settings", [
    *((2, 257, settings) for settings in ALL_SETTINGS), *((1, 1, settings) for settings in ALL_SETTINGS[:4]),
    (0, 5, ALL_SETTINGS[3]), (1, CHUNK - 1, ALL_SETTINGS[2]), (1, CHUNK, ALL_SETTINGS[3]),
    (2, CHUNK + 1, ALL_SETTINGS[1]), (1, 2 * CHUNK + 905, ALL_SETTINGS[3]), (1, 2 * CHUNK + 904, ALL_SETTINGS[0]),
])  # fmt: skip
def test_equals_cpu(b, v, settings):
    """KER-2: to the bit, with rows at 16-byte addresses and at others."""
    for dtype in DTYPES:
        tokens, logprobs = both(*_around(make_inputs(b, v, dtype), settings))
    assert tokens.dtype == torch.int64 and logprobs.dtype == torch.float32 and tokens.shape == (b,)


def _around(inputs, settings):
    logits, seeds, positions = inputs
    return logits, settings, seeds, positions


@pytest.mark.parametrize("settings", [(1.0, 1.0, 0), (1.0, 0.9, 500)])
def test_equals_cpu_over_a_whole_vocabulary(settings):
    """24 chunks; and 70, more than a warp has lanes."""
    both(*_around(make_inputs(1, 49_152), settings))
    both(*_around(make_inputs(1, 70 * CHUNK - 3, torch.bfloat16), settings))


def test_many_draws():
    """A row at 300 positions: the noise decides, and the bound lets its winner past."""
    logits, _, _ = make_inputs(1, 700, scale=1.0)
    positions = torch.arange(300)
    tokens, _ = both(logits.expand(300, -1), (1.0, 1.0, 0), torch.full((300,), 3), positions)
    assert len(tokens.unique()) > 100


def allowed_words(logits, settings):
    """(B, V) bool: what the borders that the kernels found allow."""
    found = []
    launch = library.launch

    def watch(*arguments):
        launch(*arguments)
        found.append(arguments[2 + PLACES])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "launch", watch)
        draw(logits, settings, *(torch.zeros(len(logits), dtype=torch.int64),) * 2)
    bits = (logits.float() + 0.0).view(torch.int32)
    keys = (bits ^ (bits >> 31 & 0x7FFFFFFF)).long()
    return (keys << 23) + (2**23 - 1 - torch.arange(logits.shape[1])) >= found[-1].cpu()[:, None]


@pytest.mark.parametrize("settings", [(1.0, 0.9, 0), (1.0, 1.0, 50), (1.0, 0.8, 20), (1.0, 1e-9, 0)])
@pytest.mark.parametrize("ties", [False, True])
def test_borders_are_the_definitions(settings, ties):
    """Every word, also those that are hardly ever drawn."""
    logits, _, _ = make_inputs(2, CHUNK + 400)
    logits = logits.round() if ties else logits
    scale = torch.tensor(math.log2(math.e), dtype=torch.float32)
    masses = definition.mass((logits - logits.amax(1, keepdim=True)) * scale)
    wanted = definition._allowed(logits + 0.0, masses, *settings[1:])
    assert torch.equal(allowed_words(logits, settings), wanted)


@pytest.mark.parametrize("settings", [(1.0, 0.7, 0), (1.0, 1.0, 4500), (1.0, 0.3, 4900), (1.0, 0.999, 2)])
def test_slices_beyond_the_list(settings):
    """A border among 5000 words of one slice, which are read again until what is left of them fits."""
    logits, _, _ = make_inputs(1, 5000, scale=0.02)
    masses = definition.mass((logits - logits.amax(1, keepdim=True)) * torch.tensor(math.log2(math.e)))
    wanted = definition._allowed(logits + 0.0, masses, *settings[1:])
    assert torch.equal(allowed_words(logits, settings), wanted)


def test_the_last_slice():
    """A border below the 24 bits that slices tell apart."""
    both(*_around(make_inputs(1, 700, scale=30.0), (1.0, 0.5, 600)))


@pytest.mark.parametrize("words, v", [(60, 300), (2500, 4300)])
def test_ties_at_the_border_go_by_index(words, v):
    """Equal words, in several chunks, and more of them than a list holds; -0 equals 0."""
    _, seeds, positions = make_inputs(1, 1)
    row = torch.full((v,), -3.0)
    row[torch.randperm(v, generator=torch.Generator().manual_seed(v))[:words]] = 0.0
    row[::2] *= -1.0  # -0 beside 0, and 3 on top
    row[row == 3.0] = 1.0
    count = int((row == 1.0).sum())
    for settings in ((1.0, 0.9, count + 7), (2.0, 0.97, 0)):
        both(row[None], settings, seeds, positions)
    wanted = row == 1.0
    wanted[row.eq(0.0).nonzero()[:7, 0]] = True
    assert torch.equal(allowed_words(row[None], (1.0, 1.0, count + 7))[0], wanted)


def test_exactly_k_of_equals():
    _, seeds, positions = make_inputs(8, 1)
    zeros = torch.zeros(300)
    zeros[::2] = -0.0
    drawn, _ = both(zeros.expand(8, -1), (1.0, 1.0, 3), seeds, positions)
    assert set(drawn.tolist()) <= {0, 1, 2}


@pytest.mark.parametrize("second", [35, 300, 600, CHUNK + 40])
def test_equal_scores_go_to_the_lowest_index(second):
    """Two words, of two chunks, of two warps or of one thread, whose logits undo the difference of their noise."""
    seeds, positions, pair = torch.full((16,), 5), torch.arange(16), torch.tensor([3, second])
    noise = definition.noise(definition.random_words(seeds, positions, CHUNK + 128))[:, pair]
    least = noise.amin(1, keepdim=True)
    logits = torch.full((16, CHUNK + 128), -torch.inf)
    logits[:, pair] = least - noise
    equal = (logits[:, pair] + noise == least).all(1)
    assert equal.sum() > 3
    bits = math.log2(math.e)  # the temperature for which logits are in bits already
    tokens, _ = both(logits[equal], (bits, 1.0, 0), seeds[equal], positions[equal])
    assert (tokens == 3).all()


def test_greedy_takes_the_lowest_of_the_largest():
    logits, seeds, positions = make_inputs(3, CHUNK + 1000)
    logits = logits.round()  # many ties
    logits[0], logits[0, 5] = -0.0, 0.0  # equals all
    logits[1] = -math.inf
    logits[1, -1] = -3e38
    tokens, _ = both(logits, (0.0, 0.5, 3), seeds, positions)
    assert torch.equal(tokens, logits.argmax(1)) and tokens[0] == 0


def test_rows_without_a_softmax():
    """NaN or +inf: the lowest index of one; -inf alone: 0; logprob NaN, and the other rows as if alone."""
    logits, seeds, positions = make_inputs(5, CHUNK + 300)
    logits[1, 2270], logits[1, 2290] = math.nan, math.inf
    logits[2, 140], logits[2, 2200] = math.inf, math.nan
    logits[3] = -math.inf
    logits[4, -1], logits[4, :260] = math.nan, -math.inf
    for settings in [(1.0, 0.9, 10), (0.0, 1.0, 0)]:
        tokens, logprobs = draw(logits, settings, seeds, positions)
        assert tokens[1:].tolist() == [2270, 140, 0, CHUNK + 299]
        assert logprobs.isnan().tolist() == [False, True, True, True, True]
        clean = both(logits[:1], settings, seeds[:1], positions[:1])
        assert tokens[0] == clean[0] and logprobs[0] == clean[1]


def test_neighbours_and_padding_change_no_bit():
    """Order of the batch; words of -inf behind the vocabulary, in chunks of their own too."""
    logits, seeds, positions = make_inputs(2, 700)
    order = torch.tensor([1, 0])
    padded = torch.cat([logits, torch.full((2, 2 * CHUNK), -math.inf)], 1)[order]
    for settings in [(1.0, 1.0, 0), (0.9, 0.95, 0)]:
        alone = both(logits, settings, seeds, positions)
        assert torch.equal(draw(padded, settings, seeds[order], positions[order])[0], alone[0][order])


def test_strides():
    """Rows any distance apart, one row many times, columns apart, seeds apart, addresses of all kinds."""
    logits, seeds, positions = make_inputs(2, 400)
    settings, apart = (1.0, 0.9, 0), torch.stack([seeds, positions], 1)
    plain = both(logits, settings, seeds, positions)
    wide = torch.randn(2, 1000)
    views = [logits.t().contiguous().t()]
    for start in (100, 101, 2):
        wide[:, start : start + 400] = logits
        views.append(wide[:, start : start + 400].clone() if start == 2 else wide[:, start : start + 400])
        out = draw(views[-1], settings, apart[:, 0], apart[:, 1])
        assert torch.equal(out[0], plain[0]) and torch.equal(out[1], plain[1])
    out = draw(views[0], settings, seeds, positions)
    assert torch.equal(out[0], plain[0]) and torch.equal(out[1], plain[1])
    same = draw(logits[:1].expand(2, -1), settings, seeds, positions)
    repeated = both(logits[:1].repeat(2, 1), settings, seeds, positions)
    assert torch.equal(same[0], repeated[0]) and torch.equal(same[1], repeated[1])


@pytest.mark.parametrize("v", [304, 300])
def test_offsets_past_two_to_the_31(v):
    """Rows past 2^31 elements apart, read in place: a copy, or an offset in 32 bits, would not get here."""
    stride = 2**31 + 8
    try:
        huge = torch.empty(stride + v, dtype=torch.bfloat16, device=DEVICE)
    except RuntimeError:
        pytest.skip("4.3 GB of address space cannot be reserved")
    logits, seeds, positions = make_inputs(2, v, torch.bfloat16)
    view = huge[: stride + v].as_strided((2, v), (stride - (v == 300), 1))  # in 16-byte words, and not
    view.copy_(logits)
    out, wanted = (draw(x, (1.0, 0.9, 0), seeds, positions) for x in (view, logits))
    assert torch.equal(out[0], wanted[0]) and torch.equal(out[1], wanted[1])


def test_launches_do_not_depend_on_values():
    """Fake CUDA tensors have none, so nothing is read on the host, and a CUDA graph can replay the launches."""
    for settings in ((1.0, 1.0, 0), (1.0, 0.9, 50)):
        with FakeTensorMode(), library.record() as calls:
            logits = torch.empty((20_000, 128_256), device="cuda")
            ints = torch.empty(20_000, dtype=torch.int64, device="cuda")
            tokens, logprobs = kernels.sample(logits, *settings, ints, ints)
        assert (tokens.shape, tokens.dtype, logprobs.dtype) == ((20_000,), torch.int64, torch.float32)
        (call,) = calls
        assert (call.arguments[PLACES] is None) == (settings == (1.0, 1.0, 0))


def test_opcheck():
    logits, seeds, positions = (x.to(DEVICE) for x in make_inputs(1, 100))
    torch.library.opcheck(torch.ops.hpsafety.sample.default, (logits, 0.9, 0.8, 20, seeds, positions, "cuda"))


def test_kernel_refuses_what_it_would_read_past():
    """A compiled graph skips the checks in Python."""
    numbers = torch.zeros(3, dtype=torch.int64)
    with pytest.raises(ValueError, match="one seed and one position per row"):
        torch.ops.hpsafety.sample(torch.zeros(3, 8), 1.0, 1.0, 0, numbers[:2], numbers, "cuda")
    with pytest.raises(ValueError, match="columns"):
        torch.ops.hpsafety.sample(torch.zeros(3, 0), 1.0, 1.0, 0, numbers, numbers, "cuda")


# ---- the arithmetic ----

ARITHMETIC = """
#include <cstdio>
#include "sample_arithmetic.cuh"
using namespace sampling;
int main() {
  uint64_t state = 1;
  auto next = [&] {
    state = state * 6364136223846793005u + 1442695040888963407u;
    return static_cast<uint32_t>(state >> 32);
  };
  const uint32_t ends[] = {0, 1, (1u << 30) - 1, 1u << 30, ~0u - 1, ~0u};
  const float borders[] = {0.f, -40.f, -41.f, -INFINITY, -17.5f, -3e38f};
  for (int i = 0; i < 8192; i++) {
    uint32_t word = i < 6 ? ends[i] : next() >> next() % 32;
    float y = -static_cast<float>(next()) * 0x1p-32f * ldexpf(1.f, static_cast<int>(next() % 20) - 12);
    if (i < 4000) y = -17.f - static_cast<float>(next()) * 0x1p-32f;  // masses below 2^23, some of which end in .5
    if (i < 6) y = borders[i];
    long long mass = mass_of(y);
    printf("%d %u %lld %d\\n", __float_as_int(y), word, mass, __float_as_int(noise_of(word)));
  }
  long wrong = 0;
  for (uint64_t i = 0; i < 1 << 21; i++) {  // the first and the last words, and others
    uint32_t word = static_cast<uint32_t>(i < 1 << 16 ? i : i < 1 << 17 ? ~i : i * 2048 + next() % 2048);
    wrong += !(noise_bound(word) >= noise_of(word));
  }
  printf("%ld\\n", wrong);
  return 0;
}
"""


@emulated_only
def test_masses_and_noise_are_the_definitions():
    """Over exponents, ends and halves: masses that end in .5 go to the even one. No bound is below its noise."""
    ((code, text),) = programs.run(ARITHMETIC)
    *rows, wrong = [[int(x) for x in line.split()] for line in text.splitlines()]
    y, word, mass, noise = torch.tensor(rows).T
    assert code == 0 and len(rows) == 8192 and wrong == [0]
    assert torch.equal(mass, definition.mass(y.int().view(torch.float32)))
    assert torch.equal(noise.int(), definition.noise(word).view(torch.int32))


def test_nothing_is_fused(tmp_path):
    """In the compiler's own words: no multiply-add, and no addition or multiplication that it may still fuse."""
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("no nvcc")
    for name, text in emulation.texts().items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text, encoding="utf-8")
    command = [nvcc, "-O3", "-std=c++17", "-arch=sm_80", "-ptx", "-o", "out.ptx", "cuda/sample.cu"]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    ptx = (tmp_path / "out.ptx").read_text(encoding="utf-8")
    assert ptx.count("mul.rn.f32") > 100 and ptx.count("add.rn.f32") > 100
    assert not re.findall(r"\b(?:fma\S*|add|sub|mul)(?:\.ftz)?\.f(?:32|64)", ptx)


# ---- other orders, and drawn shapes ----


@emulated_only
@pytest.mark.parametrize("mode, seed", [("fibers", 1), ("fibers", 2), ("tsan", None), ("asan", None)])
def test_replay(mode, seed):
    """Other orders of threads and blocks, races, bounds, two writers: nothing is found, and the bytes are the same.
    All kernels run; with a list that is too short for the first border."""
    logits, seeds, positions = make_inputs(1, CHUNK + 401, torch.bfloat16, scale=0.02)
    with replay.recorded() as calls:
        draw(logits, (1.0, 0.8, LIST + 52), seeds, positions)
    replay.run(calls[0], mode, seed, read_back=WORKSPACE)


@pytest.mark.sweep
@pytest.mark.parametrize("seed", range(100))
def test_drawn_shapes(seed):
    """Random sizes, spreads, settings, ties and -inf: every path of the selection."""
    r = random.Random(seed)
    v = r.choice([1, 2, 31, 33, 127, 129, CHUNK - 1, CHUNK, CHUNK + 1, r.randrange(1, 9000)])
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
