"""A teacher never changes, whatever is done to it."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from pathokd.models.build import build_timm
from pathokd.models.encoder import Encoder, make_card
from pathokd.models.teacher import Teacher, TeacherSpec, build_teacher

ARGS: dict[str, Any] = {"depth": 2, "reg_tokens": 2}


def make_encoder() -> Encoder:
    torch.manual_seed(0)
    card = make_card("t", "vit_tiny_patch16_224", ARGS, image_px=32)
    return Encoder(build_timm(card.architecture, card.model_args, image_px=32), card)


class Holder(nn.Module):
    def __init__(self, teacher: Teacher) -> None:
        super().__init__()
        self.teacher = teacher
        self.student = nn.Linear(192, 192)


def images(batch: int = 3) -> torch.Tensor:
    return torch.rand(batch, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def test_it_stays_in_eval_and_frozen() -> None:
    teacher = Teacher(make_encoder())
    holder = Holder(teacher).train()
    assert not teacher.training
    assert not any(module.training for module in teacher.encoder.modules())
    assert not any(parameter.requires_grad for parameter in teacher.encoder.parameters())
    assert holder.student.training


def test_it_is_in_no_checkpoint_and_no_optimiser() -> None:
    holder = Holder(Teacher(make_encoder()))
    assert set(holder.state_dict()) == {"student.weight", "student.bias"}
    assert len(list(holder.parameters())) == 2
    holder.load_state_dict(holder.state_dict(), strict=True)


def test_it_follows_to_another_device_but_keeps_its_precision() -> None:
    teacher = Teacher(make_encoder())
    before = teacher.encoder.weights_sha256
    Holder(teacher).half()
    assert teacher.encoder.weights_sha256 == before
    Holder(teacher).to("meta")
    assert teacher.encoder.model.cls_token.is_meta
    assert teacher.encoder.mean.is_meta


def test_features_can_enter_a_loss() -> None:
    holder = Holder(Teacher(make_encoder()))
    features = holder.teacher(images())
    assert not features.cls.requires_grad
    assert not features.cls.is_inference()
    ((holder.student(features.cls) - features.cls) ** 2).mean().backward()
    assert holder.student.weight.grad is not None


@pytest.mark.parametrize("micro_batch", [1, 2, 5])
def test_micro_batches_change_nothing(micro_batch: int) -> None:
    encoder = make_encoder()
    whole = Teacher(encoder)(images(5))
    parts = Teacher(encoder, micro_batch=micro_batch)(images(5))
    torch.testing.assert_close(parts.cls, whole.cls)
    torch.testing.assert_close(parts.patches, whole.patches)
    assert parts.grid == whole.grid == (2, 2)


def test_bf16_gives_fp32_features_near_those_of_fp32() -> None:
    encoder = make_encoder()
    exact = Teacher(copy.deepcopy(encoder))(images())
    rough = Teacher(encoder, precision="bf16")(images())
    assert encoder.model.blocks[0].mlp.fc1.weight.dtype == torch.bfloat16
    assert encoder.mean.dtype == torch.float32
    assert rough.cls.dtype == rough.patches.dtype == torch.float32
    cosine = torch.nn.functional.cosine_similarity(exact.cls, rough.cls)
    assert cosine.min() > 0.999


def test_autocast_outside_does_not_reach_it() -> None:
    teacher = Teacher(make_encoder())
    plain = teacher(images())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = teacher(images())
    torch.testing.assert_close(inside.cls, plain.cls, rtol=0, atol=0)


def test_spec_of_a_bare_file(tmp_path: Path) -> None:
    encoder = make_encoder()
    save_file(dict(encoder.model.state_dict()), tmp_path / "w.safetensors")
    spec = TeacherSpec(
        weights=str(tmp_path / "w.safetensors"),
        architecture="vit_tiny_patch16_224",
        model_args={**ARGS, "depth": 1},
        image_px=32,
        mean=(0.1, 0.2, 0.3),
        mpp=0.25,
    )
    teacher = build_teacher(spec)
    assert (teacher.card.depth, teacher.card.mean, teacher.card.mpp) == (1, (0.1, 0.2, 0.3), 0.25)


def test_wrong_settings_are_refused(refuses: Any) -> None:
    with pytest.raises(ValueError, match="weights must name"):
        TeacherSpec("")
    with refuses(ValueError, "precision must be fp32 or bf16"):
        TeacherSpec("hoptimus0", precision="fp8")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="micro_batch must be at least 1"):
        TeacherSpec("hoptimus0", micro_batch=0)
    with pytest.raises(ValueError, match="did you mean"):
        build_teacher(TeacherSpec("hoptimus"))
