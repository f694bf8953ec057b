"""Registered-pair InfoNCE against its sum written out in float64, and what is no negative."""

import math

import numpy as np
import pytest
import torch

from pathokd.losses import RegisteredInfoNCE
from pathokd.losses.registered import registered_infonce

PLACE = torch.tensor([0, 1, 2, 3, 0, 1, 2, 3, 1, 0])
CONDITION = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1, 2, 1])  # the last: place 0 twice under condition 1


def vectors(n: int = 10, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def reference(x: torch.Tensor, place: torch.Tensor, condition: torch.Tensor, tau: float) -> float:
    u = x.numpy() / np.linalg.norm(x.numpy(), axis=1, keepdims=True)
    n, anchors = len(u), []
    for i in range(n):
        negatives = [j for j in range(n) if condition[j] == condition[i] and place[j] != place[i]]
        below = sum(math.exp(u[i] @ u[j] / tau) for j in negatives)
        terms = [
            -math.log(math.exp(u[i] @ u[p] / tau) / (math.exp(u[i] @ u[p] / tau) + below))
            for p in range(n)
            if place[p] == place[i] and condition[p] != condition[i]
        ]
        if terms and negatives:
            anchors.append(np.mean(terms))
    return float(np.mean(anchors)) if anchors else 0.0


def test_value_and_gradient() -> None:
    x = vectors().requires_grad_()
    expected = reference(x.detach(), PLACE, CONDITION, 0.2)
    assert float(registered_infonce(x, PLACE, CONDITION, 0.2).detach()) == pytest.approx(expected, abs=1e-12)
    assert float(RegisteredInfoNCE(0.2)(x.detach().float(), PLACE, CONDITION)) == pytest.approx(expected, abs=1e-5)
    assert torch.autograd.gradcheck(lambda x: registered_infonce(x, PLACE, CONDITION, 0.2), (x,))


def test_a_vector_without_length_does_not_rule_the_gradient() -> None:
    """Its gradient was 1e12 times that of the others."""
    x = vectors().float()
    x[2] = 0
    x.requires_grad_()
    registered_infonce(x, PLACE, CONDITION, 0.07).backward()
    assert x.grad is not None
    assert x.grad[2].norm() == 0
    assert 0 < x.grad.norm() < 100


def test_acquisition_cannot_solve_it() -> None:
    """Vectors that say the condition alone are at chance, log(1 + negatives); vectors that say the place are at 0.

    With negatives from anywhere, or the same place among them, neither would hold."""
    place, condition = torch.arange(4).repeat(2), torch.arange(2).repeat_interleave(4)
    by_place, by_condition = torch.eye(4, dtype=torch.float64)[place], torch.eye(2, dtype=torch.float64)[condition]
    assert float(registered_infonce(by_place, place, condition, 0.05)) < 1e-7
    # s_ip = 0 (another condition), s_in = 1 / tau (its own): log(1 + 3 e^(1 / tau)), worse than chance.
    worse = math.log(1 + 3 * math.exp(1 / 0.5))
    assert float(registered_infonce(by_condition, place, condition, 0.5)) == pytest.approx(worse, abs=1e-12)


@pytest.mark.parametrize(
    ("place", "condition"), [([0, 1, 2], [0, 0, 0]), ([0, 0], [0, 1])], ids=["no positive", "no negative"]
)
def test_an_anchor_without_partners_adds_nothing(place: list[int], condition: list[int]) -> None:
    x = vectors(len(place)).requires_grad_()
    loss = registered_infonce(x, torch.tensor(place), torch.tensor(condition))
    loss.backward()
    assert loss.item() == 0
    assert x.grad is not None
    assert torch.equal(x.grad, torch.zeros_like(x))


def test_a_temperature_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match=r"positive, got 0\.0"):
        RegisteredInfoNCE(0.0)


def test_it_is_fp32_under_autocast() -> None:
    x = vectors()
    with torch.autocast("cpu", torch.bfloat16):
        found = registered_infonce(x.float(), PLACE, CONDITION)
    assert found.dtype == torch.float32
    assert float(found) == pytest.approx(float(registered_infonce(x, PLACE, CONDITION)), rel=1e-5)
