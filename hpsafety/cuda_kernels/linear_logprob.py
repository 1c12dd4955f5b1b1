"""linear_logprob in CUDA: GEMMs of a BLAS, and the kernels of csrc/cuda/linear_logprob.cu between them.

The logits of a part, some rows by some words, stand at a time, in BUFFER_BYTES whatever N and V are. Forward: each
part goes into the running softmax of its rows. Backward: each part's logits are made again and become their gradients
in place; two GEMMs add those to grad_hidden, in fp32 over all parts, and to the grad_weight of the part's words.

No value is read on the host, so the GEMMs run over all rows: those without gradient take part as zeros.
"""

import torch

from hpsafety.cuda_kernels.blas import product
from hpsafety.cuda_kernels.library import launch

BUFFER_BYTES = 64 << 20  # of a part's logits, fp32
ROWS = 4096  # most of a part
TILE, MOST_TILES = 4096, 4  # words: a row's sums run tile by tile in the kernels, whatever the parts are
COPY, COPY_BF16, ROUND = 0, 1, 2  # kinds of hps_logprob_keep_rows


def part_of(n: int) -> tuple[int, int]:
    """Most rows and words of a part."""
    rows = min(n, ROWS)
    tiles = BUFFER_BYTES // 4 // rows // TILE
    return rows, TILE * min(tiles, MOST_TILES)


def _with_rows(x):
    return x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous()


def _parts(n: int, v: int):
    """(first row, rows, first word, words) of each part, words outermost: a part of the words takes all rows."""
    rows, words = part_of(n)
    for first_word in range(0, v, words):
        for first_row in range(0, n, rows):
            yield first_row, min(rows, n - first_row), first_word, min(words, v - first_word)


def _buffer(hidden, v: int):
    rows, words = part_of(hidden.shape[0])
    return hidden.new_empty(rows * _stride(min(words, v)), dtype=torch.float32)


def _stride(words: int) -> int:
    return -(-words // 8) * 8  # rows at 16-byte addresses, as fp32 and as bf16


def _logits(buffer, hidden, weight):
    """hidden @ weight^T (rows, words) fp32, rows _stride(words) apart."""
    (rows, _), words = hidden.shape, weight.shape[0]
    out = buffer.narrow(0, 0, rows * _stride(words)).view(rows, _stride(words)).narrow(1, 0, words)
    product(hidden, weight.t(), out)
    return out


def _starts_in_bf16(buffer, logits):
    """What hps_logprob_dlogits leaves for bf16: at the start of each row's place."""
    (rows, words), stride = logits.shape, logits.stride(0)
    halves = buffer.narrow(0, 0, rows * stride).view(torch.bfloat16)
    return halves.view(rows, 2 * stride).narrow(1, 0, words)


def _targets(targets, first_row: int, rows: int):
    return targets.narrow(0, first_row, rows), int(targets.dtype == torch.int64)


def linear_logprob(hidden, weight, targets, temperature, entropy):
    """(logprobs (N,), norm (2, N), entropies (N,) or empty), fp32; arguments as in hpsafety::linear_logprob."""
    hidden, weight, targets = _with_rows(hidden), _with_rows(weight), targets.contiguous()
    n, v = hidden.shape[0], weight.shape[0]
    logprobs, norm = hidden.new_empty(n, dtype=torch.float32), hidden.new_empty((2, n), dtype=torch.float32)
    entropies = hidden.new_empty(n if entropy else 0, dtype=torch.float32)
    if n == 0:
        return logprobs, norm, entropies
    top, total, weighted, at_target = (hidden.new_empty(n, dtype=torch.float32) for _ in range(4))
    weighted = weighted if entropy else None
    buffer = _buffer(hidden, v)
    for first_row, rows, first_word, words in _parts(n, v):
        logits = _logits(buffer, hidden.narrow(0, first_row, rows), weight.narrow(0, first_word, words))
        state = (x if x is None else x.narrow(0, first_row, rows) for x in (top, total, weighted, at_target))
        launch(
            "hps_logprob_update", "p llll pi f pppp", logits, rows, words, logits.stride(0), first_word,
            *_targets(targets, first_row, rows), 1 / temperature, *state,
        )  # fmt: skip
    launch(
        "hps_logprob_finish", "pppp ppp l", top, total, weighted, at_target, logprobs, norm,
        entropies if entropy else None, n,
    )  # fmt: skip
    return logprobs, norm, entropies


def _keep_rows(source, out, kind: int, grad=None, grad_entropy=None) -> None:
    rows, width = source.shape
    launch(
        "hps_logprob_keep_rows", "pl pll i pp", source, source.stride(0), out, rows, width, kind, grad, grad_entropy,
    )  # fmt: skip


def linear_logprob_backward(
    grad, grad_entropy, hidden, weight, targets, norm, entropy, temperature, need_hidden, need_weight
):
    """(grad_hidden, grad_weight), empty where not wanted; rows whose incoming gradients are zero are left out.

    Beside the results it holds BUFFER_BYTES, the rows once more and, for bf16, sums in fp32: (N, D), and of grad_weight
    those of a part's words.
    """
    hidden, weight, targets = _with_rows(hidden), _with_rows(weight), targets.contiguous()
    (n, d), v, bf16 = hidden.shape, weight.shape[0], hidden.dtype == torch.bfloat16
    wanted_hidden, wanted_weight = (n, d) if need_hidden else (0,), (v, d) if need_weight else (0,)
    if n == 0 or d == 0:
        return hidden.new_zeros(wanted_hidden), weight.new_zeros(wanted_weight)
    grad_hidden, grad_weight = hidden.new_empty(wanted_hidden), weight.new_empty(wanted_weight)
    norm, grad = norm.contiguous(), grad.to(torch.float32).contiguous()
    if grad_entropy is not None:
        grad_entropy, entropy = grad_entropy.to(torch.float32).contiguous(), entropy.contiguous()
    else:
        entropy = None
    by_row = (grad, grad_entropy, norm.select(0, 0), norm.select(0, 1), entropy)
    kept = hidden.new_empty((n, d))
    _keep_rows(hidden, kept, COPY_BF16 if bf16 else COPY, grad, grad_entropy)
    hidden_sums, word_sums = grad_hidden, None
    if bf16 and need_hidden:
        hidden_sums = hidden.new_empty((n, d), dtype=torch.float32)
    if bf16 and need_weight:
        word_sums = hidden.new_empty((min(part_of(n)[1], v), d), dtype=torch.float32)
    buffer = _buffer(hidden, v)
    for first_row, rows, first_word, words in _parts(n, v):
        part, weights = kept.narrow(0, first_row, rows), weight.narrow(0, first_word, words)
        logits = _logits(buffer, part, weights)
        of_rows = (x if x is None else x.narrow(0, first_row, rows) for x in by_row)
        launch(
            "hps_logprob_dlogits", "p llll pi f ppppp i", logits, rows, words, logits.stride(0), first_word,
            *_targets(targets, first_row, rows), 1 / temperature, *of_rows, int(bf16),
        )  # fmt: skip
        dz = _starts_in_bf16(buffer, logits) if bf16 else logits
        if need_hidden:
            product(dz, weights, hidden_sums.narrow(0, first_row, rows), first_word > 0)
        if need_weight:
            out = grad_weight.narrow(0, first_word, words)
            sums = word_sums.narrow(0, 0, words) if bf16 else out
            product(dz.t(), part, sums, first_row > 0)
            if bf16 and first_row + rows == n:
                _keep_rows(sums, out, ROUND)
    if need_hidden:
        _keep_rows(hidden_sums, grad_hidden, ROUND if bf16 else COPY, grad, grad_entropy)
    return grad_hidden, grad_weight
