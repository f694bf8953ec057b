"""How figures look: a palette that colour-blind readers can tell apart, and inks that a page can swap for the dark."""

import io
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

# Okabe and Ito 2008, "Color Universal Design", neighbours far apart; the blue is lighter, to be seen on black as well.
PALETTE = ("#1F83C9", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#8C8C8C")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
LINES = ("-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1)), (0, (1, 1)))
INK, FAINT = "#1b2733", "#7b8794"
"""Colours of text and of grid lines; `svg` turns them into the page's own."""
RC: dict[Any, Any] = {
    "font.size": 9.0,
    "axes.titlesize": 10.0,
    "axes.edgecolor": FAINT,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.frameon": False,
    "legend.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": FAINT,
    "grid.alpha": 0.25,
    "svg.fonttype": "none",
    "svg.hashsalt": "pathokd",
    "font.family": "sans-serif",
    "text.parse_math": False,  # a dollar in a name is no formula
}


@contextmanager
def styled() -> Iterator[None]:
    """Within it, figures are made and drawn in this style; settings of the program stay as they are."""
    with rc_context(RC):
        yield


def figure(width: float, height: float) -> Figure:
    """An empty figure, inches."""
    return Figure(figsize=(width, height), layout="constrained")


def grid(rows: int, columns: int, width: float, height: float) -> tuple[Figure, list[list[Axes]]]:
    """A figure of `rows` by `columns` axes, each of a size in inches."""
    made = figure(width * columns, height * rows)
    axes = made.subplots(rows, columns, squeeze=False)
    return made, [list(row) for row in axes]


def colours(names: Sequence[str]) -> dict[str, str]:
    """A colour per name, in order; beyond seven they come again, with other markers."""
    return {name: PALETTE[number % len(PALETTE)] for number, name in enumerate(names)}


def markers(names: Sequence[str]) -> dict[str, str]:
    """A marker per name, so that nothing rests on colour alone."""
    rounds = len(PALETTE)  # each round of colours begins with the next marker
    return {name: MARKERS[(number + number // rounds) % len(MARKERS)] for number, name in enumerate(names)}


def svg(made: Figure) -> str:
    """The figure as SVG for a page: no background, text in the page's colours and fonts."""
    buffer = io.StringIO()
    with styled():
        made.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r'(<svg[^>]*?) width="[^"]*" height="[^"]*"', r"\1", text, count=1)
    width = 72 * made.get_size_inches()[0]
    text = text.replace("<svg", f'<svg style="max-width:{width * 1.7:.0f}px" role="img"', 1)
    for ink, variable in ((INK, "var(--ink)"), (FAINT, "var(--faint)")):
        text = re.sub(ink, variable, text, flags=re.IGNORECASE)
    return re.sub(r"font: ([^;\"']*) sans-serif", r"font: \1 sans-serif", text)


def png(made: Figure, dpi: int = 150) -> bytes:
    """The figure as PNG on white."""
    buffer = io.BytesIO()
    with styled():
        made.savefig(buffer, format="png", dpi=dpi, facecolor="white")
    return buffer.getvalue()
