"""The same tissue as other laboratories and scanners would show it: tiles into a packed folder."""

import threading
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from pathokd.augment.stain_math import Appearance
from pathokd.augment.statistics import StainStatistics, fit_statistics
from pathokd.data.batch import TileSource
from pathokd.data.conditions import MEASURED_TILES, ORIGINAL, SIMULATION, Condition, appearance_of, noise_seed
from pathokd.data.pack import PackResult, PackSpec, pack_source, source_identity
from pathokd.data.packed import PackedTiles
from pathokd.data.sample import readable, spread
from pathokd.data.targets import known_slides, tile_identity
from pathokd.errors import ManifestError, StoreError
from pathokd.progress import Bars
from pathokd.types import IntArray, Rgb


class SimulatedTiles:
    """Tiles under several conditions, the original first: a tile source whose rows of one place are registered.

    Args:
        source: the tiles as they are.
        conditions: what to simulate.
        seed: of all noise.

    Raises:
        ManifestError: the tiles are simulated ones.
    """

    def __init__(self, source: TileSource, conditions: Sequence[Condition], *, seed: int = 0) -> None:
        if seed < 0:
            raise ValueError(f"seed must not be negative, got {seed}.")
        self.source, self.conditions, self.seed = source, list(conditions), seed
        base = source.index.drop(columns=["shard", "offset", "size"], errors="ignore")
        _refuse_simulated(base, "simulate the tiles that they were made from, with all conditions at once")
        frames = [_labelled(base, condition) for condition in (Condition(), *self.conditions)]
        self._index = pd.concat(frames, ignore_index=True)
        self._slides = base["slide_id"].astype(str).to_list()
        self._rows = dict(_rows_by_slide(base))
        self._appearances: dict[str, Appearance] = {}
        self._measuring = threading.Lock()

    @property
    def index(self) -> pd.DataFrame:
        """The source's columns, with `stain` and `scanner` of each row."""
        return self._index

    def __len__(self) -> int:
        return len(self._index)

    def read(self, row: int) -> Rgb:
        """The tile in `row`, simulated."""
        number, place = divmod(row, len(self.source))
        tile = self.source.read(place)
        if number == 0:
            return tile
        return self.conditions[number - 1].apply(
            tile, self._appearance(self._slides[place]), noise_seed(self.seed, row)
        )

    def _appearance(self, slide: str) -> Appearance:
        """How a slide is stained, measured when its first tile is asked for, by one of the threads."""
        with self._measuring:
            if slide not in self._appearances:
                shown = readable(self.source, spread(self._rows[slide], MEASURED_TILES))
                restained = any(condition.stain for condition in self.conditions)
                self._appearances[slide] = appearance_of(slide, shown, restained=restained)
            return self._appearances[slide]


def _rows_by_slide(frame: pd.DataFrame) -> list[tuple[str, IntArray]]:
    return [(str(slide), np.asarray(rows)) for slide, rows in frame.groupby("slide_id").indices.items()]


def _refuse_simulated(index: pd.DataFrame, advice: str) -> None:
    """Their conditions would be measured as one staining."""
    if index.duplicated(["slide_id", "x", "y", "mpp"]).any():
        raise ManifestError(f"The tiles show places several times, as those of `pathokd simulate` do: {advice}.")


def _labelled(base: pd.DataFrame, condition: Condition) -> pd.DataFrame:
    named = {"stain": condition.stain, "scanner": condition.scanner and condition.scanner_name}
    kept: dict[str, Any] = {name: value or ORIGINAL for name, value in named.items()}
    as_found = [name for name, value in named.items() if name in base and value is None]
    kept |= {name: base[name].fillna("").replace("", ORIGINAL) for name in as_found}
    keys = base["key"] if condition == Condition() else base["key"] + f"-{condition.name}"
    case = base["case"] if "case" in base else base["slide_id"]
    return base.assign(key=keys, **kept, case=case)


def simulate_tiles(
    source: TileSource,
    out_dir: str | Path,
    wanted: Sequence[Condition],
    spec: PackSpec | None = None,
    *,
    seed: int = 0,
    workers: int | None = None,
    overwrite: bool = False,
) -> PackResult:
    """Write the original tiles and every condition of them into one packed folder.

    Args:
        source: the tiles.
        out_dir: the packed folder; resumable like `pack_tiles`.
        wanted: conditions.
        spec: how tiles are stored, by default as JPEG of quality 95, the original ones too.
        seed: of all noise.
        workers: threads.
        overwrite: write anew.

    Raises:
        ManifestError: the tiles are simulated ones.
        StoreError: `out_dir` holds the tiles themselves or was made with other settings, or the disk is full.
    """
    spec = spec or PackSpec(quality=95)
    if isinstance(source, PackedTiles) and Path(out_dir).resolve() == source.folder.resolve():
        raise StoreError(f"{out_dir} holds the tiles that are to be simulated: name another output folder.")
    settings = {
        **asdict(spec),
        "simulation": SIMULATION,
        "conditions": [
            {**asdict(condition), **({"profile": condition.edited} if condition.edited else {})} for condition in wanted
        ],
        "seed": seed,
        "manifest": source_identity(source.index),
        "source": tile_identity(source),
    }
    simulated = SimulatedTiles(source, wanted, seed=seed)
    slides = known_slides(source)
    return pack_source(
        simulated, out_dir, spec, settings, slides=slides, verb="simulate", workers=workers, overwrite=overwrite
    )


def measure_cohort(tiles: TileSource, tiles_per_slide: int = 50) -> StainStatistics:
    """Stain statistics of a cohort, from tiles spread over each slide.

    Raises:
        ValueError: fewer than two slides have tissue, or `tiles_per_slide` is below 1.
        ManifestError: the tiles are simulated ones.
    """
    if tiles_per_slide < 1:
        raise ValueError(f"tiles_per_slide must be at least 1, got {tiles_per_slide}.")
    _refuse_simulated(tiles.index, "measure the tiles that they were made from")
    slides = _rows_by_slide(tiles.index)
    with Bars() as bars:
        return fit_statistics(
            list(readable(tiles, spread(rows, tiles_per_slide)))
            for _, rows in bars.track(slides, "measuring slides", len(slides))
        )
