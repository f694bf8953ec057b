"""Which directions to take out of a teacher's tokens: the largest differences of one place between conditions."""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils.data import DataLoader

from pathokd.data.batch import Draw, TileSource
from pathokd.data.datamodule import ViewDataset, collate
from pathokd.data.places import RegisteredSpec, registered_tiles
from pathokd.data.targets import check_slides, slide_marks, tile_identity
from pathokd.data.views import CLEAN, Geometry, Views
from pathokd.distill.prototype_fit import teacher_settings
from pathokd.distill.prototype_tokens import check_loading
from pathokd.errors import ManifestError
from pathokd.files import check_header, make_header
from pathokd.models.denoise import SCHEMA, TokenKind, read_denoiser, write_denoiser
from pathokd.models.device import double
from pathokd.models.teacher import Teacher
from pathokd.progress import Bars

KINDS: tuple[TokenKind, TokenKind] = ("cls", "patches")
MOST_DIRECTIONS = 8
NO_DIFFERENCE = 1e-10
"""Variance between conditions, of standardised tokens, below which a direction is rounding: 1e-5 of a spread."""


@dataclass(frozen=True)
class DenoiseSpec:
    """What is taken out, and from which tiles it is estimated.

    Args:
        rank: directions, 1 to 8. Each also takes some of what tells tissue apart (`lost` of the result).
        registered: columns that say which tiles show one place.
        max_places: places looked at, drawn by the seed.
        seed: of the draw.

    Raises:
        ValueError: a number out of range.
    """

    rank: int = 4
    registered: RegisteredSpec = field(default_factory=RegisteredSpec)
    max_places: int = 2048
    seed: int = 0

    def __post_init__(self) -> None:
        if not 1 <= self.rank <= MOST_DIRECTIONS:
            raise ValueError(f"rank must lie in 1 to {MOST_DIRECTIONS}, got {self.rank}.")
        if self.max_places < 2:
            raise ValueError(f"max_places must be at least 2, got {self.max_places}.")
        if self.seed < 0:
            raise ValueError(f"seed must not be negative, got {self.seed}.")


class Between(NamedTuple):
    """Top directions of what differs between conditions."""

    directions: Float[Tensor, "rank dim"]
    """Orthonormal, in the standardised space."""
    share: list[float]
    """Of the variance between conditions, along each."""
    lost: float
    """Share of the variance of all tokens that goes with them."""


class PlaceMoments:
    """Second moments of tokens, and of their deviations from the mean of their place, in fp64.

    Args:
        dim: width of a token.
    """

    def __init__(self, dim: int) -> None:
        self.n = 0
        self._sum = torch.zeros(dim, dtype=torch.float64)
        self._square = torch.zeros(dim, dim, dtype=torch.float64)
        self._between = torch.zeros(dim, dim, dtype=torch.float64)

    def add(self, tokens: Float[Tensor, "conditions positions dim"]) -> None:
        """Take in one place under all its conditions; patch tokens position by position."""
        t = double(tokens)
        rows, off = t.flatten(0, 1), (t - t.mean(0)).flatten(0, 1)
        self.n += len(rows)
        self._sum += rows.sum(0).cpu()
        self._square += (rows.T @ rows).cpu()
        self._between += (off.T @ off).cpu()

    def statistics(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of all tokens, (dim,) each; 1 where nothing varies."""
        mean = self._sum / self.n
        std = (self._square.diagonal() / self.n - mean.square()).clamp(min=0).sqrt()
        return mean, torch.where(std > 0, std, torch.ones_like(std))

    def top(self, rank: int) -> Between:
        """The leading eigenvectors of the between-condition covariance of standardised tokens.

        Fewer than `rank` where conditions differ along fewer: others would be drawn by chance, and tissue with them.
        """
        mean, std = self.statistics()
        scale = std[:, None] * std
        between = self._between / self.n / scale
        total = (self._square / self.n - mean[:, None] * mean) / scale
        values, vectors = torch.linalg.eigh(between)
        rank = min(rank, int((values > NO_DIFFERENCE).sum()))
        v = vectors[:, len(values) - rank :].flip(1).T
        share = (values[len(values) - rank :].flip(0) / values.sum().clamp(min=1e-30)).tolist()
        return Between(v, share, float((v @ total @ v.T).trace() / total.trace()))


def fit_denoiser(
    teacher: Teacher,
    source: TileSource,
    out: str | Path,
    spec: DenoiseSpec = DenoiseSpec(),
    *,
    batch_size: int = 32,
    workers: int = 1,
    overwrite: bool = False,
) -> dict[str, dict[str, Any]]:
    """Write the file that `model.teachers.NAME.denoise` names.

    Every place is seen whole, upright and under all its conditions, in one pass over the tiles.

    Args:
        teacher: on its device.
        source: registered tiles; for slides scanned once, those that `pathokd simulate` makes of them.
        out: the file; one that is there and was made by these settings is kept.
        spec: how.
        batch_size: tiles per forward pass, about.
        workers: processes that read tiles.
        overwrite: make it anew.

    Returns:
        By kind of token the `share` of the variance between conditions along each direction, what is `lost` of the
        variance of all tokens, and the number of `tokens` looked at.

    Raises:
        ManifestError: no registered tiles, or none that differ between conditions.
        StoreError: the file was made by other settings, or of other slides.
        ValueError: no tile to a batch, or a negative number of processes.
    """
    check_loading(batch_size, workers)
    header = _header(teacher, source, spec)
    if Path(out).is_file() and not overwrite:
        found, _ = read_denoiser(out)
        check_header(found, header, out)
        check_slides(found, header.get("slides", {}), f"The directions in {out}", "denoise")
        results: dict[str, dict[str, Any]] = found["results"]
        return results
    moments = {kind: PlaceMoments(teacher.embed_dim) for kind in KINDS}
    batches = _places(source, spec, batch_size)
    with Bars() as bars:
        for sizes, images in bars.track(_images(source, teacher, batches, workers), "Comparing places", len(batches)):
            features = teacher(images)
            tokens = {"cls": features.cls[:, None], "patches": features.patches}
            for kind in KINDS:
                for place in torch.split(tokens[kind], sizes):
                    moments[kind].add(place)
    parts, results = {}, {}
    for kind in KINDS:
        found_between = moments[kind].top(min(spec.rank, teacher.embed_dim - 1))
        mean, std = moments[kind].statistics()
        parts[kind] = {"mean": mean, "std": std, "directions": found_between.directions}
        shares = [round(share, 6) for share in found_between.share]
        results[kind] = {"share": shares, "lost": round(found_between.lost, 6), "tokens": moments[kind].n}
    if not any(result["share"] for result in results.values()):
        columns = ", ".join(spec.registered.conditions)
        raise ManifestError(
            "The teacher's tokens of a place are the same under all its conditions, so there is nothing to take out: "
            f"give tiles that were stained or scanned in more than one way (columns {columns} tell which)."
        )
    write_denoiser(out, parts, {**header, "results": results})
    return results


def _header(teacher: Teacher, source: TileSource, spec: DenoiseSpec) -> dict[str, Any]:
    settings = {**teacher_settings(teacher), "tiles": tile_identity(source), **asdict(spec)}
    if spec.registered.reference is None:  # files of before it was there stay valid
        del settings["registered"]["reference"]
    header = make_header(SCHEMA, json.loads(json.dumps(settings)))
    return {**header, "slides": slides} if (slides := slide_marks(source)) else header


def _places(source: TileSource, spec: DenoiseSpec, batch_size: int) -> list[list[list[int]]]:
    """Batches of places, each the rows that show it."""
    registered = registered_tiles(source.index.reset_index(drop=True), spec.registered)
    order = np.argsort(registered.place, kind="stable")
    order = order[registered.place[order] >= 0]
    _, starts = np.unique(registered.place[order], return_index=True)
    places = [rows.tolist() for rows in np.split(order, starts[1:])]
    chosen = np.sort(np.random.default_rng(spec.seed).permutation(len(places))[: spec.max_places])
    batches: list[list[list[int]]] = []
    for number in chosen:
        if not batches or sum(map(len, batches[-1])) + len(places[number]) > batch_size:
            batches.append([])
        batches[-1].append(places[number])
    return batches


def _images(
    source: TileSource, teacher: Teacher, batches: list[list[list[int]]], workers: int
) -> Iterator[tuple[list[int], Tensor]]:
    """Tiles under each place, and the images of a batch of places."""
    views = Views(Geometry(size_px=teacher.card.image_px, d4=False))
    draws = [[Draw(row, 0) for place in batch for row in place] for batch in batches]
    dataset = ViewDataset(source, np.arange(len(source)), views)
    loader: DataLoader[Any] = DataLoader(dataset, batch_sampler=draws, collate_fn=collate, num_workers=workers)
    for batch, loaded in zip(batches, loader, strict=True):
        yield [len(place) for place in batch], loaded["views"][CLEAN].to(teacher.device)
