"""The plan of a configured training, against sums written out."""

from pathlib import Path

import pytest

from pathokd.cli.training_memory import memory_plan
from pathokd.cost.memory import MemoryPlan, activation_bytes, vit_shape
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
