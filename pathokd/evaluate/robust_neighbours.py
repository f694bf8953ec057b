"""Who stands next to a tile: robustness index and its relatives, MaRI, CRoMa, clusters, and rising confounding.

Confounders are scanner, staining and site, whichever vary. For the scanner the staining is held and the other way
round: neighbours are looked up among tiles of one staining, and counts of all stainings are pooled.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch
from scipy.stats import t as student_t

from pathokd.evaluate.bootstrap import percentiles
from pathokd.evaluate.paired_features import ModelFeatures
from pathokd.evaluate.paired_set import PairedSet, Rows
from pathokd.evaluate.resampling import Draws, Measure, Resampler, ratio
from pathokd.metrics.clustering import clustering_score
from pathokd.metrics.confounding import (
    ConfoundedAccuracy,
    average_performance_drop,
    confounded_accuracy,
    performance_drops,
)
from pathokd.metrics.neighbours import TYPES, Neighbours, typed_neighbours
from pathokd.metrics.robustness import (
    TAIL,
    NeighbourCounts,
    indices,
    margin_index,
    neighbour_counts,
    robustness_margins,
    summarise_margins,
)

HELD = {"scanner": "stain", "stain": "scanner", "site": None}
"""Confounder to the condition that is held while it varies."""
MAX_TILES = 6000
"""Tiles compared with each other; more are thinned out by place, seeded."""
RANKS = 50
NO_INTERVAL = "it would take clustering anew under every resample; compare models by other measures"


class Settings(NamedTuple):
    """How neighbours are measured."""

    k: int = 11
    """Of the robustness index; PathoROB fixes 11 for CAMELYON, 61 for TCGA, 46 for Tolkach-ESCA."""
    sweep: tuple[int, ...] = (1, 2, 3, 5, 8, 11, 16, 23, 33, 46, 61, 81, 101)
    margin_m: int = 5
    clusters: tuple[int, ...] = (2, 3, 4, 5, 6, 8, 10)
    """Numbers of clusters to choose from; the published search is 2 to 30."""
    trials: int = 10
    """Runs of k-means per quad; published: 50."""
    splits: int = 6
    repetitions: int = 5
    """Deals of training slides under confounding; published: 20."""
    strengths: tuple[float, ...] = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)
    seed: int = 0

    @classmethod
    def published(cls, k: int, seed: int) -> "Settings":
        """The searches and repetitions of PathoROB, which take some hundred times as long as the defaults."""
        strengths = tuple(float(C) for C in 10 ** np.linspace(-8, 4, 15))
        return cls(k, clusters=tuple(range(2, 31)), trials=50, splits=8, repetitions=20, strengths=strengths, seed=seed)


class Found(NamedTuple):
    """Measures of one model against all confounders."""

    measures: list[Measure]
    ranks: pd.DataFrame
    """Share of each type of neighbour at each rank: confounder, rank, type, share, n."""
    confounding: pd.DataFrame
    """Accuracy under rising confounding: confounder, cramers_v, domain, accuracy, low, high, n."""
    not_shown: list[tuple[str, str]]


def measure_neighbours(model: ModelFeatures, tiles: PairedSet, settings: Settings = Settings()) -> Found:  # noqa: B008
    """All of these measures for every confounder that varies.

    Args:
        model: Features of the set.
        tiles: A set with the column `label`.
        settings: How.

    Returns:
        Measures and tables; what could not be measured says why.
    """
    measures: list[Measure] = []
    ranks: list[pd.DataFrame] = []
    curves: list[pd.DataFrame] = []
    not_shown: list[tuple[str, str]] = []
    labelled = tiles.labelled()
    if not len(labelled):
        reason = "the tiles have no column label with classes of tissue"
        whats = ("robustness index, MaRI, CRoMa", "clustering score", "confounding (APD)")
        return Found([], pd.DataFrame(), pd.DataFrame(), [(what, reason) for what in whats])
    for confounder, held in HELD.items():
        if not tiles.varies(confounder):
            continue
        parts = list(_parts(tiles, tiles.known(confounder, labelled), confounder, held, settings.seed))
        if not parts:
            reason = f"no class of tissue occurs under two values of {confounder}, together with another class"
            not_shown.append((f"neighbours against {confounder}", reason))
            continue
        features = [torch.from_numpy(model.load(rows)) for rows in parts]
        steps: list[tuple[str, Callable[[], list[Measure]]]] = [
            ("robustness index, MaRI", lambda: _indices(features, parts, tiles, confounder, settings, ranks)),  # noqa: B023
            ("CRoMa", lambda: _margins(features, parts, tiles, confounder, settings)),  # noqa: B023
            ("clustering score", lambda: _clusters(features, parts, tiles, confounder, settings)),  # noqa: B023
            ("confounding (APD)", lambda: _confounding(features, parts, tiles, confounder, settings, curves)),  # noqa: B023
        ]
        for what, step in steps:
            try:
                measures += step()
                if what == "clustering score":
                    not_shown.append((f"interval of the {what} against {confounder}", NO_INTERVAL))
            except ValueError as error:
                not_shown.append((f"{what} against {confounder}", str(error)))
    return Found(measures, _joined(ranks), _joined(curves), not_shown)


def _joined(frames: list[pd.DataFrame]) -> pd.DataFrame:
    return pd.concat(frames, ignore_index=True) if frames else pd.DataFrame()


def _parts(tiles: PairedSet, labelled: Rows, confounder: str, held: str | None, seed: int) -> Iterator[Rows]:
    """Rows of each held condition in which classes and confounder cross, thinned out to `MAX_TILES` in all."""
    values = np.zeros(len(labelled)) if held is None or held not in tiles.frame else tiles.column(held, labelled)
    parts = [crossed(tiles, labelled[values == value], confounder) for value in np.unique(values)]
    total = sum(map(len, parts))
    places = tiles.column("pair_id" if tiles.registered else "key")
    kept = np.unique(places)
    if total > MAX_TILES:
        kept = np.random.default_rng(seed).permutation(kept)[: int(len(kept) * MAX_TILES / total)]
    for rows in parts:
        some = crossed(tiles, rows[np.isin(places[rows], kept)], confounder)
        if len(some):
            yield some


def crossed(tiles: PairedSet, rows: Rows, confounder: str) -> Rows:
    """The rows left when classes of one confounder and confounders of one class are dropped, until none is."""
    frame = tiles.frame[["label", confounder]].iloc[rows].reset_index(drop=True)
    while len(frame):
        per_class = frame.groupby("label")[confounder].transform("nunique")
        per_value = frame.groupby(confounder)["label"].transform("nunique")
        good = (per_class >= 2) & (per_value >= 2)
        if good.all():
            break
        frame = frame[good]
    return rows[frame.index.to_numpy(np.int64)]


def _indices(
    features: list[torch.Tensor],
    parts: list[Rows],
    tiles: PairedSet,
    confounder: str,
    settings: Settings,
    ranks: list[pd.DataFrame],
) -> list[Measure]:
    apart = [tiles.column(tiles.apart_column(), rows) for rows in parts]
    room = min(
        len(rows) - int(np.unique(group, return_counts=True)[1].max()) for rows, group in zip(parts, apart, strict=True)
    )
    if settings.k > room:
        raise ValueError(
            f"k = {settings.k} is larger than the gallery: the largest {tiles.apart_column()} leaves {room} tiles to "
            "compare with"
        )
    longest = max(settings.k, *(k for k in settings.sweep if k <= room))
    lists = [
        typed_neighbours(
            x, tiles.column("label", rows), tiles.column(confounder, rows), group, min(room, max(longest, RANKS))
        )
        for x, rows, group in zip(features, parts, apart, strict=True)
    ]
    everything = np.concatenate(parts)
    resampler = Resampler(tiles.column(tiles.unit_column(), everything), settings.seed)
    chance = _chance(parts, tiles, confounder)
    named, n = f"robustness_index {confounder}", len(everything)
    measures = [Measure("chance", named, chance, n, resampler.n_groups, None, low=chance, high=chance)]
    for k in sorted({settings.k, *(k for k in settings.sweep if k <= room)}):
        counts = _pooled([neighbour_counts(each, k) for each in lists])
        measures += _index_measures(counts, resampler, confounder, k == settings.k)
    # One scale of distances for all held conditions: weights of several do not add up.
    together = Neighbours(torch.cat([x.distance for x in lists]), torch.cat([x.share for x in lists]), float("nan"))
    mari = margin_index(together, settings.k)
    if not mari.reason:
        drawn = resampler.sums(torch.stack([mari.SO, mari.OS], dim=1).numpy())
        draws = ratio(drawn[:, 0], drawn.sum(axis=1))
        measures.append(Measure("mari", confounder, mari.value, mari.n, resampler.n_groups, draws, settings.k))
    ranks.append(_by_rank(lists, confounder))
    return measures


def _chance(parts: list[Rows], tiles: PairedSet, confounder: str) -> float:
    """Robustness index of neighbours drawn at random: it is 1/2 for two classes and two confounders in balance only."""
    so = typed = 0.0
    for rows in parts:
        columns = (tiles.column(name, rows) for name in ("label", confounder, tiles.apart_column()))
        bio, other, group = (np.unique(column, return_inverse=True)[1] for column in columns)
        for b, c, g in zip(bio, other, group, strict=True):
            apart = group != g
            same_bio, same_confounder = bio[apart] == b, other[apart] == c
            so += (same_bio & ~same_confounder).mean()
            typed += (same_bio != same_confounder).mean()
    return so / typed if typed else float("nan")


def _pooled(counts: Sequence[NeighbourCounts]) -> NeighbourCounts:
    SS, SO, OS, OO = (torch.cat([getattr(each, name) for each in counts]) for name in TYPES)
    return NeighbourCounts(counts[0].k, SS, SO, OS, OO)


def _index_measures(counts: NeighbourCounts, resampler: Resampler, confounder: str, fixed: bool) -> list[Measure]:
    """The robustness index, and at the fixed k its relatives, with their draws."""
    found = indices(counts)
    SS, SO, OS, OO = resampler.sums(torch.stack(counts[1:], dim=1).numpy()).T
    drawn = {
        "robustness": ratio(SO, SO + OS),
        "de_jong": ratio(SS + SO, SS + OS),
        "ood_performance": ratio(SO, SO + OO),
        "id_performance": ratio(SS, SS + OS),
    }
    names = list(drawn) if fixed else ["robustness"]
    labels = {"robustness": "robustness_index", "de_jong": "de_jong_index"}
    return [
        Measure(
            labels.get(name, name), confounder, getattr(found, name), found.n, resampler.n_groups, drawn[name], counts.k
        )
        for name in names
    ]


def _by_rank(lists: list[Neighbours], confounder: str) -> pd.DataFrame:
    share = torch.cat([each.share for each in lists]).double().mean(dim=0).numpy()
    n = sum(len(each.share) for each in lists)
    rank = np.repeat(np.arange(1, len(share) + 1), len(TYPES))
    kinds = np.tile(TYPES, len(share))
    return pd.DataFrame({"confounder": confounder, "rank": rank, "type": kinds, "share": share.ravel(), "n": n})


def _margins(
    features: list[torch.Tensor], parts: list[Rows], tiles: PairedSet, confounder: str, settings: Settings
) -> list[Measure]:
    found = [
        robustness_margins(
            x,
            tiles.column("label", rows),
            tiles.column(confounder, rows),
            tiles.column(tiles.apart_column(), rows),
            settings.margin_m,
        ).margin
        for x, rows in zip(features, parts, strict=True)
    ]
    margin = torch.cat(found)
    summary = summarise_margins(margin, settings.margin_m)
    if not summary.n:
        raise ValueError(summary.reason)
    resampler = Resampler(tiles.column(tiles.unit_column(), np.concatenate(parts)), settings.seed)
    median, ltm10, f0 = margin_draws(margin.numpy(), resampler.weights())
    values = (summary.median, summary.ltm10, summary.f0)
    return [
        Measure(f"croma_{name}", confounder, value, summary.n, resampler.n_groups, drawn, settings.margin_m)
        for name, value, drawn in zip(("median", "ltm10", "f0"), values, (median, ltm10, f0), strict=True)
    ]


def margin_draws(margin: npt.NDArray[np.float64], weights: npt.NDArray[np.float32]) -> tuple[Draws, Draws, Draws]:
    """Median, mean of the lowest tenth and share at or below 0, of margins weighted by each resample.

    Args:
        margin: (n,) NaN where undefined.
        weights: (resamples, n).

    Returns:
        Three arrays, (resamples,); NaN for a resample without a margin.
    """
    order = np.flatnonzero(np.isfinite(margin))
    order = order[np.argsort(margin[order], kind="stable")]
    m, w = margin[order], weights[:, order].astype(np.float64)
    total = np.cumsum(w, axis=1)
    whole = total[:, -1:]
    median = np.where(whole[:, 0] > 0, m[np.argmax(total >= whole / 2, axis=1)], np.nan)
    in_tail = total - w < TAIL * whole
    ltm10 = ratio((w * in_tail) @ m, (w * in_tail).sum(axis=1))
    f0 = ratio(w @ (m <= 0), whole[:, 0])
    return median, ltm10, f0


def _clusters(
    features: list[torch.Tensor], parts: list[Rows], tiles: PairedSet, confounder: str, settings: Settings
) -> list[Measure]:
    quads = []
    n = 0
    for x, rows in zip(features, parts, strict=True):
        found = clustering_score(
            x,
            tiles.column("label", rows),
            tiles.column(confounder, rows),
            clusters=settings.clusters,
            trials=settings.trials,
            seed=settings.seed,
        )
        quads += [quad.score for quad in found.quads]
        n += found.n
    # Without an interval. Quads share their tiles, so resampling them says how classes differ, however many cases there
    # are; and resampling cases under the clusters as they are held the truth in 77 to 87 % of simulated studies.
    n_groups = Resampler(tiles.column(tiles.unit_column(), np.concatenate(parts)), settings.seed).n_groups
    return [Measure("clustering_score", confounder, float(np.mean(quads)), n, n_groups, None)]


def _confounding(
    features: list[torch.Tensor],
    parts: list[Rows],
    tiles: PairedSet,
    confounder: str,
    settings: Settings,
    curves: list[pd.DataFrame],
) -> list[Measure]:
    """APD within each held condition, and over all of them that hold enough tiles."""
    found, reasons = [], []
    for x, rows in zip(features, parts, strict=True):
        try:
            found.append(_confounded(x.numpy(), rows, tiles, confounder, settings))
        except ValueError as error:
            reasons.append(str(error))
    if not found:
        raise ValueError(reasons[0])
    drop = average_performance_drop(*(each.in_domain for each in found))
    # Held conditions differ for good, so repetitions are drawn within each.
    drawn = np.mean(
        [
            Resampler(np.arange(settings.repetitions), settings.seed + number).means(performance_drops(each.in_domain))
            for number, each in enumerate(found)
        ],
        axis=0,
    )
    low, high = percentiles(drawn, drop.n)
    if high > low:  # stretched to the width of Student's, which no percentile of so few repetitions reaches
        drawn = drop.apd + (drop.ci[1] - drop.ci[0]) / (high - low) * (drawn - drop.apd)
    student = float(student_t.ppf(0.975, max(1, len(found) * (settings.repetitions - 1))))
    accuracy = np.stack([each.in_domain for each in found])
    several = settings.repetitions > 1  # one says nothing of how they vary
    variance = accuracy.var(axis=2, ddof=1) if several else np.full(accuracy.shape[:2], np.nan)
    spread = student * np.sqrt(variance.sum(axis=0) / accuracy.shape[2]) / len(found)
    mean = accuracy.mean(axis=(0, 2))
    n = sum(each.n_in_domain for each in found)
    curves.append(
        pd.DataFrame(
            {
                "confounder": confounder,
                "cramers_v": np.mean([each.cramers_v for each in found], axis=0),
                "domain": "in",
                "accuracy": mean,
                "low": mean - spread,
                "high": mean + spread,
                "n": n,
            }
        )
    )
    return [Measure("apd", confounder, drop.apd, n, drop.n, drawn if several else None)]


def _confounded(
    x: npt.NDArray[np.float32], rows: Rows, tiles: PairedSet, confounder: str, settings: Settings
) -> ConfoundedAccuracy:
    """Accuracies under rising confounding within one held condition."""
    groups = tiles.column(tiles.apart_column(), rows)
    values = tiles.column(confounder, rows)
    # A case is taken under one of the scanners it is seen under, or training and test would share tissue.
    seen = pd.Series(values).groupby(groups).unique()
    numbers = np.random.default_rng(settings.seed).integers(len(np.unique(values)), size=len(seen))
    chosen = {g: sorted(own)[number % len(own)] for (g, own), number in zip(seen.items(), numbers, strict=True)}
    one = np.array([chosen[g] == v for g, v in zip(groups, values, strict=True)])
    x, rows, groups, values = x[one], rows[one], groups[one], values[one]
    labels = tiles.column("label", rows)
    full = [c for c in np.unique(labels) if _slides_per_cell(labels == c, values, groups) >= 3]
    keep = np.isin(labels, full)
    if len(full) < 2:
        raise ValueError(
            f"training, validation and test need 3 groups ({tiles.apart_column()}) of each of two classes under every "
            f"{confounder}, each group seen under one of them only; {len(full)} classes have that"
        )
    scale = float(x[keep].std())
    if scale == 0:
        raise ValueError("features of all tiles are the same, so no probe can learn from them")
    return confounded_accuracy(
        x[keep] / scale,
        labels[keep],
        values[keep],
        groups[keep],
        splits=settings.splits,
        repetitions=settings.repetitions,
        strengths=settings.strengths,
        seed=settings.seed,
    )


def _slides_per_cell(
    of_class: npt.NDArray[np.bool_], values: npt.NDArray[np.str_], groups: npt.NDArray[np.str_]
) -> int:
    return min(len(np.unique(groups[of_class & (values == value)])) for value in np.unique(values))
