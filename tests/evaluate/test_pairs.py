"""Registered places: across pixel sizes, with gaps, without double use."""

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pathokd.data.packed import PackedTiles
from pathokd.errors import ManifestError
from pathokd.evaluate import place_ids, registered_pairs
from pathokd.evaluate.paired_set import prepare


def slide(
    case: str, stain: str, scanner: str, mpp0: float, stride_um: float, cells: list[tuple[int, int]]
) -> pd.DataFrame:
    """Tiles of 112 um at grid cells, with level-0 positions rounded as the tiler rounds them."""
    return pd.DataFrame(
        {
            "x": [round(c * stride_um / mpp0) for c, _ in cells],
            "y": [round(r * stride_um / mpp0) for _, r in cells],
            "cell": [f"{c},{r}" for c, r in cells],
            "mpp": 0.5,
            "mpp_level0": mpp0,
            "tile_px": 224,
            "case": case,
            "stain": stain,
            "scanner": scanner,
        }
    )


@settings(max_examples=25, deadline=None)
@given(
    mpp0=st.floats(0.2, 0.5),
    stride_px=st.sampled_from([100, 224, 301]),
    seed=st.integers(0, 1000),
)
def test_the_same_cells_are_matched_whatever_the_pixel_size(mpp0: float, stride_px: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    cells = [(c, r) for r in range(6) for c in range(6)]

    def some() -> list[tuple[int, int]]:
        return [cell for cell in cells if rng.random() < 0.7]

    frame = pd.concat(
        [
            slide(case, "HE", scanner, mpp, stride_px * 0.5, some())
            for case in ("a", "b")
            for scanner, mpp in (("S1", 0.5), ("S2", mpp0))
        ],
        ignore_index=True,
    )
    (pair,) = registered_pairs(frame, vary="scanner", hold="stain")
    first, second = frame.iloc[pair.rows_first], frame.iloc[pair.rows_second]
    assert (first["scanner"] == "S1").all()
    assert (second["scanner"] == "S2").all()
    for name in ("cell", "case"):
        assert first[name].tolist() == second[name].tolist()
    common = sum(
        len(set(part[part["scanner"] == "S1"]["cell"]) & set(part[part["scanner"] == "S2"]["cell"]))
        for _, part in frame.groupby("case")
    )
    assert len(first) == common
    assert len(set(pair.rows_first)) == common


def test_shifted_slides_do_not_match() -> None:
    cells = [(c, r) for r in range(3) for c in range(3)]
    a, b = slide("a", "HE", "S1", 0.5, 112, cells), slide("a", "HE", "S2", 0.5, 112, cells)
    b["x"] += 40  # 20 um of 112: another place
    assert registered_pairs(pd.concat([a, b], ignore_index=True), vary="scanner", hold="stain") == []


def test_every_pair_of_values_under_every_held_value(packed: PackedTiles) -> None:
    frame = packed.index
    across = registered_pairs(frame, vary="scanner", hold="stain")
    assert [(p.held, p.first, p.second, len(p.rows_first)) for p in across] == [
        ("HE", "S25", "S50", 72),
        ("violet", "S25", "S50", 72),
    ]
    stains = registered_pairs(frame, vary="stain", hold="scanner")
    assert [(p.held, p.first, p.second) for p in stains] == [("S25", "HE", "violet"), ("S50", "HE", "violet")]


def test_places_are_shared_by_all_slides_of_a_case(packed: PackedTiles) -> None:
    places = place_ids(packed.index)
    names, counts = np.unique(places, return_counts=True)
    assert len(names) == 2 * 36
    assert set(counts) == {4}
    assert len(set(place_ids(packed.index[packed.index["case"] == "c0"]))) == 36


@pytest.mark.parametrize(("start", "stride"), [(0, 112), (56, 112), (0, 56), (13.3, 37.5)])
def test_places_of_any_grid(start: float, stride: float) -> None:
    """Rounding to squares put tiles half a tile apart into one place, or the same tissue into two."""
    um = [start + stride * k for k in range(6)]
    cells = [(x, y) for x in um for y in um]
    frame = pd.concat([slide("a", "HE", s, mpp, 1.0, cells) for s, mpp in (("S50", 0.5), ("S45", 0.2274))])
    first, second = np.split(place_ids(frame), 2)
    assert first.tolist() == second.tolist()
    assert len(set(first)) == len(cells)


def test_a_tile_off_its_place_is_another() -> None:
    cells = [(0.0, 0.0), (500.0, 0.0)]
    parts = [slide("a", "HE", f"S{n}", 0.5, 1.0, [(x + 5 * n, y) for x, y in cells]) for n in range(4)]
    places = place_ids(pd.concat(parts)).reshape(4, 2)  # 5 um apart each: 5.6 is the tolerance, the median is between
    assert places[1].tolist() == places[2].tolist()
    assert len(set(places[:, 0].tolist())) == 3


@pytest.mark.parametrize(("name", "empty"), [("scanner", ""), ("stain", None), ("scanner", " ")])
def test_an_empty_cell_is_no_condition(name: str, empty: str | None) -> None:
    """Tiles of an unknown scanner were compared with those of a known one, and called those of two scanners."""
    parts = [slide("a", "HE", scanner, 0.5, 112.0, [(0, 0), (1, 0), (2, 0)]) for scanner in ("S1", "S2", "S3")]
    frame = pd.concat(parts, ignore_index=True)
    frame[name] = frame[name].astype(object)
    frame.loc[3:5, name] = empty
    with pytest.raises(ManifestError, match=f"3 of 9 rows have no {name}, .* fill it in"):
        registered_pairs(frame, "scanner", "stain")
    with pytest.raises(ManifestError, match=f"3 of 9 rows have no {name}, .* fill it in"):
        prepare(frame.assign(pair_id=frame["cell"]), "here")
    frame["stain"] = ""  # of none it is known, and they are taken for one
    assert len(registered_pairs(frame.assign(scanner=["A"] * 3 + ["B"] * 6)[:6], "scanner", "stain")) == 1


def test_missing_columns_are_named() -> None:
    frame = slide("a", "HE", "S1", 0.5, 112, [(0, 0)]).drop(columns=["scanner", "case"])
    with pytest.raises(ManifestError, match=r"lack these columns: scanner, case; .*there are x, y"):
        registered_pairs(frame, vary="scanner", hold="stain")
