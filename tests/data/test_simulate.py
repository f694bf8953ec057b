"""Simulated conditions: registered with the original, the same for a whole slide, seamless, and resumable."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pathokd.augment.scanner import PROFILES
from pathokd.augment.stain_basis import measure_appearance
from pathokd.augment.stainings import get_staining
from pathokd.cli.main import main
from pathokd.data.pack import PackSpec, pack_tiles
from pathokd.data.packed import PackedTiles
from pathokd.data.simulate import (
    ORIGINAL,
    Condition,
    SimulatedTiles,
    conditions,
    measure_cohort,
    simulate_slides,
    simulate_tiles,
    typical_tile,
)
from pathokd.data.wsi import open_tiles
from pathokd.errors import StoreError
from pathokd.evaluate.pairs import registered_pairs
from pathokd.phantom import make_scene, render, write_pyramid
from pathokd.slides.slide import Slide
from pathokd.slides.sources import find_slides
from pathokd.types import Rgb

MEASURED = "histoqc-2"


@pytest.fixture(scope="module")
def scan() -> Rgb:
    return render(make_scene(3, 420.0, margin_um=40.0, region_um=120.0), "HE", "S50")


@pytest.fixture(scope="module")
def slide(tmp_path_factory: pytest.TempPathFactory, scan: Rgb) -> Path:
    return write_pyramid(tmp_path_factory.mktemp("slides") / "one.tif", scan, 0.5, quality=95)


@pytest.fixture(scope="module")
def tiles(tmp_path_factory: pytest.TempPathFactory, slide: Path) -> Path:
    out = tmp_path_factory.mktemp("tiles")
    assert main(["tile", str(slide), "--out", str(out / "tiles"), "--tile-px", "128"]) == 0
    assert main(["pack", str(out / "tiles"), "--out", str(out / "packed")]) == 0
    return out / "packed"


def test_tiles_keep_their_places(tiles: Path, tmp_path: Path) -> None:
    wanted = [Condition("cmu-1"), Condition(MEASURED, severity=0.5)]
    result = simulate_tiles(PackedTiles(tiles), tmp_path / "out", wanted)
    packed = PackedTiles(tmp_path / "out")
    n = len(PackedTiles(tiles))
    assert result.tiles == len(packed) == 3 * n
    assert packed.index["stain"].value_counts().to_dict() == {ORIGINAL: n, "cmu-1": n, MEASURED: n}
    assert set(packed.index["scanner"]) == {ORIGINAL}
    assert packed.index["key"].is_unique
    pairs = registered_pairs(packed.index, vary="stain", hold="scanner")
    assert len(pairs) == 3
    assert all(len(pair.rows_first) == n for pair in pairs)
    again = simulate_tiles(PackedTiles(tiles), tmp_path / "out", wanted)
    assert again.tiles == result.tiles
    with pytest.raises(StoreError, match="conditions"):
        simulate_tiles(PackedTiles(tiles), tmp_path / "out", wanted[:1])


def test_a_blank_stain_is_the_original(tiles: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As of slides: the stain stayed blank beside the simulated one, and a blank is no condition to compare with."""
    packed = PackedTiles(tiles)
    blank = packed.index.assign(stain="", scanner="S1", case="c")
    monkeypatch.setattr(PackedTiles, "index", property(lambda _: blank))
    found = SimulatedTiles(packed, [Condition("cmu-1")]).index
    assert found["stain"].unique().tolist() == [ORIGINAL, "cmu-1"]
    assert set(found["scanner"]) == {"S1"}
    assert len(registered_pairs(found, vary="stain", hold="scanner")) == 1


def test_tiles_packed_anew_are_not_taken_for_the_old(tiles: Path, tmp_path: Path) -> None:
    """Packed again at another quality, they got the simulated tiles of before."""
    for quality in (60, 95):
        pack_tiles(tiles.parent / "tiles", tmp_path / "p", PackSpec(quality), overwrite=True)
        if quality == 60:
            simulate_tiles(PackedTiles(tmp_path / "p"), tmp_path / "out", [Condition("cmu-1")])
    with pytest.raises(StoreError, match="was made with source = "):
        simulate_tiles(PackedTiles(tmp_path / "p"), tmp_path / "out", [Condition("cmu-1")])


def test_tiles_come_out_as_asked(tiles: Path) -> None:
    source = PackedTiles(tiles)
    simulated = SimulatedTiles(source, [Condition(MEASURED)])
    target = get_staining(MEASURED)
    changed = [simulated.read(len(source) + row) for row in range(len(source))]
    found = measure_appearance(changed, target.vectors)
    assert found.strength == pytest.approx(target.strength, rel=0.15)
    assert np.array_equal(simulated.read(0), source.read(0))


def test_severity_zero_is_the_original(tiles: Path) -> None:
    source = PackedTiles(tiles)
    simulated = SimulatedTiles(source, conditions(["cmu-1"], [], 0.0))
    assert all(np.array_equal(simulated.read(len(source) + row), source.read(row)) for row in range(4))


def test_a_slide_becomes_a_slide(slide: Path, scan: Rgb, tmp_path: Path) -> None:
    wanted = [Condition("cmu-1")]
    outcomes = simulate_slides(find_slides(slide), tmp_path, wanted, quality=95)
    assert outcomes["status"].tolist() == ["ok"]
    with Slide(tmp_path / "one_cmu-1_original.tif") as new, Slide(slide) as old:
        assert new.dimensions == old.dimensions
        assert new.mpp == pytest.approx(old.mpp)
        assert len(new.level_downsamples) > 1
        far = new.read_tile(300, 200, mpp=0.5, tile_px=256).astype(int) - old.read_tile(300, 200, mpp=0.5, tile_px=256)
        assert np.abs(far).mean() > 2
    listed = find_slides(tmp_path / "slides.csv")
    assert listed[0].metadata == {"case": "one", "stain": "cmu-1", "scanner": ORIGINAL}
    with pytest.raises(StoreError, match="seed"):
        simulate_slides(find_slides(slide), tmp_path, wanted, quality=95, seed=1)


def test_what_is_known_of_a_slide_is_carried_on(slide: Path, tmp_path: Path) -> None:
    """Patients were lost, so that a training on the simulated slides split by slide."""
    (tmp_path / "list.csv").write_text(f"slide_id,path,patient_id,stain\na,{slide},p7,HE\n")
    slides = find_slides(tmp_path / "list.csv")
    outcomes = simulate_slides(slides, tmp_path / "out", [Condition(scanner="pale")])
    assert outcomes[["case", "stain", "scanner"]].values.tolist() == [["a", "HE", "pale"]]
    (found,) = find_slides(tmp_path / "out" / "slides.csv")
    assert found.metadata == {"case": "a", "stain": "HE", "scanner": "pale", "patient_id": "p7"}


def test_further_conditions_join_the_list(slide: Path, tmp_path: Path) -> None:
    """The list held the last run's slides alone, though the files of all were there."""
    (tmp_path / "list.csv").write_text(f'slide_id,path,patient_id\n007,{slide},"p,7"\n')
    slides, out = find_slides(tmp_path / "list.csv"), tmp_path / "out"
    for scanner in ("pale", "fringed", "pale"):
        simulate_slides(slides, out, [Condition(scanner=scanner)])
    rows = {found.slide_id: found.metadata for found in find_slides(out / "slides.csv")}
    assert sorted(rows) == ["007_original_fringed", "007_original_pale"]
    assert {row["patient_id"] for row in rows.values()} == {"p,7"}
    (out / "007_original_fringed.tif").unlink()
    simulate_slides(find_slides(slide), out, [Condition(scanner="pale")])
    assert sorted(found.slide_id for found in find_slides(out / "slides.csv")) == [
        "007_original_pale",
        "one_original_pale",
    ]
    simulate_slides(find_slides(slide), out, [Condition(scanner="pale", severity=0.5)], overwrite=True)
    assert [found.slide_id for found in find_slides(out / "slides.csv")] == ["one_original_pale"]


def test_a_finished_folder_is_not_measured_again(tiles: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = [Condition("cmu-1")]
    made = simulate_tiles(PackedTiles(tiles), tmp_path / "out", wanted)
    monkeypatch.setattr(PackedTiles, "read", None)
    assert simulate_tiles(PackedTiles(tiles), tmp_path / "out", wanted).tiles == made.tiles


def test_a_broken_slide_is_one_row(slide: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken.tif"
    broken.write_bytes(slide.read_bytes()[:3000])
    outcomes = simulate_slides(find_slides([broken, slide]), tmp_path / "out", [Condition("cmu-1")])
    assert outcomes["status"].tolist() == ["failed", "ok"]
    assert not list((tmp_path / "out").glob("*broken*"))


def test_the_verb(tiles: Path, slide: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "sheet"
    broken = tmp_path / "a.tif"
    broken.write_bytes(slide.read_bytes()[:3000])
    mixed = ["simulate", str(broken), str(slide), "--out", str(tmp_path / "mixed"), "--scanner", "pale"]
    assert main(mixed) == 1
    assert "a_original_pale: " in capsys.readouterr().out
    assert main([*mixed, "--skip-errors"]) == 0
    assert main(["simulate", str(tiles), "--out", str(out)]) == 0
    assert (out / "contact_sheet.png").stat().st_size > 50_000
    assert not (out / "index.parquet").exists()
    assert main(["simulate", str(tiles), "--out", str(tmp_path / "s"), "--stain", "cmu1"]) == 1
    assert "no staining 'cmu1': did you mean cmu-1" in capsys.readouterr().err
    assert main(["simulate", str(tiles), "--out", str(tmp_path / "s"), "--stain", "cmu-1,os-1", "--severity", "2"]) == 1
    assert "severity must lie within 0 to 1" in capsys.readouterr().err
    assert main(["stain-stats", str(tiles), "--out", str(tmp_path / "stats.yaml")]) == 1
    assert "at least two slides" in capsys.readouterr().err


def test_another_slide_of_the_same_name_is_not_taken_for_the_first(slide: Path, scan: Rgb, tmp_path: Path) -> None:
    other = write_pyramid(tmp_path / "other" / "one.tif", scan[::-1].copy(), 0.5)
    wanted = [Condition(scanner="pale")]
    simulate_slides(find_slides([slide]), tmp_path / "out", wanted)
    assert (simulate_slides(find_slides([slide]), tmp_path / "out", wanted)["status"] == "ok").all()
    with pytest.raises(
        StoreError, match=r"holds one made from .*slides.*one.tif, this run gives .*other/one.tif: pass --over"
    ):
        simulate_slides(find_slides([other]), tmp_path / "out", wanted)
    before = (tmp_path / "out" / "one_original_pale.tif").read_bytes()
    simulate_slides(find_slides([other]), tmp_path / "out", wanted, overwrite=True)
    assert (tmp_path / "out" / "one_original_pale.tif").read_bytes() != before


@pytest.mark.parametrize("quality", [0, 101])
def test_a_quality_that_slides_cannot_have(slide: Path, tmp_path: Path, quality: int, capsys: Any) -> None:
    command = ["simulate", str(slide), "--out", str(tmp_path), "--scanner", "pale", "--quality", str(quality)]
    assert main(command) == 1
    assert f"quality of slides, which are JPEG, must lie in 1..100, got {quality}" in capsys.readouterr().err


def test_a_scanner_may_be_a_file_of_a_profile(tiles: Path, slide: Path, tmp_path: Path) -> None:
    """Its path became part of keys and of file names, and an edited file was taken for the old one."""
    path = tmp_path / "my scanner.v2.yaml"
    PROFILES["pale"].save(path)
    wanted = conditions([], [str(path)], 1.0)
    simulate_tiles(PackedTiles(tiles), tmp_path / "out", wanted)
    packed = PackedTiles(tmp_path / "out")
    assert set(packed.index["scanner"]) == {ORIGINAL, "my_scanner_v2"}
    assert not packed.index["key"].str.contains(r"[./\s]").any()
    named = SimulatedTiles(PackedTiles(tiles), [Condition(scanner="pale")])
    row = len(packed) - 1
    assert np.abs(packed.read(row).astype(int) - named.read(row)).mean() < 3
    outcomes = simulate_slides(find_slides(slide), tmp_path / "slides", wanted)
    assert outcomes["path"].tolist() == ["one_original_my_scanner_v2.tif"]
    PROFILES["fringed"].save(path)
    again = conditions([], [str(path)], 1.0)
    with pytest.raises(StoreError, match="conditions"):
        simulate_tiles(PackedTiles(tiles), tmp_path / "out", again)
    with pytest.raises(StoreError, match="another scanner profile my_scanner_v2: pass --overwrite"):
        simulate_slides(find_slides(slide), tmp_path / "slides", again)
    (tmp_path / "other").mkdir()
    PROFILES["fringed"].save(tmp_path / "other" / path.name)
    with pytest.raises(ValueError, match="two scanners would have one name"):
        conditions([], [str(path), str(tmp_path / "other" / path.name)], 1.0)
    PROFILES["pale"].save(tmp_path / "pale.yaml")
    assert Condition(scanner=str(tmp_path / "pale.yaml")).name != Condition(scanner="pale").name


def test_a_damaged_tile_is_left_out_and_told(scan: Rgb, tmp_path: Path) -> None:
    """It ended the run, although packing the same tiles goes on without it."""
    pixels = np.ascontiguousarray(scan[:256, :256])
    write_pyramid(tmp_path / "good.tif", pixels, 0.5, tile_px=64)
    assert (
        main(["tile", str(tmp_path / "good.tif"), "--out", str(tmp_path / "t"), "--tile-px=64", "--min-tissue=0"]) == 0
    )
    write_pyramid(tmp_path / "good.tif", pixels, 0.5, tile_px=64, corrupt=[(0, 0, 0)])
    source = open_tiles(tmp_path / "t")
    result = simulate_tiles(source, tmp_path / "out", [Condition("cmu-1")], workers=1)
    assert result.unreadable["key"].tolist() == ["good-0-0", "good-0-0-cmu-1_original"]
    assert result.tiles == 2 * (len(source) - 1)
    assert typical_tile(source).shape == (64, 64, 3)
    with pytest.raises(ValueError, match="at least two slides with tissue, got 1"):
        measure_cohort(source)


def test_a_damaged_record_of_slides_is_one_sentence(slide: Path, tmp_path: Path) -> None:
    (tmp_path / "simulated.json").write_text("{")
    with pytest.raises(StoreError, match="is damaged"):
        simulate_slides(find_slides(slide), tmp_path, [Condition("cmu-1")])


def test_a_condition_named_twice() -> None:
    with pytest.raises(ValueError, match="name each staining and each scanner once, got pale, pale"):
        conditions([], ["pale", "pale"], 1.0)


def test_numbers_that_cannot_be(tiles: Path, tmp_path: Path, capsys: Any) -> None:
    assert main(["stain-stats", str(tiles), "--out", str(tmp_path / "s.yaml"), "--tiles-per-slide", "0"]) == 1
    assert "tiles_per_slide must be at least 1, got 0." in capsys.readouterr().err
    folder = str(tiles.parent / "tiles")
    for workers in ("0", "-1"):
        assert main(["pack", folder, "--out", str(tmp_path / "p"), "--workers", workers]) == 1
        assert f"workers must be at least 1, got {workers}." in capsys.readouterr().err
