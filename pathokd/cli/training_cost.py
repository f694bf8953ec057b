"""What a training is told as it starts: memory, what its teacher costs, and how far its average would lag."""

import sys
from collections.abc import Iterable

import lightning as L
from lightning.pytorch.callbacks import Callback

from pathokd.cli.training_memory import crop_px, memory_sentence, teacher_views
from pathokd.cost.caching import Workload, judge
from pathokd.cost.profile import count_gflops
from pathokd.data.datamodule import TileDataModule
from pathokd.data.views import CLEAN, crop_of
from pathokd.distill.cached import CachedTeacher
from pathokd.distill.module import DistillationModule
from pathokd.distill.schedules import average_age, cosine
from pathokd.models.cards import ModelCard
from pathokd.models.device import bf16_advice
from pathokd.models.teacher import Teacher

LAG = 0.15
"""Share of a run that the exported average may lag behind; that of H0-mini's schedule at its length is 0.11."""


class SayCost(Callback):
    """Prints the split, the memory plan, what the teacher costs, and advice, once, as the training starts."""

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Count and say."""
        data = getattr(trainer, "datamodule", None)
        if isinstance(pl_module, DistillationModule) and isinstance(data, TileDataModule) and trainer.is_global_zero:
            if trainer.estimated_stepping_batches == float("inf"):
                return  # the module says what is missing
            steps = int(trainer.estimated_stepping_batches)
            visits = steps * trainer.accumulate_grad_batches * trainer.world_size * data.batch_size
            print(data.described_split(), file=sys.stderr)
            print(memory_sentence(trainer, pl_module, data.views, data.batch_size), file=sys.stderr)
            print(training_cost(pl_module, data, visits / len(data.train_rows)), file=sys.stderr, flush=True)
            if advice := bf16_advice(trainer.strategy.root_device, _in_bf16(trainer, pl_module)):
                print(advice, file=sys.stderr, flush=True)
            if (before := pl_module.steps_before) and before != steps:
                print(other_length(before, steps, trainer.global_step), file=sys.stderr, flush=True)
            if pl_module.ema_momentum is not None and (lag := average_lag(pl_module.ema_momentum, steps)):
                print(lag, file=sys.stderr, flush=True)


def _in_bf16(trainer: L.Trainer, module: DistillationModule) -> list[str]:
    """Settings that would replace bf16 by fp32."""
    student = ["--trainer.precision 32-true"] if str(trainer.precision).startswith("bf16") else []
    teachers = [(key, module.teacher(key)) for key in module.teacher_specs]
    return student + [
        f"--model.teachers.{key}.precision fp32"
        for key, teacher in teachers
        if isinstance(teacher, Teacher) and teacher.precision == "bf16"
    ]


def other_length(before: int, steps: int, done: int) -> str:
    """What is said of a run that goes on with schedules of another length than it began with."""
    return (
        f"The checkpoint is from step {done} of {before}, and this run has {steps}: learning rate, weight decay and "
        f"average go on as at step {done} of {steps}, so this is neither that run nor one of {steps} steps throughout."
    )


def average_lag(ema_momentum: tuple[float, float], steps: int) -> str:
    """A sentence if the average that is exported ends far behind the run, or nothing."""
    share = average_age(cosine(steps, start=ema_momentum[0], final=ema_momentum[1])) / steps
    if share <= LAG:
        return ""
    better = f"{steps / (steps + 20):.4g}"  # one momentum m lags m / (1 - m) steps
    return (
        f"The exported student is an average: by model.ema_momentum {list(ema_momentum)} it ends {share:.0%} of these "
        f"{steps} steps behind the last one, by [{better}, {better}] 5%."
    )


def training_cost(module: DistillationModule, data: TileDataModule, epochs: float) -> str:
    """What of the arithmetic the teachers take, and whether to store their targets.

    Args:
        module: configured.
        data: set up.
        epochs: how often each tile is visited.
    """
    teachers = {key: module.teacher(key) for key in module.teacher_specs}
    stored = {key: teacher for key, teacher in teachers.items() if isinstance(teacher, CachedTeacher)}
    running = teachers.keys() - stored.keys()
    student = sum(
        _gflops([trainee.net.encoder.card for trainee in module.trainees.values()], data, view)
        for view in {v for objective in module.objectives for v in objective.views}
    )
    gflops = {
        key: sum(_gflops([teacher.card], data, view) for owner, view in teacher_views(module) if owner == key)
        for key, teacher in teachers.items()
    }
    step = sum(gflops[key] for key in running) + 3 * student
    if not running:
        return (
            f"Targets are read from {', '.join(str(teacher.store.folder) for teacher in stored.values())}; running the "
            f"teacher would make a step {1 + sum(gflops.values()) / step:.1f} times as dear in arithmetic."
        )
    spent = sum(gflops[key] for key in running)
    if not spent:
        return "No objective asks a running teacher for anything, so stored targets would save nothing."
    hindered = _hindered(module, data)
    if hindered:
        return (
            f"The running teacher takes {spent / step:.0%} of the arithmetic of a step ({spent:.3g} of {step:.3g} "
            f"GFLOP a tile) and cannot be replaced by stored targets: {hindered}."
        )
    verdict = judge(Workload(len(data.train_rows), epochs, spent, student))
    if verdict.cached:
        return f"The teacher runs with the training, but {verdict.reason}: see `pathokd cache`."
    return f"The teacher runs with the training: {verdict.reason}."


def _gflops(cards: Iterable[ModelCard], data: TileDataModule, view: str) -> float:
    """Of some models on one view, all of its crops."""
    crops = data.views.crops
    crop = crops[crop_of(view, crops)]
    return crop.count * sum(count_gflops(card, image_px=crop_px(card, crop)) for card in cards)


def _hindered(module: DistillationModule, data: TileDataModule) -> str:
    """Why targets cannot be stored beforehand, or nothing."""
    if data.geometry.scale != (1.0, 1.0):
        return "random crops (data.geometry.scale) need it in every epoch"
    others = sorted({view for _, view in teacher_views(module)} - {CLEAN})
    return f"it sees the perturbed view {others[0]!r}" if others else ""
