"""`pathokd embed` as users run it: killed at any moment, on a full disk, over hundreds of slides."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from pathokd.embed import verify_embeddings
from pathokd.phantom import write_pyramid
from pathokd.slides.manifest import TileManifest, TileSpec

PHANTOMS = Path(__file__).parents[2] / "tile_data/phantom"
SLIDES = 6
KILLS = 10
KILLS_IN_A_WRITE = 3


class Run:
    """`pathokd embed` of all slides in a process of its own."""

    def __init__(self, teacher: Path, slides: Path, out: Path) -> None:
        command = [sys.executable, "-m", "pathokd.cli", "embed", str(teacher), str(slides), "--out", str(out)]
        self._log = out.with_suffix(".log")
        with open(self._log, "ab") as log:
            self._process = subprocess.Popen([*command, "--mpp", "0.5"], stdout=log, stderr=subprocess.STDOUT)

    def finish(self) -> None:
        assert self._process.wait(timeout=250) == 0, self._log.read_text()

    def kill_after(self, seconds: float) -> bool:
        """Whether it was still running then."""
        try:
            self._process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            self._process.send_signal(signal.SIGKILL)
        return self._process.wait() == -signal.SIGKILL

    def kill_in_a_write(self, out: Path) -> bool:
        """Kill as soon as a slide's temporary file is there."""
        known = set(out.glob(".*.h5.*.part"))
        while self._process.poll() is None:
            names = os.listdir(out) if out.exists() else []
            if any(name.startswith(".") and ".h5." in name and out / name not in known for name in names):
                self._process.send_signal(signal.SIGKILL)
                return self._process.wait() == -signal.SIGKILL
        return False


def contents(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(out.glob("*.h5"))}


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_killed_ten_times_and_resumed_gives_the_same_files(tiny_teacher: Path, tmp_path: Path) -> None:
    slides, rng = tmp_path / "slides.csv", np.random.default_rng(5)
    names = sorted(path.name for path in PHANTOMS.glob("*.tif"))[:SLIDES]
    slides.write_text("path\n" + "".join(f"{PHANTOMS / name}\n" for name in names))
    started = time.monotonic()
    Run(tiny_teacher, slides, tmp_path / "whole").finish()
    total = time.monotonic() - started
    whole = contents(tmp_path / "whole")
    assert len(whole) == SLIDES
    work = sum(pd.read_csv(tmp_path / "whole" / name)["seconds"].sum() for name in ("tiles/summary.csv", "summary.csv"))

    out, killed, caught = tmp_path / "killed", 0, 0
    for attempt in range(KILLS + KILLS_IN_A_WRITE):
        run = Run(tiny_teacher, slides, out)
        if attempt < KILLS_IN_A_WRITE:
            caught += run.kill_in_a_write(out)
        else:  # anywhere from the last imports on
            killed += run.kill_after(max(0.0, 0.9 * (total - work)) + rng.uniform(0, 0.3) * work)
        have = contents(out)
        assert {name: whole[name] for name in have} == have  # no file is ever partial
        if have:
            found = verify_embeddings(out).set_index("slide_id")["status"]
            assert {f"{name}.h5" for name in found.index[found == "ok"]} == have.keys()
        if len(have) == SLIDES:  # too fast: leave it something to do
            for name in rng.choice(sorted(have), 4, replace=False):
                (out / str(name)).unlink()
    assert caught >= 1
    assert killed >= KILLS - 2
    Run(tiny_teacher, slides, out).finish()
    assert contents(out) == whole
    left = {path.relative_to(out) for path in out.rglob("*") if not path.name.endswith(".part")}
    assert left == {path.relative_to(tmp_path / "whole") for path in (tmp_path / "whole").rglob("*")}
    assert verify_embeddings(out)["status"].tolist() == ["ok"] * SLIDES
    print(f"{killed} random kills, {caught} in a write; one run {total:.1f} s, {work:.1f} s of it work")


RSS = """
import json, os, sys
from pathlib import Path
from pathokd.embed import run
from pathokd.models import load_encoder
from pathokd.slides import readers

readers.CACHE_BYTES = 8 * 2**20
one_slide, rss = run._one_slide, []

def recorded(*args, **options):
    outcome = one_slide(*args, **options)
    rss.append(int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20)
    return outcome

run._one_slide = recorded
summary = run.embed_slides(load_encoder(sys.argv[1]), sys.argv[2], sys.argv[3])
assert (summary["status"] == "ok").all(), summary
print(json.dumps(rss))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads /proc")
def test_memory_is_flat_over_500_slides(tiny_teacher: Path, tmp_path: Path) -> None:
    """Once the caches that all slides share are full, nothing grows.

    Ours holds 128 MiB of decoded tiles, which some 50 of these slides fill. OpenSlide's as much, of which a slide that
    we decode ourselves takes one tile for comparison: 512 slides would fill it, so it is made smaller here.
    """
    side, n = 1024, 500
    image = np.random.default_rng(0).integers(60, 250, (side, side, 3), dtype=np.uint8)
    write_pyramid(tmp_path / "slide.tif", image, 0.5)
    frames = []
    for number in range(n):
        link = tmp_path / f"s{number:03d}.tif"
        link.symlink_to(tmp_path / "slide.tif")
        x, y = (grid.ravel() for grid in np.meshgrid(np.arange(0, side, 128), np.arange(0, side, 128)))
        frames.append(pd.DataFrame({"slide_id": link.stem, "path": str(link), "x": x, "y": y}))
    frame = pd.concat(frames).assign(mpp=0.5, mpp_level0=0.5, tile_px=32, tissue_fraction=1.0, flag="")
    TileManifest(frame, TileSpec(tile_px=32)).write(tmp_path / "manifest.parquet")
    done = subprocess.run(
        [sys.executable, "-c", RSS, tiny_teacher, tmp_path / "manifest.parquet", tmp_path / "out"],
        capture_output=True,
        text=True,
        check=True,
    )
    rss = np.array(json.loads(done.stdout))
    assert len(rss) == n
    settled = rss[n // 2 :]
    slope = float(np.polyfit(np.arange(len(settled)), settled, 1)[0])
    print(f"RSS in MiB after slide 1, 50, 100, 200, 300, 500: {rss[[0, 49, 99, 199, 299, 499]].round(1).tolist()}; "
          f"{slope * 1024:.1f} KiB a slide over the last {len(settled)}")  # fmt: skip
    assert abs(slope) < 0.1, rss.tolist()
