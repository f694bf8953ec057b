"""Tokens, normalisation, resizing, and the many ways to name weights."""

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from huggingface_hub.errors import GatedRepoError
from safetensors.torch import save_file

from pathokd.errors import WeightsError
from pathokd.models.build import build_timm
from pathokd.models.device import choose_device
from pathokd.models.encoder import Encoder, load_encoder, make_card
from pathokd.models.weights import drop_deep_blocks, fit_state_dict, hub_error, state_sha256

TINY: dict[str, Any] = {"depth": 2, "reg_tokens": 3}
ARCH = "vit_tiny_patch16_224"


def make(args: dict[str, Any] | None = None, image_px: int = 64, **facts: Any) -> Encoder:
    args = TINY if args is None else args
    card = make_card("tiny", ARCH, args, image_px=image_px, **facts)
    torch.manual_seed(0)
    return Encoder(build_timm(ARCH, args, image_px=image_px), card).eval()


def images(side: int = 64, batch: int = 2) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (batch, 3, side, side), dtype=torch.uint8, generator=generator)


def test_tokens_are_split_where_timm_puts_them() -> None:
    encoder = make(mean=(0.7, 0.6, 0.7), std=(0.2, 0.3, 0.2))
    pixels = images().float() / 255
    mean, std = torch.tensor([0.7, 0.6, 0.7]).view(3, 1, 1), torch.tensor([0.2, 0.3, 0.2]).view(3, 1, 1)
    with torch.no_grad():
        tokens = encoder.model.forward_features((pixels - mean) / std)
        features = encoder(images())
        pooled = encoder.model((pixels - mean) / std)
    assert tokens.shape[1] == 1 + 3 + 16
    torch.testing.assert_close(features.cls, tokens[:, 0])
    torch.testing.assert_close(features.cls, pooled)
    torch.testing.assert_close(features.patches, tokens[:, 4:])
    assert features.grid == encoder.grid == (4, 4)


def test_float_and_uint8_agree(refuses: Any) -> None:
    encoder = make()
    with torch.no_grad():
        torch.testing.assert_close(encoder(images()).cls, encoder(images().float() / 255).cls)
    with refuses(TypeError, r"uint8 \(0 to 255\) or float"):
        encoder.preprocess(images().to(torch.int32))


def test_fixed_models_resize_squares_by_area() -> None:
    encoder = make(mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
    big = images(128).float() / 255
    wanted = big.reshape(2, 3, 64, 2, 64, 2).mean(dim=(3, 5))
    torch.testing.assert_close(encoder.preprocess(big), wanted)
    assert encoder.preprocess(images(100)).shape == (2, 3, 64, 64)
    with pytest.raises(ValueError, match="square tiles"):
        encoder(torch.zeros(1, 3, 64, 80))


def test_dynamic_models_take_multiples_of_the_patch() -> None:
    encoder = make({**TINY, "dynamic_img_size": True})
    with torch.no_grad():
        features = encoder(torch.rand(1, 3, 48, 80))
    assert features.grid == (3, 5)
    assert features.patches.shape == (1, 15, 192)
    with pytest.raises(ValueError, match="multiples of 16 px, got 50 x 64: the nearest is 48 x 64"):
        encoder(torch.rand(1, 3, 50, 64))


def test_normalisation_is_not_saved() -> None:
    assert not {"mean", "std"} & set(make().state_dict())


def test_hash_depends_on_every_part() -> None:
    base = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.zeros(())}
    same = {"b": torch.zeros(()), "a": torch.arange(6.0).reshape(3, 2).reshape(2, 3)}
    assert state_sha256(base) == state_sha256(same)
    others = [
        {**base, "a": torch.arange(6.0).reshape(3, 2)},
        {**base, "a": torch.arange(6).reshape(2, 3)},
        {"c": base["a"], "b": base["b"]},
        {**base, "b": torch.ones(())},
        {**base, "a": base["a"].bfloat16()},
    ]
    assert len({state_sha256(state) for state in [base, *others]}) == 6


def test_file_with_architecture_in_half_precision(tmp_path: Path) -> None:
    encoder = make({"depth": 4})
    half = {key: value.half() for key, value in encoder.model.state_dict().items()}
    save_file(half, tmp_path / "w.safetensors")
    again = load_encoder(tmp_path / "w.safetensors", architecture=ARCH, model_args={"depth": 4}, image_px=64, mpp=0.5)
    assert again.card.mpp == 0.5
    for key, value in again.model.state_dict().items():
        assert value.dtype == torch.float32
        torch.testing.assert_close(value, half[key].float())


def test_only_an_explicit_depth_drops_blocks(tmp_path: Path) -> None:
    encoder = make({"depth": 4})
    save_file(dict(encoder.model.state_dict()), tmp_path / "w.safetensors")
    shallow = load_encoder(tmp_path / "w.safetensors", architecture=ARCH, model_args={"depth": 3}, image_px=64)
    assert (shallow.card.depth, len(shallow.model.blocks)) == (3, 3)
    torch.testing.assert_close(shallow.model.blocks[2].mlp.fc1.weight, encoder.model.blocks[2].mlp.fc1.weight)
    with pytest.raises(WeightsError, match=r"missing \(blocks\.4\."):
        load_encoder(tmp_path / "w.safetensors", architecture=ARCH, model_args={"depth": 6}, image_px=64)
    three = make_card("three", ARCH, {"depth": 3}, image_px=64)
    with pytest.raises(WeightsError, match=r"unknown \(blocks\.3\."):
        load_encoder(tmp_path / "w.safetensors", card=three)
    assert set(
        drop_deep_blocks({"blocks.2.a": torch.ones(1), "blocks.10.a": torch.ones(1), "n": torch.ones(1)}, 10)
    ) == {
        "blocks.2.a",
        "n",
    }


def test_shapes_that_differ_are_named(tmp_path: Path) -> None:
    save_file(dict(make().model.state_dict()), tmp_path / "w.safetensors")
    with pytest.raises(WeightsError, match="of another shape"):
        load_encoder(tmp_path / "w.safetensors", architecture="vit_small_patch16_224", model_args=TINY, image_px=64)


def test_position_embedding_follows_the_size(tmp_path: Path) -> None:
    """Oracle: timm's own resampling inside a model with dynamic size."""
    encoder = make({**TINY, "dynamic_img_size": True})
    save_file(dict(encoder.model.state_dict()), tmp_path / "w.safetensors")
    larger = load_encoder(tmp_path / "w.safetensors", architecture=ARCH, model_args=TINY, image_px=96).eval()
    assert larger.card.image_px == 96
    with torch.no_grad():
        torch.testing.assert_close(larger(images(96)).cls, encoder(images(96)).cls, atol=1e-5, rtol=1e-5)


def test_position_of_the_class_token_is_folded() -> None:
    model = build_timm("vit_small_patch14_reg4_dinov2", {"depth": 1}, image_px=56)
    state = dict(model.state_dict())
    with_cls = torch.cat([torch.full((1, 1, 384), 0.5), state["pos_embed"]], dim=1)
    fitted = fit_state_dict({**state, "pos_embed": with_cls}, model)
    torch.testing.assert_close(fitted["pos_embed"], state["pos_embed"])
    torch.testing.assert_close(fitted["cls_token"], state["cls_token"] + 0.5)


def test_positions_of_another_layout_are_named(tmp_path: Path) -> None:
    """A file without positions for class token and registers, for a model that has them: nothing can be resampled."""
    small = {"depth": 1, "embed_dim": 32, "num_heads": 2}
    path = tmp_path / "registers.safetensors"
    save_file(build_timm("vit_base_patch14_reg4_dinov2", small, image_px=224).state_dict(), path)
    with pytest.raises(WeightsError, match=r"pos_embed \(1, 256, 32\) instead of \(1, 261, 32\)"):
        load_encoder(path, architecture="vit_base_patch14_dinov2", model_args={**small, "reg_tokens": 4}, image_px=224)


@pytest.mark.parametrize("name", ["xpu", "meta", "gpu"])
def test_a_device_that_nothing_runs_on_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="device must be auto, cpu, cuda, cuda:N or mps"):
        choose_device(name)


def test_plain_timm_folder(tmp_path: Path) -> None:
    model = timm.create_model(ARCH, num_classes=0, depth=2, img_size=64)
    save_file(dict(model.state_dict()), tmp_path / "model.safetensors")
    config = {
        "architecture": ARCH,
        "model_args": {"depth": 2, "img_size": 64, "num_classes": 0},
        "pretrained_cfg": {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6], "input_size": [3, 64, 64]},
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    for name in (str(tmp_path), f"local-dir:{tmp_path}"):
        encoder = load_encoder(name).eval()
        assert (encoder.card.mean, encoder.card.image_px, encoder.card.depth) == ((0.1, 0.2, 0.3), 64, 2)
        with torch.no_grad():
            pixels = encoder.preprocess(images())
            torch.testing.assert_close(encoder(images()).cls, model.eval()(pixels))
    control = load_encoder(tmp_path, pretrained=False)
    assert control.weights_sha256 != encoder.weights_sha256


def test_folder_described_by_a_card(tmp_path: Path) -> None:
    """The folder of a downloaded hub repository, whose config timm alone could not use."""
    card = make_card("mini", ARCH, {**TINY, "mlp_layer": "SwiGLUPacked", "act_layer": "silu"}, image_px=64)
    model = build_timm(card.architecture, card.model_args, image_px=64)
    save_file(dict(model.state_dict()), tmp_path / "model.safetensors")
    encoder = load_encoder(tmp_path, card=card)
    assert encoder.weights_sha256 == state_sha256(model.state_dict())


def test_what_is_not_there_is_said(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="did you mean hoptimus"):
        load_encoder("hoptimus9")
    with pytest.raises(WeightsError, match="There is no folder or file"):
        load_encoder(tmp_path / "nothing")
    with pytest.raises(WeightsError, match=r"no config\.json"):
        load_encoder(tmp_path)
    with pytest.raises(WeightsError, match="no weights file"):
        load_encoder(tmp_path / "nothing.safetensors", architecture=ARCH)
    with pytest.raises(ValueError, match="pass card= or architecture="):
        load_encoder(tmp_path / "nothing.safetensors")
    (tmp_path / "x.bin").write_bytes(b"1")
    with pytest.raises(WeightsError, match="convert the weights to safetensors"):
        load_encoder(tmp_path / "x.bin")
    (tmp_path / "bad.safetensors").write_bytes(b"not safetensors")
    with pytest.raises(WeightsError, match="cannot be read as safetensors"):
        load_encoder(tmp_path / "bad.safetensors", architecture=ARCH)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(WeightsError, match="not valid JSON"):
        load_encoder(tmp_path)
    (tmp_path / "config.json").write_text('{"architecture": "vit_no_such"}')
    with pytest.raises(WeightsError, match="does not describe a model"):
        load_encoder(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"architecture": ARCH}))
    with pytest.raises(WeightsError, match=r"holds no model\.safetensors"):
        load_encoder(tmp_path)


def test_offline_hub_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(WeightsError, match=r"hf-hub:bioptimus/H-optimus-0 could not be fetched.*request access"):
        load_encoder("hoptimus0")
    with pytest.raises(WeightsError, match="could not be fetched"):
        load_encoder("hf-hub:nobody/no-such-model")


def test_gated_says_where_to_ask() -> None:
    gated = GatedRepoError.__new__(GatedRepoError)  # its constructor wants an HTTP response
    message = str(hub_error("hf-hub:MahmoodLab/UNI", gated))
    assert "request access at https://huggingface.co/MahmoodLab/UNI" in message
    assert "huggingface-cli login" in message


def test_a_known_source_finds_its_card() -> None:
    encoder = load_encoder(
        "hf-hub:1aurent/vit_small_patch16_224.kaiko_ai_towards_large_pathology_fms", pretrained=False
    )
    assert encoder.card.name == "kaiko_vits16"


def test_real_saliency_vit(real_data: Path) -> None:
    path = real_data / "weights" / "vit_small_patch14_dinov2_imgfocus_first8blocks_fp16.safetensors"
    args = {"depth": 6, "dynamic_img_size": True}
    encoder = load_encoder(path, architecture="vit_small_patch14_dinov2", model_args=args, image_px=224, mpp=0.5)
    with torch.no_grad():
        features = encoder.eval()(images(224, 1))
    assert features.grid == (16, 16)
    assert torch.isfinite(features.cls).all()
    assert len(encoder.model.blocks) == 6
