"""The validation callback: its numbers against the measures themselves, best checkpoints, collapse, bad input."""

from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pandas as pd
import pytest
import torch
import yaml

from pathokd.cli.main import main
from pathokd.data.datamodule import TileDataModule
from pathokd.data.pack import PackSpec, pack_source
from pathokd.data.packed import PackedTiles
from pathokd.data.views import Geometry
from pathokd.distill.callbacks import BestCheckpoint
from pathokd.distill.module import DistillationModule
from pathokd.distill.objective import Objective
from pathokd.distill.robustness_callback import RobustnessCallback, cross_scanner_rows
from pathokd.errors import ManifestError
from pathokd.losses import Cosine
from pathokd.metrics import paired_topk, separation
from pathokd.models import StudentSpec, TeacherSpec
from pathokd.types import Rgb

TINY = {"embed_dim": 16, "depth": 2, "num_heads": 2, "patch_size": 8}
PX, SIDE = 32, 4


class TwoScanners:
    """Two cases of 4 x 4 places under two scanners, the second darker and of half the pixel size."""

    def __init__(self) -> None:
        rows = [
            {
                "key": f"{case}-{scanner}-{x}-{y}",
                "slide_id": f"{case}_{scanner}",
                "path": "none",
                "x": x * PX * zoom,
                "y": y * PX * zoom,
                "mpp": 0.5,
                "mpp_level0": 0.5 / zoom,
                "tile_px": PX,
                "case": f"c{case}",
                "stain": "HE",
                "scanner": scanner,
                "label": "ab"[x % 2],
                "patient": f"c{case}",
            }
            for case in range(2)
            for scanner, zoom in (("S1", 1), ("S2", 2))
            for x in range(SIDE)
            for y in range(SIDE)
        ]
        self.index = pd.DataFrame(rows).sample(frac=1.0, random_state=0, ignore_index=True)

    def __len__(self) -> int:
        return len(self.index)

    def read(self, row: int) -> Rgb:
        at = self.index.iloc[row]
        place = int(at["case"][1:]) * 100 + round(at["x"] * at["mpp_level0"]) * 10 + round(at["y"] * at["mpp_level0"])
        tile = np.random.default_rng(place).integers(60, 250, (4, 4, 3)).repeat(8, 0).repeat(8, 1)
        return (tile * (0.9 if at["scanner"] == "S2" else 1.0)).astype(np.uint8)


@pytest.fixture(scope="module")
def paired(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("paired") / "packed"
    pack_source(TwoScanners(), folder, PackSpec(quality=0), {"of": "a test"}, workers=1)
    return folder


def fit(
    teacher: Path, tiles: Path, out: Path, *callbacks: L.Callback, **trainer: Any
) -> tuple[L.Trainer, DistillationModule]:
    module = DistillationModule(
        teachers={"t": TeacherSpec(str(teacher))},
        student=StudentSpec("vit_tiny_patch16_224", TINY, image_px=PX),
        objectives=[Objective(Cosine())],
        standardize_steps=0,
    )
    data = TileDataModule(str(tiles), batch_size=8, workers=0, geometry=Geometry(PX), val_fraction=0.4)
    settings: dict[str, Any] = {"max_epochs": 2, "logger": False, "enable_progress_bar": False, "accelerator": "cpu"}
    settings |= {"enable_model_summary": False, "num_sanity_val_steps": 1, "callbacks": list(callbacks), **trainer}
    runner = L.Trainer(default_root_dir=out, **settings)
    runner.fit(module, data)
    return runner, module


def test_values_are_those_of_the_measures(teacher_folder: Path, paired: Path, tmp_path: Path) -> None:
    best = BestCheckpoint(tmp_path, monitor="val/top3_cross_scanner")
    callback = RobustnessCallback(str(paired), k=3, neighbour_k=2, min_separation=0.0)
    runner, module = fit(teacher_folder, paired, tmp_path, callback, best)
    logged = {name: float(value) for name, value in runner.callback_metrics.items()}
    assert (tmp_path / "best.ckpt").is_file()

    packed = PackedTiles(paired)
    index = packed.index.assign(
        place=lambda f: (
            f["case"] + "/" + (f["x"] * f["mpp_level0"]).astype(str) + "/" + (f["y"] * f["mpp_level0"]).astype(str)
        )
    )
    ordered = [index[index["scanner"] == s].sort_values("place").index for s in ("S1", "S2")]
    a, b = (
        module.evaluated.encoder(
            torch.from_numpy(np.stack([packed.read(row) for row in rows])).permute(0, 3, 1, 2).contiguous()
        ).cls.detach()
        for rows in ordered
    )
    assert logged["val/top3_cross_scanner"] == pytest.approx(float(paired_topk(a, b, 3)), abs=1e-6)
    assert logged["val/separation"] == pytest.approx(float(separation(a, b)), abs=1e-5)
    assert 0 <= logged["val/robustness_index"] <= 1
    assert not callback.collapsed


def test_collapse_stops_with_one_sentence(
    teacher_folder: Path, paired: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    callback = RobustnessCallback(str(paired), k=3, min_separation=1.9)  # no student separates so far
    runner, _ = fit(teacher_folder, paired, tmp_path, callback, max_epochs=5)
    assert callback.collapsed
    assert runner.current_epoch == 2  # epoch 0 may not stop, epoch 1 does
    said = [line for line in capsys.readouterr().err.splitlines() if "separation" in line]
    assert len(said) == 1
    assert said[0].startswith("Training stops at epoch 1")


def test_rows_of_a_condition_show_the_same_places(paired: Path) -> None:
    index = PackedTiles(paired).index
    found = cross_scanner_rows(index, "here", 10)
    assert found.pairs == [tuple(found.rows)]
    first, second = (index.iloc[rows].reset_index(drop=True) for rows in found.rows.values())
    assert len(first) == 10
    for column in ("x", "y"):
        assert (first[column] * first["mpp_level0"]).tolist() == (second[column] * second["mpp_level0"]).tolist()
    assert first["case"].tolist() == second["case"].tolist()
    assert (first["scanner"] != second["scanner"]).all()


def test_a_place_is_never_paired_with_its_neighbour(paired: Path) -> None:
    """On a grid that starts at half a tile, rounding put neighbours into one place as soon as a pixel was off."""
    index = PackedTiles(paired).index.copy()
    index["x"] += np.where(index["scanner"] == "S1", PX // 2, PX - 1)  # half a tile of each, the second a pixel less
    paired_rows = cross_scanner_rows(index, "here", 10)
    first, second = (index.iloc[rows] for rows in paired_rows.rows.values())
    assert len(first) == 10
    off = (
        first["x"].to_numpy() * first["mpp_level0"].to_numpy()
        - second["x"].to_numpy() * second["mpp_level0"].to_numpy()
    )
    assert np.abs(off).max() < PX * 0.5 * 0.05


def test_bad_input_is_one_sentence(paired: Path, packed: Path) -> None:
    index = PackedTiles(paired).index
    with pytest.raises(ManifestError, match="lacks the columns case, stain, scanner"):
        RobustnessCallback(str(packed)).setup(L.Trainer(logger=False), L.LightningModule(), "fit")
    with pytest.raises(ValueError, match=r"k = 99 is larger than the gallery of 63 tiles"):
        RobustnessCallback(str(paired), k=99).setup(L.Trainer(logger=False), L.LightningModule(), "fit")
    with pytest.raises(ManifestError, match="no staining under two scanners"):
        cross_scanner_rows(index[index["scanner"] == "S1"], "here", 10)
    with pytest.raises(ManifestError, match="no place of a case is seen under two of the 2 conditions"):
        cross_scanner_rows(index.assign(case=index["case"] + index["scanner"]), "here", 10)
    with pytest.raises(ValueError, match="max_places should be at least 2"):
        RobustnessCallback(str(paired), max_places=1)


def test_a_best_checkpoint_of_another_measure_stands_alone(teacher_folder: Path, paired: Path, tmp_path: Path) -> None:
    """The run's own, by cosine, wrote the same best.ckpt in turn with it."""
    out, measure = tmp_path / "run", "val/top3_cross_scanner"
    callbacks = [
        {"class_path": "pathokd.distill.robustness_callback.RobustnessCallback",
         "init_args": {"tiles": str(paired), "k": 3, "min_separation": 0.0}},
        {"class_path": "pathokd.distill.callbacks.BestCheckpoint",
         "init_args": {"dirpath": str(out / "checkpoints"), "monitor": measure}},
    ]  # fmt: skip
    config = {
        "model": {
            "teachers": {"t": {"weights": str(teacher_folder)}},
            "student": {"architecture": "vit_tiny_patch16_224", "model_args": TINY, "image_px": PX},
            "objectives": [{"loss": {"class_path": "pathokd.losses.Cosine"}}],
        },
        "data": {"tiles": str(paired), "batch_size": 8, "workers": 0, "geometry": {"size_px": PX}, "val_fraction": 0.4},
        "trainer": {"max_epochs": 1, "accelerator": "cpu", "devices": 1, "callbacks": callbacks},
    }
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    assert main(["fit", "--config", str(tmp_path / "c.yaml"), "--out", str(out)]) == 0
    kept = torch.load(out / "checkpoints/best.ckpt", weights_only=True)["callbacks"]
    assert [state["monitor"] for name, state in kept.items() if "BestCheckpoint" in name] == [measure]


def test_it_is_written_in_yaml_like_any_callback(paired: Path) -> None:
    from jsonargparse import ArgumentParser

    parser = ArgumentParser()
    parser.add_subclass_arguments(L.Callback, "callback")
    name = "pathokd.distill.robustness_callback.RobustnessCallback"
    parsed = parser.parse_object({"callback": {"class_path": name, "init_args": {"tiles": str(paired), "k": 5}}})
    assert parser.instantiate_classes(parsed).callback.k == 5
