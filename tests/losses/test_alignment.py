"""Alignment losses against float64 formulas written out by hand."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pathokd.losses import MSE, AlignmentLoss, Cosine, CosineSmoothL1, SmoothL1

ALL = [Cosine(), SmoothL1(0.5), MSE(), CosineSmoothL1(0.7, 2.0)]


def pair(seed: int, shape: tuple[int, ...] = (5, 3, 8)) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator), torch.randn(shape, generator=generator)


def oracle(loss: AlignmentLoss, prediction: torch.Tensor, target: torch.Tensor) -> float:
    a, b = prediction.double().numpy(), target.double().numpy()
    cosine = 1 - (a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)
    difference = np.abs(a - b)

    def smooth(beta: float) -> float:
        return float(np.where(difference < beta, difference**2 / (2 * beta), difference - beta / 2).mean())

    if isinstance(loss, Cosine):
        return float(cosine.mean())
    if isinstance(loss, SmoothL1):
        return smooth(loss.beta)
    if isinstance(loss, MSE):
        return float((difference**2).mean())
    assert isinstance(loss, CosineSmoothL1)
    return loss.alpha * float(cosine.mean()) + (1 - loss.alpha) * smooth(loss.smooth_l1.beta)


@pytest.mark.parametrize("loss", ALL, ids=lambda loss: type(loss).__name__)
def test_values_match_the_formula(loss: AlignmentLoss) -> None:
    prediction, target = pair(0)
    assert float(loss(prediction, target)) == pytest.approx(oracle(loss, prediction, target), abs=1e-6)


@pytest.mark.parametrize("loss", ALL, ids=lambda loss: type(loss).__name__)
def test_zero_at_the_target_and_positive_elsewhere(loss: AlignmentLoss) -> None:
    prediction, target = pair(1)
    assert float(loss(target, target)) == pytest.approx(0, abs=1e-6)
    assert float(loss(prediction, target)) > 0.01


@pytest.mark.parametrize("loss", ALL, ids=lambda loss: type(loss).__name__)
def test_gradient_reaches_the_student_only(loss: AlignmentLoss) -> None:
    prediction, target = (tensor.requires_grad_() for tensor in pair(2))
    loss(prediction, target).backward()
    assert prediction.grad is not None
    assert prediction.grad.abs().sum() > 0
    assert target.grad is None


@pytest.mark.parametrize("loss", ALL, ids=lambda loss: type(loss).__name__)
def test_gradient_matches_finite_differences(loss: AlignmentLoss) -> None:
    prediction, target = pair(3, (2, 4))
    prediction.requires_grad_()
    loss(prediction, target).backward()
    assert prediction.grad is not None
    for i in range(2):
        for j in range(4):
            step = torch.zeros(2, 4)
            step[i, j] = 1e-3
            above, below = (oracle(loss, prediction.detach() + sign * step, target) for sign in (1, -1))
            assert float(prediction.grad[i, j]) == pytest.approx((above - below) / 2e-3, abs=1e-4)


@pytest.mark.parametrize("loss", ALL, ids=lambda loss: type(loss).__name__)
def test_half_precision_input_is_summed_in_fp32(loss: AlignmentLoss) -> None:
    prediction, target = pair(4)
    low = loss(prediction.bfloat16(), target.bfloat16())
    assert low.dtype == torch.float32
    assert float(low) == pytest.approx(oracle(loss, prediction.bfloat16(), target.bfloat16()), abs=1e-5)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**16), scale=st.floats(1e-3, 1e3))
def test_cosine_ignores_scale(seed: int, scale: float) -> None:
    prediction, target = pair(seed)
    assert float(Cosine()(prediction * scale, target)) == pytest.approx(float(Cosine()(prediction, target)), abs=1e-5)


@pytest.mark.parametrize(
    "make", [lambda: SmoothL1(0.0), lambda: CosineSmoothL1(1.5), lambda: CosineSmoothL1(beta=-1.0)]
)
def test_settings_out_of_range_are_refused(make: object) -> None:
    with pytest.raises(ValueError, match="got"):
        make()  # type: ignore[operator]
