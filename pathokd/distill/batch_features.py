"""Features of one batch: each network sees each view once, however many objectives ask for it."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from pathokd.data.batch import TileBatch
from pathokd.distill.cached import CachedTeacher
from pathokd.distill.network import ProjectedStudent, head_key
from pathokd.distill.objective import Tokens
from pathokd.models.features import Features, pool_patches, resize_patches
from pathokd.models.prototype_head import PrototypeHead


class StudentCache:
    """Features of the student on the views of a batch."""

    def __init__(self, net: ProjectedStudent, views: dict[str, Tensor]) -> None:
        self._net, self._views = net, views
        self._features: dict[str, Features] = {}

    def __getitem__(self, view: str) -> Features:
        if view not in self._features:
            self._features[view] = self._net(view_images(self._views, view))
        return self._features[view]


class TargetCache:
    """Features of the teachers on the views of a batch, made ready for the objectives once.

    Args:
        teachers: by key.
        prototypes: fixed heads by `head_key`.
        standardise: name of a target and raw tokens to standardised ones; the third says whether they are to enter the
            statistics of that target.
        batch: with its views, and with what stored targets say of its tiles.

    Attributes:
        counts: whether what is asked for from now on enters the statistics.
    """

    def __init__(
        self,
        teachers: nn.ModuleDict,
        prototypes: nn.ModuleDict,
        standardise: Callable[[str, Tensor, bool], Tensor],
        batch: TileBatch,
    ) -> None:
        self._teachers, self._prototypes, self._standardise = teachers, prototypes, standardise
        self._views, self._stored = batch["views"], batch.get("targets", {})
        self.counts = True
        self._features: dict[tuple[str, str], Features] = {}
        self._made: dict[tuple[str, str, str, str, tuple[int, int]], Tensor] = {}

    def features(self, key: str, view: str) -> Features:
        """Raw features of teacher `key` on `view`."""
        if (key, view) not in self._features:
            teacher = self._teachers[key]
            if isinstance(teacher, CachedTeacher):
                if key not in self._stored:
                    raise ValueError(
                        f"The batch brings no targets of teacher {key!r}: give the TileDataModule the same folder, "
                        f"targets={{{key!r}: {str(teacher.store.folder)!r}}}."
                    )
                self._features[key, view] = teacher(self._stored[key])
            else:
                self._features[key, view] = teacher(view_images(self._views, view))
        return self._features[key, view]

    def pooled_grid(self, key: str) -> tuple[int, int] | None:
        """The grid that teacher `key` averaged its patch tokens on; None if it gives them one by one."""
        teacher = self._teachers[key]
        return teacher.pooled_grid if isinstance(teacher, CachedTeacher) else None

    def get(self, key: str, tokens: Tokens, view: str, grid: tuple[int, int]) -> Tensor:
        """Standardised tokens of teacher `key` on `view`, patches on the student's `grid`."""
        name = head_key(key, tokens)
        return self._once("standard", key, tokens, view, grid, lambda raw: self._standardise(name, raw, self.counts))

    def unit(self, key: str, tokens: Tokens, view: str, grid: tuple[int, int]) -> Tensor:
        """Unit tokens of teacher `key` on `view` as its prototypes want them, patches on the student's `grid`."""
        head: PrototypeHead = self._prototypes[head_key(key, tokens)]  # type: ignore[assignment]
        return self._once("unit", key, tokens, view, grid, head)

    def _once(
        self, kind: str, key: str, tokens: Tokens, view: str, grid: tuple[int, int], make: Callable[[Tensor], Tensor]
    ) -> Tensor:
        grid = (1, 1) if tokens == "cls" else self.pooled_grid(key) or grid
        if (kind, key, tokens, view, grid) not in self._made:
            features = self.features(key, view)
            raw = features.cls if tokens == "cls" else resize_patches(features.patches, features.grid, grid)
            self._made[kind, key, tokens, view, grid] = make(raw)
        return self._made[kind, key, tokens, view, grid]


def project(net: ProjectedStudent, student: Features, key: str, tokens: Tokens, targets: TargetCache) -> Tensor:
    """The student's tokens in the space of teacher `key`; patches on its grid where it averaged them."""
    return on_teachers_grid(net.project(student, key, tokens), student, key, tokens, targets)


def on_teachers_grid(x: Tensor, student: Features, key: str, tokens: Tokens, targets: TargetCache) -> Tensor:
    """What was made of the student's tokens one by one, patches on the grid that teacher `key` averaged its own on."""
    grid = targets.pooled_grid(key)
    return x if tokens == "cls" or grid is None else pool_patches(x, student.grid, grid)


def view_images(views: dict[str, Tensor], name: str) -> Tensor:
    """The images of a view, (batch, 3, height, width); several crops of a tile follow each other."""
    if name not in views:
        raise ValueError(f"The batch has the views {', '.join(views)} but an objective asks for {name!r}: add it to "
                         "data.photometric, or correct the objective.")  # fmt: skip
    images = views[name]
    return images.flatten(0, 1) if images.ndim == 5 else images


def for_each_crop(target: Tensor, student: Tensor) -> Tensor:
    """The teacher's one view of a tile, repeated for each of the student's crops of it.

    Raises:
        ValueError: crops that are no multiple of the other view's.
    """
    if len(student) % len(target):
        raise ValueError(
            f"{len(student)} crops of a batch are compared with {len(target)} of the other view: each of the student's "
            "needs one to meet, so name a teacher_view (or a view held still) whose crop in data.crops has count 1, or "
            "a count that divides the student's."
        )
    return target.repeat_interleave(len(student) // len(target), dim=0)


def one_below_the_other(parts: list[Tensor]) -> Tensor:
    """Tokens of several pairs of views as rows, (tokens, dim)."""
    return torch.cat([part.flatten(0, -2) for part in parts])
