"""Targets computed once: what a folder of stored teacher outputs holds, and random access to it.

A targets folder holds `cls.npy` and, unless only class tokens were stored, `patches.npy`: one row per tile, in the
order of the tiles. int8 brings `cls_scale.npy` and `patches_scale.npy`, one number per token. `codec.safetensors` holds
what decoding needs and the targets' statistics; `header.json`, written last, says of which teacher, tiles and views
they are. `pathokd.embed.targets` writes the folder, `pathokd.distill.cached` decodes it.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError
from safetensors.numpy import load_file

from pathokd.data.batch import TileSource
from pathokd.data.packed import PackedTiles
from pathokd.data.views import Geometry
from pathokd.data.wsi import WsiTiles
from pathokd.errors import StoreError
from pathokd.files import Header, file_mark, fingerprint

SCHEMA = "targets/1"
HEADER_NAME = "header.json"
CODEC_NAME = "codec.safetensors"
PARTS = ".parts"
"""Subfolder of what is not finished; without a header beside it nothing reads the targets."""
POOLED_GRID = (4, 4)

TargetTokens = Literal["cls", "cls+mean", "pooled", "patches"]
TargetDtype = Literal["fp32", "fp16", "int8"]
Stored = dict[str, npt.NDArray[Any]]
"""Array name (`cls`, `patches`, `cls_scale`, `patches_scale`) to what is stored for one tile, or for several."""


@dataclass(frozen=True)
class TargetSpec:
    """What is stored of a teacher's output.

    Args:
        tokens: `cls`; `cls+mean` adds the mean of the patch tokens; `pooled` a grid of 4 x 4 means; `patches` all.
        pca: principal directions kept of the patch tokens; None keeps them whole. Class tokens are always whole.
        dtype: of the stored numbers.
        view_px: side of the view that the teacher sees; None takes the teacher's input.

    Raises:
        ValueError: a field is out of its range.
    """

    tokens: TargetTokens = "cls"
    pca: int | None = None
    dtype: TargetDtype = "fp16"
    view_px: int | None = None

    def __post_init__(self) -> None:
        if self.tokens not in get_args(TargetTokens):
            raise ValueError(f"tokens must be one of {', '.join(get_args(TargetTokens))}, got {self.tokens!r}.")
        if self.dtype not in get_args(TargetDtype):
            raise ValueError(f"dtype must be one of {', '.join(get_args(TargetDtype))}, got {self.dtype!r}.")
        if self.pca is not None and self.tokens == "cls":
            raise ValueError("pca rotates patch tokens, and tokens: cls stores none: leave it out.")
        if self.pca is not None and self.pca < 1:
            raise ValueError(f"pca must be at least 1, got {self.pca}.")
        if self.view_px is not None and self.view_px < 1:
            raise ValueError(f"view_px must be at least 1, got {self.view_px}.")

    def grid(self, teacher_grid: tuple[int, int]) -> tuple[int, int] | None:
        """(rows, columns) of the stored patch tokens, of a teacher whose own grid this is; None if none are stored.

        Raises:
            ValueError: the teacher's grid is coarser than the pooled one.
        """
        if self.tokens == "pooled" and min(teacher_grid) < min(POOLED_GRID):
            raise ValueError(f"tokens: pooled needs a teacher of 4 x 4 patches or more, this one has {teacher_grid}.")
        return {"cls": None, "cls+mean": (1, 1), "pooled": POOLED_GRID, "patches": teacher_grid}[self.tokens]


class StoredArray(NamedTuple):
    """One row of an array: its shape and NumPy dtype."""

    shape: tuple[int, ...]
    dtype: str


def layout(spec: TargetSpec, embed_dim: int, teacher_grid: tuple[int, int]) -> dict[str, StoredArray]:
    """What is stored for one tile, by array name.

    Raises:
        ValueError: a spec that does not fit the teacher.
    """
    if spec.pca is not None and spec.pca > embed_dim:
        raise ValueError(f"pca must be at most {embed_dim}, the width of this teacher's tokens, got {spec.pca}.")
    dtype = {"fp32": "<f4", "fp16": "<f2", "int8": "|i1"}[spec.dtype]
    arrays = {"cls": StoredArray((embed_dim,), dtype)}
    if spec.dtype == "int8":
        arrays["cls_scale"] = StoredArray((), "<f4")
    grid = spec.grid(teacher_grid)
    if grid is not None:
        tokens = grid[0] * grid[1]
        arrays["patches"] = StoredArray((tokens, spec.pca or embed_dim), dtype)
        if spec.dtype == "int8":
            arrays["patches_scale"] = StoredArray((tokens,), "<f4")
    return arrays


def bytes_per_tile(arrays: dict[str, StoredArray]) -> int:
    """Bytes that `arrays` take for one tile."""
    return sum(int(np.prod(array.shape, dtype=np.int64)) * np.dtype(array.dtype).itemsize for array in arrays.values())


def tile_identity(source: TileSource) -> str:
    """A fingerprint of which tiles there are, in which order, with which pixels: not of where they lie.

    Of packed tiles the sizes of the encoded images are part of it, so that packing again at another quality shows.
    """
    index = source.index
    digest = hashlib.sha256("\n".join(index["key"]).encode())
    for column in ("x", "y", "mpp", "tile_px", "size"):
        if column in index:
            digest.update(column.encode())
            digest.update(np.ascontiguousarray(index[column].to_numpy(np.float64)).data)
    if isinstance(source, WsiTiles):
        digest.update(f"icc {source.spec.icc}".encode())
    return digest.hexdigest()[:16]


def slide_marks(source: TileSource) -> dict[str, str | None]:
    """What is in the slides that tiles are read from, by slide_id; nothing for packed tiles, which hold pixels."""
    if not isinstance(source, WsiTiles):
        return {}
    slides = source.index.drop_duplicates("slide_id")
    return {name: file_mark(path) for name, path in zip(slides["slide_id"], slides["path"], strict=True)}


def known_slides(source: TileSource) -> Mapping[str, str | None]:
    """As `slide_marks`, and of packed tiles what was in their slides when they were packed."""
    return source.header.get("slides", {}) if isinstance(source, PackedTiles) else slide_marks(source)


def check_slides(found: Header, slides: Mapping[str, str | None], what: str, verb: str) -> None:
    """Refuse what was made of slides of the same names and tiles with other pixels, such as the same in another stain.

    A slide out of reach cannot be compared, nor can early files, which do not say what is in their slides.

    Args:
        found: header of the file.
        slides: `slide_marks` here.
        what: the file, for the message.
        verb: of `pathokd` that makes it.

    Raises:
        StoreError: names the first such slide.
    """
    known = found.get("slides", {})
    for name, mark in slides.items():
        if None not in (known.get(name), mark) and known[name] != mark:
            raise StoreError(
                f"{what} were computed on another slide {name}, of the same name and tiles: take the tiles they were "
                f"computed on, choose another folder, or run `pathokd {verb}` with --overwrite."
            )


class TargetStore:
    """Random access to a finished targets folder, by memory maps that are only read.

    Any number of runs may read one folder at the same time. Pickled copies open their own maps.

    Args:
        folder: what `pathokd cache` wrote.
        header: of targets that are just being finished; None reads the folder's, without which it counts as unfinished.

    Raises:
        StoreError: there is none, it is unfinished, or a file is not what the header says.
    """

    def __init__(self, folder: str | Path, *, header: Header | None = None) -> None:
        self.folder = Path(folder)
        self.header = header or _read_header(self.folder)
        self.settings: dict[str, Any] = self.header["settings"]
        facts = self.header["facts"]
        self.embed_dim = int(facts["embed_dim"])
        self.grid: tuple[int, int] | None = tuple(facts["grid"]) if facts["grid"] else None
        self.pooled: bool = self.settings["tokens"] in ("cls+mean", "pooled")
        self._arrays = {name: StoredArray(tuple(shape), dtype) for name, (shape, dtype) in facts["arrays"].items()}
        self._maps = self._open()

    def __len__(self) -> int:
        return int(self.settings["n_tiles"])

    def __repr__(self) -> str:
        return f"TargetStore({str(self.folder)!r}, {self.settings['tokens']} of {len(self)} tiles)"

    @property
    def identity(self) -> str:
        """A fingerprint of everything that decides on the stored numbers."""
        return fingerprint(self.settings)

    def read(self, row: int) -> Stored:
        """What is stored for the tile in `row`; copies, undecoded."""
        return {name: np.array(values[row]) for name, values in self._maps.items()}

    def codec(self) -> Stored:
        """`KIND.NAME` to statistics of decoding (`mean`, `std`, `rotation`), and `KIND.target_mean`, `.target_std`."""
        path = self.folder / CODEC_NAME
        try:
            return dict(load_file(path))
        except (OSError, SafetensorError) as error:
            raise StoreError(f"{path} cannot be read ({error}): run `pathokd cache` again with --overwrite.") from error

    def check_tiles(self, source: TileSource, identity: str | None = None) -> None:
        """Refuse to be the targets of other tiles.

        Args:
            source: the tiles.
            identity: their `tile_identity` where it is known, which takes seconds for millions of tiles.

        Raises:
            StoreError: the tiles are not those the targets were computed on.
        """
        if len(source) != len(self) or (identity or tile_identity(source)) != self.settings["tiles"]:
            raise StoreError(
                f"The targets in {self.folder} were computed on other tiles: on the {len(self)} of "
                f"{self.header['facts']['source']}, and the {len(source)} of this run are not the same ones, in the "
                "same order and quality. Give data.tiles the folder they were computed on, or run `pathokd cache`."
            )
        check_slides(self.header, slide_marks(source), f"The targets in {self.folder}", "cache")

    def check_geometry(self, geometry: Geometry) -> None:
        """Refuse views whose geometry is not that of the targets.

        Raises:
            StoreError: names the setting, and what it would have to be.
        """
        wanted = {"scale": (1.0, 1.0), "d4": True, "size_px": self.settings["view_px"]}
        for name, value in wanted.items():
            found = getattr(geometry, name)
            if (tuple(found) if name == "scale" else found) != value:
                raise StoreError(
                    f"data.geometry.{name} is {found} and contradicts the targets in {self.folder}, which show each "
                    f"tile whole, in one fixed orientation, at {self.settings['view_px']} px: set it to {value}, or "
                    "leave out the targets and run the teacher."
                )

    def _open(self) -> Stored:
        maps: Stored = {}
        for name, array in self._arrays.items():
            path = self.folder / f"{name}.npy"
            try:
                maps[name] = np.load(path, mmap_mode="r", allow_pickle=False)
            except (OSError, ValueError) as error:
                raise StoreError(
                    f"{path} cannot be read ({error}): copy it again, or run `pathokd cache` with --overwrite."
                ) from error
            if maps[name].shape != (len(self), *array.shape) or maps[name].dtype != np.dtype(array.dtype):
                raise StoreError(
                    f"{path} holds {maps[name].dtype} {maps[name].shape}, its header says {array.dtype} "
                    f"{(len(self), *array.shape)}: run `pathokd cache` again with --overwrite."
                )
        return maps

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "_maps"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._maps = self._open()


def _read_header(folder: Path) -> Header:
    path = folder / HEADER_NAME
    try:
        header: Header = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        unfinished = (folder / PARTS).is_dir()
        raise StoreError(
            f"The targets in {folder} are unfinished: run the same `pathokd cache` command again, it goes on where it "
            "stopped."
            if unfinished
            else f"{folder} holds no targets: make them with `pathokd cache TEACHER TILES --out {folder}`."
        ) from None
    except ValueError as error:
        raise StoreError(f"{path} is damaged ({error}): run `pathokd cache` again with --overwrite.") from error
    if header.get("schema") != SCHEMA:
        raise StoreError(f"{path} has schema {header.get('schema')!r}, this version reads {SCHEMA!r}: cache again.")
    return header
