"""Where slides are embedded: in this process, or by processes of a Ray cluster. Jobs in, outcomes out."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Literal, Protocol, TypeAlias, TypeVar, get_args

from pathokd.embed.embedder import Embedder, Precision
from pathokd.progress import Bars

EngineName = Literal["local", "ray"]
J = TypeVar("J")
R = TypeVar("R")
Work: TypeAlias = Callable[[Embedder, J, Bars], R]
"""Embeds one slide. What goes wrong with the slide is in its outcome; only a defect of the program is raised."""


class Engine(Protocol):
    """Runs slides on a device it knows of."""

    device: str
    """For `Embedder` in the calling process; elsewhere the engine sees to devices itself."""
    precision: Precision
    """What is meant by `auto` where the model will run, if that is another machine."""

    def run(
        self, work: Work[J, R], embedder: Embedder, jobs: Sequence[J], lost: Callable[[J, str], R], bars: Bars
    ) -> Iterator[R]:
        """Yield one outcome per job, in the order they come.

        Args:
            work: Done for each job; importable, so that another process can do it.
            embedder: The model and how it is run.
            jobs: What to do; each can be pickled.
            lost: Makes the outcome of a job that was given up, from a sentence that says why.
            bars: Where the engine says what a user has to know.
        """
        ...


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
    from pathokd.embed.ray_engine import RayEngine

    return RayEngine(device, precision, workers, out)
