"""Turned tiles: perfect invariance, none at all, and agreement with the plain pairwise measures."""

import pytest
import torch

from pathokd.metrics import cosine, paired_topk
from pathokd.metrics.invariance import D4, turn_invariance


def turned(noise: float, n: int = 60, dim: int = 12) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    upright = torch.randn(n, dim, generator=generator)
    return torch.stack([upright + noise * i * torch.randn(n, dim, generator=generator) for i in range(8)])


def test_equals_the_plain_measures() -> None:
    x = turned(0.3)
    found = turn_invariance(x)
    assert [score.turn for score in found] == list(D4[1:])
    for i, score in enumerate(found, start=1):
        assert score.cosine == pytest.approx(float(cosine(x[0], x[i]).mean()), abs=1e-6)
        assert score.top1 == pytest.approx(float(paired_topk(x[0], x[i], 1)), abs=1e-9)
        assert score.n == 60
        assert score.tiles is not None
        assert float(score.tiles.cosine.mean()) == pytest.approx(score.cosine, abs=1e-9)
    assert found[0].top1 > found[-1].top1


def test_an_invariant_model_scores_one_and_a_collapsed_one_chance() -> None:
    for score in turn_invariance(turned(0.0)):
        assert (score.top1, score.cosine) == (1.0, pytest.approx(1.0, abs=1e-6))
    for score in turn_invariance(torch.ones(8, 60, 12)):
        assert score.top1 == pytest.approx(1 / 119)
        assert score.separation == pytest.approx(0.0, abs=1e-6)


def test_elements_are_those_of_the_views() -> None:
    """Names against what `d4` does to a picture whose corners differ."""
    import numpy as np

    from pathokd.data.views import d4

    picture = np.arange(12, dtype=np.uint8).reshape(2, 2, 3)
    quarter = {"upright": 0, "quarter turn": 1, "half turn": 2, "three-quarter turn": 3}
    for element, name in enumerate(D4):
        flipped, turn = name.startswith("flip"), name.removeprefix("flip").removeprefix(", ") or "upright"
        want = np.rot90(picture[:, ::-1] if flipped else picture, quarter[turn])
        np.testing.assert_array_equal(d4(picture, element), want)


def test_errors_say_what_to_do() -> None:
    with pytest.raises(ValueError, match="turns should name 3 orientations"):
        turn_invariance(torch.ones(3, 4, 2))
    with pytest.raises(ValueError, match="two at least"):
        turn_invariance(torch.ones(1, 4, 2), ["upright"])
    x = turned(0.1)
    x[3, 5] = 0
    with pytest.raises(ValueError, match="three-quarter turn has 1 of 60 rows"):
        turn_invariance(x)
