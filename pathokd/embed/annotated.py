"""Embeddings as AnnData, for scanpy, squidpy and LazySlide; the package is an extra."""

import importlib.util
import io
import json
from collections.abc import Mapping
from typing import Any

import h5py
import numpy as np
import pandas as pd

from pathokd.embed.store import SlideEmbeddings
from pathokd.errors import StoreError
from pathokd.files import Header


def require_anndata() -> None:
    """Say in one sentence what to do if the package anndata is missing.

    Raises:
        StoreError: It is not installed.
    """
    if importlib.util.find_spec("anndata") is None:
        raise StoreError("AnnData needs the package anndata, which is not installed: pip install anndata.")


def to_anndata(slide: SlideEmbeddings, facts: Mapping[str, Any]) -> Any:
    """An AnnData of the good tiles.

    X holds the features, obs `x`, `y` (level-0 corners) and `tissue_fraction`, obsm["spatial"] the tile centres in
    level-0 pixels, uns["pathokd"] what made them, and `flagged`: places and reasons of the tiles left out.

    Args:
        slide: The embeddings.
        facts: Further entries of uns["pathokd"], JSON-able scalars.

    Raises:
        StoreError: The package anndata is not installed; the message says how to.
    """
    require_anndata()
    import anndata

    good, half = slide.good, float(slide.coords_attrs["patch_size_level0"]) / 2
    corners = slide.coords[good]
    columns = {"x": corners[:, 0], "y": corners[:, 1], "tissue_fraction": slide.tissue_fraction[good]}
    obs = pd.DataFrame(columns, index=[f"{x}_{y}" for x, y in corners])
    made = anndata.AnnData(slide.features[good].astype(np.float32), obs=obs)
    made.obsm["spatial"] = corners + half
    made.uns["pathokd"] = {
        **facts,
        "spatial_unit": "level-0 pixels",
        "coords": dict(slide.coords_attrs),
        "features": dict(slide.features_attrs),
        "flagged": {
            "x": slide.coords[~good, 0],
            "y": slide.coords[~good, 1],
            "flag": slide.flag[~good].astype(object),
        },
    }
    return made


def anndata_bytes(slide: SlideEmbeddings, header: Header) -> bytes:
    """The bytes of an `.h5ad` file, with `header` as JSON in uns["pathokd"]["header"].

    Raises:
        StoreError: The package anndata is not installed.
    """
    made = to_anndata(slide, {"header": json.dumps(header)})
    from anndata.io import write_elem

    buffer = io.BytesIO()
    with h5py.File(buffer, "w") as file:  # made in memory, as `store` says why
        write_elem(file, "/", made)
    return buffer.getvalue()
