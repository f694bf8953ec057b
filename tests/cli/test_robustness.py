"""The verb from an exported model and stored features to the page, twice, and its sentences."""

import itertools
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from pathokd.cli.main import main
from pathokd.cli.named import named_models
from pathokd.data.conditions import Condition
from pathokd.data.pack import PackSpec
from pathokd.data.packed import PackedTiles
from pathokd.data.simulate import simulate_tiles


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


def published(folder: Path, k: int) -> dict[str, str]:
    """PLISM's four rows and its number as its own program computes them, in plain NumPy: sorted 2n by 2n cosines."""
    slides = {path.parent.name: np.load(path) for path in sorted(folder.glob("*/features.npy"))}
    units = {}
    for name, table in slides.items():
        x = table[np.lexsort((table[:, 2], table[:, 1])), 3:].astype(np.float64)
        units[name] = x / np.linalg.norm(x, axis=1, keepdims=True)
    cosine, top = {}, {}
    for a, b in itertools.combinations(units, 2):
        n, both = len(units[a]), np.vstack([units[a], units[b]])
        similar = both @ both.T
        np.fill_diagonal(similar, np.inf)
        nearest = np.argsort(-similar, axis=1)[:, 1 : k + 1]
        partner = np.roll(np.arange(2 * n), n)
        cosine[a, b] = (units[a] * units[b]).sum(1).mean()
        top[a, b] = (nearest == partner[:, None]).any(1).mean()
    group = lambda pair: tuple(u == v for u, v in zip(*(name.split("_")[:2] for name in pair), strict=True))  # noqa: E731
    rows = {"all": list(cosine.values())}
    for name, kind in (("cross-scanner", (True, False)), ("cross-staining", (False, True)), ("both", (False, False))):
        rows[name] = [value for pair, value in top.items() if group(pair) == kind]
    medians = [round(float(np.median(values)), 3) for values in rows.values()]
    told = {name: f"{np.mean(v):.3f} {np.std(v):.3f} {np.median(v):.3f}" for name, v in rows.items()}
    return {**told, "plism": f"{round(np.mean(medians), 3):.3f}"}


def test_published_features_give_the_published_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """PLISM's features without its tiles, `--compat plism`, against a re-creation of the published program."""
    rng, n = np.random.default_rng(0), 60
    place, coords = rng.standard_normal((n, 16)), rng.permutation(n)
    for stain, scanner in itertools.product(("GMH", "HR", "KR"), ("AT2", "S60", "P")):
        folder = tmp_path / "export" / f"{stain}_{scanner}_to_GMH_S60.tif"
        folder.mkdir(parents=True)
        far = {"GMH": 0.0, "HR": 1.0, "KR": 2.0}[stain] + {"AT2": 0.0, "S60": 0.5, "P": 1.0}[scanner]
        x = place + far * rng.standard_normal(16) + 0.7 * far * rng.standard_normal((n, 16))
        order = rng.permutation(n)
        where = np.stack([np.zeros(n), coords % 8 * 224, coords // 8 * 224], axis=1)
        np.save(folder / "features.npy", np.hstack([where, x])[order].astype(np.float32))
    words = ["m=" + str(tmp_path / "export"), "--pairs", tmp_path / "export", "--compat", "plism"]
    assert run(*words, "--out", tmp_path / "out") == 0
    want = published(tmp_path / "export", k=10)
    groups = pd.read_csv(tmp_path / "out/groups.csv").set_index(["group", "metric"])
    for name, metric in (("all", "cosine"), *((name, "top10") for name in ("cross-scanner", "cross-staining", "both"))):
        row = groups.loc[name, metric]
        assert f"{row['mean']:.3f} {row['sd']:.3f} {row['median']:.3f}" == want[name]
    table = pd.read_csv(tmp_path / "out/measures.csv")
    assert f"{table[table['name'] == 'plism']['value'].item():.3f}" == want["plism"]


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
        (
            ["{model}", "--pairs", "{pairs}", "--index", '["{tmp}/a/x.npy", "{tmp}/b/x.npy"]'],
            "several files are called x",
        ),
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


def odd(folder: Path, *, registered: bool = True, collapsed: bool = False) -> list[object]:
    """Made-up places under two scanners, or the same tiles of one site, and features of two models."""
    rng = np.random.default_rng(0)
    frame = pd.DataFrame([{"pair_id": f"p{p}", "scanner": s, "label": "ab"[p % 2]} for s in "AB" for p in range(12)])
    x = rng.standard_normal((12, 4))[np.arange(24) % 12] + 0.1 * rng.standard_normal((24, 4))
    if not registered:
        frame = frame.drop(columns=["pair_id", "scanner"]).assign(site="one")
    frame.assign(key=[f"k{i}" for i in range(24)]).to_csv(folder / "pairs.csv", index=False)
    for name, features in (("flat", np.ones_like(x) if collapsed else x), ("other", x)):
        np.savez(folder / f"{name}.npz", key=np.array([f"k{i}" for i in range(24)]), features=features)
    models = [f"{name}={folder}/{name}.npz" for name in ("flat", "other")]
    return [*models, "--pairs", folder / "pairs.csv", "--out", folder / "out"]


def test_a_collapsed_model_gets_a_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It has no principal axes, and gave a traceback instead of the report that calls it collapsed."""
    assert run(*odd(tmp_path, collapsed=True)) == 0
    assert "Matched tiles of flat are hardly closer" in (tmp_path / "out/report.html").read_text(encoding="utf-8")


def test_any_k_gets_a_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Without k = 10 or 1 the heat map had nothing to draw, and the run failed in numpy's words."""
    words = odd(tmp_path)
    assert run(*words, "--k", "[3]") == 0
    assert "Top-3, condition by condition" in (tmp_path / "out/report.html").read_text(encoding="utf-8")
    assert run(*words, "--k", "[1,1]") == 1
    assert "each k should be named once, got [1, 1]." in capsys.readouterr().err


def test_tiles_that_allow_no_measure(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*odd(tmp_path, registered=False)) == 1
    assert "Nothing can be measured on" in capsys.readouterr().err


def test_what_models_are_called(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`/runs/lr` was taken for a name, where robustness wrote features; it called vits.v1 and vits.v2 both vits."""
    (tmp_path / "kept.npz").touch()
    monkeypatch.chdir(tmp_path)
    texts = ["/runs/lr=0.1/student", "a=/runs/lr=0.1/student", "vits.v1", "runs/vits.v2/", "kept.npz", "."]
    texts += ["hf-hub:lab/vit.tag"]
    names = ["student", "a", "vits.v1", "vits.v2", "kept", tmp_path.name, "vit.tag"]
    assert list(named_models(texts)) == names
    assert named_models(["a=/runs/lr=0.1/student"]) == {"a": "/runs/lr=0.1/student"}
    assert named_models(["/runs/lr=0.1/student"]) == {"student": "/runs/lr=0.1/student"}
    with pytest.raises(ValueError, match="should have different names, got student, student: write NAME=MODEL"):
        named_models(["a/student", "b/student"])


@pytest.mark.parametrize("steps", ["0", "-1"])
def test_quickstart_refuses_no_steps(steps: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """0 silently meant the default, and -1 trains without end."""
    assert main(["quickstart", "--out", str(tmp_path / "q"), "--steps", steps]) == 1
    assert f"--steps should be at least 1, got {steps}." in capsys.readouterr().err
    assert not (tmp_path / "q").exists()


def test_quickstart_deletes_only_what_a_quickstart_made(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A folder with a run in it lost its tiles and embeddings too."""
    (tmp_path / "run").mkdir()
    (tmp_path / "tiles").mkdir()
    assert main(["quickstart", "--out", str(tmp_path), "--overwrite"]) == 1
    assert f"{tmp_path} holds tiles, run, which no quickstart made: choose another --out." in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run", "tiles"]
    (tmp_path / ".quickstart").touch()
    assert main(["quickstart", "--out", str(tmp_path)]) == 1
    assert "holds an earlier quickstart: pass --overwrite" in capsys.readouterr().err
