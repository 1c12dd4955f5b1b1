"""Whether PPO's contenders do the same work; no time counts where they do not (SystemExit with the reason).

Gradients, fp32: both programs compute the same sums in another order. Each is 1e-5 to 4e-5 of a tensor's norm away from
the fp64 gradient on smollm2; an error of the formula is as large as the gradient, so 1e-4 tells one from the other.

Gradients, bf16: the formula was proven in fp32, what is left is rounding. Transformers' autocast keeps the residual
stream in fp32; hpsafety rounds it to bf16 after each of two branches a layer. That rounding is relative to the whole
stream, which is a few times larger than the branch whose rounding autocast has as well. So all gradients of a model
together may be BF16_FACTOR times as far from the fp32 ones as autocast's, and never as far as they are long.
"""

import sys
from collections import defaultdict
from pathlib import Path

import torch
from safetensors import safe_open

FP32 = 1e-4
BF16_FACTOR = 4.0
# What counts as the same numbers: a step's loss; a reward model's logit; a logprob or value; the sum of a sample's
# logprobs over the root of its tokens. The largest difference in fp32. In bf16, of logprobs and their sums the root
# mean square: on smollm2 both programs' logprobs are 0.07 rms from the fp32 ones and 0.08 from each other, with tails.
LOSS = {"fp32": FP32, "bf16": 0.02}
SCORE = {"fp32": FP32, "bf16": 0.3}
LOGPROB = {"fp32": FP32, "bf16": 0.15}
LOGPROB_SUM = {"fp32": 2.5e-4, "bf16": 0.25}
SAME = "; this is not the same work, so no timing counts"


def _names(*files) -> list[str]:
    first, *others = (set(file.keys()) for file in files)
    for other in others:
        if first != other:
            sys.exit(f"parameters with gradients differ: {sorted(first ^ other)[:4]}{SAME}")
    return sorted(first)


def _norm(tensor) -> float:
    return float(tensor.double().norm())


def gradients_fp32(ours: Path, peer: Path) -> dict:
    """The largest distance of a parameter's gradients, relative to the peer's norm."""
    worst = (-1.0, "")
    with safe_open(ours, "pt") as a, safe_open(peer, "pt") as b:
        for name in _names(a, b):
            mine, theirs = a.get_tensor(name), b.get_tensor(name)
            off = _norm(mine.double() - theirs.double()) / _norm(theirs)
            if not off <= FP32:
                sys.exit(f"gradients of {name} differ by {off:.1e} of their norm, more than {FP32:g}{SAME}")
            worst = max(worst, (off, name))
    return {"largest_distance": worst[0], "parameter": worst[1]}


def gradients_bf16(ours: Path, peer: Path, exact: Path) -> dict:
    """Role -> distance of both programs' gradients from the fp32 ones, relative to their norm."""
    sums = defaultdict(float)
    with safe_open(ours, "pt") as a, safe_open(peer, "pt") as b, safe_open(exact, "pt") as c:
        for name in _names(a, b, c):
            role, true = name.split(".")[0], c.get_tensor(name).double()
            sums[role, "norm"] += _norm(true) ** 2
            for who, file in (("hpsafety", a), ("peer", b)):
                sums[role, who] += _norm(file.get_tensor(name).double() - true) ** 2
    found = {}
    for role in sorted({role for role, _ in sums}):
        mine, theirs = ((sums[role, who] / sums[role, "norm"]) ** 0.5 for who in ("hpsafety", "peer"))
        if not mine <= min(BF16_FACTOR * theirs, 1.0):
            sys.exit(
                f"the {role}'s bf16 gradients are {mine:.2e} of their norm off the fp32 ones, autocast's {theirs:.2e}; "
                f"at most {BF16_FACTOR:g} times that is rounding, and less than 1{SAME}"
            )
        found[role] = {"hpsafety": mine, "peer": theirs}
    return found


def values(
    what: str, name: str, found: list[float], wanted: list[float], tolerance: float, rms=False
) -> float:
    """The largest difference of two lists of numbers, or the root mean square of all; exits 1 above the tolerance."""
    if len(found) != len(wanted):
        sys.exit(f"{name} has {len(found)} numbers of {what}, hpsafety {len(wanted)}{SAME}")
    apart = (torch.tensor(found, dtype=torch.float64) - torch.tensor(wanted, dtype=torch.float64)).abs()
    off = float(apart.square().mean().sqrt() if rms else apart.max())  # NaN where a number is
    if not off <= tolerance:
        sys.exit(f"{what} of {name} and hpsafety differ by {off:.2e}, more than {tolerance:.2g}{SAME}")
    return off


def lengths(run: dict, samples: int, tokens: int) -> None:
    """Every contender has sampled just so many responses of just so many tokens."""
    if [len(sample) for sample in run["samples"]] != [tokens] * samples:
        sys.exit(f"{run['contender']} did not sample {samples} responses of {tokens} tokens{SAME}")
