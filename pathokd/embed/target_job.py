"""What targets are computed from: a teacher, tiles, and the one view of each tile."""

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pathokd.data.batch import TileSource
from pathokd.data.targets import SCHEMA, TargetSpec, bytes_per_tile, layout, slide_marks, tile_identity
from pathokd.data.views import orientation, whole_tile
from pathokd.data.wsi import read_or_advise
from pathokd.embed.reading import read_batches
from pathokd.errors import StoreError
from pathokd.files import Header, make_header
from pathokd.models import Features, Teacher, pool_patches
from pathokd.models.build import is_dynamic
from pathokd.pictures import stack_planes

Tokens = dict[str, Tensor]
"""`cls`, (batch, dim), and if they are stored `patches`, (batch, tokens, dim)."""


def target_bytes(teacher: Teacher, source: TileSource, spec: TargetSpec) -> int:
    """Bytes that the targets of all tiles take on disk, but for headers."""
    return len(source) * bytes_per_tile(layout(spec, teacher.embed_dim, teacher_grid(teacher, spec)))


def teacher_grid(teacher: Teacher, spec: TargetSpec) -> tuple[int, int]:
    """(rows, columns) of the teacher's patch tokens on the views that `spec` shows it."""
    card = teacher.card
    if not is_dynamic(teacher.encoder.model):
        return card.grid
    side = (spec.view_px or card.image_px) // card.patch_px
    return side, side


class TargetJob:
    """One teacher on one set of tiles: what is read, computed and promised.

    Args:
        teacher: on the device it should run on.
        source: the tiles.
        spec: what is stored.
        batch_size: tiles per forward pass.
        workers: threads that read ahead.

    Raises:
        ValueError: a spec that does not fit the teacher.
    """

    def __init__(self, teacher: Teacher, source: TileSource, spec: TargetSpec, batch_size: int, workers: int) -> None:
        self.teacher, self.source, self.spec = teacher, source, spec
        self.batch_size, self.workers = batch_size, workers
        self.view_px = spec.view_px or teacher.card.image_px
        own_grid = teacher_grid(teacher, spec)
        self.grid = spec.grid(own_grid)
        self.arrays = layout(spec, teacher.embed_dim, own_grid)
        self.device = teacher.device
        self._keys = source.index["key"].to_list()
        self.header = self._header()

    def _header(self) -> Header:
        card = self.teacher.card
        settings = {
            "teacher": card.name,
            "weights_sha256": self.teacher.weights_sha256,
            "architecture": card.architecture,
            "model_args": card.model_args,
            "image_px": card.image_px,
            "mean": card.mean,
            "std": card.std,
            "precision": self.teacher.precision,
            "tokens": self.spec.tokens,
            "pca": self.spec.pca,
            "dtype": self.spec.dtype,
            "view_px": self.view_px,
            "orientation": "one of eight, by the tile's key",
            "tiles": tile_identity(self.source),
            "n_tiles": len(self.source),
        }
        facts = {
            "card": asdict(card),
            "embed_dim": card.embed_dim,
            "grid": self.grid,
            "arrays": self.arrays,
            "source": repr(self.source),
            "weights_sha256_bf16": self.teacher.weights_sha256_bf16,  # by which a run in bf16 knows its teacher again
        }
        # Through JSON, so that it equals what is read back: tuples become lists.
        header: Header = json.loads(json.dumps({**make_header(SCHEMA, settings), "facts": facts}))
        if slides := slide_marks(self.source):
            header["slides"] = slides
        return header

    @property
    def kinds(self) -> list[str]:
        """Kinds of token that are stored: `cls`, and `patches` perhaps."""
        return [kind for kind in ("cls", "patches") if kind in self.arrays]

    def spread(self, count: int) -> list[int]:
        """At most `count` rows, evenly spread over all."""
        return [int(row) for row in np.unique(np.linspace(0, len(self.source) - 1, count).round())]

    def tokens(self, rows: Iterable[int]) -> Iterator[tuple[list[int], Tokens]]:
        """Batches of row numbers and what the teacher says of their tiles, on its device.

        Raises:
            SlideError: a tile cannot be read.
            StoreError: the teacher says NaN or infinity of a tile.
        """

        def read(row: int) -> Any:
            return whole_tile(read_or_advise(self.source, row), self.view_px, orientation(self._keys[row]))

        for batch in read_batches(read, rows, batch_size=self.batch_size, workers=self.workers):
            numbers, images = zip(*batch, strict=True)
            pixels = torch.from_numpy(stack_planes(images)).to(self.device)
            tokens = self._kept(self.teacher(pixels))
            self._check_finite(numbers, tokens)
            yield list(numbers), tokens

    def _check_finite(self, numbers: Sequence[int], tokens: Tokens) -> None:
        for values in tokens.values():
            fine = values.flatten(1).isfinite().all(dim=1)
            if not bool(fine.all()):
                key = self._keys[numbers[int((~fine).nonzero()[0])]]
                raise StoreError(
                    f"The teacher {self.teacher.card.name} says NaN or infinity of the tile {key}, in "
                    f"{self.teacher.precision}: try --precision fp32, or check its weights."
                )

    def _kept(self, features: Features) -> Tokens:
        if self.grid is None:
            return {"cls": features.cls}
        whole = self.grid == features.grid
        return {
            "cls": features.cls,
            "patches": features.patches if whole else pool_patches(features.patches, features.grid, self.grid),
        }
