"""Torch's random streams of one process: what stochastic depth and the sampling of patch tokens draw from.

Views draw from their own generators (`pathokd.data.views`), so these streams are all that a checkpoint has to keep.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from pathokd.processes import process_rank


def part_streams() -> None:
    """Give each process a stream of its own: with one seed for all, their tiles would get the same noise."""
    if rank := process_rank():
        torch.manual_seed(torch.initial_seed() + rank)


def random_state(device: torch.device) -> dict[str, Tensor]:
    """State of the CPU's stream and, on a GPU, of the device's."""
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_random_state(state: dict[str, Tensor], device: torch.device) -> None:
    """Go back to a state of `random_state`."""
    torch.set_rng_state(state["cpu"].cpu())
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"].cpu(), device)


@contextmanager
def same_draws(state: dict[str, Tensor], device: torch.device) -> Iterator[None]:
    """Draw what was drawn from `state` on, and leave the streams as they were."""
    before = random_state(device)
    set_random_state(state, device)
    try:
        yield
    finally:
        set_random_state(before, device)
