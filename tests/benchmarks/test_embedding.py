"""Tiles per second of `embed_slides`: what surrounds the model, against LazySlide and hs2p; and with a ViT-S, against
a bare loop of forward passes.

Each run is a fresh process, and the slide is dropped from the page cache before it. Rounds rotate the order; ratios are
taken within a round, and their median is the figure.
"""

import os
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import pytest

from pathokd.files import write_json
from pathokd.slides.manifest import TileSpec

pytestmark = [pytest.mark.bench, pytest.mark.timeout(2 * 3600)]

ROUNDS = int(os.environ.get("PATHOKD_BENCH_ROUNDS", "5"))
TILES = int(os.environ.get("PATHOKD_BENCH_TILES", "256"))
"""Of the run with a ViT-S; the others take the whole slide."""
WORKERS, BATCH_SIZE, WIDTH, MPP = 2, 32, 384, 0.5
CONTENDERS = Path(__file__).parent / "contenders"
PEERS = {"lazyslide": "PATHOKD_LAZYSLIDE_PYTHON", "hs2p": "PATHOKD_HS2P_PYTHON"}
"""Interpreters of peers in environments of their own."""


@pytest.fixture(scope="module")
def work(bench_slide: Path, cut_tiles: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The tiles of the slide; some of them also decoded."""
    folder = tmp_path_factory.mktemp("embedding")
    packed = cut_tiles(bench_slide, folder, TileSpec(mpp=MPP), TILES)
    packed.close()
    job = {"mpp": MPP, "batch_size": BATCH_SIZE, "workers": WORKERS, "width": WIDTH, "slide": str(bench_slide)}
    return {"folder": folder, "job": job, "slide": bench_slide}


def cold(run: Callable[[], dict[str, Any]], slide: Path) -> Callable[[int], dict[str, Any]]:
    """A contender that finds the slide out of the page cache, and notes how busy the machine is."""

    def contender(attempt: int) -> dict[str, Any]:
        handle = os.open(slide, os.O_RDONLY)
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(handle)
        return {**run(), "load_average": os.getloadavg()[0]}

    return contender


def report(
    runs: dict[str, list[dict[str, Any]]], labels: dict[str, str], title: str, publish: Any, markdown: Any, name: str
) -> dict[str, list[float]]:
    """Print and store; returns ours over each contender, by round."""
    speeds = {key: [facts["tiles"] / facts["seconds"] for facts in own] for key, own in runs.items()}
    ratios = {key: [a / b for a, b in zip(speeds["ours"], own, strict=True)] for key, own in speeds.items()}
    rows = [
        [
            labels[key],
            str(runs[key][0]["tiles"]),
            f"{median(own):.1f} ({min(own):.1f} to {max(own):.1f})",
            f"{median(ratios[key]):.3f} ({min(ratios[key]):.3f} to {max(ratios[key]):.3f})",
        ]
        for key, own in speeds.items()
    ]
    header = ["contender", "tiles", "tiles/s, median (range)", "ours over it, median (range)"]
    loads = [facts["load_average"] for own in runs.values() for facts in own]
    note = f"Load average while it ran: {min(loads):.1f} to {max(loads):.1f}."
    figures = {"rounds": ROUNDS, "tiles_per_s": speeds, "ours_over": ratios, "runs": runs}
    publish(name, figures, f"{title}, {ROUNDS} rounds\n\n{markdown(header, rows)}\n\n{note}")
    return ratios


def test_the_pipeline_around_the_model(
    work: dict[str, Any], run_contender: Any, run_script: Any, in_rounds: Any, publish: Any, markdown: Any
) -> None:
    """At least 1.5 times the tiles per second of the fastest peer, all with an encoder that returns a constant."""
    found = {name: os.environ[variable] for name, variable in PEERS.items() if os.environ.get(variable)}
    if not found:
        pytest.skip(f"no peer to compare with: {' or '.join(PEERS.values())} names no interpreter (README.md)")
    folder = work["folder"]
    job = {**work["job"], "encoder": "null", "manifest": str(folder / "tiles/manifest.parquet")}

    def peer(name: str) -> dict[str, Any]:
        out, path = folder / f"{name}.out.json", folder / f"{name}.job.json"
        write_json(path, {**job, "out": str(out), "features": str(folder / f"{name}.h5")})
        facts: dict[str, Any] = run_contender([found[name], str(CONTENDERS / f"embed_{name}.py"), str(path)], out)
        return facts

    contenders: dict[str, Callable[[], dict[str, Any]]] = {
        "ours": lambda: run_script("embed_ours", {**job, "features": str(folder / "null")}, folder),
        **{name: (lambda name=name: peer(name)) for name in found},
    }
    labels = {
        "ours": f"`embed_slides`, {WORKERS} threads, HDF5 written",
        "lazyslide": f"LazySlide `feature_extraction`, {WORKERS} workers",
        "hs2p": "hs2p's stream of tiles, one thread, HDF5 written",
    }
    runs = in_rounds({name: cold(run, work["slide"]) for name, run in contenders.items()}, ROUNDS)
    title = f"Embedding with a constant encoder: {work['slide'].name}, 224 px at {MPP} um/px, batch {BATCH_SIZE}"
    left_out = [f"{name} left out ({PEERS[name]} is not set)" for name in PEERS if name not in found]
    ratios = report(runs, labels, "; ".join([title, *left_out]), publish, markdown, "embedding_null")
    assert all(facts["failed"] == 0 for facts in runs["ours"])
    assert min(median(ratios[name]) for name in found) >= 1.5


def test_with_a_vit_s(work: dict[str, Any], run_script: Any, in_rounds: Any, publish: Any, markdown: Any) -> None:
    """At least 0.95 of the speed of forward passes alone, with reading and writing included."""
    folder, architecture = work["folder"], "vit_small_patch16_224"
    job = {**work["job"], "encoder": architecture, "manifest": str(folder / "some/manifest.parquet")}
    contenders: dict[str, Callable[[], dict[str, Any]]] = {
        "ours": lambda: run_script("embed_ours", {**job, "features": str(folder / "vits")}, folder),
        "bare": lambda: run_script("embed_bare", {**job, "tiles": str(folder / "tiles.npy")}, folder),
    }
    labels = {
        "ours": f"`embed_slides`, {WORKERS} threads, HDF5 written",
        "bare": "bare loop of forward passes over decoded tiles",
    }
    runs = in_rounds({name: cold(run, work["slide"]) for name, run in contenders.items()}, ROUNDS)
    title = f"Embedding with {architecture}, fp32: {work['slide'].name}, batch {BATCH_SIZE}"
    ratios = report(runs, labels, title, publish, markdown, "embedding_vits")
    assert runs["ours"][0]["tiles"] == runs["bare"][0]["tiles"]
    assert median(ratios["bare"]) >= 0.95
