"""Simulated conditions: registered with the original, the same for a whole slide, seamless, and resumable."""

import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pathokd.augment.scanner import PROFILES
from pathokd.augment.stain_basis import is_brown, measure_appearance
from pathokd.augment.stain_math import REFERENCE, from_od
from pathokd.augment.stainings import STAININGS, get_staining
from pathokd.cli.main import main
from pathokd.data.conditions import ORIGINAL, SIMULATION, Condition, conditions
from pathokd.data.pack import PackSpec, pack_tiles
from pathokd.data.packed import PackedTiles
from pathokd.data.places import registered_tiles
from pathokd.data.sample import typical_tile
from pathokd.data.simulate import SimulatedTiles, measure_cohort, simulate_tiles
from pathokd.data.simulate_slides import simulate_slides
from pathokd.data.wsi import open_tiles
from pathokd.errors import ManifestError, StoreError
from pathokd.evaluate.pairs import registered_pairs
from pathokd.files import LEFTOVER_S
from pathokd.phantom import make_scene, render, write_pyramid
from pathokd.pictures import read_image
from pathokd.slides.slide import Slide
from pathokd.slides.sources import find_slides
from pathokd.types import Rgb

MEASURED = "histoqc-2"

# Means of red, green and blue, then their standard deviations, of `_dyes()` under every preset.
SIMULATION_2 = {
    "h-short-e-short": (176.1, 132.1, 174.0, 34.8, 37.4, 27.3),
    "h-short-e-regular": (169.5, 111.8, 156.5, 34.3, 40.6, 33.3),
    "h-short-e-long": (161.0, 90.6, 136.3, 34.5, 45.2, 41.0),
    "h-regular-e-short": (146.6, 106.1, 152.6, 46.9, 45.2, 35.0),
    "h-regular-e-regular": (141.1, 89.8, 137.4, 45.7, 44.1, 37.1),
    "h-regular-e-long": (134.0, 72.9, 119.7, 44.6, 44.6, 41.6),
    "h-long-e-short": (116.8, 81.7, 129.2, 56.9, 51.2, 42.9),
    "h-long-e-regular": (112.5, 69.2, 116.1, 55.2, 47.5, 42.7),
    "h-long-e-long": (106.9, 56.1, 101.5, 53.3, 45.1, 43.8),
    "cmu-1": (122.5, 63.5, 102.9, 54.1, 46.3, 44.2),
    "tcga-frozen": (176.3, 82.6, 126.6, 35.4, 44.2, 39.9),
    "os-1": (107.3, 88.4, 140.1, 49.7, 44.4, 36.9),
    "instanseg-tma": (117.3, 66.2, 144.5, 53.1, 45.4, 38.2),
    "birl-lung": (131.8, 91.2, 151.8, 39.8, 45.4, 33.6),
    "birl-kidney": (174.8, 113.5, 143.9, 34.4, 40.3, 35.6),
    "histoqc-1": (145.2, 91.2, 134.1, 47.4, 44.6, 37.9),
    "histoqc-2": (153.8, 121.5, 156.1, 42.5, 42.2, 32.7),
    "histoqc-3": (105.2, 66.6, 108.4, 54.1, 47.5, 43.3),
    "histoqc-4": (130.9, 104.0, 153.4, 46.8, 43.3, 33.4),
    "tiatoolbox": (123.3, 71.0, 115.8, 53.1, 48.2, 42.8),
    "torchstain": (150.7, 105.6, 193.6, 49.4, 44.0, 23.6),
    "soft-warm": (129.1, 85.0, 114.2, 45.0, 43.9, 38.1),
    "sharp-blue": (121.0, 67.5, 115.0, 47.7, 44.0, 42.2),
    "pale": (148.2, 102.0, 140.5, 40.6, 42.6, 35.9),
    "contrasty": (103.9, 54.5, 92.9, 50.3, 42.7, 43.1),
    "grey-noisy": (115.9, 83.2, 106.6, 45.6, 44.3, 40.9),
    "fringed": (126.4, 75.1, 110.1, 47.3, 44.1, 39.5),
}


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


def test_tiles_of_several_magnifications_are_simulated_together(slide: Path, tiles: Path, tmp_path: Path) -> None:
    """A tile at each magnification in one corner was taken for a simulated one."""
    coarse = ["--out", str(tmp_path / "coarse"), "--tile-px", "128", "--mpp", "1.0", "--border", "cover"]
    assert main(["tile", str(slide), *coarse]) == 0
    assert main(["pack", str(tiles.parent / "tiles"), str(tmp_path / "coarse"), "--out", str(tmp_path / "both")]) == 0
    both = PackedTiles(tmp_path / "both")
    assert both.index.duplicated(["slide_id", "x", "y"]).any()
    simulate_tiles(both, tmp_path / "out", [Condition("cmu-1")])
    simulated = PackedTiles(tmp_path / "out").index.assign(case="a")
    assert simulated["mpp"].value_counts().to_dict() == {m: 2 * n for m, n in both.index["mpp"].value_counts().items()}
    place = registered_tiles(simulated).place
    assert sorted(np.bincount(place)) == [2] * len(both)
    assert (simulated.groupby(place)["mpp"].nunique() == 1).all()


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
    assert main(["simulate", str(tiles), "--out", str(out), "--scanner", "pale"]) == 0
    assert main(["simulate", str(out), "--out", str(tmp_path / "t"), "--scanner", "pale"]) == 1
    assert not (tmp_path / "t").exists()
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


def _dyes() -> Rgb:
    """Every mixture of two dyes, a dark pixel without red, and a brown."""
    h, e = np.meshgrid(np.linspace(0, 2.2, 64), np.linspace(0, 1.4, 64))
    rgb = from_od((np.stack([h, e, np.zeros_like(h)], axis=-1) @ REFERENCE).astype(np.float32))
    rgb[40:44, 40:44], rgb[8:12, 48:52] = (0, 40, 60), (120, 90, 60)
    return rgb


def test_other_pixels_are_another_version() -> None:
    """Where this fails on purpose, raise SIMULATION and put the new numbers here under its name."""
    assert SIMULATION == 2
    rgb = _dyes()
    source = measure_appearance(rgb)
    presets = [*map(Condition, STAININGS), *(Condition(scanner=name) for name in PROFILES)]
    assert {preset.stain or preset.scanner for preset in presets} == {*SIMULATION_2}
    for preset in presets:
        changed = preset.apply(rgb, source, seed=0).astype(float)
        found = [*changed.mean(axis=(0, 1)), *changed.std(axis=(0, 1))]
        assert found == pytest.approx(SIMULATION_2[preset.stain or preset.scanner], abs=0.3), preset.name


def test_what_an_earlier_version_made_is_not_gone_on_with(
    tiles: Path, slide: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half a folder of old restaining was finished with new one, and nothing said so."""
    source, wanted, spec = PackedTiles(tiles), [Condition("cmu-1")], PackSpec(95, shard_tiles=8)
    read = PackedTiles.read

    def cut_off(self: PackedTiles, row: int) -> Rgb:
        if row == 20:
            raise KeyboardInterrupt
        return read(self, row)

    with monkeypatch.context() as earlier:
        for module in ("simulate", "simulate_slides"):
            earlier.setattr(f"pathokd.data.{module}.SIMULATION", 1)
        earlier.setattr(PackedTiles, "read", cut_off)
        with pytest.raises(KeyboardInterrupt):
            simulate_tiles(source, tmp_path / "tiles", wanted, spec, workers=1)
        earlier.setattr(PackedTiles, "read", read)
        simulate_slides(find_slides(slide), tmp_path / "slides", wanted)
    assert (tmp_path / "tiles" / "shard-000000.tar").exists()
    with pytest.raises(StoreError, match="simulation = 1, this run asks for 2: pass --overwrite"):
        simulate_tiles(source, tmp_path / "tiles", wanted, spec)
    with pytest.raises(StoreError, match="simulation = 1, this run asks for 2: pass --overwrite"):
        simulate_slides(find_slides(slide), tmp_path / "slides", wanted)


def test_overwriting_that_was_cut_off_keeps_nothing_of_before(slide: Path, tmp_path: Path) -> None:
    """The record said the new settings, and the files of the old ones were then kept and listed."""
    out = tmp_path / "out"
    simulate_slides(find_slides(slide), out, conditions([], ["pale", "fringed"], 1.0))
    before = {path.name: path.read_bytes() for path in out.glob("*.tif")}
    with pytest.raises(ZeroDivisionError):
        simulate_slides(find_slides(slide), out, [_Broken(scanner="pale", severity=0.5)], overwrite=True)
    simulate_slides(find_slides(slide), out, conditions([], ["pale", "fringed"], 0.5))
    after = {path.name: path.read_bytes() for path in out.glob("*.tif")}
    assert after.keys() == before.keys()
    assert not any(after[name] == before[name] for name in after)


class _Broken(Condition):
    def apply(self, *args: Any, **kwargs: Any) -> Rgb:
        raise ZeroDivisionError


def test_what_was_made_is_not_overwritten_while_it_is_read(slide: Path, tmp_path: Path) -> None:
    simulate_slides(find_slides(slide), tmp_path, [Condition(scanner="pale")])
    with pytest.raises(StoreError, match=r"one_original_pale.tif was made by .* and is given to it too"):
        simulate_slides(find_slides(tmp_path), tmp_path, [Condition(scanner="pale")], overwrite=True)
    assert (tmp_path / "one_original_pale.tif").exists()


def test_a_slide_that_changed_is_not_taken_for_simulated(scan: Rgb, tmp_path: Path) -> None:
    """Its path was all that was compared: a slide copied anew, or given other microns, kept its old files."""
    path, wanted = tmp_path / "one.tif", [Condition(scanner="pale")]
    write_pyramid(path, scan[:512, :512].copy(), None)
    assert simulate_slides(find_slides(path), tmp_path / "out", wanted)["status"].tolist() == ["failed"]
    simulate_slides(find_slides(path, mpp=0.5), tmp_path / "out", wanted)
    with pytest.raises(StoreError, match=r"made from microns per pixel 0.5, this run gives 0.25: pass --overwrite"):
        simulate_slides(find_slides(path, mpp=0.25), tmp_path / "out", wanted)
    write_pyramid(path, scan[512:1024, :512].copy(), None)
    with pytest.raises(StoreError, match=r"holds one made from contents "):
        simulate_slides(find_slides(path, mpp=0.5), tmp_path / "out", wanted)


def test_a_name_too_long_to_be_tiled_is_a_row(scan: Rgb, tmp_path: Path) -> None:
    """The slides were written, and `pathokd tile` then refused their list."""
    name = "é" * 95
    write_pyramid(tmp_path / f"{name}.tif", scan[:256, :256].copy(), 0.5)
    outcomes = simulate_slides(find_slides(tmp_path), tmp_path / "out", conditions(["h-long-e-long"], [], 1.0))
    assert outcomes["status"].tolist() == ["failed"]
    assert "is longer than 200 bytes: shorten it. A CSV list can give the slide a shorter" in outcomes["message"][0]
    assert not list((tmp_path / "out").glob("*.tif"))


def test_a_slide_whose_staining_cannot_be_measured_is_told(tmp_path: Path) -> None:
    """It was changed as if it had the reference's, and nothing said so."""
    write_pyramid(tmp_path / "green.tif", np.full((512, 512, 3), (60, 200, 90), np.uint8), 0.5)
    with pytest.warns(UserWarning, match=r"green.tif is changed as if .* its own cannot be measured: one colour only"):
        simulate_slides(find_slides(tmp_path / "green.tif"), tmp_path / "out", [Condition("cmu-1")])
    simulate_slides(find_slides(tmp_path / "green.tif"), tmp_path / "out", [Condition(scanner="pale")])  # not restained


def test_immunohistochemistry_is_told(real_data: Path, tmp_path: Path) -> None:
    """DAB passed for eosin without a word."""
    refs = real_data / "stain_refs"
    brown = [measure_appearance(read_image(path)) for path in (*refs.glob("*PanCK*"), *refs.glob("*proSPC*"))]
    pink = [measure_appearance(read_image(path)) for path in sorted(refs.glob("*_HE.jpg")) + sorted(refs.glob("*.png"))]
    assert [is_brown(found) for found in brown] == [True, True]
    assert not any(map(is_brown, pink))
    assert len(pink) == 9
    with pytest.warns(UserWarning, match=r"OS-2-ndpi.ome.tif holds brown where H&E holds eosin"):
        simulate_slides(
            find_slides(real_data / "wsi_small" / "OS-2-ndpi.ome.tif", mpp=0.5), tmp_path, [Condition("cmu-1")]
        )


def test_the_tiles_themselves_are_not_overwritten(tiles: Path, tmp_path: Path) -> None:
    """The advice to pass --overwrite deleted the shards that were about to be read."""
    pack_tiles(tiles.parent / "tiles", tmp_path, PackSpec(shard_tiles=8))
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    for overwrite in (False, True):
        with pytest.raises(StoreError, match=r"holds the tiles that are to be simulated: name another output folder"):
            simulate_tiles(PackedTiles(tmp_path), tmp_path, [Condition("cmu-1")], overwrite=overwrite)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_simulated_tiles_are_not_simulated_or_measured_again(tiles: Path, tmp_path: Path) -> None:
    """Their stainings were measured as one, and two tiles of a place got one name of stain and scanner."""
    simulate_tiles(PackedTiles(tiles), tmp_path / "once", [Condition("cmu-1"), Condition("os-1")])
    for again in (lambda made: simulate_tiles(made, tmp_path / "twice", [Condition("cmu-1")]), measure_cohort):
        with pytest.raises(ManifestError, match="show places several times, as those of `pathokd simulate` do"):
            again(PackedTiles(tmp_path / "once"))


def test_leftovers_of_killed_runs_go_once_they_are_old(slide: Path, tiles: Path, tmp_path: Path) -> None:
    """Of every killed run a hidden pyramid or shard stayed for good."""
    names = [f".{name}.{age}.part" for name in ("one_original_pale.tif", "shard-000003.tar") for age in ("old", "new")]
    for name in names:
        (tmp_path / name).touch()
        if ".old." in name:
            os.utime(tmp_path / name, (time.time() - LEFTOVER_S - 60,) * 2)
    simulate_slides(find_slides(slide), tmp_path, [Condition(scanner="pale")])
    pack_tiles(tiles.parent / "tiles", tmp_path)
    assert {path.name for path in tmp_path.glob(".*.part")} == {name for name in names if ".new." in name}
