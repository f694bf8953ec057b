"""Aggregation over pairs against pandas, as the published benchmark does it, and hand-made numbers."""

import itertools

import numpy as np
import pandas as pd
import pytest

from pathokd.metrics.aggregate import (
    GROUPS,
    Condition,
    in_group,
    leaderboard_number,
    plism_condition,
    summarise_pairs,
)
from pathokd.metrics.paired import PairScores


def scores(names: list[str], seed: int = 0) -> list[PairScores]:
    rng = np.random.default_rng(seed)
    made = []
    for first, second in itertools.combinations(names, 2):
        top = tuple(sorted(rng.random(2)))
        made.append(PairScores(first, second, 460, rng.random(), rng.random(), (1, 10), top, top, top, 0.0, None))
    return made


def plism_names(stains: int, scanners: int) -> list[str]:
    return [f"ST{i}_SC{j}_to_GMH_S60.tif" for i in range(stains) for j in range(scanners)]


def published(frame: pd.DataFrame) -> pd.DataFrame:
    """Mean, sd (ddof 0), median and IQR per column, rounded by pandas."""
    rows = {
        "mean": frame.mean(),
        "sd": frame.std(ddof=0),
        "median": frame.median(),
        "iqr": frame.quantile(0.75) - frame.quantile(0.25),
    }
    return pd.DataFrame(rows).T.round(3)


def test_groups_have_the_sizes_of_the_published_benchmark() -> None:
    """13 stainings by 7 scanners: 4,095 pairs, 273, 546 and 3,276 (method.md C.1)."""
    conditions = [plism_condition(name) for name in plism_names(13, 7)]
    sizes = [sum(in_group(a, b, group) for a, b in itertools.combinations(conditions, 2)) for group in GROUPS]
    assert sizes == [4095, 273, 546, 3276]


def test_compat_equals_the_published_aggregation() -> None:
    names = plism_names(4, 3)
    conditions = {name: plism_condition(name) for name in names}
    made = scores(names)
    frame = pd.DataFrame(
        {"cosine": [s.cosine for s in made], "top1": [s.topk[0] for s in made], "top10": [s.topk[1] for s in made]}
    )
    got = summarise_pairs(made, conditions, compat="plism")
    medians = []
    for group in GROUPS:
        member = [in_group(conditions[s.first], conditions[s.second], group) for s in made]
        want = published(frame[member])
        for summary in got:
            if summary.group == group and summary.metric in want:
                assert summary[2:6] == pytest.approx(tuple(want[summary.metric]), abs=1e-9)
                assert (summary.n_pairs, summary.n_tiles) == (sum(member), 460)
        medians.append(want["cosine" if group == "all" else "top10"]["median"])
    assert leaderboard_number(got, compat="plism") == pytest.approx(round(np.mean(medians), 3), abs=1e-9)
    exact = summarise_pairs(made, conditions)
    assert leaderboard_number(exact) == pytest.approx(leaderboard_number(got, compat="plism"), abs=1e-3)
    assert leaderboard_number(exact) != leaderboard_number(got, compat="plism")


def test_names_of_plism_slides() -> None:
    assert plism_condition("GMH_S60_to_GMH_S60.tif") == Condition("GMH", "S60")
    with pytest.raises(ValueError, match="STAIN_SCANNER"):
        plism_condition("slide7.tif")


def test_one_scanner_only_leaves_groups_empty_and_no_leaderboard_number() -> None:
    conditions = {"a": Condition("HE", "S60"), "b": Condition("MY", "S60"), "c": Condition("GV", "S60")}
    got = {(s.group, s.metric): s for s in summarise_pairs(scores(list(conditions)), conditions)}
    assert got["cross-scanner", "top10"].n_pairs == 0
    assert np.isnan(got["cross-scanner", "top10"].median)
    assert got["cross-staining", "top10"].n_pairs == 3
    with pytest.raises(ValueError, match=r"missing: top10 \(cross-scanner\), top10 \(both\)"):
        leaderboard_number(got.values())
    with pytest.raises(ValueError, match=r"missing: top7"):
        leaderboard_number(got.values(), k=7)


def test_errors_say_what_to_do() -> None:
    with pytest.raises(ValueError, match="be there at all"):
        summarise_pairs([], {})
    made = scores(["a", "b", "c"])
    with pytest.raises(ValueError, match=r"one n and the same k.*\(460, \(1, 10\)\), \(461, \(1, 10\)\)"):
        summarise_pairs([made[0], made[1]._replace(n=461)], {})
    with pytest.raises(ValueError, match=r"lack a staining and a scanner: \['b', 'c'\]"):
        summarise_pairs(made, {"a": Condition("HE", "S60")})
