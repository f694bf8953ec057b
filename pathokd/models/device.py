"""Where models run, in what arithmetic, and what memory they keep."""

import ctypes
import os
import sys
import time
from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

SLOW_BF16 = 1.5
"""Times as long as fp32, from which on it is said."""

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
_MALLOC_SETTINGS = ("GLIBC_TUNABLES", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TOP_PAD_", "MALLOC_TRIM_THRESHOLD_")


def choose_device(name: str) -> torch.device:
    """The device of that name; `auto` is CUDA if there is one, else the CPU.

    Raises:
        ValueError: no such device, or torch has none here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    wanted = f"device must be auto, cpu, cuda, cuda:N or mps, got {name!r}."
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(wanted) from error
    if device.type not in ("cpu", "cuda", "mps"):
        raise ValueError(wanted)
    found = {"cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}
    count = found.get(device.type, 1)
    if (device.index or 0) >= count:
        raise ValueError(
            f"device {name} was asked for and torch sees {count} {device.type} device(s) here: take auto or cpu."
        )
    return device


def double(x: Tensor) -> Tensor:
    """In fp64, on its device; on the CPU if that is Apple's MPS, which has none."""
    return x.cpu().double() if x.device.type == "mps" else x.double()


@cache
def bf16_time() -> float:
    """Time of a matrix product in bf16 over that in fp32, on the CPU: many processors are slower in it."""

    def seconds(dtype: torch.dtype) -> float:
        # Nothing drawn: a training that measures this as it is resumed has its random state back already.
        tokens, weight = torch.ones(1024, 384, dtype=dtype), torch.ones(1536, 384, dtype=dtype)
        times = []
        for _ in range(3):
            started = time.perf_counter()
            torch.nn.functional.linear(tokens, weight)
            times.append(time.perf_counter() - started)
        return min(times)

    return seconds(torch.bfloat16) / seconds(torch.float32)


def bf16_advice(device: torch.device, instead: Sequence[str]) -> str:
    """A sentence where bf16 was asked for and only costs time, or nothing.

    Args:
        device: where it was asked for.
        instead: settings that take fp32, empty if bf16 was not asked for.
    """
    if not instead or device.type != "cpu" or bf16_time() < SLOW_BF16:
        return ""
    return f"This CPU takes {bf16_time():.1f} times as long in bf16 as in fp32: better {' and '.join(instead)}."


def keep_freed_memory(device: torch.device) -> None:
    """Have glibc keep what this process frees, for a model on the CPU: the next batch asks for the same again.

    By itself it gives up to hundreds of MB back to the system after a batch, and the next one waits for each page.
    On another device, where malloc is not glibc's, or where the environment sets it already, this does nothing.
    """
    if device.type != "cpu" or sys.platform != "linux" or any(os.environ.get(name) for name in _MALLOC_SETTINGS):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # musl has none
    # Old releases take 32 MiB at most. Trimming is not spoken of if they take neither: that alone would also end
    # glibc's own raising of the other threshold, which begins at 128 kB.
    if mallopt is not None and any(mallopt(_M_MMAP_THRESHOLD, most) for most in (1 << 30, 1 << 25)):
        mallopt(_M_TRIM_THRESHOLD, (1 << 31) - 1)
