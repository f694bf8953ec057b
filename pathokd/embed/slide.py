"""One slide's embeddings in memory: to look at, to save, to hand on."""

from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
import numpy.typing as npt

from pathokd.embed.annotated import to_anndata
from pathokd.embed.colours import fit_colours
from pathokd.embed.painting import paint_tiles
from pathokd.embed.store import SlideEmbeddings, StoredDtype, write_embeddings
from pathokd.files import Header
from pathokd.slides.slide import Slide
from pathokd.types import FloatArray, Mask, Rgb


class EmbeddedSlide(NamedTuple):
    """What a model says of a slide, row i being one tile."""

    path: Path
    features: npt.NDArray[np.float32]
    """(n, d); NaN where `flags` is not empty."""
    coords: npt.NDArray[np.int64]
    """(n, 2) level-0 x, y of the tile's top left corner."""
    flags: npt.NDArray[np.object_]
    """(n,) empty for a good tile, else a word such as `unreadable`."""
    tissue_fraction: npt.NDArray[np.float32]
    """(n,) share of the tile that is tissue."""
    meta: dict[str, Any]
    """`header` (what made this), `coords` and `features` (attributes as in the HDF5 file)."""

    @property
    def good(self) -> Mask:
        """(n,) true where the tile was read and embedded."""
        return np.asarray(self.flags == "", dtype=np.bool_)

    def save(self, path: str | Path, dtype: StoredDtype = "fp32") -> None:
        """Write the HDF5 file that `pathokd embed` writes.

        Args:
            path: The file.
            dtype: Stored precision.
        """
        header: Header = {**self.meta["header"], "settings": {**self.meta["header"]["settings"], "dtype": dtype}}
        write_embeddings(
            path,
            self.features,
            self.coords,
            flag=self.flags,
            tissue_fraction=self.tissue_fraction,
            header=header,
            coords_attrs=self.meta["coords"],
            features_attrs=self.meta["features"],
            dtype=dtype,
        )

    def heatmap(self, values: FloatArray | None = None, max_px: int = 1024) -> Rgb:
        """A picture of the slide with one colour per tile.

        Args:
            values: (n,) numbers, drawn from blue (low) to yellow (high); by default the three strongest principal
                components of the features as red, green and blue, so that tiles the model takes for alike look alike.
            max_px: Longest side of the picture.

        Returns:
            (height, width, 3).

        Raises:
            ValueError: `values` has not one number per tile, or some of a good tile is not finite.
        """
        if values is not None and np.shape(values) != (len(self.features),):
            raise ValueError(f"values should have one number per tile ({len(self.features)}), got {np.shape(values)}.")
        if values is not None and not np.isfinite(values[self.good]).all():
            raise ValueError("values of good tiles should be finite numbers, got NaN or infinity: give those 0, say.")
        with Slide(self.path, mpp=self.meta["coords"]["mpp_level0"]) as slide:
            picture = slide.overview(max_px=max_px)
        colours = _ramp(values, self.good) if values is not None else self._colours()
        return paint_tiles(picture, self.coords, self.meta["coords"], colours, self.good)

    def _colours(self) -> npt.NDArray[np.uint8]:
        return fit_colours(lambda: [self.features[self.good]]).colours(self.features, self.good)

    def to_anndata(self) -> Any:
        """An AnnData of the good tiles: X the features, obsm["spatial"] the tile centres in level-0 pixels.

        Raises:
            StoreError: The package anndata is not installed.
        """
        stored = SlideEmbeddings(
            self.features,
            self.coords,
            self.flags,
            self.tissue_fraction,
            self.meta["coords"],
            self.meta["features"],
            self.meta["header"],
        )
        return to_anndata(stored, {"path": str(self.path), "encoder": self.meta["features"]["encoder"]})


def _ramp(values: FloatArray, good: Mask) -> npt.NDArray[np.uint8]:
    """Blue to yellow between the extremes of the good tiles, (n, 3)."""
    low, high = float(np.min(values[good])), float(np.max(values[good]))
    levels = np.clip(255 * (np.asarray(values, np.float64) - low) / max(high - low, 1e-12), 0, 255)
    levels = np.where(good, levels, 0).astype(np.uint8)
    bgr = cv2.applyColorMap(levels[:, None], cv2.COLORMAP_VIRIDIS)
    return np.asarray(cv2.cvtColor(np.asarray(bgr, np.uint8), cv2.COLOR_BGR2RGB), np.uint8)[:, 0]
