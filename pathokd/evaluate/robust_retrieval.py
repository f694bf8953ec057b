"""Registered pairs: cosine, separation and top-k of every pair of conditions, over groups, with intervals.

What is kept of a pair is small whatever its size: means, the same means under every draw of groups, and a histogram of
cosines. So medians over 4,095 pairs get an interval too, and a run that was cut off goes on at the pair it was at.
"""

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch

from pathokd.evaluate.bootstrap import percentiles
from pathokd.evaluate.paired_features import ModelFeatures
from pathokd.evaluate.paired_set import PairedSet
from pathokd.evaluate.resampling import Draws, Measure, Resampler
from pathokd.files import BROKEN_ARRAY, atomic_path, fingerprint, make_header, write_json
from pathokd.metrics.aggregate import GROUPS, Compat, Group, in_group, leaderboard_number, summarise_pairs
from pathokd.metrics.conditions import compare_conditions
from pathokd.metrics.paired import TOP_K, PairScores
from pathokd.progress import Bars
from pathokd.types import IntArray

EDGES = np.linspace(-1, 1, 401)
"""Bins of the distribution of paired cosines."""
TAIL = 0.05
"""Share of tiles in the marked lower tail."""


class Pair(NamedTuple):
    """What is kept of one pair of conditions."""

    scores: PairScores
    draws: Draws
    """(resamples, metrics): cosine, separation, and one per k."""
    histogram: npt.NDArray[np.int64]
    """(bins,) of cosines of matched tiles."""


class Retrieval(NamedTuple):
    """All pairs of one model."""

    measures: list[Measure]
    pairs: pd.DataFrame
    """One row per pair and metric: first, second, metric, value, low, high, forth, back, tied, n."""
    groups: pd.DataFrame
    """Mean (sd) and median (IQR) over the pairs of each group, as the PLISM benchmark prints them."""
    distribution: pd.DataFrame
    """Histogram of paired cosines by group: group, low, high, count, tail (the 5th percentile)."""
    not_shown: list[tuple[str, str]]


def measure_retrieval(
    model: ModelFeatures,
    tiles: PairedSet,
    resampler: Resampler,
    cache: Path,
    *,
    k: Sequence[int] = TOP_K,
    index: IntArray | None = None,
    compat: Compat = None,
    device: str = "cpu",
    overwrite: bool = False,
) -> Retrieval:
    """Compare every pair of conditions.

    Args:
        model: Features of the set.
        tiles: A registered set.
        resampler: Draws over the places that take part.
        cache: Folder for finished pairs.
        k: How many nearest tiles count as found.
        index: Which places take part, as positions in `tiles.places`; all by default.
        compat: `plism` rounds as published.
        device: Where matrices are multiplied.
        overwrite: Compute again what is there.

    Returns:
        Measures and tables.

    Raises:
        ValueError: k is larger than the gallery.
        StoreError: Features are missing, zero or not finite.
    """
    pairs = _all_pairs(model, tiles, resampler, cache, tuple(k), index, device, overwrite)
    conditions = tiles.conditions
    summaries = summarise_pairs([pair.scores for pair in pairs], conditions, compat=compat)
    metrics = ["cosine", "separation", *(f"top{each}" for each in k)]
    measures, rows, not_shown = [], [], []
    stacked = np.stack([pair.draws for pair in pairs])
    n, values = pairs[0].scores.n, np.array([_means(pair.scores) for pair in pairs])
    members: dict[Group, npt.NDArray[np.bool_]] = {}
    for group in GROUPS:
        belongs = [in_group(conditions[pair.scores.first], conditions[pair.scores.second], group) for pair in pairs]
        members[group] = np.array(belongs)
        if not any(belongs):
            not_shown.append((f"{group} pairs", _why_no_pairs(group, tiles)))
            continue
        for column, metric in enumerate(metrics):
            each = k[column - 2] if column > 1 else None
            chosen, draws = values[members[group], column], stacked[members[group], :, column]
            for name, statistic in (("mean", np.mean), ("median", np.median)):
                label = f"{'topk' if column > 1 else metric}_{name}"
                value, drawn = float(statistic(chosen)), np.asarray(statistic(draws, axis=0), np.float64)
                measures.append(Measure(label, group, value, n, resampler.n_groups, drawn, each))
    for pair in pairs:
        rows += _pair_rows(pair, metrics, resampler.n_groups)
    try:
        number = leaderboard_number(summaries, k=10, compat=compat)
        drawn = _leaderboard_draws(stacked, members, metrics.index("top10"))
        measures.append(Measure("plism", "all", number, n, resampler.n_groups, drawn, 10))
    except ValueError as error:
        not_shown.append(("PLISM leaderboard number", str(error)))
    groups = pd.DataFrame([s._asdict() for s in summaries if s.n_pairs])
    return Retrieval(measures, pd.DataFrame(rows), groups, _distribution(pairs, members), not_shown)


def _all_pairs(
    model: ModelFeatures,
    tiles: PairedSet,
    resampler: Resampler,
    cache: Path,
    k: tuple[int, ...],
    index: IntArray | None,
    device: str,
    overwrite: bool,
) -> list[Pair]:
    settings = {
        "features": model.identity,
        "tiles": tiles.fingerprint,
        "k": list(k),
        "index": None if index is None else fingerprint(index.tolist()),
        "draws": fingerprint([resampler.times.sum(axis=0).tolist(), resampler.codes.tolist(), len(resampler.times)]),
    }
    folder = cache / fingerprint(settings)
    write_json(folder / "header.json", make_header("pairs/1", settings))
    names = list(tiles.conditions)
    wanted = list(itertools.combinations(names, 2))
    number = {name: position for position, name in enumerate(names)}
    files = {pair: folder / f"{number[pair[0]]:03d}---{number[pair[1]]:03d}.npz" for pair in wanted}
    kept = {} if overwrite else {pair: _read(path, pair, k) for pair, path in files.items() if path.is_file()}
    done = {pair: found for pair, found in kept.items() if found is not None}
    left = [pair for pair in wanted if pair not in done]
    if left:
        load = lambda name: torch.from_numpy(model.load(tiles.rows[name])).to(device)  # noqa: E731
        found = compare_conditions(names, load, k, pairs=left, index=index, tiles=True)
        with Bars() as bars:
            for scores in bars.track(found, f"Pairs of {model.name}", len(left)):
                pair = _kept(scores, resampler)
                _write(files[scores.first, scores.second], pair)
                done[scores.first, scores.second] = pair
    return [done[pair] for pair in wanted]


def _kept(scores: PairScores, resampler: Resampler) -> Pair:
    tile = scores.tiles
    if tile is None:
        raise RuntimeError("pairs are compared tile by tile")
    topk = (tile.first_to_second + tile.second_to_first) / 2
    values = torch.cat([tile.cosine[:, None], tile.separation[:, None], topk], dim=1).double().numpy()
    histogram = np.histogram(tile.cosine.numpy().clip(-1, 1), EDGES)[0]
    # As they are kept, so that a run that reads them gives the same numbers to the last digit.
    draws = resampler.means(values).astype(np.float32).astype(np.float64)
    return Pair(scores._replace(tiles=None), draws, histogram)


def _write(path: Path, pair: Pair) -> None:
    s = pair.scores
    with atomic_path(path) as part, open(part, "wb") as file:
        np.savez(
            file,
            means=np.array([s.cosine, s.separation, *s.topk]),
            forth=np.array(s.first_to_second),
            back=np.array(s.second_to_first),
            tied=s.tied,
            n=s.n,
            draws=pair.draws.astype(np.float32),
            histogram=pair.histogram,
        )


def _read(path: Path, names: tuple[str, str], k: tuple[int, ...]) -> Pair | None:
    """A finished pair; None of a damaged file, which only says what can be computed again."""
    try:
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as f:
            means = f["means"].tolist()
            forth, back = tuple(f["forth"].tolist()), tuple(f["back"].tolist())
            scores = PairScores(
                *names, int(f["n"]), means[0], means[1], k, tuple(means[2:]), forth, back, float(f["tied"]), None
            )
            return Pair(scores, f["draws"].astype(np.float64), f["histogram"])
    except BROKEN_ARRAY:
        return None


def _means(scores: PairScores) -> list[float]:
    return [scores.cosine, scores.separation, *scores.topk]


def _pair_rows(pair: Pair, metrics: list[str], n_groups: int) -> list[dict[str, object]]:
    s, rows = pair.scores, []
    for column, (metric, value) in enumerate(zip(metrics, _means(s), strict=True)):
        low, high = percentiles(pair.draws[:, column], n_groups)
        both = (s.first_to_second[column - 2], s.second_to_first[column - 2]) if column > 1 else (value, value)
        rows.append(
            {
                "first": s.first,
                "second": s.second,
                "metric": metric,
                "value": value,
                "low": low,
                "high": high,
                "first_to_second": both[0],
                "second_to_first": both[1],
                "tied": s.tied,
                "n": s.n,
            }
        )
    return rows


def _leaderboard_draws(stacked: Draws, members: dict[Group, npt.NDArray[np.bool_]], top10: int) -> Draws:
    """The leaderboard number under every draw: the mean of four medians over pairs."""
    parts = [np.median(stacked[:, :, 0], axis=0)]
    parts += [np.median(stacked[members[group], :, top10], axis=0) for group in GROUPS[1:]]
    mean: Draws = np.mean(parts, axis=0)
    return mean


def _distribution(pairs: list[Pair], members: dict[Group, npt.NDArray[np.bool_]]) -> pd.DataFrame:
    frames = []
    for group, belongs in members.items():
        if not belongs.any():
            continue
        counts = np.sum([pair.histogram for pair, member in zip(pairs, belongs, strict=True) if member], axis=0)
        cumulative = np.cumsum(counts) / counts.sum()
        tail = EDGES[1:][np.searchsorted(cumulative, TAIL)]
        frame = pd.DataFrame({"group": group, "low": EDGES[:-1], "high": EDGES[1:], "count": counts, "tail": tail})
        frames.append(frame[frame["count"] > 0])
    return pd.concat(frames, ignore_index=True)


def _why_no_pairs(group: Group, tiles: PairedSet) -> str:
    stains = {condition.stain for condition in tiles.conditions.values()}
    scanners = {condition.scanner for condition in tiles.conditions.values()}
    if group == "cross-scanner":
        return f"no staining was scanned twice ({len(scanners)} scanners, {len(stains)} stainings)"
    if group == "cross-staining":
        return f"no scanner saw two stainings ({len(stains)} stainings, {len(scanners)} scanners)"
    return f"no two conditions differ in both ({len(stains)} stainings, {len(scanners)} scanners)"
