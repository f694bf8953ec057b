"""How much of a teacher an exported student holds, seen from the outside: two models, the same tiles."""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from pathokd.data.packed import PackedTiles
from pathokd.embed import Embedder
from pathokd.embed.reading import read_batches
from pathokd.metrics import cosine, knn_overlap, linear_cka
from pathokd.models import Features, resize_patches
from pathokd.progress import Bars

NEIGHBOURS = 10


class Fidelity(NamedTuple):
    """Means over n tiles; the cosines are None where the student was exported without the adaptor head."""

    cosine_cls: float | None
    """Cosine of the adapted class token with the teacher's, in the space the student was trained in."""
    cosine_patches: float | None
    """The same of all patch tokens."""
    cka: float
    """Linear CKA of class tokens; no adaptor flatters it."""
    knn_overlap: float
    """Share of the 10 nearest tiles both models agree on, by class tokens."""
    n: int
    """Tiles compared; CKA is biased upwards and overlap falls as it grows."""


def spread_rows(n: int, at_most: int) -> npt.NDArray[np.int64]:
    """Up to `at_most` rows spread evenly over n, so that every slide takes part."""
    return np.unique(np.linspace(0, n - 1, min(n, at_most)).round().astype(np.int64))


def measure_fidelity(
    teacher: Embedder,
    student: Embedder,
    adaptors: Mapping[str, nn.Module],
    packed: PackedTiles,
    *,
    key: str | None = None,
    rows: npt.NDArray[np.int64] | None = None,
    max_tiles: int = 1024,
    workers: int = 2,
) -> Fidelity:
    """Compare a student with its teacher on packed tiles.

    A head `KEY.cls` or `KEY.patches` maps the student's tokens to the teacher's space. Where a
    `Standardizer` is exported as `KEY.cls.statistics`, both sides pass through it: that is the space the
    student was trained in, where the mean that all tiles share flatters no cosine.

    Args:
        teacher: The teacher, ready to run.
        student: The student.
        adaptors: From `pathokd.export.load_adaptors`; may be empty.
        packed: Tiles.
        key: Name of the teacher in the adaptors' names; needed where they are of several.
        rows: Which tiles; by default up to `max_tiles` spread over all.
        max_tiles: Limit where `rows` is None.
        workers: Threads that read ahead.

    Returns:
        The measures.

    Raises:
        ValueError: Too few tiles for 10 neighbours, or heads of several teachers, or of others than `key`.
    """
    keys = [*dict.fromkeys(name.split(".")[0] for name in adaptors)]
    if key is None and len(keys) == 1:
        key = keys[0]
    if keys and key not in keys:
        raise ValueError(f"key should name one of the teachers {', '.join(keys)} that the heads lead to, got {key!r}.")
    chosen = spread_rows(len(packed), max_tiles) if rows is None else rows
    if len(chosen) <= NEIGHBOURS:
        raise ValueError(
            f"fidelity looks at {NEIGHBOURS} neighbours and needs more tiles than that, got {len(chosen)}."
        )
    sums: dict[str, list[Tensor]] = {"cls": [], "patches": []}
    own, target = [], []
    batches = read_batches(
        lambda i: packed.read(int(chosen[i])),
        range(len(chosen)),
        batch_size=student.batch_size,
        workers=workers,
    )
    with Bars() as bars:
        for batch in bars.track(batches, "Fidelity", -(-len(chosen) // student.batch_size)):
            images = np.stack([tile for _, tile in batch])
            theirs, ours = teacher.features(images), student.features(images)
            own.append(ours.cls.cpu())
            target.append(theirs.cls.cpu())
            for tokens, found in sums.items():
                found.extend(_cosines(ours, theirs, adaptors, f"{key}.{tokens}", tokens))
    mean = {tokens: float(torch.cat(found).double().mean()) if found else None for tokens, found in sums.items()}
    x, y = torch.cat(own), torch.cat(target)
    return Fidelity(mean["cls"], mean["patches"], float(linear_cka(x, y)), float(knn_overlap(x, y, NEIGHBOURS)), len(x))


@torch.inference_mode()
def _cosines(
    student: Features, teacher: Features, adaptors: Mapping[str, nn.Module], name: str, tokens: str
) -> list[Tensor]:
    """Cosines of one batch, in a list that is empty if there is no such head."""
    if name not in adaptors:
        return []
    ours, theirs = (student.cls, teacher.cls) if tokens == "cls" else (student.patches, teacher.patches)
    if tokens == "patches":
        theirs = resize_patches(theirs, teacher.grid, student.grid)
    projected = adaptors[name].to(ours.device)(ours)
    statistics = adaptors.get(f"{name}.statistics")
    if statistics is not None:
        statistics.to(theirs.device)
        projected, theirs = statistics(projected), statistics(theirs)
    return [cosine(projected.flatten(0, -2), theirs.flatten(0, -2)).cpu()]
