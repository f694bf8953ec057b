"""Files that other tools read: what each expects, as functions from one slide's embeddings to the bytes of its files.

Sources, read in November 2026: TRIDENT (`trident/IO.py`, `trident/Processor.py`), CLAM (`extract_features_fp.py`,
`dataset_modules/dataset_generic.py`), STAMP 2 (`stamp/preprocessing`, `get_coords` of `stamp/modeling/data.py`).
Rows of flagged tiles are left out wherever a reader would take NaN for a feature.
"""

import io
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import h5py
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from pathokd.embed.annotated import anndata_bytes
from pathokd.embed.store import SlideEmbeddings
from pathokd.errors import StoreError
from pathokd.files import Header
from pathokd.slides.manifest import HEADER_KEY

LayoutName = Literal["trident", "clam", "stamp", "anndata", "parquet"]
_Array = tuple[npt.NDArray[Any], Mapping[str, Any]]
"""A dataset with its attributes."""


class Source(NamedTuple):
    """What decides where a slide's files go."""

    slide_id: str
    coords_attrs: Mapping[str, Any]
    encoder: str

    @property
    def folder_name(self) -> str:
        """The encoder's name, fit for a folder."""
        return re.sub(r"[^\w.+-]+", "_", self.encoder) or "encoder"


class Layout(NamedTuple):
    """How one tool wants it."""

    paths: Callable[[Source], list[str]]
    """Below the output folder; the file that holds the header comes last."""
    render: Callable[[SlideEmbeddings, Source, Header], list[bytes]]
    """The contents of the files of `paths`."""
    read_header: Callable[[Path], Any]
    """The header as stored in the last file; raises if the file is damaged or has none."""


def trident_folder(attrs: Mapping[str, Any]) -> str:
    """`20x_224px_0px_overlap`: TRIDENT's name for tiles of one magnification, size and overlap."""
    return f"{attrs['target_magnification']:g}x_{attrs['patch_size']}px_{attrs['overlap']}px_overlap"


def _trident_paths(source: Source) -> list[str]:
    folder = f"{trident_folder(source.coords_attrs)}/features_{source.folder_name}"
    return [f"{folder}/{source.slide_id}.h5"]


def _trident(slide: SlideEmbeddings, source: Source, header: Header) -> list[bytes]:
    """(n, d) as TRIDENT stores it: its reader adds the batch axis itself."""
    folder = str(Path(_trident_paths(source)[0]).parent)
    coords = {**_whole(slide.coords_attrs), "savetodir": trident_folder(source.coords_attrs)}
    features = {**slide.features_attrs, "savetodir": folder}
    return [_hdf5(slide, slide.features[slide.good], coords, features, header)]


def _clam_paths(source: Source) -> list[str]:
    return [f"pt_files/{source.slide_id}.pt", f"h5_files/{source.slide_id}.h5"]


def _clam(slide: SlideEmbeddings, source: Source, header: Header) -> list[bytes]:
    """Always fp32: CLAM puts the tensor into its first linear layer as it is."""
    features = slide.features[slide.good].astype(np.float32)
    buffer = io.BytesIO()
    torch.save(torch.from_numpy(features), buffer)
    return [buffer.getvalue(), _hdf5(slide, features, _whole(slide.coords_attrs), slide.features_attrs, header)]


def _stamp_paths(source: Source) -> list[str]:
    return [f"{source.folder_name}/{source.slide_id}.h5"]


def _stamp(slide: SlideEmbeddings, source: Source, header: Header) -> list[bytes]:
    """Top left corners in microns; sizes under the names of STAMP 2.0 (`tile_size`) and of later ones.

    `stamp_version` is left out: STAMP refuses files of versions newer than itself, and these are of none.
    """
    attrs = slide.coords_attrs
    side_um = float(attrs["patch_size"] * attrs["mpp_target"])
    facts = {
        "extractor": source.encoder,
        "unit": "um",
        "tile_size": side_um,
        "tile_size_um": side_um,
        "tile_size_px": int(attrs["patch_size"]),
        "feat_type": "tile",
        "weights_sha256": slide.features_attrs["weights_sha256"],
    }
    coords_um = (slide.coords[slide.good] * float(attrs["mpp_level0"])).astype(np.float32)
    data: dict[str, _Array] = {"coords": (coords_um, {}), "feats": (slide.features[slide.good], {})}
    return [_hdf5_bytes(data, {**facts, HEADER_KEY.decode(): json.dumps(header)})]


def _anndata(slide: SlideEmbeddings, source: Source, header: Header) -> list[bytes]:
    return [anndata_bytes(slide, header)]


def _parquet(slide: SlideEmbeddings, source: Source, header: Header) -> list[bytes]:
    """One row per tile, flagged ones with null features; the vector is one column of lists.

    A column per dimension would cost a thousand column headers in every file; a list is one block that Arrow hands to
    NumPy without a copy, and polars, DuckDB and pandas read it as an array. Fixed-size lists of which some are null
    can be read by no pyarrow before 26. The files lie in a folder of their own, so that the folder is the table of
    all slides.
    """
    n, dim = slide.features.shape
    values = pa.array(slide.features[slide.good].astype(np.float32).ravel())
    starts = np.concatenate([[0], np.cumsum(slide.good) * dim])
    null = np.concatenate([~slide.good, [False]])
    vectors = pa.ListArray.from_arrays(pa.array(starts, pa.int32(), mask=null), values)
    table = pa.table(
        {
            "slide_id": pa.array([source.slide_id] * n, pa.string()),
            "x": slide.coords[:, 0],
            "y": slide.coords[:, 1],
            "mpp_level0": np.full(n, float(slide.coords_attrs["mpp_level0"])),
            "tile_level0": np.full(n, int(slide.coords_attrs["patch_size_level0"])),
            "tissue_fraction": slide.tissue_fraction,
            "flag": pa.array(slide.flag.tolist(), pa.string()),
            "features": vectors,
        },
        metadata={HEADER_KEY: json.dumps(header)},
    )
    buffer = io.BytesIO()
    pq.write_table(table, buffer)
    return [buffer.getvalue()]


def _hdf5(
    slide: SlideEmbeddings,
    features: npt.NDArray[Any],
    coords_attrs: Mapping[str, Any],
    features_attrs: Mapping[str, Any],
    header: Header,
) -> bytes:
    """`features` and `coords`, the two keys that MIL code reads, of the good tiles."""
    data: dict[str, _Array] = {
        "features": (features, features_attrs),
        "coords": (slide.coords[slide.good], coords_attrs),
    }
    return _hdf5_bytes(data, {HEADER_KEY.decode(): json.dumps(header)})


def _hdf5_bytes(data: Mapping[str, _Array], attrs: Mapping[str, Any]) -> bytes:
    """Contiguous datasets with attributes, made in memory (see `store`)."""
    buffer = io.BytesIO()
    with h5py.File(buffer, "w") as file:
        for name, (array, facts) in data.items():
            file.create_dataset(name, data=array).attrs.update(facts)
        file.attrs.update(attrs)
    return buffer.getvalue()


def _whole(attrs: Mapping[str, Any]) -> dict[str, Any]:
    """Magnifications as integers where they are: TRIDENT divides them without remainder."""
    return {
        key: int(value) if key.endswith("_magnification") and float(value).is_integer() else value
        for key, value in attrs.items()
    }


def _header_of_hdf5(path: Path) -> Any:
    with h5py.File(path, "r") as file:
        return json.loads(file.attrs[HEADER_KEY.decode()])


def _header_of_anndata(path: Path) -> Any:
    with h5py.File(path, "r") as file:
        return json.loads(file["uns/pathokd/header"].asstr()[()])


def _header_of_parquet(path: Path) -> Any:
    return json.loads((pq.read_schema(path).metadata or {})[HEADER_KEY])


LAYOUTS: dict[LayoutName, Layout] = {
    "trident": Layout(_trident_paths, _trident, _header_of_hdf5),
    "clam": Layout(_clam_paths, _clam, _header_of_hdf5),
    "stamp": Layout(_stamp_paths, _stamp, _header_of_hdf5),
    "anndata": Layout(lambda source: [f"{source.slide_id}.h5ad"], _anndata, _header_of_anndata),
    "parquet": Layout(lambda source: [f"tiles/{source.slide_id}.parquet"], _parquet, _header_of_parquet),
}


def stored_header(layout: LayoutName, path: Path) -> Header | None:
    """The header of a converted file; None if it is missing, truncated or not of this layout."""
    try:
        header: Header = LAYOUTS[layout].read_header(path)
    except (OSError, KeyError, ValueError, TypeError, pa.ArrowException, StoreError):
        return None
    return header
