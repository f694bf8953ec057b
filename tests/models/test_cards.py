"""Every card's facts against the shapes timm builds."""

import dataclasses
from typing import Any

import pytest
import torch

from pathokd.models.build import build_timm, image_size, is_dynamic, patch_px
from pathokd.models.zoo import card_names, get_card


@pytest.mark.parametrize("name", card_names())
def test_card_agrees_with_the_architecture(name: str) -> None:
    card = get_card(name)
    model = build_timm(card.architecture, card.model_args, image_px=card.image_px, device="meta")
    assert sum(parameter.numel() for parameter in model.parameters()) == card.params
    assert all(parameter.is_meta for parameter in model.parameters())
    assert model.embed_dim == card.embed_dim
    assert len(model.blocks) == card.depth
    assert patch_px(model) == card.patch_px
    assert model.num_prefix_tokens == card.num_prefix_tokens
    assert image_size(model) == (card.image_px, card.image_px)
    tokens = model.forward_features(torch.empty(1, 3, card.image_px, card.image_px, device="meta"))
    assert tokens.shape == (1, card.num_prefix_tokens + card.grid[0] * card.grid[1], card.embed_dim)


def test_counts_of_method_md() -> None:
    assert get_card("hoptimus0").params == 1_134_774_272
    assert get_card("h0_mini").params == 85_739_520


def test_facts_of_method_md() -> None:
    teacher, mini = get_card("hoptimus0"), get_card("h0_mini")
    assert teacher.mean == mini.mean == (0.707223, 0.578729, 0.703617)
    assert teacher.std == mini.std == (0.211883, 0.230117, 0.177517)
    assert teacher.licence == "Apache-2.0"
    assert mini.licence == "CC-BY-NC-ND-4.0"
    assert (teacher.mpp, teacher.image_px, teacher.grid, teacher.num_prefix_tokens) == (0.5, 224, (16, 16), 5)
    assert get_card("virchow2").readout_dim == 2560
    assert get_card("midnight").readout == "cls+mean"
    assert get_card("uni_v2").num_prefix_tokens == 9


def test_h0_mini_parameter_shapes() -> None:
    card = get_card("h0_mini")
    shapes = {
        key: tuple(value.shape)
        for key, value in build_timm(card.architecture, card.model_args, image_px=224, device="meta")
        .state_dict()
        .items()
    }
    assert shapes["pos_embed"] == (1, 256, 768)
    assert shapes["reg_token"] == (1, 4, 768)
    assert shapes["blocks.0.mlp.fc1.weight"] == (4096, 768)
    assert shapes["blocks.0.mlp.fc2.weight"] == (768, 2048)
    assert "blocks.11.ls2.gamma" in shapes


def test_a_typo_names_the_nearest_cards() -> None:
    with pytest.raises(ValueError, match="hoptimus0"):
        get_card("H-Optimus-0")
    with pytest.raises(ValueError, match="known: "):
        get_card("zzzz")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_px": 220}, "multiple of patch_px 14, got 220; the nearest is 224"),
        ({"mpp": 264.0}, "0.05 to 20"),
        ({"std": (0.1, 0.0, 0.1)}, "positive"),
        ({"readout": "pool"}, "readout must be one of"),
        ({"depth": 0}, "depth must be at least 1"),
    ],
)
def test_impossible_cards_are_refused(change: dict[str, object], message: str, refuses: Any) -> None:
    with refuses(ValueError, message):
        dataclasses.replace(get_card("hoptimus0"), **change)  # type: ignore[arg-type]


def test_unknown_architecture_and_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match="did you mean vit_base_patch16_224"):
        build_timm("vit_bas_patch16_224", {})
    with pytest.raises(ValueError, match="cannot build"):
        build_timm("vit_tiny_patch16_224", {"no_such_argument": 1}, device="meta")
    with pytest.raises(ValueError, match="mlp_layer must be one of"):
        build_timm("vit_tiny_patch16_224", {"mlp_layer": "Swiglu"})
    with pytest.raises(ValueError, match="act_layer must be"):
        build_timm("vit_tiny_patch16_224", {"act_layer": "nothing"})
    with pytest.raises(ValueError, match="in_chans must be 3, got 1; leave it out"):
        build_timm("vit_tiny_patch16_224", {"in_chans": 1}, device="meta")
    with pytest.raises(ValueError, match="cannot build resnet18"):
        build_timm("resnet18", {}, device="meta")
    assert is_dynamic(build_timm("vit_tiny_patch16_224", {"dynamic_img_size": True}, device="meta"))


def test_a_name_like_no_other_is_refused_without_a_guess() -> None:
    with pytest.raises(ValueError, match=r"has no model 'QQQQ': choose one of timm.list_models"):
        build_timm("QQQQ", {})
