"""Schedules against closed forms, and the groups that follow them."""

import numpy as np
import pytest
import timm
import torch
from hypothesis import given
from hypothesis import strategies as st

from pathokd.distill.optim import OptimSpec, Schedules, layer_of, parameter_groups
from pathokd.distill.schedules import average_age, cosine, warmup_cosine
from pathokd.models.build import build_timm


def test_warmup_is_linear_and_the_rest_half_a_cosine() -> None:
    values = warmup_cosine(110, peak=2.0, final=0.5, warmup_steps=10)
    assert np.allclose(values[:10], 2.0 * np.arange(10) / 10)
    assert np.allclose(values[10:], [0.5 + 1.5 * (1 + np.cos(np.pi * t / 100)) / 2 for t in range(100)])


@given(steps=st.integers(1, 300), warmup=st.integers(0, 299), peak=st.floats(0.01, 10), final=st.floats(0, 0.01))
def test_bounds_length_and_monotony(steps: int, warmup: int, peak: float, final: float) -> None:
    if warmup >= steps:
        with pytest.raises(ValueError, match="warmup_steps"):
            warmup_cosine(steps, peak=peak, final=final, warmup_steps=warmup)
        return
    values = warmup_cosine(steps, peak=peak, final=final, warmup_steps=warmup)
    assert values.shape == (steps,)
    assert values.max() <= peak + 1e-12
    assert np.all(np.diff(values[:warmup]) > 0)
    assert np.all(np.diff(values[warmup:]) <= 0)


def test_weight_decay_may_rise() -> None:
    values = cosine(101, start=0.04, final=0.2)
    assert values[0] == pytest.approx(0.04)
    assert values[50] == pytest.approx(0.2 - 0.16 * (1 + np.cos(np.pi * 50 / 101)) / 2)
    assert np.all(np.diff(values) >= 0)


@given(steps=st.integers(1, 60), start=st.floats(0, 1), final=st.floats(0, 1))
def test_the_age_of_an_average_is_that_of_the_steps_it_averages(steps: int, start: float, final: float) -> None:
    momentum = cosine(steps, start=start, final=final)
    average = 0.0  # of the number of the step, which is what a model would be that counts them
    for step in range(1, steps + 1):
        average = momentum[step - 1] * average + (1 - momentum[step - 1]) * step
    assert average_age(momentum) == pytest.approx(steps - average, abs=1e-9)


@pytest.fixture
def vit() -> torch.nn.Module:
    return timm.create_model("vit_tiny_patch16_224", depth=3, num_classes=0, reg_tokens=2, init_values=1e-5)


def test_every_parameter_is_in_one_group_with_its_layer_decay(vit: torch.nn.Module) -> None:
    head = torch.nn.Linear(192, 8)
    spec = OptimSpec(lr=1.0, layer_decay=0.5, patch_embed_lr=0.2)
    groups = parameter_groups(vit, [head], spec)
    scales = {id(p): (group["lr_scale"], group["wd_scale"]) for group in groups for p in group["params"]}
    everything = [*vit.named_parameters(), *head.named_parameters()]
    assert len(scales) == len(everything) == sum(len(group["params"]) for group in groups)
    named = dict(everything)
    assert scales[id(named["blocks.2.mlp.fc1.weight"])] == (0.5, 1.0)
    assert scales[id(named["blocks.0.mlp.fc1.weight"])] == (0.125, 1.0)
    assert scales[id(named["blocks.0.norm1.weight"])] == (0.125, 0.0)
    assert scales[id(named["blocks.1.ls1.gamma"])] == (0.25, 0.0)
    assert scales[id(named["norm.weight"])] == (1.0, 0.0)
    assert scales[id(named["patch_embed.proj.weight"])] == (pytest.approx(0.0625 * 0.2), 1.0)
    assert [scales[id(named[name])] for name in ("cls_token", "reg_token", "pos_embed")] == [(0.0625, 0.0)] * 3
    assert scales[id(head.weight)] == (1.0, 1.0)
    assert scales[id(head.bias)] == (1.0, 0.0)


def test_layers_count_from_the_embeddings() -> None:
    assert [layer_of(name, 12) for name in ("pos_embed", "blocks.0.x", "blocks.11.x", "norm.weight")] == [0, 1, 12, 13]


def test_a_distillation_token_is_a_token() -> None:
    """timm's distilled DeiT has one beside the class token."""
    deit = build_timm("deit_tiny_distilled_patch16_224", {"depth": 2, "embed_dim": 24, "num_heads": 2})
    spec = OptimSpec(layer_decay=0.5)
    scales = {
        id(parameter): (group["lr_scale"], group["wd_scale"])
        for group in parameter_groups(deit, [], spec)
        for parameter in group["params"]
    }
    assert scales[id(deit.dist_token)] == scales[id(deit.cls_token)] == (0.125, 0.0)


def test_what_an_architecture_spares_takes_no_weight_decay() -> None:
    """Relative positions of BEiT and frequencies of mixed RoPE have two dimensions and are no matrices."""
    for name, spared in (
        ("beit_base_patch16_224", "blocks.0.attn.relative_position_bias_table"),
        ("vit_small_patch16_rope_mixed_224", "rope.freqs"),
    ):
        vit = build_timm(name, {"depth": 2, "embed_dim": 24, "num_heads": 2})
        named = dict(vit.named_parameters())
        scales = {id(p): group["wd_scale"] for group in parameter_groups(vit, [], OptimSpec()) for p in group["params"]}
        assert scales[id(named[spared])] == 0.0
        assert scales[id(named["blocks.0.mlp.fc1.weight"])] == 1.0


def test_apply_sets_lr_and_weight_decay_of_the_step(vit: torch.nn.Module) -> None:
    spec = OptimSpec(lr=1.0, final_lr=0.0, warmup=0.1, weight_decay=(0.1, 0.3), layer_decay=0.5)
    schedules = Schedules.plan(spec, 100, (0.9, 1.0))
    optimizer = torch.optim.AdamW(parameter_groups(vit, [], spec))
    for step in (0, 5, 50, 99, 1000):
        schedules.apply(optimizer, step)
        for group in optimizer.param_groups:
            assert group["lr"] == pytest.approx(schedules.at("lr", step) * group["lr_scale"])
            assert group["weight_decay"] == pytest.approx(schedules.at("weight_decay", step) * group["wd_scale"])
    assert schedules.at("lr", 1000) == schedules.at("lr", 99)
    assert schedules.momentum[0] == pytest.approx(0.9)


@pytest.mark.parametrize("wrong", [{"lr": 0}, {"warmup": 1.0}, {"layer_decay": 0}])
def test_impossible_settings_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="got"):
        OptimSpec(**wrong)  # type: ignore[arg-type]
