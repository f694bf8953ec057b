"""Where the time went: parts that add up, honest verdicts, and results that batches and threads do not change."""

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from pathokd.embed import Embedder, embed_slides, read_embeddings
from pathokd.embed.speed import COLUMNS, Spent, speed
from pathokd.models import Encoder
from pathokd.slides.manifest import TileManifest

MakeSlide = Callable[..., Path]
MakeManifest = Callable[[list[Path]], TileManifest]


def row(**parts: float) -> pd.DataFrame:
    facts = {"status": "ok", "n_tiles": 110, "n_unreadable": 10, "seconds": 10.0}
    return pd.DataFrame([{**facts, **dict.fromkeys(COLUMNS, 0.0), **parts}])


def advice(summary: pd.DataFrame, workers: int = 4, device: str = "cuda") -> str:
    return " ".join(speed(summary, workers=workers, batch_size=32, device=device, cores=8))


def test_the_sentence_gives_rates_and_shares() -> None:
    first, second = speed(
        row(wait_s=1.0, preprocess_s=0.5, encode_s=8.0, read_s=20.0), workers=4, batch_size=32, device="cpu", cores=8
    )
    assert first == (
        "100 tiles in 10.0 s: 10.0 tiles/s (read 4 at a time 20, preprocess 200, encode 12; "
        "the model's time: waiting 10%, preprocessing 5%, encoding 80%, the rest 5%)."
    )
    assert second.startswith("Bottleneck: the model on the CPU")


def test_the_slowest_part_is_named_with_what_to_do() -> None:
    assert "raise --workers from 4 to 8" in advice(row(wait_s=6.0, encode_s=3.0, read_s=24.0, read_cpu_s=23.0))
    waits = row(wait_s=6.0, encode_s=3.0, read_s=48.0, read_cpu_s=5.0)
    assert "local disk" in advice(waits, workers=8)
    decodes = row(wait_s=6.0, encode_s=3.0, read_s=48.0, read_cpu_s=40.0)
    assert "--shard" in advice(decodes, workers=8)
    assert "--batch-size 64" in advice(row(wait_s=1.0, encode_s=8.0))
    assert "--tile-px" in advice(row(preprocess_s=8.0))
    assert "opening slides and writing" in advice(row(encode_s=2.0))


def test_short_and_empty_runs_get_no_advice() -> None:
    short = row(encode_s=0.2)
    short["seconds"] = 0.3
    assert len(speed(short, workers=1, batch_size=1, device="cpu")) == 1
    short["status"] = "skipped"
    assert speed(short, workers=1, batch_size=1, device="cpu") == []


def test_waiting_is_counted_and_work_between_is_not() -> None:
    def slow() -> Iterator[int]:
        for item in range(3):
            time.sleep(0.02)
            yield item

    spent, started = Spent(), time.perf_counter()
    for _ in spent.waiting(slow()):
        time.sleep(0.05)
    assert 0.06 <= spent.wait_s <= time.perf_counter() - started - 0.15


def test_parts_of_a_real_run_add_up(
    encoder: Encoder,
    make_slide: MakeSlide,
    make_manifest: MakeManifest,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    manifest = make_manifest([make_slide("a", seed=1), make_slide("b", seed=2)])
    summary = embed_slides(encoder, manifest, tmp_path / "out", batch_size=5)
    stored = pd.read_csv(tmp_path / "out" / "summary.csv")
    for name in COLUMNS:
        assert (summary[name] > 0).all(), name
        assert stored[name].tolist() == summary[name].tolist()
    mine = summary["wait_s"] + summary["preprocess_s"] + summary["encode_s"]
    assert (mine <= summary["seconds"]).all()
    assert "32 tiles in" in capsys.readouterr().err
    again = embed_slides(encoder, manifest, tmp_path / "out")
    assert (again[list(COLUMNS)] == 0).all(axis=None)
    assert "tiles in" not in capsys.readouterr().err


@pytest.mark.parametrize(("batch_size", "workers"), [(1, 1), (3, 4), (7, 2), (64, 8)])
def test_batches_and_threads_change_nothing(
    batch_size: int,
    workers: int,
    encoder: Encoder,
    make_slide: MakeSlide,
    make_manifest: MakeManifest,
    tmp_path: Path,
) -> None:
    manifest = make_manifest([make_slide("a", seed=1, corrupt=True)])
    embed_slides(encoder, manifest, tmp_path / "one", batch_size=16, readout="cls+mean")
    embed_slides(encoder, manifest, tmp_path / "two", batch_size=batch_size, workers=workers, readout="cls+mean")
    one, two = (read_embeddings(tmp_path / name / "a.h5") for name in ("one", "two"))
    np.testing.assert_allclose(two.features, one.features, atol=1e-5)
    assert two.flag.tolist() == one.flag.tolist()
    assert two.header == one.header


def tiles(n: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (n, 56, 56, 3), dtype=np.uint8)


def test_stream_gives_each_batch_its_own_vectors(encoder: Encoder) -> None:
    images, embedder = tiles(11), Embedder(encoder, "mean", batch_size=4)
    spent = Spent()
    streamed = list(embedder.stream((images[i : i + 4] for i in range(0, 11, 4)), spent))
    assert [len(vectors) for vectors in streamed] == [4, 4, 3]
    np.testing.assert_allclose(np.concatenate(streamed), embedder(images), atol=1e-5)
    assert spent.preprocess_s > 0
    assert spent.encode_s > 0


@pytest.mark.slow
def test_compiled_is_the_same_and_compiles_once(encoder: Encoder) -> None:
    images, compiled = tiles(11), Embedder(encoder, "cls+mean", batch_size=4, compile=True)
    torch._dynamo.reset()
    np.testing.assert_allclose(compiled(images), Embedder(encoder, "cls+mean")(images), atol=1e-5)
    compiled(images[:1])
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_cuda_gives_the_vectors_of_the_cpu(encoder: Encoder) -> None:
    images = tiles(11)
    want = Embedder(encoder, "cls+mean", device="cpu")(images)
    got = Embedder(encoder, "cls+mean", "fp32", "cuda", batch_size=4)
    try:
        np.testing.assert_allclose(got(images), want, atol=1e-3)
    finally:
        encoder.cpu()
