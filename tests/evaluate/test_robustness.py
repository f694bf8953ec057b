"""Robustness of stored features on a paired manifest: numbers against their definitions, order, chance, bad input."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from pathokd.cli.main import main
from pathokd.errors import ManifestError, StoreError
from pathokd.evaluate import robustness
from pathokd.evaluate.paired_features import stored_features
from pathokd.evaluate.paired_readers import open_pairs
from pathokd.evaluate.robustness import Robustness, RobustnessSpec, measure_robustness
from pathokd.metrics import cosine, paired_topk, separation

PLACES, DIM = 40, 16
CONDITIONS = [("HE", "A"), ("HE", "B"), ("violet", "A"), ("violet", "B")]
FAST = RobustnessSpec(turn_tiles=0, neighbour_k=3)


@pytest.fixture
def manifest(tmp_path: Path) -> Path:
    rows = [
        {"pair_id": f"p{place}", "stain": stain, "scanner": scanner, "key": f"{place}-{stain}-{scanner}",
         "label": "ab"[place % 2], "case": f"c{place % 4}"}
        for stain, scanner in CONDITIONS
        for place in range(PLACES)
    ]  # fmt: skip
    pd.DataFrame(rows).to_csv(tmp_path / "pairs.csv", index=False)
    return tmp_path / "pairs.csv"


def make_features(seed: int = 0, shift: float = 0.7) -> dict[tuple[str, str], np.ndarray]:
    rng = np.random.default_rng(seed)
    place = rng.standard_normal((PLACES, DIM))
    place[::2] += 1.5
    return {c: place + shift * rng.standard_normal(DIM) + 0.4 * rng.standard_normal((PLACES, DIM)) for c in CONDITIONS}


def store(path: Path, features: dict[tuple[str, str], np.ndarray], order: int | None = None) -> Path:
    keys = [f"{place}-{stain}-{scanner}" for stain, scanner in features for place in range(PLACES)]
    x = np.concatenate(list(features.values())).astype(np.float32)
    rows = np.arange(len(x)) if order is None else np.random.default_rng(order).permutation(len(x))
    np.savez(path, key=np.array(keys)[rows], features=x[rows])
    return path


def measured(manifest: Path, out: Path, **stores: Path) -> Robustness:
    tiles = open_pairs(manifest)
    models = [stored_features(name, path, tiles) for name, path in stores.items()]
    return measure_robustness(models, tiles, out, FAST)


def value(found: Robustness, name: str, group: str, k: int | None = None, model: str = "m") -> float:
    table = found.tables["measures"]
    rows = table[(table["model"] == model) & (table["name"] == name) & (table["group"] == group)]
    rows = rows[rows["k"] == k] if k is not None else rows
    assert len(rows) == 1
    return float(rows["value"].iloc[0])


def test_numbers_are_their_definitions(manifest: Path, tmp_path: Path) -> None:
    features = make_features()
    found = measured(manifest, tmp_path / "out", m=store(tmp_path / "m.npz", features, order=3))
    x = {c: torch.from_numpy(f.astype(np.float32)) for c, f in features.items()}
    scanner_pairs = [(("HE", "A"), ("HE", "B")), (("violet", "A"), ("violet", "B"))]
    for name, function in (
        ("cosine_mean", lambda a, b: float(cosine(a, b).mean())),
        ("separation_mean", lambda a, b: float(separation(a, b))),
    ):
        expected = np.mean([function(x[a], x[b]) for a, b in scanner_pairs])
        assert value(found, name, "cross-scanner") == pytest.approx(expected, abs=1e-5)
    expected = np.mean([float(paired_topk(x[a], x[b], 3)) for a, b in scanner_pairs])
    assert value(found, "topk_mean", "cross-scanner", 3) == pytest.approx(expected, abs=1e-6)
    table = found.tables["measures"]
    assert (table["n"] > 0).all()
    inside = table.dropna(subset=["low", "high", "value"])
    assert (inside["low"] <= inside["high"]).all()


def test_a_gallery_thinned_out_is_said(manifest: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The index of 6,000 of PathoROB's 22,402 tiles stood beside its published k without a word."""
    tiles = open_pairs(manifest)
    assert robustness._facts(tiles, FAST, None, "m")["notes"] == []
    monkeypatch.setattr(robustness, "MAX_TILES", 100)
    (note,) = robustness._facts(tiles, FAST, None, "m")["notes"]
    assert "among about 100 of 160 labelled tiles" in note


def test_a_constant_model_scores_chance(manifest: Path, tmp_path: Path) -> None:
    flat = {c: np.ones((PLACES, DIM)) for c in CONDITIONS}
    tiles = open_pairs(manifest)
    model = stored_features("m", store(tmp_path / "m.npz", flat), tiles)
    from pathokd.evaluate.resampling import Resampler
    from pathokd.evaluate.robust_retrieval import measure_retrieval

    units = tiles.column(tiles.unit_column(), tiles.rows[next(iter(tiles.conditions))])
    found = measure_retrieval(model, tiles, Resampler(units, 0), tmp_path / "cache", k=(10,))
    top = next(m for m in found.measures if m.name == "topk_mean" and m.group == "cross-scanner")
    assert top.value == pytest.approx(10 / (2 * PLACES - 1))


def test_differences_from_the_first_model(manifest: Path, tmp_path: Path) -> None:
    good, bad = make_features(shift=0.1), make_features(shift=6.0)
    stores = {"first": store(tmp_path / "a.npz", bad), "second": store(tmp_path / "b.npz", good)}
    found = measured(manifest, tmp_path / "out", **stores)
    table = found.tables["differences"]
    row = table[(table["name"] == "topk_mean") & (table["group"] == "cross-scanner") & (table["k"] == 1)].iloc[0]
    truth = [value(found, "topk_mean", "cross-scanner", 1, name) for name in ("second", "first")]
    assert row["value"] == pytest.approx(truth[0] - truth[1])
    assert row["low"] > 0
    again = measured(manifest, tmp_path / "out", **stores)  # from the kept pairs
    pd.testing.assert_frame_equal(again.tables["pairs"], found.tables["pairs"], rtol=1e-5, atol=1e-6)
    kept = sorted((tmp_path / "out/cache").rglob("*.npz"))
    for file, size in zip(kept[:2], (0, 300), strict=True):  # a damaged one is computed again, and was a BadZipFile
        file.write_bytes(file.read_bytes()[:size])
    again = measured(manifest, tmp_path / "out", **stores)
    pd.testing.assert_frame_equal(again.tables["pairs"], found.tables["pairs"], rtol=1e-5, atol=1e-6)
    assert kept[0].stat().st_size == kept[2].stat().st_size


def changed(manifest: Path, **change: object) -> Path:
    frame = pd.read_csv(manifest, dtype=str)
    for column, edit in change.items():
        frame[column] = edit(frame[column]) if callable(edit) else edit
    frame.to_csv(manifest.with_name("changed.csv"), index=False)
    return manifest.with_name("changed.csv")


def test_bad_input_is_one_sentence(manifest: Path, tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match="only"):
        open_pairs(changed(manifest, scanner="A", stain="HE", pair_id=lambda c: [f"q{i}" for i in range(len(c))]))
    with pytest.raises(ManifestError, match="unpaired"):
        open_pairs(changed(manifest, pair_id=lambda c: ["alone", *c[1:]]))
    tiles = open_pairs(manifest)
    features = make_features()
    lacking = {c: f for c, f in features.items() if c != ("HE", "A")}
    with pytest.raises(StoreError, match=r"lacks|no features"):
        stored_features("m", store(tmp_path / "lacking.npz", lacking), tiles)
    features["HE", "A"][3] = np.nan
    broken = store(tmp_path / "nan.npz", features)
    with pytest.raises(StoreError):
        measure_robustness([stored_features("m", broken, tiles)], tiles, tmp_path / "o", FAST)
    model = stored_features("m", store(tmp_path / "m.npz", make_features()), tiles)
    with pytest.raises(ValueError, match="larger than the gallery"):
        measure_robustness([model], tiles, tmp_path / "o", RobustnessSpec(k=(500,)))
    with pytest.raises(ValueError, match="different names"):
        measure_robustness([model, model], tiles, tmp_path / "o", FAST)


def test_the_verb(manifest: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, two = (store(tmp_path / f"{n}.npz", make_features(shift=s)) for n, s in (("one", 6.0), ("two", 0.1)))
    words = ["robustness", f"a={one}", f"b={two}", "--pairs", str(manifest), "--turn-tiles", "0", "--neighbour-k", "3"]
    assert main([*words, "--out", str(tmp_path / "out")]) == 0
    assert "cross-scanner" in capsys.readouterr().out
    table = pd.read_csv(tmp_path / "out/measures.csv")
    assert {"model", "name", "group", "value", "low", "high", "n"} <= set(table)
    summary = json.loads((tmp_path / "out/robustness.json").read_text())
    assert summary["facts"]["n_places"] == PLACES
    assert {row["model"] for row in summary["measures"]} == {"a", "b"}
    assert main([*words, "--k", "[500]", "--out", str(tmp_path / "other")]) == 1
    assert "larger than the gallery" in capsys.readouterr().err
