"""RKD against distances and angles written out in float64 loops."""

import itertools

import numpy as np
import pytest
import torch

from pathokd.losses import RKD
from pathokd.losses.relational import angle_loss, distance_loss


def vectors(n: int, dim: int, seed: int) -> torch.Tensor:
    return torch.randn(n, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def huber(a: np.ndarray) -> float:
    a = np.abs(a)
    return float(np.where(a < 1, a**2 / 2, a - 0.5).mean())


def distances(x: np.ndarray) -> np.ndarray:
    d = np.array([np.linalg.norm(x[i] - x[j]) for i, j in itertools.permutations(range(len(x)), 2)])
    return d / d.mean()


def unit(v: np.ndarray) -> np.ndarray:
    return v / np.linalg.norm(v)


def angles(x: np.ndarray) -> np.ndarray:
    triples = itertools.permutations(range(len(x)), 3)
    return np.array([unit(x[i] - x[j]) @ unit(x[k] - x[j]) for i, j, k in triples])


def test_values_and_gradients() -> None:
    x, y = vectors(6, 4, 0).requires_grad_(), vectors(6, 9, 1) * 3
    expected = [huber(f(x.detach().numpy()) - f(y.numpy())) for f in (distances, angles)]
    assert float(distance_loss(x, y).detach()) == pytest.approx(expected[0], abs=1e-12)
    assert float(angle_loss(x, y).detach()) == pytest.approx(expected[1], abs=1e-12)
    both = RKD(0.5, 2.0)(x.detach().float(), y.float())
    assert float(both) == pytest.approx(0.5 * expected[0] + 2 * expected[1], abs=1e-5)
    assert torch.autograd.gradcheck(lambda x: distance_loss(x, y), (x,))
    assert torch.autograd.gradcheck(lambda x: angle_loss(x, y), (x,))


def test_turning_scaling_and_moving_cost_nothing() -> None:
    x = vectors(7, 5, 0)
    q, _ = torch.linalg.qr(vectors(5, 5, 3))
    moved = 4 * x @ q + 2
    assert float(RKD()(moved, x)) == pytest.approx(0, abs=1e-12)
    assert float(RKD()(vectors(7, 5, 1), x)) > 0.05


def test_duplicates_and_few_tiles_are_no_poison() -> None:
    x = torch.cat([vectors(3, 4, 0), vectors(1, 4, 1).expand(2, 4)]).requires_grad_()
    loss = RKD()(x, vectors(5, 6, 2))
    loss.backward()
    assert x.grad is not None
    assert float(x.grad.norm()) < 10  # 1e10 once: the direction between two of one picture is 0 / 0
    nearly = x.detach().clone()
    nearly[4] += 1e-9 * vectors(1, 4, 5)[0]
    nearly.requires_grad_()
    RKD()(nearly, vectors(5, 6, 2)).backward()
    assert nearly.grad is not None
    assert float(nearly.grad.norm()) < 10
    for n in (1, 2):
        assert float(RKD(1.0, 2.0)(vectors(n, 4, 0), vectors(n, 6, 1))) == pytest.approx(0, abs=1e-12)


def test_crops_of_one_tile_have_no_angle_that_the_teacher_knows() -> None:
    """Its vector of a tile stands for each crop of it: the student is held to the angles between tiles only."""
    y = vectors(4, 6, 0).repeat_interleave(2, dim=0)
    x = vectors(8, 4, 1)
    a, b, per_tile = x.numpy(), y.numpy(), np.arange(8) // 2
    expected = [
        huber(np.array([unit(a[i] - a[j]) @ unit(a[k] - a[j]) - unit(b[i] - b[j]) @ unit(b[k] - b[j])]))
        for i, j, k in itertools.permutations(range(8), 3)
        if per_tile[i] != per_tile[j] and per_tile[k] != per_tile[j]
    ]
    assert float(angle_loss(x, y)) == pytest.approx(float(np.mean(expected)), abs=1e-12)
    assert float(angle_loss(x, torch.ones(8, 6))) == 0


def test_angles_are_taken_among_the_first_tiles() -> None:
    x, y = vectors(9, 4, 0), vectors(9, 6, 1)
    assert float(RKD(0.0, 1.0, angle_tiles=4)(x, y)) == pytest.approx(float(angle_loss(x[:4], y[:4])), abs=1e-12)
    with pytest.raises(ValueError, match="three points"):
        RKD(angle_tiles=2)
    with pytest.raises(ValueError, match="weights"):
        RKD(0.0, 0.0)


def test_angles_are_fp32_under_autocast() -> None:
    """In bf16 their difference is rounding once a student is near its teacher."""
    x = vectors(16, 8, 0)
    y = x + 0.01 * vectors(16, 8, 1)
    with torch.autocast("cpu", torch.bfloat16):
        found = float(angle_loss(x.float(), y.float()))
    assert found == pytest.approx(float(angle_loss(x, y)), rel=1e-3)
