"""What a vision transformer returns for a tile, and how that becomes one vector."""

from typing import Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

Readout = Literal["cls", "mean", "cls+mean"]
"""`cls`: the class token; `mean`: mean of the patch tokens; `cls+mean`: both, concatenated in that order."""

READOUTS: tuple[Readout, ...] = get_args(Readout)


class Features(NamedTuple):
    """Tokens after the final norm, registers left out.

    `grid` is (rows, columns) of the patch tokens, which are stored row by row: `rows * columns` equals their
    number.
    """

    cls: Float[Tensor, "batch dim"]
    patches: Float[Tensor, "batch tokens dim"]
    grid: tuple[int, int]


def readout(features: Features, kind: Readout) -> Float[Tensor, "batch out"]:
    """Turn features into one vector per tile.

    Args:
        features: what an encoder returned.
        kind: `cls`, `mean` (patch tokens only, registers never enter) or `cls+mean`.

    Returns:
        Shape (batch, dim), or (batch, 2 * dim) for `cls+mean`.

    Raises:
        ValueError: unknown `kind`.
    """
    if kind == "cls":
        return features.cls
    if kind == "mean":
        return features.patches.mean(dim=1)
    if kind == "cls+mean":
        return torch.cat([features.cls, features.patches.mean(dim=1)], dim=-1)
    raise ValueError(f"readout must be one of {', '.join(READOUTS)}, got {kind!r}.")


def readout_dim(embed_dim: int, kind: Readout) -> int:
    """Length of the vector that `readout` makes from tokens of width `embed_dim`.

    Raises:
        ValueError: unknown `kind`.
    """
    if kind not in READOUTS:
        raise ValueError(f"readout must be one of {', '.join(READOUTS)}, got {kind!r}.")
    return 2 * embed_dim if kind == "cls+mean" else embed_dim


def resize_patches(
    patches: Float[Tensor, "batch tokens dim"], grid: tuple[int, int], new_grid: tuple[int, int]
) -> Float[Tensor, "batch new_tokens dim"]:
    """Resample a patch grid, so that a /16 student can be compared with a /14 teacher.

    Bicubic with aligned borders (each grid covers the same tile, from edge to edge); antialiased when it
    shrinks. The same grid returns the input itself.

    Args:
        patches: patch tokens, row by row.
        grid: their (rows, columns).
        new_grid: wanted (rows, columns).

    Returns:
        Shape (batch, new rows * new columns, dim), in the input's dtype; computed in fp32.

    Raises:
        ValueError: the grid does not fit the number of tokens, or a new side is not positive.
    """
    rows, columns = grid
    if rows * columns != patches.shape[1]:
        raise ValueError(
            f"grid {grid} holds {rows * columns} tokens, the patches have {patches.shape[1]}: pass their own grid."
        )
    if min(new_grid) < 1:
        raise ValueError(f"new_grid must have positive sides, got {new_grid}.")
    if grid == new_grid:
        return patches
    image = patches.float().transpose(1, 2).reshape(patches.shape[0], patches.shape[2], rows, columns)
    shrinks = new_grid[0] < rows or new_grid[1] < columns
    resized = F.interpolate(image, size=new_grid, mode="bicubic", align_corners=False, antialias=shrinks)
    return resized.flatten(2).transpose(1, 2).to(patches.dtype)


def pool_patches(
    patches: Float[Tensor, "batch tokens dim"], grid: tuple[int, int], new_grid: tuple[int, int]
) -> Float[Tensor, "batch new_tokens dim"]:
    """Average a patch grid over the cells of a coarser one, each patch weighted by the area it shares with the cell.

    Grids that do not divide each other (14 to 4) so average the same tissue as any other grid does, which is what
    makes a /16 student comparable with a /14 teacher. (1, 1) is the mean of all patches.

    Args:
        patches: patch tokens, row by row.
        grid: their (rows, columns).
        new_grid: wanted (rows, columns), not finer than `grid`.

    Returns:
        Shape (batch, new rows * new columns, dim), fp32.

    Raises:
        ValueError: the grid does not fit the number of tokens, or the new one is finer or empty.
    """
    rows, columns = grid
    if rows * columns != patches.shape[1]:
        raise ValueError(
            f"grid {grid} holds {rows * columns} tokens, the patches have {patches.shape[1]}: pass their own grid."
        )
    if not (1 <= new_grid[0] <= rows and 1 <= new_grid[1] <= columns):
        raise ValueError(f"new_grid must lie between (1, 1) and {grid}, got {new_grid}.")
    down, across = (_cell_weights(*sides).to(patches.device) for sides in zip(grid, new_grid, strict=True))
    image = patches.float().reshape(patches.shape[0], rows, columns, patches.shape[2])
    with torch.autocast(image.device.type, enabled=False):
        return torch.einsum("ir,jc,brcd->bijd", down, across, image).flatten(1, 2)


def _cell_weights(old: int, new: int) -> Tensor:
    """Row i: the share of each of `old` equal intervals in the i-th of `new`; rows sum to 1. Shape (new, old)."""
    # In units of 1 / (old * new) all borders are whole numbers.
    edges, cells = torch.arange(old + 1) * new, torch.arange(new + 1) * old
    low = torch.maximum(edges[:-1], cells[:-1, None])
    high = torch.minimum(edges[1:], cells[1:, None])
    return (high - low).clamp(min=0) / old
