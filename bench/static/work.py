"""What an op has to do at a model's shapes: floating-point operations of its matrix products, and bytes at the least.

A formula per launch function of triton_kernels/, of which the cases call some more than once: `call` counts from 0.
Bytes: each input read once, each output written once, in bf16 unless said. Operations beside matrix products are not
counted. Letters as in the ops: T packed tokens, N trained tokens, B sampled rows, H and G heads, K head dim, D width,
F mlp width, V words.
"""

import typing

from bench.static.cases import Shapes

BF16, FP32 = 2, 4


class Work(typing.NamedTuple):
    flops: float
    bytes: float


def _pairs(s: Shapes) -> int:
    """Scores of attention: a prompt with itself, each response with its prompt and itself."""
    p, r = s.prompt_length, s.response_length
    return s.prompts * (p * (p + 1) // 2 + s.responses * (r * p + r * (r + 1) // 2))


def _rows(s: Shapes) -> tuple[int, int]:
    """Numbers in all query rows, and in all key rows."""
    return s.tokens * s.heads * s.head_dim, s.tokens * s.kv_heads * s.head_dim


def attention(s: Shapes, call: int) -> Work:
    q, k = _rows(s)
    return Work(4 * s.head_dim * s.heads * _pairs(s), BF16 * (2 * q + 2 * k) + FP32 * s.tokens * s.heads)


def attention_backward(s: Shapes, call: int) -> Work:
    """Five products where forward has two."""
    q, k = _rows(s)
    return Work(10 * s.head_dim * s.heads * _pairs(s), BF16 * (4 * q + 4 * k) + FP32 * s.tokens * s.heads)


def _head(s: Shapes) -> tuple[float, int, int]:
    """Of one product with the token head: operations, numbers in hidden rows, numbers in the weight."""
    hidden, weight = s.trained * s.width, s.words * s.width
    return 2.0 * hidden * s.words, hidden, weight


def linear_logprob(s: Shapes, call: int) -> Work:
    product, hidden, weight = _head(s)
    return Work(product, BF16 * (hidden + weight) + s.trained * (8 + 2 * FP32))


def linear_logprob_backward(s: Shapes, call: int) -> Work:
    """The logits again, and a product each for the gradients of hidden and weight."""
    product, hidden, weight = _head(s)
    return Work(3 * product, BF16 * 2 * (hidden + weight) + s.trained * (8 + 2 * FP32))


def linear_cross_entropy(s: Shapes, call: int) -> Work:
    """Loss and both gradients; the second call asks for the loss alone."""
    product, hidden, weight = _head(s)
    times = 1 if call else 3
    return Work(times * product, BF16 * min(2, times) * (hidden + weight) + s.trained * (8 + 2 * FP32))


def distill_loss(s: Shapes, call: int) -> Work:
    """A student of half the width. The third call is the JSD, whose forward makes both models' logits twice."""
    product, hidden, weight = _head(s)
    return Work((3 if call == 2 else 1.5) * product, BF16 * 1.5 * (hidden + weight) + s.trained * 6 * FP32)


def distill_loss_backward(s: Shapes, call: int) -> Work:
    """Both models' logits again, and the student's two gradients."""
    product, hidden, weight = _head(s)
    return Work(2.5 * product, BF16 * 2 * (hidden + weight) + s.trained * 6 * FP32)


def rms_norm(s: Shapes, call: int) -> Work:
    """The second call adds a residual, and keeps the sum."""
    return Work(0, s.tokens * (s.width * BF16 * (4 if call else 2) + FP32) + BF16 * s.width)


def rms_norm_backward(s: Shapes, call: int) -> Work:
    return Work(0, s.tokens * (s.width * BF16 * (4 if call else 3) + FP32) + 2 * BF16 * s.width)


def rope(s: Shapes, call: int) -> Work:
    q, k = _rows(s)
    return Work(0, BF16 * 2 * (q + k) + 4 * s.tokens)


def rope_qkv(s: Shapes, call: int) -> Work:
    q, k = _rows(s)
    return Work(0, BF16 * 2 * (q + 2 * k) + 4 * s.tokens)


def swiglu(s: Shapes, call: int) -> Work:
    return Work(0, BF16 * 3 * s.tokens * s.mlp)


def swiglu_backward(s: Shapes, call: int) -> Work:
    """Makes the activation again beside the gradient."""
    return Work(0, BF16 * 6 * s.tokens * s.mlp)


def _layer(s: Shapes) -> int:
    """Weights of a layer."""
    kv = s.kv_heads * s.head_dim
    return s.width * (1 + s.width + 2 * kv + s.width + 3 * s.mlp)


def adamw_(s: Shapes, call: int) -> Work:
    """Calls: gradients in fp32, the same with bf16 copies, then both with gradients in bf16."""
    gradient, copy = (FP32 if call < 2 else BF16), (BF16 if call % 2 else 0)
    return Work(0, _layer(s) * (6 * FP32 + gradient + copy))


def grad_norm_sq(s: Shapes, call: int) -> Work:
    """Of the MLP's first weight and a norm's: in fp32, in bf16, and the latter in fp32."""
    return Work(0, 2 * s.mlp * s.width * (BF16 if call else FP32) + s.width * (BF16 if call == 1 else FP32))


def accumulate_(s: Shapes, call: int) -> Work:
    return Work(0, s.mlp * s.width * (2 * FP32 + (BF16 if call else FP32)))


def ppo_loss(s: Shapes, call: int) -> Work:
    """Six arrays and a mask in, two gradients out; the second call is in bf16 and has the entropy too."""
    return Work(0, s.trained * ((9 * BF16 if call == 1 else 8 * FP32) + 1))


def gae(s: Shapes, call: int) -> Work:
    """The second call has its values in bf16."""
    return Work(0, s.trained * (3 * FP32 + (BF16 if call else FP32)))


def reward_score(s: Shapes, call: int) -> Work:
    """The last row of each response, of two reward models."""
    return Work(0, BF16 * 2 * s.width * (s.prompts * s.responses + 1))


def pair_loss(s: Shapes, call: int) -> Work:
    """Without and with margins and bins, in fp32, then in bf16."""
    return Work(
        0, s.prompts * s.responses * ((BF16 if call > 1 else FP32) * (5 if call % 2 else 4) + 2 * (call % 2))
    )


def paged_attention(s: Shapes, call: int) -> Work:
    """A token for every sample: its own pages are read once, a prompt's once for all its samples."""
    rows = s.prompts * s.responses
    keys = s.prompts * s.prompt_length + rows * s.response_length
    seen = rows * (s.prompt_length + s.response_length)
    q = rows * s.heads * s.head_dim
    return Work(4 * s.head_dim * s.heads * seen, BF16 * (2 * keys * s.kv_heads * s.head_dim + 2 * q))


def sample(s: Shapes, call: int) -> Work:
    return Work(0, BF16 * s.prompts * s.responses * s.words)


FORMULAS = {
    function.__name__: function
    for function in (
        attention, attention_backward, linear_logprob, linear_logprob_backward, linear_cross_entropy, distill_loss,
        distill_loss_backward, rms_norm, rms_norm_backward, rope, rope_qkv, swiglu, swiglu_backward, adamw_,
        grad_norm_sq, accumulate_, ppo_loss, gae, reward_score, pair_loss, paged_attention, sample,
    )
} | {"rope_": rope, "rope_qkv_backward": rope_qkv}  # fmt: skip

# Functions that read some rows only of what they are given: what their launches move is the formula's bytes.
PARTIAL = {"reward_score", "paged_attention"}

# Launches that find nothing to do in the cases, by a word of their configuration, and so have no work: rows where a
# number is not finite, and rows of weight zero. Of the former, what a loop spills is no fault.
IDLE = {"attention_forward": "REDO=True", "linear_logprob_forward": "REST=True"}
MAY_SPILL = {"attention_forward"}

# Spills that stand until somebody cures them: kernel and chip -> most bytes in a loop, and in the hot one. A row beyond
# this is a fault.
KNOWN_SPILLS = {
    ("attention_forward", "sm_80"): (8, 0),
}

# The same of csrc/cuda: configuration and chip -> most bytes in a loop. This one finds work only where a number is not
# finite; H100's attention is Triton's by default.
CUDA_SPILLS = {("attention::attention_forward<128,true>", "sm_90"): 24}

# Of a function's operations, the share that a kernel does, recomputation included: more than 1 together then. The
# tensor-core kernels of a function that is not here, or that has other kernels by now, share equally.
SHARES = {
    "attention_backward": {"attention_backward_keys": 4 / 5, "attention_backward_rows": 3 / 5},
    "distill_loss_backward": {"distill_dlogits": 0.6, "hidden_gradient": 0.2, "weight_gradient": 0.2},
    "linear_logprob_backward": {"logprob_dlogits": 1 / 3, "hidden_gradient": 1 / 3, "weight_gradient": 1 / 3},
}


def work(function: str, shapes: Shapes, call: int = 0) -> Work | None:
    """None for a function without a formula."""
    return FORMULAS[function](shapes, call) if function in FORMULAS else None


def idle(row: dict) -> bool:
    """Whether a row of static.json is one of IDLE."""
    return row["kernel"] in IDLE and IDLE[row["kernel"]] in row["config"].split()
