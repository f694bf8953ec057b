"""Consistency: two views of one tile should look alike to the student, whatever its teacher says of them."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from pathokd.losses.alignment import cosine_loss
from pathokd.processes import mean_over_processes


class InvarianceLoss(nn.Module):
    """Base of the losses between two views of the student, without a teacher: `forward(x, anchor)` to a scalar."""

    def forward(self, x: Float[Tensor, "*tokens dim"], anchor: Float[Tensor, "*tokens dim"]) -> Float[Tensor, ""]:
        """How far `x` is from `anchor`, which carries no gradient."""
        raise NotImplementedError

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        """Run `forward`, typed."""
        return super().__call__(*args, **kwargs)  # type: ignore[no-any-return]


class Consistency(InvarianceLoss):
    """1 - cosine between two views of the student; the second is held still.

    With both sides free the shortest way is collapse. Holding one still, and a teacher beside it, keeps that away, yet
    a heavy weight still costs what separates tiles: watch `val/knn_overlap`.

    Args:
        centred: subtract from both views the mean of the anchors of the batch, of all processes. Class tokens share a
            large mean, which alone makes any two of them alike; without it the loss sees what differs between tiles.

    Reference:
        Chen and He 2021, "SimSiam" (arXiv 2011.10566), section 3: the stop-gradient.
    """

    def __init__(self, centred: bool = False) -> None:
        super().__init__()
        self.centred = centred

    def forward(self, x: Float[Tensor, "*tokens dim"], anchor: Float[Tensor, "*tokens dim"]) -> Float[Tensor, ""]:
        """Mean of 1 - cos."""
        if not self.centred:
            return cosine_loss(x, anchor)
        dtype = torch.promote_types(x.dtype, torch.float32)
        held = anchor.detach().to(dtype)
        mean = mean_over_processes(held.reshape(-1, held.shape[-1]).mean(0))
        return cosine_loss(x.to(dtype) - mean, held - mean)
