"""Relations: distances and angles among the student's tiles should be those among the teacher's."""

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from pathokd.processes import gather_equal, gather_rows

EPS = 1e-12
SAME_POINT = 1e-4
"""Tiles closer than this share of the mean distance are of one picture (blank tiles, tiles drawn twice)."""


def distance_loss(student: Float[Tensor, "batch dim"], teacher: Float[Tensor, "batch width"]) -> Float[Tensor, ""]:
    """Mean Huber difference of pairwise distances, each over its own mean; widths may differ.

    psi(i, j) = |x_i - x_j| / mu, mu the mean over all i != j; a batch of one has no pairs and costs nothing.

    Args:
        student: one vector per tile.
        teacher: of the same tiles; carries no gradient.

    Reference:
        Park et al. 2019, "Relational knowledge distillation" (arXiv 1904.05068), eq. 5 to 7.
    """
    x, y = _fp32(student), _fp32(teacher.detach())
    if len(x) < 2:
        return x.sum() * 0
    above = torch.triu_indices(len(x), len(x), offset=1, device=x.device)
    psi = []
    for points in (x, y):
        # Not by products: the distance of near neighbours is all rounding there.
        gaps = torch.cdist(points, points, compute_mode="donot_use_mm_for_euclid_dist")[above[0], above[1]]
        psi.append(gaps / gaps.mean().clamp(min=EPS))
    return F.smooth_l1_loss(psi[0], psi[1])


def angle_loss(student: Float[Tensor, "batch dim"], teacher: Float[Tensor, "batch width"]) -> Float[Tensor, ""]:
    """Mean Huber difference of the cosines of all angles: at j between i and k, over all distinct i, j, k.

    Memory grows with batch^2 dim and batch^3. Fewer than three tiles have no angle and cost nothing. Between duplicates
    there is no direction, only rounding over its own length, whose gradient knows no bound: their angles are left out.
    So are those among several crops of a tile, of which the teacher has one vector.

    Args:
        student: one vector per tile.
        teacher: of the same tiles; carries no gradient.

    Reference:
        Park et al. 2019 (arXiv 1904.05068), eq. 8 and 9.
    """
    x, y = _fp32(student), _fp32(teacher.detach())
    n = len(x)
    if n < 3:
        return x.sum() * 0
    same = torch.eye(n, dtype=torch.bool, device=x.device)
    distinct = ~(same[:, :, None] | same[:, None, :] | same[None])  # (j, i, k)
    cosines = []
    for points in (x, y):
        gap = points[None] - points[:, None]
        length = gap.detach().norm(dim=-1)
        apart = length > SAME_POINT * length.mean()
        distinct = distinct & apart[:, :, None] & apart[:, None, :]
        e = F.normalize(gap, dim=-1, eps=EPS)  # e_ij = (x_i - x_j) / |x_i - x_j|
        with torch.autocast(e.device.type, enabled=False):
            cosines.append(e @ e.transpose(1, 2))
    if not distinct.any():
        return x.sum() * 0
    return F.smooth_l1_loss(cosines[0][distinct], cosines[1][distinct])


def _fp32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


class RelationLoss(nn.Module):
    """Base of the losses on what lies between tiles: `forward(student, teacher)`, of any two widths, to a scalar."""

    def forward(self, student: Float[Tensor, "batch dim"], teacher: Float[Tensor, "batch width"]) -> Float[Tensor, ""]:
        """How far the student's relations are from the teacher's."""
        raise NotImplementedError

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        """Run `forward`, typed."""
        return super().__call__(*args, **kwargs)  # type: ignore[no-any-return]


class RKD(RelationLoss):
    """Relational distillation of class tokens: distances and angles over the tiles of all processes.

    The student's own tokens are compared, not projected ones: it is their geometry that retrieval and k-NN use.

    Args:
        distance: weight of `distance_loss`.
        angle: weight of `angle_loss`; twice the other in the paper.
        angle_tiles: angles are taken among so many tiles of a batch at most, the first ones.

    Reference:
        Park et al. 2019 (arXiv 1904.05068), eq. 10.
    """

    def __init__(self, distance: float = 1.0, angle: float = 2.0, angle_tiles: int = 128) -> None:
        super().__init__()
        if min(distance, angle) < 0 or distance + angle == 0:
            raise ValueError(f"distance and angle are weights, one of them positive, got {distance} and {angle}.")
        if angle_tiles < 3:
            raise ValueError(f"angle_tiles must be at least 3, got {angle_tiles}: an angle has three points.")
        self.distance, self.angle, self.angle_tiles = distance, angle, angle_tiles

    def forward(self, student: Float[Tensor, "batch dim"], teacher: Float[Tensor, "batch width"]) -> Float[Tensor, ""]:
        """Weighted sum of both."""
        student, teacher = gather_rows(student), torch.cat(gather_equal(teacher))
        few = slice(self.angle_tiles)
        return self.distance * distance_loss(student, teacher) + self.angle * angle_loss(student[few], teacher[few])
