"""Targets on disk are what the teacher says of each tile's view; a cut-off run goes on; nothing half is accepted."""

import json
import os
import resource
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch

from pathokd.data.packed import PackedTiles
from pathokd.data.targets import TargetSpec, TargetStore
from pathokd.data.views import d4, orientation, resize
from pathokd.data.wsi import WsiTiles
from pathokd.embed import targets
from pathokd.embed.targets import samples, write_targets
from pathokd.errors import StoreError
from pathokd.models import Features, Teacher, TeacherSpec, build_teacher
from pathokd.slides.manifest import TileManifest
from pathokd.types import Rgb


class Fails(PackedTiles):
    """Packed tiles whose reading stops after some tiles, and which counts them."""

    def __init__(self, folder: Path, after: int = 1000) -> None:
        super().__init__(folder)
        self.left, self.count = after, 0

    def read(self, row: int) -> Rgb:
        self.left, self.count = self.left - 1, self.count + 1
        if self.left < 0:
            raise RuntimeError("the power went off")
        return super().read(row)


@pytest.fixture(scope="module")
def teacher(tiny_teacher: Path) -> Teacher:
    return build_teacher(TeacherSpec(str(tiny_teacher)))


def said(teacher: Teacher, source: PackedTiles) -> Features:
    """What the teacher says of all tiles in one batch, each resized and turned here."""
    keys = source.index["key"]
    views = [d4(resize(source.read(row), 32), orientation(keys[row])) for row in range(len(source))]
    features: Features = teacher(torch.from_numpy(np.stack(views)).movedim(-1, 1))
    return features


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_what_is_stored_is_what_the_teacher_says(teacher: Teacher, packed: Path, tmp_path: Path) -> None:
    source = PackedTiles(packed)
    wanted = said(teacher, source)
    mean = wanted.patches.mean(1, keepdim=True)
    grids = {"cls": None, "cls+mean": mean, "pooled": wanted.patches, "patches": wanted.patches}
    for tokens, patches in grids.items():
        spec = TargetSpec(tokens, dtype="fp32")  # type: ignore[arg-type]
        store = write_targets(teacher, source, tmp_path / tokens, spec, batch_size=7)
        np.testing.assert_allclose(np.load(tmp_path / tokens / "cls.npy"), wanted.cls, atol=2e-5)
        assert (tmp_path / tokens / "patches.npy").exists() == (patches is not None)
        if patches is not None:
            np.testing.assert_allclose(np.load(tmp_path / tokens / "patches.npy"), patches, atol=2e-5)
        assert store.header["facts"]["lost"]["cls"] < 1e-5
    codec = store.codec()
    for name, kept in (("cls", wanted.cls), ("patches", wanted.patches.flatten(0, 1))):
        np.testing.assert_allclose(codec[f"{name}.target_mean"], kept.mean(0), atol=1e-5)
        np.testing.assert_allclose(codec[f"{name}.target_std"], kept.std(0), rtol=1e-4)
    assert {"weights_sha256", "tiles", "view_px", "precision"} <= store.settings.keys()
    assert store.settings["weights_sha256"] == teacher.encoder.weights_sha256


@pytest.mark.parametrize(("pca", "most"), [(None, 0.01), (24, 0.01), (12, 0.5)])
def test_int8_and_pca_lose_little_and_say_how_much(
    pca: int | None, most: float, teacher: Teacher, packed: Path, tmp_path: Path
) -> None:
    store = write_targets(teacher, PackedTiles(packed), tmp_path / "t", TargetSpec("patches", pca, "int8"))
    lost = store.header["facts"]["lost"]
    assert 1e-4 < lost["cls"] < 0.01
    assert 1e-4 < lost["patches"] < most
    assert np.load(tmp_path / "t/patches.npy").dtype == np.int8


def test_a_run_that_was_cut_off_goes_on_to_the_same_bytes(teacher: Teacher, packed: Path, tmp_path: Path) -> None:
    spec = TargetSpec("patches", 8, "int8")
    whole = write_targets(teacher, PackedTiles(packed), tmp_path / "whole", spec, batch_size=1)
    out = tmp_path / "cut"
    for after in (20, 48 + 8, 44):  # while sampling, before the first commit, between two
        with pytest.raises(RuntimeError, match="power"):
            write_targets(teacher, Fails(packed, after), out, spec, batch_size=1)
        with pytest.raises(StoreError, match="unfinished"):
            TargetStore(out)
    with open(out / ".parts/patches.npy", "ab") as file:
        file.write(b"half a row")
    rest = Fails(packed)
    write_targets(teacher, rest, out, spec, batch_size=1)
    assert rest.count < 48 + 16  # all that was committed is kept; the check at the end reads some again
    assert files(out) == files(tmp_path / "whole")
    assert len(whole) == 48


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no flock")
def test_a_second_process_does_not_cut_off_what_the_first_writes(
    teacher: Teacher, packed: Path, tmp_path: Path
) -> None:
    """A job submitted twice, one of them cancelled: rows that were written and not committed stayed zero for good."""
    out, refused = tmp_path / "t", []

    class Twice(PackedTiles):
        def read(self, row: int) -> Rgb:
            if row == 40 and not refused:
                with pytest.raises(StoreError, match="Another process is computing the targets in"):
                    write_targets(teacher, PackedTiles(packed), out, TargetSpec("patches"), batch_size=1)
                refused.append(row)
            return super().read(row)

    write_targets(teacher, Twice(packed), out, TargetSpec("patches"), batch_size=1)
    assert refused
    write_targets(teacher, PackedTiles(packed), tmp_path / "whole", TargetSpec("patches"), batch_size=1)
    assert files(out) == files(tmp_path / "whole")


def test_committed_rows_that_are_gone_are_not_made_up(teacher: Teacher, packed: Path, tmp_path: Path) -> None:
    """As after deleting the large file to free some space."""
    out = tmp_path / "t"
    with pytest.raises(RuntimeError, match="power"):
        write_targets(teacher, Fails(packed, 40), out, TargetSpec("patches"), batch_size=1)
    path = out / ".parts/patches.npy"
    os.truncate(path, path.stat().st_size * 3 // 4)
    with pytest.raises(StoreError, match=r"patches\.npy holds \d+ bytes, 32 tiles are committed .* with --overwrite"):
        write_targets(teacher, PackedTiles(packed), out, TargetSpec("patches"), batch_size=1)


@pytest.mark.parametrize("name", ["header.json", "progress.safetensors", "codec.safetensors"])
def test_a_damaged_file_of_an_unfinished_run_is_one_sentence(
    teacher: Teacher, packed: Path, tmp_path: Path, name: str
) -> None:
    with pytest.raises(RuntimeError, match="power"):
        write_targets(teacher, Fails(packed, 40), tmp_path, TargetSpec("patches"), batch_size=1)
    (tmp_path / ".parts" / name).write_bytes(b"")
    with pytest.raises(StoreError, match=rf"\.parts/{name} is damaged .* with --overwrite"):
        write_targets(teacher, PackedTiles(packed), tmp_path, TargetSpec("patches"), batch_size=1)


@pytest.mark.parametrize("dtype", ["fp32", "int8"])
def test_nan_of_the_teacher_is_told_at_its_tile(
    teacher: Teacher, packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: Any
) -> None:
    real, calls = Teacher.forward, []

    def forward(self: Teacher, pixels: torch.Tensor) -> Features:
        out = real(self, pixels)
        calls.append(len(pixels))
        return out._replace(cls=out.cls * float("nan")) if len(calls) == 5 else out

    monkeypatch.setattr(Teacher, "forward", forward)
    key = PackedTiles(packed).index["key"][4]
    with pytest.raises(StoreError, match=f"says NaN or infinity of the tile {key}"):
        write_targets(teacher, PackedTiles(packed), tmp_path, TargetSpec("cls", dtype=dtype), batch_size=1)
    assert len(calls) == 5


def test_a_run_cut_off_while_it_finishes_goes_on(
    teacher: Teacher, packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = TargetSpec("patches")
    whole = write_targets(teacher, PackedTiles(packed), tmp_path / "whole", spec)
    real = os.replace

    def replace(source: Any, target: Any) -> None:
        if Path(target).name == "patches.npy":
            raise RuntimeError("the power went off")
        real(source, target)

    monkeypatch.setattr(targets.os, "replace", replace)
    with pytest.raises(RuntimeError, match="power"):
        write_targets(teacher, PackedTiles(packed), tmp_path / "cut", spec)
    monkeypatch.undo()
    assert (tmp_path / "cut/cls.npy").exists()
    with pytest.raises(StoreError, match="unfinished"):
        TargetStore(tmp_path / "cut")
    write_targets(teacher, PackedTiles(packed), tmp_path / "cut", spec)
    assert files(tmp_path / "cut") == files(whole.folder)


def test_other_settings_are_refused_by_name_and_overwritten_on_demand(
    teacher: Teacher, packed: Path, tmp_path: Path
) -> None:
    source, out = PackedTiles(packed), tmp_path / "t"
    write_targets(teacher, source, out, TargetSpec("patches"))
    before = (out / "patches.npy").stat().st_mtime_ns
    write_targets(teacher, source, out, TargetSpec("patches"))
    assert (out / "patches.npy").stat().st_mtime_ns == before
    with pytest.raises(StoreError, match=r"dtype = 'fp16', this run asks for 'fp32': pass --overwrite"):
        write_targets(teacher, source, out, TargetSpec("patches", dtype="fp32"))
    with pytest.raises(StoreError, match="view_px = 32, this run asks for 64"):
        write_targets(teacher, source, out, TargetSpec("patches", view_px=64))
    with pytest.raises(RuntimeError, match="power"):
        write_targets(teacher, Fails(packed, 3), tmp_path / "cut", TargetSpec("patches"))
    with pytest.raises(StoreError, match="tokens = 'patches', this run asks for 'cls'"):
        write_targets(teacher, source, tmp_path / "cut", TargetSpec("cls"))
    write_targets(teacher, source, out, TargetSpec("cls", dtype="fp32"), overwrite=True)
    assert {path.name for path in out.iterdir()} == {"cls.npy", "codec.safetensors", "header.json"}


def test_what_a_killed_overwrite_left_is_not_taken_for_ones_own(
    teacher: Teacher, packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Folders are removed in no order: the header may go before the rows that it speaks of."""

    def kill(folder: Path, **_: Any) -> None:
        (folder / "header.json").unlink()
        raise KeyboardInterrupt

    spec = TargetSpec("cls", dtype="fp32", view_px=64)
    write_targets(teacher, PackedTiles(packed), tmp_path / "whole", spec, batch_size=1)
    with pytest.raises(RuntimeError, match="power"):
        write_targets(teacher, Fails(packed, 40), tmp_path / "cut", TargetSpec("cls", dtype="fp32"), batch_size=1)
    with monkeypatch.context() as patch:
        patch.setattr(targets.shutil, "rmtree", kill)
        with pytest.raises(KeyboardInterrupt):
            write_targets(teacher, PackedTiles(packed), tmp_path / "cut", spec, batch_size=1, overwrite=True)
    write_targets(teacher, PackedTiles(packed), tmp_path / "cut", spec, batch_size=1)
    assert files(tmp_path / "cut") == files(tmp_path / "whole")


def test_rows_that_are_not_the_teachers_are_found(teacher: Teacher, packed: Path, tmp_path: Path) -> None:
    """A shift by one row, as a botched copy would leave it: the same numbers, each beside another tile."""
    source = PackedTiles(packed)
    write_targets(teacher, source, tmp_path / "t", TargetSpec("cls", dtype="fp32"))
    np.save(tmp_path / "t/cls.npy", np.roll(np.load(tmp_path / "t/cls.npy"), 1, axis=0))
    with pytest.raises(StoreError, match=r"cls tokens in .* are not what the teacher says of 16 tiles"):
        write_targets(teacher, source, tmp_path / "t", TargetSpec("cls", dtype="fp32"))


def test_a_disk_that_is_too_small_is_told_before_the_start(
    teacher: Teacher, packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(targets.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(9, 8, 1))  # type: ignore[attr-defined]
    with pytest.raises(StoreError, match=r"take 0\.0 GB and .* has 0\.0 GB free: choose another folder, or store less"):
        write_targets(teacher, PackedTiles(packed), tmp_path / "new/t", TargetSpec("cls"))
    assert not (tmp_path / "new").exists()


def test_a_disk_that_fills_up_is_one_sentence_and_no_loss(teacher: Teacher, packed: Path, tmp_path: Path) -> None:
    """A limit on the size of files gives the same error from the same call as a full disk."""
    spec = TargetSpec("patches", dtype="fp32")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, hard))
    try:
        with pytest.raises(StoreError, match=r"Cannot write patches\.npy: File too large\. Free some space and run"):
            write_targets(teacher, PackedTiles(packed), tmp_path / "t", spec, batch_size=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    write_targets(teacher, PackedTiles(packed), tmp_path / "t", spec, batch_size=1)
    write_targets(teacher, PackedTiles(packed), tmp_path / "whole", spec, batch_size=1)
    assert files(tmp_path / "t") == files(tmp_path / "whole")


@pytest.mark.parametrize("finished", [True, False])
def test_targets_of_another_slide_of_the_same_name_are_refused(
    teacher: Teacher,
    make_slide: Callable[..., Path],
    make_manifest: Callable[[list[Path]], TileManifest],
    tmp_path: Path,
    finished: bool,
) -> None:
    """As with the slides of a cohort and their stain-normalised copies in another folder."""
    path, out = make_slide("a", seed=1), tmp_path / "t"
    if finished:
        write_targets(teacher, WsiTiles(make_manifest([path])), out)
    else:
        source = WsiTiles(make_manifest([path]))
        source.read = Mock(side_effect=RuntimeError("the power went off"))
        with pytest.raises(RuntimeError, match="power"):
            write_targets(teacher, source, out)
    (tmp_path / "moved").mkdir()
    moved = WsiTiles(make_manifest([path.rename(tmp_path / "moved/a.tiff")]))
    other = WsiTiles(make_manifest([make_slide("a", seed=2)]))
    message = "computed on another slide a, of the same name and tiles"
    with pytest.raises(StoreError, match=message):
        write_targets(teacher, other, out)
    store = write_targets(teacher, moved, out)
    store.check_tiles(moved)
    with pytest.raises(StoreError, match=message):
        store.check_tiles(other)


def test_more_directions_than_dimensions_are_refused_before_the_teacher_runs(
    teacher: Teacher, packed: Path, tmp_path: Path
) -> None:
    source = Fails(packed)
    with pytest.raises(ValueError, match="pca must be at most 24, the width of this teacher's tokens, got 25"):
        write_targets(teacher, source, tmp_path / "t", TargetSpec("patches", pca=25))
    assert source.count == 0
    assert not (tmp_path / "t").exists()


def test_a_bf16_teacher_is_another_one(tiny_teacher: Path, packed: Path, tmp_path: Path) -> None:
    source = PackedTiles(packed)
    store = write_targets(build_teacher(TeacherSpec(str(tiny_teacher), "bf16")), source, tmp_path / "t", TargetSpec())
    assert json.loads((tmp_path / "t/header.json").read_text())["settings"]["precision"] == "bf16"
    with pytest.raises(StoreError, match="precision = 'bf16', this run asks for 'fp32'"):
        write_targets(build_teacher(TeacherSpec(str(tiny_teacher))), source, store.folder, TargetSpec())


def test_the_sample_is_small_beside_the_tiles() -> None:
    spec = TargetSpec("patches", 8)
    assert [samples(spec, n) for n in (48, 1000, 64_000, 10**7)] == [48, 256, 2000, 4096]
    assert samples(TargetSpec("patches"), 1000) == 0
