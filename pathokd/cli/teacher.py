"""A teacher for the verbs that run one, and where it runs."""

import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from pathokd.models import Teacher, TeacherSpec


def device_for(device: str, precision: str) -> "torch.device":
    """The device, ready for a model; a line if it is slow in the precision asked for.

    Args:
        device: auto or a torch device.
        precision: bf16, or one that costs nothing.
    """
    from pathokd.models.device import bf16_advice, choose_device, keep_freed_memory

    chosen = choose_device(device)
    keep_freed_memory(chosen)
    if advice := bf16_advice(chosen, ["--precision fp32"] if precision == "bf16" else []):
        print(advice, file=sys.stderr, flush=True)
    return chosen


def teacher_on(device: str, spec: "TeacherSpec") -> "Teacher":
    """Build a teacher where it runs, and say so if its arithmetic is slow there.

    Args:
        device: auto or a torch device.
        spec: the teacher.
    """
    from pathokd.models import build_teacher

    chosen = device_for(device, spec.precision)
    return build_teacher(spec).to(chosen)
