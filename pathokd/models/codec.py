"""How tokens are stored compactly: rotated onto their principal directions, in eight bits with a scale per token."""

from typing import Literal, NamedTuple, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn

from pathokd.models.device import double

StoredDtype = Literal["fp32", "fp16", "int8"]

_LEVELS = 127
FP16_ROUNDING = 2.0**-11
"""Most that fp16 takes off a number, as a share of it."""
NO_VARIANCE = 1e-12
"""A principal direction with less than this share of the largest variance counts as one that does not vary."""
ROUNDING = 1e-6
"""A dimension counts as one that does not vary below this share of its mean, which is what fp32 networks round off, or
of the largest deviation: `NO_VARIANCE`, seen as deviations."""


class Codes(NamedTuple):
    """Tokens as stored: `scale`, one number per token, is there for int8 only."""

    values: Tensor
    scale: Tensor | None


class SecondMoments:
    """Mean and covariance of all rows seen, exactly, in fp64.

    Args:
        dim: width of the rows.

    Reference:
        Chan, Golub, LeVeque, "Updating formulae and a pairwise algorithm for computing sample variances", 1979, eq.
        2.1, with outer products for squares.
    """

    def __init__(self, dim: int) -> None:
        self.count = 0
        self.mean = torch.zeros(dim, dtype=torch.float64)
        self._scatter = torch.zeros(dim, dim, dtype=torch.float64)

    def update(self, x: Float[Tensor, "*batch dim"]) -> None:
        """Take the rows of `x` in."""
        rows = double(x.detach().reshape(-1, x.shape[-1]))
        if not len(rows):
            return
        batch_mean = rows.mean(dim=0)
        centred = rows - batch_mean
        delta = batch_mean.cpu() - self.mean
        n = self.count + len(rows)
        self._scatter += (centred.T @ centred).cpu() + torch.outer(delta, delta) * (self.count * len(rows) / n)
        self.mean += delta * (len(rows) / n)
        self.count = n

    @property
    def covariance(self) -> Tensor:
        """Unbiased covariance, (dim, dim), fp64; zero below two rows."""
        return self._scatter / max(self.count - 1, 1)


class TokenCodec(nn.Module):
    """Writes tokens as fp32, fp16 or int8, and reads them back.

    Without statistics the numbers themselves are stored. With them, `z = (x - mean) @ rotation / std` is: standardised
    components, along the principal directions if there is a rotation. int8 stores `round(z / s)` with
    `s = max |z| / 127` for each token, so nothing is clipped and an outlier coarsens no other token.

    What reading back loses, per stored component: nothing for fp32 but its own rounding; at most 2^-11 of the
    component's magnitude for fp16 (half a unit in its last place, and 2^-25 near zero); at most max |z| / 254 for int8.
    A rotation to fewer dimensions loses the share of the variance that lies outside of them.

    Args:
        dtype: of the stored numbers.
        mean: (dim,); with `std`.
        std: (components,), positive.
        rotation: orthonormal columns, (dim, components).

    Raises:
        ValueError: statistics that do not fit each other, or int8 without any.
    """

    mean: Tensor | None
    std: Tensor | None
    rotation: Tensor | None

    def __init__(
        self,
        dtype: StoredDtype,
        *,
        mean: Float[Tensor, " dim"] | None = None,
        std: Float[Tensor, " components"] | None = None,
        rotation: Float[Tensor, "dim components"] | None = None,
    ) -> None:
        super().__init__()
        if dtype not in get_args(StoredDtype):
            raise ValueError(f"dtype must be one of {', '.join(get_args(StoredDtype))}, got {dtype!r}.")
        if (mean is None) != (std is None) or (rotation is not None and mean is None):
            raise ValueError("mean and std come together, and a rotation needs both.")
        if dtype == "int8" and mean is None:
            raise ValueError("int8 needs mean and std: eight bits are spread over standardised components.")
        if std is not None and bool((std <= 0).any()):
            raise ValueError("std must be positive in every component.")
        self.dtype: StoredDtype = dtype
        self.register_buffer("mean", None if mean is None else mean.float(), persistent=False)
        self.register_buffer("std", None if std is None else std.float(), persistent=False)
        self.register_buffer("rotation", None if rotation is None else rotation.float(), persistent=False)

    def tensors(self) -> dict[str, Tensor]:
        """The statistics by the names of the constructor's arguments; empty if the numbers are stored as they are."""
        return {name: value.cpu().contiguous() for name, value in self.named_buffers()}

    def encode(self, x: Float[Tensor, "*tokens dim"]) -> Codes:
        """Tokens to what is stored.

        Raises:
            ValueError: a number that fp16 cannot hold.
        """
        z = x.float()
        if self.mean is not None and self.std is not None:
            z = z - self.mean
            z = (z if self.rotation is None else z @ self.rotation) / self.std
        if self.dtype == "fp32":
            return Codes(z, None)
        if self.dtype == "fp16":
            half = z.half()
            if not bool(half.isfinite().all()):
                raise ValueError(f"A token holds {float(z.abs().max()):.3g}, more than fp16 can: store fp32 or int8.")
            return Codes(half, None)
        scale = z.abs().amax(dim=-1).clamp(min=torch.finfo(torch.float32).tiny * _LEVELS) / _LEVELS
        return Codes((z / scale.unsqueeze(-1)).round().clamp(-_LEVELS, _LEVELS).to(torch.int8), scale)

    def decode(self, values: Tensor, scale: Tensor | None = None) -> Tensor:
        """What is stored to tokens.

        Args:
            values: (..., components) of the stored dtype.
            scale: (...), for int8.

        Returns:
            (..., dim), fp32.
        """
        with torch.autocast(values.device.type, enabled=False):
            z = values.float()
            if scale is not None:
                z = z * scale.unsqueeze(-1)
            if self.mean is None or self.std is None:
                return z
            z = z * self.std
            return self.mean + (z if self.rotation is None else z @ self.rotation.T)


def fit_codec(dtype: StoredDtype, moments: SecondMoments, components: int | None = None) -> TokenCodec:
    """A codec for tokens of these moments.

    Args:
        dtype: of the stored numbers.
        moments: of a sample of the tokens.
        components: principal directions kept; None keeps the tokens' own dimensions.

    Raises:
        ValueError: more components than the tokens have dimensions, or than the sample can tell apart.
    """
    mean, covariance = moments.mean, moments.covariance
    if components is None:
        std = covariance.diagonal().sqrt()
        # Divided by its own rounding, a dimension that stands still would be what int8 spends its bits on.
        still = std <= ROUNDING * mean.abs().maximum(std.max())
        return TokenCodec(dtype, mean=mean.float(), std=_positive(std.masked_fill(still, 0)))
    most = min(len(mean), moments.count - 1)
    if not 1 <= components <= most:
        raise ValueError(
            f"pca must lie in 1 to {most} for tokens of width {len(mean)} and a sample of {moments.count}, got "
            f"{components}."
        )
    values, vectors = torch.linalg.eigh(covariance)
    values, vectors = values.flip(0)[:components], vectors.flip(1)[:, :components]
    # An eigenvector's sign is arbitrary: the largest entry is made positive, so that every machine stores the same.
    signs = vectors.gather(0, vectors.abs().argmax(dim=0, keepdim=True)).sign()
    # Where tokens do not vary, eigh gives rounding: divided by it, rounding would be what int8 spends its bits on.
    std = _positive(torch.where(values > values[0] * NO_VARIANCE, values, 0.0).sqrt())
    return TokenCodec(dtype, mean=mean.float(), std=std, rotation=(vectors * signs).float())


def _positive(std: Tensor) -> Tensor:
    """fp32, with 1 for components that do not vary."""
    single = std.float()
    return torch.where(single > 0, single, torch.ones_like(single))
