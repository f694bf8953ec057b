"""Schedules as arrays: the value for every optimiser step, computed once and easy to plot."""

import numpy as np

from pathokd.types import FloatArray


def warmup_cosine(steps: int, *, peak: float, final: float, warmup_steps: int = 0, start: float = 0.0) -> FloatArray:
    """Linear warm-up from `start` to `peak`, then half a cosine to `final`.

    Args:
        steps: length of the schedule.
        peak: value when the warm-up ends.
        final: value the cosine tends to; reached one step after the last.
        warmup_steps: length of the warm-up, less than `steps` (0: none).
        start: value of the first warm-up step.

    Returns:
        float64, shape (steps,).

    Reference:
        DINOv2 (arXiv 2304.07193), Table 16: linear warm-up, cosine.
    """
    if not 0 <= warmup_steps < max(steps, 1):
        raise ValueError(f"warmup_steps must lie in [0, steps={steps}), got {warmup_steps}.")
    warmup = np.linspace(start, peak, warmup_steps, endpoint=False)
    s = np.arange(steps - warmup_steps) / max(steps - warmup_steps, 1)
    cosine = final + (peak - final) * (1 + np.cos(np.pi * s)) / 2
    return np.concatenate([warmup, cosine])


def cosine(steps: int, *, start: float, final: float) -> FloatArray:
    """Half a cosine from `start` to `final`, shape (steps,); weight decay and EMA momentum follow it."""
    return warmup_cosine(steps, peak=start, final=final)
