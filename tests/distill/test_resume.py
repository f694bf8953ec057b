"""A run killed at any moment and resumed gives bitwise the weights of one that was not."""

import os
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import yaml

from pathokd.data.datamodule import TileDataModule
from pathokd.data.views import Geometry
from pathokd.distill.callbacks import FinalValidation, LastCheckpoint
from pathokd.distill.module import DistillationModule
from pathokd.distill.objective import Objective
from pathokd.distill.optim import OptimSpec
from pathokd.losses import Cosine
from pathokd.models import StudentSpec, TeacherSpec

TINY = {"embed_dim": 16, "num_heads": 2, "patch_size": 8}

PYTHONPATH = [str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])]
STEPS = 12
"""33 or so training tiles in batches of 4, two batches a step: 4 steps an epoch, 3 epochs."""


def fit(config: Path, out: Path, *more: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "pathokd.cli", "fit", "--config", str(config), "--out", str(out)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(PYTHONPATH)}
    with open(out.with_suffix(".log"), "ab") as log:
        return subprocess.Popen(
            [*command, "--checkpoint_every", "1", *more],
            env=environment,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def finish(process: subprocess.Popen[bytes], out: Path) -> dict[str, Any]:
    assert process.wait(timeout=200) == 0, out.with_suffix(".log").read_text()
    checkpoint: dict[str, Any] = torch.load(out / "checkpoints/last.ckpt", weights_only=True)
    assert checkpoint["global_step"] == STEPS
    return checkpoint


def kill_at(process: subprocess.Popen[bytes], out: Path, step: int) -> int:
    """SIGKILL as soon as the checkpoint of `step` or a later one is there; returns which."""
    last = out / "checkpoints/last.ckpt"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        assert process.poll() is None, "the run ended before it could be killed: " + out.with_suffix(".log").read_text()
        if last.exists():
            reached = int(torch.load(last, weights_only=True)["global_step"])
            if reached >= step:
                process.send_signal(signal.SIGKILL)
                process.wait()
                return reached
        time.sleep(0.01)
    raise AssertionError("no checkpoint came")


@pytest.fixture(params=["plain", "robust"])
def config(recipe: dict[str, Any], registered_packed: Path, request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    if request.param == "robust":
        # Registered pairs, two views of the student, weights that follow running means, and a second student.
        data, model = recipe["data"], recipe["model"]
        args = {**model["student"]["model_args"], "depth": 1}
        model["more_students"] = {"small": {**model["student"], "model_args": args}}
        data |= {"tiles": str(registered_packed), "registered": {"case": "case", "conditions": ["stain", "scanner"]}}
        data["photometric"]["student2"] = data["photometric"]["student"]
        model["objectives"][1] = {"loss": {"class_path": "pathokd.losses.Cosine"}, "tokens": "patches", "share": 0.25}
        model["objectives"] += [
            {"loss": {"class_path": "pathokd.losses.RKD"}, "view": "student", "share": 0.2},
            {"loss": {"class_path": "pathokd.losses.Consistency"}, "view": ["student", "student2"], "weight": 0.5},
            {"loss": {"class_path": "pathokd.losses.RegisteredInfoNCE"}, "view": "student", "weight": 0.3},
        ]
        recipe["trainer"] |= {"max_epochs": -1, "max_steps": STEPS}
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    return tmp_path / "c.yaml"


def test_sigkill_in_mid_epoch_and_resume_is_exact(config: Path, tmp_path: Path) -> None:
    whole = finish(fit(config, tmp_path / "whole"), tmp_path / "whole")
    out = tmp_path / "killed"
    # Twice: in the middle of the first epoch, and in a later one after a resume.
    first = kill_at(fit(config, out), out, 2)
    second = kill_at(fit(config, out, "--resume", "true"), out, max(first + 1, 6))
    assert 2 <= first < second < STEPS
    resumed = finish(fit(config, out, "--resume", "true"), out)
    assert whole["state_dict"].keys() == resumed["state_dict"].keys()
    for name, value in whole["state_dict"].items():
        assert torch.equal(value, resumed["state_dict"][name]), name
    for mine, theirs in zip(
        whole["optimizer_states"][0]["state"].values(), resumed["optimizer_states"][0]["state"].values(), strict=True
    ):
        assert all(torch.equal(mine[key], theirs[key]) for key in mine)
    assert not list(out.rglob("*.part"))
    for name in ("student", "small") if "students.small.balance.means" in whole["state_dict"] else ():
        assert int(whole["state_dict"][f"students.{name}.balance.batches"]) == 2 * STEPS


def test_a_signal_loses_nothing(recipe: dict[str, Any], tmp_path: Path) -> None:
    config = tmp_path / "c.yaml"
    config.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    whole = finish(fit(config, tmp_path / "whole"), tmp_path / "whole")
    for number in (signal.SIGINT, signal.SIGTERM):
        out = tmp_path / number.name
        told = {"class_path": "told.Told", "init_args": {"number": int(number), "step": 5}}
        stopped = fit(config, out, "--checkpoint_every", "100", f"--trainer.callbacks+={yaml.safe_dump(told)}")
        assert stopped.wait(timeout=200) == 128 + number, out.with_suffix(".log").read_text()
        said = out.with_suffix(".log").read_text()
        assert f"stopped by {number.name} after step 6; the same command with --resume true" in said
        assert "Traceback" not in said
        assert torch.load(out / "checkpoints/last.ckpt", weights_only=True)["global_step"] == 6
        resumed = finish(fit(config, out, "--resume", "true"), out)
        assert all(torch.equal(value, resumed["state_dict"][name]) for name, value in whole["state_dict"].items())


@pytest.mark.slow
def test_two_processes_stop_at_one_step(recipe: dict[str, Any], tmp_path: Path) -> None:
    recipe["trainer"] |= {"devices": 2, "strategy": "ddp", "accumulate_grad_batches": 1}
    config, out = tmp_path / "c.yaml", tmp_path / "told"
    config.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    told = {"class_path": "told.Told", "init_args": {"number": int(signal.SIGTERM), "step": 5}}
    stopped = fit(config, out, "--checkpoint_every", "100", f"--trainer.callbacks+={yaml.safe_dump(told)}")
    assert stopped.wait(timeout=300) == 128 + signal.SIGTERM, out.with_suffix(".log").read_text()
    assert "stopped by SIGTERM after step 10;" in out.with_suffix(".log").read_text()
    checkpoint = torch.load(out / "checkpoints/last.ckpt", weights_only=True)
    assert checkpoint["global_step"] == 10
    assert checkpoint["pathokd"]["processes"] == 2


class KilledError(Exception):
    """In place of a signal."""


class KillAt(L.Callback):
    """Ends the run when the checkpoint of a step is written, the last of an epoch before it is validated."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(self, trainer: L.Trainer, *args: Any) -> None:
        if trainer.global_step == self.step:
            raise KilledError

    on_validation_start = on_train_batch_start


def test_an_end_of_an_epoch_is_resumed_and_killed_again(teacher_folder: Path, packed: Path, tmp_path: Path) -> None:
    def go(out: Path, *kill: int) -> dict[str, torch.Tensor]:
        torch.manual_seed(0)
        student = StudentSpec("vit_tiny_patch16_224", {**TINY, "depth": 1}, image_px=32)
        built = DistillationModule({"t": TeacherSpec(str(teacher_folder))}, student, [Objective(Cosine())])
        data = TileDataModule(str(packed), batch_size=8, workers=0, geometry=Geometry(32), val_fraction=0.3)
        trainer = L.Trainer(
            default_root_dir=out, accelerator="cpu", max_epochs=3, logger=False, enable_progress_bar=False,
            enable_model_summary=False, num_sanity_val_steps=0, callbacks=[LastCheckpoint(out, 1), *map(KillAt, kill)],
        )  # fmt: skip
        last = out / "last.ckpt"
        with pytest.raises(KilledError) if kill else nullcontext():
            trainer.fit(built, data, ckpt_path=last if last.exists() else None)
        return torch.load(last, weights_only=True)

    whole, out = go(tmp_path / "whole"), tmp_path / "killed"
    steps = [int(go(out, step)["global_step"]) for step in (4, 6, 8)]
    resumed = go(out)
    assert [*steps, int(resumed["global_step"])] == [4, 6, 8, 12]
    assert all(torch.equal(value, resumed["state_dict"][name]) for name, value in whole["state_dict"].items())


@pytest.mark.parametrize(
    ("first", "then"),
    [
        ({"max_steps": 6}, {"max_steps": 12}),
        ({"max_steps": 4}, {"max_steps": 12}),
        ({"max_epochs": 1}, {"max_steps": 12}),
        ({"max_steps": 6}, {"max_epochs": 3}),
        ({"max_epochs": 2}, {"max_epochs": 3}),
    ],
)
def test_a_finished_run_is_made_longer(
    first: dict[str, int], then: dict[str, int], teacher_folder: Path, packed: Path, tmp_path: Path
) -> None:
    """It skipped the rest of its epoch and as much of the next; where schedules are flat, nothing tells it apart."""

    def go(out: Path, length: dict[str, int], seed: int = 0) -> dict[str, torch.Tensor]:
        torch.manual_seed(0)
        student = StudentSpec("vit_tiny_patch16_224", {**TINY, "depth": 1, "drop_path_rate": 0.3}, image_px=32)
        flat = OptimSpec(lr=1e-3, final_lr=1e-3, warmup=0, weight_decay=(0.1, 0.1))
        built = DistillationModule(
            {"t": TeacherSpec(str(teacher_folder))}, student, [Objective(Cosine())], optim=flat, ema_momentum=(0.9, 0.9)
        )
        data = TileDataModule(str(packed), batch_size=8, workers=0, geometry=Geometry(32), val_fraction=0.3, seed=seed)
        trainer = L.Trainer(
            default_root_dir=out, accelerator="cpu", logger=False, enable_progress_bar=False,
            enable_model_summary=False, num_sanity_val_steps=0, callbacks=[FinalValidation(), LastCheckpoint(out)],
            **{"max_epochs": -1, **length},
        )  # fmt: skip
        last = out / "last.ckpt"
        trainer.fit(built, data, ckpt_path=last if last.exists() else None)
        return torch.load(last, weights_only=True)

    whole, out = go(tmp_path / "whole", {"max_steps": 12}), tmp_path / "longer"
    go(out, first)
    with pytest.raises(ValueError, match="Cannot resume"):
        go(out, then, seed=1)
    longer = go(out, then)
    assert (whole["global_step"], longer["global_step"]) == (12, 12)
    assert all(torch.equal(value, longer["state_dict"][name]) for name, value in whole["state_dict"].items())
    again = go(out, then)
    assert all(torch.equal(value, again["state_dict"][name]) for name, value in whole["state_dict"].items())
