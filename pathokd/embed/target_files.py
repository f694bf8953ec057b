"""The arrays of a targets folder while they are written: appended to, committed, cut back after a kill."""

import contextlib
import io
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import numpy as np
from torch import Tensor

from pathokd.data.targets import StoredArray, bytes_per_tile
from pathokd.errors import StoreError


class AppendedArrays(contextlib.ExitStack):
    """Open `.npy` files that rows are appended to; closed with the context.

    What lies behind the last committed row is cut off first: a killed run may have written half of it. The files are
    not mapped while they are written, because a full disk would then end the process without a word.

    Args:
        folder: of the files.
        arrays: what one row of each is.
        n: rows in the end.
        done: rows that are committed.

    Raises:
        StoreError: committed rows are not there, or another process is writing.
    """

    def __init__(self, folder: Path, arrays: dict[str, StoredArray], n: int, done: int) -> None:
        super().__init__()
        self._arrays, heads = arrays, {name: _head(array, n) for name, array in arrays.items()}
        ends = {name: len(heads[name]) + done * bytes_per_tile({name: array}) for name, array in arrays.items()}
        for name, end in ends.items():
            path = folder / f"{name}.npy"
            size = path.stat().st_size if path.is_file() else 0
            if done and size < end:  # made longer, it would read as zeros
                raise StoreError(
                    f"{path} holds {size} bytes, {done} tiles are committed and take {end}: something cut it off; "
                    "compute the targets again, with --overwrite."
                )
        self._files: dict[str, IO[bytes]] = {}
        with contextlib.ExitStack() as opened:
            for name, end in ends.items():
                path = folder / f"{name}.npy"
                path.touch()
                self._files[name] = file = opened.enter_context(path.open("r+b", buffering=0))
                _lock(file, folder)
                file.write(heads[name])
                file.truncate(end)
                file.seek(0, os.SEEK_END)
            self.push(opened.pop_all())

    def append(self, name: str, rows: Tensor) -> None:
        """Rows of one array."""
        with _full_disk_named(name):
            left = memoryview(rows.cpu().numpy().astype(self._arrays[name].dtype, order="C", copy=False).tobytes())
            while left:  # an unbuffered file may take less than it is given, but keeps nothing that fails at closing
                left = left[self._files[name].write(left) :]

    def commit(self) -> None:
        """See to it that all rows so far are on the disk."""
        for name, file in self._files.items():
            with _full_disk_named(name):
                os.fsync(file.fileno())


def _lock(file: IO[bytes], folder: Path) -> None:
    """Keep other processes from cutting off what this one has written and not committed; ends with the process."""
    if sys.platform == "win32":
        return
    import fcntl

    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise StoreError(
            f"Another process is computing the targets in {folder.parent}: wait until it is done, or name another "
            "folder."
        ) from error
    except OSError:
        pass  # a file system without locks


def _head(array: StoredArray, n: int) -> bytes:
    """What a `.npy` file of `n` rows begins with."""
    buffer = io.BytesIO()
    header = {"descr": array.dtype, "fortran_order": False, "shape": (n, *array.shape)}
    np.lib.format.write_array_header_1_0(buffer, header)
    return buffer.getvalue()


@contextlib.contextmanager
def _full_disk_named(name: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StoreError(
            f"Cannot write {name}.npy: {error.strerror}. Free some space and run the same command again: it goes on "
            "where it stopped."
        ) from error
