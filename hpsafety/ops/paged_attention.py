"""paged_attention: contract, checks and backends. The formula stands in hpsafety/reference/paged_attention.py."""

import math
import os

import torch

from hpsafety import reference
from hpsafety.ops import backends
from hpsafety.ops.registration import Op, check
from hpsafety.ops.rows import values_readable

BACKENDS = ("cpu", "triton", "cuda")
MAX_HEAD_DIM = 256

_op = Op(
    "paged_attention",
    "(Tensor q, Tensor k_pages, Tensor v_pages, Tensor block_table, Tensor context_lens, Tensor? prefix_table,"
    " Tensor? prefix_lens, Tensor? group_of, float softmax_scale, bool sequential) -> Tensor",
    {
        "cpu": lambda *args: backends.cpu().paged_attention(*args),
        "triton": lambda *args: backends.triton("paged_attention").paged_attention(*args),
        "cuda": lambda *args: backends.cuda("paged_attention").paged_attention(*args),
    },
    lambda q, *_: q.new_empty(q.shape),
)


def _check_table(name, table, lens_name, lens, rows, device):
    check(
        table.dim() == 2 and table.shape[0] == rows and table.dtype == torch.int32 and table.device == device,
        "paged_attention: {} must be ({}, pages) torch.int32 on {}, got {} {} on {}",
        name, rows, device, tuple(table.shape), table.dtype, table.device,
    )  # fmt: skip
    check(
        lens.shape == (rows,) and lens.dtype == torch.int32 and lens.device == device,
        "paged_attention: {} must be ({},) torch.int32 on {}, got {} {} on {}",
        lens_name, rows, device, tuple(lens.shape), lens.dtype, lens.device,
    )  # fmt: skip


def _check_prefix(prefix, rows, device):
    check(
        isinstance(prefix, tuple | list) and len(prefix) == 3,
        "paged_attention: prefix must be (table, lens, group_of), got {}",
        type(prefix).__name__,
    )
    table, lens, group_of = prefix
    check(
        table.dim() == 2, "paged_attention: prefix table must be (groups, pages), got {}", tuple(table.shape)
    )
    _check_table("prefix table", table, "prefix lens", lens, table.shape[0], device)
    check(
        group_of.shape == (rows,) and group_of.dtype == torch.int32 and group_of.device == device,
        "paged_attention: group_of must be ({},) torch.int32 on {}, got {} {} on {}",
        rows, device, tuple(group_of.shape), group_of.dtype, group_of.device,
    )  # fmt: skip


def _check_pages(q, k_pages, v_pages):
    check(q.dim() == 3, "paged_attention: q must be (B, H, K), got shape {}", tuple(q.shape))
    check(
        k_pages.dim() == 4 and k_pages.shape[1] > 0 and k_pages.shape[3] == q.shape[2]
        and k_pages.dtype == q.dtype and k_pages.device == q.device,
        "paged_attention: k_pages must be (pages, page_size, G, {}) {} on {} with page_size > 0, got {} {} on {}",
        q.shape[2], q.dtype, q.device, tuple(k_pages.shape), k_pages.dtype, k_pages.device,
    )  # fmt: skip
    check(
        v_pages.shape == k_pages.shape and v_pages.dtype == q.dtype and v_pages.device == q.device,
        "paged_attention: v_pages must be like k_pages {} {} on {}, got {} {} on {}",
        tuple(k_pages.shape), q.dtype, q.device, tuple(v_pages.shape), v_pages.dtype, v_pages.device,
    )  # fmt: skip
    heads, kv_heads = q.shape[1], k_pages.shape[2]
    check(
        kv_heads > 0 and heads > 0 and heads % kv_heads == 0,
        "paged_attention: the {} query heads must be a multiple of the {} kv heads", heads, kv_heads,
    )  # fmt: skip
    check(
        1 <= q.shape[2] <= MAX_HEAD_DIM,
        "paged_attention: head dim must be 1 to {}, got {}", MAX_HEAD_DIM, q.shape[2],
    )  # fmt: skip


def _check_lengths(name, lens, table, page_size):
    covered = table.shape[1] * page_size
    wrong = (lens < 0) | (lens > covered)
    if wrong.any():
        i = int(wrong.int().argmax())
        check(
            False, "paged_attention: {}[{}] must lie in [0, {}], which {} pages of {} tokens cover, got {}",
            name, i, covered, table.shape[1], page_size, int(lens[i]),
        )  # fmt: skip


def _check_used_pages(name, table, lens, page_size, pages):
    used = torch.arange(table.shape[1], device=table.device) * page_size < lens[:, None]
    wrong = used & ((table < 0) | (table >= pages))
    if wrong.any():
        row, i = wrong.nonzero()[0].tolist()
        check(
            False, "paged_attention: {}[{}][{}] must lie in [0, {}), got {}",
            name, row, i, pages, int(table[row, i]),
        )  # fmt: skip


def _check_values(k_pages, block_table, context_lens, prefix):
    """What the C++ kernel and the reference check by themselves. A group without members may have a stale table."""
    pages, page_size = k_pages.shape[:2]
    if prefix is not None:
        table, lens, group_of = prefix
        _check_lengths("prefix lens", lens, table, page_size)
        wrong = (group_of < 0) | (group_of >= len(lens))
        if wrong.any():
            i = int(wrong.int().argmax())
            check(
                False, "paged_attention: group_of[{}] must lie in [0, {}), got {}",
                i, len(lens), int(group_of[i]),
            )  # fmt: skip
        members = torch.bincount(group_of, minlength=len(lens))
        _check_used_pages("prefix table", table, lens * (members > 0), page_size, pages)
    _check_lengths("context_lens", context_lens, block_table, page_size)
    _check_used_pages("block_table", block_table, context_lens, page_size, pages)


def _backend(impl, device, dtype, head_dim, sequential) -> str:
    """As backends.resolve; sequential calls are for others than CUDA, and a forced "cuda" raises."""
    if sequential and (impl or os.environ.get("HPSAFETY_IMPL")) == "cuda":
        raise backends.BackendUnavailable(f"paged_attention: {backends.cuda('paged_attention').SEQUENTIAL}")
    have = tuple(name for name in BACKENDS if name != "cuda" or not sequential)
    return backends.resolve("paged_attention", impl, have, device, dtype, head_dim)


_backend._dynamo_marked_constant = True  # as backends.resolve


def paged_attention(
    q,
    k_pages,
    v_pages,
    block_table,
    context_lens,
    prefix=None,
    *,
    softmax_scale=None,
    sequential=False,
    impl=None,
):
    """One decoding step: softmax(q k^T * scale) v of one query per sequence over its whole paged context.

    q                 (B, H, K) fp32 or bf16, K <= 256; the newest token's key and value are already in the pages
    k_pages, v_pages  (pages, page_size, G, K) like q, last stride 1; query head h reads kv head h // (H / G). They
                      are read where they stand, so they may be views of a larger cache
    block_table       (B, max_blocks) int32: token t of sequence b stands in slot t % page_size of page
                      block_table[b, t // page_size]. Pages may be shared; entries past the used ones, and slots past
                      the last token, may hold anything
    context_lens      (B,) int32: tokens of each sequence; 0 is valid
    prefix            None, or (table (groups, pages), lens (groups,), group_of (B,)), all int32: sequence b sees the
                      lens[group_of[b]] tokens of its group's pages before its own, and block_table and context_lens
                      cover its own tokens only. The group's pages are read once for all its members; both parts are
                      merged by their log-sum-exp. A group may have no tokens, or no members (its table is not read)
    softmax_scale     factor of the scores, 1/sqrt(K) by default
    sequential        True takes a sequence's keys block after block, its prefix first, as attention does: the bits are
                      those of attention's last row of a segment with that prefix. A long context is then the work of
                      one thread (on a GPU, of one block) for each kv head. The reference gives the same either way;
                      the cuda backend has no such form: unasked, another one serves, Triton on a GPU
    returns           (B, H, K) like q, fresh; zeros for a sequence without any token
    Forward only, nothing is saved. The arithmetic is fp32. A sequence's bits depend on its own query, keys, values and
    prefix length alone: not on the other sequences, the members of its group, page size, tables or threads.
    A NaN in a key or value reaches the sequences that see it and no others; a row whose scores are all -inf, or
    hold +inf, is NaN, as softmax is.
    Raises ValueError on shapes, dtypes, strides or devices that do not fit, on a used page outside of k_pages, a
    length that is negative or longer than its table covers, a group out of range, and where a gradient would flow.
    On a GPU the values of tables and lengths are read only with HPSAFETY_CHECK=1: wrong ones read memory of others.
    """
    check(
        not torch.is_grad_enabled()
        or not (q.requires_grad or k_pages.requires_grad or v_pages.requires_grad),
        "paged_attention: has no gradient; call attention, or wrap the call in torch.no_grad()",
    )
    _check_pages(q, k_pages, v_pages)
    _check_table("block_table", block_table, "context_lens", context_lens, q.shape[0], q.device)
    if prefix is not None:
        _check_prefix(prefix, q.shape[0], q.device)
    softmax_scale = q.shape[-1] ** -0.5 if softmax_scale is None else float(softmax_scale)
    check(
        math.isfinite(softmax_scale) and softmax_scale > 0,
        "paged_attention: softmax_scale must be positive, got {}", softmax_scale,
    )  # fmt: skip
    impl = _backend(impl, q.device.type, q.dtype, q.shape[2], bool(sequential))
    if impl == "reference":
        return reference.paged_attention(
            q, k_pages, v_pages, block_table, context_lens, prefix, softmax_scale
        )
    check(
        q.dtype in (torch.float32, torch.bfloat16),
        "paged_attention: q must be float32 or bfloat16, got {}", q.dtype,
    )  # fmt: skip
    check(
        k_pages.stride(-1) == 1 and v_pages.stride(-1) == 1 or q.shape[2] == 1,
        "paged_attention: k_pages and v_pages must have last stride 1, got {} and {}",
        k_pages.stride(-1), v_pages.stride(-1),
    )  # fmt: skip
    if impl != "cpu" and values_readable(q):
        _check_values(k_pages, block_table, context_lens, prefix)
    table, lens, group_of = prefix or (None, None, None)
    args = (q, k_pages, v_pages, block_table, context_lens, table, lens, group_of)
    return _op(*args, softmax_scale, bool(sequential), impl)
