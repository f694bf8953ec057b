"""Progress on a terminal: what is named is shown as it is named."""

import io
from typing import Any

import pytest
from rich.console import Console

from pathokd import progress


def test_brackets_in_a_name_are_no_markup(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rich drops `[half]`, and stops at `[/old]` as a closing tag that nothing opened."""
    screen: Any = io.StringIO()
    monkeypatch.setattr(progress, "console", lambda: Console(file=screen, force_terminal=True, width=160))
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    with progress.Bars() as bars:
        assert list(bars.track([1, 2], "slide [half] [/old].svs", 2)) == [1, 2]
    assert "slide [half] [/old].svs" in screen.getvalue()
