"""One set of draws for every measure of every model, so that differences between models are paired."""

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from pathokd.evaluate.bootstrap import RESAMPLES, group_codes, percentiles
from pathokd.types import FloatArray

Draws = npt.NDArray[np.float64]


class Measure(NamedTuple):
    """One number with what is needed to give it, and its difference from another model's, an interval."""

    name: str
    group: str
    """What it is about: `cross-scanner`, `scanner`, a turn."""
    value: float
    n: int
    """Tiles (of each condition, where there are several)."""
    n_groups: int
    """Independent groups that were resampled."""
    draws: Draws | None
    """(resamples,) the same number under each draw of groups; None where it cannot be resampled."""
    k: int | None = None
    low: float = float("nan")
    """Of a 95 % interval got otherwise than from draws."""
    high: float = float("nan")

    @property
    def interval(self) -> tuple[float, float]:
        """95 %; NaN where there is none."""
        return (self.low, self.high) if self.draws is None else percentiles(self.draws, self.n_groups)


class Resampler:
    """Draws of whole groups with replacement, the same for everything measured on these tiles.

    Args:
        groups: (n,) what is drawn as a whole.
        seed: Of the draws.
        resamples: How many.
    """

    def __init__(self, groups: npt.NDArray[Any], seed: int = 0, resamples: int = RESAMPLES) -> None:
        self.codes, self.n_groups = group_codes(groups)
        even = np.full(self.n_groups, 1 / self.n_groups)
        times = np.random.default_rng(seed).multinomial(self.n_groups, even, size=resamples)
        self.times: npt.NDArray[np.float32] = times.astype(np.float32)
        if self.n_groups < 2:  # says nothing of how groups vary: its interval would be a point
            self.times[:] = np.nan
        self.sizes = np.bincount(self.codes, minlength=self.n_groups).astype(np.float64)

    def sums(self, values: FloatArray) -> Draws:
        """Sum of each column over every resample.

        Args:
            values: (n, m) or (n,).

        Returns:
            (resamples, m) or (resamples,).
        """
        columns = values.reshape(len(values), -1).astype(np.float64)
        per_group = np.stack([np.bincount(self.codes, c, self.n_groups) for c in columns.T], axis=1)
        total: Draws = (self.times @ per_group).astype(np.float64)
        return total if values.ndim > 1 else total[:, 0]

    def means(self, values: FloatArray) -> Draws:
        """Mean of each column over every resample, as `sums`."""
        count = self.times @ self.sizes
        total = self.sums(values)
        mean: Draws = total / (count[:, None] if values.ndim > 1 else count)
        return mean

    def weights(self) -> npt.NDArray[np.float32]:
        """(resamples, n): how often each tile is in each resample."""
        return self.times[:, self.codes]


def ratio(top: Draws, bottom: Draws) -> Draws:
    """Quotients, NaN where the divisor is 0."""
    return np.divide(top, bottom, out=np.full_like(top, np.nan), where=bottom > 0)
