"""All presets on one tile: stainings, scanners and single factors as severity grows, for a person to look at."""

import io
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from pathokd.augment.factors import FACTORS, Factor
from pathokd.augment.scanner import PROFILES, ScannerProfile
from pathokd.augment.stain import swap_stain
from pathokd.augment.stain_basis import measure_appearance
from pathokd.augment.stainings import STAININGS
from pathokd.files import atomic_path
from pathokd.types import Rgb

SEVERITIES = (0.0, 0.25, 0.5, 0.75, 1.0)
SHOWN_PX = 160

Graded = Callable[[float], Rgb]


def preset_rows(tile: Rgb, seed: int = 0) -> dict[str, dict[str, Graded]]:
    """Every preset as a function of severity, by section (stainings, scanners, factors) and name."""
    source = measure_appearance(tile)
    return {
        "stainings": {
            name: partial(swap_stain, tile, source, staining.appearance) for name, staining in STAININGS.items()
        },
        "scanners": {name: partial(_scanned, profile, tile, seed) for name, profile in PROFILES.items()},
        "factors": {name: partial(_factored, factor, tile, seed) for name, factor in FACTORS.items()},
    }


def _scanned(profile: ScannerProfile, tile: Rgb, seed: int, severity: float) -> Rgb:
    return profile.apply(tile, severity=severity, seed=seed)


def _factored(factor: Factor, tile: Rgb, seed: int, severity: float) -> Rgb:
    return factor.apply(tile, severity, seed)


def write_contact_sheet(path: str | Path, tile: Rgb, *, seed: int = 0) -> None:
    """Draw every preset at `SEVERITIES`, one column of blocks for each section.

    Args:
        path: PNG file.
        tile: what they are shown on; its middle is taken.
        seed: of directions and noise.
    """
    buffer = io.BytesIO()
    contact_sheet(preset_rows(_middle(tile), seed)).savefig(buffer, format="png", dpi=100)
    with atomic_path(path) as part:
        part.write_bytes(buffer.getvalue())


def contact_sheet(sections: Mapping[str, Mapping[str, Graded]]) -> Figure:
    """The figure: sections side by side, a preset a row, a severity a column."""
    rows = max(len(section) for section in sections.values())
    side = 1.05
    figure = Figure(figsize=(side * (len(SEVERITIES) + 1.6) * len(sections), side * (rows + 0.5)))
    for number, (title, section) in enumerate(sections.items()):
        left = number / len(sections)
        width = 1 / len(sections)
        cell = width / (len(SEVERITIES) + 1.6), 1 / (rows + 0.5)
        figure.text(left + 0.1 * cell[0], 1 - 0.3 * cell[1], title, fontsize=11, weight="bold", va="center")
        for column, severity in enumerate(SEVERITIES):
            x = left + (1.5 + column + 0.5) * cell[0]
            figure.text(x, 1 - 0.3 * cell[1], f"{severity:g}", fontsize=9, ha="center", va="center")
        for row, (name, graded) in enumerate(section.items()):
            bottom = 1 - (row + 1.5) * cell[1]
            figure.text(left + 1.42 * cell[0], bottom + cell[1] / 2, name, fontsize=8, ha="right", va="center")
            for column, severity in enumerate(SEVERITIES):
                x = left + (1.5 + column) * cell[0]
                axes = figure.add_axes((x, bottom, 0.97 * cell[0], 0.97 * cell[1]))
                axes.imshow(graded(severity), interpolation="nearest")
                axes.set_axis_off()
    return figure


def _middle(tile: Rgb) -> Rgb:
    """The central square of at most `SHOWN_PX` a side."""
    side = min(SHOWN_PX, *tile.shape[:2])
    top, left = ((n - side) // 2 for n in tile.shape[:2])
    return np.ascontiguousarray(tile[top : top + side, left : left + side])
