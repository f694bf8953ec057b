"""What a recipe cannot mean is one sentence, before anything is trained."""

from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
import yaml
from lightning.pytorch.accelerators import MPSAccelerator

from pathokd.cli.main import main
from pathokd.data.conditions import Condition
from pathokd.data.pack import PackSpec, pack_tiles
from pathokd.data.packed import PackedTiles
from pathokd.data.simulate import simulate_tiles

TINY = {"embed_dim": 16, "depth": 1, "num_heads": 2, "patch_size": 8}


RELATIONS = {"loss": {"class_path": "pathokd.losses.RKD"}}


def recipe(teacher: Path, packed: Path) -> dict[str, Any]:
    student = {"architecture": "vit_tiny_patch16_224", "model_args": TINY, "image_px": 32}
    return {
        "model": {
            "teachers": {"tiny": {"weights": str(teacher)}},
            "student": student,
            "objectives": [{"loss": {"class_path": "pathokd.losses.Cosine"}}],
        },
        "data": {"tiles": str(packed), "batch_size": 8, "workers": 0, "geometry": {"size_px": 32}, "val_fraction": 0.3},
        "trainer": {"max_steps": 1, "accelerator": "cpu", "devices": 1},
    }


@pytest.mark.parametrize(
    ("part", "change", "sentence"),
    [
        ("model", {"standardize_steps": -1}, "must not be negative, got -1"),
        ("model", {"fidelity_tiles": -5}, "must not be negative"),
        ("model", {"ema_momentum": [0.9, 1.5]}, "ema_momentum must lie in 0 to 1"),
        ("model", {"optim": {"patch_embed_lr": -1}}, "must not be negative"),
        ("model", {"optim": {"weight_decay": [-0.1, 0.2]}}, "must not be negative"),
        ("model", {"optim": {"final_lr": -1}}, "must not be negative"),
        ("model", {"more_students": {"large": {}}}, "multiples of 14 px, and a crop of data has 32"),
        ("trainer", {"precision": "bf16-true"}, "set it to bf16-mixed"),
        ("trainer", {"accumulate_grad_batches": 0}, "must be at least 1, got 0"),
        ("trainer", {"overfit_batches": 1}, "each epoch draws other tiles"),
        ("trainer", {"max_time": "00:01:00:00"}, "start it as `timeout 2h pathokd fit ...`"),
        ("trainer", {"check_val_every_n_epoch": 0}, "must be at least 1, got 0: to train without validation"),
        ("trainer", {"max_steps": 0}, "a run of 0 trains nothing"),
        ("trainer", {"max_epochs": 0}, "a run of 0 trains nothing"),
        ("trainer", {"limit_train_batches": 0}, "which trains nothing"),
        ("trainer", {"gradient_clip_algorithm": "nope"}, "nope is invalid"),
        ("trainer", {"max_steps": -1, "max_epochs": -1}, "The schedules need an end"),
        ("trainer", {"devices": 0}, "devices=0"),
        ("data", {"seed": -1}, "must not be negative, and data.val_batch_size must be at least 1, got -1"),
        ("data", {"workers": -1}, "data.workers must not be negative"),
        ("data", {"val_batch_size": 0}, "data.val_batch_size must be at least 1"),
        ("model", {"objectives": [RELATIONS]}, "No objective compares tokens with a teacher's, which tells the best"),
        ("data", {"tiles": "nowhere"}, "nowhere"),
        ("data", {"split_by": "nobody"}, "split_by='nobody' is no column"),
        ("model", {"teachers": {"tiny": {"weights": "nowhere.safetensors"}}}, "nowhere.safetensors"),
    ],
)
def test_it_says_what_is_wrong_and_leaves_nothing(
    part: str, change: dict[str, Any], sentence: str, tiny_teacher: Path, packed: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    config = recipe(tiny_teacher, packed)
    config[part] |= change
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    assert main(["fit", "--config", str(tmp_path / "c.yaml"), "--out", str(tmp_path / "run")]) == 1
    assert sentence in capsys.readouterr().err
    assert not (tmp_path / "run").exists()  # empty logs and a config.yaml looked like a run that had begun


@pytest.mark.parametrize(
    ("objectives", "fraction"),
    [
        ([{"loss": {"class_path": "pathokd.losses.KoLeo"}}], 0),
        ([RELATIONS, {"loss": {"class_path": "pathokd.losses.Cosine"}, "detach": True}], 0.3),
        ([RELATIONS], 0),
    ],
)
def test_what_needs_no_best_epoch_is_trained(
    objectives: list[Any], fraction: float, tiny_teacher: Path, packed: Path, tmp_path: Path
) -> None:
    config = recipe(tiny_teacher, packed)
    config["model"]["objectives"] = objectives
    config["data"]["val_fraction"] = fraction
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    assert main(["fit", "--config", str(tmp_path / "c.yaml"), "--out", str(tmp_path / "run")]) == 0


@pytest.mark.parametrize(
    ("length", "steps"),
    [({}, 4), ({"max_steps": 6}, 6), ({"max_steps": 6, "max_epochs": 1}, 4), ({"fast_dev_run": True}, None)],
)
def test_a_run_is_as_long_as_it_says(
    length: dict[str, Any], steps: int | None, tiny_teacher: Path, packed: Path, tmp_path: Path
) -> None:
    """Steps alone ended after the first epoch, and a trial left a checkpoint that kept the real run from starting."""
    config = recipe(tiny_teacher, packed)
    config["trainer"] = {"accelerator": "cpu", "devices": 1, **length}
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    assert main(["fit", "--config", str(tmp_path / "c.yaml"), "--out", str(tmp_path / "run")]) == 0
    written = tmp_path / "run/checkpoints/last.ckpt"
    assert (torch.load(written, weights_only=True)["global_step"] if written.exists() else None) == steps


def test_callbacks_find_loggers(tiny_teacher: Path, packed: Path, tmp_path: Path) -> None:
    """Lightning's own look for them when they are set up, or as the training starts."""
    config = recipe(tiny_teacher, packed)
    names = ("LearningRateMonitor", "DeviceStatsMonitor")
    config["trainer"] |= {
        "callbacks": [{"class_path": f"lightning.pytorch.callbacks.{name}"} for name in names],
        "log_every_n_steps": 1,
        "max_steps": 3,
    }
    config["model"]["optim"] = {"lr": 1e-3, "warmup": 0.5, "final_lr": 1e-4}
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    assert main(["fit", "--config", str(tmp_path / "c.yaml"), "--out", str(tmp_path / "run")]) == 0
    (log,) = (tmp_path / "run").rglob("metrics.csv")
    table = pd.read_csv(log)
    assert {"train/loss", "val/cosine_cls", "lr-AdamW/pg1"} <= set(table.columns)
    # What a step is taken with, not what the one before it was: two steps warm up, the third has the peak.
    rates = table.dropna(subset="lr-AdamW/pg1").set_index("step")["lr-AdamW/pg1"]
    assert rates.to_dict() == pytest.approx({0: 0.0, 1: 0.5e-3, 2: 1e-3})


def test_a_refused_resume_leaves_the_run_as_it_was(
    tiny_teacher: Path, packed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its config.yaml was that of the refused one afterwards."""
    config, run = recipe(tiny_teacher, packed), tmp_path / "run"
    command = ["fit", "--config", str(tmp_path / "c.yaml"), "--out", str(run), "--trainer.log_every_n_steps", "1"]

    def files() -> dict[Path, bytes]:
        return {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}

    (tmp_path / "c.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    assert main(command) == 0
    before = files()
    assert {path.name for path in before} >= {"config.yaml", "metrics.csv", "last.ckpt", "best.ckpt"}
    for change, sentence in (({"seed": 1}, "Cannot resume"), ({"split_by": "nobody"}, "is no column")):
        (tmp_path / "c.yaml").write_text(yaml.safe_dump({**config, "data": {**config["data"], **change}}))
        more = ["--resume", "true", "--trainer.max_steps", "2"]
        assert main([*command, *more]) == 1
        assert sentence in capsys.readouterr().err
        assert files() == before


@pytest.fixture
def run(tiny_teacher: Path, packed: Path, tmp_path: Path) -> Path:
    """A finished run of the recipe, which lies beside it as c.yaml."""
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(recipe(tiny_teacher, packed)), encoding="utf-8")
    assert main(["fit", "--config", str(tmp_path / "c.yaml"), "--out", str(tmp_path / "run")]) == 0
    return tmp_path / "run"


def test_a_validation_on_tiles_of_the_training_is_refused(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Another fraction, seed or column held out other slides, and the measure was of what had been learnt."""
    saved = str(run / "config.yaml")
    assert main(["validate", "--config", saved, "--out", str(run)]) == 0
    assert main(["validate", "--config", saved, "--out", str(run), "--data.seed", "1"]) == 1
    sentence = capsys.readouterr().err
    assert "16 of these 16 held-out tiles were for training when this checkpoint was written" in sentence
    assert "hold out what that run did, by data.val_fraction 0.3, data.split_by patient, data.seed 0." in sentence
    assert main(["validate", "--config", saved, "--out", str(run), "--data.val_fraction", "0.6"]) == 1
    assert "16 of these 32 held-out tiles" in capsys.readouterr().err
    whole = tmp_path / "whole"
    assert main(["fit", "--config", str(tmp_path / "c.yaml"), "--out", str(whole), "--data.val_fraction", "0"]) == 0
    assert main(["validate", "--config", str(tmp_path / "c.yaml"), "--out", str(whole)]) == 1
    assert "that run held out nothing, so give data.tiles others." in capsys.readouterr().err
    # Another number that holds out the same slide is none of this.
    assert main(["test", "--config", saved, "--out", str(run), "--data.val_fraction", "0.33"]) == 0


def test_a_validation_on_slides_of_the_training_is_refused_in_other_tiles_too(
    run: Path, packed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pack_tiles(packed.parent, tmp_path / "packed", PackSpec(quality=80), workers=1)
    simulate_tiles(PackedTiles(tmp_path / "packed"), tmp_path / "simulated", [Condition(scanner="pale")], workers=1)
    for tiles in (packed.parent, tmp_path / "packed", tmp_path / "simulated"):
        words = ["validate", "--config", str(run / "config.yaml"), "--out", str(run), "--data.tiles", str(tiles)]
        assert main(words) == 0
        capsys.readouterr()
        assert main([*words, "--data.seed", "1"]) == 1
        assert "1 of these 1 held-out slides, slide 0.é for one, were for training when" in capsys.readouterr().err


def test_a_resumed_run_keeps_its_settings_not_its_resuming(tiny_teacher: Path, packed: Path, tmp_path: Path) -> None:
    """The kept `resume: true` made `validate` measure last.ckpt in place of best.ckpt."""
    config, run = recipe(tiny_teacher, packed), tmp_path / "run"
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    command = ["fit", "--config", str(tmp_path / "c.yaml"), "--out", str(run)]
    assert main(command) == 0
    assert main([*command, "--trainer.max_steps", "2", "--resume", "true"]) == 0
    kept = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
    assert kept["trainer"]["max_steps"] == 2
    assert (kept["resume"], kept["ckpt_path"]) == (False, None)


@pytest.mark.filterwarnings("error:The dirpath has changed")
def test_a_moved_run_keeps_its_best(tiny_teacher: Path, packed: Path, tmp_path: Path) -> None:
    """Resumed elsewhere it forgot the measure of best.ckpt, and the next validation, however bad, replaced it."""
    config = recipe(tiny_teacher, packed)
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    command = ["fit", "--config", str(tmp_path / "c.yaml"), "--out"]
    assert main([*command, str(tmp_path / "run")]) == 0
    moved = (tmp_path / "run").rename(tmp_path / "moved")
    best, last = (moved / f"checkpoints/{name}.ckpt" for name in ("best", "last"))
    checkpoint = torch.load(last, weights_only=True)
    (state,) = (state for key, state in checkpoint["callbacks"].items() if "BestCheckpoint" in key)
    state["best_k_models"] = dict.fromkeys(state["best_k_models"], torch.tensor(2.0))  # which no cosine reaches
    torch.save(checkpoint, last)
    before = best.read_bytes()
    assert main([*command, str(moved), "--resume", "true", "--trainer.max_steps", "2"]) == 0
    assert torch.load(last, weights_only=True)["global_step"] == 2
    assert best.read_bytes() == before
    assert not (tmp_path / "run").exists()


def test_another_checkpoint_is_one_sentence(
    tiny_teacher: Path, packed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config, file, run = recipe(tiny_teacher, packed), tmp_path / "c.yaml", tmp_path / "run"

    def said(verb: str, *more: str) -> str:
        file.write_text(yaml.safe_dump(config), encoding="utf-8")
        capsys.readouterr()
        assert main([verb, "--config", str(file), "--out", str(run), *more]) == (1 if more or verb != "fit" else 0)
        return capsys.readouterr().err

    said("fit")
    last = run / "checkpoints/last.ckpt"
    torn, text = tmp_path / "torn.ckpt", tmp_path / "text.ckpt"
    torn.write_bytes(last.read_bytes()[:20000])
    text.write_text("{}")
    for path in (torn, text):
        assert f"{path} cannot be read as a checkpoint" in said("validate", "--ckpt_path", str(path))
    config["data"]["val_fraction"] = 0
    assert "val_fraction is 0, so there are no tiles to validate on" in said("validate")
    config["data"]["val_fraction"] = 0.3
    config["model"]["student"] |= {"model_args": {**TINY, "depth": 2}}
    for verb, more in (("validate", []), ("fit", ["--resume", "true"])):
        sentence = said(verb, *more)
        assert "blocks.1.norm1.weight is not in it, and (16,) in this run" in sentence


def test_a_mac_trains_on_its_processor(
    tiny_teacher: Path,
    packed: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Lightning's own choice there is MPS, which has no fp64."""
    monkeypatch.setattr(MPSAccelerator, "is_available", staticmethod(lambda: True))
    config = recipe(tiny_teacher, packed)
    del config["trainer"]["accelerator"]
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    assert main(["fit", "--config", str(tmp_path / "c.yaml"), "--out", str(tmp_path / "run")]) == 0
