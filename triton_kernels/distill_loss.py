"""distill_loss, forward and backward. Limit: the GEMMs. p is the teacher, q the student, x = log p - log q.

A program makes the logits of one tile of both models. The two KL stream: six numbers per row and split remain. "jsd"
needs both normalisers before its first term and makes the logits twice: four GEMMs forward instead of two, and no
memory. Backward is linear_tiles.linear_backward, with the gradients of csrc/cpu/distill_loss_backward.cpp.
"""

import torch
import triton
import triton.language as tl

from hpsafety.triton_kernels.launch import launch
from hpsafety.triton_kernels.linear_tiles import (
    GROUP,
    PART,
    add_by_parts,
    finite_reference,
    gathered,
    grouped,
    kept_rows,
    linear_backward,
    splits_of,
    tile_logits,
    tiles,
    with_rows,
)

SHARED_BYTES = (98304, 196608)  # of a block on sm_80, sm_90 at most; tests/triton/test_static.py compares
MERGED_ROWS, MERGED_SPLITS = 32, 16
FORWARD_KL = tl.constexpr("forward_kl")
REVERSE_KL = tl.constexpr("reverse_kl")


@triton.jit
def expm1_negative(y):
    """exp(y) - 1 for y <= 0, to the last digits also near 0."""
    near = y * (1 / 5040) + 1 / 720
    near = near * y + 1 / 120
    near = near * y + 1 / 24
    near = near * y + 1 / 6
    near = near * y + 0.5
    near = (near * y + 1) * y
    return tl.where(y > -0.35, near, tl.exp(y) - 1)


@triton.jit
def lost_digits(z, m, d):
    """What rounding took from d = z - m."""
    z_again = d + m
    return tl.where(tl.abs(d) == float("inf"), 0.0, (z - z_again) - (m - (z_again - d)))


@triton.jit
def log_over_mean(distance):
    """log(larger / m) of two probabilities whose ratio is exp(distance), m their mean: -log((1 + exp(-distance)) / 2).

    As -2 atanh(e / (4 + e)) with e = expm1(-distance), so that p and q may all but agree.
    """
    e = expm1_negative(-distance)
    t = e / (4 + e)
    square = t * t
    series = square * (1 / 17) + 1 / 15
    series = series * square + 1 / 13
    series = series * square + 1 / 11
    series = series * square + 1 / 9
    series = series * square + 1 / 7
    series = series * square + 0.2
    series = series * square + 1 / 3
    return -2 * t * (series * square + 1)


@triton.jit
def add_pair_terms(sums, z_a, z_b, words, rows):
    """Of pair_forward's sums."""
    s_a, s_b, u = sums
    m_a, m_b, EXACT = rows
    d_a = z_a - m_a[:, None]
    d_b = z_b - m_b[:, None]
    e = tl.exp(d_a)
    s_a += tl.sum(e, 1)
    s_b += tl.sum(tl.exp(d_b), 1)
    u += tl.sum(tl.where(e == 0, 0.0, e * (d_a - d_b)), 1).to(tl.float64)
    if EXACT:
        lost = lost_digits(z_a, m_a[:, None], d_a) - lost_digits(z_b, m_b[:, None], d_b)
        u += tl.sum(tl.where(e == 0, 0.0, e * lost), 1).to(tl.float64)
    return s_a, s_b, u


@triton.jit(do_not_specialize=["n"])
def pair_forward(
    a_ptr, a_w_ptr, b_ptr, b_w_ptr, partial_ptr, n, v, d_a, d_b, a_stride, a_w_stride, b_stride, b_w_stride, alpha,
    splits, EXACT: tl.constexpr, EVEN_A: tl.constexpr, EVEN_B: tl.constexpr, TILES: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Per row and split of KL(a||b): both maxima and sums, and u = sum exp(da) (da - db) with d = z - m, in two floats.

    EXACT: where a is all but certain, the gradient is what remains of u and one da - db, which may be hundreds; so u
    takes the digits that da and db lost.
    """
    block, split = grouped(tl.program_id(0), tl.cdiv(n, BLOCK_M), splits, GROUP)
    place = block * BLOCK_M + tl.arange(0, BLOCK_M)
    row, row_mask = place.to(tl.int64), place < n
    m_a = tl.full([BLOCK_M], float("-inf"), tl.float32)
    m_b = tl.full([BLOCK_M], float("-inf"), tl.float32)
    s_a, s_b = tl.zeros([BLOCK_M], tl.float32), tl.zeros([BLOCK_M], tl.float32)
    u = tl.zeros([BLOCK_M], tl.float64)
    for tile in tl.range(0, TILES, disable_licm=True):
        first = (split * TILES + tile) * BLOCK_N
        if first < v:
            word = first + tl.arange(0, BLOCK_N).to(tl.int64)
            z_a = tile_logits(
                a_ptr, row, row_mask, a_stride, a_w_ptr, word, word < v, a_w_stride, d_a,
                BLOCK_M, BLOCK_N, BLOCK_K, EVEN_A,
            )  # fmt: skip
            z_b = tile_logits(
                b_ptr, row, row_mask, b_stride, b_w_ptr, word, word < v, b_w_stride, d_b,
                BLOCK_M, BLOCK_N, BLOCK_K, EVEN_B,
            )  # fmt: skip
            inside = (tl.arange(0, BLOCK_N) < v - first)[None, :]
            z_a = tl.where(inside, z_a * alpha, float("-inf"))
            z_b = tl.where(inside, z_b * alpha, float("-inf"))
            top_a = tl.maximum(m_a, tl.max(z_a, 1))
            top_b = tl.maximum(m_b, tl.max(z_b, 1))
            old_a, old_b = finite_reference(m_a), finite_reference(m_b)
            new_a, new_b = finite_reference(top_a), finite_reference(top_b)
            scale = tl.exp(m_a - new_a)
            shift = (old_a - new_a).to(tl.float64) - (old_b - new_b).to(tl.float64)
            u = scale.to(tl.float64) * (u + shift * s_a.to(tl.float64))
            s_a = scale * s_a
            s_b = tl.exp(m_b - new_b) * s_b
            m_a, m_b = top_a, top_b
            rows = (new_a, new_b, EXACT)
            s_a, s_b, u = add_by_parts(add_pair_terms, (s_a, s_b, u), z_a, z_b, v - first, rows)
    size = splits.to(tl.int64) * n
    at = partial_ptr + split.to(tl.int64) * n + row
    tl.store(at, m_a, mask=row_mask)
    tl.store(at + size, s_a, mask=row_mask)
    tl.store(at + 2 * size, m_b, mask=row_mask)
    tl.store(at + 3 * size, s_b, mask=row_mask)
    upper = u.to(tl.float32)
    tl.store(at + 4 * size, upper, mask=row_mask)
    lower = tl.where(tl.abs(upper) == float("inf"), 0.0, (u - upper.to(tl.float64)).to(tl.float32))
    tl.store(at + 5 * size, lower, mask=row_mask)


@triton.jit(do_not_specialize=["n"])
def merge_pairs(
    partial_ptr, loss_ptr, norm_ptr, n, splits,
    STUDENT_FIRST: tl.constexpr, ROWS: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """The splits' numbers in order, in fp64: norm (5, N) and the KL. No finite maximum on either side: NaN."""
    place = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    row, mask = place.to(tl.int64), place < n
    m_a = tl.full([ROWS], float("-inf"), tl.float64)
    m_b = tl.full([ROWS], float("-inf"), tl.float64)
    s_a, s_b = tl.zeros([ROWS], tl.float64), tl.zeros([ROWS], tl.float64)
    u = tl.zeros([ROWS], tl.float64)
    old_a, old_b = tl.zeros([ROWS], tl.float64), tl.zeros([ROWS], tl.float64)
    size = splits.to(tl.int64) * n
    for first in range(0, splits, SPLITS):
        split = first + tl.arange(0, SPLITS).to(tl.int64)
        inside = (split < splits)[:, None] & mask[None, :]
        at = partial_ptr + split[:, None] * n + row[None, :]
        m_a_part = tl.load(at, mask=inside, other=float("-inf")).to(tl.float64)
        s_a_part = tl.load(at + size, mask=inside, other=0.0).to(tl.float64)
        m_b_part = tl.load(at + 2 * size, mask=inside, other=float("-inf")).to(tl.float64)
        s_b_part = tl.load(at + 3 * size, mask=inside, other=0.0).to(tl.float64)
        u_part = tl.load(at + 4 * size, mask=inside, other=0.0).to(tl.float64)
        u_part += tl.load(at + 5 * size, mask=inside, other=0.0).to(tl.float64)
        top_a = tl.maximum(m_a, tl.max(m_a_part, 0))
        top_b = tl.maximum(m_b, tl.max(m_b_part, 0))
        new_a, new_b = finite_reference(top_a), finite_reference(top_b)
        shift_a = finite_reference(m_a_part) - new_a[None, :]
        shift_b = finite_reference(m_b_part) - new_b[None, :]
        scale, scale_part = tl.exp(m_a - new_a), tl.exp(m_a_part - new_a[None, :])
        u = scale * (u + ((old_a - new_a) - (old_b - new_b)) * s_a)
        u += tl.sum(tl.where(scale_part == 0, 0.0, scale_part * (u_part + (shift_a - shift_b) * s_a_part)), 0)
        s_a = scale * s_a + tl.sum(scale_part * s_a_part, 0)
        s_b = tl.exp(m_b - new_b) * s_b + tl.sum(tl.exp(m_b_part - new_b[None, :]) * s_b_part, 0)
        m_a, m_b, old_a, old_b = top_a, top_b, new_a, new_b
    bad = (m_a == float("-inf")) | (m_b == float("-inf"))
    log_a = tl.where(bad, float("nan"), tl.log(s_a))
    log_b = tl.where(bad, float("nan"), tl.log(s_b))
    kl = u / s_a - log_a + log_b
    student = 0 if STUDENT_FIRST else 2
    tl.store(norm_ptr + student * n + row, m_a, mask=mask)
    tl.store(norm_ptr + (student + 1) * n + row, log_a, mask=mask)
    tl.store(norm_ptr + (2 - student) * n + row, m_b, mask=mask)
    tl.store(norm_ptr + (3 - student) * n + row, log_b, mask=mask)
    tl.store(norm_ptr + tl.full([], 4, tl.int64) * n + row, kl, mask=mask)
    # Rounding may take nothing a little below zero.
    tl.store(loss_ptr + row, tl.where(kl < 0, 0.0, kl), mask=mask)


@triton.jit
def load_norm(norm_ptr, n, row, mask):
    """m and log s of student and teacher; log s of the teacher less the student's, and the divergence, in fp64."""
    size = tl.full([], 1, tl.int64) * n
    m_q = tl.load(norm_ptr + row, mask=mask, other=0.0).to(tl.float32)
    log_q = tl.load(norm_ptr + size + row, mask=mask, other=0.0)
    m_p = tl.load(norm_ptr + 2 * size + row, mask=mask, other=0.0).to(tl.float32)
    log_p = tl.load(norm_ptr + 3 * size + row, mask=mask, other=0.0)
    divergence = tl.load(norm_ptr + 4 * size + row, mask=mask, other=0.0)
    return m_q, log_q.to(tl.float32), m_p, log_p.to(tl.float32), log_p - log_q, divergence


@triton.jit
def add_mean_terms(sums, z_q, z_p, words, rows):
    """Of KL(p||m) and KL(q||m), word by word."""
    from_p, from_q = sums
    alpha, m_q, log_q, m_p, log_p, shift = rows
    inside = (tl.arange(0, z_q.shape[1]) < words)[None, :]
    d_q = tl.where(inside, z_q * alpha, float("-inf")) - m_q[:, None]
    d_p = tl.where(inside, z_p * alpha, float("-inf")) - m_p[:, None]
    q = tl.exp(d_q - log_q[:, None])
    p = tl.exp(d_p - log_p[:, None])
    x = (d_p - d_q) - shift[:, None]
    larger = log_over_mean(tl.abs(x))
    from_p += tl.where(p == 0, 0.0, p * tl.where(x > 0, larger, larger + x))
    from_q += tl.where(q == 0, 0.0, q * tl.where(x > 0, larger - x, larger))
    return from_p, from_q


@triton.jit(do_not_specialize=["n"])
def mean_forward(
    q_ptr, q_w_ptr, p_ptr, p_w_ptr, norm_ptr, partial_ptr, n, v, d_q, d_p, q_stride, q_w_stride, p_stride, p_w_stride,
    alpha, splits, EVEN_Q: tl.constexpr, EVEN_P: tl.constexpr, TILES: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Per row and split: the parts of KL(p||m) and of KL(q||m)."""
    block, split = grouped(tl.program_id(0), tl.cdiv(n, BLOCK_M), splits, GROUP)
    place = block * BLOCK_M + tl.arange(0, BLOCK_M)
    row, row_mask = place.to(tl.int64), place < n
    from_p, from_q = tl.zeros([BLOCK_M], tl.float32), tl.zeros([BLOCK_M], tl.float32)
    for tile in tl.range(0, TILES, disable_licm=True):
        first = (split * TILES + tile) * BLOCK_N
        if first < v:
            word = first + tl.arange(0, BLOCK_N).to(tl.int64)
            z_q = tile_logits(
                q_ptr, row, row_mask, q_stride, q_w_ptr, word, word < v, q_w_stride, d_q,
                BLOCK_M, BLOCK_N, BLOCK_K, EVEN_Q,
            )  # fmt: skip
            z_p = tile_logits(
                p_ptr, row, row_mask, p_stride, p_w_ptr, word, word < v, p_w_stride, d_p,
                BLOCK_M, BLOCK_N, BLOCK_K, EVEN_P,
            )  # fmt: skip
            m_q, log_q, m_p, log_p, shift, _ = load_norm(norm_ptr, n, row, row_mask)
            terms = tl.zeros([BLOCK_M, PART], tl.float32)
            rows = (alpha, m_q, log_q, m_p, log_p, shift.to(tl.float32))
            p_terms, q_terms = add_by_parts(add_mean_terms, (terms, terms), z_q, z_p, v - first, rows)
            from_p += tl.sum(p_terms, 1)
            from_q += tl.sum(q_terms, 1)
    at = partial_ptr + split.to(tl.int64) * n + row
    tl.store(at, from_p, mask=row_mask)
    tl.store(at + splits.to(tl.int64) * n, from_q, mask=row_mask)


@triton.jit(do_not_specialize=["n"])
def merge_means(partial_ptr, loss_ptr, norm_ptr, n, splits, ROWS: tl.constexpr, SPLITS: tl.constexpr):
    """Jensen-Shannon divergence, and KL(q||m) in the norm's last row, from the splits in order, in fp64."""
    place = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    row, mask = place.to(tl.int64), place < n
    from_p, from_q = tl.zeros([ROWS], tl.float64), tl.zeros([ROWS], tl.float64)
    for first in range(0, splits, SPLITS):
        split = first + tl.arange(0, SPLITS).to(tl.int64)
        inside = (split < splits)[:, None] & mask[None, :]
        at = partial_ptr + split[:, None] * n + row[None, :]
        from_p += tl.sum(tl.load(at, mask=inside, other=0.0).to(tl.float64), 0)
        from_q += tl.sum(tl.load(at + splits.to(tl.int64) * n, mask=inside, other=0.0).to(tl.float64), 0)
    m_q, log_q, m_p, log_p, shift, divergence = load_norm(norm_ptr, n, row, mask)
    bad = shift != shift
    tl.store(norm_ptr + tl.full([], 4, tl.int64) * n + row, tl.where(bad, float("nan"), from_q), mask=mask)
    loss = tl.where(bad, float("nan"), 0.5 * from_p + 0.5 * from_q)
    tl.store(loss_ptr + row, tl.where(loss < 0, 0.0, loss), mask=mask)


@triton.jit(do_not_specialize=["n", "first_row", "rows", "words"])
def distill_dlogits(
    q_ptr, q_w_ptr, p_ptr, p_w_ptr, grad_ptr, norm_ptr, index_ptr, count_ptr, dz_ptr,
    n, first_row, rows, words, d_q, d_p, q_w_stride, p_w_stride, dz_stride, alpha,
    KIND: tl.constexpr, EVEN_Q: tl.constexpr, EVEN_P: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """g (q - p), g q (-x - KL(q||p)) or g q (log(q / m) - KL(q||m)) / 2, with g = grad over temperature.

    q and p are the gathered rows; grad and norm stand where index says.
    """
    block, tile = grouped(tl.program_id(0), tl.cdiv(rows, BLOCK_M), tl.cdiv(words, BLOCK_N), GROUP)
    here = tl.minimum(tl.load(count_ptr) - first_row, rows)
    if block * BLOCK_M >= here:
        return
    place = block * BLOCK_M + tl.arange(0, BLOCK_M)
    row_mask = place < here
    at_row = (first_row + place).to(tl.int64)
    word = tile * BLOCK_N + tl.arange(0, BLOCK_N).to(tl.int64)
    inside = word < words
    z_q = tile_logits(
        q_ptr, at_row, row_mask, d_q, q_w_ptr, word, inside, q_w_stride, d_q,
        BLOCK_M, BLOCK_N, BLOCK_K, EVEN_Q,
    )  # fmt: skip
    z_p = tile_logits(
        p_ptr, at_row, row_mask, d_p, p_w_ptr, word, inside, p_w_stride, d_p,
        BLOCK_M, BLOCK_N, BLOCK_K, EVEN_P,
    )  # fmt: skip
    row = tl.load(index_ptr + at_row, mask=row_mask, other=0).to(tl.int64)
    g = tl.load(grad_ptr + row, mask=row_mask, other=0.0) * alpha
    m_q, log_q, m_p, log_p, shift, divergence = load_norm(norm_ptr, n, row, row_mask)
    # Rounded before m is subtracted, as in the forward; the choice keeps the two from becoming one FMA.
    z_q = tl.where(inside[None, :], z_q * alpha, 0.0)
    z_p = tl.where(inside[None, :], z_p * alpha, 0.0)
    d_q_m = z_q - m_q[:, None]
    d_p_m = z_p - m_p[:, None]
    log_of_q = d_q_m - log_q[:, None]
    if KIND == REVERSE_KL:
        # Where q is all but certain, x + KL(q||p) is what remains of two numbers that may be thousands: two floats.
        centre = shift - divergence
        upper = centre.to(tl.float32)
        lower = (centre - upper.to(tl.float64)).to(tl.float32)
        q = tl.exp(log_of_q)
        lost = lost_digits(z_p, m_p[:, None], d_p_m) - lost_digits(z_q, m_q[:, None], d_q_m)
        minus = ((d_p_m - d_q_m) - upper[:, None]) + (lost - lower[:, None])
        dz = tl.where(q == 0, 0.0, -q * minus)
    else:
        x = (d_p_m - d_q_m) - shift.to(tl.float32)[:, None]
        if KIND == FORWARD_KL:
            # The larger of p and q times 1 - exp(-|x|): to the last digits where p and q all but agree.
            part = tl.exp(tl.maximum(d_p_m - log_p[:, None], log_of_q)) * expm1_negative(-tl.abs(x))
            dz = tl.where(x > 0, part, -part)
        else:
            q = tl.exp(log_of_q)
            larger = log_over_mean(tl.abs(x))
            over_mean = tl.where(x > 0, larger - x, larger)
            dz = tl.where(q == 0, 0.0, 0.5 * q * (over_mean - divergence.to(tl.float32)[:, None]))
    at = place.to(tl.int64)[:, None] * dz_stride + word[None, :]
    tl.store(dz_ptr + at, g[:, None] * dz, mask=row_mask[:, None] & inside[None, :])


def _pair_tiles(student, teacher) -> dict:
    return tiles("pair", student if student.dtype == torch.float32 else teacher)


def distill_loss(student_hidden, student_weight, teacher_hidden, teacher_weight, kind, temperature):
    """(loss (N,) fp32, norm (5, N) fp64: of the student, then the teacher m and log s; the divergence to subtract)."""
    student = with_rows(student_hidden), with_rows(student_weight)
    teacher = with_rows(teacher_hidden), with_rows(teacher_weight)
    n, v = student_hidden.shape[0], student_weight.shape[0]
    loss = student_hidden.new_empty(n, dtype=torch.float32)
    norm = student_hidden.new_empty((5, n), dtype=torch.float64)
    config = _pair_tiles(student_hidden, teacher_hidden)
    in_split, splits = splits_of(v, config["BLOCK_N"])
    programs, merges = triton.cdiv(n, config["BLOCK_M"]) * splits, triton.cdiv(n, MERGED_ROWS)
    merged = {"ROWS": MERGED_ROWS, "SPLITS": MERGED_SPLITS}

    def sizes(a, b):
        strides = a[0].stride(0), a[1].stride(0), b[0].stride(0), b[1].stride(0)
        return n, v, a[0].shape[1], b[0].shape[1], *strides, 1 / temperature, splits

    def even(side):
        return side[0].shape[1] % config["BLOCK_K"] == 0

    a, b = (teacher, student) if kind == "forward_kl" else (student, teacher)
    partial = loss.new_empty((6, splits, n))
    launch(
        pair_forward, programs, *a, *b, partial, *sizes(a, b),
        EXACT=kind == "reverse_kl", EVEN_A=even(a), EVEN_B=even(b), TILES=in_split, GROUP=GROUP, **config,
    )  # fmt: skip
    launch(merge_pairs, merges, partial, loss, norm, n, splits, STUDENT_FIRST=kind != "forward_kl", **merged)
    if kind == "jsd":
        launch(
            mean_forward, programs, *student, *teacher, norm, partial, *sizes(student, teacher),
            EVEN_Q=even(student), EVEN_P=even(teacher), TILES=in_split, GROUP=GROUP, **config,
        )  # fmt: skip
        launch(merge_means, merges, partial, loss, norm, n, splits, **merged)
    return loss, norm


def distill_loss_backward(
    grad, student_hidden, student_weight, teacher_hidden, teacher_weight, norm, kind, temperature, need_hidden,
    need_weight,
):  # fmt: skip
    """(grad of student_hidden, of student_weight), empty where not wanted; rows without gradient are left out."""
    student_hidden, student_weight = with_rows(student_hidden), with_rows(student_weight)
    teacher_hidden, teacher_weight = with_rows(teacher_hidden), with_rows(teacher_weight)
    grad, norm = grad.to(torch.float32).contiguous(), norm.contiguous()
    kept = kept_rows(grad)
    teacher_rows = gathered(teacher_hidden, kept)
    config = _pair_tiles(student_hidden, teacher_hidden)
    n, d_q, d_p = *student_hidden.shape, teacher_hidden.shape[1]

    def dlogits(dz, student_rows, first_row, rows, first_word, words):
        q_weight, p_weight = (w.narrow(0, first_word, words) for w in (student_weight, teacher_weight))
        launch(
            distill_dlogits, triton.cdiv(rows, config["BLOCK_M"]) * triton.cdiv(words, config["BLOCK_N"]),
            student_rows, q_weight, teacher_rows, p_weight, grad, norm, *kept, dz,
            n, first_row, rows, words, d_q, d_p, q_weight.stride(0), p_weight.stride(0), dz.stride(0), 1 / temperature,
            KIND=kind, EVEN_Q=d_q % config["BLOCK_K"] == 0, EVEN_P=d_p % config["BLOCK_K"] == 0, GROUP=GROUP,
            **config,
        )  # fmt: skip

    return linear_backward(dlogits, student_hidden, student_weight, kept, need_hidden, need_weight)
