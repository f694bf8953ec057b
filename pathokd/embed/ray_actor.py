"""The process on a Ray cluster that embeds slides; it asks Ray for nothing but whether it should stop."""

import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from pathokd._version import __version__
from pathokd.embed.embedder import Embedder
from pathokd.embed.engine import J, R, Work
from pathokd.models import Encoder
from pathokd.models.device import keep_freed_memory
from pathokd.progress import Bars

T = TypeVar("T")


class Stopped(Exception):  # noqa: N818 (no error: the user asked for it)
    """Leaves a slide of a run that was interrupted; nothing of it has been written yet."""


class User(NamedTuple):
    """The calling process, as far as an actor has to be like it."""

    version: str
    folder: str
    out: str
    settings: dict[str, Any]
    """Of the `Embedder`."""


class _Unseen(Bars):
    """The bars of an actor: nobody sees them, and a stopped run is noticed where they would move."""

    def track(self, items: Iterable[T], description: str, total: int, *, keep: bool = True) -> Iterator[T]:
        import ray

        del description, total, keep
        for item in items:
            if ray.get_runtime_context().is_canceled():
                raise Stopped
            yield item

    def say(self, line: str) -> None:
        del line


class SlideActor:
    """A process with the model in it."""

    def load(self, model: Encoder, user: User) -> str:
        """Take the model, before any work and again when Ray has started the process anew.

        Returns:
            Why results of this process would not be those of the user's; empty if nothing is wrong.
        """
        where = f"The Ray node {os.uname().nodename}"
        if user.version != __version__:
            return f"{where} has pathokd {__version__}, this machine has {user.version}: install the same on all."
        if not Path(user.out).is_dir():
            return f"{where} does not see {user.out}: give a folder that all nodes share."
        if Path(user.folder).is_dir():
            os.chdir(user.folder)  # relative paths of slides mean what they mean to the user
        self._embedder = Embedder(model, **user.settings)
        keep_freed_memory(self._embedder.device)
        return ""

    def embed(self, work: Work[J, R], job: J) -> R:
        """One slide."""
        return work(self._embedder, job, _Unseen())
