"""Weights that follow running means: terms with a stated share of the loss keep it as the others fall."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from pathokd.distill.objective import Objective
from pathokd.losses import SpreadLoss
from pathokd.losses.balance import balanced_weights
from pathokd.processes import mean_over_processes

MOMENTUM = 0.98
"""Of the running means: they look back some fifty batches."""


class Balance(nn.Module):
    """Weights of the objectives. The means are part of the checkpoint, so a resumed run goes on with the same weights.

    Args:
        objectives: with their weights and shares. KoLeo is no part of the total that shares are of.

    Raises:
        ValueError: shares that leave nothing to the other terms, or no other term to have a share beside.
    """

    means: Tensor
    batches: Tensor
    weights: Tensor
    shares: Tensor
    counts: Tensor

    def __init__(self, objectives: Sequence[Objective]) -> None:
        super().__init__()
        shares = [float("nan") if objective.share is None else objective.share for objective in objectives]
        counts = [0.0 if isinstance(objective.loss, SpreadLoss) else 1.0 for objective in objectives]
        others = [o for o, n in zip(objectives, counts, strict=True) if o.share is None and n and o.weight > 0]
        total = sum(objective.share or 0.0 for objective in objectives)
        if total >= 1 or not others:
            raise ValueError(
                f"The shares {[o.share for o in objectives if o.share is not None]} must add up to less than 1 and "
                "leave the rest to an objective with a weight, which sets the scale: give one of them a weight."
            )
        self.register_buffer("means", torch.zeros(len(objectives)))
        self.register_buffer("batches", torch.zeros((), dtype=torch.int64))
        weights = [objective.weight for objective in objectives]
        for name, values in (("weights", weights), ("shares", shares), ("counts", counts)):
            self.register_buffer(name, torch.tensor(values), persistent=False)

    @torch.no_grad()
    def update(self, parts: Float[Tensor, " objectives"]) -> None:
        """Take in the unweighted parts of a batch, averaged over all processes."""
        now = mean_over_processes(parts.float())
        self.means.mul_(MOMENTUM).add_(now, alpha=1 - MOMENTUM)
        self.batches += 1

    @torch.no_grad()
    def now(self) -> Float[Tensor, " objectives"]:
        """The weights at this moment."""
        # Means start at 0: without the division the first weights would not depend on the parts alone.
        means = self.means / (1 - MOMENTUM ** self.batches.clamp(min=1))
        return balanced_weights(means, self.weights, self.shares, self.counts)
