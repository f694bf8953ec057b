"""Assignments against Sinkhorn-Knopp and softmax written out in float64, on whole matrices."""

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pathokd.losses.assignment import assign, balanced_centres, check_sinkhorn, chunk_rows, sinkhorn_centre

Matrix = npt.NDArray[np.float64]


def unit(seed: int, n: int, dim: int = 12) -> torch.Tensor:
    x = torch.randn(n, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return x / x.norm(dim=1, keepdim=True)


def sinkhorn_reference(z: Matrix, tau: float, iterations: int) -> Matrix:
    """As method.md (b) states it: (K, n) scaled row by row, then column by column."""
    Q = np.exp(z / tau).T
    K, n = Q.shape
    Q /= Q.sum()
    for _ in range(iterations):
        Q /= Q.sum(axis=1, keepdims=True)
        Q /= K
        Q /= Q.sum(axis=0, keepdims=True)
        Q /= n
    return np.asarray((Q * n).T)


@pytest.mark.parametrize("iterations", [1, 3, 10])
@pytest.mark.parametrize("tau", [0.04, 0.1])
def test_the_balanced_centre_gives_sinkhorn_knopp(tau: float, iterations: int) -> None:
    x, c = unit(0, 40), unit(1, 7)
    expected = sinkhorn_reference((x @ c.T).numpy(), tau, iterations)
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        a, b = x.to(dtype), c.to(dtype)
        q = assign(a @ b.T, sinkhorn_centre(a, b, tau, iterations), tau)
        assert np.allclose(q.double().numpy(), expected, atol=tolerance)
        assert np.allclose(q.sum(1).double().numpy(), 1, atol=1e-6)


def test_chunks_blocks_and_temperatures_do_not_change_it() -> None:
    x, c = unit(2, 50), unit(3, 8)
    whole = torch.stack([sinkhorn_centre(x, c, tau) for tau in (0.04, 0.07)])
    chunked = balanced_centres(lambda: [x[:13], x[13:]], c, [0.04, 0.07], chunk_elements=8 * 5)
    assert torch.allclose(whole, chunked, atol=1e-12)
    assert chunk_rows(131_072) == 64
    assert chunk_rows(10**9) == 1


def test_nothing_overflows_without_normalised_logits() -> None:
    x, c = 50 * unit(4, 30), 20 * unit(5, 6)
    logits = (x @ c.T).float()  # up to 1000, / 0.04: exp of it is infinite in any precision
    q = assign(logits, sinkhorn_centre(x.float(), c.float(), 0.04), 0.04)
    assert q.isfinite().all()
    assert torch.allclose(q.sum(1), torch.ones(30))


def test_many_iterations_use_all_prototypes_alike() -> None:
    x, c = unit(6, 400), unit(7, 5)
    q = assign(x @ c.T, sinkhorn_centre(x, c, 0.1, iterations=200), 0.1)
    assert torch.allclose(q.mean(0), torch.full((5,), 0.2, dtype=torch.float64), atol=1e-4)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**16), shift=st.floats(-5, 5))
def test_a_common_shift_of_logits_or_centre_is_nothing(seed: int, shift: float) -> None:
    z, c = torch.randn(4, 6, dtype=torch.float64), unit(seed, 1, 6)[0]
    assert torch.allclose(assign(z + shift, c, 0.07), assign(z, c - shift, 0.07))
    assert torch.allclose(assign(z + shift, c, 0.07), assign(z, c, 0.07))


def test_temperature_limits() -> None:
    z, c = unit(8, 9, 5), unit(9, 1, 5)[0]
    cold, hot = assign(z, c, 1e-6), assign(z, c, 1e6)
    assert torch.equal(cold.argmax(1), (z - c).argmax(1))
    assert torch.allclose(cold.max(1).values, torch.ones(9, dtype=torch.float64))
    assert torch.allclose(hot, torch.full((9, 5), 0.2, dtype=torch.float64), atol=1e-5)


def test_sinkhorn_needs_a_token_to_32_prototypes() -> None:
    check_sinkhorn(128, 4096)
    with pytest.raises(ValueError, match=r"over 127 tokens .* at least 128 \(K / 32\)"):
        check_sinkhorn(127, 4096)


def test_the_centre_of_a_batch_is_fp32_under_autocast() -> None:
    """As the cross-entropy that it enters: in bf16 a cosine is off by up to 0.1 temperatures."""
    tokens, prototypes = unit(0, 64), unit(1, 8)
    with torch.autocast("cpu", torch.bfloat16):
        found = sinkhorn_centre(tokens.float(), prototypes.float(), 0.04)
    expected = sinkhorn_centre(tokens, prototypes, 0.04)
    assert torch.allclose(found.double() / 0.04, expected / 0.04, atol=1e-4)
