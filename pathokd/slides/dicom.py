"""Which files make one DICOM slide."""

from pathlib import Path

import openslide


def series_uid(path: Path) -> str | None:
    """The series that a DICOM file belongs to; None if OpenSlide finds no slide in it.

    OpenSlide opens a slide by any file of its series, and finds the others in the same folder.
    """
    try:
        with openslide.OpenSlide(path) as slide:
            uid: str | None = slide.properties.get("dicom.SeriesInstanceUID")
            return uid
    except (openslide.OpenSlideError, OSError):
        return None  # tiling it will say what is wrong
