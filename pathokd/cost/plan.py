"""A training on paper: arithmetic, hours, storage and money, with a running teacher and with stored targets."""

from collections.abc import Iterable
from dataclasses import replace
from itertools import pairwise
from typing import NamedTuple

from pathokd.cost.caching import BACKWARD, Workload, judge
from pathokd.cost.profile import count_gflops, seen_px
from pathokd.data.targets import TargetSpec, bytes_per_tile, layout
from pathokd.models.cards import ModelCard

H0_MINI_TILES = 43_374_634
"""Tiles of PanCancer40M (method.md A.3)."""
H0_MINI_VISITS = 105_000 * 2048
"""Iterations times batch of H0-mini's training: 215.0 M tiles, each seen 4.96 times (method.md A.4)."""


class StepCost(NamedTuple):
    """GFLOP on one visit to one tile, two for each multiply-accumulate, forward passes only."""

    teacher: float
    student: float
    heads: float = 0.0
    """Trained with the student."""
    assignment: float = 0.0
    """Of the teacher's tokens to its prototypes: made in every epoch, targets stored or not."""

    @property
    def trained(self) -> float:
        """What is left without the teacher: forward and backward passes, and the assignment."""
        return (self.student + self.heads) * (1 + BACKWARD) + self.assignment

    @property
    def total(self) -> float:
        """Of the whole step."""
        return self.teacher + self.trained


class RunPlan(NamedTuple):
    """Hours are those of one device; `target_tb` and `stored_*` are of stored targets, caching included."""

    visits: float
    pflop: float
    online_hours: float
    online_price: float
    caching_hours: float
    stored_hours: float
    stored_price: float
    target_tb: float
    read_mb_per_s: float
    """What stored targets ask of the disk while the student trains."""
    break_even_epochs: float


def encoder_gflops(card: ModelCard, crops_px: Iterable[int]) -> float:
    """Forward passes of one model on several crops of a tile.

    Args:
        card: of the model.
        crops_px: side of each crop; a ViT of fixed size is counted as if it took them.
    """
    sides = list(crops_px)
    once = {side: count_gflops(_free(card), image_px=side) for side in set(sides)}
    return sum(once[side] for side in sides)


def mlp_gflops(tokens: int, widths: Iterable[int]) -> float:
    """Linear layers from width to width, on so many tokens."""
    return 2e-9 * tokens * sum(a * b for a, b in pairwise(widths))


def plan_run(
    step: StepCost,
    *,
    tiles: int,
    visits: float,
    target_bytes: int,
    tflop_per_s: float,
    price_per_hour: float,
    disk_mb_per_s: float = 1000.0,
) -> RunPlan:
    """What a training takes on devices that sustain a rate; nothing of it is measured.

    Args:
        step: arithmetic of a visit.
        tiles: distinct ones.
        visits: tiles seen over the whole training, repeats counted.
        target_bytes: stored per tile (`target_bytes_per_tile`).
        tflop_per_s: that one device sustains.
        price_per_hour: of one device, in any currency.
        disk_mb_per_s: that targets are read and written with, per device.

    Raises:
        ValueError: a number out of range.
    """
    rate = tflop_per_s * 1e3
    work = Workload(
        tiles,
        visits / tiles,
        step.teacher,
        step.trained / (1 + BACKWARD),
        target_bytes=target_bytes,
        gflop_per_s=rate,
        disk_mb_per_s=disk_mb_per_s,
    )
    verdict = judge(work)
    online, stored = verdict.online_s / 3600, verdict.cached_s / 3600
    return RunPlan(
        visits=visits,
        pflop=visits * step.total / 1e6,
        online_hours=online,
        online_price=online * price_per_hour,
        caching_hours=tiles * (work.teacher_s + work.disk_s) / 3600,
        stored_hours=stored,
        stored_price=stored * price_per_hour,
        target_tb=tiles * target_bytes / 1e12,
        read_mb_per_s=target_bytes / 1e6 / max(work.student_s, work.disk_s),
        break_even_epochs=verdict.break_even_epochs,
    )


def target_bytes_per_tile(teacher: ModelCard, spec: TargetSpec) -> int:
    """Bytes that the targets of one tile take."""
    side = seen_px(teacher, spec.view_px or teacher.image_px) // teacher.patch_px
    return bytes_per_tile(layout(spec, teacher.embed_dim, (side, side)))


def _free(card: ModelCard) -> ModelCard:
    """The same model for any size; what it computes at its own does not change."""
    return replace(card, model_args={**card.model_args, "dynamic_img_size": True})
