"""Typed neighbours: is who stands next to a tile of its tissue, of its scanner, of both or of neither.

Types follow PathoROB: the first letter says Same or Other biology, the second Same or Other confounder (centre or
scanner). Tiles of the query's own group (slide) are left out. Neighbours that are equally far, to rounding, share
their ranks: each rank of a tie holds the tie's mixture of types. So the order of a table never decides, and a
collapsed encoder shows the mixture of the whole gallery. Similarities are made in fp64, where a tie is a tie: models
with a large common part have cosines so close that fp32 could not order them.
"""

from collections.abc import Iterator
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from pathokd.metrics.precision import full_precision, rounding_margin
from pathokd.metrics.similarity import unit_rows

Labels: TypeAlias = npt.NDArray[Any]
Type: TypeAlias = Literal["SS", "SO", "OS", "OO"]
TYPES: tuple[Type, ...] = ("SS", "SO", "OS", "OO")
CHUNK = 512
"""Queries compared with all tiles at once."""


class Design(NamedTuple):
    """Labels as numbers."""

    bio: Int[Tensor, " n"]
    confounder: Int[Tensor, " n"]
    group: Int[Tensor, " n"]


class Neighbours(NamedTuple):
    """The k nearest tiles of other groups, nearest first, as types; 24 n k bytes."""

    distance: Float[Tensor, "n k"]
    """Cosine distance, fp64; 0 for what rounding cannot tell apart."""
    share: Float[Tensor, "n k 4"]
    """How much of each rank is of each of `TYPES`: one is 1 and three are 0, but for ties."""
    tied: float
    """Share of tiles whose k-th and next neighbour are equally far; near 1 means collapse."""


def typed_neighbours(
    features: Float[Tensor, "n dim"],
    bio: Labels,
    confounder: Labels,
    groups: Labels | None = None,
    k: int = 50,
    *,
    chunk: int = CHUNK,
) -> Neighbours:
    """The k nearest tiles of other groups by cosine, with their types.

    All lists have one length, so k may not exceed the gallery of the tile with the largest group (PathoROB
    truncates to that length; here k says so). Memory is some 20 chunk n bytes beside features in fp64 and the result.

    Args:
        features: Features of n tiles.
        bio: (n,) biological class of each.
        confounder: (n,) centre or scanner of each.
        groups: (n,) slide of each; tiles of one group are never each other's neighbours. None takes each tile for
            itself.
        k: Neighbours of each tile.
        chunk: Queries compared with all tiles at once.

    Returns:
        Distances and types, on the device of the features (the CPU for MPS, which has no fp64).

    Raises:
        ValueError: Labels that do not fit, one class or one confounder only, a class in one centre only, a centre
            with one class only, k beyond the gallery, or a row without direction.

    Reference:
        Koemen et al. 2025, "Towards Robust Foundation Models for Digital Pathology" (PathoROB), robustness index.
    """
    design = encode(features, bio, confounder, groups)
    largest, n = int(design.group.bincount().max()), features.shape[0]
    if not 1 <= k <= n - largest:
        raise ValueError(
            f"k should be 1 to {n - largest}, the gallery that the largest of the groups leaves of {n} tiles, got {k}."
        )
    distance, share, tied = [], [], 0
    margin = rounding_margin(features.shape[1], torch.float64)
    for rows, similarity in similarities(features, design.group, chunk):
        value, order = similarity.topk(min(k + 1, n), dim=1)
        types = type_codes(design, rows)
        part = _shares(value[:, :k], types.gather(1, order[:, :k]), margin)
        # A tie across the end of the list needs all its members, and they may be many. (-inf ends the gallery.)
        across = (value[:, k - 1] - value[:, -1] <= margin).nonzero().squeeze(1) if k < n else rows[:0]
        for row in across.tolist():
            whole, by_rank = similarity[row].sort(descending=True)
            members = int((whole >= value[row, k - 1] - margin).sum())
            while members < n and whole[members - 1] - whole[members] <= margin:
                members += 1
            kinds = types[row, by_rank[:members]]
            part[row] = _shares(whole[None, :members], kinds[None], margin)[0, :k]
        distance.append(_distance(value[:, :k], margin))
        share.append(part)
        tied += len(across)
    return Neighbours(torch.cat(distance), torch.cat(share), tied / n)


def _distance(similarity: Float[Tensor, "rows k"], margin: float) -> Float[Tensor, "rows k"]:
    distance = 1 - similarity
    return distance.masked_fill_(distance <= margin, 0.0)


def _shares(value: Float[Tensor, "rows k"], types: UInt8[Tensor, "rows k"], margin: float) -> Float[Tensor, "rows k 4"]:
    """One-hot types, averaged over ranks that follow each other within the margin."""
    one_hot = torch.nn.functional.one_hot(types.long(), len(TYPES)).float()
    new = torch.ones_like(types, dtype=torch.bool)
    new[:, 1:] = value[:, :-1] - value[:, 1:] > margin
    if bool(new.all()):
        return one_hot
    # A number for every run of tied ranks, none shared by two rows.
    run = new.flatten().cumsum(0) - 1
    flat = one_hot.flatten(0, 1)
    sums = flat.new_zeros(int(run[-1]) + 1, len(TYPES)).index_add_(0, run, flat)
    return (sums / sums.sum(dim=1, keepdim=True))[run].view_as(one_hot)


def encode(features: Float[Tensor, "n dim"], bio: Labels, confounder: Labels, groups: Labels | None) -> Design:
    """Labels as numbers on the device of the features, after a look at whether they allow a comparison.

    Args:
        features: Features of n tiles.
        bio: (n,) biological class of each.
        confounder: (n,) centre or scanner of each.
        groups: (n,) slide of each, or None.

    Returns:
        The design.

    Raises:
        ValueError: As in `typed_neighbours`.
    """
    n = features.shape[0]
    if n == 0:
        raise ValueError("there should be tiles to compare, got none.")
    columns = {"bio": bio, "confounder": confounder, "groups": np.arange(n) if groups is None else groups}
    for name, column in columns.items():
        if column.shape != (n,):
            raise ValueError(f"{name} should have one label for each of the {n} tiles, got shape {column.shape}.")
    check_crossed(bio, confounder)
    codes = [torch.from_numpy(np.unique(column, return_inverse=True)[1]) for column in columns.values()]
    return Design(*(code.to(_device(features)) for code in codes))


def _device(features: Tensor) -> torch.device:
    return torch.device("cpu") if features.device.type == "mps" else features.device


def check_crossed(bio: Labels, confounder: Labels) -> None:
    """Raise ValueError unless every class occurs in two confounders, and every confounder holds two classes."""
    for name, other_name, own, other in (
        ("class", "confounder (centre or scanner)", bio, confounder),
        ("confounder", "class", confounder, bio),
    ):
        for value in np.unique(own):
            found = np.unique(other[own == value])
            if len(found) < 2:
                raise ValueError(
                    f"the {name} {value!s} occurs with one {other_name} only ({found[0]!s}), so nothing tells the two "
                    "apart; leave its tiles out or add others."
                )


def type_codes(design: Design, rows: Int[Tensor, " rows"]) -> UInt8[Tensor, "rows n"]:
    """Type of every tile as seen from some rows: a position in `TYPES`."""
    other_bio = design.bio[rows, None] != design.bio[None]
    other_confounder = design.confounder[rows, None] != design.confounder[None]
    return 2 * other_bio.byte() + other_confounder.byte()


def similarities(
    features: Float[Tensor, "n dim"], group: Int[Tensor, " n"], chunk: int = CHUNK
) -> Iterator[tuple[Int[Tensor, " rows"], Float[Tensor, "rows n"]]]:
    """Cosines of some tiles with all, -inf within a group, chunk by chunk.

    Args:
        features: Features of n tiles.
        group: Number of each tile's group.
        chunk: How many tiles at once.

    Yields:
        Which rows, and their similarities in fp64.
    """
    unit = unit_rows(features.to(_device(features)).detach().double())
    for start in range(0, len(unit), chunk):
        rows = torch.arange(start, min(start + chunk, len(unit)), device=unit.device)
        with full_precision(unit.device):
            similarity = unit[rows] @ unit.T
        yield rows, similarity.masked_fill_(group[rows, None] == group[None], -torch.inf)
