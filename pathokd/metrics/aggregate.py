"""From scores of pairs to one table: across scanners, across stainings, across both, and the leaderboard number."""

from collections.abc import Iterable, Mapping
from typing import Literal, NamedTuple, TypeAlias

import numpy as np

from pathokd.metrics.paired import PairScores
from pathokd.types import FloatArray

Group: TypeAlias = Literal["all", "cross-scanner", "cross-staining", "both"]
GROUPS: tuple[Group, ...] = ("all", "cross-scanner", "cross-staining", "both")
Compat: TypeAlias = Literal["plism"] | None


class Condition(NamedTuple):
    """How a slide came to be."""

    stain: str
    scanner: str


class GroupSummary(NamedTuple):
    """One metric over the pairs of one group."""

    group: Group
    metric: str
    """`cosine`, `separation`, `top1`, ..."""
    mean: float
    sd: float
    """Of the pairs, as they are (ddof 0)."""
    median: float
    iqr: float
    """75th minus 25th percentile, interpolated linearly."""
    n_pairs: int
    """With 0 pairs the numbers are NaN: say, one scanner only."""
    n_tiles: int
    """Tiles per condition."""


def plism_condition(name: str) -> Condition:
    """Staining and scanner of a PLISM slide, the first two fields of its name.

    Args:
        name: Such as `GMH_S60_to_GMH_S60.tif`.

    Returns:
        The condition.

    Raises:
        ValueError: The name has fewer than two fields.
    """
    fields = name.split("_")
    if len(fields) < 2 or not all(fields[:2]):
        raise ValueError(f"a PLISM slide is named STAIN_SCANNER_..., got {name!r}.")
    return Condition(fields[0], fields[1])


def in_group(first: Condition, second: Condition, group: Group) -> bool:
    """Does a pair of conditions belong to a group; `cross-scanner` holds the staining, and the other way round."""
    stains, scanners = first.stain != second.stain, first.scanner != second.scanner
    belongs = {
        "all": True,
        "cross-scanner": scanners and not stains,
        "cross-staining": stains and not scanners,
        "both": stains and scanners,
    }
    return belongs[group]


def summarise_pairs(
    scores: Iterable[PairScores], conditions: Mapping[str, Condition], *, compat: Compat = None
) -> list[GroupSummary]:
    """Mean (sd) and median (IQR) of every metric over every group of pairs.

    Args:
        scores: From `compare_conditions`, all with the same k and n.
        conditions: Staining and scanner of every name.
        compat: `plism` rounds each number to 3 decimals, as published.

    Returns:
        Groups in the order of `GROUPS`, in each `cosine`, `separation` and one `topK` per k.

    Raises:
        ValueError: No scores, scores that differ in k or n, or a name without a condition.

    Reference:
        PLISM benchmark (Owkin 2025), aggregation over pairs of slides.
    """
    scores = list(scores)
    if len({(score.k, score.n) for score in scores}) != 1:
        settings = sorted({(score.n, score.k) for score in scores})
        raise ValueError(f"scores should all have one n and the same k, and be there at all, got {settings}.")
    unknown = sorted({name for score in scores for name in score[:2]} - set(conditions))
    if unknown:
        raise ValueError(f"these names lack a staining and a scanner: {unknown}.")
    values = {"cosine": [score.cosine for score in scores], "separation": [score.separation for score in scores]}
    for column, k in enumerate(scores[0].k):
        values[f"top{k}"] = [score.topk[column] for score in scores]
    summaries = []
    for group in GROUPS:
        member = [in_group(conditions[score.first], conditions[score.second], group) for score in scores]
        for metric, all_values in values.items():
            chosen = np.asarray(all_values)[member]
            mean, sd, median, iqr = (round(number, 3) if compat == "plism" else number for number in _spread(chosen))
            summaries.append(GroupSummary(group, metric, mean, sd, median, iqr, len(chosen), scores[0].n))
    return summaries


def _spread(values: FloatArray) -> tuple[float, float, float, float]:
    """Mean, sd, median and IQR; NaN without values."""
    if not len(values):
        return (float("nan"),) * 4
    low, middle, high = np.quantile(values, [0.25, 0.5, 0.75])
    return float(values.mean()), float(values.std()), float(middle), float(high - low)


def leaderboard_number(summaries: Iterable[GroupSummary], *, k: int = 10, compat: Compat = None) -> float:
    """The number that the PLISM leaderboard sorts by: the mean of four medians.

    Median cosine over all pairs, and median top-10 across scanners, across stainings and across both.

    Args:
        summaries: From `summarise_pairs`.
        k: The k of top-k.
        compat: `plism` rounds the medians and the mean to 3 decimals, as published.

    Returns:
        A number in [-0.25, 1].

    Raises:
        ValueError: A group has no pairs, or k was not computed.

    Reference:
        PLISM benchmark (Owkin 2025), leaderboard; published at n = 8,139 tiles.
    """
    medians = {(summary.group, summary.metric): summary.median for summary in summaries if summary.n_pairs}
    needed = [("all", "cosine"), *((group, f"top{k}") for group in GROUPS[1:])]
    missing = [f"{metric} ({group})" for group, metric in needed if (group, metric) not in medians]
    if missing:
        raise ValueError(
            f"the leaderboard number needs pairs across scanners, across stainings and across both, with top-{k}; "
            f"missing: {', '.join(missing)}."
        )
    numbers = [medians[key] for key in needed]
    if compat != "plism":
        return sum(numbers) / len(numbers)
    return round(sum(round(number, 3) for number in numbers) / len(numbers), 3)
