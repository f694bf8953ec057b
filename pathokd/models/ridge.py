"""Ridge regression from sums over rows, which batches and processes add up."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from pathokd.models.device import double
from pathokd.processes import mean_over_processes

RIDGES = tuple(10.0**exponent for exponent in range(-4, 2))
"""Tried, as multiples of the mean variance of x."""


class Ridge(NamedTuple):
    """The regression of y on x, y = weight x + bias."""

    weight: Float[Tensor, "out_dim in_dim"]
    bias: Float[Tensor, " out_dim"]
    explained: float
    """Share of the variance of y in rows that were not fitted, mean over the dimensions of y that vary."""
    ridge: float
    """Of `RIDGES`, the one under which it was largest."""


class RidgeSums:
    """All that ridge regression needs to know of its rows, in fp64; of two halves, so that each can test the other.

    Args:
        in_dim: width of x.
        out_dim: width of y.
        device: where the sums are kept.

    Reference:
        Hoerl, Kennard 1970, "Ridge Regression: Biased Estimation for Nonorthogonal Problems", eq. 2.1.
    """

    def __init__(self, in_dim: int, out_dim: int, device: torch.device) -> None:
        # x is led by a 1, so that products hold the counts and the means too.
        self._xx = double(torch.zeros(2, in_dim + 1, in_dim + 1, device=device))
        self._xy = double(torch.zeros(2, in_dim + 1, out_dim, device=device))
        self._yy = double(torch.zeros(2, out_dim, device=device))

    def add(self, x: Float[Tensor, "*rows in_dim"], y: Float[Tensor, "*rows out_dim"], half: int) -> None:
        """Take rows into the first half (0) or the second (1); what is alike, as tokens of one tile, into the same."""
        x, y = double(x.detach()).flatten(0, -2), double(y.detach()).flatten(0, -2)
        x = torch.cat([x.new_ones(len(x), 1), x], dim=1)
        self._xx[half] += x.T @ x
        self._xy[half] += x.T @ y
        self._yy[half] += y.square().sum(0)

    def solve(self) -> Ridge:
        """The regression on all rows, of all processes, under the ridge by which each half tells the other best.

        Raises:
            ValueError: a half without rows.
        """
        xx, xy, yy = (mean_over_processes(sums) for sums in (self._xx, self._xy, self._yy))
        if not bool((xx[:, 0, 0] > 0).all()):
            raise ValueError(
                "All rows of a ridge regression are in one half, and none are left to test it: give it more."
            )
        errors = torch.stack(
            [
                torch.stack(
                    [_unexplained(each, xx[other], xy[other], yy[other]) for each in _solutions(xx[half], xy[half])]
                )
                for half, other in ((0, 1), (1, 0))
            ]
        ).mean(0)
        best = int(errors.argmin())
        (whole,) = _solutions(xx.sum(0), xy.sum(0), RIDGES[best : best + 1])
        return Ridge(whole[1:].T.contiguous(), whole[0], 1 - float(errors[best]), RIDGES[best])


def _solutions(xx: Tensor, xy: Tensor, ridges: Sequence[float] = RIDGES) -> list[Tensor]:
    """Bias and weights, (1 + in_dim, out_dim), under each of `ridges`; the bias pays none."""
    n = xx[0, 0]
    mean_x, mean_y = xx[0, 1:] / n, xy[0] / n
    covariance = xx[1:, 1:] / n - mean_x[:, None] * mean_x
    shared = xy[1:] / n - mean_x[:, None] * mean_y
    spread, axes = torch.linalg.eigh(covariance)
    spread, along = spread.clamp(min=0), axes.T @ shared
    rounding = 1e-13 * (xx.diagonal()[1:] / n).mean() + torch.finfo(spread.dtype).tiny  # of an x that does not vary
    found = []
    for ridge in ridges:
        weight = axes @ (along / (spread + ridge * spread.mean() + rounding)[:, None])
        found.append(torch.cat([(mean_y - mean_x @ weight)[None], weight]))
    return found


def _unexplained(solved: Tensor, xx: Tensor, xy: Tensor, yy: Tensor) -> Tensor:
    """Squared error over variance of the rows behind these sums, mean over the dimensions that vary."""
    squares = yy - 2 * (solved * xy).sum(0) + (solved * (xx @ solved)).sum(0)
    variance = yy - xy[0].square() / xx[0, 0]
    varies = variance > 1e-9 * yy
    return torch.where(varies, squares / torch.where(varies, variance, 1.0), 0.0).sum() / varies.sum().clamp(min=1)
