"""The LightningDataModule: tiles in, batches of views out, split by patient, resumable in mid-epoch."""

import contextlib
import os
import signal
import time
import zlib
from collections.abc import Iterator, Mapping
from functools import partial
from types import FrameType
from typing import Any

import albumentations as A
import lightning as L
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from pathokd.data.batch import Draw, TileBatch, TileSource
from pathokd.data.handover import Parcel, TileLoader, wrap
from pathokd.data.places import Registered, RegisteredSpec, registered_tiles
from pathokd.data.samplers import PlaceBatchSampler, ResumableBatchSampler
from pathokd.data.split import check_slides_held_out, check_tiles_held_out, learnt_slides, split_column, split_rows
from pathokd.data.targets import TargetStore, tile_identity
from pathokd.data.views import Geometry, Views, orientation
from pathokd.data.wsi import open_tiles, read_or_advise
from pathokd.errors import ManifestError
from pathokd.files import fingerprint
from pathokd.pictures import stack_planes
from pathokd.processes import usable_cores
from pathokd.types import IntArray


class ViewDataset(Dataset[Any]):
    """Draws of some rows of a tile source, as views.

    Args:
        source: the tiles.
        rows: of the tiles drawn from.
        views: drawn of each.
        targets: teacher to its stored targets. With any, each tile keeps the one geometry they were computed on.
        registered: place and condition of each of `rows`, to be told with it.
    """

    def __init__(
        self,
        source: TileSource,
        rows: IntArray,
        views: Views,
        targets: Mapping[str, TargetStore] | None = None,
        registered: Registered | None = None,
    ) -> None:
        self.source, self.rows, self.views, self.targets = source, rows, views, targets or {}
        self.registered = registered
        self._keys = source.index["key"].to_list()

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, draw: Draw) -> dict[str, Any]:
        row = said = int(self.rows[draw.position])
        if self.registered is not None and self.registered.answers_to is not None:
            said = int(self.rows[self.registered.answers_to[draw.position]])
        turned = orientation(self._keys[said]) if self.targets else None
        targets = {teacher: store.read(said) for teacher, store in self.targets.items()}
        views = self.views(read_or_advise(self.source, row), draw, turned)
        item = {"views": views, "index": row, "key": self._keys[row], "targets": targets}
        if self.registered is not None:
            place, condition, _ = self.registered
            item |= {"place": int(place[draw.position]), "condition": int(condition[draw.position])}
        return item


def collate(items: list[dict[str, Any]]) -> TileBatch:
    """Stack views to uint8 (batch, 3, height, width), or (batch, count, 3, height, width) of a repeated crop."""
    first = items[0]
    batch: TileBatch = {
        "views": {
            name: torch.from_numpy(stack_planes([item["views"][name] for item in items])) for name in first["views"]
        },
        "index": [item["index"] for item in items],
        "key": [item["key"] for item in items],
    }
    if first["targets"]:
        batch["targets"] = {
            teacher: {
                name: torch.from_numpy(np.stack([item["targets"][teacher][name] for item in items])) for name in arrays
            }
            for teacher, arrays in first["targets"].items()
        }
    if "place" in first:
        batch["place"] = torch.tensor([item["place"] for item in items])
        batch["condition"] = torch.tensor([item["condition"] for item in items])
    return batch


def collate_and_wrap(items: list[dict[str, Any]]) -> Parcel:
    """`collate`, for a process that hands the batch over."""
    return wrap(collate(items))


def _spare_cores() -> int:
    """How many reading processes serve a training here."""
    spare = min(8, usable_cores() - 1)
    # One beside a model on two cores only takes turns with it, and hands over what it reads.
    return 0 if spare == 1 and not torch.cuda.is_available() else spare


def _start_worker(worker: int, *, gives_way: bool) -> None:
    """What a worker process does first."""
    del worker
    # Ctrl-C and a scheduler's SIGTERM reach workers too, and the training still wants the tiles of its last step.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "alarm"):
        signal.signal(signal.SIGTERM, _linger)
    # On a CPU workers take turns with the model, which waits with all its threads for the one that was put aside.
    if gives_way and hasattr(os, "nice"):
        with contextlib.suppress(OSError):  # where that is forbidden, it is only slower
            os.nice(10)
            if hasattr(os, "SCHED_BATCH"):  # of Linux: a tile that has come in does not put a thread aside at once
                os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))


def _linger(number: int, frame: FrameType | None) -> None:
    """Stay for a minute; a second signal ends the worker."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.alarm(60)


class ResumableLoader(TileLoader):
    """A DataLoader that Lightning can save and restore in mid-epoch.

    Only batches handed to the trainer count as done, however many the workers have read ahead. `waited_s` is how long
    the trainer has waited for batches in all.
    """

    batch_sampler: ResumableBatchSampler
    tiles = ""
    """Which tiles the sampler draws from, for a resumed run to compare."""
    waited_s = 0.0

    def __iter__(self) -> Iterator[TileBatch]:  # type: ignore[override]
        # A generator on purpose: workers start at the first batch, after the trainer has told the sampler its epoch.
        started = time.perf_counter()
        for batch in super().__iter__():
            self.waited_s += time.perf_counter() - started
            self.batch_sampler.done += 1
            yield batch
            started = time.perf_counter()

    def state_dict(self) -> dict[str, Any]:
        """Position of the sampler, and in which tiles."""
        return {**self.batch_sampler.state_dict(), "tiles": self.tiles}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go back to a saved position.

        Raises:
            ValueError: it is one in other tiles, or in another order of them.
        """
        order = {name: value for name, value in state.items() if name != "tiles"}
        self.batch_sampler.load_state_dict(order)
        if state.get("tiles", self.tiles) != self.tiles:  # early checkpoints do not say
            raise ValueError(
                "Cannot resume: the checkpoint was written by a training on other tiles, or the same in another order, "
                "split or quality; resume with the same data settings, or start a new run with another --out."
            )


class TileDataModule(L.LightningDataModule):
    """Tiles for distillation.

    Args:
        tiles: a packed folder (`pathokd pack`) or a tile folder (`pathokd tile`).
        batch_size: tiles per process and step.
        workers: reading processes; by default one fewer than the cores, at most 8. 0 reads in the main process, as
            it does by default on a CPU of two cores.
        geometry: the crop and orientation that all views of a tile share.
        photometric: view name to a list of albumentations transforms, for example a `student` view with jittered
            stain. Without it there is one view, `clean`. `CROP/NAME` is a view of one of `crops`.
        crops: further crops of the same tile, for objectives on the class token; see `pathokd.data.views.Views`.
        val_fraction: share of the tiles held out, in whole patients.
        split_by: column naming the patients; see `split_rows`.
        val_batch_size: tiles per validation batch; by default `batch_size`.
        seed: decides the split, the order and every view.
        targets: teacher to the folder of its stored targets, whose geometry `geometry` must be; `pathokd fit` takes
            them from `model.teachers.NAME.targets`.
        registered: train on registered tiles only, in batches of places under two conditions each, for
            `pathokd.losses.RegisteredInfoNCE`; names the columns that say what is registered. Stored targets keep each
            tile's own orientation, so that the two tiles of a place are turned differently, unless both answer to
            those of a `reference`.
    """

    def __init__(
        self,
        tiles: str,
        batch_size: int = 64,
        workers: int | None = None,
        geometry: Geometry = Geometry(),  # noqa: B008 (frozen)
        photometric: dict[str, list[A.BasicTransform]] | None = None,
        crops: dict[str, Geometry] | None = None,
        val_fraction: float = 0.1,
        split_by: str | None = None,
        val_batch_size: int | None = None,
        seed: int = 0,
        targets: dict[str, str] | None = None,
        registered: RegisteredSpec | None = None,
    ) -> None:
        super().__init__()
        if seed < 0 or (workers is not None and workers < 0) or (val_batch_size is not None and val_batch_size < 1):
            raise ValueError(
                "data.seed and data.workers must not be negative, and data.val_batch_size must be at least 1, got "
                f"{seed}, {workers} and {val_batch_size}."
            )
        self.tiles, self.batch_size, self.seed = tiles, batch_size, seed
        self.workers = _spare_cores() if workers is None else workers
        self.geometry = geometry
        self.views = Views(geometry, photometric, crops, seed=seed)
        self.val_fraction, self.split_by = val_fraction, split_by
        self.val_batch_size = batch_size if val_batch_size is None else val_batch_size
        self.source: TileSource | None = None
        self.registered = registered
        self.target_folders = targets or {}
        self.targets: dict[str, TargetStore] = {}

    def setup(self, stage: str | None = None) -> None:
        """Open the tiles and their stored targets, and split them."""
        if self.source is not None:
            return
        source = open_tiles(self.tiles)
        self._identity = tile_identity(source)
        for teacher, folder in self.target_folders.items():
            store = TargetStore(folder)
            store.check_geometry(self.geometry)
            store.check_tiles(source, self._identity)
            self.targets[teacher] = store
        self.source = source
        self._split: dict[str, Any] | None = None
        self._column = split_column(source.index, self.split_by)
        self.train_rows, self.val_rows = split_rows(
            source.index, val_fraction=self.val_fraction, split_by=self._column, seed=self.seed
        )

    def split(self) -> dict[str, Any]:
        """What decides which tiles are held out, and which slides were not, for a checkpoint."""
        self.setup()
        if self._split is None:  # once: every checkpoint says it
            self._split = {
                "tiles": self._identity,
                "val_fraction": self.val_fraction,
                "split_by": self._column,
                "seed": self.seed,
                "learnt": learnt_slides(self._source(), self.val_rows),
            }
        return self._split

    def check_held_out(self, split: Mapping[str, Any]) -> None:
        """Refuse to measure on what a training with this `split` learnt from.

        Raises:
            ManifestError: says how many tiles or slides it would be, and what was held out.
        """
        self.setup()
        if split["tiles"] == self._identity:
            check_tiles_held_out(self._source(), self.val_rows, split)
        else:
            check_slides_held_out(self._source(), self.val_rows, split.get("learnt", []))

    def described(self) -> str:
        """What is trained on, for a model card."""
        self.setup()
        return f"{self._counted(self.train_rows)} ({self.tiles})"

    def described_split(self) -> str:
        """What is trained on and what is held out, for who watches."""
        self.setup()
        held_out = self._counted(self.val_rows) if len(self.val_rows) else "nothing"
        return f"Learning from {self._counted(self.train_rows)}; held out: {held_out}."

    def _counted(self, rows: IntArray) -> str:
        """Tiles and slides, and patients where a column names them."""
        some = self._source().index.iloc[rows]
        column = split_column(some, self.split_by)
        named = "" if column == "slide_id" else f", {some[column].nunique():,} by {column}"
        return f"{len(some):,} tiles of {some['slide_id'].nunique():,} slides{named}"

    def train_dataloader(self) -> ResumableLoader:
        """Batches of random views, never the same in two epochs."""
        source = self._source()
        rank, world = self._process()
        registered: Registered | None = None
        if self.registered is None:
            sampler = ResumableBatchSampler(
                len(self.train_rows), self.batch_size, seed=self.seed, rank=rank, world_size=world
            )
        else:
            if self.registered.reference is not None and not self.targets:
                raise ValueError(
                    f"data.registered.reference {list(self.registered.reference)} has tiles answer to the targets of "
                    "another one, which must be stored: run `pathokd cache` and name them in "
                    "model.teachers.NAME.targets, or leave reference out."
                )
            registered = registered_tiles(source.index.iloc[self.train_rows].reset_index(drop=True), self.registered)
            sampler = PlaceBatchSampler(registered, self.batch_size, seed=self.seed, rank=rank, world_size=world)
        if len(sampler) == 0:
            raise ManifestError(
                f"{len(self.train_rows)} training tiles fill no batch of {self.batch_size} on {world} process(es): "
                "add slides or lower data.batch_size."
            )
        loader = ResumableLoader(
            ViewDataset(source, self.train_rows, self.views, self.targets, registered),
            batch_sampler=sampler,
            **self._options(),
        )
        loader.tiles = fingerprint([self._identity, zlib.crc32(self.train_rows.astype("<i8").tobytes())])
        return loader

    def val_dataloader(self) -> DataLoader[TileBatch] | list[Any]:
        """The held-out tiles, clean, in order, and unturned unless stored targets are of a turned view.

        Each process gets a share of them.

        Raises:
            ManifestError: fewer tiles than processes.
        """
        source = self._source()
        if len(self.val_rows) == 0:
            return []
        views = Views(Geometry(size_px=self.geometry.size_px, d4=False), seed=self.seed)
        rank, world = self._process()
        if len(self.val_rows) < world:
            raise ManifestError(
                f"{len(self.val_rows)} validation tiles cannot be shared by {world} processes: raise "
                "data.val_fraction, or set it to 0 and train without validation."
            )
        sampler = ResumableBatchSampler(
            len(self.val_rows), self.val_batch_size, shuffle=False, drop_last=False, rank=rank, world_size=world
        )
        dataset = ViewDataset(source, self.val_rows, views, self.targets)
        return TileLoader(dataset, batch_sampler=sampler, **self._options())

    def test_dataloader(self) -> DataLoader[TileBatch] | list[Any]:
        """The held-out tiles, as in validation."""
        return self.val_dataloader()

    def _process(self) -> tuple[int, int]:
        """Rank of this process, and how many there are."""
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)

    def _source(self) -> TileSource:
        self.setup()
        if self.source is None:
            raise RuntimeError("setup() left no tile source.")
        return self.source

    def _options(self) -> dict[str, Any]:
        return {
            "collate_fn": collate_and_wrap if self.workers > 0 else collate,
            "num_workers": self.workers,
            "persistent_workers": self.workers > 0,
            "pin_memory": torch.cuda.is_available(),
            "worker_init_fn": partial(_start_worker, gives_way=not torch.cuda.is_available()),
            # Its own generator: seeding workers must not advance the global stream, which a resumed run restores.
            "generator": torch.Generator().manual_seed(self.seed),
        }
