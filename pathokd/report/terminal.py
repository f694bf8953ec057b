"""Models side by side in a terminal."""

from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Console, ConsoleOptions, RenderResult
from rich.markup import escape
from rich.measure import Measurement
from rich.table import Table


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
        """Tables of as many models as fit, at least one in each."""
        start = 0
        while start < max(1, len(self.models)):
            end = start + 1
            while end < len(self.models) and self._width(console, options, start, end + 1) <= options.max_width:
                end += 1
            table = self._table(start, end)
            table.title = escape(self.title) or None if start == 0 else None
            table.caption = self.caption if end >= len(self.models) else None
            yield table
            start = end

    def _table(self, start: int, end: int) -> Table:
        table = Table(caption_justify="left")
        table.add_column("")
        for name in self.models[start:end]:
            table.add_column(escape(name), justify="right")
        for label, cells in self.rows:
            table.add_row(escape(label), *cells[start:end])
        return table

    def _width(self, console: Console, options: ConsoleOptions, start: int, end: int) -> int:
        unbound = options.update(max_width=10_000)
        return Measurement.get(console, unbound, self._table(start, end)).maximum
