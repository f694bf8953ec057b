"""Embeddings of one slide as one HDF5 file that CLAM, TRIDENT and other MIL code read as it is.

`features` (n, d) and `coords` (n, 2) carry the attribute names those tools use; `flag` and
`tissue_fraction` say what each row is worth. Arrays are contiguous: a MIL loader reads whole slides, and
one chunk per row costs 18 times more.

A tile that could not be read keeps its row, so that rows stay the manifest's rows: its features are NaN and
its flag says why. Take `embeddings.features[embeddings.good]`, or test `flag`, before pooling.
"""

import contextlib
import hashlib
import io
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import h5py
import numpy as np
import numpy.typing as npt

from pathokd.errors import StoreError
from pathokd.files import Header, atomic_path
from pathokd.types import FloatArray, IntArray, Mask

SCHEMA = "embeddings/1"
StoredDtype = Literal["fp16", "fp32"]
_DTYPES: dict[StoredDtype, type[np.floating[Any]]] = {"fp16": np.float16, "fp32": np.float32}
_HEADER_KEY = "pathokd"
_SEAL = b"pathokd-sha256:"
_SEAL_BYTES = len(_SEAL) + hashlib.sha256().digest_size
_ARRAYS = ("features", "coords", "flag", "tissue_fraction")
_HDF5_SIGNATURE = b"\x89HDF\r\n\x1a\n"


class SlideEmbeddings(NamedTuple):
    """What one file holds, row i being one tile."""

    features: npt.NDArray[np.floating[Any]]
    """(n, d) in the stored dtype; NaN where `flag` is not empty."""
    coords: npt.NDArray[np.int64]
    """(n, 2) level-0 x, y of the tile's top left corner."""
    flag: npt.NDArray[np.object_]
    """(n,) empty for a good tile, else a word such as `unreadable`."""
    tissue_fraction: npt.NDArray[np.float32]
    """(n,) share of the tile that is tissue, 0 to 1."""
    coords_attrs: dict[str, Any]
    features_attrs: dict[str, Any]
    header: Header

    @property
    def good(self) -> Mask:
        """(n,) true where the tile was read and embedded."""
        return np.asarray(self.flag == "", dtype=np.bool_)


def write_embeddings(
    path: str | Path,
    features: FloatArray,
    coords: IntArray,
    *,
    flag: npt.NDArray[Any],
    tissue_fraction: FloatArray,
    header: Mapping[str, Any],
    coords_attrs: Mapping[str, Any],
    features_attrs: Mapping[str, Any],
    dtype: StoredDtype = "fp32",
) -> None:
    """Write one slide's embeddings, whole or not at all.

    Args:
        path: The file, by custom `<slide_id>.h5`.
        features: (n, d); rows of flagged tiles NaN.
        coords: (n, 2) level-0 pixels.
        flag: (n,) words, empty for good tiles.
        tissue_fraction: (n,) 0 to 1.
        header: From `files.make_header`, what made this file; stored as JSON in the file attribute `pathokd`.
        coords_attrs: Attributes of `coords` (geometry).
        features_attrs: Attributes of `features` (the model).
        dtype: Stored precision; fp16 halves the file, but code that does not cast wants fp32.

    Raises:
        ValueError: The arrays do not have one row per tile.
        StoreError: The disk is full, or a feature is too large for fp16.
    """
    n = len(features)
    shapes = {"coords": coords.shape == (n, 2), "flag": flag.shape == (n,)}
    shapes["tissue_fraction"] = tissue_fraction.shape == (n,)
    if features.ndim != 2 or not all(shapes.values()):
        wrong = [name for name, fits in shapes.items() if not fits] or ["features"]
        raise ValueError(f"each array should have one row per tile ({n}); look at {', '.join(wrong)}.")
    stored = _cast(features, dtype, Path(path))
    # HDF5 reports a full disk without an errno and may do so on close, so the file is made in memory first.
    buffer = io.BytesIO()
    with h5py.File(buffer, "w") as file:
        file.create_dataset("features", data=stored).attrs.update(features_attrs)
        file.create_dataset("coords", data=coords.astype(np.int64)).attrs.update(coords_attrs)
        # Strings of fixed length, also for the header: HDF5 reads a damaged heap, where others are kept, for ever.
        words = [str(word).encode() for word in flag]
        kind = h5py.string_dtype(length=max(map(len, words), default=0) or 1)
        file.create_dataset("flag", data=np.array(words, kind), dtype=kind)
        file.create_dataset("tissue_fraction", data=tissue_fraction.astype(np.float32))
        file.attrs[_HEADER_KEY] = np.bytes_(json.dumps(header))
    with atomic_path(path) as part:
        part.write_bytes(sealed(buffer.getvalue()))


def sealed(content: bytes) -> bytes:
    """The bytes of an HDF5 file with their SHA-256 after its end, where HDF5 does not look."""
    return content + _SEAL + hashlib.sha256(content).digest()


def is_sealed(path: Path) -> bool:
    """Whether a file still ends in its hash; other code that opened it for writing cut that off."""
    with open(path, "rb") as file:
        file.seek(max(0, path.stat().st_size - _SEAL_BYTES))
        return file.read(len(_SEAL)) == _SEAL


def _is_spoilt(path: Path) -> bool:
    """Whether the bytes of a sealed file are not those that were written, such as zeros in place of a page.

    HDF5 cannot be asked: it may read lost pages without a word, or for ever.
    """
    content = path.read_bytes()
    return sealed(content[:-_SEAL_BYTES]) != content


def read_embeddings(path: str | Path) -> SlideEmbeddings:
    """Read what `write_embeddings` wrote.

    Raises:
        StoreError: There is no such file, it is truncated, spoilt, or not of this kind.
    """
    return _read(Path(path), slice(None))


def read_outline(path: str | Path) -> SlideEmbeddings:
    """What a file says of its tiles, without reading their features, which are of shape (n, 0) here.

    Raises:
        StoreError: There is no such file, it is truncated, spoilt, or not of this kind.
    """
    return _read(Path(path), slice(0))


def _read(path: Path, columns: slice) -> SlideEmbeddings:
    """A file with the given columns of its features, once its bytes proved to be those that were written."""
    if path.is_file() and is_sealed(path) and _is_spoilt(path):
        raise StoreError(f"{path} is spoilt, by a disk or a copy: delete it and embed the slide again.")
    with _opened(path) as (file, header):
        return SlideEmbeddings(
            features=file["features"][:, columns],
            coords=file["coords"][:],
            flag=file["flag"].asstr()[:],
            tissue_fraction=file["tissue_fraction"][:],
            coords_attrs=dict(file["coords"].attrs),
            features_attrs=dict(file["features"].attrs),
            header=header,
        )


def read_good(path: str | Path) -> Mask:
    """Which tiles of an embeddings file are good, without reading its features.

    Raises:
        StoreError: There is no such file, it is truncated, or it is not of this kind.
    """
    with _opened(Path(path)) as (file, _):
        return np.asarray(file["flag"].asstr()[:] == "", dtype=np.bool_)


def read_header(path: str | Path) -> Header:
    """The header of an embeddings file, once the file proved to be whole.

    Raises:
        StoreError: There is no such file, it is truncated, or it is not of this kind.
    """
    with _opened(Path(path)) as (_, header):
        return header


def is_foreign(path: str | Path) -> bool:
    """Whether a file that `read_header` refuses is another program's, and not a truncated one of ours."""
    with open(path, "rb") as file:
        start = file.read(len(_HDF5_SIGNATURE))
    if start != _HDF5_SIGNATURE:
        return any(start)  # empty or zeros: what a crash leaves on some file systems
    try:
        with h5py.File(path, "r") as file:
            return _HEADER_KEY not in file.attrs
    except Exception:  # noqa: BLE001 (as in `_opened`)
        return False


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[tuple[Any, Header]]:
    """The open file and its header; whatever goes wrong meanwhile is a StoreError."""
    if not path.is_file():
        raise StoreError(f"{path} does not exist; make it with `pathokd embed`.")
    try:
        with h5py.File(path, "r") as file:
            raw = file.attrs.get(_HEADER_KEY)
            shapes = [file[name].shape for name in _ARRAYS]
            # A damaged size would be allocated before it is found missing.
            too_large = any(file[name].nbytes > path.stat().st_size for name in _ARRAYS)
            found: Any = json.loads(raw) if raw is not None else {}
            header: Header = found if isinstance(found, dict) and isinstance(found.get("settings", {}), dict) else {}
            fits = len(shapes[0]) == 2 and len({shape[0] for shape in shapes}) == 1 and not too_large
            if header.get("schema") != SCHEMA or not fits:
                raise StoreError(
                    f"{path} should have schema {SCHEMA} and one row per tile in every array, got schema "
                    f"{header.get('schema')!r} and shapes {shapes}: embed the slide again."
                )
            yield file, header
    except StoreError:
        raise
    except Exception as error:  # h5py on a damaged file raises anything, also TypeError and MemoryError
        raise StoreError(f"{path} is truncated or no embeddings file: delete it and embed the slide again.") from error


def _cast(features: FloatArray, dtype: StoredDtype, path: Path) -> npt.NDArray[np.floating[Any]]:
    if dtype not in _DTYPES:
        raise ValueError(f"dtype should be fp16 or fp32, got {dtype!r}.")
    with np.errstate(over="ignore"):  # an overflow is looked for, and refused, in the next line
        cast = features.astype(_DTYPES[dtype])
    if np.isinf(cast).any():
        raise StoreError(f"{path.name}: features up to {np.nanmax(np.abs(features)):.3g} do not fit {dtype}; use fp32.")
    return cast
