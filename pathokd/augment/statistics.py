"""How a cohort is stained, in numbers: mean and spread of each stain's amount, slide by slide, stored as YAML."""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from pathokd.augment.ranges import finite
from pathokd.augment.stain_basis import tissue_pixels
from pathokd.augment.stain_math import REFERENCE, Vectors
from pathokd.errors import StoreError
from pathokd.files import make_header, read_yaml, write_text
from pathokd.types import FloatArray, Rgb

SCHEMA = "stain-statistics/1"
Triple = tuple[float, float, float]


@dataclass(frozen=True)
class StainStatistics:
    """Amounts of haematoxylin, eosin and residual on tissue, in optical density along `REFERENCE`.

    Args:
        mean: mean over slides of a slide's mean amount.
        mean_sd: standard deviation over slides of the same.
        sd: mean over slides of the standard deviation within a slide's tiles.
        sd_sd: standard deviation over slides of the same.
        slides: how many slides were measured.
        tiles: how many tiles had tissue.

    Raises:
        ValueError: not three finite numbers, or a negative standard deviation.
    """

    mean: Triple
    mean_sd: Triple
    sd: Triple
    sd_sd: Triple
    slides: int
    tiles: int

    def __post_init__(self) -> None:
        for name in ("mean", "mean_sd", "sd", "sd_sd"):
            values = getattr(self, name)
            if np.shape(values) != (3,) or not finite(values) or (name != "mean" and min(values) < 0):
                raise ValueError(f"{name} must be three finite numbers, none of a deviation negative, got {values}.")

    @property
    def vectors(self) -> Vectors:
        """Stain vectors that the amounts are along."""
        return REFERENCE

    def draw(self, rng: np.random.Generator, spread: float = 1.0) -> tuple[FloatArray, FloatArray]:
        """A random member of the cohort.

        Args:
            rng: source of the draw.
            spread: factor on the standard deviations.

        Returns:
            Mean and standard deviation of the amounts, (3,) each; the latter at least a third of the cohort's.
        """
        mean = rng.normal(self.mean, spread * np.asarray(self.mean_sd))
        sd = rng.normal(self.sd, spread * np.asarray(self.sd_sd))
        return mean, np.maximum(sd, np.asarray(self.sd) / 3)

    def save(self, path: str | Path, source: str = "") -> None:
        """Write as YAML, with a header that says what was measured."""
        header = make_header(SCHEMA, {"source": source})
        plain = {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}
        write_text(path, yaml.safe_dump({**header, "statistics": plain}, sort_keys=False))

    @classmethod
    def load(cls, path: str | Path) -> "StainStatistics":
        """Read what `save` wrote.

        Raises:
            StoreError: there is no such file, it is of another kind, or a field is missing, unknown or out of range.
        """
        found = read_yaml(path, SCHEMA, "statistics", "write it with `pathokd stain-stats`")
        values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in found.items()}
        try:
            return cls(**values)
        except (TypeError, ValueError) as error:
            raise StoreError(
                f"{path} holds no statistics of stain ({error}): write it with `pathokd stain-stats`."
            ) from error


def fit_statistics(slides: Iterable[Sequence[Rgb]]) -> StainStatistics:
    """Measure a cohort.

    Args:
        slides: the tiles of one slide after another; tiles without tissue do not count.

    Raises:
        ValueError: fewer than two slides have tissue, so nothing is known of their spread.
    """
    means, sds, tiles = [], [], 0
    for slide in slides:
        amounts = [pixels @ np.linalg.inv(REFERENCE) for tile in slide if (pixels := tissue_pixels(tile)) is not None]
        if amounts:
            means.append(np.mean([a.mean(axis=0) for a in amounts], axis=0))
            sds.append(np.mean([a.std(axis=0) for a in amounts], axis=0))
            tiles += len(amounts)
    if len(means) < 2:
        raise ValueError(f"statistics of a cohort need at least two slides with tissue, got {len(means)}: add slides.")
    return StainStatistics(
        mean=_triple(np.mean(means, axis=0)),
        mean_sd=_triple(np.std(means, axis=0, ddof=1)),
        sd=_triple(np.mean(sds, axis=0)),
        sd_sd=_triple(np.std(sds, axis=0, ddof=1)),
        slides=len(means),
        tiles=tiles,
    )


def _triple(values: FloatArray) -> Triple:
    h, e, residual = (round(float(value), 5) for value in values)
    return h, e, residual
