"""What runs the slides of a cohort: jobs in, outcomes out."""

from collections.abc import Callable, Iterator, Sequence
from typing import Literal, Protocol, TypeAlias, TypeVar

from pathokd.embed.embedder import Embedder, Precision
from pathokd.progress import Bars

EngineName = Literal["local", "ray"]
J = TypeVar("J")
R = TypeVar("R")
Work: TypeAlias = Callable[[Embedder, J, Bars], R]
"""Embeds one slide. What goes wrong with the slide is in its outcome. What is raised is a PathokdError, where no other
slide would fare better, such as a full disk, or a defect of the program."""


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
