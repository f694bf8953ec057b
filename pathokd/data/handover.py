"""From a reading process to the trainer: each batch as one piece of shared memory.

Torch hands over every tensor of a batch in a conversation of its own with the process that made it, for which the
trainer waits; on a busy processor, where reading processes give way to the model, milliseconds each.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from pathokd.data.batch import TileBatch

_ALIGNED = 64
"""Bytes to whose multiples tensors begin, so that each can be seen as its own type."""


class Slot(NamedTuple):
    """Where a tensor lies in the memory of its parcel."""

    start: int
    stop: int
    dtype: torch.dtype
    shape: tuple[int, ...]


class Parcel(NamedTuple):
    """A batch whose tensors lie in one."""

    memory: Tensor
    batch: Any
    """The batch with a `Slot` in place of each tensor."""


def wrap(batch: TileBatch) -> Parcel:
    """The batch as a parcel; its tensors are copied."""
    pieces: list[tuple[Slot, Tensor]] = []

    def place(tensor: Tensor) -> Slot:
        start = -(-pieces[-1][0].stop // _ALIGNED) * _ALIGNED if pieces else 0
        pieces.append((Slot(start, start + tensor.nbytes, tensor.dtype, tuple(tensor.shape)), tensor))
        return pieces[-1][0]

    marked = _replaced(batch, Tensor, place)
    memory = torch.empty(pieces[-1][0].stop, dtype=torch.uint8)
    for slot, tensor in pieces:
        _seen(memory, slot).copy_(tensor)
    return Parcel(memory, marked)


def unwrap(parcel: Parcel) -> TileBatch:
    """The batch that `wrap` was given; its tensors share the parcel's memory."""
    batch: TileBatch = _replaced(parcel.batch, Slot, lambda slot: _seen(parcel.memory, slot))
    return batch


def _seen(memory: Tensor, slot: Slot) -> Tensor:
    return memory[slot.start : slot.stop].view(slot.dtype).view(slot.shape)


def _replaced(value: Any, kind: type, by: Callable[[Any], Any]) -> Any:
    """`value` with what is of a kind, in dicts within dicts, replaced."""
    if isinstance(value, dict):
        return {name: _replaced(each, kind, by) for name, each in value.items()}
    return by(value) if isinstance(value, kind) else value


class TileLoader(DataLoader[TileBatch]):
    """A DataLoader of batches of tiles, however its reading processes hand them over."""

    def __iter__(self) -> Any:
        """Batches; a generator."""
        for batch in super().__iter__():
            yield unwrap(batch) if isinstance(batch, Parcel) else batch
