"""The module as a whole: what it computes, what it stores, what it refuses."""

import contextlib
import shutil
import signal
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import torch.nn.functional as F

from pathokd.data.datamodule import TileDataModule
from pathokd.data.views import Geometry
from pathokd.distill.callbacks import FinalValidation, FiniteGuard, LastCheckpoint
from pathokd.distill.module import DistillationModule
from pathokd.distill.network import ProjectorSpec
from pathokd.distill.objective import Objective
from pathokd.distill.stopping import StopOnSignal
from pathokd.errors import TrainingError
from pathokd.losses import DINO, RKD, Cosine, SmoothL1
from pathokd.models import StudentSpec, TeacherSpec, load_encoder
from pathokd.models.student import build_student

TINY = {"embed_dim": 16, "depth": 2, "num_heads": 2, "patch_size": 8}


def module(teacher: Path, **changes: Any) -> DistillationModule:
    settings: dict[str, Any] = {
        "teachers": {"t": TeacherSpec(str(teacher))},
        "student": StudentSpec("vit_tiny_patch16_224", TINY, image_px=32),
        "objectives": [Objective(Cosine()), Objective(SmoothL1(), tokens="patches", weight=0.5)],
        "standardize_steps": 0,
    }
    built = DistillationModule(**{**settings, **changes})
    built.configure_model()
    return built


def batch(n: int = 3, names: tuple[str, ...] = ("clean",)) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    views = {name: torch.randint(0, 256, (n, 3, 32, 32), dtype=torch.uint8, generator=generator) for name in names}
    return {"views": views, "index": list(range(n)), "key": [f"tile-{i}" for i in range(n)]}


def fit(built: DistillationModule, packed: Path, out: Path, **trainer: Any) -> L.Trainer:
    data = TileDataModule(str(packed), batch_size=8, workers=0, geometry=Geometry(32), val_fraction=0.3)
    settings = {"max_epochs": 1, "logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    runner = L.Trainer(default_root_dir=out, accelerator="cpu", **{**settings, "num_sanity_val_steps": 0, **trainer})
    runner.fit(built, data)
    return runner


def test_losses_equal_the_formula_on_the_models_own_outputs(teacher_folder: Path) -> None:
    built = module(teacher_folder).eval()
    images = batch()
    with torch.no_grad():
        losses = built.losses(images)
    teacher = load_encoder(str(teacher_folder)).eval()
    with torch.no_grad():
        t, s = teacher(images["views"]["clean"]), built.net.encoder(images["views"]["clean"])
        cls = built.net.heads["t__cls"](s.cls)
        patches = built.net.heads["t__patches"](s.patches)
    expected_cls = (1 - F.cosine_similarity(cls, t.cls, dim=-1)).mean()
    expected_patches = F.smooth_l1_loss(patches, t.patches)
    assert float(losses.parts["cls_cosine"]) == pytest.approx(float(expected_cls), abs=1e-6)
    assert float(losses.parts["patches_smoothl1"]) == pytest.approx(float(expected_patches), abs=1e-6)
    assert float(losses.total) == pytest.approx(float(expected_cls + 0.5 * expected_patches), abs=1e-6)


def test_each_objective_sees_its_own_views(teacher_folder: Path) -> None:
    objectives = [Objective(Cosine(), view="student"), Objective(Cosine(), view="student", teacher_view="student")]
    built = module(teacher_folder, objectives=objectives).eval()
    images = batch(names=("clean", "student"))
    swapped = {**images, "views": {"clean": images["views"]["student"], "student": images["views"]["student"]}}
    with torch.no_grad():
        same, crossed = built.losses(swapped), built.losses(images)
    assert float(same.total) != pytest.approx(float(crossed.total), abs=1e-4)
    with pytest.raises(ValueError, match="'student'"):
        built.losses(batch())


def test_patch_grids_of_different_size_meet_on_the_students(teacher_folder: Path) -> None:
    student = StudentSpec("vit_tiny_patch16_224", {**TINY, "patch_size": 16}, image_px=32)
    losses = module(teacher_folder, student=student).losses(batch())
    assert losses.total.isfinite()


def test_gradients_reach_student_and_heads_but_no_teacher(teacher_folder: Path) -> None:
    built = module(teacher_folder)
    built.losses(batch()).total.backward()
    assert all(p.grad is not None for p in built.net.heads.parameters())
    assert sum(float(p.grad.abs().sum()) for p in built.net.encoder.parameters() if p.grad is not None) > 0
    teacher = built.teacher("t")
    assert not any(p.requires_grad for p in teacher.encoder.parameters())
    assert not built.train().teacher("t").training
    assert not teacher.encoder.model.training


def test_a_fit_changes_the_student_and_stores_no_teacher(teacher_folder: Path, packed: Path, tmp_path: Path) -> None:
    built = module(teacher_folder, standardize_steps=2)
    before = {name: value.clone() for name, value in built.net.state_dict().items()}
    runner = fit(built, packed, tmp_path)
    runner.save_checkpoint(tmp_path / "c.ckpt")
    saved = torch.load(tmp_path / "c.ckpt", weights_only=True)
    assert not any("teacher" in name for name in saved["state_dict"])
    assert {name.split(".")[0] for name in saved["state_dict"]} == {"students", "statistics"}
    assert any(not torch.equal(before[name], value) for name, value in built.net.state_dict().items())
    assert {"val/cosine_cls", "val/cosine_patches", "val/cka", "val/knn_overlap"} <= runner.callback_metrics.keys()


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_gradients_are_clipped_at_any_precision(
    precision: Any, teacher_folder: Path, packed: Path, tmp_path: Path
) -> None:
    built = module(teacher_folder)
    norms = []

    class Watch(L.Callback):
        def on_before_optimizer_step(self, *args: Any) -> None:
            norms.append(float(torch.nn.utils.get_total_norm(p.grad for p in built.net.parameters())))

    class Clip(L.Callback):
        def on_train_batch_end(self, *args: Any) -> None:
            clipped.append(float(torch.nn.utils.get_total_norm(p.grad for p in built.net.parameters())))

    clipped: list[float] = []
    runner = fit(built, packed, tmp_path, callbacks=[Watch(), Clip()], precision=precision, gradient_clip_val=0.01)
    assert runner.global_step == len(norms) == len(clipped) > 2
    assert min(norms) > 0.02
    assert max(clipped) <= 0.0101


def test_the_average_follows_the_student_by_its_formula(teacher_folder: Path, packed: Path, tmp_path: Path) -> None:
    built = module(teacher_folder, ema_momentum=(0.5, 0.5))
    weights = [built.net.heads["t__cls"].net[0].weight.detach().clone()]  # type: ignore[union-attr, index]

    class Watch(L.Callback):
        def on_train_batch_end(self, *args: Any) -> None:
            weights.append(built.net.heads["t__cls"].net[0].weight.detach().clone())  # type: ignore[union-attr, index]

    fit(built, packed, tmp_path, callbacks=[Watch()])
    expected = weights[0]
    for weight in weights[1:]:
        expected = 0.5 * expected + 0.5 * weight
    assert len(weights) > 3
    averaged = built.evaluated.heads["t__cls"].net[0].weight  # type: ignore[union-attr, index]
    assert torch.allclose(averaged, expected, atol=1e-6)
    assert torch.allclose(weights[-1], averaged) is False


def test_distillation_learns(teacher_folder: Path, packed: Path, tmp_path: Path) -> None:
    from pathokd.distill.optim import OptimSpec

    # Raw targets, so that the cosine before and after is taken in the same space.
    built = module(teacher_folder, optim=OptimSpec(lr=3e-3), ema_momentum=None, standardize_steps=0)
    fit(built, packed, tmp_path, max_epochs=0)
    untrained = _val_cosine(built, packed, tmp_path)
    fit(built, packed, tmp_path, max_epochs=30)
    assert _val_cosine(built, packed, tmp_path) > untrained + 0.3


def _val_cosine(built: DistillationModule, packed: Path, out: Path) -> float:
    data = TileDataModule(str(packed), batch_size=8, workers=0, geometry=Geometry(32), val_fraction=0.3)
    runner = L.Trainer(default_root_dir=out, accelerator="cpu", logger=False, enable_progress_bar=False)
    return float(runner.validate(built, data, verbose=False)[0]["val/cosine_cls"])


def test_two_teachers_need_names_and_get_their_own_heads(teacher_folder: Path) -> None:
    teachers = {"a": TeacherSpec(str(teacher_folder)), "b": TeacherSpec(str(teacher_folder))}
    with pytest.raises(ValueError, match="must name one of the teachers"):
        module(teacher_folder, teachers=teachers)
    with pytest.raises(ValueError, match="'c' is none of"):
        module(teacher_folder, teachers=teachers, objectives=[Objective(Cosine(), teacher="c")])
    built = module(
        teacher_folder,
        teachers=teachers,
        objectives=[Objective(Cosine(), teacher="a"), Objective(Cosine(), teacher="b", tokens="patches")],
        projector=ProjectorSpec("mlp", 12),
    )
    assert list(built.net.heads) == ["a__cls", "b__patches"]
    assert set(built.losses(batch()).parts) == {"a.cls_cosine", "b.patches_cosine"}


def test_a_checkpoint_of_another_teacher_is_refused(teacher_folder: Path, packed: Path, tmp_path: Path) -> None:
    from pathokd.export import export_student

    fit(module(teacher_folder), packed, tmp_path).save_checkpoint(tmp_path / "c.ckpt")
    other = build_student(StudentSpec("vit_tiny_patch16_224", TINY, image_px=32, seed=99))
    export_student(other, tmp_path / "other", licence="MIT")
    saved = torch.load(tmp_path / "c.ckpt", weights_only=True)
    with pytest.raises(TrainingError, match="'t' has other weights"):
        module(tmp_path / "other").on_load_checkpoint(saved)
    dark = {"t": TeacherSpec(str(teacher_folder), mean=(0.1, 0.1, 0.1))}
    with pytest.raises(
        TrainingError, match=r"'t' saw tiles with mean \(0\.\d+, .*\) when .* with \(0\.1, 0\.1, 0\.1\) now"
    ):
        module(teacher_folder, teachers=dark).on_load_checkpoint(saved)
    module(teacher_folder).on_load_checkpoint(saved)
    with pytest.raises(TrainingError, match="none of pathokd's"):
        module(teacher_folder).on_load_checkpoint({"state_dict": {}})


def test_a_loss_that_is_not_finite_stops_with_step_parts_and_tiles(
    teacher_folder: Path, packed: Path, tmp_path: Path
) -> None:
    class Poisoned(Cosine):
        calls = 0

        def forward(self, prediction: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
            Poisoned.calls += 1
            return super().forward(prediction, target) * (float("nan") if Poisoned.calls == 3 else 1.0)

    built = module(teacher_folder, objectives=[Objective(Poisoned())])
    with pytest.raises(TrainingError, match=r"not finite at step 3: cls_poisoned = nan.*slide_\d_é"):
        fit(built, packed, tmp_path, callbacks=[FiniteGuard()])


def test_the_guard_looks_before_a_checkpoint_is_written() -> None:
    guard = FiniteGuard(every_n_steps=1000)
    guard._pending.append((7, torch.tensor(float("inf")), {"cls_cosine": torch.tensor(2.0)}, ["a", "b"]))
    with pytest.raises(TrainingError, match=r"step 7: cls_cosine = 2\. Its tiles are a, b"):
        guard.on_save_checkpoint(None, None, {})  # type: ignore[arg-type]


def test_weights_that_a_gradient_broke_are_never_saved(teacher_folder: Path, packed: Path, tmp_path: Path) -> None:
    """The loss of that step was finite, and last.ckpt would be all that is left."""

    class Breaks(L.Callback):
        def on_before_optimizer_step(self, trainer: L.Trainer, built: Any, optimizer: Any) -> None:
            if trainer.global_step == 2:
                built.net.encoder.model.cls_token.grad.fill_(float("inf"))

    last = LastCheckpoint(tmp_path, 1)
    with pytest.raises(TrainingError, match=r"not finite before step 3 \(\S*cls_token is the first that is not\)"):
        fit(module(teacher_folder), packed, tmp_path, callbacks=[FiniteGuard(), Breaks(), last])
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert saved["global_step"] == 2
    assert all(bool(value.isfinite().all()) for value in saved["state_dict"].values())


def test_no_teacher_or_objective_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one teacher"):
        DistillationModule({}, StudentSpec(), [Objective(Cosine())])
    with pytest.raises(ValueError, match="weight must not be negative"):
        Objective(Cosine(), weight=-1)


def test_local_crops_meet_the_teachers_view_of_their_tile(teacher_folder: Path) -> None:
    """Student on (batch, count) crops, teacher on one view a tile: the mean over crops of each crop's own loss."""
    args = {**TINY, "dynamic_img_size": True}
    local = Objective(Cosine(), view="local/student")
    student = StudentSpec("vit_tiny_patch16_224", args, image_px=32)
    built = module(teacher_folder, objectives=[local], student=student).eval()
    images = batch()
    crops = torch.randint(0, 256, (3, 4, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        together = built.losses({**images, "views": {**images["views"], "local/student": crops}})
        alone = [
            built.losses({**images, "views": {**images["views"], "local/student": crops[:, number]}}).total
            for number in range(4)
        ]
    assert float(together.total) == pytest.approx(float(torch.stack(alone).mean()), abs=1e-6)


def test_patches_of_two_crops_are_refused(teacher_folder: Path, packed: Path, tmp_path: Path) -> None:
    built = module(teacher_folder, objectives=[Objective(Cosine(), tokens="patches", view="global2")])
    crops = {"global2": Geometry(32, (0.3, 1.0))}
    data = TileDataModule(str(packed), batch_size=8, workers=0, geometry=Geometry(32), crops=crops, val_fraction=0.3)
    runner = L.Trainer(
        default_root_dir=tmp_path, accelerator="cpu", max_epochs=1, logger=False, enable_progress_bar=False,
        enable_model_summary=False, num_sanity_val_steps=0, enable_checkpointing=False,
    )  # fmt: skip
    with pytest.raises(ValueError, match="patches of the crop 'global2' with those of 'clean'"):
        runner.fit(built, data)


@pytest.mark.parametrize(
    "length", [{"max_steps": 11, "max_epochs": -1}, {"max_epochs": 3}, {"max_epochs": 2}], ids=["steps", "odd", "even"]
)
def test_the_end_is_validated_whatever_the_interval(
    length: dict[str, int], teacher_folder: Path, packed: Path, tmp_path: Path
) -> None:
    class Ends(L.Callback):
        steps: list[int] = []  # noqa: RUF012

        def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            self.steps.append(trainer.global_step)

    Ends.steps = []
    settings = {"check_val_every_n_epoch": 2, **length}
    runner = fit(module(teacher_folder), packed, tmp_path, callbacks=[FinalValidation(), Ends()], **settings)
    assert Ends.steps[-1] == runner.global_step
    assert len(set(Ends.steps)) == len(Ends.steps)


@pytest.mark.parametrize(
    "changes", [{"val_check_interval": 3}, {"val_check_interval": 5, "check_val_every_n_epoch": None}]
)
@pytest.mark.parametrize("epochs", [1, 2])
def test_the_end_is_validated_where_validations_come_by_batches(
    changes: dict[str, Any], epochs: int, teacher_folder: Path, packed: Path, tmp_path: Path
) -> None:
    """The last batches of the last epoch were trained and never measured."""
    steps = []

    class Ends(L.Callback):
        def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            steps.append(trainer.global_step)

    callbacks = [FinalValidation(), Ends()]
    runner = fit(module(teacher_folder), packed, tmp_path, callbacks=callbacks, max_epochs=epochs, **changes)
    assert runner.global_step == 4 * epochs
    assert steps[-1] == runner.global_step
    assert len(set(steps)) == len(steps) > 1 or changes["val_check_interval"] > runner.global_step


@pytest.mark.parametrize("epochs", [2, 3])
def test_the_end_is_validated_after_a_resume_at_any_step(
    epochs: int, teacher_folder: Path, packed: Path, tmp_path: Path
) -> None:
    """Also within the last epoch, or at the end of the one before: Lightning starts none anew then."""

    class Keep(L.Callback):
        def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
            if (tmp_path / "last.ckpt").exists():
                shutil.copy(tmp_path / "last.ckpt", tmp_path / f"step-{trainer.global_step}.ckpt")

    class Ends(L.Callback):
        steps: list[int] = []  # noqa: RUF012

        def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            self.steps.append(trainer.global_step)

    settings: dict[str, Any] = {"check_val_every_n_epoch": 2, "max_epochs": epochs}
    last = LastCheckpoint(tmp_path, 1)
    end = fit(module(teacher_folder), packed, tmp_path, callbacks=[FinalValidation(), Keep(), last], **settings)
    kept = sorted(tmp_path.glob("step-*.ckpt"))
    assert len(kept) == end.global_step - 1
    data = TileDataModule(str(packed), batch_size=8, workers=0, geometry=Geometry(32), val_fraction=0.3)
    for path in kept:
        Ends.steps = []
        runner = L.Trainer(
            default_root_dir=tmp_path, accelerator="cpu", logger=False, enable_progress_bar=False,
            enable_model_summary=False, num_sanity_val_steps=0, callbacks=[
                FinalValidation(), Ends(), LastCheckpoint(tmp_path, 1)
            ], **settings,
        )  # fmt: skip
        runner.fit(module(teacher_folder), data, ckpt_path=str(path))
        assert (path.name, runner.global_step, Ends.steps[-1:]) == (path.name, end.global_step, [end.global_step])


@pytest.mark.parametrize("how", ["killed", "told to stop"])
@pytest.mark.parametrize("length", [{"max_steps": 3, "max_epochs": -1}, {"max_epochs": 2}], ids=["steps", "epochs"])
def test_a_run_that_ends_before_its_final_validation_is_validated_when_resumed(
    length: dict[str, int], how: str, teacher_folder: Path, packed: Path, tmp_path: Path
) -> None:
    """Its last step was saved, as a training that is over: resumed, it had no validation and no best.ckpt."""

    class Ends(L.Callback):
        def __init__(self, kill_at: int = -1) -> None:
            self.steps, self.kill_at = [], kill_at

        def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
            if how == "told to stop" and trainer.global_step + 1 == self.kill_at:
                signal.raise_signal(signal.SIGTERM)

        def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            if how == "killed" and trainer.global_step == self.kill_at:
                raise KeyError("killed")

        def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            self.steps.append(trainer.global_step)

    def go(end: Ends, path: Path | None) -> L.Trainer:
        last = LastCheckpoint(tmp_path, 1)
        runner = L.Trainer(
            default_root_dir=tmp_path, accelerator="cpu", logger=False, enable_progress_bar=False,
            enable_model_summary=False, num_sanity_val_steps=0,
            callbacks=[FinalValidation(), end, StopOnSignal(tmp_path), last], **length,
        )  # fmt: skip
        data = TileDataModule(str(packed), batch_size=8, workers=0, geometry=Geometry(32), val_fraction=0.3)
        runner.fit(module(teacher_folder), data, ckpt_path=None if path is None else str(path))
        return runner

    whole = Ends()
    total = go(whole, None).global_step
    assert whole.steps[-1] == total
    (tmp_path / "last.ckpt").unlink()
    first, second = Ends(total), Ends()
    with contextlib.suppress(KeyError, SystemExit):
        go(first, None)
    assert go(second, tmp_path / "last.ckpt").global_step == total
    assert [*first.steps, *second.steps][-1:] == [total]


def test_the_best_measure_is_one_that_is_logged(teacher_folder: Path, packed: Path, tmp_path: Path) -> None:
    """Also where only the second teacher's class tokens are compared."""
    built = module(
        teacher_folder,
        teachers={"a": TeacherSpec(str(teacher_folder)), "b": TeacherSpec(str(teacher_folder))},
        objectives=[Objective(Cosine(), teacher="b"), Objective(Cosine(), tokens="patches", teacher="a")],
    )
    assert built.best_measure == ("val/b/cosine_cls", "max")
    assert built.best_measure[0] in fit(built, packed, tmp_path, limit_train_batches=1).callback_metrics


def test_two_objectives_of_one_name_keep_their_own_temperatures(
    teacher_folder: Path, packed: Path, tmp_path: Path
) -> None:
    losses = [DINO(random_prototypes_for_tests=8, diagonal=True, teacher_temperature=(t, t)) for t in (0.04, 0.07)]
    built = module(teacher_folder, objectives=[Objective(loss) for loss in losses])
    measured = fit(built, packed, tmp_path, max_steps=2, log_every_n_steps=1).callback_metrics
    pairs = zip(built.objectives, losses, strict=True)
    assert [built._temperature(objective, loss) for objective, loss in pairs] == [0.04, 0.07]
    total = measured["train/cls_dino"] + measured["train/cls_dino-2"]
    assert float(total) == pytest.approx(float(measured["train/loss"]), rel=1e-6)


@pytest.mark.parametrize("n", [1, 3])
def test_more_crops_of_the_teacher_than_of_the_student_are_refused(teacher_folder: Path, n: int) -> None:
    """A batch of one gave nan, without a word."""
    images = batch(n)
    images["views"]["local"] = torch.zeros(n, 4, 3, 32, 32, dtype=torch.uint8)
    for loss in (Cosine(), RKD()):
        built = module(teacher_folder, objectives=[Objective(loss, teacher_view="local")])
        with pytest.raises(ValueError, match="each of the student's needs one to meet"):
            built.losses(images)
