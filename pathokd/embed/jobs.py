"""What a run has to do: one job per slide, and every reason to refuse found before any work."""

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pandas as pd

from pathokd.embed.embedder import Embedder
from pathokd.embed.facts import check_slide, embedding_header
from pathokd.embed.store import StoredDtype, is_foreign, read_header
from pathokd.errors import ManifestError, StoreError
from pathokd.files import Header, check_folder, check_header
from pathokd.slides.manifest import MARKS, TileManifest, TileSpec, check_slides_agree
from pathokd.slides.sources import check_slide_id


class Job(NamedTuple):
    """One slide's work."""

    slide_id: str
    path: Path
    tiles: pd.DataFrame
    spec: TileSpec
    header: Header
    done: bool
    replaced: bool = False
    """The slide is not the one that was tiled."""


def plan(
    embedder: Embedder,
    table: TileManifest,
    out: Path,
    *,
    dtype: StoredDtype,
    overwrite: bool,
    shard: tuple[int, int],
) -> list[Job]:
    """The jobs of one shard, in the manifest's order.

    Raises:
        ManifestError: A slide_id cannot name a file, or stands for two slides; tiles are not of the manifest's size or
            mpp; or there are none.
        StoreError: A file is in the way that was made with other settings, or not by pathokd.
        ValueError: There is no such shard.
    """
    if table.frame.empty:
        raise ManifestError("The manifest holds no tiles to embed: look at the summary.csv beside it.")
    number, shards = shard
    if not 0 <= number < shards:
        raise ValueError(f"shard should be (i, n) with i from 0 to n - 1, got {shard}.")
    check_folder(out)
    for slide_id in table.frame["slide_id"].unique():
        check_slide_id(str(slide_id))
    _check_rows(table)
    return [
        _job(embedder, tiles, table, out, dtype, overwrite)
        for tiles in itertools.islice(_by_slide(table.frame), number, None, shards)
    ]


def _check_rows(table: TileManifest) -> None:
    """Raise ManifestError where rows contradict each other, as in manifests that were joined by hand."""
    frame, spec = table.frame, table.spec
    for name, wanted in (("mpp", spec.mpp), ("tile_px", spec.tile_px)):
        odd = frame[name] != wanted
        if odd.any():
            raise ManifestError(
                f"The manifest says {name} = {wanted:g} and holds tiles of {frame.loc[odd, name].iloc[0]:g}: embed "
                "tiles that were cut with different settings one after another."
            )
    check_slides_agree(frame)


def _by_slide(frame: pd.DataFrame) -> Iterator[pd.DataFrame]:
    """The tiles of one slide after another, in the manifest's order."""
    for _, tiles in frame.groupby("slide_id", sort=False):
        yield tiles.reset_index(drop=True)


def _job(
    embedder: Embedder, tiles: pd.DataFrame, table: TileManifest, out: Path, dtype: StoredDtype, overwrite: bool
) -> Job:
    slide_id = str(tiles["slide_id"].iloc[0])
    header = embedding_header(embedder.facts, slide_id, tiles, table.spec, dtype)
    tiled, found = table.facts.get(MARKS, {}).get(slide_id), header["slide"]["mark"]
    path = (out / f"{slide_id}.h5").absolute()  # another process may have another working folder
    replaced = None not in (tiled, found) and tiled != found
    return Job(slide_id, path, tiles, table.spec, header, _is_done(path, header, overwrite), replaced)


def _is_done(path: Path, header: Header, overwrite: bool) -> bool:
    """Whether `path` is whole and made the same way; raises StoreError if it was made another way."""
    if path.is_dir():
        raise StoreError(f"{path} is a folder where a file of features should go: move it away.")
    if overwrite or not path.exists():
        return False
    try:
        found = read_header(path)
    except StoreError as error:
        if is_foreign(path):
            raise StoreError(
                f"{path} is there and `pathokd embed` did not write it: move it away, choose another output folder, "
                "or pass --overwrite to replace it."
            ) from error
        return False  # truncated: made again
    check_header(found, header, path)
    check_slide(found, header, path)
    return True
