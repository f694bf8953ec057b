"""Who is next to whom: neighbours two models share, and finding a tile again under another stain or scanner.

Self is left out by its index, never by its rank, and ties are settled by the expected rank under random
tie-breaking, so that a collapsed encoder scores chance instead of perfection. Memory is chunk by 2n, never n
by n.
"""

import itertools
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from pathokd.metrics.precision import full_precision, rounding_margin
from pathokd.metrics.similarity import unit_rows

CHUNK = 2048
"""Queries compared with the gallery at once."""


class PairedHits(NamedTuple):
    """How surely each tile is found again, one row per tile."""

    a_to_b: Float[Tensor, " n"]
    """Probability that the partner is among the k nearest when tile i of `a` asks."""
    b_to_a: Float[Tensor, " n"]
    """The same when tile i of `b` asks."""
    tied: float
    """Share of queries whose partner ties with another tile, to rounding; near 1 means collapse."""


class ConditionPair(NamedTuple):
    """Top-k of one pair of conditions."""

    first: str
    second: str
    topk: float
    n: int
    """Tiles per condition; chance is k / (2n - 1), so always print n."""


def hit_probability(nearer: Int[Tensor, "*n"], ties: Int[Tensor, "*n"], k: int) -> Float[Tensor, "*n"]:
    """Probability that the partner is among the k nearest, ties broken at random: clip((k - g) / (t + 1), 0, 1).

    Args:
        nearer: g, how many tiles are strictly nearer than the partner.
        ties: t, how many others are as near as the partner.
        k: How many nearest tiles count as found.

    Returns:
        Probabilities in fp64.
    """
    return ((k - nearer).double() / (ties + 1)).clamp(0.0, 1.0)


def chance(k: int, n: int) -> float:
    """Top-k of an encoder that knows nothing, with n tiles per condition: k / (2n - 1)."""
    return min(1.0, k / (2 * n - 1))


def knn_overlap(
    a: Float[Tensor, "n dim_a"], b: Float[Tensor, "n dim_b"], k: int = 10, *, chunk: int = CHUNK
) -> Float[Tensor, ""]:
    """Share of the k nearest tiles (cosine) that two models agree on, averaged over tiles.

    Chance is k / (n - 1). Among exactly tied neighbours the choice is arbitrary.

    Args:
        a: Features of n tiles from one model.
        b: Features of the same tiles from another; the dimension may differ.
        k: Neighbours, 1 to n - 1.
        chunk: Tiles whose similarities are held at once.

    Returns:
        A scalar in [0, 1].

    Raises:
        ValueError: Different n, k out of range, or a row without direction.
    """
    if a.shape[0] != b.shape[0]:
        raise ValueError(f"a and b should hold the same tiles, got {a.shape[0]} and {b.shape[0]} rows.")
    n = a.shape[0]
    if not 1 <= k <= n - 1:
        raise ValueError(f"k should be 1 to {n - 1} (n - 1, as a tile is not its own neighbour), got {k}.")
    u, v = unit_rows(a, "a"), unit_rows(b, "b")
    shared = torch.zeros((), dtype=torch.float64, device=a.device)
    with full_precision(a.device):
        for start in range(0, n, chunk):
            near_u, near_v = _neighbours(u, start, chunk, k), _neighbours(v, start, chunk, k)
            shared += (near_u[:, :, None] == near_v[:, None, :]).sum()
    return shared / (n * k)


def _neighbours(u: Float[Tensor, "n dim"], start: int, chunk: int, k: int) -> Int[Tensor, "rows k"]:
    """Indices of the k nearest rows to rows start, ..., start + chunk - 1, never the row itself."""
    similarity = u[start : start + chunk] @ u.T
    rows = torch.arange(similarity.shape[0], device=u.device)
    similarity[rows, rows + start] = -torch.inf
    return similarity.topk(k, dim=1).indices


def paired_hits(a: Float[Tensor, "n dim"], b: Float[Tensor, "n dim"], k: int = 10, *, chunk: int = CHUNK) -> PairedHits:
    """Per tile, the probability that its partner under the other condition is among the k nearest.

    The gallery of a query is every tile of both conditions but the query itself, 2n - 1 in all. With g
    tiles strictly nearer than the partner and t others tied with it, P(hit) = clip((k - g) / (t + 1), 0,
    1).

    Args:
        a: Features of n tiles under one condition.
        b: Features of the same tissue under another: row i of `b` is the partner of row i of `a`.
        k: How many nearest tiles count as found, at least 1.
        chunk: Queries compared with the gallery at once.

    Returns:
        Probabilities for both directions and the share of queries with a tie.

    Raises:
        ValueError: The shapes differ, k < 1, or a row has no direction.

    Reference:
        PLISM benchmark (Owkin 2025), top-k accuracy, with ties and self handled as in style rule 14.
    """
    if a.shape != b.shape:
        raise ValueError(f"a and b should be partners row by row, got {tuple(a.shape)} and {tuple(b.shape)}.")
    if k < 1:
        raise ValueError(f"k should be at least 1, got {k}.")
    wide = torch.promote_types(torch.promote_types(a.dtype, b.dtype), torch.float32)
    u, v = unit_rows(a.to(wide), "a"), unit_rows(b.to(wide), "b")
    with full_precision(a.device):
        a_to_b, tied_a = _one_way(u, v, k, chunk)
        b_to_a, tied_b = _one_way(v, u, k, chunk)
    return PairedHits(a_to_b, b_to_a, float(tied_a + tied_b) / (2 * a.shape[0]))


def _one_way(own: Tensor, other: Tensor, k: int, chunk: int) -> tuple[Tensor, Tensor]:
    """P(hit) of every row of `own` looking for its partner in `other`, and how many partners were tied."""
    margin = rounding_margin(own.shape[1], own.dtype)
    hits, tied = [], torch.zeros((), dtype=torch.int64, device=own.device)
    for start in range(0, own.shape[0], chunk):
        query = own[start : start + chunk]
        rows = torch.arange(query.shape[0], device=own.device)
        cross, within = query @ other.T, query @ own.T
        s = cross[rows, rows + start].clone()[:, None]
        # Neither the query nor its partner competes: both leave the count by index.
        cross[rows, rows + start] = -torch.inf
        within[rows, rows + start] = -torch.inf
        nearer = (cross > s + margin).sum(dim=1) + (within > s + margin).sum(dim=1)
        at_least = (cross >= s - margin).sum(dim=1) + (within >= s - margin).sum(dim=1)
        ties = at_least - nearer
        hits.append(hit_probability(nearer, ties, k))
        tied += (ties > 0).sum()
    return torch.cat(hits), tied


def paired_topk(
    a: Float[Tensor, "n dim"], b: Float[Tensor, "n dim"], k: int = 10, *, chunk: int = CHUNK
) -> Float[Tensor, ""]:
    """How often a tile finds its partner under the other condition among its k nearest, both directions.

    Identical distinct features score 1; a constant encoder scores chance, k / (2n - 1). The score falls as
    n grows, so state n beside it. See `paired_hits` for the definition and for one value per tile.

    Args:
        a: Features of n tiles under one condition.
        b: Features of the same tissue under another, row by row.
        k: How many nearest tiles count as found, at least 1.
        chunk: Queries compared with the gallery at once.

    Returns:
        A scalar in [0, 1] (fp64).

    Raises:
        ValueError: The shapes differ, k < 1, or a row has no direction.
    """
    hits = paired_hits(a, b, k, chunk=chunk)
    return (hits.a_to_b.mean() + hits.b_to_a.mean()) / 2


def conditions_topk(
    features: Mapping[str, Float[Tensor, "n dim"]], k: int = 10, *, chunk: int = CHUNK
) -> list[ConditionPair]:
    """`paired_topk` of every pair of conditions, in the order of the mapping.

    Args:
        features: Condition name to features; row i is the same tissue in all of them.
        k: How many nearest tiles count as found.
        chunk: Queries compared with the gallery at once.

    Returns:
        One entry per unordered pair of conditions.

    Raises:
        ValueError: Fewer than two conditions, or what `paired_topk` raises.
    """
    if len(features) < 2:
        raise ValueError(f"at least two conditions are needed to compare, got {list(features)}.")
    return [
        ConditionPair(first, second, float(paired_topk(x, y, k, chunk=chunk)), int(x.shape[0]))
        for (first, x), (second, y) in itertools.combinations(features.items(), 2)
    ]


def mean_topk(pairs: Sequence[ConditionPair]) -> float:
    """Mean top-k over pairs of conditions, each pair counting once whatever its n."""
    if not pairs:
        raise ValueError("a mean over pairs of conditions needs at least one pair, got none.")
    return sum(pair.topk for pair in pairs) / len(pairs)
