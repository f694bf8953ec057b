"""KoLeo against all distances written out in float64, and what it does with duplicates."""

import numpy as np
import pytest
import torch

from pathokd.losses import KoLeo
from pathokd.losses.spread import koleo_loss


def vectors(n: int = 12, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def reference(x: torch.Tensor, least: float = 1e-4) -> float:
    u = x.numpy() / np.linalg.norm(x.numpy(), axis=1, keepdims=True)
    logs = []
    for i in range(len(u)):
        gaps = [np.linalg.norm(u[i] - u[j]) for j in range(len(u)) if j != i]
        gaps = [gap for gap in gaps if gap >= least]
        if gaps:
            logs.append(np.log(min(gaps)))
    return float(-np.mean(logs)) if logs else 0.0


def test_value_and_gradient() -> None:
    x = vectors().requires_grad_()
    assert koleo_loss(x).item() == pytest.approx(reference(x.detach()), abs=1e-12)
    assert float(KoLeo()(x.detach().float())) == pytest.approx(reference(x.detach()), abs=1e-5)
    assert torch.autograd.gradcheck(koleo_loss, (x,))


def test_length_does_not_matter_and_crowding_costs() -> None:
    x = vectors()
    assert float(koleo_loss(7 * x)) == pytest.approx(float(koleo_loss(x)), abs=1e-12)
    assert float(koleo_loss(x[:1] + 0.1 * x)) > float(koleo_loss(x)) + 0.5


def test_duplicates_are_neither_neighbours_nor_poison() -> None:
    blank = vectors(1, seed=5).expand(3, 6)
    x = torch.cat([vectors(), blank]).requires_grad_()
    loss = koleo_loss(x)
    loss.backward()
    assert loss.item() == pytest.approx(reference(x.detach()), abs=1e-12)
    assert loss.item() < 3  # three pairs at distance 0 would cost 18 each
    assert x.grad is not None
    assert x.grad.isfinite().all()
    # The first of them is a neighbour to others, too; nothing parts the second and the third.
    assert torch.allclose(x.grad[-2], x.grad[-1])
    assert x.grad[-1].abs().sum() > 0  # but they are pushed from the others


@pytest.mark.parametrize("x", [vectors(1), vectors(1).expand(4, 6)], ids=["one", "all alike"])
def test_without_a_neighbour_it_is_nothing(x: torch.Tensor) -> None:
    x = x.clone().requires_grad_()
    loss = koleo_loss(x)
    loss.backward()
    assert loss.item() == 0
    assert x.grad is not None
    assert torch.equal(x.grad, torch.zeros_like(x))


@pytest.mark.parametrize("length", [0.0, 1e-30, 1e-9])
def test_a_vector_without_length_does_not_rule_the_gradient(length: float) -> None:
    """Its gradient was 1e11 times that of the others, which clipping by the norm then left nothing of."""
    x = vectors(6).float()
    x[2] *= length
    x.requires_grad_()
    koleo_loss(x).backward()
    assert x.grad is not None
    assert x.grad[2].norm() == 0
    assert 0 < x.grad.norm() < 10


def test_half_precision_is_summed_in_fp32() -> None:
    x = vectors().bfloat16()
    assert koleo_loss(x).dtype == torch.float32
    assert float(koleo_loss(x)) == pytest.approx(reference(x.double()), abs=1e-5)


def test_an_impossible_distance_is_refused() -> None:
    with pytest.raises(ValueError, match="between 0 and 2, got 3"):
        KoLeo(3.0)
