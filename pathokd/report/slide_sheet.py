"""One slide on a sheet: two pictures of the same scale side by side, captions, legend and a scale bar."""

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from pathokd.types import Mpp, Rgb

Colour = tuple[int, int, int]

PAPER: Colour = (255, 255, 255)
INK: Colour = (27, 39, 51)
FAINT: Colour = (110, 122, 134)
FRAME: Colour = (200, 206, 212)
MARGIN, GAP, LINE = 28, 28, 1.35
MIN_PANEL_PX = 700
"""A picture whose longer side is smaller is enlarged by a whole factor, so that captions have room."""


class Panel(NamedTuple):
    """A picture with what is said below it."""

    picture: Rgb
    title: str
    caption: str
    legend: Sequence[tuple[Colour, str]] = ()


def slide_sheet(title: str, subtitle: str, panels: Sequence[Panel], mpp: Mpp) -> Rgb:
    """Lay out a sheet.

    Args:
        title: Usually the slide's name.
        subtitle: One line of facts.
        panels: Pictures of one size.
        mpp: Microns per pixel of the pictures.

    Returns:
        The sheet, (height, width, 3).
    """
    zoom = max(1, -(-MIN_PANEL_PX // max(panels[0].picture.shape[:2])))
    pictures = [panel.picture.repeat(zoom, 0).repeat(zoom, 1) for panel in panels]
    height, own_width = pictures[0].shape[:2]
    width = max(own_width, MIN_PANEL_PX // 2)  # a narrow strip of tissue still needs words
    heading, small, text = _font(26, bold=True), _font(17), _font(16)
    columns = [_wrap(panel.caption, text, width) for panel in panels]
    legends = [_legend_rows(panel.legend, text, width) for panel in panels]
    line = round(16 * LINE)
    foot = max(len(c) + r for c, r in zip(columns, legends, strict=True)) * line
    top = MARGIN + 36 + 30 + 34
    page_width = 2 * MARGIN + len(panels) * width + (len(panels) - 1) * GAP
    page = Image.new("RGB", (page_width, top + height + 48 + foot + MARGIN), PAPER)
    draw = ImageDraw.Draw(page)
    draw.text((MARGIN, MARGIN), _fitted(title, heading, page_width - 2 * MARGIN), INK, heading)
    draw.text((MARGIN, MARGIN + 38), _fitted(subtitle, small, page_width - 2 * MARGIN), FAINT, small)
    for number, (panel, picture) in enumerate(zip(panels, pictures, strict=True)):
        left = MARGIN + number * (width + GAP)
        draw.text((left, top - 28), panel.title, INK, _font(17, bold=True))
        page.paste(Image.fromarray(picture), (left, top))
        draw.rectangle((left - 1, top - 1, left + own_width, top + height), outline=FRAME)
        _scale_bar(draw, left, top + height + 14, own_width, mpp / zoom, text)
        below = top + height + 48
        below = _draw_legend(draw, panel.legend, text, left, below, width, line)
        for row, words in enumerate(columns[number]):
            draw.text((left, below + row * line), words, FAINT, text)
    return np.asarray(page, np.uint8)


def bar_um(width_um: float) -> float:
    """A round length, 1, 2 or 5 times a power of ten microns, of a sixth to a third of `width_um`."""
    power = 10.0 ** np.floor(np.log10(width_um / 3))
    return float(max(step for step in (1, 2, 5) if step * power <= width_um / 3) * power)


def _scale_bar(
    draw: ImageDraw.ImageDraw, left: int, top: int, width_px: int, mpp: Mpp, font: ImageFont.FreeTypeFont
) -> None:
    """A bar with end ticks and its length in millimetres."""
    length_um = bar_um(width_px * mpp)
    right = left + round(length_um / mpp)
    draw.line((left, top + 8, right, top + 8), INK, 3)
    for x in (left, right):
        draw.line((x, top + 2, x, top + 14), INK, 3)
    draw.text((right + 10, top - 2), f"{length_um / 1000:g} mm", INK, font)


def _legend_rows(legend: Sequence[tuple[Colour, str]], font: ImageFont.FreeTypeFont, width: int) -> int:
    return len(_placed(legend, font, width)[1])


def _placed(
    legend: Sequence[tuple[Colour, str]], font: ImageFont.FreeTypeFont, width: int
) -> tuple[list[tuple[int, int]], range]:
    """Row and left edge of every entry, and the rows there are."""
    places, row, x = [], 0, 0
    for _, words in legend:
        needed = 22 + round(font.getlength(words)) + 18
        if x and x + needed > width:
            row, x = row + 1, 0
        places.append((row, x))
        x += needed
    return places, range(row + 1 if legend else 0)


def _draw_legend(
    draw: ImageDraw.ImageDraw,
    legend: Sequence[tuple[Colour, str]],
    font: ImageFont.FreeTypeFont,
    left: int,
    top: int,
    width: int,
    line: int,
) -> int:
    """Swatches with words; returns where the next line begins."""
    places, rows = _placed(legend, font, width)
    for (colour, words), (row, x) in zip(legend, places, strict=True):
        y = top + row * line
        draw.rectangle((left + x, y + 4, left + x + 13, y + 17), outline=colour, width=3)
        draw.text((left + x + 21, y), words, FAINT, font)
    return top + len(rows) * line


def _wrap(words: str, font: ImageFont.FreeTypeFont, width: int) -> list[str]:
    lines: list[str] = []
    for word in words.split():
        longer = f"{lines[-1]} {word}" if lines else word
        if lines and font.getlength(longer) <= width:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines


def _fitted(words: str, font: ImageFont.FreeTypeFont, width: int) -> str:
    """Cut to what fits, with an ellipsis."""
    if font.getlength(words) <= width:
        return words
    while words and font.getlength(words + "…") > width:
        words = words[:-1]
    return words + "…"


@cache
def _font(size: int, bold: bool = False) -> ImageFont.FreeTypeFont:
    """DejaVu Sans, which comes with matplotlib and knows most alphabets."""
    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts/ttf" / name), size)
