"""Slides on a Ray cluster: actors hold the model, this process hands out slides and collects outcomes.

The loop is Ray's own pattern of bounded work in flight (`ray.wait`), one slide to an actor. Two of Ray's helpers do not
fit: `ray.util.ActorPool` raises a task's error without saying whose it was, and `max_task_retries` ties a slide to the
actor that died, so that after the loss of a node it would wait for a place that may never come. A slide whose process
died therefore goes back to the queue, for whichever actor is free; starting the actor anew is left to Ray.
"""

import logging
import os
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from pathokd._version import __version__
from pathokd.embed.embedder import Embedder, Precision
from pathokd.embed.engine import J, R, Work
from pathokd.embed.ray_actor import SlideActor, User
from pathokd.errors import PathokdError
from pathokd.progress import Bars

ATTEMPTS = 3
"""Processes a slide may cost before it is given up: a slide that exhausts a machine's memory does so every time."""
RESTARTS = 10
"""Times Ray starts an actor anew. The limit ends the loop of a model that cannot even be loaded."""
PATIENCE_S = 60.0
"""Seconds without any actor at work before the user is told what is being waited for."""
STOPPING_S = 20.0
"""Seconds given to actors to leave their slide, which they do between two batches, before they are killed."""


class RayEngine:
    """Embeds on the cluster named by RAY_ADDRESS, or on a Ray of its own on this machine.

    Every actor takes one GPU, where there are any, and `workers` CPUs: its reading threads, and without a GPU the
    threads of the model too. Slides are read and their files written by the actors, so both have to lie where all
    nodes see them under one path. A connection to Ray that exists already is used, and left open.

    Args:
        device: `auto`, `cpu` or `cuda`; which GPU is for Ray to say.
        precision: As `Embedder` takes it; `auto` is settled by the cluster's devices.
        workers: CPUs of an actor.
        out: Folder the actors write to; made here, and looked for by every actor before it gets work.

    Raises:
        ValueError: Another device.
        PathokdError: Ray is missing, its cluster cannot be reached, or no node has room for one actor.
    """

    def __init__(self, device: str, precision: Precision, workers: int, out: Path) -> None:
        if device not in ("auto", "cpu", "cuda"):
            raise ValueError(f"device should be auto, cpu or cuda where Ray shares out GPUs, got {device!r}.")
        if workers < 1:
            raise ValueError(f"workers should be at least 1, got {workers}.")
        self.device = "cpu"  # the model passes through this process on its way to the actors
        self.precision: Precision = precision
        self._wanted, self._workers, self._out = device, workers, out.absolute()
        self._actors: list[Any] = []
        self._running: dict[Any, tuple[Any, Any]] = {}
        self._trouble = ""

    def __enter__(self) -> "RayEngine":
        self._ray, self._ours = _connect()
        try:
            nodes = [node["Resources"] for node in self._ray.nodes() if node["Alive"]]
            self._gpus = self._wanted != "cpu" and any(node.get("GPU", 0) >= 1 for node in nodes)
            if self._wanted == "cuda" and not self._gpus:
                raise PathokdError("The Ray cluster has no GPU: give --device cpu, or add a node that has one.")
            self._places = sum(self._room(node) for node in nodes)
            if not self._places:
                need = f"{self._workers} CPUs" + (" and a GPU" if self._gpus else "")
                raise PathokdError(f"No node of the Ray cluster has {need}: give fewer --workers, or larger nodes.")
            self._out.mkdir(parents=True, exist_ok=True)
        except BaseException:
            self.__exit__()
            raise
        if self.precision == "auto":
            self.precision = "bf16" if self._gpus else "fp32"
        return self

    def __exit__(self, *exc: object) -> None:
        """Stop what still runs, and leave Ray as it was found."""
        try:
            for ref in self._running:
                self._ray.cancel(ref)
            if self._running:
                self._ray.wait([*self._running], num_returns=len(self._running), timeout=STOPPING_S)
        finally:  # whoever presses Ctrl-C twice does not want to wait
            for actor in self._actors:
                self._ray.kill(actor)
            self._running, self._actors = {}, []
            if self._ours:
                self._ray.shutdown()

    def run(
        self, work: Work[J, R], embedder: Embedder, jobs: Sequence[J], lost: Callable[[J, str], R], bars: Bars
    ) -> Iterator[R]:
        """See `Engine.run`. A slide is given up when it has cost `ATTEMPTS` processes.

        Raises:
            PathokdError: Actors cannot see the output folder or run another pathokd, or every one of them is dead; or
                what `work` raised of this kind.
        """
        ray, todo = self._ray, deque(jobs)
        cost: Counter[int] = Counter()
        starting = {self._load(actor): actor for actor in self._start(embedder, min(self._places, len(jobs)))}
        idle: list[Any] = []
        while todo or self._running:
            if not (starting or self._running):
                raise PathokdError(f"Ray has no process left for the other {len(todo)} slides: {self._trouble}")
            done, _ = ray.wait([*self._running, *starting], timeout=PATIENCE_S)
            if not (done or self._running):
                bars.say("Waiting for a process of Ray's to have the model; `ray status` tells which places are free.")
            finished: list[R] = []
            for ref in done:
                if ref in starting:
                    actor = starting.pop(ref)
                    idle += [actor] if self._is_ready(ref, bars) else []
                    continue
                actor, job = self._running.pop(ref)
                try:
                    finished.append(ray.get(ref))
                    idle.append(actor)
                except ray.exceptions.RayTaskError as error:
                    if isinstance(error.cause, PathokdError):  # the output folder's trouble, which all slides have
                        raise error.cause from None
                    bars.say(str(error))  # the traceback: a defect of the program, or of a library below it
                    finished.append(lost(job, f"{_gist(error)} (the log has the traceback)"))
                    idle.append(actor)
                except ray.exceptions.RayError as error:  # its process is dead, or its node
                    self._trouble = _gist(error)
                    cost[id(job)] += 1
                    if cost[id(job)] < ATTEMPTS:
                        todo.append(job)  # last, so that a slide that kills holds up no other
                    else:
                        why = f"{ATTEMPTS} processes died on this slide, the last one so: {self._trouble}"
                        finished.append(lost(job, why))
                    starting[self._load(actor)] = actor
            while todo and idle:
                actor, job = idle.pop(), todo.popleft()
                self._running[actor.embed.remote(work, job)] = (actor, job)
            yield from finished

    def _is_ready(self, ref: Any, bars: Bars) -> bool:
        """Whether an actor has the model; false if it cannot load it, or Ray has given it up."""
        try:
            complaint = self._ray.get(ref)
        except self._ray.exceptions.RayError as error:
            self._trouble = _gist(error)
            bars.say(f"A process of Ray's is left out: {self._trouble}")
            return False
        if complaint:
            raise PathokdError(complaint)
        return True

    def _room(self, node: dict[str, float]) -> int:
        """How many actors fit on a node."""
        fitting = int(node.get("CPU", 0)) // self._workers
        return min(fitting, int(node.get("GPU", 0))) if self._gpus else fitting

    def _start(self, embedder: Embedder, number: int) -> list[Any]:
        """Ask for actors; those that find no free place wait in Ray, and nothing waits for them here."""
        settings = {
            "readout": embedder.readout,
            "precision": embedder.precision,
            "device": "cuda" if self._gpus else "cpu",
            "batch_size": embedder.batch_size,
            "compile": embedder.compiled,
        }
        self._user = User(__version__, os.getcwd(), str(self._out), settings)
        # The weights travel through the object store, once to each node, and are those whose hash is in the headers. A
        # path would have to exist on all nodes and could have changed; a hub name would be fetched by every actor.
        self._model = self._ray.put(embedder.encoder)
        kind = self._ray.remote(SlideActor).options(
            num_cpus=self._workers, num_gpus=int(self._gpus), max_restarts=RESTARTS, max_task_retries=0
        )
        self._actors = [kind.remote() for _ in range(number)]
        return self._actors

    def _load(self, actor: Any) -> Any:
        """Comes back once the actor has the model, however long Ray takes to start it, or to start it anew."""
        return actor.load.options(max_task_retries=-1).remote(self._model, self._user)


def _connect() -> tuple[Any, bool]:
    """Ray, connected, and whether the connection is ours to close."""
    try:
        import ray
    except ImportError:
        raise PathokdError("The engine ray needs Ray, which is not installed: pip install 'pathokd[ray]'.") from None
    if ray.is_initialized():
        return ray, False
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # pathokd reports to nobody
    # Ray left alone would join any Ray that this user runs on this machine.
    address = os.environ.get("RAY_ADDRESS") or "local"
    dashboard = False if address == "local" else None  # None: not for us to say
    try:
        ray.init(address, include_dashboard=dashboard, logging_level=logging.ERROR, log_to_driver=False)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise PathokdError(f"Ray at {address} cannot be used: {error}") from error
    return ray, True


def _gist(error: BaseException) -> str:
    """What an error of Ray says in the end; the lines before it are a traceback."""
    lines = str(error).strip().splitlines()
    return lines[-1].strip() if lines else type(error).__name__
