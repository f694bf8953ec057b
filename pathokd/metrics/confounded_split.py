"""Training sets of rising Cramér's V between class and centre, from what labels there are.

A cell is one class in one centre; tables have classes down and centres across.
"""

from typing import NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from pathokd.metrics.neighbours import Labels

Rows: TypeAlias = npt.NDArray[np.intp]
Table: TypeAlias = npt.NDArray[np.integer]
TEST_SHARE, VALIDATION_SHARE = 0.3, 0.1
"""Of the slides that hold a class in a centre; each at least one slide."""
DEALS = 100
"""Tries to give every pool every class."""


class Pools(NamedTuple):
    """Rows dealt to three purposes; no slide serves two."""

    train: list[list[Rows]]
    """Per class and centre, in random order."""
    validation: list[list[Rows]]
    test: Rows


def cramers_v(table: Table) -> float:
    """Cramér's V of a table of counts: 0 independent, 1 one tells the other.

    Args:
        table: (classes, centres), at least 2 by 2, no empty row or column.

    Returns:
        V.

    Reference:
        Cramér 1946, "Mathematical Methods of Statistics", chapter 21; without correction for bias.
    """
    n = table.sum()
    expected = table.sum(axis=1, keepdims=True) * table.sum(axis=0, keepdims=True) / n
    chi2 = ((table - expected) ** 2 / expected).sum()
    return float(np.sqrt(chi2 / (n * (min(table.shape) - 1))))


def coupling(classes: int, centres: int) -> npt.NDArray[np.float64]:
    """The closest tie of classes to centres that keeps all classes and all centres equally large.

    Both are laid along the unit interval, each in equal parts; a cell is as large as its class and its centre
    overlap. Equal numbers give the diagonal, twice as many classes as centres give two classes to each.

    Args:
        classes: How many classes.
        centres: How many centres.

    Returns:
        Shares that sum to 1, shape (classes, centres).
    """
    a, b = np.arange(classes + 1) / classes, np.arange(centres + 1) / centres
    overlap = np.minimum(a[1:, None], b[None, 1:]) - np.maximum(a[:-1, None], b[None, :-1])
    shares: npt.NDArray[np.float64] = np.maximum(overlap, 0.0) / np.maximum(overlap, 0.0).sum()
    return shares


def split_counts(capacity: Table, splits: int) -> Table:
    """How many training tiles each split takes from each cell: from equal shares to `coupling`, in equal steps.

    Classes are equally large in all splits, and so are centres but for rounding; V rises in equal steps but for
    rounding. As many tiles as the cells allow are used.

    Args:
        capacity: (classes, centres) tiles there are in each cell, at least 1.
        splits: How many, at least 2.

    Returns:
        Counts, shape (splits, classes, centres).

    Raises:
        ValueError: Fewer than two splits, classes or centres, or a cell without tiles.
    """
    classes, centres = capacity.shape
    if splits < 2 or classes < 2 or centres < 2 or capacity.min() < 1:
        raise ValueError(
            f"rising confounding needs 2 splits, 2 classes and 2 centres, and tiles in every cell; got {splits} splits "
            f"and {capacity.tolist()} tiles (classes by centres)."
        )
    even, tied = np.full((classes, centres), 1 / (classes * centres)), coupling(classes, centres)
    # Shares change linearly, so if both ends fit, all do. The balanced split shall hold whole tiles in each cell.
    largest = np.maximum(even, tied)
    total = classes * centres * int((capacity / largest).min() / (classes * centres) + 1e-9)
    strength = np.linspace(0.0, 1.0, splits)[:, None, None]
    wanted = total * ((1 - strength) * even + strength * tied)
    # Rounded down, then the largest remainders of each class up, so that its size is kept.
    counts = np.floor(wanted + 1e-9).astype(int)
    missing = total // classes - counts.sum(axis=2)
    by_rest = np.argsort(-(wanted - counts), axis=2, kind="stable")
    rank = np.argsort(by_rest, axis=2, kind="stable")
    rounded: Table = counts + (rank < missing[:, :, None])
    return rounded


def deal_pools(bio: Labels, confounder: Labels, units: Labels, rng: np.random.Generator) -> Pools:
    """Deal the slides of each centre to training, validation and test so that each holds every class.

    Args:
        bio: (n,) biological class of each tile.
        confounder: (n,) centre of each, which holds every class.
        units: (n,) slide of each.
        rng: Source of chance.

    Returns:
        The pools, cells in the order of sorted labels.

    Raises:
        ValueError: A class has fewer than three slides in a centre, or no deal was found.
    """
    names, y = np.unique(bio, return_inverse=True)
    centres = np.unique(confounder)
    purpose = np.empty(len(y), dtype=int)
    for centre in centres:
        here = np.flatnonzero(confounder == centre)
        slide = np.unique(units[here], return_inverse=True)[1]
        holds = np.zeros((slide.max() + 1, len(names)), dtype=bool)
        holds[slide, y[here]] = True
        fewest = int(holds.sum(axis=0).argmin())
        if holds[:, fewest].sum() < 3:
            raise ValueError(
                f"class {names[fewest]!s} has {holds[:, fewest].sum()} slides in centre {centre!s}, but training, "
                "validation and test need one each; pass finer groups, or leave the class or the centre out."
            )
        dealt = _deal(holds, rng)
        if dealt is None:
            raise ValueError(
                f"the slides of centre {centre!s} cannot be dealt so that training, validation and test all hold every "
                "class; pass finer groups, or leave a rare class out."
            )
        purpose[here] = dealt[slide]
    cells = [
        [[rng.permutation(np.flatnonzero((purpose == p) & (y == c) & (confounder == m))) for m in centres]
         for c in range(len(names))]
        for p in range(2)
    ]  # fmt: skip
    return Pools(cells[0], cells[1], np.flatnonzero(purpose == 2))


def _deal(holds: npt.NDArray[np.bool_], rng: np.random.Generator) -> Rows | None:
    """0 training, 1 validation, 2 test for each slide of one centre, by the classes that slides hold."""
    slides = holds.sum(axis=0)
    for _ in range(DEALS):
        purpose = np.full(len(holds), -1)
        for c in np.argsort(slides, kind="stable"):  # the rarest class first
            free = rng.permutation(np.flatnonzero(holds[:, c] & (purpose < 0)))
            for which, share in ((2, TEST_SHARE), (1, VALIDATION_SHARE)):
                wanted = max(1, round(share * slides[c])) - int((holds[:, c] & (purpose == which)).sum())
                chosen, free = np.split(free, [max(0, wanted)])
                purpose[chosen] = which
            purpose[free] = 0
        if all(holds[purpose == which].any(axis=0).all() for which in range(3)):
            return purpose
    return None


def take(cells: list[list[Rows]], counts: Table) -> Rows:
    """The first rows of each cell, as many as the table says."""
    return np.concatenate([cells[c][m][:count] for (c, m), count in np.ndenumerate(counts)])


def sizes(cells: list[list[Rows]]) -> Table:
    """How many rows each cell holds."""
    return np.array([[len(rows) for rows in row] for row in cells])
