"""The cost model against sums written out, at the borders where the answer changes."""

import math

import pytest

from pathokd.cost.caching import Workload, break_even_epochs, judge


def test_without_a_disk_only_the_teachers_passes_count() -> None:
    """Online 10 (4 + 3 x 2) = 100 a tile, cached 4 + 10 x 6 = 64."""
    verdict = judge(Workload(tiles=50, epochs=10, teacher_gflops=4, student_gflops=2))
    assert verdict.cached
    assert (verdict.online_s, verdict.cached_s) == (50 * 100, 50 * 64)
    assert verdict.break_even_epochs == 1
    assert "40% of an online step (4 of 10 GFLOP a tile)" in verdict.reason
    assert "1.6 times cheaper" in verdict.reason


def test_the_sample_is_paid_for() -> None:
    assert break_even_epochs(Workload(100, 1, 4, 2, sampled=25)) == pytest.approx(1.25)
    verdict = judge(Workload(100, 1.2, 4, 2, sampled=25))
    assert not verdict.cached
    assert "pay after 1.2 epochs, and this is 1.2" in verdict.reason or "pay after 1.3" in verdict.reason


def test_a_slow_disk_hides_behind_the_student_until_it_does_not() -> None:
    """1 GFLOP/s: the teacher takes 4 s, the student 6; 500 MB of targets take 1 s at 500 MB/s, 50 s at 10."""
    fast = Workload(10, 10, 4, 2, target_bytes=500_000_000, gflop_per_s=1)
    assert break_even_epochs(fast) == pytest.approx((4 + 1) / 4)
    assert judge(fast).cached_s == pytest.approx(10 * (4 + 1) + 10 * 10 * 6)
    slow = Workload(10, 10, 4, 2, target_bytes=500_000_000, gflop_per_s=1, disk_mb_per_s=10)
    assert math.isinf(break_even_epochs(slow))
    assert not judge(slow).cached
    assert "reading 500000 kB of targets a tile at 10 MB/s" in judge(slow).reason


def test_one_epoch_is_cheaper_online() -> None:
    verdict = judge(Workload(10, 1, 4, 2, target_bytes=1000, gflop_per_s=1))
    assert not verdict.cached
    assert verdict.cached_s > verdict.online_s


@pytest.mark.parametrize("wrong", [{"tiles": 0}, {"epochs": 0}, {"teacher_gflops": 0}, {"gflop_per_s": -1.0}])
def test_impossible_numbers_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="must be positive"):
        Workload(**{"tiles": 1, "epochs": 1, "teacher_gflops": 1, "student_gflops": 1, **wrong})  # type: ignore[arg-type]
