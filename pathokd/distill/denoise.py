"""Denoised targets inside a run: whose file it is, and which tokens it changes."""

from collections.abc import Iterable, Mapping

from pathokd.distill.cached import CachedTeacher
from pathokd.distill.network import head_key
from pathokd.distill.objective import Tokens
from pathokd.distill.prototypes import made_from
from pathokd.errors import TrainingError
from pathokd.files import fingerprint
from pathokd.models.denoise import Denoiser, read_denoiser
from pathokd.models.teacher import Teacher, TeacherSpec


def load_denoisers(
    specs: Mapping[str, TeacherSpec],
    teachers: Mapping[str, Teacher | CachedTeacher],
    wanted: Iterable[tuple[str, Tokens]],
) -> dict[str, Denoiser]:
    """What is projected out of the targets, by `head_key`, of the teachers that say so.

    Args:
        specs: by key.
        teachers: by key.
        wanted: (teacher, tokens) of the targets.

    Raises:
        TrainingError: a file was made from another teacher.
        WeightsError: no such file.
    """
    found = {}
    for key, tokens in wanted:
        path = specs[key].denoise
        if path is None:
            continue
        header, parts = read_denoiser(path)
        differs = made_from(header["settings"], teachers[key])
        if differs is not None:
            raise TrainingError(
                f"The directions in {path} were taken from {header['settings']['teacher']} with {differs}: make them "
                f"with `pathokd denoise` for the teacher {key!r} of this run."
            )
        found[head_key(key, tokens)] = parts[tokens]
    return found


def denoise_identity(spec: TeacherSpec) -> str | None:
    """Fingerprint of what a teacher's targets are denoised by, for checkpoints; None without."""
    return None if spec.denoise is None else fingerprint(read_denoiser(spec.denoise)[0])
