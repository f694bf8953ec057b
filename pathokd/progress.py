"""Progress on a terminal as bars, elsewhere as plain lines a log can keep."""

import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

T = TypeVar("T")

PLAIN_INTERVAL_S = 10.0
"""Seconds between two plain lines when stderr is no terminal."""


def console() -> Console:
    """A console on stderr, so that stdout stays free for results."""
    return Console(stderr=True, highlight=False, soft_wrap=not sys.stderr.isatty())


class Bars:
    """Nested progress bars (say slides, and tiles within), or plain lines when stderr is no terminal.

    Use as a context manager; `track` wraps an iterable and may be nested or called again.
    """

    def __init__(self) -> None:
        self._live = sys.stderr.isatty()
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}", markup=False),  # slides may have brackets in their names
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console(),
            disable=not self._live,
        )

    def __enter__(self) -> "Bars":
        self._progress.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._progress.stop()

    def track(self, items: Iterable[T], description: str, total: int, *, keep: bool = True) -> Iterator[T]:
        """Yield `items`, showing how many of `total` are done; `keep=False` removes the bar at the end."""
        task = self._progress.add_task(description, total=total)
        said = started = time.monotonic()
        for done, item in enumerate(items, start=1):
            yield item
            self._progress.advance(task)
            now = time.monotonic()
            if not self._live and keep and (now - said >= PLAIN_INTERVAL_S or done == total):
                said = now
                print(f"{description}: {done}/{total} in {now - started:.0f} s", file=sys.stderr, flush=True)  # noqa: T201
        if not keep:
            self._progress.remove_task(task)

    def say(self, line: str) -> None:
        """Print one line above the bars."""
        self._progress.console.print(line, markup=False)
