"""Does tissue or scanner decide who is near: the robustness index and its relatives, MaRI, and the margin CRoMa.

The indices count the k nearest tiles; `typed_neighbours` finds them once for every k. CRoMa looks as far as it must
and says by how much. A number that cannot be had is NaN, and `reason` says why.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from pathokd.metrics.neighbours import CHUNK, TYPES, Labels, Neighbours, encode, similarities, type_codes
from pathokd.metrics.precision import rounding_margin

TAIL = 0.1
"""Share of tiles in the lower tail of the margins."""


class NeighbourCounts(NamedTuple):
    """How many of the k nearest are of each type, tile by tile: whole numbers but for ties, fp64 on the CPU."""

    k: int
    SS: Float[Tensor, " n"]
    SO: Float[Tensor, " n"]
    OS: Float[Tensor, " n"]
    OO: Float[Tensor, " n"]


class Indices(NamedTuple):
    """What the counts of all tiles say together; NaN where a denominator is 0."""

    k: int
    robustness: float
    """SO / (SO + OS): 1 only biology, 0 only the confounder."""
    de_jong: float
    """(SS + SO) / (SS + OS), the earlier index: above 1 biology leads."""
    confounder_insensitivity: float
    """(SO + OO) / (SS + OS)."""
    generalisation: float
    """(SS SO + SO OS) / (SS SO + SS OO)."""
    ood_performance: float
    """SO / (SO + OO): right classes among neighbours from other centres."""
    id_performance: float
    """SS / (SS + OS): right classes among neighbours from the own centre."""
    shares: tuple[float, float, float, float]
    """Of SS, SO, OS and OO among all neighbours."""
    n: int
    support: float
    """Share of tiles with an SO or OS neighbour at all; a high index on a thin support says little."""
    reason: str
    """Why numbers are NaN; empty if none is."""


class MarginIndex(NamedTuple):
    """The robustness index with near neighbours weighing more (MaRI)."""

    k: int
    value: float
    tau: float
    """The scale of distances it used."""
    SO: Float[Tensor, " n"]
    """Weight of SO neighbours of each tile, to a common factor; value = sum SO / (sum SO + sum OS)."""
    OS: Float[Tensor, " n"]
    n: int
    reason: str


class Margins(NamedTuple):
    """How much nearer the same tissue from elsewhere is than other tissue from the same place (CRoMa)."""

    margin: Float[Tensor, " n"]
    """(d_OS - d_SO) / (d_OS + d_SO) in [-1, 1], NaN where undefined; fp64 on the CPU."""
    m: int
    median: float
    ltm10: float
    """Mean of the lowest tenth."""
    f0: float
    """Share of margins that are 0 or less."""
    n: int
    """Tiles with a margin."""
    reason: str
    """Why some tiles have none; empty if all have."""


def neighbour_counts(neighbours: Neighbours, k: int) -> NeighbourCounts:
    """Types among the k nearest, tile by tile; a bootstrap resamples its rows.

    Args:
        neighbours: From `typed_neighbours`.
        k: 1 to the length of its lists.

    Returns:
        Counts.

    Raises:
        ValueError: k out of range.
    """
    length = neighbours.share.shape[1]
    if not 1 <= k <= length:
        raise ValueError(f"k should be 1 to {length}, the neighbours that were looked up, got {k}.")
    return NeighbourCounts(k, *neighbours.share[:, :k].sum(dim=1, dtype=torch.float64).cpu().unbind(dim=1))


def indices(counts: NeighbourCounts) -> Indices:
    """All indices from counts pooled over tiles; not means of ratios, so tiles without typed neighbours do no harm.

    Args:
        counts: From `neighbour_counts`; join the rows of several to pool evaluations.

    Returns:
        Indices.

    Reference:
        Koemen et al. 2025 (PathoROB), robustness index; de Jong et al. 2025, "Current Pathology Foundation Models
        are unrobust to Medical Center Differences", for `de_jong`.
    """
    SS, SO, OS, OO = (float(count.sum()) for count in counts[1:])
    typed = (counts.SO + counts.OS) > 0
    values = {
        "robustness": _ratio(SO, SO + OS),
        "de_jong": _ratio(SS + SO, SS + OS),
        "confounder_insensitivity": _ratio(SO + OO, SS + OS),
        "generalisation": _ratio(SS * SO + SO * OS, SS * SO + SS * OO),
        "ood_performance": _ratio(SO, SO + OO),
        "id_performance": _ratio(SS, SS + OS),
    }
    undefined = [name for name, value in values.items() if value != value]
    total = SS + SO + OS + OO
    return Indices(
        counts.k,
        **values,
        shares=(SS / total, SO / total, OS / total, OO / total),
        n=len(counts.SS),
        support=float(typed.double().mean()),
        reason=f"no neighbours of the types that these divide by: {', '.join(undefined)}" if undefined else "",
    )


def robustness_index(neighbours: Neighbours, k: Sequence[int]) -> list[Indices]:
    """Indices at one k or swept over several.

    Args:
        neighbours: From `typed_neighbours`.
        k: Each 1 to the length of its lists. PathoROB fixes 11 for CAMELYON, 61 for TCGA and 46 for Tolkach-ESCA.

    Returns:
        One entry per k.

    Raises:
        ValueError: A k is out of range.
    """
    return [indices(neighbour_counts(neighbours, each)) for each in k]


def margin_index(neighbours: Neighbours, k: int, tau: float | None = None) -> MarginIndex:
    """MaRI: the robustness index with weights exp(-d / tau), d being the cosine distance.

    Args:
        neighbours: From `typed_neighbours`.
        k: 1 to the length of its lists.
        tau: Scale of distances; None takes the median distance of the SO and OS neighbours among the k nearest, so
            that models with other scales compare. Where that is 0 the weights are 1.

    Returns:
        The index, NaN if there is no SO or OS neighbour.

    Raises:
        ValueError: k out of range, or tau not above 0.

    Reference:
        Grisi et al. 2026, "A distributional robustness margin for pathology foundation models", MaRI.
    """
    if tau is not None and not tau > 0:
        raise ValueError(f"tau should be above 0, got {tau}.")
    n = len(neighbour_counts(neighbours, k).SS)
    distance = neighbours.distance[:, :k].cpu().double()
    so, os = (neighbours.share[:, :k, TYPES.index(which)].cpu().double() for which in ("SO", "OS"))
    if tau is None:
        tau = _weighted_median(distance.flatten(), (so + os).flatten())
    if tau != tau:
        nothing = torch.zeros(n, dtype=torch.float64)
        return MarginIndex(k, tau, tau, nothing, nothing, n, f"no SO or OS neighbour among the {k} nearest of any tile")
    # Only ratios count: shifting by the smallest distance keeps exp from underflowing everywhere.
    nearest = distance[(so + os) > 0].min()
    weight = torch.exp((nearest - distance).clamp_max(0) / tau) if tau > 0 else torch.ones_like(distance)
    SO, OS = (so * weight).sum(dim=1), (os * weight).sum(dim=1)
    return MarginIndex(k, _ratio(float(SO.sum()), float(SO.sum() + OS.sum())), tau, SO, OS, n, "")


def robustness_margins(
    features: Float[Tensor, "n dim"],
    bio: Labels,
    confounder: Labels,
    groups: Labels | None = None,
    m: int = 5,
    *,
    chunk: int = CHUNK,
) -> Margins:
    """CRoMa: per tile, the mean distance to its m nearest OS against that to its m nearest SO tiles.

    Args:
        features: Features of n tiles.
        bio: (n,) biological class of each.
        confounder: (n,) centre or scanner of each.
        groups: (n,) slide of each, never compared within; None takes each tile for itself.
        m: Neighbours of each type.
        chunk: Queries compared with all tiles at once; memory is some 30 chunk n bytes.

    Returns:
        Margins and their median, tail mean and share at or below 0, over the tiles that have one.

    Raises:
        ValueError: As in `typed_neighbours`, or m < 1.

    Reference:
        Grisi et al. 2026, "A distributional robustness margin for pathology foundation models", CRoMa.
    """
    if m < 1:
        raise ValueError(f"m should be at least 1, got {m}.")
    design = encode(features, bio, confounder, groups)
    n = features.shape[0]
    margins = []
    rounding = rounding_margin(features.shape[1], torch.float64)
    for rows, similarity in similarities(features, design.group, chunk):
        types = type_codes(design, rows)
        d_SO, d_OS = (
            1
            - similarity.masked_fill(types != TYPES.index(which), -torch.inf).topk(min(m, n), dim=1).values.mean(dim=1)
            for which in ("SO", "OS")
        )
        both = d_OS + d_SO
        margins.append(torch.where(both.isfinite() & (both > 2 * rounding), (d_OS - d_SO) / both, torch.nan).cpu())
    return summarise_margins(torch.cat(margins), m)


def summarise_margins(margin: Float[Tensor, " n"], m: int) -> Margins:
    """Median, mean of the lowest tenth (margins up to the 10th percentile) and share at or below 0.

    Args:
        margin: Margins, NaN where undefined; a bootstrap passes resampled ones.
        m: Neighbours of each type that they are made of.

    Returns:
        The summary.
    """
    found = margin[margin.isfinite()]
    missing = len(margin) - len(found)
    reason = f"{missing} of {len(margin)} tiles lack {m} SO and {m} OS neighbours at a distance" if missing else ""
    if not len(found):
        nan = float("nan")
        return Margins(margin, m, nan, nan, nan, n=0, reason=reason)
    low, middle = torch.quantile(found, torch.tensor([TAIL, 0.5], dtype=found.dtype))
    ltm10, f0 = found[found <= low].mean(), (found <= 0).double().mean()
    return Margins(margin, m, float(middle), float(ltm10), float(f0), n=len(found), reason=reason)


def _ratio(numerator: float, denominator: float) -> float:
    return numerator / denominator if denominator > 0 else float("nan")


def _weighted_median(values: Float[Tensor, " n"], weights: Float[Tensor, " n"]) -> float:
    """The median of values that occur `weights` times, the mean of the two middle ones at an exact half; or NaN."""
    values, order = values[weights > 0].sort()
    if not len(values):
        return float("nan")
    below = weights[weights > 0][order].cumsum(0)
    half, slack = below[-1] / 2, 1e-9 * below[-1]
    low = values[torch.searchsorted(below, half - slack)]
    high = values[torch.searchsorted(below, half + slack).clamp_max(len(values) - 1)]
    return float((low + high) / 2)
