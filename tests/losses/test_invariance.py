"""Consistency against cosines written out, and that its second view is held still."""

import numpy as np
import pytest
import torch

from pathokd.losses import Consistency


def pair(shape: tuple[int, ...] = (7, 5)) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(shape, generator=generator).double() + 3, torch.randn(shape, generator=generator).double() + 3


def reference(x: np.ndarray, y: np.ndarray) -> float:
    return float(np.mean([1 - a @ b / np.linalg.norm(a) / np.linalg.norm(b) for a, b in zip(x, y, strict=True)]))


@pytest.mark.parametrize("centred", [False, True])
def test_value_and_gradient(centred: bool) -> None:
    x, y = pair()
    mean = y.numpy().mean(0) if centred else 0
    loss = Consistency(centred)
    assert float(loss(x.float(), y.float())) == pytest.approx(reference(x.numpy() - mean, y.numpy() - mean), abs=1e-6)
    # The oracle of the gradient: central differences of the reference, which holds y and its mean still.
    x = x.float().requires_grad_()
    loss(x, y.float()).backward()
    assert x.grad is not None
    at = x.detach().double().numpy()
    for index in ((0, 0), (3, 2), (6, 4)):
        ends = []
        for step in (1e-5, -1e-5):
            moved = at.copy()
            moved[index] += step
            ends.append(reference(moved - mean, y.numpy() - mean))
        assert float(x.grad[index]) == pytest.approx((ends[0] - ends[1]) / 2e-5, abs=1e-5)


def test_the_second_view_has_no_gradient() -> None:
    x, y = (part.float().requires_grad_() for part in pair((2, 3, 4)))
    Consistency(centred=True)(x, y).backward()
    assert y.grad is None
    assert x.grad is not None
    assert float(x.grad.abs().sum()) > 0


def test_a_common_mean_flatters_the_plain_cosine_only() -> None:
    x, y = pair()
    far = 100 * torch.ones(5)
    assert float(Consistency()(x.float() + far, y.float() + far)) < 1e-3
    shifted, plain = Consistency(True)(x.float() + far, y.float() + far), Consistency(True)(x.float(), y.float())
    assert float(shifted) == pytest.approx(float(plain), abs=1e-3)
    assert float(plain) > 0.3
