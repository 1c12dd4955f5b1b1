"""The call contract with optional packages: what their functions looked like when our calls were written.

A package that has changed is told apart before the first call: its backend becomes unavailable with one line that names
the parameter, instead of a crash, or worse, an argument in another's place.
"""

import inspect
import re

# Python functions: parameters in order, with defaults. C++ ones (pybind11, no names): the kind of each parameter.
RECORDED = {
    # Dao-AILab/flash-attention, flash_attn/flash_attn_interface.py, releases 2.7.4 to 2.8.3 and 2.8.4 of 2026-08-15
    "flash_attn_varlen_func": (
        "q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None, "
        "causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None, deterministic=False, "
        "return_attn_probs=False, block_table=None"
    ),
    "_flash_attn_varlen_backward": (
        "dout, q, k, v, out, softmax_lse, dq, dk, dv, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, "
        "dropout_p, softmax_scale, causal, window_size_left, window_size_right, softcap, alibi_slopes, "
        "deterministic, rng_state=None, zero_tensors=False"
    ),
    # NVIDIA/apex, csrc/amp_C_frontend.cpp and csrc/layer_norm_cuda.cpp, master of 2026-07-08 (6424da3)
    "multi_tensor_scale": "int, Tensor, Tensor[][], float",
    "multi_tensor_adam_capturable": (
        "int, Tensor, Tensor[][], Tensor, float, float, float, Tensor, int, int, float, Tensor"
    ),
    "rms_forward_affine": "Tensor, int[], Tensor, float",
    "rms_backward_affine": "Tensor, Tensor, Tensor, int[], Tensor, float, bool",
}


def _kind(annotation: str) -> str:
    """pybind11's text for a C++ parameter, of any of its versions, in the words of RECORDED."""
    nested = len(re.findall(r"(?:Sequence|List|list|Tuple|tuple)\[", annotation)) * "[]"
    for name, pattern in (
        ("Tensor", "Tensor"),
        ("float", "[fF]loat"),
        ("bool", "bool"),
        ("int", r"\bint\b|Int\b"),
    ):
        if re.search(pattern, annotation):
            return name + nested
    return annotation


def parameters(function) -> list[str]:
    """A function's parameters in the form of RECORDED; ValueError when it does not say."""
    declared = re.match(r"\w+\((arg0: .*)\) -> ", (getattr(function, "__doc__", None) or "").split("\n")[0])
    if declared and not inspect.isfunction(function):
        return [_kind(text) for text in re.split(r",? ?arg\d+: ", declared[1])[1:]]
    python = getattr(function, "_init_fn", function)  # what torch.library.custom_op wraps
    return [
        p.name if p.default is p.empty else f"{p.name}={p.default!r}"
        for p in inspect.signature(python).parameters.values()
    ]


def difference(name: str, function, exact: bool = False) -> str | None:
    """What changed in `function` against RECORDED[name], in one line; None when our calls still fit.

    exact  also report new optional parameters at the end, which our calls need not know
    """
    expected = re.split(r", (?![^(]*\))", RECORDED[name])
    try:
        found = parameters(function)
    except (TypeError, ValueError) as error:
        return f"{name} does not tell its parameters ({error})"
    for i, (old, new) in enumerate(zip(expected, found, strict=False), 1):
        if old != new:
            return f"parameter {i} of {name} is now {new!r}, was {old!r}"
    if len(found) < len(expected):
        return f"{name} has lost parameter {len(found) + 1}, {expected[len(found)]!r}"
    extra = found[len(expected) :]
    if extra and (exact or not all("=" in p for p in extra)):
        return f"{name} has a new parameter {len(expected) + 1}, {extra[0]!r}"
    return None


def mismatch(functions: dict) -> str | None:
    """The first difference among recorded name -> function; None when all fit."""
    return next(filter(None, (difference(name, function) for name, function in functions.items())), None)
