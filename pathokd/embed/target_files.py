"""The arrays of a targets folder while they are written: appended to, committed, cut back after a kill."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

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
    """

    def __init__(self, folder: Path, arrays: dict[str, StoredArray], n: int, done: int) -> None:
        super().__init__()
        self._arrays = arrays
        self._files = {}
        for name, array in arrays.items():
            path = folder / f"{name}.npy"
            path.touch()
            self._files[name] = file = self.enter_context(path.open("r+b", buffering=0))
            header = {"descr": array.dtype, "fortran_order": False, "shape": (n, *array.shape)}
            np.lib.format.write_array_header_1_0(file, header)
            file.truncate(file.tell() + done * bytes_per_tile({name: array}))
            file.seek(0, os.SEEK_END)

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


@contextlib.contextmanager
def _full_disk_named(name: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StoreError(
            f"Cannot write {name}.npy: {error.strerror}. Free some space and run the same command again: it goes on "
            "where it stopped."
        ) from error
