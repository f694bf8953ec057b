"""What a model bears and what the picture bears are told apart."""

from typing import Any

import numpy as np
import pandas as pd
import pytest

from pathokd.evaluate.severity import known_changes, severity_curves, tolerated
from pathokd.types import Rgb

N = 60
LABELS = np.array(["red", "green", "blue"])[np.arange(N) % 3]
FOLDS = np.arange(N) // 20


class Colours:
    """A model that knows the mean colour of a tile."""

    dim, batch_size = 3, 8

    def __call__(self, images: Any) -> np.ndarray:
        return np.stack([image.mean(axis=(0, 1)) for image in images]).astype(np.float32)


def read(number: int) -> Rgb:
    """Grey noise, with one channel brighter by class."""
    tile = np.random.default_rng(number).integers(60, 120, (8, 8, 3), dtype=np.uint8)
    tile[..., number % 3] += 80
    return tile


def turn_channels(tile: Rgb, severity: float, seed: int) -> Rgb:
    return np.ascontiguousarray(np.roll(tile, 1, axis=-1)) if severity > 0.5 else tile


def wipe(tile: Rgb, severity: float, seed: int) -> Rgb:
    noise = np.random.default_rng(seed).integers(0, 255, 3)
    return np.broadcast_to(noise, tile.shape).astype(np.uint8)


@pytest.fixture(scope="module")
def curves() -> pd.DataFrame:
    changes = {"nothing": lambda tile, severity, seed: tile.copy(), "channels": turn_channels, "wipe": wipe}
    model: Any = Colours()
    return severity_curves(model, read, LABELS, FOLDS, changes=changes, severities=(0.5, 1.0), workers=1)


def row(curves: pd.DataFrame, change: str, severity: float) -> pd.Series:
    return curves[(curves["change"] == change) & (curves["severity"] == severity)].iloc[0]


def test_no_change_costs_nothing(curves: pd.DataFrame) -> None:
    for severity in (0.5, 1.0):
        found = row(curves, "nothing", severity)
        assert found["accuracy"] == found["own_accuracy"] == row(curves, "clean", 0.0)["accuracy"] == 1.0
        assert found["drop"] == found["own_drop"] == 0.0
        assert found["cosine"] == pytest.approx(1.0)


def test_a_model_may_fail_where_the_picture_still_tells(curves: pd.DataFrame) -> None:
    found = row(curves, "channels", 1.0)
    assert found["accuracy"] == 0.0  # every class is taken for the next one
    assert found["own_accuracy"] == 1.0
    assert found["drop_low"] > 0.9
    assert found["own_drop_high"] <= 0.0


def test_a_wiped_picture_tells_nothing(curves: pd.DataFrame) -> None:
    found = row(curves, "wipe", 1.0)
    assert found["own_accuracy"] < 0.6
    assert found["own_drop_low"] > 0.2
    assert found["cosine"] < 0.99


class Pixels:
    """A model that knows every pixel of a tile."""

    dim, batch_size = 192, 8

    def __call__(self, images: Any) -> np.ndarray:
        return np.stack([image.reshape(-1) for image in images]).astype(np.float32)


def noisy(tile: Rgb, severity: float, seed: int) -> Rgb:
    noise = np.random.default_rng(seed).normal(0, 400 * severity, tile.shape)
    return np.clip(tile + noise, 0, 255).astype(np.uint8)


def test_more_copies_tell_better_what_the_picture_bears() -> None:
    model: Any = Pixels()
    one, eight = (
        severity_curves(model, read, LABELS, FOLDS, changes={"noisy": noisy}, severities=(1.0,), draws=draws, workers=1)
        for draws in (1, 8)
    )
    assert row(one, "noisy", 1.0)["accuracy"] == row(eight, "noisy", 1.0)["accuracy"]  # the clean probe, the same tiles
    assert row(eight, "noisy", 1.0)["own_accuracy"] > row(one, "noisy", 1.0)["own_accuracy"] + 0.05


def test_limits_are_per_question(curves: pd.DataFrame) -> None:
    assert tolerated(curves) == {"nothing": 1.0, "channels": 0.5, "wipe": 0.0}
    assert tolerated(curves, drop="own_drop") == {"nothing": 1.0, "channels": 1.0, "wipe": 0.0}


def test_known_changes_are_the_identity_at_zero_and_change_at_one() -> None:
    tile = np.random.default_rng(0).integers(40, 230, (64, 64, 3), dtype=np.uint8)
    for name, change in known_changes().items():
        assert np.array_equal(change(tile, 0.0, 5), tile), name
        assert not np.array_equal(change(tile, 1.0, 5), tile), name
