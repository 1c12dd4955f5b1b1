"""paged_attention(sequential=True): attention's rows to the bit, whatever stands beside. The bugs this file must catch:
keys cut into splits again; own tokens before the prefix; a row of attention whose sums depend on the tile it stands in.
"""

import functools

import pytest
import torch

from hpsafety import ops
from tests.ops.oracle import check_against_oracle
from tests.ops.test_paged_attention import NAMES, make_inputs, on_pages, rows, threads

__all__ = ["threads"]  # fixture

sequential = functools.partial(ops.paged_attention, sequential=True)
STEPS = (1, 2, 5, 95, 96, 97, 191, 192, 193, 289)


def oracle(args):
    return check_against_oracle("paged_attention", sequential, args, grads=())["out0"]


def packed(prompt, lengths, heads, kv_heads, dim, dtype):
    """q, k, v of a packed group, its segments, and where each response starts."""
    g = torch.Generator().manual_seed(prompt)
    total = prompt + sum(lengths)
    q, k, v = (torch.randn(total, n, dim, generator=g).to(dtype) for n in (heads, kv_heads, kv_heads))
    starts = [prompt + sum(lengths[:i]) for i in range(len(lengths))]
    segments = [[s, s + n, 0, prompt] for s, n in zip(starts, lengths, strict=True)]
    segments = [[0, prompt, 0, 0], *segments] if prompt else segments
    return (q, k, v), torch.tensor(segments, dtype=torch.int32), starts


def decoded(qkv, prompt, starts, step, page_size=16, **kwargs):
    """paged_attention of token `step` (from 1) of the responses at `starts`, the prompt as their shared prefix."""
    q, k, v = qkv
    parts = [[x[:prompt], *(x[s : s + step] for s in starts)] for x in (k.float(), v.float())]
    count = sum(-(-len(x) // page_size) for x in parts[0])
    order = torch.randperm(count, generator=torch.Generator().manual_seed(step)).tolist()
    k_pages, v_pages, table = on_pages(*parts, page_size, order)
    lens = [torch.tensor(x, dtype=torch.int32) for x in ([prompt], [0] * len(starts), [step] * len(starts))]
    return ops.paged_attention(
        q[[s + step - 1 for s in starts]], k_pages.to(q.dtype), v_pages.to(q.dtype), table[1:], lens[2],
        (table[:1], *lens[:2]), impl="cpu", **kwargs,
    )  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "heads, kv_heads, dim", [(9, 3, 64), (4, 4, 7), (8, 1, 128), (13, 1, 33), (2, 1, 200)]
)
def test_is_attentions_row_to_the_bit(dtype, heads, kv_heads, dim):
    """Issue 6, Build 6: every decoding step has the bits of its row in the training pass, for prompts and responses
    around the borders of one block and of several, groups of 1 to 13 heads, and any number of responses."""
    differed = False
    for prompt in (0, 1, 95, 96, 97, 300):
        lengths = [289, 2, 193, 97]
        qkv, segments, starts = packed(prompt, lengths, heads, kv_heads, dim, dtype)
        whole = ops.attention(*qkv, segments, impl="cpu")
        for step in STEPS:
            alive = [s for s, n in zip(starts, lengths, strict=True) if n >= step]
            wanted = whole[[s + step - 1 for s in alive]]
            assert torch.equal(decoded(qkv, prompt, alive, step, sequential=True), wanted), (prompt, step)
            assert torch.equal(decoded(qkv, prompt, alive[:1], step, 7, sequential=True), wanted[:1])
            differed |= not torch.equal(decoded(qkv, prompt, alive, step), wanted)
    assert differed or dtype != torch.float32  # the default merges splits; rounding to bf16 may hide it


@pytest.mark.parametrize("length", [130, 400])
@pytest.mark.parametrize("heads, kv_heads", [(9, 3), (2, 2), (8, 1)])
def test_a_row_of_attention_does_not_depend_on_what_follows(length, heads, kv_heads):
    """A response that goes on moves the cuts of its tasks, and with them the tile a row stands in: no bit changes."""
    qkv, segments, _ = packed(40, [length], heads, kv_heads, 24, torch.float32)
    whole = ops.attention(*qkv, segments, impl="cpu")
    for end in (41, 47, 95, 136, 137, 138, 139, 40 + length - 1):
        part = segments.clone()
        part[1, 1] = end
        assert torch.equal(ops.attention(*(x[:end] for x in qkv), part, impl="cpu"), whole[:end]), end


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("page_size", [1, 16, 96])
def test_oracle(dtype, page_size):
    """KER-2 with and without prefixes: no tokens, no prefix tokens, groups without members."""
    out = oracle(make_inputs([1, 0, 95, 96, 289], page_size, dtype=dtype))
    assert not out[1].any()
    prefix = ([0, 101, 300, 5], [1, 0, 2, 0, 2])
    oracle(make_inputs([5, 0, 40, 100, 0], page_size, 6, 2, 33, dtype, prefix=prefix))


@pytest.mark.parametrize("dim", [32, 20])
def test_neighbours_and_threads_change_no_bit(dim, threads):
    group_of = [0] * 17 + [1] * 3 + [2] * 20
    args = make_inputs([(13 * i) % 120 for i in range(40)], 16, 6, 2, dim, prefix=([300, 0, 97], group_of))
    threads(1)
    whole = sequential(**args, impl="cpu")
    for count, keep in ((1, [0]), (2, [17]), (3, [39]), (2, [3, 1, 2]), (3, list(range(5, 40, 2)))):
        threads(count)
        assert torch.equal(sequential(**rows(args, keep), impl="cpu"), whole[keep])
        assert torch.equal(sequential(**args, impl="cpu"), whole)


def test_nan_and_infinite_scores():
    """NaN reaches the sequences that see it; all scores -inf, or one +inf: NaN, as softmax is."""
    args = make_inputs([100, 100, 100, 0], 16, 1, 1, 8, prefix=([3, 0], [0, 1, 0, 0]))
    args["q"] = torch.ones_like(args["q"])
    args["k_pages"][args["block_table"][1, :7].long()] = -torch.inf
    args["k_pages"][args["block_table"][2, 2], 1] = torch.inf
    out = oracle(args)
    assert out.isnan().flatten(1).all(1).tolist() == [False, True, True, False]
    args = make_inputs([100, 100, 20, 0], 16, 6, 2, 16, prefix=([3, 40], [0, 1, 0, 0]))
    args["v_pages"][args["prefix"][0][0, 0], 1] = torch.nan
    nan = sequential(**args, impl="cpu").isnan().flatten(1)
    assert torch.equal(nan.all(1), nan.any(1)) and nan.all(1).tolist() == [True, False, True, True]


def test_the_reference_gives_the_same_either_way():
    args = make_inputs([9, 20], prefix=([17], [0, 0]))
    both = [ops.paged_attention(**args, sequential=x, impl="reference") for x in (False, True)]
    assert torch.equal(*both)


def test_opcheck():
    args = make_inputs([9, 20], prefix=([17], [0, 0]))
    call = [args[n] for n in NAMES]
    op = torch.ops.hpsafety.paged_attention.default
    torch.library.opcheck(op, (*call, *args["prefix"], 0.25, True, "cpu"))
    torch.library.opcheck(op, (*call, None, None, None, 0.25, True, "cpu"))
