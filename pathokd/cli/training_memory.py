"""What a configured training will hold in memory, said before its first step."""

import lightning as L
from lightning.pytorch.strategies import DDPStrategy
from torch import nn

from pathokd.cost.memory import (
    ADAM_STATES,
    FP32,
    MemoryPlan,
    UnplannedError,
    VitShape,
    activation_bytes,
    available_bytes,
    forward_bytes,
    vit_shape,
)
from pathokd.cost.profile import count_params, seen_px
from pathokd.data.views import Geometry, Views, crop_of
from pathokd.distill.module import DistillationModule
from pathokd.distill.network import ProjectedStudent, head_key
from pathokd.distill.objective import Objective
from pathokd.distill.strategy import shards_of
from pathokd.losses import AlignmentLoss, PrototypeLoss
from pathokd.losses.assignment import CHUNK_ELEMENTS
from pathokd.models.cards import ModelCard
from pathokd.models.teacher import Teacher


def memory_sentence(trainer: L.Trainer, module: DistillationModule, data: Views, batch_size: int) -> str:
    """The plan of this training beside what its device has.

    Args:
        trainer: with the device, the precision and the number of processes.
        module: configured.
        data: its views.
        batch_size: tiles per process.
    """
    half = str(trainer.precision).startswith(("bf16", "16"))
    ddp, shards = isinstance(trainer.strategy, DDPStrategy), shards_of(trainer)
    try:
        plan = memory_plan(module, data, batch_size, itemsize=2 if half else FP32, ddp=ddp, shards=shards)
    except UnplannedError as error:
        return f"There is no memory plan: {error}."
    device = trainer.strategy.root_device
    where = str(device) if trainer.num_devices == 1 else f"each of {trainer.num_devices} processes on {device.type}"
    return plan.sentence(available_bytes(device, trainer.num_devices), where)


def memory_plan(
    module: DistillationModule,
    data: Views,
    batch_size: int,
    *,
    itemsize: int = FP32,
    ddp: bool = False,
    shards: int = 1,
) -> MemoryPlan:
    """Bytes of a step.

    Args:
        module: configured.
        data: its views.
        batch_size: tiles per process.
        itemsize: bytes a number of what the student computes.
        ddp: whether DDP keeps a second copy of the gradients, to exchange them.
        shards: parts that FSDP2 cuts the student into.
    """
    nets, crops = [student.net for student in module.trainees.values()], data.crops
    params = sum(count_params(net) for net in nets)
    held = FP32 * params // shards
    views = {view for objective in module.objectives for view in objective.views}
    images = {view: batch_size * crops[crop_of(view, crops)].count for view in views}
    kept = backward = 0
    for net in nets:  # all go forward before any goes back
        shapes = {view: _shape(net.encoder.card, crops[crop_of(view, crops)]) for view in views}
        kept += sum(images[view] * activation_bytes(shape, itemsize) for view, shape in shapes.items())
        kept += sum(_head_bytes(module, net, o, images, shapes, itemsize) for o in module.objectives)
        backward = max([backward, *(images[view] * forward_bytes(shape, itemsize) for view, shape in shapes.items())])
    weight_casts = itemsize * params if itemsize < FP32 else 0
    running = {key: module.teacher(key) for key in module.teacher_specs}
    shown = {(key, crop_of(view, crops)) for key, view in teacher_views(module)}
    once = [
        _forward(teacher, crops[crop], batch_size)
        for key, crop in shown
        if isinstance(teacher := running[key], Teacher)
    ]
    chunk = 2 * CHUNK_ELEMENTS * FP32 if any(isinstance(o.loss, PrototypeLoss) for o in module.objectives) else 0
    return MemoryPlan(
        teachers=sum(_size(teacher.encoder) for teacher in running.values() if isinstance(teacher, Teacher)),
        student=held,
        average=held if module.ema_momentum is not None else 0,
        optimiser=ADAM_STATES * held,
        gradients=held * (2 if ddp else 1),
        activations=kept + weight_casts,
        targets=_target_bytes(module, data, batch_size) + _pictures(data, batch_size),
        working=max(*once, backward, chunk, held),
    )


def crop_px(card: ModelCard, crop: Geometry) -> int:
    """Side at which a model sees a crop; its own, if it is of fixed size.

    Raises:
        ValueError: a side that is no multiple of the model's patches.
    """
    side = seen_px(card, crop.size_px)
    if side % card.patch_px:
        raise ValueError(
            f"{card.name} takes sides that are multiples of {card.patch_px} px, and a crop of data has "
            f"{crop.size_px}: correct its size_px, or take a model of another patch size."
        )
    return side


def teacher_views(module: DistillationModule) -> set[tuple[str, str]]:
    """(teacher, view) of each forward pass that the objectives ask teachers for."""
    first = next(iter(module.teacher_specs))
    asked = (objective for objective in module.objectives if objective.asks_teacher)
    return {(objective.teacher or first, view) for objective in asked for view in objective.teacher_views}


def _shape(card: ModelCard, crop: Geometry) -> VitShape:
    return vit_shape(card, crop_px(card, crop))


def _forward(teacher: Teacher, crop: Geometry, batch_size: int) -> int:
    """Of the teacher's forward pass on a crop, one micro-batch at a time."""
    itemsize, images = 2 if teacher.precision == "bf16" else FP32, batch_size * crop.count
    return min(teacher.micro_batch or images, images) * forward_bytes(_shape(teacher.card, crop), itemsize)


def _head_bytes(
    module: DistillationModule,
    net: ProjectedStudent,
    objective: Objective,
    images: dict[str, int],
    student: dict[str, VitShape],
    itemsize: int,
) -> int:
    """What the head and the loss of an objective keep for the backward pass."""
    if not isinstance(objective.loss, AlignmentLoss | PrototypeLoss):
        return 0  # compares class tokens as they are
    key = objective.teacher or next(iter(module.teacher_specs))
    tokens = sum(images[view] * (1 if objective.tokens == "cls" else student[view].tokens) for view in objective.views)
    if isinstance(objective.loss, AlignmentLoss):
        head: nn.Module = net.heads[head_key(key, objective.tokens)]
        # Prediction and target, each as it is and as a unit vector.
        return tokens * (itemsize * _inside(head) + 4 * FP32 * module.teacher(key).embed_dim)
    mine = net.dino_head(key, objective.tokens)
    unit = FP32 * (module.teacher(key).embed_dim + 3 * mine.direction.shape[1])
    return tokens * (itemsize * _inside(mine.mlp) + unit) + 2 * FP32 * mine.direction.numel()


def _inside(head: nn.Module) -> int:
    """Numbers a token leaves between the layers of an MLP: each one's output before and after its GELU."""
    return 2 * sum(layer.out_features for layer in head.modules() if isinstance(layer, nn.Linear))


def _target_bytes(module: DistillationModule, data: Views, batch_size: int) -> int:
    """What the teachers said, as it is and standardised, and their prototypes."""
    total = _size(module.prototypes)
    for key, view in teacher_views(module):
        card, crop = module.teacher(key).card, data.crops[crop_of(view, data.crops)]
        tokens = (crop_px(card, crop) // card.patch_px) ** 2 + card.num_prefix_tokens
        total += 2 * FP32 * batch_size * crop.count * tokens * card.embed_dim
    return total


def _pictures(data: Views, batch_size: int) -> int:
    shown = [data.crops[crop_of(view, data.crops)] for view in data.names]
    return sum(3 * batch_size * crop.count * crop.size_px**2 for crop in shown)


def _size(module: nn.Module) -> int:
    tensors = [*module.parameters(), *module.buffers()]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
