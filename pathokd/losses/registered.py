"""InfoNCE on registered pairs: a place is to be found again under another condition, among others of its own."""

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor, nn

from pathokd.losses.alignment import directions
from pathokd.processes import gather_equal, gather_rows


def registered_infonce(
    x: Float[Tensor, "batch dim"],
    place: Int64[Tensor, " batch"],
    condition: Int64[Tensor, " batch"],
    temperature: float = 0.07,
) -> Float[Tensor, ""]:
    """Mean over anchors i and their positives p of -log(exp(s_ip) / (exp(s_ip) + sum_n exp(s_in))), s = cos / tau.

    Positives are the same place under another condition. Negatives are other places under the anchor's OWN condition:
    taken from elsewhere, stain and scanner alone would tell them apart, and the loss would teach acquisition. The same
    place under the same condition is neither. An anchor without a positive or a negative adds nothing.

    Args:
        x: one vector per tile, raw; compared on the unit sphere, in fp32.
        place: which tissue; equal numbers are registered with each other.
        condition: which staining and scanner.
        temperature: tau.

    Reference:
        van den Oord et al. 2018 (arXiv 1807.03748), eq. 4; own-condition negatives as in SPECTRA (method.md E.1).
    """
    unit = directions(x)
    same_place, same_condition = place[:, None] == place, condition[:, None] == condition
    positive, negative = same_place & ~same_condition, ~same_place & same_condition
    anchors = positive.any(1) & negative.any(1)
    with torch.autocast(x.device.type, enabled=False):
        s = (unit[anchors] @ unit.T) / temperature
    others = s.masked_fill(~negative[anchors], -torch.inf).logsumexp(1, keepdim=True)
    # -log(e^s / (e^s + e^others)) = softplus(others - s)
    each = F.softplus(others - s).masked_fill(~positive[anchors], 0).sum(1) / positive[anchors].sum(1)
    return each.sum() / anchors.sum().clamp(min=1)


class PlaceLoss(nn.Module):
    """Base of the losses on registered tiles: `forward(x, place, condition)` to a scalar; see `data.registered`."""

    def forward(
        self, x: Float[Tensor, "batch dim"], place: Int64[Tensor, " batch"], condition: Int64[Tensor, " batch"]
    ) -> Float[Tensor, ""]:
        """How badly places are found again."""
        raise NotImplementedError

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        """Run `forward`, typed."""
        return super().__call__(*args, **kwargs)  # type: ignore[no-any-return]


class RegisteredInfoNCE(PlaceLoss):
    """See `registered_infonce`; each view by itself, over the tiles of all processes.

    Args:
        temperature: tau.
    """

    def __init__(self, temperature: float = 0.07) -> None:
        super().__init__()
        if temperature <= 0:
            raise ValueError(f"temperature must be positive, got {temperature}.")
        self.temperature = temperature

    def forward(
        self, x: Float[Tensor, "batch dim"], place: Int64[Tensor, " batch"], condition: Int64[Tensor, " batch"]
    ) -> Float[Tensor, ""]:
        """Mean InfoNCE."""
        place, condition = torch.cat(gather_equal(place)), torch.cat(gather_equal(condition))
        return registered_infonce(gather_rows(x), place, condition, self.temperature)
