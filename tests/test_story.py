"""The chain a newcomer walks, on a small phantom cohort: phantom, tile, pack, fit, export, embed, compare."""

import json
from pathlib import Path
from typing import Any

import h5py
import pandas as pd
import pytest
import timm
import torch
import yaml

from pathokd.cli.main import main

TINY = {"embed_dim": 16, "depth": 2, "num_heads": 2, "patch_size": 8, "reg_tokens": 4, "no_embed_class": True}


def run(*words: object) -> int:
    return main(["--debug", *map(str, words)])


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("story")
    stains = ["--stainings", "[HE,violet]", "--scanners", "[S50,S45]"]
    assert run("phantom", folder / "slides", "--cases", 2, *stains, "--size-um", 640, "--seed", 3) == 0
    assert run("tile", folder / "slides/slides.csv", "--out", folder / "tiles", "--stride", 112) == 0
    assert run("pack", folder / "tiles", "--out", folder / "packed") == 0
    return folder


def test_the_whole_chain(cohort: Path, tiny_teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe: dict[str, Any] = {
        "model": {
            "teachers": {"tiny": {"weights": str(tiny_teacher)}},
            "student": {"architecture": "vit_tiny_patch16_224", "model_args": TINY, "image_px": 32},
            "objectives": [
                {"loss": {"class_path": "pathokd.losses.CosineSmoothL1"}},
                {"loss": {"class_path": "pathokd.losses.CosineSmoothL1"}, "tokens": "patches"},
            ],
            "standardize_steps": 3,
        },
        "data": {"tiles": str(cohort / "packed"), "batch_size": 8, "workers": 0, "geometry": {"size_px": 32}},
        "trainer": {"max_steps": 6, "max_epochs": -1, "accelerator": "cpu", "devices": 1},
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    assert run("fit", "--config", tmp_path / "recipe.yaml", "--out", tmp_path / "run") == 0
    assert run("validate", "--config", tmp_path / "run/config.yaml", "--out", tmp_path / "run") == 0
    assert run("export", tmp_path / "run", "--out", tmp_path / "student") == 0
    assert run("export", tmp_path / "run", "--out", tmp_path / "control", "--untrained") == 0
    assert run("embed", tmp_path / "student", cohort / "tiles", "--out", tmp_path / "features") == 0
    models = [f"teacher={tiny_teacher}", f"student={tmp_path}/student", f"control={tmp_path}/control"]
    out = ["--fidelity", "student:teacher", "--out", tmp_path / "c.json"]
    assert run("compare", *models, "--data", cohort / "packed", *out) == 0

    student = timm.create_model(f"local-dir:{tmp_path}/student", pretrained=True)
    control = timm.create_model(f"local-dir:{tmp_path}/control", pretrained=True)
    trained, random = student.state_dict(), control.state_dict()
    assert trained.keys() == random.keys()
    assert any(not torch.equal(trained[name], random[name]) for name in trained)

    manifest = pd.read_parquet(cohort / "tiles/manifest.parquet")
    for slide, tiles in manifest.groupby("slide_id"):
        with h5py.File(tmp_path / f"features/{slide}.h5") as file:
            assert file["features"].shape == (len(tiles), 16)
            assert file["coords"][:].tolist() == tiles[["x", "y"]].to_numpy().tolist()

    summary = json.loads((tmp_path / "c.json").read_text())
    for name in ("teacher", "student", "control"):
        keys = {"params", "gflops", "tiles_per_s", "probe_accuracy", "probe_ci", "top10_cross_scanner"}
        assert keys <= summary[name].keys()
    assert summary["fidelity"].keys() >= {"cosine_cls", "cosine_patches", "cka", "knn_overlap"}
    assert -1 <= summary["fidelity"]["cosine_cls"] <= 1
    assert "student" in capsys.readouterr().out


def test_labels_and_conditions_reach_the_packed_tiles(cohort: Path) -> None:
    index = pd.read_parquet(cohort / "packed/index.parquet")
    assert {"case", "stain", "scanner", "label", "label_share"} <= set(index.columns)
    assert set(index["stain"]) == {"HE", "violet"}
    assert index["label_share"].between(0, 1).all()


def test_a_second_run_does_nothing_again(cohort: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in (cohort / "packed").iterdir()}
    assert run("tile", cohort / "slides/slides.csv", "--out", cohort / "tiles", "--stride", 112) == 0
    assert run("pack", cohort / "tiles", "--out", cohort / "packed") == 0
    assert {path: path.stat().st_mtime_ns for path in (cohort / "packed").iterdir()} == before
    summary = pd.read_csv(cohort / "tiles/summary.csv")
    assert set(summary["status"]) == {"skipped"}
