"""Several students under one teacher: each learns what it would learn alone, and the teacher looks once."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
import yaml

from pathokd.cli.main import main
from pathokd.data.datamodule import TileDataModule
from pathokd.data.views import Geometry
from pathokd.distill.module import DistillationModule
from pathokd.distill.objective import Objective
from pathokd.errors import TrainingError, WeightsError
from pathokd.export.run import export_run
from pathokd.losses import IBOT, RKD, Cosine, SmoothL1
from pathokd.models import StudentSpec, TeacherSpec, build_student, load_encoder

TINY = {"embed_dim": 16, "depth": 2, "num_heads": 2, "patch_size": 8}
NOISY = StudentSpec("vit_tiny_patch16_224", {**TINY, "drop_path_rate": 0.3}, image_px=32)
DEEP = StudentSpec("vit_tiny_patch16_224", {**TINY, "depth": 3}, image_px=32, seed=7)
COARSE = StudentSpec("vit_tiny_patch16_224", {**TINY, "patch_size": 16}, image_px=32)


def module(teacher: Path, student: StudentSpec, **changes: Any) -> DistillationModule:
    settings: dict[str, Any] = {
        "teachers": {"t": TeacherSpec(str(teacher))},
        "objectives": [
            Objective(Cosine(), view="student"),
            Objective(SmoothL1(), tokens="patches", share=0.3, view="student"),
            Objective(RKD(), view="student", share=0.1),
            Objective(IBOT(random_prototypes_for_tests=20, share=0.5), tokens="patches", weight=0.1),
        ],
        "standardize_steps": 3,
        "ema_momentum": (0.5, 0.5),
    }
    torch.manual_seed(3)
    built = DistillationModule(student=student, **{**settings, **changes})
    built.configure_model()
    return built


def fit(built: DistillationModule, packed: Path, out: Path, *callbacks: L.Callback) -> L.Trainer:
    torch.manual_seed(4)
    data = TileDataModule(
        str(packed), batch_size=8, workers=0, geometry=Geometry(32), val_fraction=0.3, photometric={"student": []}
    )
    runner = L.Trainer(
        default_root_dir=out, accelerator="cpu", max_steps=5, gradient_clip_val=0.05, callbacks=[*callbacks],
        logger=False, enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0,
        enable_checkpointing=False, log_every_n_steps=1,
    )  # fmt: skip
    runner.fit(built, data)
    return runner


def learnt(built: DistillationModule, name: str) -> dict[str, torch.Tensor]:
    return {
        **built.trainees[name].state_dict(),
        **{f"statistics.{k}": v for k, v in built.statistics.state_dict().items()},
    }


def test_each_learns_what_it_learns_alone(teacher_folder: Path, packed: Path, tmp_path: Path) -> None:
    """Also where its stochastic depth, its sampled tokens, its clipping, its balance or its patch grid are others."""
    together = module(teacher_folder, NOISY, more_students={"deep": DEEP, "coarse": COARSE})
    measured = fit(together, packed, tmp_path).callback_metrics
    noisy = module(teacher_folder, NOISY)
    alone = fit(noisy, packed, tmp_path).callback_metrics
    for name, value in learnt(noisy, "student").items():
        assert torch.equal(value, learnt(together, "student")[name]), name
    for key in ("val/cosine_cls", "val/cka", "val/kl_patches", "train/cls_rkd@student"):
        assert float(alone[key]) == float(measured[key])
    deep = module(teacher_folder, DEEP, objectives=[Objective(Cosine(), view="student")])
    fit(deep, packed, tmp_path)
    quiet = module(
        teacher_folder, NOISY, more_students={"deep": DEEP}, objectives=[Objective(Cosine(), view="student")]
    )
    measured = fit(quiet, packed, tmp_path).callback_metrics
    for name, value in learnt(deep, "student").items():
        assert torch.equal(value, learnt(quiet, "deep")[name]), name
    assert float(measured["val/deep/cosine_cls"]) != float(measured["val/cosine_cls"])


def test_others_leave_the_streams_of_the_training_device_alone(
    teacher_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lightning builds under `strategy.root_device`: on a GPU all weights are drawn from the GPU's stream."""
    drawn: list[str] = []

    @contextmanager
    def same_draws(state: dict[str, torch.Tensor], device: torch.device) -> Iterator[None]:
        drawn.append(f"as {state['from']} on {device}")
        yield
        drawn.append("back")

    monkeypatch.setattr("pathokd.distill.module.random_state", lambda device: {"from": str(device)})
    monkeypatch.setattr("pathokd.distill.module.same_draws", same_draws)
    monkeypatch.setattr("pathokd.distill.module.build_student", lambda *of: drawn.append("build") or build_student(*of))
    built = DistillationModule(
        {"t": TeacherSpec(str(teacher_folder))}, NOISY, [Objective(Cosine())], more_students={"deep": DEEP}
    )
    built._trainer = SimpleNamespace(strategy=SimpleNamespace(root_device=torch.device("cuda", 1)))  # type: ignore
    built.configure_model()
    assert drawn == ["build", "as cuda:1 on cuda:1", "build", "back"]


def test_the_teacher_looks_once(teacher_folder: Path) -> None:
    built = module(teacher_folder, NOISY, more_students={"deep": DEEP, "coarse": COARSE})
    looks = []
    built.teacher("t").register_forward_hook(lambda *seen: looks.append(len(seen[1][0])))
    views = {name: torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8) for name in ("clean", "student")}
    losses = built.losses({"views": views, "index": [0, 1, 2, 3], "key": list("abcd")})
    assert looks == [4]
    own = {"cls_cosine@student", "patches_smoothl1@student", "cls_rkd@student", "patches_ibot"}
    assert set(losses.parts) == own | {f"{name}/{part}" for name in ("deep", "coarse") for part in own}
    losses.total.backward()
    for student in built.trainees.values():
        assert all(p.grad is not None for p in student.net.encoder.parameters() if p.requires_grad)


def test_clipping_is_each_ones_own(teacher_folder: Path, packed: Path, tmp_path: Path) -> None:
    built = module(teacher_folder, NOISY, more_students={"deep": DEEP})
    norms = []

    class Watch(L.Callback):
        def on_train_batch_end(self, *args: Any) -> None:
            grads = [[p.grad for p in student.net.parameters()] for student in built.trainees.values()]
            norms.append([float(torch.nn.utils.get_total_norm(grad)) for grad in grads])

    fit(built, packed, tmp_path, Watch())
    assert len(norms) == 5
    for pair in norms:  # each at the limit by itself, where together they would share it
        assert pair == pytest.approx([0.05, 0.05], rel=1e-3)


@pytest.mark.parametrize("limit", [0.0, -1.0])
def test_without_a_limit_nothing_is_clipped(teacher_folder: Path, limit: float) -> None:
    """A negative one would turn the gradients round."""
    built = module(teacher_folder, NOISY, more_students={"deep": DEEP})
    optimizer = built.configure_optimizers()
    built.trainer = L.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, gradient_clip_val=limit)
    for parameter in built.net.parameters():
        parameter.grad = torch.ones_like(parameter)
    built.configure_gradient_clipping(optimizer, limit, "norm")
    assert all(bool((parameter.grad == 1).all()) for parameter in built.net.parameters())


def test_each_is_exported_by_its_name(
    recipe: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    student = recipe["model"]["student"]
    recipe["model"]["more_students"] = {"small": {**student, "model_args": {**student["model_args"], "depth": 1}}}
    recipe["trainer"] |= {"max_epochs": 1, "log_every_n_steps": 1}
    config, run = tmp_path / "c.yaml", tmp_path / "run"
    config.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    assert main(["fit", "--config", str(config), "--out", str(run)]) == 0
    assert main(["export", str(run), "--student", "small", "--out", str(tmp_path / "small")]) == 0
    assert main(["export", str(run), "--which", "last", "--out", str(tmp_path / "first")]) == 0
    small, first = (load_encoder(str(tmp_path / name)) for name in ("small", "first"))
    assert (small.card.depth, first.card.depth) == (1, 2)
    state = torch.load(run / "checkpoints/last.ckpt", weights_only=True)["state_dict"]
    for name, encoder in (("small", small), ("student", first)):
        kept = state[f"students.{name}.ema.model.encoder.model.blocks.0.attn.qkv.weight"]
        assert torch.equal(encoder.model.blocks[0].attn.qkv.weight, kept)
    table = [yaml.safe_load((tmp_path / name / "config.json").read_text())["pathokd"]["facts"]["metrics"]
             for name in ("small", "first")]  # fmt: skip
    assert {"val/cosine_cls", "train/cls_cosinesmoothl1@student"} <= table[0].keys() & table[1].keys()
    assert table[0]["val/cosine_cls"] != table[1]["val/cosine_cls"]
    assert not any("small" in key for each in table for key in each)
    capsys.readouterr()
    assert main(["export", str(run), "--student", "large", "--out", str(tmp_path / "large")]) == 1
    assert "holds the students student, small, none called 'large'" in capsys.readouterr().err
    del recipe["model"]["more_students"]
    config.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    assert main(["fit", "--config", str(config), "--out", str(run), "--resume", "true"]) == 1
    assert "go on with the same model.more_students" in capsys.readouterr().err


def test_names_that_cannot_be(teacher_folder: Path, packed: Path, tmp_path: Path) -> None:
    for name in ("student", "t", "a.b", "a/b", "", "half", "keys", "weight"):
        with pytest.raises(ValueError, match="more_students has the name"):
            module(teacher_folder, NOISY, more_students={name: DEEP})
    # `val/student/...` would be read as the student's own when it is exported.
    for name in ("student", "a.b", "a/b", "half"):
        with pytest.raises(ValueError, match="teachers has the name"):
            module(teacher_folder, NOISY, teachers={name: TeacherSpec(str(teacher_folder))})
    built = module(teacher_folder, NOISY, more_students={"deep": DEEP})
    fit(built, packed, tmp_path).save_checkpoint(tmp_path / "c.ckpt")
    with pytest.raises(WeightsError, match="none called 'small'"):
        export_run(tmp_path / "c.ckpt", tmp_path / "small", student="small")
    saved = torch.load(tmp_path / "c.ckpt", weights_only=True)
    with pytest.raises(TrainingError, match="holds the students student, deep, and this run has student"):
        module(teacher_folder, NOISY).on_load_checkpoint(saved)


def test_statistics_come_from_the_first_student_alone(teacher_folder: Path, packed: Path, tmp_path: Path) -> None:
    """Others that go on from an export bring projectors, and change nothing of what the first one learns."""
    only = {"objectives": [Objective(Cosine())]}
    began = []
    for name, spec in (("a", NOISY), ("b", DEEP)):
        built = module(teacher_folder, spec, **only)
        trainer = fit(built, packed, tmp_path)
        if name == "b":  # as if of other tiles
            built.statistics["t__cls"].update(5 * torch.randn(100, 24, generator=torch.Generator().manual_seed(0)))
        trainer.save_checkpoint(tmp_path / "c.ckpt")
        export_run(tmp_path / "c.ckpt", tmp_path / name)
        began.append(replace(spec, init=str(tmp_path / name)))
    goes_on, other = began
    for first in (goes_on, NOISY):
        alone = module(teacher_folder, first, **only)
        both = module(teacher_folder, first, **only, more_students={"deep": other})
        for name, value in learnt(alone, "student").items():
            assert torch.equal(value, learnt(both, "student")[name]), name
    # Beside a first student without any, its projector fits the scale that it learnt in.
    unit = module(teacher_folder, other, **only).net.heads["t__cls"].state_dict()
    for name, value in both.trainees["deep"].net.heads["t__cls"].state_dict().items():
        assert torch.equal(value, unit[name]), name
