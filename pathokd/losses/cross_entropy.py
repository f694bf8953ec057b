"""Cross-entropy between two sets of prototypes without the (tokens x prototypes) matrices in memory."""

from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from pathokd.losses.assignment import CHUNK_ELEMENTS, chunk_rows


class TeacherSide(NamedTuple):
    """What the target of a token is made from: q = softmax((X C^T - c) / tau)."""

    tokens: Float[Tensor, "tokens dim"]
    prototypes: Float[Tensor, "prototypes dim"]
    centre: Float[Tensor, " prototypes"]
    temperature: float


class StudentSide(NamedTuple):
    """What the prediction for a token is made from: p = softmax(Y W^T / tau)."""

    tokens: Float[Tensor, "tokens bottleneck"]
    prototypes: Float[Tensor, "prototypes bottleneck"]
    temperature: float


def prototype_cross_entropy(
    student: StudentSide, teacher: TeacherSide, chunk_elements: int = CHUNK_ELEMENTS
) -> Float[Tensor, ""]:
    """Mean over tokens of H(q, p) = -sum_k q_k log p_k, with gradients for the student's tokens and prototypes.

    Tokens go through some rows at a time, and each chunk's share of the gradient, (p - q) W and (p - q)^T Y, is added
    up in the forward pass, so that nothing of size tokens x prototypes is ever stored, or computed again. Memory beyond
    the arguments: 2 `chunk_elements` numbers (64 MiB in fp32 by default, whatever the tokens), and one gradient the
    size of each of the student's two arguments. Computes in fp32, or fp64 if the student's tokens are, whatever the
    autocast.

    Args:
        student: tokens and prototypes, the same K.
        teacher: one target token for each of the student's; carries no gradient.
        chunk_elements: logits held at a time.

    Raises:
        ValueError: numbers of tokens or prototypes that differ.

    Reference:
        Hsu et al. 2024, "Liger Kernel" (arXiv 2410.10989), section 3.2: the gradient of a linear layer and
        cross-entropy, chunk by chunk in the forward pass.
    """
    n, k = len(student.tokens), len(student.prototypes)
    if len(teacher.tokens) != n or len(teacher.prototypes) != k or n == 0:
        raise ValueError(
            f"The student has {n} tokens and {k} prototypes, the teacher {len(teacher.tokens)} and "
            f"{len(teacher.prototypes)}: both need the same, and at least one token."
        )
    dtype = torch.promote_types(student.tokens.dtype, torch.float32)
    fixed = (teacher.tokens, teacher.prototypes, teacher.centre)
    x, c, centre = (tensor.detach().to(dtype) for tensor in fixed)
    y, w = student.tokens.to(dtype), student.prototypes.to(dtype)
    with torch.autocast(y.device.type, enabled=False):
        loss: Tensor = _ChunkedCrossEntropy.apply(
            y, w, x, c, centre, student.temperature, teacher.temperature, chunk_rows(k, chunk_elements)
        )
    return loss


class _ChunkedCrossEntropy(torch.autograd.Function):
    """See `prototype_cross_entropy`."""

    @staticmethod
    def forward(
        ctx: Any, y: Tensor, w: Tensor, x: Tensor, c: Tensor, centre: Tensor, tau_s: float, tau_t: float, rows: int
    ) -> Tensor:
        grad_y = torch.empty_like(y) if ctx.needs_input_grad[0] else None
        grad_w = torch.zeros_like(w) if ctx.needs_input_grad[1] else None
        total = y.new_zeros((), dtype=torch.float64)
        for start in range(0, len(y), rows):
            here = slice(start, start + rows)
            entropies, error = _chunk(y[here], w, x[here], c, centre, tau_s, tau_t)
            total += entropies
            error.div_(len(y) * tau_s)
            if grad_y is not None:
                torch.mm(error, w, out=grad_y[here])
            if grad_w is not None:
                grad_w.addmm_(error.T, y[here])
            del error  # before the next chunk is made
        ctx.save_for_backward(grad_y, grad_w)
        return (total / len(y)).to(y.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grads = (None if saved is None else saved * grad for saved in ctx.saved_tensors)
        return (*grads, None, None, None, None, None, None)


def _chunk(
    y: Tensor, w: Tensor, x: Tensor, c: Tensor, centre: Tensor, tau_s: float, tau_t: float
) -> tuple[Tensor, Tensor]:
    """Sum of H(q, p) over some tokens, fp64, and p - q, (tokens, prototypes); two matrices of that size at most."""
    q = softmax_(torch.addmm(centre, x, c.T, beta=-1).div_(tau_t))
    s = (y @ w.T).div_(tau_s)
    expected = torch.bmm(q[:, None], s[:, :, None])  # sum_k q_k s_k, without a product matrix
    # H = log sum_k exp(s_k) - sum_k q_k s_k
    largest = s.amax(1, keepdim=True)
    p = s.sub_(largest).exp_()
    norm = p.sum(1, keepdim=True)
    entropies = (norm.log() + largest).double().sum() - expected.double().sum()
    return entropies, p.div_(norm).sub_(q)


def softmax_(logits: Tensor) -> Tensor:
    """Softmax of the last dimension in the logits' own memory."""
    logits.sub_(logits.amax(-1, keepdim=True)).exp_()
    return logits.div_(logits.sum(-1, keepdim=True))
