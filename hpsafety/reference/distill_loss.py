"""Oracle of distill_loss: plain torch, any dtype; holds (N, V) of both models."""

import math

import torch


def _log_softmax(hidden, weight, temperature):
    logits = hidden @ weight.T / temperature
    return logits.log_softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32))


def _kl(logp, logq):
    """sum p (log p - log q) of each row."""
    return (logp.exp() * (logp - logq)).sum(-1)


def distill_loss(
    student_hidden, student_weight, teacher_hidden, teacher_weight, kind="forward_kl", temperature=1.0
):
    """The divergence of each row between teacher p and student q = softmax(hidden @ weight^T / temperature).

    forward_kl  KL(p||q) = sum p (log p - log q)
    reverse_kl  KL(q||p)
    jsd         KL(p||m) / 2 + KL(q||m) / 2, m = (p + q) / 2
    student_hidden (N, D), student_weight (V, D), teacher_hidden (N, D2), teacher_weight (V, D2); the teacher gets no
    gradient. Returns (N,) fp32 (fp64 for fp64 inputs).
    """
    logq = _log_softmax(student_hidden, student_weight, temperature)
    logp = _log_softmax(teacher_hidden.detach(), teacher_weight.detach(), temperature)
    if kind == "forward_kl":
        return _kl(logp, logq)
    if kind == "reverse_kl":
        return _kl(logq, logp)
    logm = torch.logaddexp(logp, logq) - math.log(2)
    return (_kl(logp, logm) + _kl(logq, logm)) / 2
