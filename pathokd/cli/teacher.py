"""A teacher for the verbs that run one."""

import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathokd.models import Teacher, TeacherSpec


def teacher_on(device: str, spec: "TeacherSpec") -> "Teacher":
    """Build a teacher where it runs, and say so if its arithmetic is slow there.

    Args:
        device: auto or a torch device.
        spec: the teacher.
    """
    from pathokd.models import build_teacher
    from pathokd.models.device import bf16_advice, choose_device

    chosen = choose_device(device)
    if advice := bf16_advice(chosen, ["--precision fp32"] if spec.precision == "bf16" else []):
        print(advice, file=sys.stderr, flush=True)
    return build_teacher(spec).to(chosen)
