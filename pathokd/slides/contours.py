"""Outlines of a tissue mask, with holes, in level-0 coordinates, as GeoJSON."""

from typing import Any

import cv2
import numpy as np

from pathokd.types import IntArray, Mask

FINE = 3
"""The mask is enlarged this many times before tracing: cv2 runs through pixel centres, which would shave half
a mask pixel off all around; so it is a sixth."""
SIMPLIFY_PX = 0.5
"""Outlines may stray this many mask pixels, which halves the size of the files and more."""


def mask_polygons(mask: Mask) -> list[list[IntArray]]:
    """Trace the objects of a mask.

    Args:
        mask: shape (height, width).

    Returns:
        per object a list of rings, each an array (n, 2) of x, y in `FINE`-ths of a mask pixel: first the
        outline, then its holes. Rings are open (the first point is not repeated).
    """
    fine = mask.astype(np.uint8).repeat(FINE, axis=0).repeat(FINE, axis=1)
    rings, hierarchy = cv2.findContours(fine, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_SIMPLE)
    if not rings:
        return []
    simple = [_simplified(ring) for ring in rings]
    polygons: dict[int, list[IntArray]] = {
        i: [ring] for i, ring in enumerate(simple) if hierarchy[0][i][3] < 0 and len(ring) >= 3
    }
    for i, ring in enumerate(simple):
        parent = hierarchy[0][i][3]
        if parent in polygons and len(ring) >= 3:
            polygons[parent].append(ring)
    return list(polygons.values())


def mask_geojson(mask: Mask, mask_downsample: float, dimensions: tuple[int, int]) -> dict[str, Any]:
    """GeoJSON of a mask as QuPath and others import it: one Polygon feature per piece of tissue.

    Args:
        mask: shape (height, width), its top-left corner is the slide's.
        mask_downsample: level-0 pixels per mask pixel.
        dimensions: width and height of level 0, to which the outlines are cut.

    Returns:
        a FeatureCollection with coordinates in level-0 pixels.
    """
    features = [
        {
            "type": "Feature",
            "id": f"tissue-{number}",
            "geometry": {
                "type": "Polygon",
                "coordinates": [_ring(r, mask_downsample, dimensions) for r in rings],
            },
            "properties": {
                "objectType": "annotation",
                "classification": {"name": "Tissue", "color": [0, 160, 80]},
            },
        }
        for number, rings in enumerate(mask_polygons(mask))
    ]
    return {"type": "FeatureCollection", "features": features}


def _simplified(ring: Any) -> IntArray:
    """A ring of shape (n, 2) with fewer points."""
    return np.asarray(cv2.approxPolyDP(ring, SIMPLIFY_PX * FINE, closed=True), np.int32).reshape(-1, 2)


def _ring(ring: IntArray, mask_downsample: float, dimensions: tuple[int, int]) -> list[list[float]]:
    """A closed ring in level-0 pixels, to a tenth."""
    points = np.clip((ring + 0.5) / FINE * mask_downsample, 0, dimensions).round(1).tolist()
    closed: list[list[float]] = [*points, points[0]]
    return closed
