"""`inspect_slide`: the facts of a slide, and the sentence if it cannot be used."""

from pathlib import Path
from typing import Any

from pathokd.errors import SlideError
from pathokd.slides.slide import Slide
from pathokd.slides.tissue import NOT_BRIGHTFIELD, is_brightfield
from pathokd.types import Mpp

LOOK_PX = 512
"""Longest side of the thumbnail that is looked at."""


def inspect_slide(path: str | Path, *, mpp: Mpp | None = None, mpp_else: Mpp | None = None) -> dict[str, Any]:
    """Collect what is known about a slide; nothing is raised for a bad file, the sentence stands in `error`.

    Args:
        path: the file.
        mpp: microns per level-0 pixel, whatever the file says.
        mpp_else: microns per level-0 pixel if the file does not say.

    Returns:
        JSON-able: path, usable, error (None, or why the slide cannot be tiled), vendor, dimensions, levels
        (width, height, downsample, mpp each), mpp, mpp_x, mpp_y, mpp_source, objective_power,
        icc_profile_bytes, associated_images, warnings. A file that cannot be opened has path, usable and
        error only.
    """
    try:
        slide = Slide(path, mpp=mpp, mpp_else=mpp_else)
    except SlideError as error:
        return {"path": str(Path(path).absolute()), "usable": False, "error": str(error)}
    with slide:
        facts: dict[str, Any] = {"path": str(slide.path), "usable": True, "error": None}
        facts |= {"vendor": slide.vendor, "dimensions": list(slide.dimensions)}
        facts |= _resolution(slide)
        facts["objective_power"] = slide.properties.get("openslide.objective-power")
        facts["icc_profile_bytes"] = None if slide.icc_profile is None else len(slide.icc_profile)
        facts["associated_images"] = list(slide.associated_images)
        facts["warnings"] = [w for w in slide.warnings if w != facts["error"]]
        trouble = facts["error"] or _look(slide)
        facts["error"], facts["usable"] = trouble, trouble is None
        return facts


def _resolution(slide: Slide) -> dict[str, Any]:
    """mpp with its source and that of every level; `error` if there is none."""
    facts: dict[str, Any] = {"mpp": None, "mpp_x": None, "mpp_y": None, "mpp_source": None}
    try:
        facts = {name: getattr(slide, name) for name in facts}
    except SlideError as error:
        facts["error"] = str(error)
    facts["levels"] = [
        {
            "width": width,
            "height": height,
            "downsample": down,
            "mpp": None if facts["mpp"] is None else facts["mpp"] * down,
        }
        for (width, height), down in zip(slide.level_dimensions, slide.level_downsamples, strict=True)
    ]
    return facts


def _look(slide: Slide) -> str | None:
    """Why the slide's pixels cannot be used, or None."""
    try:
        thumb = slide.thumbnail(LOOK_PX)
    except SlideError as error:
        return str(error)
    if not is_brightfield(thumb):
        return NOT_BRIGHTFIELD.format(path=slide.path)
    return None
