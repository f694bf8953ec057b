"""Where a student's weights come from."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from pathokd.errors import WeightsError
from pathokd.models.build import build_timm
from pathokd.models.encoder import Encoder, make_card
from pathokd.models.student import StudentSpec, build_student, even_layers

ARCH = "vit_tiny_patch16_224"
SMALL: dict[str, Any] = {"reg_tokens": 2, "init_values": 1e-5}


def teacher(depth: int = 6) -> Encoder:
    args = {**SMALL, "depth": depth}
    card = make_card("t", ARCH, args, image_px=32, mpp=0.5, mean=(0.7, 0.6, 0.7), std=(0.2, 0.2, 0.2), licence="MIT")
    return Encoder(build_timm(ARCH, args, image_px=32), card)


def spec(**changes: Any) -> StudentSpec:
    return StudentSpec(**{"architecture": ARCH, "model_args": {**SMALL, "depth": 3}, "image_px": 32, **changes})


def test_default_is_h0_mini() -> None:
    student = build_student(StudentSpec())
    assert student.card.params == 85_739_520
    assert student.card.num_prefix_tokens == 5
    assert student.model.blocks[0].mlp.fc1.weight.shape == (4096, 768)
    assert isinstance(student.model.blocks[0].mlp.act, torch.nn.SiLU)


def test_facts_come_from_the_teacher_unless_given() -> None:
    student = build_student(spec(), teacher())
    assert (student.card.mean, student.card.mpp, student.card.licence) == ((0.7, 0.6, 0.7), 0.5, "MIT")
    other = build_student(spec(mpp=1.0, mean=(0.1, 0.1, 0.1)), teacher())
    assert (other.card.mean, other.card.std, other.card.mpp) == ((0.1, 0.1, 0.1), (0.2, 0.2, 0.2), 1.0)


def test_seed_alone_decides() -> None:
    state = torch.get_rng_state()
    first = build_student(spec(seed=3)).weights_sha256
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(99)
    assert build_student(spec(seed=3)).weights_sha256 == first
    assert build_student(spec(seed=4)).weights_sha256 != first


def test_no_other_stream_is_seeded(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU's stream, which heads and token samples are drawn from, would else be the same whatever the run's seed."""
    seeded: list[int] = []
    for place in (torch.cuda, torch.mps):
        monkeypatch.setattr(place, "manual_seed" if place is torch.mps else "manual_seed_all", seeded.append)
    before = torch.get_rng_state()
    build_student(spec(seed=11))
    assert seeded == []
    assert torch.equal(torch.get_rng_state(), before)


def test_teacher_layers_are_copied_evenly() -> None:
    source = teacher()
    student = build_student(spec(init="teacher-layers"), source)
    for own, theirs in enumerate(even_layers(3, 6)):
        torch.testing.assert_close(
            student.model.blocks[own].attn.qkv.weight, source.model.blocks[theirs].attn.qkv.weight
        )
    for name in ("cls_token", "reg_token", "pos_embed", "norm.weight", "patch_embed.proj.weight"):
        torch.testing.assert_close(student.model.state_dict()[name], source.model.state_dict()[name])
    student.model.cls_token.data.add_(1)
    assert not torch.equal(student.model.cls_token, source.model.cls_token)


def test_named_layers() -> None:
    source = teacher()
    student = build_student(spec(init="teacher-layers", layers=[5, 0, 0]), source)
    torch.testing.assert_close(student.model.blocks[0].mlp.fc1.weight, source.model.blocks[5].mlp.fc1.weight)
    torch.testing.assert_close(student.model.blocks[2].mlp.fc1.weight, source.model.blocks[0].mlp.fc1.weight)


def test_a_copy_of_all_layers_is_the_teacher() -> None:
    source = teacher()
    args = {**SMALL, "depth": 6}
    assert build_student(spec(init="teacher-layers", model_args=args), source).weights_sha256 == source.weights_sha256


def test_even_layers() -> None:
    assert even_layers(12, 40)[0] == 0
    assert even_layers(12, 40)[-1] == 39
    assert len(set(even_layers(12, 40))) == 12
    assert even_layers(4, 4) == [0, 1, 2, 3]
    assert even_layers(1, 7) == [6]
    with pytest.raises(ValueError, match="1 to 4 blocks"):
        even_layers(5, 4)


def test_layers_that_do_not_fit_are_named() -> None:
    source = teacher()
    with pytest.raises(ValueError, match="needs a teacher"):
        build_student(spec(init="teacher-layers"))
    with pytest.raises(ValueError, match="goes with init: teacher-layers"):
        spec(layers=[0])
    with pytest.raises(ValueError, match=r"per student block \(3\), got 2"):
        build_student(spec(init="teacher-layers", layers=[0, 1]), source)
    with pytest.raises(ValueError, match="0 to 5, got 6"):
        build_student(spec(init="teacher-layers", layers=[0, 1, 6]), source)
    with pytest.raises(ValueError, match=r"the student's .* has shape"):
        build_student(spec(init="teacher-layers", architecture="vit_small_patch16_224"), source)


@pytest.mark.parametrize(
    ("changed", "said"), [({"num_heads": 6}, "num_heads 3, and the student has 6"), ({"act_layer": "silu"}, "gelu")]
)
def test_what_no_shape_tells_must_be_the_same(changed: dict[str, Any], said: str, tmp_path: Path) -> None:
    """Other heads or another activation take the same weights, and compute something else."""
    first = teacher(3)
    save_file(dict(first.model.state_dict()), tmp_path / "model.safetensors")
    config = {"architecture": ARCH, "model_args": {**SMALL, "depth": 3, "img_size": 32}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    for init in ("teacher-layers", str(tmp_path)):
        with pytest.raises(ValueError, match=said):
            build_student(spec(init=init, model_args={**SMALL, "depth": 3, **changed}), first)


@pytest.mark.parametrize(
    ("of_teacher", "of_student", "said"),
    [
        ({}, {"init_values": None}, r"has blocks\.0\.ls1\.gamma"),
        ({}, {"reg_tokens": 0}, "has reg_token"),
        ({}, {"qkv_bias": False}, r"has blocks\.0\.attn\.qkv\.bias"),
        ({"qk_norm": True}, {}, r"has blocks\.0\.attn\.q_norm"),
        ({}, {"final_norm": False}, r"has norm\.weight"),
        (
            {"mlp_layer": "GluMlp", "act_layer": "silu"},
            {"mlp_layer": "SwiGLUPacked", "act_layer": "silu"},
            "GluMlp gated by the last half, and the student has GluMlp gated by the first",
        ),
    ],
)
def test_parts_of_the_teacher_are_not_left_out(
    of_teacher: dict[str, Any], of_student: dict[str, Any], said: str
) -> None:
    """Its blocks ran without LayerScale, registers or biases, without a word: another function than the teacher's."""
    plain = {**SMALL, "depth": 3, "no_embed_class": True}
    source = build_student(spec(model_args={**plain, **of_teacher}))
    with pytest.raises(ValueError, match=said):
        build_student(spec(init="teacher-layers", model_args={**plain, **of_student}), source)


def test_weights_of_a_folder(tmp_path: Path) -> None:
    first = build_student(spec(seed=5))
    save_file(dict(first.model.state_dict()), tmp_path / "model.safetensors")
    config = {"architecture": ARCH, "model_args": {**SMALL, "depth": 3, "img_size": 32}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    again = build_student(spec(init=str(tmp_path), seed=6))
    assert again.weights_sha256 == first.weights_sha256
    with pytest.raises(WeightsError, match="do not fit"):
        build_student(spec(init=str(tmp_path), model_args={**SMALL, "depth": 4}))


def test_first_weights_of_another_normalisation_are_told(tmp_path: Path) -> None:
    """Their folder says what they were made for, and the student sees tiles as its teacher does."""
    save_file(dict(build_student(spec(seed=5)).model.state_dict()), tmp_path / "model.safetensors")
    cfg = {"mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25]}
    config = {"architecture": ARCH, "model_args": {**SMALL, "depth": 3, "img_size": 32}, "pretrained_cfg": cfg}
    (tmp_path / "config.json").write_text(json.dumps(config))
    source = teacher()
    with pytest.warns(UserWarning, match=r"whose input (mean is \(0.5|std is \(0.25).* takes the teacher's"):
        student = build_student(spec(init=str(tmp_path)), source)
    assert student.card.mean == source.card.mean
    own = build_student(spec(init=str(tmp_path), mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25)), source)
    assert own.card.std == (0.25, 0.25, 0.25)


def test_what_timm_refuses_is_a_sentence() -> None:
    with pytest.raises(ValueError, match=r"cannot build vit_tiny_patch16_224\.foo .*Invalid pretrained tag"):
        build_student(StudentSpec(architecture=f"{ARCH}.foo", model_args={}))
    with pytest.raises(ValueError, match="cannot build"):
        build_student(StudentSpec(architecture=ARCH, model_args={"patch_size": 0}))


def test_weights_of_a_bare_file(tmp_path: Path) -> None:
    """Its architecture is the student's, all of it: neither a deeper file nor one of other registers will do."""
    path = tmp_path / "first.safetensors"
    first = build_student(spec(seed=5))
    save_file({key: value.half() for key, value in first.model.state_dict().items()}, path)
    again = build_student(spec(init=str(path), seed=6))
    for name, value in again.model.state_dict().items():
        assert torch.equal(value, first.model.state_dict()[name].half().float())
    assert all(parameter.requires_grad for parameter in again.parameters())
    with pytest.raises(WeightsError, match="unknown"):
        build_student(spec(init=str(path), model_args={**SMALL, "depth": 2}))
    with pytest.raises(WeightsError, match="no weights file"):
        build_student(spec(init=str(tmp_path / "missing.safetensors")))


def test_timm_weights_offline_are_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(WeightsError, match=r"could not be fetched|no pretrained weights"):
        build_student(StudentSpec(architecture=ARCH, model_args={}, init="timm"))
