"""What simulated tiles and slides show: another staining, another scanner, or both.

Staining comes before scanning, as in life. How a slide is stained is measured once from many of its tiles, so that all
of them are changed alike.
"""

import itertools
import re
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pathokd.augment.scanner import PROFILES, ScannerProfile, get_profile
from pathokd.augment.stain import swap_stain
from pathokd.augment.stain_basis import is_brown, measure_appearance
from pathokd.augment.stain_math import Appearance
from pathokd.augment.stainings import get_staining
from pathokd.files import fingerprint
from pathokd.types import Rgb

SIMULATION = 2
"""Version of what a condition makes of pixels: how staining is measured and changed, the presets, the scanner. Raise it
whenever pixels change, so that a folder begun before is not finished with other ones (a test holds it to the pixels).
Folders that say none were made by an earlier one."""
ORIGINAL = "original"
"""In the columns `stain` and `scanner`: as it was."""
MEASURED_TILES = 24
"""Tiles looked at to find how a slide is stained."""


@dataclass(frozen=True)
class Condition:
    """Another staining, another scanner, or both.

    Args:
        stain: a name in `pathokd.augment.STAININGS`; None keeps the staining.
        scanner: a name in `pathokd.augment.PROFILES` or a YAML file of a profile; None keeps the scanner.
        severity: how far to go, 0 (nothing) to 1.
    """

    stain: str | None = None
    scanner: str | None = None
    severity: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.severity <= 1:
            raise ValueError(f"severity must lie within 0 to 1, got {self.severity}.")
        if self.stain is not None:
            get_staining(self.stain)
        # Read once: a file may be edited while tiles are made.
        object.__setattr__(self, "_profile", None if self.scanner is None else get_profile(self.scanner))

    @property
    def scanner_name(self) -> str:
        """Of the profile; of a file its own name, without what keys and file names cannot hold."""
        if self.scanner is None or self.scanner in PROFILES:
            return self.scanner or ORIGINAL
        name = re.sub(r"[.\s]+", "_", Path(self.scanner).stem)
        return f"{name}-file" if name in (*PROFILES, ORIGINAL) else name

    @property
    def name(self) -> str:
        """For keys and file names."""
        return f"{self.stain or ORIGINAL}_{self.scanner_name}"

    @property
    def profile(self) -> ScannerProfile | None:
        """Of the scanner."""
        return self._profile  # type: ignore[attr-defined, no-any-return]

    @property
    def edited(self) -> str | None:
        """Fingerprint of a profile that is a file, whose name does not tell that it was edited."""
        return None if self.profile is None or self.scanner in PROFILES else fingerprint(self.profile.to_dict())

    def apply(self, rgb: Rgb, source: Appearance, seed: int) -> Rgb:
        """Change one image.

        Args:
            rgb: (height, width, 3).
            source: how its slide is stained.
            seed: of the scanner's noise.
        """
        if self.stain is not None:
            rgb = swap_stain(rgb, source, get_staining(self.stain), self.severity)
        if self.profile is not None:
            rgb = self.profile.apply(rgb, severity=self.severity, seed=seed)
        return rgb


def conditions(stains: Sequence[str], scanners: Sequence[str], severity: float) -> list[Condition]:
    """Every combination of the stainings and scanners named; where none is named, what was is kept."""
    for names in (stains, scanners):
        if len(set(names)) < len(names):
            raise ValueError(f"name each staining and each scanner once, got {', '.join(names)}.")
    both = itertools.product(stains or (None,), scanners or (None,))
    wanted = [Condition(stain, scanner, severity) for stain, scanner in both]
    if len({condition.name for condition in wanted}) < len(wanted):
        raise ValueError(f"two scanners would have one name, got {', '.join(scanners)}: rename one of the files.")
    return wanted


def appearance_of(slide: str, tiles: Iterable[Rgb], *, restained: bool) -> Appearance:
    """How a slide is stained.

    Args:
        slide: its name.
        tiles: of it.
        restained: whether its staining will be changed: warns if it cannot be measured, or is another than H&E.
    """
    found = measure_appearance(list(tiles))
    if restained and found.fallback:
        warnings.warn(
            f"{slide} is changed as if it had the reference's staining, for its own cannot be measured: "
            f"{found.fallback}.",
            stacklevel=2,
        )
    elif restained and is_brown(found):
        warnings.warn(
            f"{slide} holds brown where H&E holds eosin, as immunohistochemistry with DAB does: stainings are of "
            "H&E, and turn brown into eosin.",
            stacklevel=2,
        )
    return found


def noise_seed(seed: int, number: int) -> int:
    """Of one of many images."""
    return int(np.random.SeedSequence([seed, number]).generate_state(1)[0])
