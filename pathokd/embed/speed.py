"""Where the time of a run goes, and what would make it faster."""

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields
from typing import Literal, TypeVar

import pandas as pd

from pathokd.processes import usable_cores

T = TypeVar("T")
Part = Literal["wait_s", "preprocess_s", "encode_s"]
LEAST_S = 1.0
"""Shorter runs are mostly start-up and get no advice."""


@dataclass
class Spent:
    """Seconds by part of the work.

    The thread that runs the model does one thing at a time: it waits for tiles, prepares a batch, encodes. Those three
    add up to its time, but for opening slides and writing files. Readers work beside it, so their seconds do not.
    """

    wait_s: float = 0.0
    """The model's thread had no tiles."""
    preprocess_s: float = 0.0
    """Stacking, copying to the device, normalising, resizing. On CUDA only the host's share: what the device does is
    encoding, as the host does not wait in between."""
    encode_s: float = 0.0
    """The forward pass, until the vectors are back."""
    read_s: float = 0.0
    """All readers together, from asking for a tile to having it: disk, decoding, and waiting for a core."""
    read_cpu_s: float = 0.0
    """What of `read_s` a core was at work."""

    def lap(self, part: Part, started: float) -> float:
        """Add the seconds since `started` to a part; returns the present, where the next part starts."""
        now = time.perf_counter()
        setattr(self, part, getattr(self, part) + now - started)
        return now

    def waiting(self, items: Iterable[T]) -> Iterator[T]:
        """Yield `items`, counting the time they take to come as waiting."""
        iterator = iter(items)
        while True:
            started = time.perf_counter()
            try:
                item = next(iterator)
            except StopIteration:
                return
            finally:
                self.lap("wait_s", started)
            yield item


COLUMNS = tuple(field.name for field in fields(Spent))


def speed(summary: pd.DataFrame, *, workers: int, batch_size: int, device: str, cores: int | None = None) -> list[str]:
    """Say how fast a run was, by part, and what held it up.

    Args:
        summary: Rows of `embed_slides` with n_tiles, n_unreadable, seconds and the fields of `Spent`; rows that are
            not `ok` are left out.
        workers: Reading threads.
        batch_size: Tiles per forward pass.
        device: `cpu` or another torch device.
        cores: Of the machine; by default those this process may use.

    Returns:
        No line if nothing was embedded, one if it took less than `LEAST_S`, else two.
    """
    done = summary[summary["status"] == "ok"]
    tiles = int((done["n_tiles"] - done["n_unreadable"]).sum())
    if not tiles:
        return []
    cores = cores or usable_cores()
    total = float(done["seconds"].sum())
    spent = Spent(**{name: float(done[name].sum()) for name in COLUMNS})
    parts = {"waiting": spent.wait_s, "preprocessing": spent.preprocess_s, "encoding": spent.encode_s}
    parts["the rest"] = max(0.0, total - sum(parts.values()))
    shares = ", ".join(f"{name} {seconds / max(total, 1e-9):.0%}" for name, seconds in parts.items())
    rates = {
        f"read {workers} at a time": spent.read_s / workers,
        "preprocess": spent.preprocess_s,
        "encode": spent.encode_s,
    }
    alone = ", ".join(f"{name} {tiles / max(seconds, 1e-9):,.0f}" for name, seconds in rates.items())
    lines = [
        f"{tiles:,} tiles in {total:.1f} s: {tiles / max(total, 1e-9):,.1f} tiles/s "
        f"({alone}; the model's time: {shares})."
    ]
    if total >= LEAST_S:
        slowest = max(parts, key=lambda name: parts[name])
        lines.append(f"Bottleneck: {_advice(slowest, spent, workers, batch_size, device, cores)}")
    return lines


def _advice(slowest: str, spent: Spent, workers: int, batch_size: int, device: str, cores: int) -> str:
    """One sentence on the slowest part."""
    if slowest == "waiting":
        if workers < cores:
            return f"reading; raise --workers from {workers} to {cores}, the cores of this machine."
        if spent.read_cpu_s < 0.5 * spent.read_s:
            return (
                f"reading, and the readers wait more than they decode; copy the slides to a local disk, or raise "
                f"--workers above {workers}."
            )
        return (
            "reading, and all cores decode; share the slides out with --shard, or ask for an --mpp that the slides "
            "store as a level, so that fewer pixels are decoded."
        )
    if slowest == "preprocessing":
        return "preprocessing; cut tiles at the size the model takes (--tile-px), so that nothing is resized."
    if slowest == "encoding":
        if device == "cpu":
            return "the model on the CPU; a GPU, a smaller model or --compile make it faster, more --workers do not."
        return f"the model; try --batch-size {2 * batch_size} or --compile, more --workers do not help."
    return "opening slides and writing files; put slides and output on a local disk, or run several --shard at a time."
