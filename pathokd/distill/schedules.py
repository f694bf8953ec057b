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


def warmup_linear(steps: int, *, start: float, final: float, warmup_steps: int) -> FloatArray:
    """Linear from `start` to `final`, which is reached at step `warmup_steps` and kept; teacher temperatures follow it.

    Args:
        steps: length of the schedule.
        start: first value (if there is a warm-up).
        final: value from `warmup_steps` on.
        warmup_steps: not negative; a warm-up longer than the run is cut off.

    Returns:
        float64, shape (steps,).

    Reference:
        Caron et al. 2021, "DINO" (arXiv 2104.14294), section 3.2: tau_t from 0.04 to 0.07 over 30 epochs.
    """
    if warmup_steps < 0:
        raise ValueError(f"warmup_steps must not be negative, got {warmup_steps}.")
    warmup = np.linspace(start, final, warmup_steps, endpoint=False)[:steps]
    return np.concatenate([warmup, np.full(steps - len(warmup), final)])


def average_age(momentum: FloatArray) -> float:
    """How many steps an exponential moving average lags behind at the end of a run: the mean age of what it holds.

    The weights of step t enter with 1 - m_t and are kept by the momenta of all later steps. A cosine to 1 stops the
    average early: over 260 steps from 0.95 it ends 110 steps behind, over 100,000 from 0.994 a tenth of the run.

    Args:
        momentum: of each step, shape (steps,).
    """
    kept_after = np.append(np.cumprod(momentum[::-1])[::-1], 1.0)
    steps = len(momentum)
    return float((1 - momentum) * kept_after[1:] @ np.arange(steps - 1, -1, -1) + kept_after[0] * steps)
