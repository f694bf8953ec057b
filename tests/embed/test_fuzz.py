"""Damaged and hostile inputs: an error of ours or a failed row, never a crash, a hang, or a file where none belongs."""

import csv
import hashlib
import io
import os
import string
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import pytest
import tifffile
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pathokd.embed import embed_slides, verify_embeddings
from pathokd.errors import ManifestError, PathokdError, StoreError
from pathokd.models import Encoder
from pathokd.phantom import write_pyramid
from pathokd.slides import TileSpec, find_slides, tile_slides
from pathokd.slides.manifest import TileManifest

WORKER = Path(__file__).with_name("fuzz_worker.py")
MakeSlide = Callable[..., Path]
MakeManifest = Callable[[list[Path]], TileManifest]


def mutated(data: bytes, rng: np.random.Generator) -> bytes:
    """Cut short, bytes changed anywhere or where the structure is, a stretch of zeros, or a piece moved."""
    out = bytearray(data)
    kind, n = rng.integers(5), len(data)
    if kind == 0:
        return data[: int(rng.integers(n))]
    if kind == 3:
        start = int(rng.integers(n))
        out[start : start + 4096] = bytes(min(4096, n - start))
    elif kind == 4:
        start, end = sorted(rng.integers(n, size=2).tolist())
        return data[:start] + data[end:]
    else:
        edges = np.r_[:2048, max(0, n - 4096) : n] if kind == 1 else np.arange(n)
        for place in rng.choice(edges[edges < n], size=int(rng.integers(1, 24))):
            out[place] = int(rng.integers(256))
    return bytes(out)


def outcomes(kind: str, folder: Path, names: list[str], batch: int, timeout: float) -> dict[str, str]:
    """What came of every file; a crash or hang is the outcome of the file it came with, and the rest goes on."""
    found: dict[str, str] = {}
    while todo := [name for name in names if name not in found][:batch]:
        (folder / "todo.txt").write_text(" ".join(todo))
        command = [sys.executable, str(WORKER), kind, str(folder)]
        try:
            done = subprocess.run(command, capture_output=True, timeout=timeout, check=False)
            said, end = done.stdout, f"CRASHED {done.returncode}: {done.stderr.decode()[-600:]}"
        except subprocess.TimeoutExpired as error:
            said, end = error.stdout or b"", "HUNG"
        for line in said.decode().splitlines():
            name, _, outcome = line.partition("\t")
            found[name] = outcome or end
        if not said:
            raise AssertionError(end)
    return found


def bad(found: dict[str, str]) -> dict[str, str]:
    return {name: what for name, what in found.items() if what.startswith(("RAISED", "CRASHED", "HUNG"))}


def snapshot(folder: Path) -> dict[str, str]:
    return {
        str(path): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
        for path in sorted(folder.rglob("*"))
    }


def originals(folder: Path) -> list[bytes]:
    """Slides of three kinds: plain and Aperio-style JPEG pyramids, and an OME-TIFF."""
    rng = np.random.default_rng(0)
    blobs = cv2.resize(rng.integers(60, 250, (24, 24, 3), dtype=np.uint8), (384, 384))
    write_pyramid(folder / "plain.tif", blobs, 0.5, tile_px=64)
    write_pyramid(folder / "aperio.svs", blobs, 0.5, tile_px=64, flavour="aperio", objective=20)
    tifffile.imwrite(
        folder / "ome.tif",
        blobs,
        ome=True,
        tile=(64, 64),
        photometric="rgb",
        compression="deflate",
        metadata={"axes": "YXS", "PhysicalSizeX": 0.5, "PhysicalSizeY": 0.5},
    )
    return [(folder / name).read_bytes() for name in ("plain.tif", "aperio.svs", "ome.tif")]


@pytest.mark.slow
def test_damaged_slides_are_rows(tmp_path: Path) -> None:
    files, rng = originals(tmp_path), np.random.default_rng(1)
    folder = tmp_path / "fuzz"
    folder.mkdir()
    names = [f"s{i:03d}.{('tif', 'svs', 'ome.tif')[i % 3]}" for i in range(120)]
    for i, name in enumerate(names):
        (folder / name).write_bytes(mutated(files[i % 3], rng))
    before = snapshot(tmp_path)
    found = outcomes("slides", folder, names, batch=40, timeout=120)
    assert bad(found) == {}
    assert sum(what.startswith("embed: ok") for what in found.values()) >= 10  # some damage is bearable
    assert sum("failed" in what or what.startswith("tile:") for what in found.values()) >= 10
    after = snapshot(tmp_path)
    assert {path: after[path] for path in before} == before
    assert all("/fuzz/out/" in path or path.endswith(("/out", "todo.txt")) for path in after.keys() - before.keys())
    assert not list(tmp_path.rglob("*.part"))


@pytest.mark.slow
def test_damaged_features_are_refused_or_read(
    encoder: Encoder, make_slide: MakeSlide, make_manifest: MakeManifest, tmp_path: Path
) -> None:
    embed_slides(encoder, make_manifest([make_slide("a", seed=1, corrupt=True)]), tmp_path / "out")
    whole, rng = (tmp_path / "out" / "a.h5").read_bytes(), np.random.default_rng(2)
    folder = tmp_path / "fuzz"
    folder.mkdir()
    names = [f"f{i:03d}.h5" for i in range(120)]
    for name in names:
        (folder / name).write_bytes(mutated(whole, rng))
    before = snapshot(folder)
    found = outcomes("features", folder, names, batch=60, timeout=60)
    assert bad(found) == {}
    assert {path: digest for path, digest in snapshot(folder).items() if path in before} == before
    # A file is accepted only if the damage changed nothing.
    sound = {name for name, what in found.items() if what.endswith(" ok")}
    assert sound == {name for name in names if (folder / name).read_bytes() == whole}
    assert len(sound) < 60


NASTY = st.text(alphabet=st.characters(codec="utf-8"), max_size=12) | st.sampled_from(
    [
        "../../x",
        "/etc/passwd",
        "a\0b",
        "~nobody7/x.svs",
        "..",
        ".",
        "é",
        "e\u0301",
        "\u202e",
        "x" * 300,
        "nan",
        "-1",
        "a.svs",
    ]
)
HEADERS = st.lists(
    st.sampled_from(["slide_id", "path", "mpp", "wsi", "label_map", "stain", "x", "", " path "]), max_size=5
)


@given(header=HEADERS, rows=st.lists(st.lists(NASTY, max_size=6), max_size=4), quoting=st.sampled_from([0, 1, 3]))
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_slide_lists(tmp_path: Path, header: list[str], rows: list[list[str]], quoting: int) -> None:
    text = io.StringIO()
    writer = csv.writer(text, quoting=quoting, escapechar="\\")
    writer.writerows(row for row in [header, *rows] if row != [""])  # which cannot be written without quotes
    check_list(tmp_path, text.getvalue().encode())


@given(raw=st.binary(max_size=200) | st.binary(max_size=60).map(lambda end: b"slide_id,path\na,b.svs\n" + end))
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_slide_lists_of_any_bytes(tmp_path: Path, raw: bytes) -> None:
    check_list(tmp_path, raw)


def check_list(folder: Path, raw: bytes) -> None:
    path = folder / "list.csv"
    path.write_bytes(raw)
    try:
        sources = find_slides(path)
    except (PathokdError, ValueError):
        return
    ids = [source.slide_id.casefold() for source in sources]
    assert len(set(ids)) == len(ids)
    out = folder / "out"
    for source in sources:
        assert (out / f"{source.slide_id}.h5").resolve().parent == out.resolve()
        assert len(f"{source.slide_id}.parquet".encode()) < 255
    # None of these files exists: each is a failed row.
    summary = tile_slides(sources, TileSpec(), out, overwrite=True)
    assert set(summary["status"]) == {"failed"}
    assert {item.name for item in folder.iterdir()} <= {"list.csv", "out"}


@pytest.mark.parametrize("slide_id", ["../../x", "/tmp/x", "a/b", "..", ".x", "", "a\0b", "a\nb", "x" * 300, "a\\b"])
def test_a_manifest_cannot_write_elsewhere(
    slide_id: str, encoder: Encoder, make_slide: MakeSlide, make_manifest: MakeManifest, tmp_path: Path
) -> None:
    manifest = make_manifest([make_slide("a", seed=1)])
    manifest.frame["slide_id"] = slide_id
    before = snapshot(tmp_path)
    with pytest.raises(ManifestError, match="slide_id"):
        embed_slides(encoder, manifest, tmp_path / "out" / "deep")
    assert snapshot(tmp_path) == before


def test_a_summary_cannot_lead_elsewhere(tmp_path: Path) -> None:
    row = {"slide_id": "../x", "path": "", "status": "ok", "n_tiles": 1, "n_unreadable": 0, "message": ""}
    pd.DataFrame([row]).to_csv(tmp_path / "summary.csv")
    with pytest.raises(StoreError, match=r"not one of .*slide_id '\.\./x' cannot name a file"):
        verify_embeddings(tmp_path)


ODD_NAMES = [
    "schön ☃ \u202e.tif".encode(),
    b"new\nline.tif",
    b"not\xffutf8.tif",
    (string.ascii_letters * 5)[:240].encode() + b".tif",
]


@pytest.mark.parametrize("name", ODD_NAMES)
def test_odd_file_names(name: bytes, encoder: Encoder, make_slide: MakeSlide, tmp_path: Path) -> None:
    made = make_slide("plain", seed=1)
    folder = tmp_path / "odd"
    folder.mkdir()
    os.rename(os.fsencode(made), os.path.join(os.fsencode(folder), name))
    if b"\n" in name or b"\xff" in name:
        with pytest.raises(ManifestError, match="rename it"):
            find_slides(folder)
        return
    sources = find_slides(folder)
    tile_slides(sources, TileSpec(mpp=0.5, tile_px=56, min_tissue=0.0), tmp_path / "out" / "tiles")
    assert embed_slides(encoder, tmp_path / "out" / "tiles", tmp_path / "out")["status"].tolist() == ["ok"]
    assert verify_embeddings(tmp_path / "out")["status"].tolist() == ["ok"]


def test_equal_names_and_symlinks_are_slides_of_their_own(
    encoder: Encoder, make_slide: MakeSlide, tmp_path: Path
) -> None:
    first, second = make_slide("one", seed=1), make_slide("two", seed=2)
    folder = tmp_path / "slides"
    for name, target in (("x/s.tiff", first), ("y/s.tiff", second), ("z/S.TIFF", first)):
        (folder / name).parent.mkdir(parents=True)
        (folder / name).symlink_to(target)
    out = tmp_path / "out"
    tile_slides(find_slides(folder), TileSpec(mpp=0.5, tile_px=56, min_tissue=0.0), out / "tiles")
    summary = embed_slides(encoder, out / "tiles", out)
    assert summary["status"].tolist() == ["ok"] * 3
    assert len({name.casefold() for name in summary["slide_id"]}) == 3
    assert len(list(out.glob("*.h5"))) == 3
    assert first.is_file()
    assert not first.is_symlink()
