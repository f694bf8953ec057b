"""Which tiles show one place: slides of a case are registered when the same microns are the same tissue."""

import numpy as np
import numpy.typing as npt
import pandas as pd


def centre_um(frame: pd.DataFrame) -> npt.NDArray[np.float64]:
    """Tile positions in microns from the slide's corner, (n, 2)."""
    mpp0 = frame["mpp_level0"].to_numpy(np.float64)[:, None]
    half = tile_um(frame)[:, None] / 2
    centre: npt.NDArray[np.float64] = frame[["x", "y"]].to_numpy(np.float64) * mpp0 + half
    return centre


def tile_um(frame: pd.DataFrame) -> npt.NDArray[np.float64]:
    """Sides of tiles in microns, (n,)."""
    side: npt.NDArray[np.float64] = frame["tile_px"].to_numpy(np.float64) * frame["mpp"].to_numpy(np.float64)
    return side


def place_ids(frame: pd.DataFrame, case_column: str = "case") -> npt.NDArray[np.str_]:
    """One name per place: tiles of a case whose positions round to the same tile-sized square.

    Args:
        frame: Manifest or packed index.
        case_column: The column whose equal values are registered with each other.

    Returns:
        Names, shape (n,).
    """
    cell = np.rint((centre_um(frame) / tile_um(frame)[:, None]) - 0.5).astype(int)
    cases = frame[case_column].astype(str).to_numpy()
    return np.array([f"{case}/{x}/{y}" for case, (x, y) in zip(cases, cell, strict=True)], dtype=np.str_)
