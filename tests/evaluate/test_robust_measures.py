"""Robustness measures on made-up features whose answers are known, and draws against plain loops."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats

from pathokd.evaluate import robust_neighbours, robust_views
from pathokd.evaluate.paired_features import ModelFeatures
from pathokd.evaluate.paired_set import PairedSet, prepare
from pathokd.evaluate.resampling import Measure, Resampler
from pathokd.evaluate.robust_neighbours import Settings, crossed, margin_draws, measure_neighbours
from pathokd.evaluate.robust_probes import measure_probes, thin
from pathokd.evaluate.robust_retrieval import measure_retrieval
from pathokd.evaluate.robust_views import measure_views
from pathokd.metrics.confounding import ConfoundedAccuracy, average_performance_drop
from pathokd.metrics.neighbours import typed_neighbours
from pathokd.metrics.robustness import robustness_index, summarise_margins

PLACES = 48


def made(dim: int = 8) -> tuple[PairedSet, np.ndarray, np.ndarray]:
    """Two stainings, two scanners, two classes, eight cases: the set, features of its places, who is under B."""
    rng = np.random.default_rng(0)
    rows = [
        {"pair_id": f"p{p}", "stain": stain, "scanner": scanner, "label": "ab"[p % 2], "case": f"c{p // 2 % 8}"}
        for stain in ("HE", "violet")
        for scanner in ("A", "B")
        for p in range(PLACES)
    ]
    frame = pd.DataFrame(rows).sample(frac=1.0, random_state=0, ignore_index=True)
    tiles = prepare(frame, "made up")
    place = rng.standard_normal((PLACES, dim))
    place[::2] += 2.0
    number = tiles.frame["pair_id"].str[1:].astype(int).to_numpy()
    return tiles, place[number], (tiles.frame["scanner"] == "B").to_numpy()


def model(x: np.ndarray) -> ModelFeatures:
    return ModelFeatures("m", str(x.sum()), x.astype(np.float32).__getitem__)


def value(measures: list[Measure], name: str, group: str, k: int | None = None) -> Measure:
    (found,) = [m for m in measures if (m.name, m.group) == (name, group) and k in (None, m.k)]
    return found


def test_draws_equal_a_plain_loop() -> None:
    rng = np.random.default_rng(0)
    groups, x = rng.integers(0, 7, 40), rng.standard_normal((40, 2))
    resampler = Resampler(groups, seed=3, resamples=50)
    for draw, sums, means in zip(resampler.times, resampler.sums(x), resampler.means(x), strict=True):
        rows = np.concatenate([np.repeat(np.flatnonzero(groups == g), int(t)) for g, t in enumerate(draw)])
        assert sums == pytest.approx(x[rows].sum(axis=0), abs=1e-9)
        assert means == pytest.approx(x[rows].mean(axis=0), abs=1e-9)


def test_every_place_found_again_and_none(tmp_path: Path) -> None:
    tiles, place, _ = made()
    units = tiles.column("case", tiles.rows["HE_A"])
    found = measure_retrieval(model(place), tiles, Resampler(units), tmp_path)
    for group in ("cross-scanner", "cross-staining", "both"):
        top = value(found.measures, "topk_mean", group, 1)
        assert (top.value, top.interval, top.n, top.n_groups) == (1.0, (1.0, 1.0), PLACES, 8)
    assert value(found.measures, "plism", "all").value == pytest.approx(1.0)
    shuffled = np.random.default_rng(1).standard_normal(place.shape)
    found = measure_retrieval(model(shuffled), tiles, Resampler(units), tmp_path)
    top = value(found.measures, "topk_mean", "cross-scanner", 10)
    # Four standard deviations of 4 x 48 independent queries.
    assert top.value == pytest.approx(10 / (2 * PLACES - 1), abs=4 * 0.022)
    assert found.distribution.groupby("group")["count"].sum()["all"] == 6 * PLACES


def test_kept_pairs_are_read_back_and_one_missing_is_made_again(tmp_path: Path) -> None:
    tiles, place, _ = made()
    resampler = Resampler(tiles.column("case", tiles.rows["HE_A"]))
    noisy = model(place + np.random.default_rng(2).standard_normal(place.shape))
    first = measure_retrieval(noisy, tiles, resampler, tmp_path)
    kept = sorted(tmp_path.rglob("*.npz"))
    assert len(kept) == 6
    times = {path: path.stat().st_mtime_ns for path in kept[1:]}
    kept[0].unlink()
    again = measure_retrieval(noisy, tiles, resampler, tmp_path)
    assert {path: path.stat().st_mtime_ns for path in kept[1:]} == times
    pd.testing.assert_frame_equal(first.pairs, again.pairs, rtol=1e-5, atol=1e-6)


def test_a_second_run_gives_the_same_intervals_to_the_last_digit(tmp_path: Path) -> None:
    """Kept draws are single precision, and the first run gave its own in double."""
    tiles, x, _ = made()
    resampler = Resampler(tiles.column("case", tiles.rows["HE_A"]))
    x = x + np.random.default_rng(2).standard_normal(x.shape)
    first, second = (measure_retrieval(model(x), tiles, resampler, tmp_path) for _ in range(2))
    pd.testing.assert_frame_equal(first.pairs, second.pairs, check_exact=True)
    for one, other in zip(first.measures, second.measures, strict=True):
        assert np.array_equal(one.interval, other.interval)


def test_chance_of_the_robustness_index_is_that_of_the_labels() -> None:
    """With six classes under two scanners a model that knows nothing has an index near 1/6, not 1/2."""
    rng = np.random.default_rng(0)
    rows = [
        {"pair_id": f"p{p}", "stain": "HE", "scanner": scanner, "label": "abcdef"[p % 6], "case": f"c{p // 6 % 8}"}
        for scanner in ("A", "B")
        for p in range(96)
    ]
    tiles = prepare(pd.DataFrame(rows), "made up")
    found = measure_neighbours(model(rng.standard_normal((192, 8))), tiles, Settings(k=5, trials=1, repetitions=2))
    chance = value(found.measures, "chance", "robustness_index scanner").value
    # 2 tiles of each class and 12 of each scanner in a case: 14 SO and 70 OS among those of the 7 other cases.
    assert chance == pytest.approx(14 / (14 + 70))
    assert value(found.measures, "robustness_index", "scanner", 101).value == pytest.approx(chance, abs=0.03)


def test_the_clustering_score_has_no_interval() -> None:
    """It had one of resampled quads, which share their tiles: called 30 groups, where there were six cases."""
    tiles, x, _ = made()
    found = measure_neighbours(model(x), tiles, Settings(k=5, trials=2, repetitions=2))
    score = value(found.measures, "clustering_score", "scanner")
    assert score.n_groups == 8
    assert np.isnan(score.interval).all()
    assert "interval of the clustering score against scanner" in dict(found.not_shown)


def test_robustness_index_pools_stainings() -> None:
    tiles, place, other = made()
    x = place + 1.5 * other[:, None] + 0.3 * np.random.default_rng(3).standard_normal(place.shape)
    found = measure_neighbours(model(x), tiles, Settings(k=5))
    SO = OS = 0.0
    for stain in ("HE", "violet"):
        rows = np.flatnonzero(tiles.frame["stain"] == stain)
        columns = [tiles.column(name, rows) for name in ("label", "scanner", "case")]
        near = typed_neighbours(torch.from_numpy(x[rows].astype(np.float32)), *columns, k=5)
        share = near.share.sum(dim=(0, 1))
        SO, OS = SO + float(share[1]), OS + float(share[2])
        assert robustness_index(near, [5])[0].n == 2 * PLACES
    got = value(found.measures, "robustness_index", "scanner", 5)
    assert got.value == pytest.approx(SO / (SO + OS))
    assert got.interval[0] <= got.value <= got.interval[1]
    assert (got.n, got.n_groups) == (4 * PLACES, 8)
    shares = found.ranks[found.ranks["confounder"] == "scanner"].groupby("rank")["share"].sum()
    assert shares.to_numpy() == pytest.approx(1.0)


def test_mari_has_one_scale_for_all_stainings() -> None:
    """Weights of each staining were to a factor of their own, exp of its smallest distance, and added up all the same.

    So two tiles that look alike took weight from all others of their staining.
    """
    tiles, place, other = made()
    x = place + 1.5 * other[:, None] + 0.3 * np.random.default_rng(3).standard_normal(place.shape)
    violet = (tiles.frame["stain"] == "violet").to_numpy()
    x[violet] += 1.5 * other[violet, None]
    first, second = np.flatnonzero(violet & (tiles.frame["case"].isin(["c0", "c1"]).to_numpy()))[[0, -1]]
    x[second] = x[first]
    x = x.astype(np.float32)
    d, so, os = [], [], []
    for stain in ("HE", "violet"):
        rows = np.flatnonzero(tiles.frame["stain"] == stain)
        columns = [tiles.column(name, rows) for name in ("label", "scanner", "case")]
        near = typed_neighbours(torch.from_numpy(x[rows]), *columns, k=5)
        d += near.distance.flatten().tolist()
        so += near.share[..., 1].flatten().tolist()
        os += near.share[..., 2].flatten().tolist()
    distance, SO, OS = np.array(d), np.array(so), np.array(os)
    weight = np.exp(-distance / np.median(distance[SO + OS > 0]))
    few = Settings(k=5, clusters=(2,), trials=1, splits=2, repetitions=2, strengths=(1.0,))
    got = value(measure_neighbours(model(x), tiles, few).measures, "mari", "scanner")
    assert got.value == pytest.approx(weight @ SO / (weight @ (SO + OS)), abs=1e-4)


def test_margins_under_the_draw_that_takes_each_once() -> None:
    margin = np.random.default_rng(0).standard_normal(101)
    margin[4] = np.nan
    summary = summarise_margins(torch.from_numpy(margin), 5)
    median, ltm10, f0 = margin_draws(margin, np.ones((1, 101), np.float32))
    ordered = np.sort(margin[np.isfinite(margin)])
    assert median[0] == pytest.approx(summary.median, abs=float(ordered[50] - ordered[49]))
    assert ltm10[0] == pytest.approx(ordered[:10].mean())
    assert f0[0] == pytest.approx(summary.f0)


def test_a_draw_without_a_margin_has_none() -> None:
    """It was given the lowest margin of all, which pulled the interval down."""
    margin = np.array([np.nan, np.nan, -0.9, 0.1, 0.2])
    weights = np.array([[1, 1, 0, 0, 0], [0, 0, 1, 1, 1]], np.float32)
    for drawn, wanted in zip(margin_draws(margin, weights), (0.1, -0.9, 1 / 3), strict=True):
        assert np.isnan(drawn[0])
        assert drawn[1] == pytest.approx(wanted)


@pytest.mark.filterwarnings("error")
def test_a_probe_of_a_staining_with_few_cases() -> None:
    """Draws that hold none of its cases gave a warning of numpy's, and no mean over stainings."""
    tiles, x, _ = made()
    keep = (tiles.frame["stain"] == "HE") | tiles.frame["case"].isin(["c0", "c1"])
    some = prepare(tiles.frame[keep].drop(columns=["condition", "key"]), "fewer")
    found = measure_probes(model(x[keep.to_numpy()]), some).measures
    for name in ("probe_accuracy", "probe_ece"):
        draws = value(found, name, "other scanner").draws
        assert draws is not None
        assert np.isfinite(draws).all()


def test_the_performance_drop_is_over_all_stainings() -> None:
    """It was that of the first staining by name, HE: confounding under violet alone went unseen."""
    tiles, x, on_b = made(2)
    a_class, violet = (tiles.frame["label"] == "a").to_numpy(), (tiles.frame["stain"] == "violet").to_numpy()
    x = np.random.default_rng(1).standard_normal(x.shape) * 0.5
    x[:, 0] += np.where(a_class, 1.0, -1.0)
    bound = x.copy()
    bound[violet, 1] += np.where(on_b, 30.0, -30.0)[violet]
    apart = prepare(tiles.frame.drop(columns=["case", "condition", "key"]), "no cases")

    def drop(tiles: PairedSet, x: np.ndarray) -> Measure:
        return value(
            measure_neighbours(model(x), tiles, Settings(k=3, trials=1, repetitions=4)).measures, "apd", "scanner"
        )

    def of(stain: str) -> Measure:
        rows = (apart.frame["stain"] == stain).to_numpy()
        return drop(prepare(apart.frame[rows].drop(columns=["condition", "key"]), stain), bound[rows])

    both = drop(apart, bound)
    assert of("violet").value < of("HE").value
    assert both.value == pytest.approx((of("violet").value + of("HE").value) / 2)
    assert both.n == of("violet").n + of("HE").n
    assert both.n_groups == 8


def apart_under_confounding(
    tiles: PairedSet, confounder: str, monkeypatch: pytest.MonkeyPatch
) -> tuple[set[str], list[int]]:
    """Which groups the training sets of APD keep apart, and under how many centres each is."""
    seen: list[tuple[np.ndarray, ...]] = []
    monkeypatch.setattr(robust_neighbours, "confounded_accuracy", lambda *labels, **_: seen.append(labels))
    rows = np.arange(len(tiles))
    robust_neighbours._confounded(np.arange(2.0 * len(rows)).reshape(-1, 2), rows, tiles, confounder, Settings())
    ((_, _, values, groups),) = seen
    return set(groups), [len(set(values[groups == g])) for g in set(groups)]


def test_training_and_test_under_confounding_share_no_case(monkeypatch: pytest.MonkeyPatch) -> None:
    """With fewer cases than intervals need, places were dealt, and a case was both trained on and tested."""
    rows = [{"label": label, "case": f"c{c}", "scanner": s} for c in range(7) for label in "ab" for s in "AB"]
    cases = {f"c{c}" for c in range(7)}
    frame = pd.DataFrame(rows * 2)
    unpaired = prepare(frame.assign(site="X"), "unpaired")
    groups, centres = apart_under_confounding(unpaired, "scanner", monkeypatch)
    assert groups == cases
    assert centres == [1] * 7
    place = [f"p{n // 4}{n % 4 // 2}" for n in range(len(rows))] * 2
    paired = prepare(frame.assign(pair_id=place, stain=["HE"] * 28 + ["violet"] * 28), "paired")
    groups, centres = apart_under_confounding(paired, "scanner", monkeypatch)
    assert groups == cases
    assert centres == [1] * 7


def test_cases_of_one_site_all_take_part_under_confounding(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each was given a site by lot, and left out where that was not its own."""
    rows = [
        {"pair_id": f"p{c}{label}", "label": label, "case": f"c{c}", "scanner": s, "site": f"s{c % 2}"}
        for c in range(12)
        for label in "ab"
        for s in "AB"
    ]
    groups, centres = apart_under_confounding(prepare(pd.DataFrame(rows), "sites"), "site", monkeypatch)
    assert groups == {f"c{c}" for c in range(12)}
    assert centres == [1] * 12


def test_the_interval_of_the_performance_drop_is_as_wide_as_students(monkeypatch: pytest.MonkeyPatch) -> None:
    """Percentiles of draws from five repetitions covered the truth in 85 % of cases, not in 95 %."""
    tiles, x, _ = made()
    curves: list[pd.DataFrame] = []
    settings, part = Settings(repetitions=5), (torch.from_numpy(x), np.arange(len(tiles)))
    for seed in range(3):
        accuracies = np.random.default_rng(seed).uniform(0.7, 0.9, (settings.splits, 5))
        one = ConfoundedAccuracy(np.linspace(0, 1, settings.splits), accuracies, None, 9, 9, 0)
        monkeypatch.setattr(robust_neighbours, "_confounded", lambda *_, one=one: one)
        (got,) = robust_neighbours._confounding([part[0]], [part[1]], tiles, "scanner", settings, curves)
        low, high = average_performance_drop(accuracies).ci
        assert got.interval[1] - got.interval[0] == pytest.approx(high - low)
        curve = curves[-1].iloc[2]
        want = stats.t.interval(0.95, 4, loc=accuracies[2].mean(), scale=stats.sem(accuracies[2]))
        assert (curve["low"], curve["high"]) == pytest.approx(want)


@pytest.mark.filterwarnings("error")
def test_one_repetition_has_no_interval_and_warns_of_nothing() -> None:
    tiles, x, _ = made()
    curves: list[pd.DataFrame] = []
    one = Settings(repetitions=1, splits=3, strengths=(1.0,))
    part = (torch.from_numpy(x.astype(np.float32)), np.arange(len(tiles)))
    (got,) = robust_neighbours._confounding([part[0]], [part[1]], tiles, "scanner", one, curves)
    assert np.isfinite(got.value)
    assert np.isnan(got.interval).all()
    assert curves[0]["accuracy"].notna().all()
    assert curves[0][["low", "high"]].isna().all(axis=None)


def test_scanner_is_told_where_it_shows_and_not_where_it_does_not() -> None:
    tiles, place, other = made()
    shown = place.copy()
    shown[:, 0] += np.where(other, 3.0, -3.0) * 3
    hidden = place + 0.1 * np.random.default_rng(4).standard_normal(place.shape)
    bound, free = measure_probes(model(shown), tiles), measure_probes(model(hidden), tiles)
    assert value(bound.measures, "scanner_predictability", "scanner").value > 0.95
    low, high = value(free.measures, "scanner_predictability", "scanner").interval
    assert low < 0.6
    assert high > 0.4
    assert value(free.measures, "chance", "scanner_predictability").value == 0.5


def test_the_scanner_is_not_told_by_cases_it_never_saw() -> None:
    """Cases under two of three scanners each: the features know the case only, and told the scanner to 0.48."""
    rows = [
        {"pair_id": f"c{case}-{p}", "case": f"c{case}", "scanner": scanner}
        for case in range(15)
        for scanner in ("ABC" if case > 11 else "ABC".replace("ABC"[case % 3], ""))
        for p in range(12)
    ]
    tiles = prepare(pd.DataFrame(rows), "incomplete")
    number = tiles.frame["case"].str[1:].astype(int).to_numpy()
    told = []
    for seed in range(6):
        rng = np.random.default_rng(seed)
        x = rng.standard_normal((15, 24))[number] + 0.3 * rng.standard_normal((len(tiles), 24))
        told.append(value(measure_probes(model(x), tiles).measures, "scanner_predictability", "scanner"))
    assert {one.n for one in told} == {3 * 3 * 12}  # of the places that all three saw
    assert np.mean([one.value for one in told]) < 0.4  # chance is a third


def test_a_probe_drops_where_the_scanner_looks_like_the_other_class() -> None:
    tiles, place, other = made()
    x = place.copy()
    x[other] -= np.where((tiles.frame["label"] == "a").to_numpy()[other], 2.0, -2.0)[:, None]  # scanner B swaps classes
    found = measure_probes(model(x), tiles)
    drop = value(found.measures, "probe_drop", "scanner")
    home, away = (value(found.measures, "probe_accuracy", f"{w} scanner").value for w in ("same", "other"))
    assert drop.value == pytest.approx(home - away)
    assert drop.interval[0] > 0.5
    assert (
        value(found.measures, "probe_ece", "other scanner").value
        > value(found.measures, "probe_ece", "same scanner").value
    )
    assert len(found.transfer) == 4
    steady = measure_probes(model(place), tiles)
    assert value(steady.measures, "probe_drop", "scanner").value == pytest.approx(0.0, abs=0.02)


def test_classes_of_one_scanner_are_left_out_until_the_rest_crosses() -> None:
    frame = pd.DataFrame({"label": list("aabbccd"), "site": list("XYXYXXZ")})
    tiles = prepare(frame, "made up")
    assert crossed(tiles, np.arange(7), "site").tolist() == [0, 1, 2, 3]
    assert crossed(tiles, np.arange(4, 7), "site").tolist() == []


def test_what_cannot_be_measured_says_why() -> None:
    tiles, place, _ = made()
    bare = prepare(tiles.frame.drop(columns=["label"]), "made up")
    reasons = dict(measure_neighbours(model(place), bare).not_shown)
    assert "no column label" in reasons["clustering score"]
    assert (
        "no column label"
        in dict(measure_probes(model(place), bare).not_shown)["tissue probe across scanners, calibration"]
    )
    assert "stored features only" in dict(measure_views(model(place), tiles).not_shown)["severity curves"]
    large = dict(measure_neighbours(model(place), tiles, Settings(k=500)).not_shown)
    assert "k = 500 is larger than the gallery" in large["robustness index, MaRI against scanner"]


def test_thinning_keeps_places_whole() -> None:
    tiles, _, _ = made()
    rows = thin(tiles, np.arange(len(tiles)), 40, seed=0)
    assert len(rows) == 40
    assert set(tiles.frame["pair_id"].iloc[rows].value_counts()) == {4}


def test_a_site_of_one_case_is_no_robustness() -> None:
    """A probe that never saw a site cannot tell it, which looked like a model that does not know the site."""
    site = np.repeat(["A", "B", "C"], [60, 60, 20])
    case = [f"{s}{i % 6 if s != 'C' else 0}" for i, s in enumerate(site)]
    tiles = prepare(pd.DataFrame({"site": site, "case": case, "label": "t"}), "made up")
    x = np.eye(3)[np.repeat([0, 1, 2], [60, 60, 20])] * 10
    found = measure_probes(model(x), tiles)
    assert "site_predictability" not in {m.name for m in found.measures}
    assert ("site predictability", "too few cases to hold some out of site C") in found.not_shown
    two = prepare(tiles.frame[tiles.frame["site"] != "C"], "made up")
    assert value(measure_probes(model(x[:120]), two).measures, "site_predictability", "site").value == 1.0


def test_an_empty_cell_is_no_site() -> None:
    """Registered tiles of unknown site were a site of their own, to be told apart and to be robust against."""
    tiles, x, _ = made()
    site = (tiles.frame["case"].str[1:].astype(int) % 2).map({0: "X", 1: ""})
    some = prepare(tiles.frame.drop(columns=["condition", "key"]).assign(site=site), "sites")
    assert (some.varies("site"), some.varies("scanner"), some.varies("no such column")) == (False, True, False)
    few = Settings(k=5, clusters=(2,), trials=1, splits=2, repetitions=2, strengths=(1.0,))
    found = [*measure_neighbours(model(x), some, few).measures, *measure_probes(model(x), some).measures]
    assert not [m for m in found if "site" in (*m.name.split("_"), *m.group.split())]
    third = prepare(some.frame.assign(site=site.mask(tiles.frame["case"].isin(["c1", "c5"]), "Y")), "three")
    rows = third.known("site")
    assert set(third.column("case", rows)) == {"c0", "c1", "c2", "c4", "c5", "c6"}
    (told,) = [m for m in measure_probes(model(x), third).measures if m.name == "site_predictability"]
    assert told.n == len(rows)


def test_the_site_is_not_told_by_cases_already_seen() -> None:
    """Of registered tiles places were held out, and other places of the same case gave its site away: 100 %."""
    rows = [
        {"pair_id": f"p{p}", "stain": "HE", "scanner": scanner, "case": f"c{p // 6}", "site": f"s{p // 6 % 2}"}
        for scanner in "AB"
        for p in range(96)
    ]
    tiles = prepare(pd.DataFrame(rows), "sites")
    case = np.unique(tiles.frame["case"], return_inverse=True)[1]
    told = []
    for seed in range(4):
        rng = np.random.default_rng(seed)
        x = 2 * rng.standard_normal((16, 24))[case] + 0.3 * rng.standard_normal((len(tiles), 24))
        told.append(value(measure_probes(model(x), tiles).measures, "site_predictability", "site").value)
    assert np.mean(told) < 0.7  # nothing of the site shows


def test_severity_leaves_out_a_class_that_no_probe_would_know(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cases are dealt to five parts: 0 and 5 share one, so a class of these two is never trained on when tested."""
    case = np.repeat(np.arange(10), 6)
    label = np.where(np.arange(60) % 2, "t", "s").astype("<U5")
    label[np.isin(case, [0, 5]) & (np.arange(60) % 3 == 0)] = "rare"
    frame = pd.DataFrame({"scanner": "S", "site": "A", "case": case.astype(str), "label": label})
    tiles = prepare(frame, "made up", lambda row: np.zeros((4, 4, 3), np.uint8))
    seen = {}

    def curves(*args: Any, **settings: Any) -> pd.DataFrame:
        seen["labels"], seen["parts"] = args[2], args[3]
        return pd.DataFrame()

    monkeypatch.setattr(robust_views, "severity_curves", curves)
    assert tiles.read is not None
    robust_views._severity(None, tiles.read, tiles, tiles.labelled(), 0)  # type: ignore[arg-type]
    assert set(seen["labels"]) == {"s", "t"}
    assert all(len(set(seen["parts"][seen["labels"] == c])) == 5 for c in "st")
