"""Tiles per second of `pack_tiles` against a bare two-thread OpenSlide loop over the same tiles.

Each run is a fresh process, so OpenSlide's own cache is cold, and the slide is dropped from the page cache before it.
Rounds alternate; ratios are taken within a round, and their median is the figure. `pack_tiles` also encodes JPEG and
writes shards and index to the disk, with fsync; the bare loop drops its tiles.

Two cases on the slide of 0.499 um/px: at 0.5 its pixels are taken as they are, which makes reading as cheap as it gets
and encoding weigh most; at 1.0 each tile reads 448 px and halves them, as a slide scanned at 40x does for 0.5 um/px
(tiles overlap by half there, so that the run is long enough to time).
"""

import os
from pathlib import Path
from statistics import median
from typing import Any

import pytest

from pathokd.slides.manifest import TileManifest, TileSpec
from pathokd.slides.sources import find_slides
from pathokd.slides.tile import tile_slides

pytestmark = [pytest.mark.bench, pytest.mark.timeout(3600)]

ROUNDS = int(os.environ.get("PATHOKD_BENCH_ROUNDS", "7"))
TILES = int(os.environ.get("PATHOKD_BENCH_TILES", "0"))
"""At most this many tiles; 0 takes all."""


def drop_from_page_cache(path: Path) -> None:
    """Let the kernel forget the file's pages, where it can be asked to (not on macOS and Windows)."""
    if not hasattr(os, "posix_fadvise"):
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(handle)


@pytest.mark.parametrize(("mpp", "stride_px"), [(0.5, 224), (1.0, 112)])
def test_pack_keeps_nine_tenths_of_a_bare_loop(
    mpp: float, stride_px: int, bench_slide: Path, tmp_path: Path, run_script: Any, publish: Any, markdown: Any
) -> None:
    spec = TileSpec(mpp=mpp, tile_px=224, stride_px=stride_px)
    tile_slides(find_slides(str(bench_slide)), spec, tmp_path / "tiles")
    manifest = TileManifest.read(tmp_path / "tiles" / "manifest.parquet")
    frame = manifest.frame.head(TILES) if TILES else manifest.frame
    TileManifest(frame, manifest.spec).write(tmp_path / "manifest.parquet")
    job = {"manifest": str(tmp_path / "manifest.parquet"), "packed": str(tmp_path / "packed")}
    names = ["read_openslide", "read_pack"]
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    for attempt in range(ROUNDS):
        for name in names if attempt % 2 == 0 else reversed(names):
            drop_from_page_cache(bench_slide)
            runs[name].append(run_script(name, job, tmp_path))

    speeds = {name: [facts["tiles"] / facts["seconds"] for facts in rounds] for name, rounds in runs.items()}
    ratios = [a / b for a, b in zip(speeds["read_pack"], speeds["read_openslide"], strict=True)]
    labels = {
        "read_openslide": "bare OpenSlide loop, 2 threads",
        "read_pack": "`pack_tiles`, 2 threads, JPEG shards written",
    }
    shown = {"read_openslide": "1", "read_pack": f"{median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})"}
    rows = [
        [label, f"{median(own):.1f} ({min(own):.1f} to {max(own):.1f})", shown[name]]
        for (name, label), own in zip(labels.items(), speeds.values(), strict=True)
    ]
    title = f"Reading: {bench_slide.name}, {len(frame)} tiles of 224 px at {mpp} um/px, {ROUNDS} rounds"
    figures = {
        "slide": bench_slide.name,
        "mpp": mpp,
        "tiles": len(frame),
        "rounds": ROUNDS,
        "tiles_per_s": speeds,
        "ratio": ratios,
        "ratio_median": median(ratios),
    }
    header = ["reader", "tiles/s, median (range)", "ratio, median (range)"]
    publish(f"reading_{mpp}", figures, f"{title}\n\n{markdown(header, rows)}")
    for rounds in runs.values():
        assert all(facts["tiles"] == len(frame) for facts in rounds)
    assert median(ratios) >= 0.90
