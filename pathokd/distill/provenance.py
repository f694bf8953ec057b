"""What a checkpoint says of the teachers it was trained under, and whether a run may go on from it."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from torch import Tensor

from pathokd.distill.cached import CachedTeacher
from pathokd.errors import TrainingError
from pathokd.models.teacher import Teacher, TeacherSpec


def teacher_facts(spec: TeacherSpec, teacher: Teacher | CachedTeacher, denoise: str | None) -> dict[str, Any]:
    """Weights, card, stored targets and denoising (fingerprint of its file) of a teacher, JSON-able."""
    return {
        "weights": spec.weights,
        "weights_sha256": teacher.weights_sha256,
        "weights_sha256_bf16": teacher.weights_sha256_bf16,
        "card": asdict(teacher.card),
        "targets": teacher.identity if isinstance(teacher, CachedTeacher) else None,
        "denoise": denoise,
    }


def same_weights(teacher: Teacher | CachedTeacher, saved: Mapping[str, Any]) -> bool:
    """Whether a teacher has the weights of these facts, in fp32 or in bf16.

    Args:
        teacher: here.
        saved: `teacher_facts`, or those of an export; older ones do not say what the weights are in bf16.
    """
    if saved.get("weights_sha256") == teacher.weights_sha256:
        return True
    half = teacher.weights_sha256_bf16
    return half is not None and half in (saved.get("weights_sha256"), saved.get("weights_sha256_bf16"))


def check_teacher(
    key: str,
    spec: TeacherSpec,
    teacher: Teacher | CachedTeacher,
    denoise: str | None,
    saved: Mapping[str, Any],
    *,
    training: bool,
) -> None:
    """Refuse another teacher than the checkpoint's; to go on training, also other targets of it.

    A finished student may be measured against a running teacher in either precision, its stored targets or denoised
    ones.

    Args:
        key: of the teacher.
        spec: here.
        teacher: here.
        denoise: fingerprint of the file its targets are denoised by here; None without.
        saved: `teacher_facts` in the checkpoint.
        training: whether the run goes on.

    Raises:
        TrainingError: what differs.
    """
    now = teacher_facts(spec, teacher, denoise)
    if training and saved.get("targets") != now["targets"]:
        names = [
            "a running teacher" if facts.get("targets") is None else f"the stored targets {facts['targets']}"
            for facts in (saved, now)
        ]
        raise TrainingError(
            f"Teacher {key!r} was {names[0]} when this checkpoint was written and is {names[1]} now: resume with "
            "the same model.teachers."
        )
    if training and saved.get("denoise") != now["denoise"]:
        names = ["not denoised" if facts.get("denoise") is None else "denoised" for facts in (saved, now)]
        raise TrainingError(
            f"Teacher {key!r} was {names[0]} when this checkpoint was written and is {names[1]}, or otherwise, now: "
            f"resume with the same model.teachers.{key}.denoise."
        )
    if training and saved["weights_sha256"] != now["weights_sha256"] and same_weights(teacher, saved):
        raise TrainingError(
            f"Teacher {key!r} ran in another precision when this checkpoint was written: resume with the same "
            f"model.teachers.{key}.precision."
        )
    if not same_weights(teacher, saved):
        raise TrainingError(
            f"Teacher {key!r} has other weights than when this checkpoint was written ({spec.weights}): resume with "
            "the same teacher."
        )
    for name in ("mean", "std"):
        had, has = tuple(saved["card"][name]), getattr(teacher.card, name)
        if had != has:
            raise TrainingError(
                f"Teacher {key!r} saw tiles with {name} {had} when this checkpoint was written, and sees them with "
                f"{has} now: resume with the same model.teachers.{key}, its card and its {name}."
            )


def check_shapes(state: Mapping[str, Tensor], saved: Mapping[str, Sequence[int]]) -> None:
    """Refuse weights of other networks than the run has.

    Args:
        state: of the module, built.
        saved: the shape of each weight in the checkpoint.

    Raises:
        TrainingError: names the first weight that differs.
    """
    mine = {name: tuple(value.shape) for name, value in state.items()}
    theirs = {name: tuple(shape) for name, shape in saved.items()}
    differs = next((name for name in {**theirs, **mine} if theirs.get(name) != mine.get(name)), None)
    if differs is not None:
        there, here = theirs.get(differs, "not in it"), mine.get(differs, "none")
        raise TrainingError(
            f"This checkpoint is of other networks: {differs} is {there}, and {here} in this run. Go on with the same "
            "model: students, objectives, projector and heads."
        )
