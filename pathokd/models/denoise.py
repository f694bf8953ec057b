"""Targets without what stain and scanner do to them: the directions in which one place differs between conditions.

Across scanners a model's features move nearly along a few directions. Projected out of the teacher's tokens, they are
no longer part of what a student learns. As a correction of finished features this is known not to be enough; as a
target it leaves the student free.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from pathokd.errors import WeightsError
from pathokd.files import Header, atomic_path

SCHEMA = "denoise/1"
TokenKind = Literal["cls", "patches"]
TENSORS = ("mean", "std", "directions")
EPS = 1e-6


class Denoiser(nn.Module):
    """Projects directions out of a teacher's tokens and stays in the teacher's own space.

    With z = (t - mean) / std, the result is mean + std (z - V V^T z). Nothing here is trained or in a checkpoint.

    Args:
        tensors: `mean`, `std` (dim,): of the teacher's tokens; `directions` (rank, dim): orthonormal, of z.

    Raises:
        ValueError: shapes that do not fit each other, or directions that are not orthonormal.
    """

    mean: Tensor
    std: Tensor
    directions: Tensor

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        super().__init__()
        rank, dim = tensors["directions"].shape
        for name in ("mean", "std"):
            if tensors[name].shape != (dim,):
                raise ValueError(f"{name} must have shape {(dim,)}, got {tuple(tensors[name].shape)}.")
        v = tensors["directions"].double()
        if not torch.allclose(v @ v.T, torch.eye(rank, dtype=v.dtype), atol=1e-4):
            raise ValueError("directions must be orthonormal rows.")
        for name in TENSORS:
            self.register_buffer(name, tensors[name].float().clone(), persistent=False)

    @torch.no_grad()
    def forward(self, tokens: Float[Tensor, "*tokens dim"]) -> Float[Tensor, "*tokens dim"]:
        """Tokens without the directions, fp32."""
        scale = self.std + EPS
        z = (tokens.float() - self.mean) / scale
        with torch.autocast(z.device.type, enabled=False):  # bf16 would leave a hundredth of them
            return tokens.float() - (z @ self.directions.T) @ self.directions * scale


def write_denoiser(path: str | Path, parts: Mapping[TokenKind, Mapping[str, Tensor]], header: Header) -> Path:
    """Write what is projected out of class and patch tokens as one safetensors file, atomically."""
    tensors = {
        f"{kind}.{name}": part[name].detach().cpu().float().contiguous() for kind, part in parts.items()
        for name in TENSORS
    }  # fmt: skip
    with atomic_path(path) as part:
        save_file(tensors, part, metadata={"header": json.dumps(header)})
        part.chmod(0o644)
    return Path(path)


def read_denoiser(path: str | Path) -> tuple[Header, dict[TokenKind, Denoiser]]:
    """Read a file of `pathokd denoise`: its header, and what it does to class and patch tokens.

    Raises:
        WeightsError: no such file, damaged, or of another kind.
    """
    file = Path(path)
    if not file.is_file():
        raise WeightsError(f"There is no file {file}: make it with `pathokd denoise TEACHER TILES --out {file}`.")
    try:
        with safe_open(file, "pt") as opened:
            header: Header = json.loads((opened.metadata() or {}).get("header", "{}"))
            if header.get("schema") != SCHEMA:
                raise WeightsError(f"{file} has schema {header.get('schema')!r}, expected {SCHEMA!r}: make it again.")
            kinds: tuple[TokenKind, ...] = ("cls", "patches")
            return header, {
                kind: Denoiser({name: opened.get_tensor(f"{kind}.{name}") for name in TENSORS}) for kind in kinds
            }
    except SafetensorError as error:
        raise WeightsError(f"{file} is damaged or cut short ({error}): make it again.") from error
