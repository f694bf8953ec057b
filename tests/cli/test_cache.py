"""The verb as a process that is killed, and a training from what it wrote."""

import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from pathokd.cli.main import main
from pathokd.cost import count_gflops
from pathokd.data.pack import PackSpec, pack_tiles
from pathokd.data.packed import PackedTiles
from pathokd.data.targets import TargetStore
from pathokd.data.views import orientation, whole_tile
from pathokd.errors import StoreError
from pathokd.models import TeacherSpec, build_teacher
from pathokd.models.device import bf16_time

TEACHER = Path(__file__).parents[2] / "tile_data/teacher"


def recipe(packed: Path, teacher: dict[str, str], **data: Any) -> dict[str, Any]:
    return {
        "seed_everything": 0,
        "model": {
            "teachers": {"tiny": teacher},
            "student": {
                "architecture": "vit_tiny_patch16_224",
                "model_args": {"embed_dim": 16, "depth": 2, "num_heads": 2, "patch_size": 8, "dynamic_img_size": True},
                "image_px": 32,
            },
            "objectives": [
                {"loss": {"class_path": "pathokd.losses.Cosine"}, "tokens": "cls"},
                {"loss": {"class_path": "pathokd.losses.Cosine"}, "tokens": "patches"},
            ],
        },
        "data": {
            "tiles": str(packed), "batch_size": 8, "workers": 0, "val_fraction": 0.3, "geometry": {"size_px": 32},
            **data,
        },
        "trainer": {"max_epochs": 1, "accelerator": "cpu", "devices": 1, "log_every_n_steps": 1},
    }  # fmt: skip


def fit(folder: Path, config: dict[str, Any], *more: str) -> int:
    (folder / "c.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    return main(["fit", "--config", str(folder / "c.yaml"), "--out", str(folder / "run"), *more])


def test_a_killed_cache_is_refused_and_goes_on_to_the_same_bytes(
    packed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The teacher of tile_data, because a smaller one is through before it can be killed."""
    words = ["cache", str(TEACHER), str(packed), "--tokens", "pooled", "--batch-size", "1", "--view-px", "56", "--out"]
    out, log = tmp_path / "killed", tmp_path / "log"
    with open(log, "ab") as file:
        process = subprocess.Popen([sys.executable, "-m", "pathokd.cli", *words, str(out)], stdout=file, stderr=file)
    deadline = time.monotonic() + 120
    while not (out / ".parts/progress.safetensors").exists():
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < deadline
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (out / "header.json").exists(), "it ended before it was killed"
    with pytest.raises(StoreError, match="unfinished"):
        TargetStore(out)
    assert main([*words, str(tmp_path / "whole")]) == 0
    assert "Caching: 48/48" in capsys.readouterr().err
    assert main([*words, str(out)]) == 0
    said = capsys.readouterr().err
    assert "Caching: 32/32" in said or "Caching: 16/16" in said
    names = {path.name for path in out.iterdir()}
    assert names == {"cls.npy", "patches.npy", "codec.safetensors", "header.json"}
    for name in names - {"codec.safetensors"}:  # statistics of another process may differ in their last bit
        assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name


def test_a_dry_run_says_size_hours_and_break_even_and_writes_nothing(
    packed: Path, tiny_teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["cache", str(tiny_teacher), str(packed), "--out", str(tmp_path / "t"), "--dry-run"]) == 0
    said = capsys.readouterr().err
    # 48 class tokens of width 24 in two bytes.
    assert "Targets of 48 tiles (cls, fp16) take 0.0023 MB and 0.0 minutes" in said
    assert "pay after 1.0 epochs" in said
    assert not (tmp_path / "t").exists()


def test_a_dry_run_counts_the_view_that_the_teacher_will_see(
    packed: Path, tiny_teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A teacher that takes any size computes more of a larger view."""
    words = ["cache", str(tiny_teacher), str(packed), "--out", str(tmp_path / "t"), "--dry-run"]
    dynamic = ["--model-args", "{dynamic_img_size: true}", "--view-px", "64"]
    assert main([*words, *dynamic]) == 0
    said = capsys.readouterr().err
    card = build_teacher(TeacherSpec(str(tiny_teacher))).card
    assert f"The teacher costs {count_gflops(card, image_px=64):.3g} GFLOP a tile" in said


def test_fit_reads_targets_in_place_of_the_teacher(
    packed: Path, tiny_teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    targets = tmp_path / "t"
    words = ["--tokens", "patches", "--dtype", "fp32"]
    assert main(["cache", str(tiny_teacher), str(packed), "--out", str(targets), *words]) == 0
    source = PackedTiles(packed)
    import torch

    view = whole_tile(source.read(5), 32, orientation(source.index["key"][5]))
    teacher = build_teacher(TeacherSpec(str(tiny_teacher)))
    said = teacher(torch.from_numpy(view).movedim(-1, 0)[None])
    np.testing.assert_allclose(TargetStore(targets).read(5)["patches"], said.patches[0], atol=2e-5)

    assert fit(tmp_path, recipe(packed, {"targets": str(targets)})) == 0
    words_of_fit = capsys.readouterr()
    assert f"Targets are read from {targets}; running the teacher would make a step" in words_of_fit.err
    assert "val/cosine_patches" in words_of_fit.err
    written = yaml.safe_load((tmp_path / "run/config.yaml").read_text())
    assert written["model"]["teachers"]["tiny"]["targets"] == str(targets)
    assert "targets" not in written["data"]
    assert (
        fit(tmp_path, recipe(packed, {"targets": str(targets)}), "--resume", "true", "--trainer.max_epochs", "2") == 0
    )
    words_of_fit = capsys.readouterr()
    assert re.search(r"from step (\d+) of \1, and this run has \d+: learning rate", words_of_fit.err)
    assert main(["export", str(tmp_path / "run"), "--out", str(tmp_path / "student")]) == 0
    assert (tmp_path / "student/adaptors.safetensors").is_file()


def test_a_contradiction_is_one_sentence_at_the_start(
    packed: Path, tiny_teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    targets = {"targets": str(tmp_path / "t")}
    assert fit(tmp_path, recipe(packed, targets)) == 1
    assert (
        f"t holds no targets: make them with `pathokd cache TEACHER TILES --out {tmp_path}/t`"
        in capsys.readouterr().err
    )
    assert main(["cache", str(tiny_teacher), str(packed), "--out", str(tmp_path / "t")]) == 0
    assert fit(tmp_path, recipe(packed, targets, geometry={"size_px": 32, "scale": [0.5, 1.0]})) == 1
    assert "data.geometry.scale is (0.5, 1.0) and contradicts the targets" in capsys.readouterr().err
    assert fit(tmp_path, recipe(packed, targets)) == 1
    assert "holds class tokens only" in capsys.readouterr().err
    pack_tiles(packed.parent / "manifest.parquet", tmp_path / "coarse", PackSpec(quality=50), workers=1)
    assert fit(tmp_path, recipe(tmp_path / "coarse", targets)) == 1
    assert "were computed on other tiles" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        ({}, "but stored targets are cheaper: the teacher is"),
        ({"geometry": {"size_px": 32, "scale": [0.5, 1.0]}}, "cannot be replaced by stored targets: random crops"),
    ],
)
def test_a_training_with_a_running_teacher_says_what_it_costs(
    data: dict[str, Any], sentence: str, packed: Path, tiny_teacher: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    assert fit(tmp_path, recipe(packed, {"weights": str(tiny_teacher)}, **data), "--trainer.max_epochs", "2") == 0
    assert sentence in capsys.readouterr().err


def test_slow_arithmetic_is_said(
    packed: Path,
    tiny_teacher: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Many processors know bf16 and are slower in it, some ten times; which ones is measured."""
    drawn = torch.get_rng_state()
    bf16_time.cache_clear()
    assert bf16_time() > 0
    assert torch.equal(torch.get_rng_state(), drawn), "a resumed training would draw other numbers"
    monkeypatch.setattr("pathokd.models.device.SLOW_BF16", 0.0)
    said = f"This CPU takes {bf16_time():.1f} times as long in bf16 as in fp32: better "
    for precision, end in (("bf16", "--precision fp32."), ("fp32", None)):
        words = ["--precision", precision, "--out", str(tmp_path / precision), "--device", "cpu"]
        assert main(["cache", str(tiny_teacher), str(packed), *words]) == 0
        err = capsys.readouterr().err
        assert said + end in err if end else said not in err
    config = recipe(packed, {"weights": str(tiny_teacher), "precision": "bf16"})
    assert fit(tmp_path, config, "--trainer.precision", "bf16-mixed", "--trainer.max_steps", "1") == 0
    assert f"{said}--trainer.precision 32-true and --model.teachers.tiny.precision fp32." in capsys.readouterr().err
