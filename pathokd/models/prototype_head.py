"""Fixed prototypes of a frozen teacher: the head that public checkpoints lack, and its file."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from pathokd.errors import WeightsError
from pathokd.files import Header, atomic_path

SCHEMA = "prototypes/1"
FILE_NAME = "prototypes.safetensors"
TokenKind = Literal["cls", "patches"]
TENSORS = ("mean", "std", "centroids", "counts", "mean_centre", "temperatures", "centres")
EPS = 1e-6


class PrototypeHead(nn.Module):
    """Standardises a teacher's tokens to unit vectors and holds the prototypes they are compared with.

    Logits are cosines: unit token times centroid. Nothing here is trained or stored in a checkpoint.

    Args:
        tensors: `mean`, `std` (dim,): statistics of the teacher's tokens. `centroids` (K, dim): unit vectors in the
            standardised space. `counts` (K,): tokens of each. `mean_centre` (K,): the mean logit. `temperatures` (T,),
            rising, and `centres` (T, K): the balanced centre at each of them.

    Raises:
        ValueError: shapes that do not fit each other.
    """

    mean: Tensor
    std: Tensor
    centroids: Tensor
    counts: Tensor
    mean_centre: Tensor
    centres: Tensor

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        super().__init__()
        k, dim = tensors["centroids"].shape
        steps = len(tensors["temperatures"])
        wanted = dict(zip(TENSORS, [(dim,), (dim,), (k, dim), (k,), (k,), (steps,), (steps, k)], strict=True))
        for name, shape in wanted.items():
            if tensors[name].shape != shape:
                raise ValueError(f"{name} must have shape {shape}, got {tuple(tensors[name].shape)}.")
            if name != "temperatures":
                self.register_buffer(name, tensors[name].clone(), persistent=False)
        self.temperatures = np.asarray(tensors["temperatures"], np.float64)

    @property
    def count(self) -> int:
        """K."""
        return len(self.centroids)

    @property
    def dim(self) -> int:
        """Width of the teacher's tokens."""
        return self.centroids.shape[1]

    @torch.no_grad()
    def forward(self, tokens: Float[Tensor, "*tokens dim"]) -> Float[Tensor, "*tokens dim"]:
        """Unit vectors of raw teacher tokens, fp32."""
        return standard_unit(tokens, self.mean, self.std)

    def centre_at(self, temperature: float) -> Float[Tensor, " count"]:
        """The balanced centre at a temperature, by linear interpolation between the stored ones.

        Raises:
            ValueError: outside the stored range, where the centre was never estimated.
        """
        low, high = self.temperatures[0], self.temperatures[-1]
        # Stored in fp32, where 0.06 is 1.3e-9 less than that.
        if not low * (1 - 1e-6) <= temperature <= high * (1 + 1e-6):
            raise ValueError(
                f"This head has balanced centres for teacher temperatures from {low:g} to {high:g}, got "
                f"{temperature:g}: make it again with other --temperatures, or change the loss."
            )
        place = float(np.interp(temperature, self.temperatures, np.arange(len(self.temperatures))))
        below = min(int(place), max(len(self.temperatures) - 2, 0))
        above = min(below + 1, len(self.temperatures) - 1)
        return torch.lerp(self.centres[below], self.centres[above], place - below)

    @classmethod
    def random(cls, dim: int, count: int, seed: int = 0) -> "PrototypeHead":
        """A head of random directions, which says nothing about tissue: for tests."""
        generator = torch.Generator().manual_seed(seed)
        centroids = F.normalize(torch.randn(count, dim, generator=generator), dim=1)
        zeros = torch.zeros(count)
        return cls(
            {
                "mean": torch.zeros(dim), "std": torch.ones(dim), "centroids": centroids, "counts": zeros.long(),
                "mean_centre": zeros, "temperatures": torch.tensor([1e-6, 1e6]), "centres": torch.zeros(2, count),
            }
        )  # fmt: skip


def standard_unit(
    tokens: Float[Tensor, "*tokens dim"], mean: Float[Tensor, " dim"], std: Float[Tensor, " dim"]
) -> Float[Tensor, "*tokens dim"]:
    """Tokens standardised per dimension and scaled to length 1, in fp32."""
    return F.normalize((tokens.float() - mean) / (std + EPS), dim=-1, eps=EPS)


def write_heads(folder: str | Path, heads: Mapping[TokenKind, Mapping[str, Tensor]], header: Header) -> Path:
    """Write the heads of class and patch tokens as FOLDER/prototypes.safetensors, atomically."""
    path = Path(folder) / FILE_NAME
    tensors = {
        f"{kind}.{name}": tensor.detach().cpu().contiguous() for kind, head in heads.items()
        for name, tensor in head.items()
    }  # fmt: skip
    with atomic_path(path) as part:
        save_file(tensors, part, metadata={"header": json.dumps(header)})
        part.chmod(0o644)
    return path


def read_header(path: str | Path) -> Header:
    """Header of a head's file or folder: the teacher's weight hash and how it was made.

    Raises:
        WeightsError: no such file, or not written by `pathokd prototypes`.
    """
    return _read(path, ())[0]


def read_head(path: str | Path, kind: TokenKind) -> PrototypeHead:
    """Read the head for class or patch tokens.

    Raises:
        WeightsError: no such file, damaged, or not written by `pathokd prototypes`.
    """
    _, tensors = _read(path, [f"{kind}.{name}" for name in TENSORS])
    return PrototypeHead({name.removeprefix(f"{kind}."): tensor for name, tensor in tensors.items()})


def _read(path: str | Path, names: list[str] | tuple[()]) -> tuple[Header, dict[str, Tensor]]:
    file = Path(path) / FILE_NAME if Path(path).is_dir() else Path(path)
    if not file.is_file():
        raise WeightsError(f"There are no prototypes at {path}: make them with `pathokd prototypes TEACHER TILES`.")
    try:
        with safe_open(file, "pt") as opened:
            metadata = opened.metadata() or {}
            header: Header = json.loads(metadata.get("header", "{}"))
            if header.get("schema") != SCHEMA:
                raise WeightsError(f"{file} has schema {header.get('schema')!r}, expected {SCHEMA!r}: make it again.")
            return header, {name: opened.get_tensor(name) for name in names}
    except SafetensorError as error:
        raise WeightsError(f"{file} is damaged or cut short ({error}): make it again.") from error
