"""How alike two sets of features are: cosine per row, linear CKA, and how far matches stand out from chance.

Everything runs in fp32 or wider whatever comes in: half precision overflows the norm of features near 256 and
quantises a cosine to 5e-4, which punishes exactly the models that change least.
"""

import torch
from jaxtyping import Float
from torch import Tensor

ROWS = 4096
"""Rows widened to fp64 at once, so that normalising a large array needs no second one twice its size."""


def unit_rows(x: Float[Tensor, "n dim"], name: str = "features") -> Float[Tensor, "n dim"]:
    """Rows scaled to length one, so that a dot product is a cosine.

    Norms are taken in fp64 and the result is fp32 (fp64 for fp64 input): very long or very short rows neither
    overflow nor vanish.

    Args:
        x: Features of any floating dtype.
        name: What to call `x` in an error.

    Returns:
        Unit rows, shape (n, dim).

    Raises:
        ValueError: A row is zero, or holds NaN or infinity, so it has no direction.
    """
    if x.ndim != 2 or 0 in x.shape:
        raise ValueError(f"{name} should have shape (n, dim) with at least one row, got {tuple(x.shape)}.")
    if x.device.type == "mps":  # which has no fp64
        return unit_rows(x.cpu(), name).to(x.device)
    unit = torch.empty(x.shape, dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)
    norm = torch.empty(len(x), dtype=torch.float64, device=x.device)
    for start in range(0, len(x), ROWS):
        rows, part = x[start : start + ROWS].double(), slice(start, start + ROWS)
        norm[part] = torch.linalg.vector_norm(rows, dim=1)
        unit[part] = rows / norm[part, None]
    bad = ~(norm.isfinite() & (norm > 0))
    if bad.any():
        which = bad.nonzero().squeeze(1)
        raise ValueError(
            f"{name} has {which.numel()} of {len(x)} rows that are zero or not finite (the first is row "
            f"{int(which[0])}); leave those tiles out or find out why the model gives no direction for them."
        )
    return unit


def cosine(a: Float[Tensor, "n dim"], b: Float[Tensor, "n dim"]) -> Float[Tensor, " n"]:
    """Cosine between row i of `a` and row i of `b`.

    Read it beside `separation`: a collapsed model has a perfect cosine.

    Args:
        a: Features of n tiles.
        b: Features of the same tiles, in the same space.

    Returns:
        Cosines in [-1, 1], shape (n,).

    Raises:
        ValueError: The shapes differ, or a row has no direction.
    """
    _same_shape(a, b)
    wide = torch.promote_types(a.dtype, b.dtype)
    dots = (unit_rows(a.to(wide), "a") * unit_rows(b.to(wide), "b")).sum(dim=1)
    return dots.clamp(-1.0, 1.0)


def separation(a: Float[Tensor, "n dim"], b: Float[Tensor, "n dim"]) -> Float[Tensor, ""]:
    """Mean cosine of matched rows minus mean cosine of all mismatched rows, (i, j) with i != j.

    High cosine alone may be collapse; a model that tells tissues apart keeps this difference large. The
    mismatched mean is exact and cheap, as the sum over all pairs is the dot product of two sums.

    Args:
        a: Features of n >= 2 tiles under one condition.
        b: Features of the same tiles under another.

    Returns:
        A scalar in [-2, 2]; 0 for a constant encoder.

    Raises:
        ValueError: The shapes differ, there is one row only, or a row has no direction.
    """
    _same_shape(a, b)
    n = a.shape[0]
    if n < 2:
        raise ValueError(f"separation compares tiles with other tiles and needs at least 2 rows, got {n}.")
    u, v = unit_rows(a, "a").double(), unit_rows(b, "b").double()
    matched = (u * v).sum()
    everything = u.sum(dim=0) @ v.sum(dim=0)
    return matched / n - (everything - matched) / (n * (n - 1))


def linear_cka(a: Float[Tensor, "n dim_a"], b: Float[Tensor, "n dim_b"]) -> Float[Tensor, ""]:
    """Linear centred kernel alignment: do two models arrange the same tiles alike, up to rotation and scale.

    CKA = |A'B|_F^2 / (|A'A|_F |B'B|_F) with centred columns. Memory grows with dim_a * dim_b and not with n
    * n. The estimate is biased upwards while n is not well above the dimensions, so state n beside it.

    Args:
        a: Features of n >= 2 tiles from one model.
        b: Features of the same tiles from another; the dimension may differ.

    Returns:
        A scalar in [0, 1] (fp64); 0 if a model gives every tile the same features, as nothing is shared then.

    Raises:
        ValueError: Different n, fewer than 2 rows, or values that are not finite.

    Reference:
        Kornblith et al. 2019, "Similarity of Neural Network Representations Revisited", equation 5 and
        section 3.
    """
    if a.shape[0] != b.shape[0] or a.shape[0] < 2:
        raise ValueError(f"a and b should hold the same tiles, at least 2: got {a.shape[0]} and {b.shape[0]} rows.")
    A, B = _centred(a, "a"), _centred(b, "b")
    norm_a, norm_b = torch.linalg.matrix_norm(A.T @ A), torch.linalg.matrix_norm(B.T @ B)
    if norm_a == 0 or norm_b == 0:
        return A.new_zeros(())
    cka: Tensor = (A.T @ B).square().sum() / (norm_a * norm_b)
    return cka


def _centred(x: Tensor, name: str) -> Tensor:
    """Columns with mean zero, largest entry one; a matrix that is rounding noise of its mean becomes 0."""
    if not bool(x.isfinite().all()):
        raise ValueError(f"{name} holds NaN or infinity; leave those tiles out before comparing models.")
    wide = x.double()
    centred = wide - wide.mean(dim=0)
    largest = centred.abs().max()
    if largest <= 1e-12 * wide.abs().max():
        return torch.zeros_like(centred)
    return centred / largest


def _same_shape(a: Tensor, b: Tensor) -> None:
    if a.shape != b.shape:
        raise ValueError(f"a and b should be the same tiles in one space, got {tuple(a.shape)} and {tuple(b.shape)}.")
