"""Does a model see the same tissue when a tile is turned or flipped: tissue has no up."""

from collections.abc import Sequence
from typing import NamedTuple

from jaxtyping import Float
from torch import Tensor

from pathokd.metrics.conditions import compare_conditions
from pathokd.metrics.paired import CHUNK, TileScores

D4 = (
    "upright",
    "quarter turn",
    "half turn",
    "three-quarter turn",
    "flip",
    "flip, quarter turn",
    "flip, half turn",
    "flip, three-quarter turn",
)
"""The eight orientations of a square in the order of `pathokd.data.views.d4`: elements 0 to 7."""


class TurnScore(NamedTuple):
    """Upright tiles against the same tiles turned."""

    turn: str
    cosine: float
    """Mean cosine of a tile with its turned copy; read it with `separation` only."""
    separation: float
    """Minus the mean cosine of different tiles."""
    top1: float
    """How often a tile's nearest among all upright and all turned ones is its own copy, both directions."""
    n: int
    """Tiles: chance of top-1 is 1 / (2n - 1)."""
    tiles: TileScores | None
    """Tile by tile, for a bootstrap; hits have one column, of k = 1."""


def turn_invariance(
    features: Float[Tensor, "turns n dim"], turns: Sequence[str] = D4, *, chunk: int = CHUNK
) -> list[TurnScore]:
    """Cosine and top-1 between features of upright tiles and of their turned copies.

    Args:
        features: Features of n tiles in each orientation, the upright ones first.
        turns: Names of the orientations.
        chunk: Rows of a product held at once.

    Returns:
        One entry per orientation but the first.

    Raises:
        ValueError: Other numbers of names than of orientations, fewer than two of these or of tiles, or a row
            without direction.

    Reference:
        Elphick et al. 2024, "Are the Latent Representations of Foundation Models for Pathology Invariant to
        Rotation?", arXiv 2412.11938, for the question; top-k as in the PLISM benchmark.
    """
    if len(turns) != len(features) or len(turns) < 2:
        raise ValueError(f"turns should name {len(features)} orientations, two at least, got {list(turns)}.")
    by_name = dict(zip(turns, features, strict=True))
    pairs = [(turns[0], turn) for turn in turns[1:]]
    found = compare_conditions(turns, by_name.__getitem__, (1,), pairs=pairs, held=2, chunk=chunk, tiles=True)
    return [TurnScore(x.second, x.cosine, x.separation, x.topk[0], x.n, x.tiles) for x in found]
