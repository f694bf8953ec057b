"""The robustness page: whole, self-contained, honest in words, and drawn from whatever tables there are."""

import itertools
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg

from pathokd.evaluate.paired_features import ModelFeatures
from pathokd.evaluate.paired_set import prepare
from pathokd.evaluate.robustness import Robustness, RobustnessSpec, measure_robustness
from pathokd.metrics.aggregate import Condition
from pathokd.report import plots_models, plots_pairs, plots_probes, plots_space
from pathokd.report.robust_page import figures, write_page
from pathokd.report.robust_words import EXPLAINED, KEYS, headlines, key_rows, verdict
from pathokd.report.robustness import read_robustness, write_robustness
from pathokd.report.style import colours, markers, styled

PLACES = 24


def measured(
    folder: Path, noise: dict[str, float], *, flat: bool = False, sites: bool = False, labels: bool = True
) -> Robustness:
    rng = np.random.default_rng(0)
    rows = [
        {"pair_id": f"p{p}", "stain": "HE", "scanner": s, "label": "ab"[p % 2], "case": f"c{p // 2 % 4}"}
        for s in ("A", "B")
        for p in range(PLACES)
    ]
    frame = pd.DataFrame(rows)
    if not labels:
        frame = frame.drop(columns="label")
    if sites:
        frame = frame.drop(columns="pair_id").rename(columns={"scanner": "site", "case": "slide_id"})
    tile = np.full((8, 8, 3), 128, np.uint8)
    tiles = prepare(frame, "made up", lambda row: tile)
    place = np.tile(rng.standard_normal((PLACES, 6)), (2, 1))
    models = []
    for name, size in noise.items():
        x = np.ones_like(place) if flat else place + size * rng.standard_normal(place.shape)
        models.append(ModelFeatures(name, name, x.astype(np.float32).__getitem__))
    spec = RobustnessSpec(k=(1, 10), neighbour_k=2, turn_tiles=0)
    return measure_robustness(models, tiles, folder, spec)


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Robustness:
    return measured(tmp_path_factory.mktemp("two"), {"bad": 4.0, "good <b>": 0.05})


def test_figures_of_an_earlier_page_go_and_others_stay(two: Robustness, tmp_path: Path) -> None:
    for name in ("severity.svg", "severity.png", "mine.png"):
        (tmp_path / "figures").mkdir(exist_ok=True)
        (tmp_path / "figures" / name).touch()
    names = write_page(two, tmp_path)
    assert {path.name for path in (tmp_path / "figures").iterdir()} == {
        *(f"{name}{suffix}" for name in names for suffix in (".svg", ".png")), "mine.png"
    }  # fmt: skip


def test_names_like_numbers_stay_names(tmp_path: Path) -> None:
    """Models called 1 and NA came back as 1.0 and nan, and were found in no table."""
    result = measured(tmp_path, {"1": 0.5, "NA": 0.05})
    write_robustness(result, tmp_path)
    again = read_robustness(tmp_path, result.tiles)
    assert again.models["name"].tolist() == ["1", "NA"]
    for name, table in result.tables.items():
        if len(table):
            pd.testing.assert_frame_equal(again.tables[name], table.reset_index(drop=True), check_dtype=False)
    assert write_page(again, tmp_path)


def test_the_page_is_whole_and_needs_nothing_else(two: Robustness, tmp_path: Path) -> None:
    names = write_page(two, tmp_path)
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert {"differences", "topk", "heatmap_topk", "heatmap_cosine", "distribution", "strips", "projection"} <= set(
        names
    )
    assert {"robustness_index", "ranks_scanner", "predictability", "transfer_scanner", "accuracy_robustness"} <= set(
        names
    )
    for name in names:
        assert f'id="{name}"' in page
        assert (tmp_path / f"figures/{name}.png").read_bytes()[:4] == b"\x89PNG"
        assert (tmp_path / f"figures/{name}.svg").read_text(encoding="utf-8").startswith("<svg")
    links = re.findall(r'(?:src|href|url)\s*[=(]\s*["\']?((?:https?:)?//[^"\')\s>]+)', page)
    assert links == []  # an SVG names its namespace, which nobody fetches
    assert "<script" not in page
    assert "good &lt;b&gt;" in page
    assert "good <b>" not in page
    assert "var(--ink)" in page
    assert "nan" not in re.sub(r"<svg.*?</svg>|<code>.*?</code>", "", page, flags=re.DOTALL)


def test_a_number_without_an_interval_says_so(two: Robustness, tmp_path: Path) -> None:
    write_page(two, tmp_path)
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    keys = page[page.index("clustering score, scanner") :]
    assert "no interval" in keys[: keys.index("</tr>")]


def test_measures_without_a_figure_are_explained(two: Robustness, tmp_path: Path) -> None:
    """CRoMa and the clustering score have none, and the table named them without a word of what they are."""
    write_page(two, tmp_path)
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    explained = page[page.index('id="explained"') :]
    explained = explained[: explained.index("</details>")]
    for word in ("Separation: ", "CRoMa: how much nearer", "Clustering score: ", "Robustness index: "):
        assert word in explained
    assert "PLISM number" not in explained  # which one staining has none of
    assert {*EXPLAINED} <= {key.name for key in KEYS}


def test_the_robustness_index_stands_beside_its_chance(two: Robustness) -> None:
    """The dotted line lay at 1/2 whatever the labels, which with more classes is far above what chance gives."""
    measures = two.tables["measures"].copy()
    about = (measures["name"] == "chance") & (measures["group"] == "robustness_index scanner")
    assert about.sum() == 2
    measures.loc[about, "value"] = 0.125
    ax = plots_space.index_by_k(measures, ["bad", "good <b>"]).axes[0]
    (line,) = [line for line in ax.lines if line.get_label() == "chance"]
    assert set(np.asarray(line.get_ydata(), float)) == {0.125}


def test_what_is_not_shown_says_why(two: Robustness, tmp_path: Path) -> None:
    write_page(two, tmp_path)
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    shown = page[page.index('id="not-shown"') :]
    assert "no scanner saw two stainings" in shown
    assert "stored features only" in shown
    assert "PLISM leaderboard number" in shown


def test_words_agree_with_numbers(two: Robustness) -> None:
    (sentence,) = headlines(two)
    assert sentence.startswith("good <b> is more robust than bad: top-10 across scanners +")
    measures = two.tables["measures"]
    rows = measures[(measures["name"] == "topk_mean") & (measures["group"] == "cross-scanner") & (measures["k"] == 10)]
    good, bad = (float(rows[rows["model"] == name]["value"].iloc[0]) for name in ("good <b>", "bad"))
    assert f"+{100 * (good - bad):.1f} points" in sentence
    assert f"{100 * bad:.0f}\u00a0%" in verdict(two)[0]
    first = key_rows(two)[0]
    assert first["words"] == "top-10 across scanners"
    cells = first["cells"]
    assert isinstance(cells, list)
    assert [cell["best"] for cell in cells] == [False, True]
    assert [cell["sure"] for cell in cells] == [0, 1]


def test_the_other_way_round_and_no_difference(tmp_path: Path) -> None:
    assert (
        "is less robust than good" in headlines(measured(tmp_path / "a", {"good": 0.05, "bad": 4.0}, labels=False))[0]
    )
    same = headlines(measured(tmp_path / "b", {"one": 1.0, "two": 1.0}, labels=False))[0]
    assert "not clearly more or less robust" in same


def test_cosine_alone_makes_nobody_better(two: Robustness) -> None:
    row = next(row for row in key_rows(two) if row["words"] == "cosine across scanners")
    assert row["better"] == ""
    cells = row["cells"]
    assert isinstance(cells, list)
    assert not any(cell["best"] or cell["sure"] for cell in cells)


def test_a_collapsed_model_is_called_so(tmp_path: Path) -> None:
    result = measured(tmp_path, {"flat": 0.0}, flat=True)
    assert "collapsed" in verdict(result)[-1]
    assert write_page(result, tmp_path)


def test_one_model_and_unregistered_sites(tmp_path: Path) -> None:
    result = measured(tmp_path, {"m": 1.0}, sites=True)
    names = write_page(result, tmp_path)
    assert "heatmap_cosine" not in names
    assert "robustness_index" in names
    assert headlines(result) == []
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "How robust is m?" in page
    assert "not registered" in page


def test_heat_map_shows_the_table_it_was_given() -> None:
    table = pd.DataFrame(
        [
            {
                "model": "m",
                "first": "HE_A",
                "second": "HE_B",
                "metric": "top1",
                "first_to_second": 0.25,
                "second_to_first": 0.75,
            }
        ]
    )
    made = plots_pairs.heatmaps(table, "top1", ["m"], {"HE_A": Condition("HE", "A"), "HE_B": Condition("HE", "B")})
    values = np.asarray(made.axes[0].images[0].get_array().filled(np.nan))
    assert values[0, 1] == 0.25  # row asks, column is searched
    assert values[1, 0] == 0.75
    assert np.isnan(values[0, 0])


def test_many_conditions_become_scanners() -> None:
    rows = [
        {
            "model": "m",
            "first": f"{a}_A",
            "second": f"{b}_B",
            "metric": "top1",
            "first_to_second": v,
            "second_to_first": v,
        }
        for a in "uvwxy"
        for b in "uvwxy"
        for v in [0.5 if a == b else 0.0]
    ]
    conditions = {f"{stain}_{scanner}": Condition(stain, scanner) for stain in "uvwxy" for scanner in "AB"}
    made = plots_pairs.heatmaps(pd.DataFrame(rows), "top1", ["m"], conditions)
    values = np.asarray(made.axes[0].images[0].get_array().filled(np.nan))
    assert values.shape == (2, 2)  # pairs of one staining only
    assert values[0, 1] == 0.5


@pytest.mark.parametrize(
    ("stains", "scanners"),
    [([f"s{n}" for n in range(9)], ["A"]), (["HE", "PAS", "GM"], ["Lab_1", "Lab_2", "Other_1"])],
    ids=["one scanner", "scanners with underscores"],
)
@pytest.mark.filterwarnings("error")
def test_heat_maps_of_many_conditions_hold_what_was_measured(stains: list[str], scanners: list[str]) -> None:
    """Nine stainings under one scanner ended the report with a traceback; scanners were told by a name's last part."""
    conditions = {f"{stain}_{scanner}": Condition(stain, scanner) for stain in stains for scanner in scanners}
    shown, held = ("scanner", "stain") if len(scanners) > 1 else ("stain", "scanner")
    rng, rows = np.random.default_rng(0), []
    for first, second in itertools.combinations(conditions, 2):
        forth, back = rng.random(2)
        rows.append(("m", first, second, "cosine", forth, back))
    columns = ["model", "first", "second", "metric", "first_to_second", "second_to_first"]
    made = plots_pairs.heatmaps(pd.DataFrame(rows, columns=columns), "cosine", ["m"], conditions)
    names = [text.get_text() for text in made.axes[0].get_yticklabels()]
    assert names == (scanners if len(scanners) > 1 else stains)
    values = np.asarray(made.axes[0].images[0].get_array().filled(np.nan))
    for (i, a), (j, b) in itertools.combinations(enumerate(names), 2):
        wanted = [
            row[4]
            for row in rows
            for c, d in [(conditions[row[1]], conditions[row[2]])]
            if getattr(c, held) == getattr(d, held) and (getattr(c, shown), getattr(d, shown)) == (a, b)
        ]
        assert values[i, j] == pytest.approx(np.mean(wanted))


def test_severity_curves_are_drawn(two: Robustness) -> None:
    rows = [
        {
            "model": m,
            "change": c,
            "severity": s,
            "accuracy": 1 - s / 2,
            "low": 0.2,
            "high": 1.0,
            "cosine": 1 - s,
            "n": 9,
        }
        for m in ("bad", "good <b>")
        for c, s in (("clean", 0.0), ("defocus", 0.5), ("defocus", 1.0))
    ]
    result = two._replace(tables={**two.tables, "severity": pd.DataFrame(rows)})
    drawn = figures(result)["What else does it bear?"]
    assert [one.name for one in drawn] == ["severity_accuracy", "severity_cosine"]
    line = drawn[0].made.axes[0].lines[0]
    assert line.get_ydata().tolist() == [1.0, 0.75, 0.5]
    assert drawn[0].made.axes[0].get_ylim()[0] < 0.2  # intervals were cut off at the axis


@pytest.mark.parametrize(("stainings", "models"), [(4, 3), (8, 2), (10, 2)])
def test_a_heat_map_lies_within_its_figure(stainings: int, models: int) -> None:
    """Of eight conditions the models' names and the lowest label were cut off."""
    conditions = {f"stain-{number}_A": Condition(f"stain-{number}", "A") for number in range(stainings)}
    names = list("abc"[:models])
    columns = ["model", "first", "second", "metric", "first_to_second", "second_to_first"]
    rows = [(name, a, b, "top10", 0.5, 0.6) for name in names for a, b in itertools.combinations(conditions, 2)]
    made = plots_pairs.heatmaps(pd.DataFrame(rows, columns=columns), "top10", names, conditions)
    canvas = FigureCanvasAgg(made)
    with styled():
        canvas.draw()
    for axes in made.axes:
        box = axes.get_tightbbox(canvas.get_renderer())
        assert box is not None
        assert min(box.x0, box.y0) >= 0
        assert box.x1 <= made.bbox.x1
        assert box.y1 <= made.bbox.y1


def test_no_two_names_look_alike() -> None:
    """The eighth class of tissue had both colour and marker of the first."""
    names = [f"class {number}" for number in range(49)]
    assert len({(colours(names)[name], markers(names)[name]) for name in names}) == 49


def test_a_verdict_on_stainings_alone_stands_by_itself(tmp_path: Path) -> None:
    """It began "Across stainings, m does so", with nothing said before."""
    frame = pd.DataFrame([{"pair_id": f"p{p}", "stain": s, "scanner": "A"} for s in ("HE", "PAS") for p in range(12)])
    x = np.tile(np.random.default_rng(0).standard_normal((12, 6)), (2, 1)).astype(np.float32)
    spec = RobustnessSpec(k=(1, 10), turn_tiles=0)
    found = measure_robustness([ModelFeatures("m", "m", x.__getitem__)], prepare(frame, "made up"), tmp_path, spec)
    assert verdict(found)[0].startswith("Across stainings, m finds a place again among its 10 nearest tiles in 100")


def test_names_that_matplotlib_would_read_are_shown_as_they_are(two: Robustness) -> None:
    """A dollar begins a formula there, and an underscore keeps a line out of the legend."""
    names = {"bad": "_a$x_$", "good <b>": r"b$\foo$"}
    tables = {key: t.assign(model=t["model"].replace(names)) if "model" in t else t for key, t in two.tables.items()}
    result = two._replace(tables=tables, models=two.models.replace({"name": names}))
    drawn = {one.name: one.made for shown in figures(result).values() for one in shown}
    for name in ("topk", "predictability"):
        made = drawn[name]
        FigureCanvasAgg(made).draw()
        shown = [text.get_text().strip() for text in made.legends[0].get_texts()]
        assert [text for text in shown if text != "chance"] == list(names.values())


def test_marks_of_many_models_stay_in_their_row_and_are_named() -> None:
    """Beyond four models the marks of one measure lay among those of the next, and long names were cut off."""
    models = [f"model{number}-with-a-long-name-as-students-have" for number in range(9)]
    rows = [{"name": n, "group": "g", "model": m, "value": 0.0, "low": -0.1, "high": 0.1} for n in "ab" for m in models]
    made = plots_models.forest(pd.DataFrame(rows), {("a", "g"): "a", ("b", "g"): "b"}, "reference")
    heights = [line.get_ydata()[0] for line in made.axes[0].lines if len(line.get_ydata()) == 1]
    assert len(heights) == 18
    assert max(heights[:9]) < 0.5 < min(heights[9:])
    canvas = FigureCanvasAgg(made)
    canvas.draw()
    box = made.legends[0].get_window_extent()
    assert box.x0 >= 0
    assert box.x1 <= canvas.get_width_height()[0]


def test_names_beneath_tiles_do_not_run_into_each_other() -> None:
    models = ["first-student-with-a-long-name", "second-student-with-a-long-name"]
    rows = [
        {"pair_id": "p", "condition": c, "row": 0, "cosine": 0.5, "model": m} for m in models for c in ("A", "B", "C")
    ]
    made = plots_pairs.strips(pd.DataFrame(rows), models, lambda row: np.zeros((8, 8, 3), np.uint8))
    FigureCanvasAgg(made).draw()
    boxes = [text.get_window_extent() for ax in made.axes for text in ax.texts]
    assert len(boxes) == 4
    assert not any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2))


def test_what_an_earlier_run_left_is_not_read_as_part_of_this_one(two: Robustness, tmp_path: Path) -> None:
    (tmp_path / "severity.csv").write_text("change,severity\nblur,1\n", encoding="utf-8")
    write_robustness(two, tmp_path)
    assert not (tmp_path / "severity.csv").exists()
    assert (tmp_path / "measures.csv").exists()


def test_no_interval_and_a_wide_one_are_not_called_equal(two: Robustness) -> None:
    differences = two.tables["differences"]
    probe = differences["name"] == "probe_accuracy"
    wide = differences.assign(low=differences["low"].mask(probe, -0.4), high=differences["high"].mask(probe, 0.4))
    (sentence,) = headlines(two._replace(tables={**two.tables, "differences": wide}))
    assert "does not clearly know more or less about tissue" in sentence
    (sentence,) = headlines(two._replace(tables={**two.tables, "differences": wide.assign(low=np.nan, high=np.nan)}))
    assert "(? to ?)" in sentence
    assert "nan" not in sentence


def test_turns_without_intervals_and_negative_cosines_are_drawn() -> None:
    rows = [
        {"name": n, "group": g, "model": "m", "value": 0.5, "low": np.nan, "high": np.nan}
        for n in ("turn_cosine", "turn_top1")
        for g in ("90", "180")
    ]
    FigureCanvasAgg(plots_probes.turns(pd.DataFrame(rows), ["m"])).draw()
    table = pd.DataFrame(
        [{"change": "clean", "severity": 0.0, "cosine": 1.0}, {"change": "blur", "severity": 1.0, "cosine": -0.6}]
    ).assign(model="m", accuracy=0.5, low=0.4, high=0.6)
    assert plots_probes.severity(table, "cosine", ["m"]).axes[0].get_ylim()[0] < -0.6


def test_a_mean_over_scanners_has_no_interval() -> None:
    """The bars were means of the ends of several intervals."""
    rows = [
        {"model": "m", "condition": "scanner", "train": a, "test": b, "accuracy": 0.5, "low": 0.4, "high": 0.6}
        for a, b in itertools.product("ABC", repeat=2)
    ]
    table = pd.DataFrame(rows).assign(ece=0.1, ece_low=0.05, ece_high=0.2)
    home, other = plots_probes.transfer(table, "scanner", ["m"]).axes[0].containers
    assert np.shape(home[2][0].get_segments()) == (3, 2, 2)
    assert not any(len(line) and np.isfinite(line).all() for line in other[2][0].get_segments())
    pair = table[table["train"].isin(["A", "B"]) & table["test"].isin(["A", "B"])]
    for bars in plots_probes.transfer(pair, "scanner", ["m"]).axes[0].containers:
        assert np.shape(bars[2][0].get_segments()) == (2, 2, 2)
