"""How many microns a level-0 pixel measures, and who says so."""

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Literal, NamedTuple

from pathokd.errors import SlideError
from pathokd.types import Mpp

MPP_RANGE = (0.05, 20.0)
"""Microns per pixel that a microscope slide can have; 96 dpi (264 um/px) is a file-format default, not a
scanner."""
MAX_ANISOTROPY = 0.01
"""Relative difference of mpp_x and mpp_y beyond which a warning is given."""
UM_PER_RESOLUTION_UNIT = {"inch": 25400.0, "centimeter": 10000.0}

MppSource = Literal["given", "openslide", "ome", "tiff", "objective"]


class Resolution(NamedTuple):
    """Pixel size of level 0 in microns, where it comes from, and what is odd about it."""

    mpp_x: Mpp
    mpp_y: Mpp
    source: MppSource
    warnings: tuple[str, ...]


class _Claim(NamedTuple):
    source: MppSource
    mpp_x: float
    mpp_y: float
    words: str


def resolve_mpp(
    properties: Mapping[str, str], given: Mpp | None, path: str | Path, otherwise: Mpp | None = None
) -> Resolution:
    """Find the pixel size of level 0.

    The first plausible of, in order: the value given by the user, `openslide.mpp-x/y`, the OME physical pixel
    size, the TIFF resolution tags, 10 / objective power, and what the user gives for slides that do not say. An
    implausible value is passed over with a warning when a later source has a plausible one; a value given by the user
    must be plausible.

    Args:
        properties: the slide's properties under OpenSlide's names (OME values as `ome.PhysicalSizeX/Y`, in
            um).
        given: microns per level-0 pixel from the user, or None.
        path: named in messages only.
        otherwise: microns per level-0 pixel if the file does not say; where it says something else, a warning tells.

    Raises:
        SlideError: no source, or none within `MPP_RANGE`; the message says what was found and how to pass
            mpp.
    """
    for number in (given, otherwise):
        if number is not None and not _plausible(number):
            raise SlideError(
                f"The mpp given for {path} is {number:g} um/px, outside {_range()}: "
                "pass the microns per level-0 pixel, say 0.5 for a 20x scan."
            )
    rejected: list[str] = []
    for claim in _claims(properties, given, otherwise):
        if _plausible(claim.mpp_x) and _plausible(claim.mpp_y):
            warnings = [f"Ignored an mpp of {words}, outside {_range()}." for words in rejected]
            return Resolution(
                claim.mpp_x, claim.mpp_y, claim.source, (*warnings, *_anisotropy(claim), *_left_aside(claim, otherwise))
            )
        if not any(same.startswith(claim.words.split(" (")[0]) for same in rejected):
            # OpenSlide often derives its mpp from the same TIFF tags: say it once.
            rejected.append(claim.words)
    found = f"only an mpp of {'; and of '.join(rejected)}, outside {_range()}" if rejected else "no mpp"
    raise SlideError(
        f"{path} has {found}: pass its microns per level-0 pixel with --mpp-level0 or in the CSV's `mpp` column."
    )


def _claims(properties: Mapping[str, str], given: Mpp | None, otherwise: Mpp | None) -> Iterator[_Claim]:
    if given is not None:
        yield _Claim("given", given, given, f"{given:g} um/px (given)")
    for source, prefix, words in (
        ("openslide", "openslide.mpp-", "openslide.mpp-x"),
        ("ome", "ome.PhysicalSize", "OME PhysicalSizeX"),
    ):
        x = _number(properties.get(f"{prefix}{'x' if source == 'openslide' else 'X'}"))
        y = _number(properties.get(f"{prefix}{'y' if source == 'openslide' else 'Y'}"))
        if x is not None or y is not None:
            yield _claim(source, x, y, words)  # type: ignore[arg-type]
    unit = UM_PER_RESOLUTION_UNIT.get(properties.get("tiff.ResolutionUnit", ""))
    x, y = (_number(properties.get(f"tiff.{axis}Resolution")) for axis in "XY")
    if unit is not None and (x or y):
        yield _claim("tiff", unit / x if x else None, unit / y if y else None, "TIFF resolution tags")
    power = _number(properties.get("openslide.objective-power"))
    if power:
        yield _claim("objective", 10 / power, 10 / power, f"objective power {power:g}")
    if otherwise is not None:
        yield _Claim("given", otherwise, otherwise, f"{otherwise:g} um/px (given)")


def _claim(source: MppSource, x: float | None, y: float | None, words: str) -> _Claim:
    """A claim from one or both axes; a missing axis is taken to be like the other."""
    first = x if x is not None else y
    second = y if y is not None else x
    if first is None or second is None:
        raise ValueError("a claim needs at least one axis")
    return _Claim(source, first, second, f"{first:.4g} um/px ({words})")


def _number(text: str | None) -> float | None:
    try:
        return None if text is None else float(text)
    except ValueError:
        return None


def _plausible(mpp: float) -> bool:
    return math.isfinite(mpp) and MPP_RANGE[0] <= mpp <= MPP_RANGE[1]


def _range() -> str:
    return f"{MPP_RANGE[0]:g} to {MPP_RANGE[1]:g} um/px"


def _anisotropy(claim: _Claim) -> list[str]:
    difference = abs(claim.mpp_x - claim.mpp_y) / ((claim.mpp_x + claim.mpp_y) / 2)
    if difference <= MAX_ANISOTROPY:
        return []
    return [
        f"Pixels are not square ({claim.mpp_x:.4g} x {claim.mpp_y:.4g} um, {difference:.1%} apart): "
        "their mean is used for both axes."
    ]


def _left_aside(claim: _Claim, otherwise: Mpp | None) -> list[str]:
    if otherwise is None or claim.source == "given" or abs(claim.mpp_x - otherwise) <= MAX_ANISOTROPY * otherwise:
        return []
    return [
        f"The file says {claim.words}: the {otherwise:g} um/px for slides that do not say are left aside; "
        "the CSV's `mpp` column overrides a file."
    ]
