import torch

from hpsafety.triton_kernels import distill_loss as kernels


def run(shapes, empty) -> None:
    """A student of half the teacher's width."""
    n = shapes.trained
    student = empty(n, shapes.width // 2), empty(shapes.words, shapes.width // 2)
    teacher = empty(n, shapes.width), empty(shapes.words, shapes.width)
    for kind in ("forward_kl", "reverse_kl", "jsd"):
        loss, norm = kernels.distill_loss(*student, *teacher, kind, 1.0)
        grad = torch.empty_like(loss)
        kernels.distill_loss_backward(grad, *student, *teacher, norm, kind, 1.0, True, True)
