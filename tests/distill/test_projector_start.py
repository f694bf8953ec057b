"""Projectors that begin where least squares puts them."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from sklearn.linear_model import Ridge

from pathokd.data.datamodule import TileDataModule
from pathokd.data.views import Geometry
from pathokd.distill.callbacks import LastCheckpoint
from pathokd.distill.module import DistillationModule
from pathokd.distill.network import ProjectorSpec
from pathokd.distill.objective import Objective
from pathokd.distill.projector_start import Compared, ProjectorStart, compared, described
from pathokd.export.run import export_run
from pathokd.losses import MSE, Cosine, KoLeo, SmoothL1
from pathokd.models import StudentSpec, TeacherSpec, load_encoder
from pathokd.models.ridge import RIDGES
from pathokd.models.standardize import Standardizer

TINY = {"embed_dim": 16, "depth": 2, "num_heads": 2, "patch_size": 8}


def module(teacher: Path, **changes: Any) -> DistillationModule:
    settings: dict[str, Any] = {
        "teachers": {"t": TeacherSpec(str(teacher))},
        "student": StudentSpec("vit_tiny_patch16_224", TINY, image_px=32),
        "objectives": [Objective(MSE()), Objective(Cosine(), tokens="patches")],
        "projector": ProjectorSpec(solve_tiles=24),
        "standardize_steps": 100,
    }
    return DistillationModule(**{**settings, **changes})


def fit(built: DistillationModule, tiles: Path, out: Path, *callbacks: Callback, **more: Any) -> L.Trainer:
    data = TileDataModule(str(tiles), 8, workers=0, geometry=Geometry(32), val_fraction=0.3)
    runner = L.Trainer(
        default_root_dir=out, accelerator="cpu", logger=False, enable_progress_bar=False, max_epochs=-1,
        enable_model_summary=False, num_sanity_val_steps=0, limit_val_batches=0, callbacks=list(callbacks),
        max_steps=more.pop("max_steps", 1),
    )  # fmt: skip
    runner.fit(built, data, **more)
    return runner


class First(Callback):
    """Keeps the losses and the projectors of the first step."""

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if not hasattr(self, "heads"):
            mine, averaged = (net.heads.state_dict() for net in (pl_module.net, pl_module.evaluated))
            self.heads = {name: value.clone() for name, value in mine.items()}
            self.averaged = {name: value.clone() for name, value in averaged.items()}

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if not hasattr(self, "parts"):
            self.parts = {name: float(value) for name, value in outputs["parts"].items()}


@pytest.mark.parametrize("kind", ["linear", "mlp"])
def test_the_last_layer_is_scikit_learns_on_the_batches_that_training_begins_with(
    kind: Any, teacher_folder: Path, packed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(0)
    built, first = module(teacher_folder, projector=ProjectorSpec(kind, solve_tiles=24)), First()
    built.configure_model()
    fit(built, packed, tmp_path, first)
    said = capsys.readouterr().err
    assert "Projectors begin where ridge regression on 24 tiles puts them; in other tiles they explain" in said
    torch.manual_seed(0)
    again, teacher = module(teacher_folder, projector=ProjectorSpec(kind)), load_encoder(str(teacher_folder)).eval()
    again.configure_model()
    data = TileDataModule(str(packed), 8, workers=0, geometry=Geometry(32), val_fraction=0.3)
    data.setup()
    images = torch.cat([batch["views"]["clean"] for batch, _ in zip(data.train_dataloader(), range(3), strict=False)])
    assert len(images) == 24
    with torch.no_grad():
        mine, theirs = again.net.eval()(images), teacher(images)
        for tokens in ("cls", "patches"):
            head = again.net.heads[f"t__{tokens}"].net
            x = head[:-1](getattr(mine, tokens)).flatten(0, -2).double().numpy()
            y = getattr(theirs, tokens).flatten(0, -2).double().numpy()
            scale = built.statistics[f"t__{tokens}"]
            z = (y - y.mean(0)) / (y.std(0, ddof=1) + scale.eps)
            name = f"t__{tokens}.net.{len(head) - 1}"
            found = first.heads[f"{name}.weight"].numpy(), first.heads[f"{name}.bias"].numpy()
            off = []
            for ridge in RIDGES:
                expected = Ridge(ridge * len(x) * x.var(0).mean()).fit(x, z)
                off.append(max(np.abs(expected.coef_ - found[0]).max(), np.abs(expected.intercept_ - found[1]).max()))
            assert min(off) < 1e-4 < sorted(off)[1]
    assert all(torch.equal(first.averaged[name], value) for name, value in first.heads.items())


def test_the_first_loss_is_that_of_a_projector_that_fits(
    teacher_folder: Path, packed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    losses = []
    for tiles in (0, 32):
        torch.manual_seed(0)
        built, first = module(teacher_folder, projector=ProjectorSpec(solve_tiles=tiles)), First()
        fit(built, packed, tmp_path, first)
        losses.append(first.parts)
        assert ("Projectors begin" in capsys.readouterr().err) == bool(tiles)
    at_random, solved = losses
    assert solved["cls_mse"] < 0.8 < at_random["cls_mse"]
    assert solved["patches_cosine"] < at_random["patches_cosine"] - 0.1


def test_each_crop_of_a_tile_meets_the_teachers_view_of_it(teacher_folder: Path) -> None:
    """Regression by hand, on raw targets that the student's view of the whole tile nearly tells."""
    built = module(teacher_folder, standardize_steps=0)
    built.configure_model()
    generator = torch.Generator().manual_seed(0)
    colours = torch.randint(0, 200, (60, 3, 1, 1), generator=generator)
    clean = (colours + torch.randint(0, 20, (60, 3, 32, 32), generator=generator)).byte()
    views = {"clean": clean, "local/clean": torch.stack([clean[..., :16, :16], clean[..., 16:, 16:]], 1)}
    batch: Any = {"views": views, "index": list(range(60)), "key": [f"tile-{i}" for i in range(60)]}
    objectives = [Objective(SmoothL1(), view=["clean", "local/clean"]), Objective(KoLeo()), Objective(Cosine())]
    terms = compared(objectives, lambda _: "t", {"clean", "local"})
    assert terms == [("t", "cls", [("clean", "clean"), ("local/clean", "clean")])]
    start = ProjectorStart(built.net, built.evaluated, terms, built.statistics)
    with torch.no_grad():
        whole = built.net(clean).cls
        y = whole @ torch.randn(16, 24, generator=generator) + 0.1 * torch.randn(60, 24, generator=generator)
        targets: Any = SimpleNamespace(pooled_grid=lambda _: None, get=lambda *_: y)
        start.add(batch, targets)
        told = start.finish()
        x = torch.cat([whole, built.net(views["local/clean"].flatten(0, 1)).cls]).double().numpy()
    y = torch.cat([y, y.repeat_interleave(2, 0)]).double().numpy()
    head = built.net.heads["t__cls"].net[0]
    off = [
        np.abs(Ridge(ridge * len(x) * x.var(0).mean()).fit(x, y).coef_ - head.weight.detach().numpy()).max()
        for ridge in RIDGES
    ]
    assert min(off) < 1e-4 < sorted(off)[1]
    assert list(told) == ["t.cls"]
    assert 0 < told["t.cls"] < 1


def test_a_projector_that_would_tell_nothing_stays_at_random(teacher_folder: Path) -> None:
    built = module(teacher_folder, standardize_steps=0)
    built.configure_model()
    noise = torch.randn(20, 24, generator=torch.Generator().manual_seed(0))
    batch: Any = {"views": {"clean": torch.zeros(20, 3, 32, 32, dtype=torch.uint8)}, "key": [f"{i}" for i in range(20)]}
    targets: Any = SimpleNamespace(pooled_grid=lambda _: None, get=lambda *_: noise)
    before = built.net.heads["t__cls"].net[0].weight.detach().clone()
    start = ProjectorStart(built.net, built.evaluated, [Compared("t", "cls", [("clean", "clean")])], built.statistics)
    with torch.no_grad():
        start.add(batch, targets)
        told = start.finish()
    assert told["t.cls"] <= 0
    assert torch.equal(built.net.heads["t__cls"].net[0].weight, before)
    nothing = "Ridge regression on 20 tiles explains nothing in others of t.cls, which begin at random."
    assert described(told, 20) == nothing
    solved = "Projectors begin where ridge regression on 20 tiles puts them; in other tiles they explain 54% of a.cls."
    assert described({"a.cls": 0.54, **told}, 20) == f"{solved} {nothing}"


def test_a_run_that_goes_on_keeps_its_projectors(
    teacher_folder: Path, packed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ends = []
    for stops in ([4], [2, 4]):
        torch.manual_seed(0)
        for number, steps in enumerate(stops):
            built = module(teacher_folder)
            more = {"ckpt_path": tmp_path / "c.ckpt"} if number else {}
            # One schedule: the first half of it, and then all of it, would be another training.
            built.optim_spec = type(built.optim_spec)(warmup=0.0, final_lr=5e-4, weight_decay=(0.04, 0.04))
            built.ema_momentum = (0.9, 0.9)
            last = LastCheckpoint(tmp_path / "last")
            fit(built, packed, tmp_path, last, max_steps=steps, **more).save_checkpoint(tmp_path / "c.ckpt")
            assert ("Projectors begin" in capsys.readouterr().err) == (not number)
        ends.append(built.state_dict())
    assert all(torch.equal(value, ends[1][name]) for name, value in ends[0].items())


def test_projectors_of_an_export_stay(
    teacher_folder: Path, packed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    earlier = module(teacher_folder)
    fit(earlier, packed, tmp_path).save_checkpoint(tmp_path / "c.ckpt")
    export_run(tmp_path / "c.ckpt", tmp_path / "student")
    capsys.readouterr()
    start = StudentSpec("vit_tiny_patch16_224", TINY, image_px=32, init=str(tmp_path / "student"))
    built, first = module(teacher_folder, student=start), First()
    fit(built, packed, tmp_path, first)
    assert "Projectors begin" not in capsys.readouterr().err
    torch.testing.assert_close(first.heads, dict(earlier.evaluated.heads.state_dict()), rtol=1e-4, atol=1e-5)


def test_statistics_of_a_running_teacher_do_not_move_what_is_solved(teacher_folder: Path) -> None:
    """Batches are standardised as well as is known by then; the regression must not feel it."""
    built = module(teacher_folder)
    built.configure_model()
    weights = []
    for size in (24, 6):
        for name in built.statistics:
            built.statistics[name] = Standardizer(built.teacher("t").embed_dim)
        terms = compared(built.objectives, built._teacher_of, {"clean"})
        start = ProjectorStart(built.net, built.net, terms, built.statistics)
        generator = torch.Generator().manual_seed(0)
        images = torch.randint(0, 256, (24, 3, 32, 32), dtype=torch.uint8, generator=generator)
        built._trainer = type("Trainer", (), {"global_step": 0})()
        with torch.no_grad():
            for at in range(0, 24, size):
                part: Any = {
                    "views": {"clean": images[at : at + size]},
                    "index": list(range(at, at + size)),
                    "key": [f"tile-{i}" for i in range(at, at + size)],
                }
                start.add(part, built._targets_of(part))
            start.finish()
        weights.append(built.net.heads["t__cls"].net[0].weight.detach().clone())
    torch.testing.assert_close(weights[0], weights[1], rtol=1e-3, atol=1e-5)


def test_too_few_tiles_and_other_data_are_refused(teacher_folder: Path) -> None:
    with pytest.raises(ValueError, match=r"solve_tiles must be 0 .* or at least 16, got 5"):
        ProjectorSpec(solve_tiles=5)
    with pytest.raises(ValueError, match="needs the tiles of a TileDataModule"):
        module(teacher_folder)._solve_projectors(None)
