"""Which engines there are: this process, or the processes of a Ray cluster."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import get_args

from pathokd.embed.embedder import Embedder, Precision
from pathokd.embed.engine import Engine, EngineName, J, R, Work
from pathokd.embed.ray_engine import RayEngine
from pathokd.progress import Bars


class LocalEngine:
    """One slide after another, in this process."""

    def __init__(self, device: str, precision: Precision) -> None:
        self.device, self.precision = device, precision

    def __enter__(self) -> "LocalEngine":
        return self

    def __exit__(self, *exc: object) -> None:
        pass

    def run(
        self, work: Work[J, R], embedder: Embedder, jobs: Sequence[J], lost: Callable[[J, str], R], bars: Bars
    ) -> Iterator[R]:
        """See `Engine.run`; no job is lost while its process lives."""
        del lost
        return (work(embedder, job, bars) for job in jobs)


def open_engine(
    name: EngineName, device: str, precision: Precision, workers: int, out: Path
) -> AbstractContextManager[Engine]:
    """The engine of that name, to be entered.

    Args:
        name: `local` or `ray`.
        device: As the user gave it.
        precision: As the user gave it.
        workers: Reading threads of one process.
        out: Folder for results.

    Raises:
        ValueError: An unknown name, or a device the engine cannot give.
        PathokdError: Ray is not installed or its cluster cannot be used (when entered).
    """
    if name not in get_args(EngineName):
        raise ValueError(f"engine should be one of {', '.join(get_args(EngineName))}, got {name!r}.")
    if name == "local":
        return LocalEngine(device, precision)
    return RayEngine(device, precision, workers, out)
