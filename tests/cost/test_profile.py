"""Counts against peers' figures and hand arithmetic; speed against a clock that is handed in."""

import itertools

import pytest
import torch

from pathokd.cost import count_gflops, count_params, measure_tiles_per_s, profile_model
from pathokd.cost.profile import seen_px
from pathokd.models.build import build_timm
from pathokd.models.encoder import Encoder, make_card
from pathokd.models.zoo import get_card


def on_meta(name: str) -> Encoder:
    card = get_card(name)
    return Encoder(build_timm(card.architecture, card.model_args, image_px=card.image_px, device="meta"), card)


@pytest.mark.parametrize(("name", "gflops"), [("hoptimus0", 608.0), ("kaiko_vitb16", 35.0), ("h0_mini", 46.8)])
def test_gflops_of_peers(name: str, gflops: float) -> None:
    assert count_gflops(on_meta(name)) == pytest.approx(gflops, rel=0.01)


def test_class_tokens_that_come_late_are_counted() -> None:
    """CaiT's: 24 blocks on 196 tokens, then two on the class token; 2.53 GMAC in its paper (arXiv 2103.17239)."""
    card = make_card("cait", "cait_xxs24_224", {})
    assert count_gflops(card) == pytest.approx(2 * 2.53, rel=0.02)


def test_gflops_by_hand() -> None:
    """ViT of one block: 2 (patch embedding + qkv + attention twice + projection + MLP)."""
    card = make_card("tiny", "vit_tiny_patch16_224", {"depth": 1}, image_px=64)
    encoder = Encoder(build_timm(card.architecture, card.model_args, image_px=64), card)
    d, n, p = 192, 17, 16
    macs = p * d * 3 * 16 * 16 + n * d * 3 * d + 2 * n * n * d + n * d * d + 2 * n * d * 4 * d
    assert count_gflops(encoder) == pytest.approx(2 * macs / 1e9, rel=1e-9)


def test_params_include_frozen_ones() -> None:
    encoder = on_meta("h0_mini")
    assert count_params(encoder.requires_grad_(False)) == 85_739_520


def test_speed_is_the_median_batch() -> None:
    durations = iter([1.0, 9.0, 1.0, 1.0, 1.0])
    now = itertools.count()
    state = {"t": 0.0}

    def forward(_: torch.Tensor) -> None:
        next(now)
        state["t"] += next(durations)

    speed = measure_tiles_per_s(forward, torch.zeros(4, 1), seconds=4.5, warmup=1, clock=lambda: state["t"])
    assert speed == pytest.approx(4.0)  # batches of 9, 1, 1 seconds after one of warm-up
    with pytest.raises(ValueError, match="not be negative"):
        measure_tiles_per_s(forward, torch.zeros(1, 1), seconds=-1)


def test_profile_measures_something() -> None:
    card = make_card("tiny", "vit_tiny_patch16_224", {"depth": 1}, image_px=32)
    encoder = Encoder(build_timm(card.architecture, card.model_args, image_px=32), card).train()
    cost = profile_model(encoder, batch_size=2, seconds=0.01)
    assert cost.params == card.params
    assert cost.tiles_per_s > 1
    assert encoder.training
    with pytest.raises(ValueError, match="batch_size"):
        profile_model(encoder, batch_size=0)


def test_apples_gpu_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """It returns before it is done, as CUDA does: without waiting, a speed is that of queueing the work."""
    waits: list[str] = []
    monkeypatch.setattr(torch.mps, "synchronize", lambda: waits.append("mps"))

    class OnMps:
        device, shape = torch.device("mps"), (4, 1)

    measure_tiles_per_s(lambda _: None, OnMps(), seconds=0.0, warmup=1)  # type: ignore[arg-type]
    assert len(waits) == 4  # after the warm-up and after each of three batches


def test_a_model_of_fixed_size_costs_the_same_whatever_it_is_shown() -> None:
    """It resizes a tile of 64 px to its own 32; a model that takes any size does not, told so or by its kind."""
    for name, arguments, side in (
        ("vit_tiny_patch16_224", {"depth": 1}, 32),
        ("vit_tiny_patch16_224", {"depth": 1, "dynamic_img_size": True}, 64),
        ("vit_small_patch16_dinov3", {"depth": 1}, 64),
    ):
        card = make_card("tiny", name, arguments, image_px=32)
        assert seen_px(card, 64) == side
        encoder = Encoder(build_timm(name, arguments, image_px=32), card)
        cost = profile_model(encoder, image_px=64, batch_size=1, seconds=0.0)
        assert cost.gflops == count_gflops(card, image_px=side)
