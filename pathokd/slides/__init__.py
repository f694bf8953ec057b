"""Whole slides: pixels at any mpp, tissue, grids, manifests."""

from pathokd.slides.grid import TileGrid, tile_grid
from pathokd.slides.inspect import inspect_slide
from pathokd.slides.labels import TileLabels, tile_labels
from pathokd.slides.manifest import TileManifest, TileSpec
from pathokd.slides.pyramid import LevelChoice, choose_level
from pathokd.slides.slide import Slide
from pathokd.slides.sources import SlideSource, find_slides
from pathokd.slides.tile import tile_slides
from pathokd.slides.tissue import tissue_fraction, tissue_mask

__all__ = [
    "LevelChoice",
    "Slide",
    "SlideSource",
    "TileGrid",
    "TileLabels",
    "TileManifest",
    "TileSpec",
    "choose_level",
    "find_slides",
    "inspect_slide",
    "tile_grid",
    "tile_labels",
    "tile_slides",
    "tissue_fraction",
    "tissue_mask",
]
