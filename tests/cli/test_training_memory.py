"""The plan of a configured training, against sums written out."""

from pathlib import Path

import lightning as L
import pytest

from pathokd.cli.training_cost import training_cost
from pathokd.cli.training_memory import memory_plan, memory_sentence
from pathokd.cost import count_gflops
from pathokd.cost.memory import MemoryPlan, activation_bytes, vit_shape
from pathokd.data.datamodule import TileDataModule
from pathokd.data.views import Geometry, Views
from pathokd.distill.module import DistillationModule
from pathokd.distill.objective import Objective
from pathokd.losses import DINO, RKD, Consistency, Cosine, KoLeo, RegisteredInfoNCE
from pathokd.models.student import StudentSpec
from pathokd.models.teacher import TeacherSpec

SMALL = {"embed_dim": 16, "depth": 2, "num_heads": 2, "patch_size": 8, "dynamic_img_size": True}


def configured(teacher: Path, **more: object) -> DistillationModule:
    module = DistillationModule(
        teachers={"tiny": TeacherSpec(str(teacher))},
        student=StudentSpec("vit_tiny_patch16_224", SMALL, image_px=32),
        objectives=[
            Objective(Cosine()),
            Objective(KoLeo(), view=["clean", "local"]),
            Objective(DINO(random_prototypes_for_tests=50), view="local"),
        ],
        **more,  # type: ignore[arg-type]
    )
    module.configure_model()
    return module


def test_a_plan_counts_what_there_is(tiny_teacher: Path) -> None:
    module = configured(tiny_teacher)
    params = sum(parameter.numel() for parameter in module.net.parameters())
    views = Views(Geometry(32), None, {"local": Geometry(16, count=3)})
    plan = memory_plan(module, views, 4)
    assert (plan.student, plan.average, plan.optimiser, plan.gradients) == (
        4 * params,
        4 * params,
        8 * params,
        4 * params,
    )
    encoder = module.teacher("tiny").encoder
    assert encoder is not None
    weights = sum(parameter.numel() for parameter in encoder.parameters())
    assert plan.teachers == pytest.approx(4 * weights, abs=100)
    card = module.evaluated.encoder.card
    encoded = 4 * activation_bytes(vit_shape(card)) + 12 * activation_bytes(vit_shape(card, 16))
    assert encoded < plan.activations < 1.5 * encoded + 8 * 50 * 256 + 12 * 4 * 9000  # DINO's head: 2 x 4352 numbers
    pictures = 4 * 3 * 32 * 32 + 12 * 3 * 16 * 16
    said = 2 * 4 * 4 * (16 + 3) * 24  # a teacher of 16 patches, its class token and two registers, 24 wide
    assert plan.targets == pytest.approx(pictures + said + 50 * 24 * 4, abs=1500)  # and a centre, a mean and a scale


def test_precision_and_ddp_tell(tiny_teacher: Path) -> None:
    module = configured(tiny_teacher, ema_momentum=None)
    views = Views(Geometry(32), None, {"local": Geometry(16, count=3)})
    full, half = memory_plan(module, views, 4096), memory_plan(module, views, 4096, itemsize=2, ddp=True)
    assert full.average == half.average == 0
    assert 0.5 < half.activations / full.activations < 0.8
    assert half.gradients == 2 * full.gradients
    shared = memory_plan(module, views, 4096, shards=4)
    assert (4 * shared.student, 4 * shared.optimiser) == (full.student, full.optimiser)
    assert (shared.teachers, shared.activations) == (full.teachers, full.activations)


def test_a_student_that_nobody_planned_is_trained_all_the_same(tiny_teacher: Path) -> None:
    student = StudentSpec("vit_base_patch16_xp_224", SMALL, image_px=32)
    teachers = {"t": TeacherSpec(str(tiny_teacher))}
    module = DistillationModule(teachers=teachers, student=student, objectives=[Objective(Cosine())])
    module.configure_model()
    sentence = memory_sentence(L.Trainer(accelerator="cpu", logger=False), module, Views(Geometry(32)), 4)
    assert sentence.startswith("There is no memory plan: vit_base_patch16_xp_224 is made of ParallelScalingBlock")


def test_terms_among_the_students_own_tokens_need_no_head(tiny_teacher: Path) -> None:
    def plan(*more: Objective) -> MemoryPlan:
        module = DistillationModule(
            teachers={"tiny": TeacherSpec(str(tiny_teacher))},
            student=StudentSpec("vit_tiny_patch16_224", SMALL, image_px=32),
            objectives=[Objective(Cosine()), *more],
        )
        module.configure_model()
        return memory_plan(module, Views(Geometry(32), {"student": []}), 4)

    alone, views = plan(), ["clean", "student"]
    assert plan(Objective(RKD()), Objective(RegisteredInfoNCE())) == alone
    consistent = plan(Objective(Consistency(), view=views))
    assert alone.activations < consistent.activations <= 2 * alone.activations


def test_a_teacher_that_takes_any_size_is_planned_at_the_size_of_the_crop(tiny_teacher: Path) -> None:
    """At 64 px it says 8 x 8 patches, a class token and two registers, 24 wide; the student is fixed and sees 32."""
    fixed = {**SMALL, "dynamic_img_size": False}

    def plan(**more: object) -> MemoryPlan:
        module = DistillationModule(
            teachers={"tiny": TeacherSpec(str(tiny_teacher), **more)},  # type: ignore[arg-type]
            student=StudentSpec("vit_tiny_patch16_224", fixed, image_px=32),
            objectives=[Objective(Cosine())],
        )
        module.configure_model()
        return memory_plan(module, Views(Geometry(64)), 4096)

    small, large = plan(), plan(model_args={"dynamic_img_size": True})
    assert large.targets - small.targets == 2 * 4 * 4096 * (64 - 16) * 24
    assert large.working > 3 * small.working


def test_the_arithmetic_of_a_teacher_is_that_of_the_crops_it_sees(tiny_teacher: Path, packed: Path) -> None:
    module = DistillationModule(
        teachers={"tiny": TeacherSpec(str(tiny_teacher), model_args={"dynamic_img_size": True})},
        student=StudentSpec("vit_tiny_patch16_224", SMALL, image_px=32),
        objectives=[Objective(Cosine())],
    )
    module.configure_model()
    data = TileDataModule(str(packed), 8, geometry=Geometry(64), workers=0)
    data.setup("fit")
    student, teacher = module.net.encoder.card, module.teacher("tiny").card
    spent, learnt = count_gflops(teacher, image_px=64), count_gflops(student, image_px=64)
    said = f"({spent:.3g} of {spent + 3 * learnt:.3g} GFLOP a tile)"
    assert said in training_cost(module, data, 100)
