"""Slides on a real Ray cluster of two nodes: the same files as without it, whatever dies on the way."""

import contextlib
import errno
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

from pathokd.embed import Embedder, embed_slides
from pathokd.embed.engines import open_engine
from pathokd.embed.ray_engine import ATTEMPTS, RayEngine
from pathokd.errors import PathokdError, StoreError
from pathokd.files import atomic_path
from pathokd.models import Encoder
from pathokd.progress import Bars
from pathokd.slides import TileSpec, find_slides, tile_slides
from pathokd.slides.manifest import TileManifest

TILE_DATA = Path(__file__).parents[2] / "tile_data"
TEACHER = str(TILE_DATA / "teacher")
TILES_PER_SLIDE = 24
BATCH = 4
"""Of every run here: last bits depend on the size of a batch."""


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """As many threads for the model as an actor with one CPU has."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def tiles(tmp_path_factory: pytest.TempPathFactory) -> TileManifest:
    """Some tiles of six phantom slides."""
    folder = tmp_path_factory.mktemp("tiles")
    tile_slides(find_slides(sorted(map(str, (TILE_DATA / "phantom").glob("*.tif")))[:6]), TileSpec(), folder)
    found = TileManifest.read(folder / "manifest.parquet")
    return TileManifest(found.frame.groupby("slide_id", sort=False).head(TILES_PER_SLIDE), found.spec)


@pytest.fixture(scope="module")
def local(tiles: TileManifest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the local engine makes of them."""
    folder = tmp_path_factory.mktemp("local")
    with one_thread():
        embed_slides(TEACHER, tiles, folder, workers=1, batch_size=BATCH)
    return folder


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """Two nodes of one CPU each, found by RAY_ADDRESS as a user's would be."""
    pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    nodes.add_node(num_cpus=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_ADDRESS", nodes.address)
        yield nodes
    nodes.shutdown()


def assert_same(folder: Path, reference: Path) -> None:
    """Every file of embeddings, byte by byte."""
    wanted = {path.name: path.read_bytes() for path in reference.glob("*.h5")}
    assert {path.name: path.read_bytes() for path in folder.glob("*.h5")} == wanted
    assert not list(folder.glob(".*"))  # nothing half-written


def on_first_file(folder: Path, act: Callable[[], None]) -> threading.Thread:
    """Act, in a thread, as soon as a run has written one slide."""

    def wait() -> None:
        while not any(folder.glob("*.h5")):
            time.sleep(0.01)
        act()

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    return thread


def pids() -> list[int]:
    return [int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit()]


def title(pid: int) -> bytes:
    """Command line of a process, which Ray sets to what it runs; empty if there is no such process."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    return b""


def ancestors(pid: int) -> Iterator[int]:
    while pid > 1:
        status = Path(f"/proc/{pid}/status").read_text()
        pid = int(status.split("PPid:")[1].split()[0])
        yield pid


def session(pid: int) -> int:
    with contextlib.suppress(ProcessLookupError):
        return os.getsid(pid)
    return -1


@pytest.mark.slow
def test_the_files_are_those_of_the_local_engine(
    cluster: Any, tiles: TileManifest, local: Path, tmp_path: Path
) -> None:
    summary = embed_slides(TEACHER, tiles, tmp_path, workers=1, batch_size=BATCH, engine="ray")
    assert_same(tmp_path, local)
    rows, wanted = (pd.read_csv(folder / "summary.csv").loc[:, :"n_unreadable"] for folder in (tmp_path, local))
    pd.testing.assert_frame_equal(rows, wanted)
    assert summary["seconds"].gt(0).all()

    (tmp_path / f"{rows['slide_id'][2]}.h5").unlink()
    again = embed_slides(TEACHER, tiles, tmp_path, workers=1, batch_size=BATCH, engine="ray")
    assert again["status"].tolist() == ["skipped", "skipped", "ok", "skipped", "skipped", "skipped"]
    assert_same(tmp_path, local)
    with pytest.raises(StoreError, match="was made with readout = 'cls', this run asks for 'mean'"):
        embed_slides(TEACHER, tiles, tmp_path, workers=1, batch_size=BATCH, engine="ray", readout="mean")


def test_a_broken_slide_is_a_failed_row(
    cluster: Any, encoder: Encoder, make_slide: Callable[..., Path], make_manifest: Any, tmp_path: Path
) -> None:
    paths = [make_slide("a", seed=1, corrupt=True), make_slide("gone", seed=2), make_slide("c", seed=3)]
    manifest = make_manifest(paths)
    paths[1].unlink()
    summary = embed_slides(encoder, manifest, tmp_path / "ray", workers=1, engine="ray").set_index("slide_id")
    assert summary["status"].to_dict() == {"a": "ok", "gone": "failed", "c": "ok"}
    assert summary["n_unreadable"].to_dict() == {"a": 4, "gone": 0, "c": 0}
    with one_thread():
        alone = embed_slides(encoder, manifest, tmp_path / "local", workers=1).set_index("slide_id")
    assert summary["message"].to_dict() == alone["message"].to_dict()
    assert_same(tmp_path / "ray", tmp_path / "local")


@pytest.mark.slow
def test_an_actor_killed_during_the_run_costs_nothing(
    cluster: Any, tiles: TileManifest, local: Path, tmp_path: Path
) -> None:
    killed: list[int] = []

    def kill() -> None:
        killed.append(next(pid for pid in pids() if b"SlideActor" in title(pid) and os.getpid() in ancestors(pid)))
        os.kill(killed[0], signal.SIGKILL)

    watcher = on_first_file(tmp_path, kill)
    summary = embed_slides(TEACHER, tiles, tmp_path, workers=1, batch_size=BATCH, engine="ray")
    watcher.join(10)
    assert len(killed) == 1
    assert b"SlideActor" not in title(killed[0])
    assert summary["status"].tolist() == ["ok"] * 6
    assert_same(tmp_path, local)


@pytest.mark.slow
def test_a_node_lost_during_the_run_costs_nothing(
    cluster: Any, tiles: TileManifest, local: Path, tmp_path: Path
) -> None:
    third = cluster.add_node(num_cpus=1)
    watcher = on_first_file(tmp_path, lambda: cluster.remove_node(third, allow_graceful=False))
    summary = embed_slides(TEACHER, tiles, tmp_path, workers=1, batch_size=BATCH, engine="ray")
    watcher.join(10)
    assert third not in cluster.list_all_nodes()
    assert summary["status"].tolist() == ["ok"] * 6
    assert_same(tmp_path, local)


@pytest.mark.slow
def test_a_slide_that_kills_or_breaks_is_one_row(
    cluster: Any, encoder: Encoder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def work(embedder: Embedder, job: str, bars: Bars) -> tuple[str, str]:
        if job == "kills":
            os.kill(os.getpid(), signal.SIGKILL)
        if job == "breaks":
            raise TypeError("no such thing")
        return job, ""

    jobs = ["a", "kills", "b", "breaks", "c"]
    with Bars() as bars, RayEngine("auto", "auto", 1, tmp_path) as engine:
        assert engine.precision == "fp32"
        outcomes = dict(engine.run(work, Embedder(encoder, device="cpu"), jobs, lambda job, why: (job, why), bars))
    assert sorted(outcomes) == sorted(jobs)
    assert [outcomes[job] for job in "abc"] == ["", "", ""]
    assert outcomes["kills"].startswith(f"{ATTEMPTS} processes died on this slide")
    assert outcomes["breaks"] == "TypeError: no such thing (the log has the traceback)"
    assert 'raise TypeError("no such thing")' in capsys.readouterr().err


def test_a_full_disk_ends_the_run_as_it_does_without_ray(
    cluster: Any, encoder: Encoder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def work(embedder: Embedder, job: str, bars: Bars) -> str:
        with atomic_path(tmp_path / "out" / job):
            raise OSError(errno.ENOSPC, "No space left on device")

    outcomes: list[str] = []
    with (
        pytest.raises(StoreError, match=r"Cannot write .*: No space left on device\. Free some space"),
        Bars() as bars,
        RayEngine("auto", "auto", 1, tmp_path) as engine,
    ):
        outcomes += engine.run(work, Embedder(encoder, device="cpu"), [*"abcdef"], lambda job, why: why, bars)
    assert not outcomes
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.slow
def test_a_cluster_without_room_says_so(cluster: Any, tmp_path: Path) -> None:
    with pytest.raises(PathokdError, match="No node of the Ray cluster has 2 CPUs: give fewer --workers"):
        RayEngine("auto", "auto", 2, tmp_path / "out").__enter__()
    with pytest.raises(PathokdError, match="has no GPU: give --device cpu"):
        RayEngine("cuda", "auto", 1, tmp_path / "out").__enter__()
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_ctrl_c_leaves_whole_files_and_no_process(tiles: TileManifest, local: Path, tmp_path: Path) -> None:
    pytest.importorskip("ray")
    tiles.write(tmp_path / "tiles/manifest.parquet")
    out = tmp_path / "out"
    command = [sys.executable, "-m", "pathokd.cli", "embed", TEACHER, str(tmp_path / "tiles"), "--out", str(out)]
    command += ["--engine", "ray", "--workers", "1", "--batch-size", str(BATCH)]
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    run = subprocess.Popen(command, env=environment, start_new_session=True, stderr=subprocess.PIPE, text=True)
    on_first_file(out, lambda: os.killpg(run.pid, signal.SIGINT))  # what a terminal does
    _, said = run.communicate(timeout=200)
    assert run.returncode == 130, said
    assert "pathokd: stopped; the same command goes on where it can." in said
    assert (out / "summary.csv").is_file()
    assert 1 <= len(list(out.glob("*.h5"))) < 6
    deadline = time.monotonic() + 30
    while left := [pid for pid in pids() if session(pid) == run.pid]:
        assert time.monotonic() < deadline, left
        time.sleep(0.2)

    with one_thread():
        summary = embed_slides(TEACHER, tiles, out, workers=1, batch_size=BATCH)
    assert set(summary["status"]) == {"ok", "skipped"}
    assert_same(out, local)


def test_without_ray_one_sentence_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)  # what an absent package is to `import`
    with pytest.raises(PathokdError, match=r"pip install 'pathokd\[ray\]'"):
        RayEngine("auto", "auto", 1, tmp_path).__enter__()


@pytest.mark.parametrize(
    ("name", "device", "workers", "sentence"),
    [
        ("dask", "auto", 1, "engine should be one of local, ray, got 'dask'"),
        ("ray", "cuda:1", 1, "device should be auto, cpu or cuda where Ray shares out GPUs, got 'cuda:1'"),
        ("ray", "auto", 0, "workers should be at least 1, got 0"),
    ],
)
def test_wrong_settings_are_told_before_ray_starts(
    name: Any, device: str, workers: int, sentence: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=sentence):
        open_engine(name, device, "auto", workers, tmp_path)
