"""Matrix products exact enough to rank by: true fp32 whatever training allowed, and how close is equal."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Multiply matrices in true fp32 for a while, whatever TF32 or autocast setting training left behind.

    TF32 and bf16 keep three digits of a cosine, which decides ranks by chance; `pathokd fit` allows TF32 for the
    whole process, and its validation calls these measures.
    """
    before = _get_precision()
    _set_precision(["ieee" for _ in before])
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        _set_precision(before)


def _backends() -> list[Any]:
    """Where torch 2.9 and later keep the precision of matrix products; empty before."""
    found: list[Any] = [torch.backends.cuda.matmul, getattr(torch.backends.mkldnn, "matmul", None)]
    return [backend for backend in found if hasattr(backend, "fp32_precision")]


def _get_precision() -> list[str]:
    # Not `torch.get_float32_matmul_precision`: it raises once anybody has set one of these.
    return [backend.fp32_precision for backend in _backends()] or [torch.get_float32_matmul_precision()]


def _set_precision(values: list[str]) -> None:
    backends = _backends()
    for backend, value in zip(backends, values, strict=bool(backends)):
        backend.fp32_precision = value
    if not backends:
        torch.set_float32_matmul_precision("highest" if values == ["ieee"] else values[0])


def rounding_margin(dim: int, dtype: torch.dtype) -> float:
    """How far two equal dot products of unit rows may lie apart when different kernels made them.

    The error of a sum of `dim` products grows with sqrt(dim); similarities closer than this count as tied.
    """
    return (4 + math.sqrt(dim)) * torch.finfo(dtype).eps
