"""Targets on one scale: each dimension minus its mean, over its standard deviation."""

import functools

import torch
from jaxtyping import Float
from torch import Tensor, nn

from pathokd.processes import gather_equal, world_size


class Standardizer(nn.Module):
    """Per-dimension standardisation with running or stored statistics.

    Teacher dimensions differ in scale by orders of magnitude, so without it a regression loss learns a few
    of them. Statistics are those of *all* rows seen, exactly, not a moving average: batches are merged by
    the pairwise formula in fp64, those of all processes that train together too. Who calls `update` decides when they
    stop changing.

    Args:
        dim: width of the vectors.
        mean: stored mean; with `std`, the statistics are frozen from the start.
        std: stored standard deviation, positive.
        eps: added to the standard deviation, against dimensions that do not vary.

    Raises:
        ValueError: a width below 1, or statistics that do not fit it.

    Reference:
        Chan, Golub, LeVeque, "Updating formulae and a pairwise algorithm for computing sample variances",
        1979, eq. 2.1.
    """

    mean: Tensor
    std: Tensor
    count: Tensor
    _mean64: Tensor
    _m2: Tensor

    def __init__(
        self,
        dim: int,
        *,
        mean: Float[Tensor, " dim"] | None = None,
        std: Float[Tensor, " dim"] | None = None,
        eps: float = 1e-6,
    ) -> None:
        super().__init__()
        if dim < 1:
            raise ValueError(f"dim must be at least 1, got {dim}.")
        if (mean is None) != (std is None):
            raise ValueError("mean and std come together: pass both or neither.")
        self.dim, self.eps = dim, eps
        self.stored = mean is not None
        self.register_buffer("mean", torch.zeros(dim) if mean is None else _checked(mean, dim, "mean"))
        self.register_buffer("std", torch.ones(dim) if std is None else _checked(std, dim, "std"))
        if std is not None and bool((std <= 0).any()):
            raise ValueError("std must be positive in every dimension.")
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))
        self.register_buffer("_mean64", torch.zeros(dim, dtype=torch.float64))
        self.register_buffer("_m2", torch.zeros(dim, dtype=torch.float64))

    @torch.no_grad()
    def update(self, x: Float[Tensor, "*batch dim"]) -> None:
        """Take the rows of `x`, of all processes, into the statistics, unless they are stored.

        Every process calls it equally often, and all end with the same statistics. No device synchronisation.

        Raises:
            ValueError: another width than `dim`.
        """
        if x.shape[-1] != self.dim:
            raise ValueError(f"expected vectors of width {self.dim}, got {x.shape[-1]}.")
        rows = x.detach().reshape(-1, self.dim)
        if self.stored or (rows.shape[0] == 0 and world_size() == 1):
            return
        batch = _across_processes(*_moments(rows.double()))
        count, mean, m2 = _merged((self.count.double(), self._mean64, self._m2), batch)
        self._mean64.copy_(mean)
        self._m2.copy_(m2)
        self.count.copy_(count)
        self.mean.copy_(mean)
        variance = m2 / (count - 1).clamp(min=1)
        # One row has no spread: unit scale until there are two.
        self.std.copy_(torch.where(count > 1, variance.sqrt(), torch.ones_like(variance)))

    def forward(self, x: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch dim"]:
        """Standardise vectors, in fp32."""
        return (x.float() - self.mean) / (self.std + self.eps)

    def inverse(self, z: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch dim"]:
        """Take standardised vectors back to the original scale, in fp32."""
        return z.float() * (self.std + self.eps) + self.mean


Moments = tuple[Tensor, Tensor, Tensor]
"""Number of rows (fp64 scalar), their mean, and the sum of squared differences from it."""


def _moments(rows: Float[Tensor, "rows dim"]) -> Moments:
    n = rows.new_full((), float(len(rows)))
    mean = rows.sum(0) / n.clamp(min=1)
    return n, mean, (rows - mean).square().sum(0)


def _merged(a: Moments, b: Moments) -> Moments:
    """Moments of the rows of both; with none on either side, zeros."""
    # delta = mean_b - mean_a;  mean = mean_a + delta n_b / n;  M2 = M2_a + M2_b + delta^2 n_a n_b / n
    (n_a, mean_a, m2_a), (n_b, mean_b, m2_b) = a, b
    n, delta = n_a + n_b, mean_b - mean_a
    share = n_b / n.clamp(min=1)
    return n, mean_a + delta * share, m2_a + m2_b + delta.square() * n_a * share


def _across_processes(n: Tensor, mean: Tensor, m2: Tensor) -> Moments:
    """Moments of the rows of all processes, merged in the order of ranks, so that all come to the same."""
    if world_size() == 1:
        return n, mean, m2
    parts = [torch.split(part, [1, len(mean), len(mean)]) for part in gather_equal(torch.cat([n[None], mean, m2]))]
    found = [(part[0][0], part[1], part[2]) for part in parts]
    return functools.reduce(_merged, found)


def _checked(value: Tensor, dim: int, name: str) -> Tensor:
    if value.shape != (dim,):
        raise ValueError(f"{name} must have shape ({dim},), got {tuple(value.shape)}.")
    return value.detach().float().clone()
