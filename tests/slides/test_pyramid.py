import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pathokd.slides.pyramid import choose_level, is_upsampling, read_window


@pytest.mark.parametrize(
    ("downsamples", "asked", "level"),
    [
        ((1, 4, 16), 4, 1),
        ((1, 3.9994, 16), 4, 1),
        # 4.0005 is coarser than asked by 0.01 %: a match, not a reason to read 16 times the pixels.
        ((1, 4.0005, 16), 4, 1),
        ((1, 4.07, 16), 4, 1),
        ((1, 4.09, 16), 4, 0),
        ((1, 4, 16), 15.99, 2),
        ((1, 2, 4), 1.826, 0),
        ((1,), 0.5, 0),
        ((4, 1, 16), 5, 0),
    ],
)
def test_values(downsamples: tuple[float, ...], asked: float, level: int) -> None:
    choice = choose_level(downsamples, asked)
    assert choice.level == level
    assert choice.scale == pytest.approx(asked / downsamples[level])


def test_errors() -> None:
    with pytest.raises(ValueError, match="empty"):
        choose_level((), 1)
    with pytest.raises(ValueError, match="positive"):
        choose_level((1,), 0)


def test_upsampling_beyond_two_percent() -> None:
    assert not is_upsampling(choose_level((1,), 0.99).scale)
    assert is_upsampling(choose_level((1,), 0.97).scale)


def test_match_is_taken_as_it_is() -> None:
    # 0.5 um/px asked of a slide at 0.499: 224.45 px, which rounds to the tile.
    window = read_window(0.5 / 0.499, (224, 224))
    assert window == ((224, 224), False)
    assert read_window(0.5 / 0.495, (224, 224)) == ((227, 227), True)
    assert read_window(2.0, (224, 112)) == ((448, 224), True)


@settings(deadline=None)
@given(scale=st.floats(0.3, 64), side=st.integers(1, 2000), downsamples=st.lists(st.floats(1.1, 64), max_size=6))
def test_properties(scale: float, side: int, downsamples: list[float]) -> None:
    levels = (1.0, *downsamples)
    choice = choose_level(levels, scale)
    assert all(d > scale * 1.02 or d <= levels[choice.level] for d in levels)
    size, resize = read_window(choice.scale, (side, side))
    exact = side * choice.scale
    if resize:
        assert exact - 1e-5 <= size[0] <= exact + 2
    else:
        assert abs(exact - size[0]) < 0.5
