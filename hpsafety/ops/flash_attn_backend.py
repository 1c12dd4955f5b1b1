"""attention through the flash-attn package (Dao-AILab, 2.x), where it is installed: the only file that imports it.

A prompt's rows and a response's own rows are sequences of one causal varlen call. A response's view of its prompt is a
second call without a mask, in which all responses of a prompt are ONE query sequence over the prompt's keys. The two
are merged by their log-sum-exp. Backward hands both calls the merged output and the merged lse: then each gives its
exact share of dQ, and dK, dV of the prompt are summed over its responses by the call itself.

The package takes bf16 and fp16, head dims in multiples of 8 (others are padded here) and sequences that lie end to end
(rows of no segment are left out here). Departure from the contract: a NaN value may also reach earlier rows of its own
segment, since the kernels multiply masked weights of 0 with it.
"""

import functools
import importlib.util
import math
from typing import NamedTuple

import torch
import torch.nn.functional as nnf
from torch.utils.weak import WeakTensorKeyDictionary

from hpsafety.ops import signatures
from hpsafety.reference.attention import check_segments

PACKAGE = "flash-attn"
DTYPES = (torch.bfloat16, torch.float16)
INSTALL = "pip install 'flash-attn>=2.8,<3' --no-build-isolation"
BRINGS = "FlashAttention-2 for ops.attention in bf16 and fp16"


def functions() -> dict:
    """Recorded name -> the package's function."""
    from flash_attn import flash_attn_interface as package

    names = ("flash_attn_varlen_func", "_flash_attn_varlen_backward")
    return {name: getattr(package, name) for name in names}


@functools.cache
def missing(op: str) -> str | None:
    """Why the package cannot serve on this machine, with the remedy; None when it can. Looked at once."""
    if importlib.util.find_spec("flash_attn") is None:
        return f"flash-attn is not installed: {INSTALL}"
    try:
        changed = signatures.mismatch(functions())
    except (ImportError, AttributeError, OSError, RuntimeError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        return f"flash-attn does not load ({reason}); build it for this torch: {INSTALL}"
    if changed:
        return f"this flash-attn is not the 2.8 line that the calls were written for: {changed}; {INSTALL}"
    if torch.version.cuda and torch.cuda.get_device_capability() < (8, 0):
        return "flash-attn needs an Ampere GPU or a newer one"
    return None


def unavailable(op: str, device: str, dtype: torch.dtype | None) -> str | None:
    """Why a call cannot be served; None when it can. dtype None: not known yet."""
    if device != "cuda":
        return f"flash-attn is not for CPUs: it takes CUDA tensors, got device {device}"
    if dtype is not None and dtype not in DTYPES:
        return f"flash-attn takes {' and '.join(map(str, DTYPES))}, got {dtype}"
    return missing(op)


class Call(NamedTuple):
    """The sequences of one varlen call: which rows it reads, and where sequences begin among them."""

    q_rows: slice | torch.Tensor
    k_rows: slice | torch.Tensor
    cu_q: torch.Tensor
    cu_k: torch.Tensor
    max_q: int
    max_k: int


class Plan(NamedTuple):
    own: Call | None  # every segment over its own rows, causal; None: there are no segments
    prefix: (
        Call | None
    )  # the rows of all segments with one prefix over that prefix, unmasked; None: no prefixes
    overlap: bool  # unequal prefixes share rows, so that their dK and dV collide


def _offsets(lengths):
    return nnf.pad(lengths.cumsum(0), (1, 0))


def _rows(starts, lengths):
    """The rows of spans, one span after the other: a slice where they lie end to end."""
    cu = _offsets(lengths)
    rows = torch.arange(int(cu[-1])) + torch.repeat_interleave(starts - cu[:-1], lengths)
    if bool((rows.diff() == 1).all()):
        return slice(int(rows[0]), int(rows[-1]) + 1)
    return rows


def _call(q_rows, k_rows, q_lengths, k_lengths, device) -> Call:
    move = lambda x: x if isinstance(x, slice) else x.to(device)  # noqa: E731
    cu_q, cu_k = (_offsets(x).to(torch.int32).to(device) for x in (q_lengths, k_lengths))
    # A bound of 1 would switch the package to its decoding path, which reads its tensors in another layout.
    max_q = max(2, int(q_lengths.max()))
    return Call(move(q_rows), move(k_rows), cu_q, cu_k, max_q, int(k_lengths.max()))


def make_plan(segments, total: int) -> Plan:
    """Segments -> calls. Reads the segments on the host (one synchronisation on CUDA) and checks them."""
    device = segments.device
    segments = segments.cpu().long()
    check_segments(segments, total)
    if not len(segments):
        return Plan(None, None, False)
    starts, lengths = segments[:, 0], segments[:, 1] - segments[:, 0]
    rows = _rows(starts, lengths)
    own = _call(rows, rows, lengths, lengths, device)
    pick = segments[:, 2] != segments[:, 3]
    if not bool(pick.any()):
        return Plan(own, None, False)
    prefixes, group = torch.unique(segments[pick, 2:], dim=0, return_inverse=True)
    order = group.argsort(stable=True)
    starts, lengths = starts[pick][order], lengths[pick][order]
    q_lengths = torch.zeros(len(prefixes), dtype=torch.int64).index_add(0, group[order], lengths)
    k_lengths = prefixes[:, 1] - prefixes[:, 0]
    k_rows = _rows(prefixes[:, 0], k_lengths)
    prefix = _call(_rows(starts, lengths), k_rows, q_lengths, k_lengths, device)
    ends = prefixes[:, 1].cummax(0).values
    return Plan(own, prefix, bool((prefixes[1:, 0] < ends[:-1]).any()))


_plans = WeakTensorKeyDictionary()  # segments -> (its version and the row count, plan)


def plan_of(segments, total: int) -> Plan:
    """The plan of a segments tensor, made once per batch: every layer, and backward, comes with the same tensor."""
    if segments.is_inference():  # has no version that would show a change
        return make_plan(segments, total)
    key = (segments._version, total)
    found = _plans.get(segments)
    if found is None or found[0] != key:
        found = _plans[segments] = (key, make_plan(segments, total))
    return found[1]


def _loadable(x):
    """x (T, H, K) with K padded to a multiple of 8 and in the strides that the kernels' 16-byte loads need."""
    if x.shape[-1] % 8:
        return nnf.pad(x, (0, -x.shape[-1] % 8))
    fits = x.stride(-1) == 1 and all(s % 8 == 0 for s in x.stride()[:-1]) and x.data_ptr() % 16 == 0
    return x if fits else x.clone(memory_format=torch.contiguous_format)


def _forward(call: Call, q, k, v, scale, causal):
    """(out (rows, H, K), lse (rows, H, 1) natural) of one call."""
    out, lse, _ = functions()["flash_attn_varlen_func"](
        q[call.q_rows], k[call.k_rows], v[call.k_rows], call.cu_q, call.cu_k, call.max_q, call.max_k,
        dropout_p=0.0, softmax_scale=scale, causal=causal, return_attn_probs=True,
    )  # fmt: skip
    return out, lse.t().unsqueeze(-1)


def _place(part, rows, total):
    """A tensor of `total` rows that holds part in `rows` and zeros elsewhere; part itself where these are all."""
    if isinstance(rows, slice) and len(part) == total:
        return part
    whole = part.new_zeros((total, *part.shape[1:]))
    whole[rows] = part
    return whole


def attention(q, k, v, segments, softmax_scale, deterministic):
    """Forward of ops.attention: out (T, H, K) and lse (T, H) fp32, base 2."""
    plan, dim = plan_of(segments, q.shape[0]), q.shape[-1]
    if plan.own is None:
        return q.new_zeros(q.shape), q.new_zeros(q.shape[:2], dtype=torch.float32)
    q, k, v = map(_loadable, (q, k, v))
    out, lse = (_place(x, plan.own.q_rows, len(q)) for x in _forward(plan.own, q, k, v, softmax_scale, True))
    if plan.prefix:
        rows = plan.prefix.q_rows
        seen, seen_lse = _forward(plan.prefix, q, k, v, softmax_scale, False)
        own_lse = lse[rows]
        # In fp32, and before lse is written: a slice of it is a view.
        out[rows] = torch.lerp(out[rows].float(), seen.float(), torch.sigmoid(seen_lse - own_lse)).to(q.dtype)
        lse[rows] = torch.logaddexp(own_lse, seen_lse)
    return out[..., :dim].contiguous(), lse.squeeze(-1).contiguous() / math.log(2)


def _backward(call: Call, grad, q, k, v, out, lse, scale, causal, deterministic):
    """Shares of (dq, dk, dv) of one call, for its rows."""
    rows, keys = call.q_rows, call.k_rows
    q, k, v = q[rows], k[keys], v[keys]
    shares = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v)]
    functions()["_flash_attn_varlen_backward"](
        grad[rows], q, k, v, out[rows], lse[rows].t().contiguous(), *shares, call.cu_q, call.cu_k,
        call.max_q, call.max_k, dropout_p=0.0, softmax_scale=scale, causal=causal, window_size_left=-1,
        window_size_right=-1, softcap=0.0, alibi_slopes=None, deterministic=deterministic,
    )  # fmt: skip
    return shares


def attention_backward(grad, q, k, v, out, lse, segments, softmax_scale, deterministic):
    """(dq, dk, dv) of ops.attention from what forward saved."""
    plan, dim = plan_of(segments, q.shape[0]), q.shape[-1]
    if plan.own is None:
        return tuple(torch.zeros_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    tensors = (*map(_loadable, (grad, q, k, v, out)), lse * math.log(2))
    own = _backward(plan.own, *tensors, softmax_scale, True, deterministic)
    grads = [_place(x, plan.own.q_rows, len(q)) for x in own]
    if plan.prefix:
        query, *keys = _backward(plan.prefix, *tensors, softmax_scale, False, deterministic)
        grads[0][plan.prefix.q_rows] += query
        rows = plan.prefix.k_rows
        for total, share in zip(grads[1:], keys, strict=True):
            if plan.overlap:  # sorts the rows first, so that the order of the sum is fixed
                total.index_put_((rows,), share, accumulate=True)
            else:
                total[rows] += share
    return tuple(x[..., :dim].contiguous() for x in grads)
