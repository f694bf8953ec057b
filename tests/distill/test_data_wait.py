"""How long the trainer waits for tiles is counted by the loader, logged, and said."""

import time
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml

from pathokd.cli.main import main
from pathokd.data.datamodule import TileDataModule
from pathokd.data.packed import PackedTiles
from pathokd.data.views import Geometry
from pathokd.distill import callbacks

SLOW_S = 0.3
"""Longer than a step of the tiny models takes per tile, however busy the machine."""


@pytest.fixture
def slow_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that takes its time."""
    read = PackedTiles.read

    def slowly(tiles: PackedTiles, row: int) -> Any:
        time.sleep(SLOW_S)
        return read(tiles, row)

    monkeypatch.setattr(PackedTiles, "read", slowly)


@pytest.mark.usefixtures("slow_tiles")
def test_the_loader_counts_its_readers_and_not_the_model(packed: Path) -> None:
    data = TileDataModule(str(packed), batch_size=4, workers=0, geometry=Geometry(32), val_fraction=0.0)
    loader = data.train_dataloader()
    batches = iter(loader)
    started = time.perf_counter()
    for _ in range(2):
        next(batches)
        time.sleep(0.3)
    assert 2 * 4 * SLOW_S <= loader.waited_s <= time.perf_counter() - started - 0.3


@pytest.mark.usefixtures("slow_tiles")
def test_a_run_that_waits_says_so(
    recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(callbacks, "PLAIN_INTERVAL_S", 0.0)
    recipe["data"] |= {"workers": 0, "val_fraction": 0.0}
    recipe["trainer"] |= {"max_steps": 2, "log_every_n_steps": 1}
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    assert main(["fit", "--config", str(tmp_path / "c.yaml"), "--out", str(tmp_path / "run")]) == 0
    logged = pd.read_csv(next((tmp_path / "run/metrics").rglob("metrics.csv")))["train/data_wait"].dropna()
    assert logged.between(0.3, 1.0).all()
    said = [line for line in capsys.readouterr().err.splitlines() if "waiting for data" in line]
    share = float(said[-1].split("% waiting")[0].split()[-1]) / 100
    assert 0.3 < share <= 1.0
