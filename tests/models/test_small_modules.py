"""Projector, standardizer, moving average, key conversion."""

import copy
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from pathokd.errors import WeightsError
from pathokd.models.build import SWIGLU_ARGS, build_timm
from pathokd.models.convert import convert_dinov2
from pathokd.models.ema import Ema
from pathokd.models.projector import Projector, make_projector
from pathokd.models.standardize import Standardizer
from pathokd.models.weights import fit_state_dict, load_strictly


def test_projector_shapes_and_spec() -> None:
    linear = make_projector("linear", 6, 4)
    mlp = make_projector("mlp", 6, 4)
    assert linear(torch.rand(2, 5, 6)).shape == mlp(torch.rand(2, 5, 6)).shape == (2, 5, 4)
    assert [type(layer) for layer in mlp.net] == [nn.LayerNorm, nn.Linear, nn.GELU, nn.Linear]
    assert mlp.hidden_dim == 6
    again = Projector(**mlp.spec())  # type: ignore[arg-type]
    again.load_state_dict(mlp.state_dict())
    x = torch.rand(3, 6)
    torch.testing.assert_close(linear(x), x @ linear.net[0].weight.T + linear.net[0].bias)
    torch.testing.assert_close(again(x), mlp(x))


def test_projector_errors(refuses: Any) -> None:
    with refuses(ValueError, "linear or mlp"):
        make_projector("conv", 1, 1)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no hidden_dim"):
        make_projector("linear", 1, 1, 3)
    with pytest.raises(ValueError, match="at least 1"):
        make_projector("mlp", 0, 1)


@given(st.lists(st.integers(1, 7), min_size=1, max_size=6), st.integers(0, 100), st.sampled_from([0.0, 1e4]))
def test_running_statistics_are_those_of_all_rows(sizes: list[int], seed: int, offset: float) -> None:
    rng = np.random.default_rng(seed)
    batches = [rng.normal(offset, [1.0, 3.0, 0.01], (size, 3)) for size in sizes]
    standardizer = Standardizer(3)
    for batch in batches:
        standardizer.update(torch.from_numpy(batch))
    rows = np.concatenate(batches)
    np.testing.assert_allclose(standardizer.mean.numpy(), rows.mean(0), rtol=1e-5, atol=1e-6)
    std = rows.std(0, ddof=1) if len(rows) > 1 else np.ones(3)
    np.testing.assert_allclose(standardizer.std.numpy(), std, rtol=1e-4, atol=1e-9)
    assert int(standardizer.count) == len(rows)


def test_standardized_rows_have_zero_mean_and_unit_spread() -> None:
    x = torch.randn(500, 4, generator=torch.Generator().manual_seed(0)) * 5 + 2
    standardizer = Standardizer(4)
    standardizer.update(x)
    z = standardizer(x)
    torch.testing.assert_close(z.mean(0), torch.zeros(4), atol=1e-5, rtol=0)
    torch.testing.assert_close(z.std(0), torch.ones(4), atol=1e-5, rtol=0)
    torch.testing.assert_close(standardizer.inverse(z), x, atol=1e-4, rtol=1e-5)


def test_stored_statistics_do_not_change() -> None:
    stored = Standardizer(2, mean=torch.tensor([1.0, 2.0]), std=torch.tensor([2.0, 4.0]))
    stored.update(torch.randn(10, 2))
    torch.testing.assert_close(stored(torch.tensor([[3.0, 6.0]])), torch.ones(1, 2), atol=1e-5, rtol=0)


def test_statistics_survive_a_checkpoint() -> None:
    one, two = Standardizer(3), Standardizer(3)
    x, y = torch.randn(7, 3), torch.randn(5, 3)
    one.update(x)
    two.load_state_dict(one.state_dict())
    one.update(y)
    two.update(y)
    assert torch.equal(one.mean, two.mean)
    assert torch.equal(one.std, two.std)


def test_standardizer_errors() -> None:
    with pytest.raises(ValueError, match="come together"):
        Standardizer(2, mean=torch.zeros(2))
    with pytest.raises(ValueError, match="shape"):
        Standardizer(2, mean=torch.zeros(3), std=torch.ones(3))
    with pytest.raises(ValueError, match="positive"):
        Standardizer(2, mean=torch.zeros(2), std=torch.zeros(2))
    with pytest.raises(ValueError, match="width 2, got 3"):
        Standardizer(2).update(torch.zeros(1, 3))


def test_ema_follows_the_formula() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    ema = Ema(model, momentum=0.9)
    start = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
        model[1].running_mean.fill_(7.0)
    ema.update(model)
    torch.testing.assert_close(ema.model[0].weight, 0.9 * start["0.weight"] + 0.1 * model[0].weight)
    assert torch.equal(ema.model[1].running_mean, model[1].running_mean)
    ema.update(model, momentum=0.0)
    torch.testing.assert_close(ema.model[0].weight, model[0].weight)
    assert not any(parameter.requires_grad for parameter in ema.parameters())
    assert not ema.train().training
    with pytest.raises(ValueError, match="0 to 1"):
        ema.update(model, momentum=1.5)
    with pytest.raises(ValueError, match="parameter names differ"):
        ema.update(nn.Linear(2, 2))


def _to_transformers(state: dict[str, torch.Tensor], swiglu: bool) -> dict[str, torch.Tensor]:
    """The names transformers gives to the weights of a timm vision transformer, written by hand."""
    out = {
        "embeddings.cls_token": state["cls_token"],
        "embeddings.mask_token": torch.zeros(1, 8),
        "embeddings.position_embeddings": state["pos_embed"],
        "embeddings.patch_embeddings.projection.weight": state["patch_embed.proj.weight"],
        "embeddings.patch_embeddings.projection.bias": state["patch_embed.proj.bias"],
        "layernorm.weight": state["norm.weight"],
        "layernorm.bias": state["norm.bias"],
    }
    if "reg_token" in state:
        out["embeddings.register_tokens"] = state["reg_token"]
    first, second = ("weights_in", "weights_out") if swiglu else ("fc1", "fc2")
    depth = 1 + max(int(key.split(".")[1]) for key in state if key.startswith("blocks."))
    for i in range(depth):
        b, e = f"blocks.{i}", f"encoder.layer.{i}"
        for kind in ("weight", "bias"):
            q, k, v = state[f"{b}.attn.qkv.{kind}"].chunk(3)
            out[f"{e}.attention.attention.query.{kind}"] = q
            out[f"{e}.attention.attention.key.{kind}"] = k
            out[f"{e}.attention.attention.value.{kind}"] = v
            out[f"{e}.attention.output.dense.{kind}"] = state[f"{b}.attn.proj.{kind}"]
            out[f"{e}.mlp.{first}.{kind}"] = state[f"{b}.mlp.fc1.{kind}"]
            out[f"{e}.mlp.{second}.{kind}"] = state[f"{b}.mlp.fc2.{kind}"]
            out[f"{e}.norm1.{kind}"] = state[f"{b}.norm1.{kind}"]
            out[f"{e}.norm2.{kind}"] = state[f"{b}.norm2.{kind}"]
        out[f"{e}.layer_scale1.lambda1"] = state[f"{b}.ls1.gamma"]
        out[f"{e}.layer_scale2.lambda1"] = state[f"{b}.ls2.gamma"]
    return out


@pytest.mark.parametrize(
    ("architecture", "swiglu", "prefix"),
    [
        ("vit_small_patch14_dinov2", False, ""),
        ("vit_small_patch14_reg4_dinov2", False, "dinov2."),
        ("vit_small_patch14_reg4_dinov2", True, ""),
    ],
)
def test_conversion_round_trip(architecture: str, swiglu: bool, prefix: str) -> None:
    args = {"depth": 2, **(SWIGLU_ARGS if swiglu else {})}
    model = build_timm(architecture, args, image_px=56)
    state = {key: torch.randn_like(value) for key, value in model.state_dict().items()}
    foreign = {prefix + key: value for key, value in _to_transformers(state, swiglu).items()}
    back = convert_dinov2(foreign)
    assert back.keys() == state.keys()
    assert all(torch.equal(back[key], state[key]) for key in state)
    load_strictly(model, fit_state_dict(back, model), "test")


def test_conversion_refuses_other_models() -> None:
    with pytest.raises(WeightsError, match="no weight of a transformers Dinov2Model"):
        convert_dinov2({"encoder.layer.0.attention.self.query.weight": torch.zeros(1)})
    with pytest.raises(WeightsError, match="no weight of a transformers Dinov2Model"):
        convert_dinov2({"pooler.weight": torch.zeros(1)})
    with pytest.raises(WeightsError, match="query, key and value"):
        convert_dinov2({"encoder.layer.0.attention.attention.query.weight": torch.zeros(1)})
