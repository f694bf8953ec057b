"""Models side by side in a terminal."""

from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Console, ConsoleOptions, RenderResult
from rich.markup import escape
from rich.measure import Measurement
from rich.table import Table

_NARROW = 18
"""Of labels beside cells of two lines: three models then fit into 80 columns."""


@dataclass(frozen=True)
class ModelTable:
    """A column per model and a line per question; columns for which a terminal is too narrow follow below.

    Attributes:
        models: names.
        rows: label, and a cell per model.
        caption: beneath.
        title: above.
    """

    models: Sequence[str]
    rows: Sequence[tuple[str, Sequence[str]]]
    caption: str = ""
    title: str = ""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """One table, or, where it does not fit, tables of as many models as do, intervals beneath their values."""
        count, unbound = len(self.models), options.update(max_width=10_000)

        def fits(start: int, end: int, *, narrow: bool) -> bool:
            table = self._table(start, end, narrow=narrow)
            return Measurement.get(console, unbound, table).maximum <= options.max_width

        narrow, start = not fits(0, count, narrow=False), 0
        while start < max(1, count):
            end = start + 1 if narrow else max(1, count)
            while end < count and fits(start, end + 1, narrow=True):
                end += 1
            table = self._table(start, end, narrow=narrow)
            table.title = escape(self.title) or None if start == 0 else None
            table.caption = self.caption if end >= count else None
            yield table
            start = end

    def _table(self, start: int, end: int, *, narrow: bool) -> Table:
        table = Table(caption_justify="left")
        table.add_column("", max_width=_NARROW if narrow else None)
        for name in self.models[start:end]:
            table.add_column(escape(name), justify="right")
        for label, cells in self.rows:
            shown = [cell.replace(" (", "\n(") if narrow else cell for cell in cells[start:end]]
            table.add_row(escape(label), *shown)
        return table
