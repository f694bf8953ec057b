"""What the benchmarks share: the slide, facts about the machine, the runner of contenders, and where figures go."""

import datetime
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pathokd.data.pack import pack_tiles
from pathokd.data.packed import PackedTiles
from pathokd.files import write_json
from pathokd.processes import usable_cores
from pathokd.slides.manifest import TileManifest, TileSpec
from pathokd.slides.sources import find_slides
from pathokd.slides.tile import tile_slides

CONTENDERS = Path(__file__).parent / "contenders"
REAL_SLIDE = "wsi_cmu1/CMU-1_section2_20x.tif"
PACKAGES = ("pathokd", "torch", "timm", "lightning", "openslide-python", "openslide-bin", "opencv-python-headless")

Contender = Callable[[int], dict[str, Any]]
Run = Callable[[Sequence[str], Path], dict[str, Any]]
Publish = Callable[[str, dict[str, Any], str], None]


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Two at a time would measure each other."""
    if hasattr(item.config, "workerinput"):
        pytest.fail("A benchmark has the machine to itself: leave out -n.", pytrace=False)


@pytest.fixture(scope="session")
def bench_slide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """CMU-1 section 2 of PATHOKD_REAL_DATA, or, without it, a phantom of about 400 tiles."""
    folder = os.environ.get("PATHOKD_REAL_DATA")
    if folder:
        return Path(folder) / REAL_SLIDE
    from pathokd.phantom import make_scene, render, write_pyramid
    from pathokd.phantom.scanner import get_scanner

    scanner = get_scanner("S50")
    scene = make_scene(1, 1000.0, margin_um=20.0, region_um=250.0, mpp=scanner.mpp)
    # Copies side by side: growing one scene of this size would take minutes, and speed does not depend on content.
    image = np.tile(render(scene, "HE", scanner), (3, 3, 1))
    return write_pyramid(tmp_path_factory.mktemp("slide") / "phantom.tif", image, scanner.mpp)


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "none"
    return found


def machine() -> dict[str, Any]:
    """Device, versions, date and how busy the machine was when the benchmark began."""
    return {
        "device": f"CPU, {_cpu()}, {usable_cores()} cores",
        "omp_num_threads": os.environ.get("OMP_NUM_THREADS", "default"),
        "load_average_before": round(os.getloadavg()[0], 2),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "versions": _versions(),
    }


@pytest.fixture(scope="session")
def run_contender() -> Run:
    """Run one contender in a fresh process; returns what it wrote, and the wall time of the whole command."""

    def run(command: Sequence[str], out: Path) -> dict[str, Any]:
        out.unlink(missing_ok=True)
        env = {**os.environ, "PYTHONPATH": str(CONTENDERS), "LIGHTLY_TRAIN_EVENTS_DISABLED": "1"}
        start = time.perf_counter()
        done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
        wall = time.perf_counter() - start
        if done.returncode or not out.is_file():
            pytest.fail(f"{' '.join(command)}\nexit {done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
        return {**json.loads(out.read_text()), "wall_s": wall}

    return run


@pytest.fixture(scope="session")
def run_script(run_contender: Run) -> Callable[[str, dict[str, Any], Path], dict[str, Any]]:
    """Run `contenders/NAME.py` on a job, with this interpreter."""

    def run(name: str, job: dict[str, Any], folder: Path) -> dict[str, Any]:
        out = folder / f"{name}.out.json"
        path = folder / f"{name}.job.json"
        write_json(path, {**job, "out": str(out)})
        return run_contender([sys.executable, str(CONTENDERS / f"{name}.py"), str(path)], out)

    return run


@pytest.fixture(scope="session")
def cut_tiles() -> Callable[[Path, Path, TileSpec, int], PackedTiles]:
    """Cut a slide into FOLDER/tiles, pack the first tiles in FOLDER/packed, and decode those into FOLDER/tiles.npy."""

    def cut(slide: Path, folder: Path, spec: TileSpec, n: int) -> PackedTiles:
        tile_slides(find_slides(str(slide)), spec, folder / "tiles")
        manifest = TileManifest.read(folder / "tiles" / "manifest.parquet")
        TileManifest(manifest.frame.head(n), manifest.spec).write(folder / "some" / "manifest.parquet")
        pack_tiles(folder / "some", folder / "packed")
        packed = PackedTiles(folder / "packed")
        np.save(folder / "tiles.npy", np.stack([packed.read(row) for row in range(len(packed))]))
        return packed

    return cut


@pytest.fixture(scope="session")
def in_rounds() -> Callable[[dict[str, Contender], int], dict[str, list[dict[str, Any]]]]:
    """Run every contender once a round, in rotating order; each is told the round."""

    def run(contenders: dict[str, Contender], rounds: int) -> dict[str, list[dict[str, Any]]]:
        runs: dict[str, list[dict[str, Any]]] = {name: [] for name in contenders}
        names = list(contenders)
        for attempt in range(rounds):
            shift = attempt % len(names)
            for name in [*names[shift:], *names[:shift]]:
                runs[name].append(contenders[name](attempt))
        return runs

    return run


@pytest.fixture
def publish(capsys: pytest.CaptureFixture[str]) -> Publish:
    """Print a table, past pytest's capture, and write the figures to PATHOKD_BENCH_OUT/NAME.json if it is set."""
    facts = machine()

    def write(name: str, figures: dict[str, Any], table: str) -> None:
        versions = ", ".join(f"{package} {version}" for package, version in facts["versions"].items())
        with capsys.disabled():
            print(f"\n\n{table}\n\n{facts['device']}; {versions}; {facts['date']}; "
                  f"load average before {facts['load_average_before']}\n")  # fmt: skip
        folder = os.environ.get("PATHOKD_BENCH_OUT")
        if folder:
            write_json(Path(folder) / f"{name}.json", {"machine": facts, **figures})

    return write


@pytest.fixture(scope="session")
def markdown() -> Callable[[Sequence[str], Iterable[Sequence[str]]], str]:
    """A Markdown table from a header and rows of strings."""

    def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
        lines = [header, ["---"] * len(header), *rows]
        return "\n".join(f"| {' | '.join(line)} |" for line in lines)

    return table
