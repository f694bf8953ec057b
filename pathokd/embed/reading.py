"""Tiles read by threads ahead of the model, in order and in bounded memory."""

import contextlib
import os
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")
NICENESS = 10
"""Of the reading threads, where the system has one for threads: on a CPU they take turns with those of the model, and a
model that waits for one of its threads waits with all of them."""
AHEAD_BATCHES = 3
"""Batches that may wait for the model: enough to hide reading, few enough to bound memory."""


def read_batches(
    read: Callable[[int], T], rows: Iterable[int], *, batch_size: int, workers: int
) -> Iterator[list[tuple[int, T]]]:
    """Yield (row, what `read` returned) in batches, while threads read the next ones.

    Args:
        read: Called in the threads; an exception is raised here, at the batch it belongs to.
        rows: What to read, in order.
        batch_size: Rows per batch; the last may be smaller.
        workers: Reading threads, at least 1. OpenSlide releases the GIL, so threads read in parallel.

    Raises:
        ValueError: `workers` or `batch_size` is below 1.
    """
    if workers < 1 or batch_size < 1:
        raise ValueError(f"workers and batch_size should be at least 1, got {workers} and {batch_size}.")
    waiting: deque[tuple[int, Future[T]]] = deque()
    batch: list[tuple[int, T]] = []
    todo = iter(rows)
    with ThreadPoolExecutor(workers, thread_name_prefix="tiles", initializer=_give_way) as pool:
        try:
            while True:
                while len(waiting) < AHEAD_BATCHES * batch_size and (row := next(todo, None)) is not None:
                    waiting.append((row, pool.submit(read, row)))
                if not waiting:
                    break
                row, future = waiting.popleft()
                batch.append((row, future.result()))
                if len(batch) == batch_size:
                    yield batch
                    batch = []
            if batch:
                yield batch
        finally:
            for _, future in waiting:
                future.cancel()


def _give_way() -> None:
    """Let this thread wait for those of the model."""
    if sys.platform != "linux":
        return
    thread = threading.get_native_id()
    with contextlib.suppress(OSError):  # where that is forbidden, it is only slower
        os.setpriority(os.PRIO_PROCESS, thread, max(NICENESS, os.getpriority(os.PRIO_PROCESS, thread)))
