"""A teacher's tokens on many tiles, stored shard by shard so that a run that was cut off goes on."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.data import DataLoader

from pathokd.data.batch import Draw, TileSource
from pathokd.data.datamodule import ViewDataset, collate
from pathokd.data.samplers import epoch_order
from pathokd.data.views import CLEAN, Geometry, Views
from pathokd.errors import StoreError
from pathokd.files import atomic_path
from pathokd.models.codec import FP16_ROUNDING
from pathokd.models.prototype_head import TokenKind, standard_unit
from pathokd.models.standardize import Standardizer
from pathokd.models.teacher import Teacher
from pathokd.progress import Bars

SHARD_TILES = 1024
"""Views of tiles in one shard; at most so many are looked at again after a kill."""


@dataclass(frozen=True)
class TokenSpec:
    """Which tokens are taken.

    Args:
        views: random crops of each tile.
        patches: patch tokens of each crop, at random places.
        scale: range of a crop's share of its tile; as the teacher's global crops in training.
        max_tiles: tiles taken, drawn by the seed; None takes all.
        seed: of tiles, crops and places.

    Raises:
        ValueError: a number below 1, or a scale that is no share.
    """

    views: int = 1
    patches: int = 16
    scale: tuple[float, float] = (0.32, 1.0)
    max_tiles: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if min(self.views, self.patches, 1 if self.max_tiles is None else self.max_tiles) < 1:
            raise ValueError(
                f"views, patches-per-tile and max-tiles must be at least 1, got {self.views}, {self.patches} and "
                f"{self.max_tiles}."
            )
        if self.seed < 0:
            raise ValueError(f"seed must not be negative, got {self.seed}.")
        Geometry(scale=self.scale)  # refuses what is no share of a tile, before a folder and a header are made

    def draws(self, tiles: int) -> list[Draw]:
        """Every visit to a tile, in order: all tiles once, then once more."""
        order = epoch_order(tiles, seed=self.seed, epoch=0)[: self.max_tiles]
        return [Draw(int(position), view) for view in range(self.views) for position in order]


class TokenShards:
    """Stored tokens of one folder, and what they hold.

    Args:
        folder: of the shards.
        shards: how many there are when all is done.
    """

    def __init__(self, folder: Path, shards: int) -> None:
        self.folder, self.shards = folder, shards

    def path(self, number: int) -> Path:
        """File of a shard."""
        return self.folder / f"tokens-{number:06d}.safetensors"

    def raw(self, kind: TokenKind) -> Iterator[Tensor]:
        """Tokens of each shard, fp32 (rows, dim)."""
        for number in range(self.shards):
            yield read_tensor(self.path(number), kind).float()

    def statistics(self, kind: TokenKind) -> tuple[Tensor, Tensor, int]:
        """Mean and standard deviation of each dimension, and the number of tokens.

        The deviation is no less than what fp16 rounds off the mean: training has tokens that are not rounded, and of a
        dimension that hardly varies this difference, over no deviation, would outweigh all others.
        """
        found: Standardizer | None = None
        for tokens in self.raw(kind):
            found = found or Standardizer(tokens.shape[1])
            found.update(tokens)
        if found is None:
            raise StoreError(f"{self.folder} holds no tokens: start again with --overwrite.")
        return found.mean, found.std.maximum(found.mean.abs() * FP16_ROUNDING), int(found.count)

    def units(self, kind: TokenKind, mean: Tensor, std: Tensor) -> Iterator[Tensor]:
        """Standardised unit tokens of each shard, on the device of `mean`."""
        for tokens in self.raw(kind):
            yield standard_unit(tokens.to(mean.device), mean, std)


def extract_tokens(
    teacher: Teacher,
    source: TileSource,
    spec: TokenSpec,
    folder: Path,
    *,
    batch_size: int,
    workers: int,
    bars: Bars,
) -> TokenShards:
    """Run the teacher on crops of the tiles and store class tokens and some patch tokens, fp16.

    Shards that are there already are kept; which tokens they hold depends on spec and shard number only.

    Args:
        teacher: on its device.
        source: the tiles.
        spec: which tokens.
        folder: for the shards.
        batch_size: tiles per forward pass.
        workers: processes that read tiles.
        bars: shows how far it is.

    Raises:
        StoreError: a token that fp16 cannot hold.
    """
    draws = spec.draws(len(source))
    parts = [draws[start : start + SHARD_TILES] for start in range(0, len(draws), SHARD_TILES)]
    shards = TokenShards(folder, len(parts))
    todo = [number for number in range(len(parts)) if not shards.path(number).is_file()]
    views = Views(Geometry(teacher.card.image_px, spec.scale), seed=spec.seed)
    batches = [
        parts[number][start : start + batch_size]
        for number in todo
        for start in range(0, len(parts[number]), batch_size)
    ]
    dataset = ViewDataset(source, np.arange(len(source)), views)
    loader = DataLoader(
        dataset,
        batch_sampler=batches,
        collate_fn=collate,
        num_workers=workers,
        generator=torch.Generator().manual_seed(spec.seed),
    )
    loaded = bars.track(iter(loader), "teacher", len(batches))
    for number in todo:
        rng = np.random.default_rng([spec.seed, number])
        found: dict[str, list[Tensor]] = {"cls": [], "patches": []}
        for start in range(0, len(parts[number]), batch_size):
            features = teacher(next(loaded)["views"][CLEAN].to(teacher.device))
            places = _places(rng, len(parts[number][start : start + batch_size]), features.patches.shape[1], spec)
            rows = torch.from_numpy(places).to(features.patches.device)
            found["cls"].append(features.cls.half().cpu())
            found["patches"].append(features.patches.flatten(0, 1)[rows].half().cpu())
        _write({name: torch.cat(tokens) for name, tokens in found.items()}, shards.path(number))
    return shards


def _places(rng: np.random.Generator, images: int, patches: int, spec: TokenSpec) -> np.ndarray[tuple[int], np.dtype]:
    """Rows of the kept patch tokens among (images x patches)."""
    kept = min(spec.patches, patches)
    return np.concatenate([i * patches + np.sort(rng.permutation(patches)[:kept]) for i in range(images)])


def _write(tokens: dict[str, Tensor], path: Path) -> None:
    if not all(bool(part.isfinite().all()) for part in tokens.values()):
        raise StoreError(
            "The teacher gave tokens that are not finite, or larger than fp16 holds (65504): look at its weights and "
            "at the precision it runs in."
        )
    with atomic_path(path) as part:
        save_file(tokens, part)


def read_tensor(path: Path, name: str) -> Tensor:
    """One tensor of a file of an unfinished run.

    Raises:
        StoreError: the file is damaged.
    """
    try:
        with safe_open(path, "pt") as file:
            found: Tensor = file.get_tensor(name)
    except (OSError, SafetensorError) as error:
        raise StoreError(
            f"{path} is damaged ({error}), and the unfinished run cannot go on: start again with --overwrite."
        ) from error
    return found


def check_loading(batch_size: int, workers: int) -> None:
    """Refuse numbers that no loader can have.

    Raises:
        ValueError: no tile to a batch, or a negative number of processes.
    """
    if batch_size < 1 or workers < 0:
        raise ValueError(f"batch_size must be at least 1 and workers at least 0, got {batch_size} and {workers}.")
