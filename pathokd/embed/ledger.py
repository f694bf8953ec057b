"""The summary of a run: one row per slide, in the manifest's order, on disk while the run goes on."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Generic, Protocol, TypeVar

import pandas as pd

from pathokd.files import atomic_path

INTERVAL_S = 10.0
"""Seconds between two writes, so that thousands of skipped slides do not cost as many files."""


class Row(Protocol):
    """What a row has to say: which slide it is about."""

    @property
    def slide_id(self) -> str:
        """The slide."""
        ...


R = TypeVar("R", bound=Row)


class Ledger(Generic[R]):
    """Outcomes as they come, in whatever order they come.

    Args:
        path: The CSV file.
        columns: Fields of a row.
        slide_ids: All slides of the run, in the order of the rows.
    """

    def __init__(self, path: Path, columns: Sequence[str], slide_ids: Sequence[str]) -> None:
        self._path, self._columns = path, list(columns)
        self._order = {slide_id: place for place, slide_id in enumerate(slide_ids)}
        self._rows: list[R] = []
        self._written = time.monotonic()

    def add(self, row: R) -> None:
        """Note an outcome."""
        self._rows.append(row)
        if time.monotonic() - self._written > INTERVAL_S:
            self.write()

    def table(self) -> pd.DataFrame:
        """What is known so far."""
        rows = sorted(self._rows, key=lambda row: self._order[row.slide_id])
        return pd.DataFrame(rows, columns=self._columns)

    def write(self) -> None:
        """Write the table, whole or not at all."""
        with atomic_path(self._path) as part:
            self.table().to_csv(part, index=False)
        self._written = time.monotonic()
