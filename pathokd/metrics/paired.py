"""One pair of registered conditions, exactly and fast: top-k both ways from one product, cosine and separation.

Top-k asks each tile for its partner in a gallery of both conditions. The published way multiplies all 2n tiles of a
pair with all 2n. Here the tiles of a condition meet their own condition once, not once per pair, and keep the kmax
highest similarities; a pair then needs one n by n product, whose rows answer one direction and whose columns the
other. That is exact: whoever has kmax own tiles nearer than the partner has lost anyway. Where a tie reaches beyond
the kept list, those few rows are counted again in full.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from pathokd.metrics.precision import full_precision, rounding_margin
from pathokd.metrics.retrieval import hit_probability

TOP_K = (1, 3, 5, 10)
CHUNK = 512
"""Rows of a product held at once: it fits a CPU's cache; a GPU is faster with 4096."""


class TileScores(NamedTuple):
    """One pair of conditions tile by tile, for a bootstrap and for pictures; on the CPU."""

    cosine: Float[Tensor, " n"]
    separation: Float[Tensor, " n"]
    """Own cosine minus the mean cosine with other places, both ways round; its mean is the pair's separation."""
    first_to_second: Float[Tensor, "n ks"]
    """Probability that the partner is among the k nearest, one column per k."""
    second_to_first: Float[Tensor, "n ks"]


class PairScores(NamedTuple):
    """One pair of conditions."""

    first: str
    second: str
    n: int
    """Tiles per condition: top-k falls as it grows, so always print it."""
    cosine: float
    """Mean over tiles; read it beside `separation`, since collapse makes it perfect."""
    separation: float
    """Matched minus mismatched mean cosine."""
    k: tuple[int, ...]
    topk: tuple[float, ...]
    """Mean of both directions, one number per k; chance is k / (2n - 1)."""
    first_to_second: tuple[float, ...]
    second_to_first: tuple[float, ...]
    tied: float
    """Share of queries decided by a tie within reach of the largest k; near 1 means collapse."""
    tiles: TileScores | None


def check_k(k: Sequence[int], n: int) -> None:
    """Raise ValueError unless there is a k and each lies within the gallery of a query."""
    if min(k, default=0) < 1 or max(k) > 2 * n - 1:
        raise ValueError(f"k should be 1 to {2 * n - 1} (2n - 1, the gallery of a query, for n = {n}), got {list(k)}.")


def own_similarities(unit: Float[Tensor, "n dim"], kmax: int, *, chunk: int = CHUNK) -> Float[Tensor, "n kept"]:
    """The `kmax` highest similarities of each tile with other tiles of its condition, highest first.

    Args:
        unit: Unit rows of one condition.
        kmax: How many to keep; with fewer other tiles all are kept.
        chunk: Rows of the product held at once.

    Returns:
        Similarities, shape (n, min(kmax, n - 1)), self left out by its index.
    """
    n = unit.shape[0]
    kept = unit.new_empty(n, min(kmax, n - 1))
    product = unit.new_empty(min(chunk, n), n)
    with full_precision(unit.device):
        for start in range(0, n, chunk):
            rows = torch.arange(start, min(start + chunk, n), device=unit.device)
            within = torch.mm(unit[start : start + chunk], unit.T, out=product[: len(rows)])
            within[rows - start, rows] = -torch.inf
            kept[start : start + chunk] = within.topk(kept.shape[1], dim=1).values
    return kept


def compare_pair(
    u: Float[Tensor, "n dim"],
    v: Float[Tensor, "n dim"],
    own_u: Float[Tensor, "n kept"],
    own_v: Float[Tensor, "n kept"],
    k: Sequence[int] = TOP_K,
    *,
    names: tuple[str, str] = ("first", "second"),
    chunk: int = CHUNK,
    tiles: bool = False,
) -> PairScores:
    """Scores of one pair from unit rows and their own lists; `compare_conditions` prepares both.

    With g tiles strictly nearer than the partner and t others tied with it, to rounding, a query is a hit with
    probability clip((k - g) / (t + 1), 0, 1). Neither the query nor the partner competes: both go by their index.

    Args:
        u: Unit rows of one condition.
        v: Unit rows of the other, partner by partner.
        own_u: `own_similarities` of `u`, with kmax of at least the largest k.
        own_v: The same of `v`.
        k: How many nearest tiles count as found, each 1 to 2n - 1.
        names: What to call them.
        chunk: Rows of the product held at once.
        tiles: Keep the scores of every tile.

    Returns:
        The scores.

    Raises:
        ValueError: The shapes differ, there is one tile only, or k is out of range.

    Reference:
        PLISM benchmark (Owkin 2025), top-k accuracy and cosine similarity.
    """
    n = u.shape[0]
    if u.shape != v.shape or n < 2:
        raise ValueError(
            f"{names[0]} and {names[1]} should be partners row by row, at least 2: got {tuple(u.shape)} and "
            f"{tuple(v.shape)}."
        )
    check_k(k, n)
    kmax = max(k)
    if own_u.shape[1] < min(kmax, n - 1) or own_v.shape[1] < min(kmax, n - 1):
        raise ValueError(f"own lists should keep {min(kmax, n - 1)} similarities, got {own_u.shape[1]}.")
    margin = rounding_margin(u.shape[1], u.dtype)
    with full_precision(u.device):
        s = (u * v).sum(dim=1)
        crossed_u, crossed_v = _count_cross(u, v, s, margin, chunk)
        nearer_u, ties_u = _add_own(u, own_u, s, margin, crossed_u, kmax, chunk)
        nearer_v, ties_v = _add_own(v, own_v, s, margin, crossed_v, kmax, chunk)
        # The sum over all others is a product with one vector, so the mean over n^2 pairs costs n.
        with_all = (u @ v.mean(dim=0) + v @ u.mean(dim=0)) / 2
    s, with_all = s.cpu().double(), with_all.cpu().double()
    apart = s - (n * with_all - s) / (n - 1)
    to_second = torch.stack([hit_probability(nearer_u, ties_u, each) for each in k], dim=1)
    to_first = torch.stack([hit_probability(nearer_v, ties_v, each) for each in k], dim=1)
    forth, back = to_second.mean(dim=0).tolist(), to_first.mean(dim=0).tolist()
    tied = ((ties_u > 0) & (nearer_u < kmax)).sum() + ((ties_v > 0) & (nearer_v < kmax)).sum()
    return PairScores(
        *names,
        n=n,
        cosine=float(s.mean().clamp(-1.0, 1.0)),
        separation=float(apart.mean()),
        k=tuple(k),
        topk=tuple((a + b) / 2 for a, b in zip(forth, back, strict=True)),
        first_to_second=tuple(forth),
        second_to_first=tuple(back),
        tied=float(tied) / (2 * n),
        tiles=TileScores(s.clamp(-1.0, 1.0), apart, to_second, to_first) if tiles else None,
    )


Counts = tuple[Int[Tensor, " n"], Int[Tensor, " n"]]


def _count_cross(u: Tensor, v: Tensor, s: Tensor, margin: float, chunk: int) -> tuple[Counts, Counts]:
    """Tiles of the other condition strictly nearer than the partner, and at least as near: of rows, of columns.

    Comparisons are written as 0.0 and 1.0 and added by a matrix product, which is exact below 2^24 tiles and
    several times faster than summing booleans.
    """
    n = len(u)
    product, beyond, ones = u.new_empty(min(chunk, n), n), u.new_empty(min(chunk, n), n), u.new_ones(n)
    rows = torch.zeros(2, n, dtype=torch.int64, device=u.device)
    columns = torch.zeros_like(rows)
    for start in range(0, n, chunk):
        part = slice(start, min(start + chunk, n))
        here = torch.arange(part.start, part.stop, device=u.device)
        cross, mask = torch.mm(u[part], v.T, out=product[: len(here)]), beyond[: len(here)]
        cross[here - start, here] = -torch.inf
        for which, (compare, bound) in enumerate(((torch.gt, s + margin), (torch.ge, s - margin))):
            rows[which, part] = (compare(cross, bound[part, None], out=mask) @ ones).long()
            columns[which] += (ones[: len(here)] @ compare(cross, bound, out=mask)).long()
    return (rows[0], rows[1]), (columns[0], columns[1])


def _add_own(
    unit: Tensor, own: Tensor, s: Tensor, margin: float, crossed: Counts, kmax: int, chunk: int
) -> tuple[Int[Tensor, " n"], Int[Tensor, " n"]]:
    """With the own condition added, on the CPU: g strictly nearer (exact below kmax) and t tied."""
    bound = s[:, None]
    nearer = crossed[0] + (own > bound + margin).sum(dim=1)
    at_least = crossed[1] + (own >= bound - margin).sum(dim=1)
    # The list ends within the tie, and the partner is still in reach: only the whole row tells how long the tie is.
    unsure = (nearer < kmax) & (own[:, -1] >= s - margin) & (own.shape[1] < len(unit) - 1)
    which = unsure.nonzero().squeeze(1)
    for start in range(0, len(which), chunk):
        rows = which[start : start + chunk]
        within = unit[rows] @ unit.T
        within[torch.arange(len(rows), device=unit.device), rows] = -torch.inf
        nearer[rows] = crossed[0][rows] + (within > bound[rows] + margin).sum(dim=1)
        at_least[rows] = crossed[1][rows] + (within >= bound[rows] - margin).sum(dim=1)
    return nearer.cpu(), (at_least - nearer).cpu()
