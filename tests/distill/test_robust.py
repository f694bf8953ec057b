"""The student's own objectives inside a run, weights that keep shares, and a stage that goes on from an export."""

from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import lightning as L
import pytest
import torch

from pathokd.data.datamodule import TileDataModule
from pathokd.data.places import RegisteredSpec
from pathokd.data.views import Geometry
from pathokd.distill.balance import Balance
from pathokd.distill.module import DistillationModule
from pathokd.distill.network import ProjectorSpec
from pathokd.distill.objective import Objective
from pathokd.errors import TrainingError
from pathokd.export.run import export_run
from pathokd.losses import MSE, RKD, Consistency, Cosine, KoLeo, RegisteredInfoNCE
from pathokd.losses.registered import registered_infonce
from pathokd.losses.relational import angle_loss, distance_loss
from pathokd.models import StudentSpec, TeacherSpec, load_encoder

TINY = {"embed_dim": 16, "depth": 2, "num_heads": 2, "patch_size": 8}


def module(teacher: Path, **changes: Any) -> DistillationModule:
    settings: dict[str, Any] = {
        "teachers": {"t": TeacherSpec(str(teacher))},
        "student": StudentSpec("vit_tiny_patch16_224", TINY, image_px=32),
        "objectives": [Objective(Cosine())],
        "standardize_steps": 0,
    }
    built = DistillationModule(**{**settings, **changes})
    built.configure_model()
    return built


def batch(n: int = 6, names: tuple[str, ...] = ("clean", "student", "student2")) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    views = {name: torch.randint(0, 256, (n, 3, 32, 32), dtype=torch.uint8, generator=generator) for name in names}
    return {"views": views, "index": list(range(n)), "key": [f"tile-{i}" for i in range(n)]}


def fit(built: DistillationModule, tiles: Path, out: Path, **data: Any) -> L.Trainer:
    runner = L.Trainer(
        default_root_dir=out, accelerator="cpu", max_steps=4, logger=False, enable_progress_bar=False,
        enable_model_summary=False, num_sanity_val_steps=0, enable_checkpointing=False,
    )  # fmt: skip
    runner.fit(built, TileDataModule(str(tiles), 8, workers=0, geometry=Geometry(32), val_fraction=0.3, **data))
    return runner


def test_consistency_is_between_two_views_of_the_student(teacher_folder: Path) -> None:
    objectives = [
        Objective(Consistency(), view=["student", "student2"]),
        Objective(Consistency(), tokens="patches", view=["student", "clean"]),
    ]
    built, images = module(teacher_folder, objectives=objectives).eval(), batch()
    with torch.no_grad():
        losses = built.losses(images)  # type: ignore[arg-type]
        seen = {name: built.net(view) for name, view in images["views"].items()}
    cls = 1 - torch.cosine_similarity(seen["student"].cls, seen["student2"].cls, dim=-1).mean()
    patches = 1 - torch.cosine_similarity(seen["student"].patches, seen["clean"].patches, dim=-1).mean()
    assert float(losses.parts["cls_consistency@student+student2"]) == pytest.approx(float(cls), abs=1e-6)
    assert float(losses.parts["patches_consistency@student+clean"]) == pytest.approx(float(patches), abs=1e-6)


@pytest.mark.parametrize("view", ["student", ["student", "student"], ["student"], ["a", "b", "c"]])
def test_consistency_refuses_anything_but_two_different_views(view: Any) -> None:
    with pytest.raises(ValueError, match=r"compares two views of the student, got view: .*\[student, student2\]"):
        Objective(Consistency(), view=view)


def test_patches_of_two_crops_are_not_held_together(teacher_folder: Path, packed: Path, tmp_path: Path) -> None:
    built = module(teacher_folder, objectives=[Objective(Consistency(), tokens="patches", view=["clean", "global2"])])
    with pytest.raises(ValueError, match="patches of the crops clean and global2"):
        fit(built, packed, tmp_path, crops={"global2": Geometry(32, (0.3, 1.0))})


def test_infonce_reads_places_from_the_batch(teacher_folder: Path) -> None:
    built = module(teacher_folder, objectives=[Objective(RegisteredInfoNCE(0.1))]).eval()
    images = {**batch(), "place": torch.tensor([0, 1, 2] * 2), "condition": torch.tensor([0, 0, 0, 1, 1, 1])}
    with torch.no_grad():
        cls = built.net(images["views"]["clean"]).cls
        expected = registered_infonce(cls.double(), images["place"], images["condition"], 0.1)
        assert float(built.losses(images).total) == pytest.approx(float(expected), abs=1e-5)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"set data\.registered"):
        built.losses(batch())  # type: ignore[arg-type]


def test_relations_are_of_the_students_own_tokens(teacher_folder: Path) -> None:
    built, images = module(teacher_folder, objectives=[Objective(RKD(1.0, 2.0))]).eval(), batch()
    assert not built.net.heads
    with torch.no_grad():
        x = built.net(images["views"]["clean"]).cls
        y = load_encoder(str(teacher_folder)).eval()(images["views"]["clean"]).cls
        expected = distance_loss(x, y) + 2 * angle_loss(x, y)
        assert float(built.losses(images).total) == pytest.approx(float(expected), abs=1e-5)  # type: ignore[arg-type]
    standardised = module(teacher_folder, objectives=[Objective(RKD())], standardize_steps=5)
    assert float(standardised.losses(images).total.detach()) > 0  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="RKD is for tokens: cls, got patches"):
        Objective(RKD(), tokens="patches")


# ------------------------------------------------------------------------------- balance


def shared() -> list[Objective]:
    return [
        Objective(Cosine(), view="student"),
        Objective(Cosine(), tokens="patches", view="student", share=0.25),
        Objective(RKD(), view="student", share=0.1875),
        Objective(KoLeo(), weight=0.1),
    ]


def test_shares_of_the_first_batch_hold_and_the_total_is_their_sum(teacher_folder: Path) -> None:
    built = module(teacher_folder, objectives=shared()).train()
    losses = built.losses(batch())  # type: ignore[arg-type]
    cls, patches, relation, spread = (part.detach() for part in losses.parts.values())
    total = (losses.total - 0.1 * spread).detach()
    weights = [float(weight) for weight in built.trainees["student"].weights()]
    assert weights[0] == 1.0
    assert weights[3] == pytest.approx(0.1)
    assert float(weights[1] * patches / total) == pytest.approx(0.25, abs=1e-5)
    assert float(weights[2] * relation / total) == pytest.approx(0.1875, abs=1e-5)
    assert float(cls / total) == pytest.approx(1 - 0.4375, abs=1e-5)


def test_weights_follow_running_means_and_validation_moves_nothing() -> None:
    balance = Balance([Objective(Cosine()), Objective(RKD(), share=0.5)])
    seen = torch.tensor([[1.0, 0.5], [0.5, 0.1], [0.2, 0.2]])
    for parts in seen:
        balance.update(parts)
    decay = 0.98 ** torch.arange(2, -1, -1.0).double()
    means = (decay[:, None] * seen).sum(0) / decay.sum()
    assert balance.now().tolist() == pytest.approx([1, float(means[0] / means[1])], rel=1e-5)
    again = Balance([Objective(Cosine()), Objective(RKD(), share=0.5)])
    again.load_state_dict(balance.state_dict())
    assert torch.equal(again.now(), balance.now())


def test_validation_does_not_move_the_weights(teacher_folder: Path) -> None:
    built = module(teacher_folder, objectives=shared())
    built.train().losses(batch())  # type: ignore[arg-type]
    balance = built.trainees["student"].balance
    assert balance is not None
    before = balance.means.clone()
    built.eval().losses(batch(4))  # type: ignore[arg-type]
    assert torch.equal(balance.means, before)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"share": 1.5}, "between 0 and 1"),
        ({"share": 0.5, "weight": 0.5}, "in place of a weight"),
        ({"share": 0.2, "loss": KoLeo()}, "may be negative"),
    ],
)
def test_a_share_that_makes_no_sense_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Objective(**{"loss": Cosine(), **settings})


@pytest.mark.parametrize("shares", [(0.5, 0.5, None), (0.5, 0.3, 0.1)])
def test_shares_need_something_beside_them(shares: tuple[float | None, ...], teacher_folder: Path) -> None:
    with pytest.raises(ValueError, match="less than 1 and leave the rest"):
        module(teacher_folder, objectives=[Objective(MSE(), share=share) for share in shares])


# --------------------------------------------------------------------- from stage to stage


@pytest.mark.parametrize(("standardize", "kind"), [(0, "linear"), (3, "linear"), (3, "mlp")])
def test_the_last_stage_goes_on_where_the_first_ended(
    standardize: int, kind: Any, teacher_folder: Path, registered_packed: Path, tmp_path: Path
) -> None:
    """Student and projector of the export: the first loss of the stage is the loss of the exported average."""
    settings = {"standardize_steps": standardize, "projector": ProjectorSpec(kind)}
    torch.manual_seed(0)  # projectors are drawn from the global stream, which other tests leave anywhere
    first = module(teacher_folder, **settings)
    fit(first, registered_packed, tmp_path).save_checkpoint(tmp_path / "c.ckpt")
    export_run(tmp_path / "c.ckpt", tmp_path / "student")
    start = StudentSpec("vit_tiny_patch16_224", TINY, image_px=32, init=str(tmp_path / "student"))
    objectives = [Objective(Cosine()), Objective(RegisteredInfoNCE(), weight=0.3)]
    second = module(teacher_folder, student=start, objectives=objectives, **settings)
    images = {**batch(), "place": torch.tensor([0, 1, 2] * 2), "condition": torch.tensor([0, 0, 0, 1, 1, 1])}
    first.trainees["student"].net = first.evaluated
    with torch.no_grad():
        before, after = (m.eval().losses(images).parts["cls_cosine"] for m in (first, second))  # type: ignore[arg-type]
    assert float(after) == pytest.approx(float(before), abs=1e-4)
    runner = fit(second, registered_packed, tmp_path, registered=RegisteredSpec())
    assert runner.global_step == 4
    torch.manual_seed(1)
    fresh = module(teacher_folder, student=StudentSpec("vit_tiny_patch16_224", TINY, image_px=32), **settings)
    with torch.no_grad():
        assert abs(float(fresh.eval().losses(batch()).total) - float(before)) > 1e-2  # type: ignore[arg-type]


@pytest.mark.parametrize(("made", "goes_on"), [("fp32", "bf16"), ("bf16", "fp32")])
def test_a_stage_under_the_teacher_in_another_precision_takes_the_projectors_too(
    made: Any, goes_on: Any, teacher_folder: Path, registered_packed: Path, tmp_path: Path
) -> None:
    """A teacher in bf16 has another hash than in fp32, and the same weights."""
    first = module(teacher_folder, teachers={"t": TeacherSpec(str(teacher_folder), precision=made)})
    fit(first, registered_packed, tmp_path).save_checkpoint(tmp_path / "c.ckpt")
    export_run(tmp_path / "c.ckpt", tmp_path / "student")
    start = StudentSpec("vit_tiny_patch16_224", TINY, image_px=32, init=str(tmp_path / "student"))
    other = {"t": TeacherSpec(str(teacher_folder), precision=goes_on)}
    second = module(teacher_folder, student=start, teachers=other)
    heads = first.evaluated.heads.state_dict()
    assert all(torch.equal(value, heads[name]) for name, value in second.net.heads.state_dict().items())
    saved = torch.load(tmp_path / "c.ckpt", weights_only=True)
    again = module(teacher_folder, teachers=other)
    again._trainer = Mock(**{"state.fn": "validate"})
    again.on_load_checkpoint(saved)
    again._trainer = Mock(**{"state.fn": "fit"})
    with pytest.raises(TrainingError, match="ran in another precision"):
        again.on_load_checkpoint(saved)


def test_projectors_that_begin_at_random_are_told(
    teacher_folder: Path, registered_packed: Path, tmp_path: Path
) -> None:
    fit(module(teacher_folder), registered_packed, tmp_path).save_checkpoint(tmp_path / "c.ckpt")
    export_run(tmp_path / "c.ckpt", tmp_path / "student")
    start = StudentSpec("vit_tiny_patch16_224", TINY, image_px=32, init=str(tmp_path / "student"))
    spec = TeacherSpec(str(teacher_folder))
    for changes, said in [
        ({"projector": ProjectorSpec("mlp")}, r"t.cls \(of another kind or width there\)"),
        ({"teachers": {"renamed": spec}}, r"renamed.cls \(none of its: t.cls\)"),
        ({"teachers": {"t": replace(spec, model_args={"depth": 1})}}, r"t.cls \(of other weights there\)"),
    ]:
        with pytest.warns(UserWarning, match=f"begin at random beside the student of .*: {said}"):
            module(teacher_folder, student=start, **changes)


def test_an_init_under_the_home_folder_brings_its_projectors_too(
    teacher_folder: Path, registered_packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = module(teacher_folder, standardize_steps=0)
    fit(first, registered_packed, tmp_path).save_checkpoint(tmp_path / "c.ckpt")
    export_run(tmp_path / "c.ckpt", tmp_path / "student")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    start = StudentSpec("vit_tiny_patch16_224", TINY, image_px=32, init="~/student")
    second = module(teacher_folder, student=start, standardize_steps=0)
    heads = first.evaluated.heads.state_dict()
    assert heads
    for name, value in second.net.heads.state_dict().items():
        assert torch.equal(value, heads[name])
