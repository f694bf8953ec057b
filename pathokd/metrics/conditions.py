"""Every pair of many registered conditions, without holding them all: what to load when, and what it takes."""

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pathokd.metrics.paired import CHUNK, TOP_K, PairScores, check_k, compare_pair, own_similarities
from pathokd.metrics.similarity import ROWS, unit_rows
from pathokd.types import IntArray

Load: TypeAlias = Callable[[str], Tensor | npt.NDArray[Any]]
"""Gives the features of a condition, (n, dim), on the device that shall do the work."""
HELD = 8


def compare_conditions(
    names: Sequence[str],
    load: Load,
    k: Sequence[int] = TOP_K,
    *,
    pairs: Sequence[tuple[str, str]] | None = None,
    index: IntArray | None = None,
    held: int = HELD,
    chunk: int = CHUNK,
    tiles: bool = False,
) -> Iterator[PairScores]:
    """Scores of every pair of conditions, one after the other, as they are ready.

    Pairs come grouped so that one `load` serves up to `held - 1` of them: in all some C + C^2 / (2 held - 2) loads
    for C conditions. To resume, pass the `pairs` that are left. `paired_memory` says what it takes.

    Args:
        names: Conditions, say slides.
        load: Features of a condition; row i is the same tissue in all of them.
        k: How many nearest tiles count as found, each 1 to 2n - 1.
        pairs: Pairs to compare, in either order; by default all.
        index: Rows that take part, say a published subset; by default all.
        held: Conditions in memory at once, at least 2.
        chunk: Rows of a product held at once.
        tiles: Keep the scores of every tile.

    Yields:
        One entry per pair; `first` stands before `second` in `names`.

    Raises:
        ValueError: Fewer than two conditions, an unknown or repeated name, shapes that differ, k or index out of
            range, or a row without direction.

    Reference:
        PLISM benchmark (Owkin 2025), top-k accuracy and cosine similarity; ties and self as in `compare_pair`.
    """
    order = {name: position for position, name in enumerate(names)}
    if len(order) < 2 or len(order) < len(names):
        raise ValueError(f"at least two conditions with different names are needed to compare, got {list(names)}.")
    if held < 2:
        raise ValueError(f"held should be at least 2, as a pair needs both conditions in memory, got {held}.")
    wanted = _wanted(order, pairs)
    shelf = _Shelf(load, k, index, chunk)

    def block_pairs(start: int) -> Iterator[PairScores]:
        block = names[start : start + held - 1]
        units = {first: shelf.unit(first) for first in block if any(first in pair for pair in wanted)}
        for second in names[start:]:
            partners = [first for first in block if (first, second) in wanted]
            if not partners:
                continue
            v = units[second] if second in units else shelf.unit(second)
            for first in partners:
                own = shelf.own[first], shelf.own[second]
                yield compare_pair(units[first], v, *own, k, names=(first, second), chunk=chunk, tiles=tiles)
            del v  # before the next one is loaded
        wanted.difference_update(itertools.product(block, names))

    for start in range(0, len(names), held - 1):
        yield from block_pairs(start)


def paired_memory(
    n: int, dim: int, chunk: int = CHUNK, kmax: int = max(TOP_K), conditions: int = 2, held: int = HELD
) -> int:
    """Most bytes that `compare_conditions` holds at once for fp32 features, beside what `load` itself keeps.

    These are: unit rows of `held` conditions and one array as it was loaded, with `ROWS` of it in fp64; `chunk`
    rows of a product and of its comparison; the own lists of all conditions; and some numbers per tile. The libraries'
    own buffers come on top, some 50 MiB.

    Args:
        n: Tiles per condition.
        dim: Length of a feature vector.
        chunk: Rows of a product held at once.
        kmax: The largest k.
        conditions: How many there are.
        held: Conditions in memory at once.

    Returns:
        Bytes; 0.63 GB for 91 conditions of 16,278 tiles in 768 dimensions.
    """
    features = 4 * n * dim * (min(held, conditions) + 1) + 2 * 8 * min(n, ROWS) * dim
    products = 2 * 4 * min(chunk, n) * n
    lists = 4 * n * min(kmax, n - 1) * conditions
    per_tile = 30 * 8 * n
    return features + products + lists + per_tile


class _Shelf:
    """Conditions made ready: unit rows on demand, and own lists, which are small, for good."""

    def __init__(self, load: Load, k: Sequence[int], index: IntArray | None, chunk: int) -> None:
        self.load, self.k, self.index, self.chunk = load, k, index, chunk
        self.own: dict[str, Tensor] = {}
        self.shape: torch.Size | None = None

    def unit(self, name: str) -> Tensor:
        """Unit rows of a condition; its own list is made the first time."""
        unit = unit_rows(_rows(self.load(name), self.index, name), name)
        self.shape = self.shape or unit.shape
        if unit.shape != self.shape:
            raise ValueError(
                f"every condition should have the same tiles in the same order, but {name} has features of shape "
                f"{tuple(unit.shape)} and others have {tuple(self.shape)}."
            )
        check_k(self.k, len(unit))
        if name not in self.own:
            self.own[name] = own_similarities(unit, max(self.k), chunk=self.chunk)
        return unit


def _wanted(order: dict[str, int], pairs: Sequence[tuple[str, str]] | None) -> set[tuple[str, str]]:
    """Pairs to compare, each in the order of the names."""
    if pairs is None:
        return set(itertools.combinations(order, 2))
    for first, second in pairs:
        if first not in order or second not in order or first == second:
            raise ValueError(f"pairs should join two different conditions of {list(order)}, got {(first, second)}.")
    return {(a, b) if order[a] < order[b] else (b, a) for a, b in pairs}


def _rows(x: Tensor | npt.NDArray[Any], index: IntArray | None, name: str) -> Tensor:
    """The rows that take part, as a tensor."""
    if index is not None:
        whole = index.ndim == 1 and len(index) > 0 and np.issubdtype(index.dtype, np.integer)
        if not whole or len(np.unique(index)) < len(index) or index.min() < 0 or index.max() >= len(x):
            raise ValueError(f"index should list rows of {name}, each 0 to {len(x) - 1} and at most once.")
        x = x[torch.from_numpy(index).to(x.device)] if isinstance(x, Tensor) else x[index]
    if isinstance(x, Tensor):
        return x.detach()
    # A copy if need be: torch warns of memory maps that it may not write to.
    return torch.from_numpy(np.require(x, requirements=["C", "W"]))
