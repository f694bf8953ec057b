"""The balance rule: weights that keep some terms at a stated share of the loss."""

import torch
from jaxtyping import Float
from torch import Tensor

MAX_WEIGHT = 100.0
"""A term that has all but vanished is not blown up further."""


def balanced_weights(
    means: Float[Tensor, " terms"],
    weights: Float[Tensor, " terms"],
    shares: Float[Tensor, " terms"],
    counts: Float[Tensor, " terms"],
) -> Float[Tensor, " terms"]:
    """Weights under which each term with a share makes up that share of the sum.

    Terms without a share (nan) keep their weight; their sum R is what remains, T = R / (1 - sum of shares) is the
    total, and a term of mean m and share s weighs s T / m. With nothing left over, R = 0, terms with a share weigh 0.

    Args:
        means: recent mean of each term, not negative.
        weights: of the terms without a share.
        shares: of the others, in (0, 1), together below 1; nan for none.
        counts: 1 for the terms that make up the total, 0 for those left out of it (KoLeo, which may be negative).
    """
    shared = ~shares.isnan()
    rest = torch.where(shared, 0.0, counts * weights * means).sum().clamp(min=0)
    total = rest / (1 - shares.nansum())
    solved = (shares * total / means.clamp(min=1e-12)).clamp(max=MAX_WEIGHT)
    return torch.where(shared, solved, weights)
