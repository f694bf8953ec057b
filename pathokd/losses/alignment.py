"""Losses that draw a student's token to the teacher's: cosine, smooth L1, MSE and their sum.

All take (..., dim) tensors of any matching leading shape, compute in fp32 whatever the autocast, and average over every
token. `target` carries no gradient.
"""

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

EPS = 1e-6
"""Smallest norm a vector is divided by."""


def directions(x: Float[Tensor, "*tokens dim"]) -> Float[Tensor, "*tokens dim"]:
    """Unit vectors, in fp32 or wider.

    A vector shorter than `EPS` has no direction and carries no gradient: over its length, up to 1e12 times the others',
    it would be all that is left of a clipped step.
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    long = torch.linalg.vector_norm(wide.detach(), dim=-1, keepdim=True) > EPS
    return F.normalize(torch.where(long, wide, wide.detach()), dim=-1, eps=EPS)


def cosine_loss(prediction: Float[Tensor, "*tokens dim"], target: Float[Tensor, "*tokens dim"]) -> Float[Tensor, ""]:
    """Mean of 1 - cos(prediction, target).

    Returns:
        A scalar in [0, 2]; invariant to the scale of either side.
    """
    x, y = prediction.float(), target.detach().float()
    # Lengths divide the sum, not the vectors: the same number in half the passes over all tokens.
    a, b = (torch.linalg.vector_norm(each, dim=-1).clamp_min(EPS) for each in (x, y))
    cosine: Tensor = (x * y).sum(-1) / (a * b)
    return (1 - cosine).mean()


def smooth_l1_loss(
    prediction: Float[Tensor, "*tokens dim"], target: Float[Tensor, "*tokens dim"], beta: float = 1.0
) -> Float[Tensor, ""]:
    """Mean Huber-like distance: quadratic below `beta`, linear above.

    Args:
        prediction: student.
        target: teacher, standardised so that `beta` means standard deviations.
        beta: where the two branches meet; positive.

    Reference:
        Girshick, Fast R-CNN, eq. 3 (beta = 1).
    """
    return F.smooth_l1_loss(prediction.float(), target.detach().float(), beta=beta)


def mse_loss(prediction: Float[Tensor, "*tokens dim"], target: Float[Tensor, "*tokens dim"]) -> Float[Tensor, ""]:
    """Mean squared difference over tokens and dimensions."""
    return F.mse_loss(prediction.float(), target.detach().float())


class AlignmentLoss(nn.Module):
    """Base of the losses an `Objective` takes: `forward(prediction, target)` to a scalar."""

    def forward(
        self, prediction: Float[Tensor, "*tokens dim"], target: Float[Tensor, "*tokens dim"]
    ) -> Float[Tensor, ""]:
        """Distance of the projected student from the teacher."""
        raise NotImplementedError

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        """Run `forward`, typed."""
        return super().__call__(*args, **kwargs)  # type: ignore[no-any-return]


class Cosine(AlignmentLoss):
    """1 - cosine; see `cosine_loss`."""

    def forward(
        self, prediction: Float[Tensor, "*tokens dim"], target: Float[Tensor, "*tokens dim"]
    ) -> Float[Tensor, ""]:
        """Mean of 1 - cos."""
        return cosine_loss(prediction, target)


class SmoothL1(AlignmentLoss):
    """Smooth L1; see `smooth_l1_loss`.

    Args:
        beta: where quadratic turns linear.
    """

    def __init__(self, beta: float = 1.0) -> None:
        super().__init__()
        if beta <= 0:
            raise ValueError(f"beta must be positive, got {beta}.")
        self.beta = beta

    def forward(
        self, prediction: Float[Tensor, "*tokens dim"], target: Float[Tensor, "*tokens dim"]
    ) -> Float[Tensor, ""]:
        """Mean smooth L1 distance."""
        return smooth_l1_loss(prediction, target, self.beta)


class MSE(AlignmentLoss):
    """Mean squared error; see `mse_loss`."""

    def forward(
        self, prediction: Float[Tensor, "*tokens dim"], target: Float[Tensor, "*tokens dim"]
    ) -> Float[Tensor, ""]:
        """Mean squared difference."""
        return mse_loss(prediction, target)


class CosineSmoothL1(AlignmentLoss):
    """alpha (1 - cos) + (1 - alpha) smooth L1: the cosine sets the direction, the rest keeps the scale exportable.

    Args:
        alpha: share of the cosine, in [0, 1].
        beta: of the smooth L1 part.

    Reference:
        GPFM (Nature BME 2025), expert distillation with alpha = .9.
    """

    def __init__(self, alpha: float = 0.9, beta: float = 1.0) -> None:
        super().__init__()
        if not 0 <= alpha <= 1:
            raise ValueError(f"alpha must lie in [0, 1], got {alpha}.")
        self.alpha = alpha
        self.smooth_l1 = SmoothL1(beta)

    def forward(
        self, prediction: Float[Tensor, "*tokens dim"], target: Float[Tensor, "*tokens dim"]
    ) -> Float[Tensor, ""]:
        """Weighted sum of both."""
        direction = cosine_loss(prediction, target)
        scale: Tensor = self.smooth_l1(prediction, target)
        return torch.lerp(scale, direction, self.alpha)
