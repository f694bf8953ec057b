"""The balance rule: with the weights it gives, the terms have the shares asked for."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pathokd.losses.balance import MAX_WEIGHT, balanced_weights

NONE = float("nan")


@given(
    means=st.lists(st.floats(0.05, 5), min_size=4, max_size=4),
    relation=st.floats(0.01, 0.45),
    patch=st.floats(0.01, 0.45),
)
def test_shares_hold(means: list[float], relation: float, patch: float) -> None:
    m = torch.tensor(means, dtype=torch.float64)
    shares = torch.tensor([NONE, relation, patch, NONE], dtype=torch.float64)
    weights = balanced_weights(m, torch.tensor([1.0, 1.0, 1.0, 0.5]).double(), shares, torch.ones(4).double())
    assert weights[0] == 1
    assert weights[3] == 0.5
    total = float(weights @ m)
    if float(weights.max()) < MAX_WEIGHT:
        assert float(weights[1] * m[1]) == pytest.approx(relation * total)
        assert float(weights[2] * m[2]) == pytest.approx(patch * total)


def test_a_quarter_of_the_class_loss_and_a_quarter_of_all() -> None:
    """The recipe's numbers: relation 3/16, patch 1/4, so that class : relation is 3 : 1 and patch a third of both."""
    m = torch.tensor([0.3, 0.02, 0.9]).double()
    w = balanced_weights(m, torch.ones(3).double(), torch.tensor([NONE, 0.1875, 0.25]).double(), torch.ones(3).double())
    cls, relation, patch = (w * m).tolist()
    assert relation / (cls + relation) == pytest.approx(0.25)
    assert patch / (cls + relation + patch) == pytest.approx(0.25)


def test_what_is_left_out_and_what_vanishes() -> None:
    shares, ones = torch.tensor([NONE, 0.5, NONE]), torch.ones(3)
    counts = torch.tensor([1.0, 1.0, 0.0])
    negative = balanced_weights(torch.tensor([1.0, 1.0, -7.0]), ones, shares, counts)
    assert negative.tolist() == [1, 1, 1]  # KoLeo's -7 is no part of the total
    assert float(balanced_weights(torch.tensor([1.0, 0.0, 0.0]), ones, shares, counts)[1]) == MAX_WEIGHT
    assert float(balanced_weights(torch.tensor([0.0, 1.0, 0.0]), ones, shares, counts)[1]) == 0
