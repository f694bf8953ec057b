"""KoLeo: pushes each vector of a batch away from its nearest neighbour, so that features do not pile up."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from pathokd.losses.alignment import directions
from pathokd.processes import gather_rows

MIN_DISTANCE = 1e-4
"""Unit vectors closer than this are of one picture (blank tiles, tiles drawn twice): nothing should part them."""


def koleo_loss(x: Float[Tensor, "batch dim"], min_distance: float = MIN_DISTANCE) -> Float[Tensor, ""]:
    """Mean of -log of the distance to the nearest other vector, on the unit sphere, in fp32.

    Duplicates are no neighbours: two blank tiles would cost 18 and their gradient points nowhere. They are both pushed
    from the nearest vector that differs; a vector without one adds nothing.

    Args:
        x: one vector per tile, raw.
        min_distance: below it two vectors are duplicates.

    Reference:
        Sablayrolles et al. 2019, "Spreading vectors for similarity search" (arXiv 1806.03198), eq. 2.
    """
    unit = directions(x)
    with torch.no_grad():
        # Not by products: 2 - 2 cos of near neighbours is all rounding.
        distance = torch.cdist(unit, unit, compute_mode="donot_use_mm_for_euclid_dist")
        distance[distance < min_distance] = torch.inf  # itself and its duplicates
        nearest, neighbour = distance.min(1) if len(x) else (distance.new_zeros(0), distance.new_zeros(0).long())
        counts = nearest.isfinite()
    gap = torch.linalg.vector_norm(unit - unit[neighbour], dim=-1)
    logs = torch.where(counts, gap, 1.0).log()
    return -logs.sum() / counts.sum().clamp(min=1)


class SpreadLoss(nn.Module):
    """Base of the losses on the student's own class tokens, without a teacher: `forward(x)` to a scalar."""

    def forward(self, x: Float[Tensor, "batch dim"]) -> Float[Tensor, ""]:
        """How much the vectors of one view crowd."""
        raise NotImplementedError

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        """Run `forward`, typed."""
        return super().__call__(*args, **kwargs)  # type: ignore[no-any-return]


class KoLeo(SpreadLoss):
    """See `koleo_loss`; each view by itself, over the tiles of all processes.

    DINOv2 looks at each process by itself, so that its loss depends on how many there are; here it does not.

    Args:
        min_distance: below it two vectors are duplicates.
    """

    def __init__(self, min_distance: float = MIN_DISTANCE) -> None:
        super().__init__()
        if not 0 < min_distance < 2:
            raise ValueError(f"min_distance must lie between 0 and 2, got {min_distance}.")
        self.min_distance = min_distance

    def forward(self, x: Float[Tensor, "batch dim"]) -> Float[Tensor, ""]:
        """Mean -log distance to the nearest neighbour."""
        return koleo_loss(gather_rows(x), self.min_distance)
