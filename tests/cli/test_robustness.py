"""The verb from an exported model and stored features to the page, twice, and its sentences."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from pathokd.cli.main import main
from pathokd.data.pack import PackSpec
from pathokd.data.packed import PackedTiles
from pathokd.data.simulate import Condition, simulate_tiles


@pytest.fixture(scope="module")
def pairs(packed: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tiles scanned once, and as another scanner would show them."""
    folder = tmp_path_factory.mktemp("simulated") / "pairs"
    simulate_tiles(PackedTiles(packed), folder, [Condition(scanner="soft-warm")], PackSpec(quality=95), workers=1)
    return folder


def run(*words: object) -> int:
    return main(["robustness", *map(str, words)])


def test_a_model_and_stored_features(
    pairs: Path, tiny_teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    index = PackedTiles(pairs).index
    x = np.random.default_rng(0).standard_normal((len(index), 6)).astype(np.float32)
    np.savez(tmp_path / "noise.npz", key=index["key"].to_numpy(str)[::-1], features=x)
    words = [f"model={tiny_teacher}", f"noise={tmp_path}/noise.npz", "--pairs", pairs, "--turn-tiles", "6"]
    assert run(*words, "--out", tmp_path / "out") == 0
    said = capsys.readouterr().out
    assert "noise is less robust than model: top-10 across scanners" in said
    assert "report.html" in said
    page = (tmp_path / "out/report.html").read_text(encoding="utf-8")
    assert "How robust are model and noise?" in page
    assert "stored features" in page
    table = pd.read_csv(tmp_path / "out/measures.csv")
    assert {"topk_mean", "separation_mean", "scanner_predictability", "turn_cosine"} <= set(table["name"])
    top = table[(table["name"] == "topk_mean") & (table["k"] == 10) & (table["group"] == "cross-scanner")]
    noise = top[top["model"] == "noise"].iloc[0]
    assert noise["low"] <= 10 / (2 * noise["n"] - 1) <= noise["high"]  # unrelated features: chance
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "out/features").rglob("*.npy")}
    assert run(*words, "--out", tmp_path / "out") == 0
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out/features").rglob("*.npy")} == kept


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["{model}", "--pairs", "{tmp}/none"], "does not exist"),
        (["{model}", "--pairs", "{packed}"], "pair_id, stain and scanner"),
        (["{model}", "--pairs", "{pairs}", "--k", "[999]"], "larger than the gallery"),
        (["{model}", "--pairs", "{pairs}", "--n-tiles", "999"], "only 48 places are seen under every condition"),
        (["a={model}", "a={model}", "--pairs", "{pairs}"], "different names"),
        (["{tmp}/nothing", "--pairs", "{pairs}"], "no folder or file"),
        (["{model}", "--pairs", "{pairs}", "--index", "{tmp}/none.npy"], "should be a .npy file"),
    ],
)
def test_one_sentence_each(
    words: list[str],
    sentence: str,
    packed: Path,
    pairs: Path,
    tiny_teacher: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    names = {"model": tiny_teacher, "pairs": pairs, "packed": packed, "tmp": tmp_path}
    assert run(*(word.format(**names) for word in words), "--out", tmp_path / "out", "--turn-tiles", "0") == 1
    error = capsys.readouterr().err
    assert sentence in error
    assert "Traceback" not in error
    assert not (tmp_path / "out/report.html").exists()
