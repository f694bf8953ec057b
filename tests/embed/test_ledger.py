"""Rows in the manifest's order, on disk while the run goes on."""

from pathlib import Path
from typing import NamedTuple

import pandas as pd
import pytest

from pathokd.embed import ledger
from pathokd.embed.ledger import Ledger


class Row(NamedTuple):
    slide_id: str
    n: int


def test_rows_are_in_the_order_of_the_slides(tmp_path: Path) -> None:
    summary = Ledger[Row](tmp_path / "summary.csv", Row._fields, ["b", "a", "c"])
    summary.add(Row("c", 3))
    summary.add(Row("b", 1))
    assert not (tmp_path / "summary.csv").exists()
    summary.write()
    assert pd.read_csv(tmp_path / "summary.csv").to_numpy().tolist() == [["b", 1], ["c", 3]]


def test_it_is_written_on_the_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ledger, "INTERVAL_S", -1.0)  # the next row is due at once
    summary = Ledger[Row](tmp_path / "summary.csv", Row._fields, ["a", "b"])
    summary.add(Row("b", 2))
    assert pd.read_csv(tmp_path / "summary.csv")["slide_id"].tolist() == ["b"]


def test_a_run_without_slides_has_the_columns(tmp_path: Path) -> None:
    summary = Ledger[Row](tmp_path / "summary.csv", Row._fields, [])
    summary.write()
    assert (tmp_path / "summary.csv").read_text() == "slide_id,n\n"
