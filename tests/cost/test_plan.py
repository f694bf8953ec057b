"""The plan on paper against sums written out, and against what the full-size recipe's header says."""

import re
from pathlib import Path

import pytest

from pathokd.cost.plan import (
    H0_MINI_TILES,
    H0_MINI_VISITS,
    RunPlan,
    StepCost,
    encoder_gflops,
    mlp_gflops,
    plan_run,
    target_bytes_per_tile,
)
from pathokd.data.targets import TargetSpec
from pathokd.models.zoo import get_card

RECIPE = Path(__file__).parents[2] / "configs/distill/hoptimus0_to_vitb.yaml"
RATE, PRICE = 400.0, 2.5
TEACHER, STUDENT = get_card("hoptimus0"), get_card("h0_mini")
POOLED, ROTATED, WHOLE = TargetSpec("pooled"), TargetSpec("patches", 256, "int8"), TargetSpec("patches")


def planned(step: StepCost, visits: float = H0_MINI_VISITS, targets: TargetSpec = ROTATED) -> RunPlan:
    size = target_bytes_per_tile(TEACHER, targets)
    return plan_run(step, tiles=H0_MINI_TILES, visits=visits, target_bytes=size, tflop_per_s=RATE, price_per_hour=PRICE)


def one_view() -> StepCost:
    """The recipe: one view; the two projectors of 768, 1536 and 1536 on the class token and 256 patches."""
    heads = mlp_gflops(257, (768, 1536, 1536))
    return StepCost(encoder_gflops(TEACHER, [224]), encoder_gflops(STUDENT, [224]), heads)


def multi_crop(prototypes: int = 131_072) -> StepCost:
    """H0-mini's: two global and eight local crops, 18 pairs of class tokens and 512 patch tokens."""
    mlps = mlp_gflops(10 + 512, (768, 2048, 2048, 256))
    logits, assignment = mlp_gflops(18 + 512, (256, prototypes)), mlp_gflops(18 + 512, (1536, prototypes))
    student = encoder_gflops(STUDENT, [224] * 2 + [98] * 8)
    return StepCost(encoder_gflops(TEACHER, [224] * 2), student, mlps + logits, assignment)


def test_a_run_by_hand() -> None:
    """1 TFLOP/s, 10 tiles seen 3 times: online 3600 + 3 x 600 GFLOP a visit; targets of 360 GB at 100 MB/s: an hour."""
    step = StepCost(teacher=3600, student=500, heads=80, assignment=60)
    assert (step.trained, step.total) == (1800, 5400)
    plan = plan_run(
        step, tiles=10, visits=30, target_bytes=36_000_000, tflop_per_s=1, price_per_hour=2, disk_mb_per_s=100
    )
    assert plan.pflop == pytest.approx(30 * 5.4e-3)
    assert plan.online_hours == pytest.approx(30 * 5.4 / 3600)
    assert plan.caching_hours == pytest.approx(10 * (3.6 + 0.36) / 3600)
    assert plan.stored_hours == pytest.approx(plan.caching_hours + 30 * 1.8 / 3600)
    assert (plan.online_price, plan.stored_price) == (2 * plan.online_hours, 2 * plan.stored_hours)
    assert plan.read_mb_per_s == pytest.approx(36 / 1.8)
    assert plan.target_tb == pytest.approx(3.6e-4)
    assert plan.break_even_epochs == pytest.approx(3.96 / 3.6)


def test_a_slow_disk_sets_the_pace() -> None:
    plan = plan_run(
        StepCost(10, 1), tiles=1, visits=5, target_bytes=10**9, tflop_per_s=1, price_per_hour=1, disk_mb_per_s=1e4
    )
    assert plan.read_mb_per_s == pytest.approx(1e4)
    assert plan.stored_hours == pytest.approx((0.01 + 0.1 + 5 * 0.1) / 3600)


def test_storage_is_what_the_formats_take() -> None:
    """fp16: 1536 and 256 x 1536 numbers; int8: 1536 and 256 x 256, and a fp32 scale a token."""
    assert target_bytes_per_tile(TEACHER, WHOLE) == 2 * 1536 * 257
    assert target_bytes_per_tile(TEACHER, POOLED) == 2 * 1536 * 17
    assert target_bytes_per_tile(TEACHER, ROTATED) == 1536 + 4 + 256 * (256 + 4)


def test_local_crops_cost_what_method_says() -> None:
    """method.md A.7: 9.3 GFLOP for a ViT-B at 98 px, 46.8 at 224, the multi-crop step some 2 TFLOP."""
    assert encoder_gflops(STUDENT, [98]) == pytest.approx(9.3, rel=0.02)
    assert encoder_gflops(STUDENT, [224, 98, 98]) == pytest.approx(46.8 + 2 * 9.3, rel=0.02)
    assert multi_crop().total == pytest.approx(1960, rel=0.06)


def test_the_recipes_header_is_computed() -> None:
    header = " ".join(re.findall(r"^# *(.*)$", RECIPE.read_text(encoding="utf-8"), re.MULTILINE))
    step, paper = one_view(), multi_crop()
    short, pooled, rotated = planned(step, 12.8e6), planned(step, targets=POOLED), planned(step)
    whole, original = planned(step, targets=WHOLE), planned(paper)
    for said in (
        f"{step.teacher:.0f} GFLOP (teacher) + 3 x {step.student + step.heads:.0f} (student and projectors) = "
        f"{step.total:.0f} GFLOP",
        f"12.8 M views (DistillPath's budget): {short.pflop * 1e15:.1e} FLOP, {short.online_hours:.1f} H100-hours, "
        f"${short.online_price:.0f}",
        f"{H0_MINI_VISITS / 1e6:.0f} M views (H0-mini's: {H0_MINI_TILES / 1e6:.1f} M tiles, "
        f"{H0_MINI_VISITS / H0_MINI_TILES:.2f} times each): {rotated.pflop * 1e15:.1e} FLOP, "
        f"{rotated.online_hours:.0f} H100-hours, ${rotated.online_price:.0f} with the teacher running",
        f"from stored targets {pooled.stored_hours:.0f} H100-hours, ${pooled.stored_price:.0f} and "
        f"{pooled.target_tb:.1f} TB (pooled, fp16)",
        f"or {rotated.stored_hours:.0f} H100-hours, ${rotated.stored_price:.0f} and {rotated.target_tb:.1f} TB "
        "(patches, 256 principal directions, int8)",
        f"or {whole.stored_hours:.0f} H100-hours and {whole.target_tb:.0f} TB (patches, fp16)",
        f"pay after {rotated.break_even_epochs:.1f} epochs and ask {rotated.read_mb_per_s:.0f} MB/s of the disk",
        f"{paper.total / 1e3:.2f} TFLOP a tile, {original.online_hours:.0f} H100-hours, ${original.online_price:.0f}",
    ):
        assert said in header, said


def test_targets_of_a_larger_view_hold_more_tokens() -> None:
    """28 x 28 patches at 448 px where the teacher takes them, 1024 wide in two bytes; H-optimus-0 resizes to 224."""
    whole = TargetSpec("patches", view_px=448)
    assert target_bytes_per_tile(get_card("uni_v1"), whole) == 2 * 1024 * (28 * 28 + 1)
    assert target_bytes_per_tile(TEACHER, whole) == target_bytes_per_tile(TEACHER, WHOLE)
