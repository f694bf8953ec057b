"""What a denoiser takes out and what it leaves."""

from pathlib import Path

import numpy as np
import pytest
import torch

from pathokd.errors import WeightsError
from pathokd.files import make_header
from pathokd.models.denoise import SCHEMA, Denoiser, read_denoiser, write_denoiser


def tensors(dim: int = 6, rank: int = 2, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    q, _ = torch.linalg.qr(torch.randn(dim, dim, generator=generator).double())
    return {
        "mean": torch.randn(dim, generator=generator),
        "std": torch.rand(dim, generator=generator) + 0.5,
        "directions": q[:rank],
    }


def test_values_against_the_projection_written_out() -> None:
    parts = tensors()
    x = torch.randn(5, 3, 6)
    mean, std, v = (parts[name].double().numpy() for name in ("mean", "std", "directions"))
    z = (x.double().numpy() - mean) / std
    expected = mean + std * (z @ (np.eye(6) - v.T @ v))
    assert np.allclose(Denoiser(parts)(x).numpy(), expected, atol=1e-4)


def test_twice_is_once_and_what_is_orthogonal_stays() -> None:
    denoiser = Denoiser(tensors())
    x = torch.randn(20, 6)
    once = denoiser(x)
    assert torch.allclose(denoiser(once), once, atol=1e-5)
    moved = x + 3 * denoiser.directions[0] * (denoiser.std + 1e-6)
    assert torch.allclose(denoiser(moved), once, atol=1e-4)
    assert not torch.allclose(moved, x, atol=1e-1)
    assert not denoiser.state_dict()


def test_the_file_gives_back_what_was_written(tmp_path: Path) -> None:
    parts = {"cls": tensors(seed=1), "patches": tensors(seed=2, rank=3)}
    path = write_denoiser(tmp_path / "d.safetensors", parts, make_header(SCHEMA, {"rank": 2}))  # type: ignore[arg-type]
    header, read = read_denoiser(path)
    assert header["settings"] == {"rank": 2}
    x = torch.randn(4, 6)
    for kind in ("cls", "patches"):
        assert torch.allclose(read[kind](x), Denoiser(parts[kind])(x), atol=1e-6)  # type: ignore[index]


def test_what_is_no_such_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="make it with `pathokd denoise"):
        read_denoiser(tmp_path / "none")
    write_denoiser(tmp_path / "other", {"cls": tensors(), "patches": tensors()}, make_header("prototypes/1", {}))
    with pytest.raises(WeightsError, match="schema 'prototypes/1', expected 'denoise/1'"):
        read_denoiser(tmp_path / "other")
    (tmp_path / "cut").write_bytes((tmp_path / "other").read_bytes()[:40])
    with pytest.raises(WeightsError, match="damaged"):
        read_denoiser(tmp_path / "cut")
    with pytest.raises(ValueError, match="orthonormal"):
        Denoiser({**tensors(), "directions": torch.ones(2, 6).double()})


def test_nothing_is_left_under_autocast() -> None:
    """A training in bf16 takes the directions out as one in fp32 does."""
    given = tensors()
    denoiser = Denoiser(given)
    x = 10 * torch.randn(50, 6, generator=torch.Generator().manual_seed(1))
    with torch.autocast("cpu", torch.bfloat16):
        found = denoiser(x)
    assert torch.allclose(found, denoiser(x), atol=1e-4)
