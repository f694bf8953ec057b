"""Figures of six models with names as long as runs have: every name can be read and every panel keeps its size."""

import itertools

import numpy as np
import pandas as pd
import pytest
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text

from pathokd.metrics.aggregate import Condition
from pathokd.report import plots_models, plots_pairs, plots_probes, plots_space
from pathokd.report.plot_parts import short

MODELS = [f"hoptimus0_to_vitb14_distilled_run_2026-11-03_seed{number}" for number in range(6)]
CONDITIONS = {name: Condition(*name.split("_")) for name in ("HE_A", "HE_B", "PAS_A", "PAS_B")}


def drawn(made: Figure) -> Figure:
    FigureCanvasAgg(made).draw()
    return made


def shown(made: Figure) -> list[Axes]:
    return [ax for ax in made.axes if ax.get_visible()]


def assert_readable(made: Figure, texts: list[Text]) -> None:
    """All within the figure, none over another."""
    boxes = [text.get_window_extent() for text in texts]
    assert all(box.x0 >= 0 and box.y0 >= 0 and box.x1 <= made.bbox.x1 and box.y1 <= made.bbox.y1 for box in boxes)
    assert not any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2))


def titles(made: Figure) -> list[Text]:
    return [ax._left_title for ax in shown(made) if ax._left_title.get_text()]  # type: ignore[attr-defined]


def assert_panels(made: Figure) -> None:
    """A panel for each model, titled by it; a page shrinks what is wider until no letter can be read."""
    drawn(made)
    found = titles(made)
    assert [text.get_text().replace("\n", "") for text in found] == MODELS
    assert_readable(made, found)
    assert made.get_figwidth() < 13


def pairs() -> pd.DataFrame:
    ends = list(itertools.combinations(CONDITIONS, 2))
    rows = [(m, "cosine", a, b, 0.5, 0.5) for m in MODELS for a, b in ends]
    return pd.DataFrame(rows, columns=["model", "metric", "first", "second", "first_to_second", "second_to_first"])


def test_heat_maps() -> None:
    assert_panels(plots_pairs.heatmaps(pairs(), "cosine", MODELS, CONDITIONS))


def test_ranks() -> None:
    rows = [(m, "scanner", r, k, 0.25) for m in MODELS for r in (1, 2) for k in plots_space.TYPE_COLOURS]
    table = pd.DataFrame(rows, columns=["model", "confounder", "rank", "type", "share"])
    assert_panels(plots_space.neighbours_by_rank(table, "scanner", MODELS))


def test_projection() -> None:
    rows = [(m, s, t, n, n, 0.5, 0.2) for m in MODELS for n, (s, t) in enumerate(itertools.product("AB", "xy"))]
    table = pd.DataFrame(rows, columns=["model", "scanner", "label", "pc1", "pc2", "share1", "share2"])
    made = plots_space.projection(table, MODELS)
    assert_panels(made)
    assert len(shown(made)) == 12


def test_four_and_five_models() -> None:
    """Four stand in a row; of five, two rows have a place to spare, which is not drawn."""
    for count, rows in ((4, 1), (5, 2)):
        made = plots_pairs.heatmaps(pairs(), "cosine", MODELS[:count], CONDITIONS)
        drawn(made)
        maps = [ax for ax in shown(made) if ax.images]
        assert len(maps) == count
        assert len({round(ax.get_position().y0, 2) for ax in maps}) == rows


def test_the_reference_of_differences_is_named_within_the_figure() -> None:
    rows = [{"name": "a", "group": "g", "model": m, "value": 0.1, "low": 0.0, "high": 0.2} for m in MODELS[1:]]
    made = drawn(plots_models.forest(pd.DataFrame(rows), {("a", "g"): "top-10 across scanners"}, MODELS[0]))
    assert_readable(made, [made.axes[0].xaxis.label, *made.legends[0].get_texts()])


@pytest.mark.parametrize("params", [float("nan"), 1.1e9])
def test_models_that_are_alike_are_told_apart(params: float) -> None:
    """Their names lay over each other and pressed the axes together."""
    at = {"x": 0.8, "x_low": 0.7, "x_high": 0.9, "y": 0.9, "y_low": 0.8, "y_high": 0.95}
    table = pd.DataFrame([{"model": m, "params": params, **at} for m in MODELS])
    made = drawn(plots_models.accuracy_against_robustness(table, "top-10 across scanners"))
    names = [*made.axes[0].texts, *(made.legends[0].get_texts() if made.legends else [])]
    assert [text.get_text().split(",")[0] for text in names] == MODELS
    assert_readable(made, names)
    assert made.axes[0].get_window_extent().width > 0.7 * made.bbox.width


def test_a_long_legend_leaves_the_panels_their_height() -> None:
    """Twelve lines of it left the axes no height at all."""
    numbers = {"accuracy": 0.9, "low": 0.8, "high": 1.0, "ece": 0.1, "ece_low": 0.0, "ece_high": 0.2}
    ways = itertools.product(MODELS, "AB", "AB")
    table = pd.DataFrame([{"condition": "scanner", "model": m, "train": a, "test": b, **numbers} for m, a, b in ways])
    made = drawn(plots_probes.transfer(table, "scanner", MODELS))
    assert made.axes[0].get_window_extent().height / made.dpi > 1.5
    assert_readable(made, made.legends[0].get_texts())


def test_cosines_beneath_tiles_stay_off_the_next_tile() -> None:
    """The last model's number lay behind it."""
    rows = [
        {"pair_id": p, "condition": c, "row": 0, "cosine": 0.5, "model": m} for p in "pq" for m in MODELS for c in "AB"
    ]
    made = drawn(plots_pairs.strips(pd.DataFrame(rows), MODELS, lambda row: np.zeros((8, 8, 3), np.uint8)))
    texts = [text for ax in made.axes for text in ax.texts]
    assert len(texts) == 12
    assert_readable(made, texts)
    tiles = [ax.get_window_extent() for ax in made.axes]
    assert not any(text.get_window_extent().overlaps(tile) for text in texts for tile in tiles)


def test_a_tail_within_the_last_bar_is_not_all_there_is() -> None:
    """All of it was shaded and called the "lowest 5 %, below 1.00"."""
    rows = [("m", "all", 0.99, 0.995, 1, 1.0), ("m", "all", 0.995, 1.0, 99, 1.0), ("n", "all", 0.6, 0.605, 100, 0.605)]
    table = pd.DataFrame(rows, columns=["model", "group", "low", "high", "count", "tail"])
    whole, part = plots_pairs.distribution(table, "all", ["m", "n"]).axes
    assert whole.texts[0].get_text().strip() == "more than 95 % above 0.995"
    assert len(whole.patches) == 2  # the bars
    assert part.texts[0].get_text().strip() == "lowest 5 %, below 0.60"
    assert len(part.patches) == 2  # a bar and the shade


def test_a_model_that_was_not_turned_is_not_in_the_legend() -> None:
    names = ("turn_cosine", "turn_top1")
    rows = [(n, "half turn", m, 0.9, 0.8, 1.0) for n in names for m in MODELS[:2]]
    table = pd.DataFrame(rows, columns=["name", "group", "model", "value", "low", "high"])
    made = plots_probes.turns(table, MODELS[:3])
    assert [text.get_text() for text in made.legends[0].get_texts()] == MODELS[:2]


def test_short() -> None:
    assert short(["abcdefghij", "abc"], 7) == {"abcdefghij": "abc\u2026hij", "abc": "abc"}
    assert short(["abcdXXXhij", "abcdYYYhij"], 7) == {"abcdXXXhij": "abcdXXXhij", "abcdYYYhij": "abcdYYYhij"}
