"""Is it cheaper to run the teacher in every epoch, or once and store what it says?"""

import math
from dataclasses import dataclass
from typing import NamedTuple

BACKWARD = 2.0
"""Arithmetic of a backward pass, in forward passes: one product for the inputs, one for the weights."""


@dataclass(frozen=True)
class Workload:
    """A distillation, as far as its cost goes.

    Args:
        tiles: training tiles.
        epochs: times each is visited.
        teacher_gflops: of the teacher's forward passes on one visit to one tile.
        student_gflops: of the student's forward passes on one visit, all of its views.
        target_bytes: stored per tile.
        sampled: tiles the teacher sees once more, beforehand.
        gflop_per_s: what the machine does of either model; None leaves the disk out of account, and speaks of ratios.
        disk_mb_per_s: what reading and writing targets reaches.

    Raises:
        ValueError: a number out of range.
    """

    tiles: int
    epochs: float
    teacher_gflops: float
    student_gflops: float
    target_bytes: int = 0
    sampled: int = 0
    gflop_per_s: float | None = None
    disk_mb_per_s: float = 500.0

    def __post_init__(self) -> None:
        if self.tiles < 1 or self.epochs <= 0 or self.teacher_gflops <= 0 or self.student_gflops < 0:
            raise ValueError(f"tiles, epochs and GFLOP must be positive, got {self}.")
        if self.disk_mb_per_s <= 0 or (self.gflop_per_s is not None and self.gflop_per_s <= 0):
            raise ValueError(f"rates must be positive, got {self}.")

    def _seconds(self, gflops: float) -> float:
        """Of so much arithmetic; without a rate, in units of one GFLOP."""
        return gflops / (self.gflop_per_s or 1.0)

    @property
    def teacher_s(self) -> float:
        """Of the teacher, per tile."""
        return self._seconds(self.teacher_gflops)

    @property
    def student_s(self) -> float:
        """Of the student, forward and backward, per tile."""
        return self._seconds(self.student_gflops * (1 + BACKWARD))

    @property
    def disk_s(self) -> float:
        """Of reading or writing the targets of a tile."""
        return self.target_bytes / (self.disk_mb_per_s * 1e6) if self.gflop_per_s else 0.0


class Verdict(NamedTuple):
    """`online_s` and `cached_s` are of the whole training, caching included; seconds if a rate was given."""

    cached: bool
    online_s: float
    cached_s: float
    break_even_epochs: float
    reason: str


def break_even_epochs(work: Workload) -> float:
    """Epochs after which caching has paid for itself; infinity if it never does.

    Caching costs `(1 + sampled / tiles) t_teacher + t_disk` a tile, once. An epoch online costs `t_teacher + t_student`
    a tile, an epoch cached `max(t_student, t_disk)`, since targets are read while the student computes.
    """
    once = (1 + work.sampled / work.tiles) * work.teacher_s + work.disk_s
    saved = work.teacher_s + work.student_s - max(work.student_s, work.disk_s)
    return once / saved if saved > 0 else math.inf


def judge(work: Workload) -> Verdict:
    """Whether to cache, and why, in one sentence."""
    even = break_even_epochs(work)
    online = work.tiles * work.epochs * (work.teacher_s + work.student_s)
    once = (work.tiles + work.sampled) * work.teacher_s + work.tiles * work.disk_s
    cached = once + work.tiles * work.epochs * max(work.student_s, work.disk_s)
    share = work.teacher_s / (work.teacher_s + work.student_s)
    step = f"{work.teacher_gflops:.3g} of {work.teacher_gflops + work.student_gflops * (1 + BACKWARD):.3g} GFLOP a tile"
    if math.isinf(even):
        reason = (
            f"online is cheaper: reading {work.target_bytes / 1e3:.0f} kB of targets a tile at "
            f"{work.disk_mb_per_s:.0f} MB/s takes longer than the teacher does"
        )
    elif cached >= online:
        reason = f"online is cheaper: stored targets pay after {even:.1f} epochs, and this is {work.epochs:.1f}"
    else:
        reason = (
            f"stored targets are cheaper: the teacher is {share:.0%} of an online step ({step}) and runs once instead "
            f"of {work.epochs:.1f} times, which pays after {even:.1f} epochs and makes the whole "
            f"{online / cached:.1f} times cheaper"
        )
    return Verdict(cached < online, online, cached, even, reason)
