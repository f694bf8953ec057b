"""Named stainings: laboratories' H&E, measured where there was material, and a ladder around its median.

CAMELYON17 and NCT-CRC are left out on purpose: they measure robustness here, so nothing may be trained on their
colours.
"""

import difflib
from statistics import median
from typing import NamedTuple

from pathokd.augment.stain_math import Appearance, basis_of


class Staining(NamedTuple):
    """A staining and where its numbers come from."""

    appearance: Appearance
    origin: str


class _Measured(NamedTuple):
    """What `measure_appearance` found."""

    name: str
    haematoxylin: tuple[float, float, float]
    eosin: tuple[float, float, float]
    h_strength: float
    e_strength: float
    image: str


_MEASURED = (
    _Measured(
        "cmu-1", (0.531, 0.732, 0.427), (0.102, 0.840, 0.533), 2.84, 1.41, "CMU-1, skin, Aperio, 43 tiles, CC0-1.0"
    ),
    _Measured(
        "tcga-frozen",
        (0.368, 0.780, 0.506),
        (0.100, 0.886, 0.452),
        1.74,
        1.31,
        "TCGA-CR-7395, frozen, Aperio, 54 tiles",
    ),
    _Measured("os-1", (0.689, 0.640, 0.340), (0.376, 0.823, 0.427), 2.16, 1.18, "OS-1, Hamamatsu, OpenSlide test data"),
    _Measured(
        "instanseg-tma",
        (0.591, 0.731, 0.342),
        (0.191, 0.954, 0.232),
        2.55,
        1.31,
        "InstanSeg's example core, Apache-2.0",
    ),
    _Measured("birl-lung", (0.577, 0.656, 0.486), (0.410, 0.870, 0.274), 1.24, 1.69, "BIRL lung lesion, BSD-3"),
    _Measured("birl-kidney", (0.530, 0.673, 0.515), (0.137, 0.846, 0.516), 1.19, 1.11, "BIRL rat kidney, BSD-3"),
    _Measured("histoqc-1", (0.575, 0.724, 0.381), (0.101, 0.820, 0.563), 1.93, 1.08, "HistoQC template 1, Clear BSD"),
    _Measured("histoqc-2", (0.602, 0.703, 0.380), (0.211, 0.754, 0.622), 1.54, 0.68, "HistoQC template 2, Clear BSD"),
    _Measured("histoqc-3", (0.583, 0.721, 0.375), (0.219, 0.795, 0.566), 2.99, 1.27, "HistoQC template 3, Clear BSD"),
    _Measured("histoqc-4", (0.656, 0.676, 0.337), (0.298, 0.823, 0.484), 1.80, 0.90, "HistoQC template 4, Clear BSD"),
    _Measured(
        "tiatoolbox", (0.525, 0.753, 0.397), (0.146, 0.832, 0.536), 2.80, 1.07, "TIAToolbox's target image, BSD-3"
    ),
    _Measured("torchstain", (0.638, 0.737, 0.222), (0.060, 0.971, 0.231), 1.74, 0.66, "torchstain's source image, MIT"),
)

SHORT, LONG = 0.6, 1.55
"""Strength after a short and a long time in the dye, relative to the regular one: about the extremes of the measured
strengths over their median (haematoxylin .64 to 1.60, eosin .58 to 1.48)."""


def _ladder() -> dict[str, Staining]:
    """Nine combinations of times in haematoxylin and eosin, in the spirit of PLISM's thirteen stainings."""
    h, e = (
        [median(row[channel] for row in rows) for channel in range(3)]
        for rows in ([row.haematoxylin for row in _MEASURED], [row.eosin for row in _MEASURED])
    )
    vectors = basis_of(h, e)
    strengths = median(row.h_strength for row in _MEASURED), median(row.e_strength for row in _MEASURED)
    times = {"short": SHORT, "regular": 1.0, "long": LONG}
    origin = "designed: the median of the measured, times factors"
    return {
        f"h-{time_h}-e-{time_e}": Staining(
            Appearance(vectors, (strengths[0] * times[time_h], strengths[1] * times[time_e])), origin
        )
        for time_h in times
        for time_e in times
    }


STAININGS: dict[str, Staining] = {
    **_ladder(),
    **{
        row.name: Staining(
            Appearance(basis_of(row.haematoxylin, row.eosin), (row.h_strength, row.e_strength)), row.image
        )
        for row in _MEASURED
    },
}
"""All stainings by name: `h-TIME-e-TIME` with times short, regular and long, and the measured ones."""


def get_staining(name: str) -> Appearance:
    """The appearance of a staining.

    Raises:
        ValueError: no such staining; names the nearest ones.
    """
    if name not in STAININGS:
        near = difflib.get_close_matches(name, STAININGS, n=3, cutoff=0.3)
        hint = f"did you mean {' or '.join(near)}?" if near else f"choose from {', '.join(STAININGS)}."
        raise ValueError(f"there is no staining {name!r}: {hint}")
    return STAININGS[name].appearance
