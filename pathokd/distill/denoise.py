"""Denoised targets inside a run: whose file it is, and which tokens it changes."""

from collections.abc import Iterable, Mapping
from typing import NamedTuple

from pathokd.distill.cached import CachedTeacher
from pathokd.distill.network import head_key
from pathokd.distill.objective import Tokens
from pathokd.distill.prototypes import made_from
from pathokd.errors import TrainingError
from pathokd.files import fingerprint
from pathokd.models.denoise import Denoiser, read_denoiser
from pathokd.models.teacher import Teacher, TeacherSpec


class Denoisers(NamedTuple):
    """What is projected out of the targets of a run."""

    parts: dict[str, Denoiser]
    """By `head_key`; only of teachers whose targets are denoised."""
    identity: dict[str, str]
    """Fingerprint of each such teacher's file, for checkpoints."""


def load_denoisers(
    specs: Mapping[str, TeacherSpec],
    teachers: Mapping[str, Teacher | CachedTeacher],
    wanted: Iterable[tuple[str, Tokens]],
) -> Denoisers:
    """Read the file of each teacher that names one, once.

    Args:
        specs: by key.
        teachers: by key.
        wanted: (teacher, tokens) of the targets.

    Raises:
        TrainingError: a file was made from another teacher.
        WeightsError: no such file.
    """
    files = {key: read_denoiser(spec.denoise) for key, spec in specs.items() if spec.denoise is not None}
    for key, (header, _) in files.items():
        differs = made_from(header["settings"], teachers[key])
        if differs is not None:
            raise TrainingError(
                f"The directions in {specs[key].denoise} were taken from {header['settings']['teacher']} with "
                f"{differs}: make them with `pathokd denoise` for the teacher {key!r} of this run."
            )
    parts = {head_key(key, tokens): files[key][1][tokens] for key, tokens in wanted if key in files}
    return Denoisers(parts, {key: fingerprint(header) for key, (header, _) in files.items()})
