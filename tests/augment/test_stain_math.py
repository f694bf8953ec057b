"""Optical density, stain vectors and restaining against scikit-image, an independent Macenko, and known dyes."""

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from skimage.color import hed2rgb, rgb2hed

from pathokd.augment.stain import swap_stain
from pathokd.augment.stain_basis import (
    MAX_PIXELS,
    REFERENCE_STRENGTH,
    macenko_basis,
    measure_appearance,
    tissue_pixels,
    vahadane_basis,
)
from pathokd.augment.stain_math import (
    GLASS_OD,
    REFERENCE,
    RUIFROK,
    Appearance,
    affine_od,
    basis_of,
    concentrations,
    from_od,
    scale_map,
    swap_map,
    to_od,
)
from pathokd.augment.stainings import STAININGS as STAININGS_OF_LABORATORIES
from pathokd.augment.stainings import get_staining
from pathokd.phantom import STAININGS, make_scene, render
from pathokd.phantom.scanner import Scanner
from pathokd.types import Rgb

Floats = npt.NDArray[np.float64]


def angle_deg(a: Floats, b: Floats) -> float:
    return float(np.degrees(np.arccos(np.clip(a @ b / np.linalg.norm(a) / np.linalg.norm(b), -1, 1))))


# ----------------------------------------------------------------------------------------------------------- density


def test_density_is_undone_exactly(every_value: Rgb) -> None:
    assert np.array_equal(from_od(to_od(every_value)), every_value)
    flat = every_value.reshape(-1, 3)
    assert np.array_equal(from_od(to_od(flat)), flat)


def test_density_values() -> None:
    od = to_od(np.array([[[255, 127, 0]]], np.uint8))
    assert od[0, 0] == pytest.approx([0.0, np.log(2), np.log(256)], rel=1e-6)


def test_density_beyond_the_range_is_clipped() -> None:
    assert from_od(np.array([[[9.0, -1.0, 0.0]]], np.float32)).tolist() == [[[0, 255, 255]]]


@pytest.mark.parametrize("keep_glass", [True, False])
def test_identity_is_exact(every_value: Rgb, odd_tile: Rgb, keep_glass: bool) -> None:
    for image in (every_value, odd_tile):
        for vectors in (REFERENCE, RUIFROK):
            identity = scale_map(vectors, np.ones(3), np.zeros(3))
            assert np.array_equal(affine_od(image, *identity, keep_glass=keep_glass), image)


def test_affine_map_is_the_formula(tissue: Rgb) -> None:
    matrix, offset = np.array([[1.1, 0.1, 0.0], [0.05, 0.9, 0.0], [0.0, -0.1, 1.2]]), np.array([0.02, -0.03, 0.1])
    od = -np.log((tissue.astype(np.float64) + 1) / 256)
    expected = np.clip(np.rint(256 * np.exp(-(od @ matrix.T + offset)) - 1), 0, 255)
    found = affine_od(tissue, matrix, offset, keep_glass=False)
    assert np.abs(found - expected).max() <= 1  # ties of rounding
    assert (found != expected).mean() < 1e-3


def test_glass_is_untouched_and_tissue_takes_the_whole_change(tissue: Rgb) -> None:
    mean_od = to_od(tissue).mean(axis=2)
    glass, full = mean_od < GLASS_OD[0] - 1e-4, mean_od > GLASS_OD[1] + 1e-4
    assert 0.01 < glass.mean() < 0.9
    assert full.mean() > 0.1
    matrix, offset = np.eye(3) * 1.3, np.full(3, 0.2)
    kept, all_changed = affine_od(tissue, matrix, offset), affine_od(tissue, matrix, offset, keep_glass=False)
    assert np.array_equal(kept[glass], tissue[glass])
    assert np.array_equal(kept[full], all_changed[full])


def test_input_is_not_changed(tissue: Rgb) -> None:
    before = tissue.copy()
    affine_od(tissue, np.eye(3) * 1.4)
    assert np.array_equal(tissue, before)


@settings(max_examples=30, deadline=None)
@given(height=st.integers(1, 70), width=st.integers(1, 300))
def test_strips_do_not_show(height: int, width: int) -> None:
    image = np.random.default_rng(height * 1000 + width).integers(0, 256, (height, width, 3)).astype(np.uint8)
    whole = affine_od(image, np.eye(3) * 1.2)
    rows = [affine_od(image[row : row + 1], np.eye(3) * 1.2) for row in range(height)]
    assert np.array_equal(whole, np.concatenate(rows))


# -------------------------------------------------------------------------------------------------------------- stains


def test_amounts_agree_with_scikit_image(tissue: Rgb) -> None:
    """skimage's amounts are in units of log(1e-6) and its density is against 255 without the added 1."""
    ours = concentrations(tissue, RUIFROK) / -np.log(1e-6)
    # skimage scales rows differently: its matrix is Ruifrok's as published, which is of unit length to 1e-3.
    theirs = rgb2hed(tissue)
    bright = tissue.min(axis=2) > 60
    assert np.abs(ours - theirs)[bright & (theirs.min(axis=2) > 0)].max() < 0.004


def test_hed_change_agrees_with_scikit_image(tissue: Rgb) -> None:
    scale = np.array([1.15, 0.9, 1.0])
    theirs = rgb2hed(tissue)
    inside = (theirs > 0).all(axis=2) & (tissue.min(axis=2) > 30)  # skimage clips negative amounts
    expected = np.rint(hed2rgb(theirs * scale) * 255)
    found = affine_od(tissue, *scale_map(RUIFROK, scale, np.zeros(3)), keep_glass=False)
    assert inside.mean() > 0.05
    assert np.abs(found.astype(int) - expected)[inside].mean() < 0.8


def test_scaling_scales_the_amounts(tissue: Rgb) -> None:
    before = concentrations(tissue, REFERENCE)
    changed = affine_od(tissue, *scale_map(REFERENCE, np.array([1.2, 0.8, 1.0]), np.zeros(3)), keep_glass=False)
    after = concentrations(changed, REFERENCE)
    middle = (changed.min(axis=2) > 40) & (changed.max(axis=2) < 250)
    error = np.abs(after - before * [1.2, 0.8, 1.0])[middle]
    assert error.mean(axis=0).max() < 0.02  # 8 bits


def macenko_float64(rgb: Rgb, threshold: float) -> Floats:
    """Macenko et al. 2009 step by step, by SVD instead of the covariance."""
    od = -np.log((rgb.reshape(-1, 3).astype(np.float64) + 1) / 256)
    od = od[od.mean(axis=1) > threshold]
    _, _, directions = np.linalg.svd(od - od.mean(axis=0), full_matrices=False)
    plane = directions[:2] * np.sign(directions[:2].sum(axis=1, keepdims=True))
    projected = od @ plane.T
    phi = np.arctan2(projected[:, 1], projected[:, 0])
    ends = [plane.T @ [np.cos(p), np.sin(p)] for p in np.percentile(phi, [1, 99])]
    return np.array(sorted(ends, key=lambda v: -v[0] / np.linalg.norm(v)))


@pytest.mark.parametrize("seed", range(4))
def test_macenko_agrees_with_an_independent_one(seed: int) -> None:
    """Random sections: gamma-distributed amounts of two dyes near the reference, fewer pixels than are sampled."""
    rng = np.random.default_rng(seed)
    vectors = basis_of(*(REFERENCE[:2] + rng.normal(0, 0.04, (2, 3))))
    kind = rng.random(8_000) < 0.4
    amounts = np.stack([rng.gamma(3, np.where(kind, 0.5, 0.05)), rng.gamma(4, np.where(kind, 0.05, 0.2))], axis=1)
    image = from_od((amounts @ vectors[:2]).astype(np.float32)).reshape(80, 100, 3)
    found = macenko_basis(image)
    assert not found.fallback
    for row, expected in zip(found.vectors[:2], macenko_float64(image, GLASS_OD[1] / 2), strict=True):
        assert angle_deg(row, expected) < 0.2
    assert angle_deg(found.vectors[0], vectors[0]) < 4
    assert angle_deg(found.vectors[1], vectors[1]) < 4


@pytest.mark.parametrize("method", [macenko_basis, vahadane_basis])
def test_known_dyes_are_found(method: object) -> None:
    """A phantom without scanner: its dyes are known, and a gamma of 2.2 leaves their directions."""
    scene = make_scene(8, 260.0, margin_um=0.0, region_um=110.0)
    image = render(
        scene, "HE", Scanner("plain", 0.5, white=(255, 255, 255), flare=0.0, shot=0.0, read=0.0, sharpen=0.0)
    )
    found = method(image)  # type: ignore[operator]
    truth = STAININGS["HE"].matrix
    assert not found.fallback
    assert angle_deg(found.vectors[0], truth[0]) < 8
    assert angle_deg(found.vectors[1], truth[1]) < 8


@pytest.mark.parametrize("method", [macenko_basis, vahadane_basis])
def test_odd_tiles_fall_back_and_say_so(method: object, odd_tile: Rgb) -> None:
    found = method(odd_tile)  # type: ignore[operator]
    assert np.isfinite(found.vectors).all()
    assert np.linalg.norm(found.vectors, axis=1) == pytest.approx(np.ones(3))
    if len(np.unique(odd_tile.reshape(-1, 3), axis=0)) < 100:
        assert found.fallback
        assert np.array_equal(found.vectors, REFERENCE)


def test_appearance_of_an_odd_tile_is_the_references(odd_tile: Rgb) -> None:
    found = measure_appearance(odd_tile)
    if found.fallback:
        assert found.strength == REFERENCE_STRENGTH


def test_no_tiles_have_the_references_appearance() -> None:
    assert measure_appearance([]).fallback == "too little tissue"


def test_parallel_stains_are_refused() -> None:
    with pytest.raises(ValueError, match="different directions"):
        basis_of((0.5, 0.5, 0.5), (1, 1, 1))


# ---------------------------------------------------------------------------------------------------------- restaining


def test_swap_brings_the_target_appearance(tissue: Rgb) -> None:
    source = measure_appearance(tissue)
    target = Appearance(basis_of((0.58, 0.68, 0.45), (0.15, 0.85, 0.5)), (1.2, 0.9))
    found = measure_appearance(affine_od(tissue, *swap_map(source, target), keep_glass=False), target.vectors)
    assert found.strength == pytest.approx(target.strength, rel=0.05)


@pytest.mark.parametrize("strength", [0.3, 1.0])
def test_within_the_dyes_the_limits_do_nothing(strength: float) -> None:
    """Any mixture of two dyes, and what a scanner adds to it, is mapped by the formula alone."""
    rng = np.random.default_rng(0)
    source = Appearance(REFERENCE, (2.0, 1.0))
    target = Appearance(basis_of((0.6, 0.7, 0.3), (0.02, 0.9, 0.4)), (1.1, 1.4))
    amounts = np.column_stack([rng.uniform(0, 2, 4000), rng.uniform(0, 1.2, 4000), rng.uniform(-0.1, 0.1, 4000)])
    image = from_od((amounts @ REFERENCE).astype(np.float32).reshape(40, 100, 3))
    swap = swap_map(source, target, strength)
    plain = affine_od(image, swap.matrix, keep_glass=False)
    assert np.mean(plain != image) > 0.9
    assert np.array_equal(affine_od(image, *swap, keep_glass=False), plain)


def test_beyond_the_dyes_no_channel_changes_more_than_a_dye_does(every_value: Rgb) -> None:
    source = Appearance(REFERENCE, (2.0, 1.0))
    target = Appearance(basis_of((0.6, 0.7, 0.3), (0.1, 0.9, 0.4)), (1.1, 1.4))
    od = -np.log((every_value.astype(np.float64) + 1) / 256)
    ratio = np.array(target.strength) / source.strength
    dyes = ratio[:, None] * target.vectors[:2] / source.vectors[:2]
    least, greatest = np.minimum(np.minimum(*dyes), 1), np.maximum(np.maximum(*dyes), 1)
    plain = od @ swap_map(source, target).matrix.T
    expected = np.clip(plain, od * least - GLASS_OD[0], od * greatest + GLASS_OD[0])
    found = affine_od(every_value, *swap_map(source, target), keep_glass=False)
    assert np.mean(np.abs(expected - plain) > 0.1) > 0.2
    assert np.abs(found - np.clip(np.rint(256 * np.exp(-expected) - 1), 0, 255)).max() <= 1


@pytest.mark.parametrize("name", list(STAININGS_OF_LABORATORIES))
def test_black_in_one_channel_does_not_turn_into_light(name: str) -> None:
    """Sharpened, dark nuclei let no red pass at all: half their haematoxylin was a cyan speck."""
    dark = np.array([[[0, 20, 60], [0, 8, 45], [2, 30, 70], [0, 0, 30]]], np.uint8)
    restained = swap_stain(dark, Appearance(REFERENCE, (3.3, 2.4)), get_staining(name))
    assert restained.max() < 210  # 255 without limits
    # Nor do other amounts of the same dyes.
    paler = affine_od(dark, *scale_map(REFERENCE, np.array([0.5, 1.4, 1.0]), np.zeros(3)))
    assert paler.max() < 170


def test_swap_there_and_back_is_the_identity() -> None:
    one = Appearance(REFERENCE, (2.0, 1.0))
    two = Appearance(basis_of((0.6, 0.7, 0.3), (0.1, 0.9, 0.4)), (1.25, 1.6))  # as strong on average
    assert swap_map(two, one).matrix @ swap_map(one, two).matrix == pytest.approx(np.eye(3), abs=1e-12)
    assert swap_map(one, one).matrix == pytest.approx(np.eye(3), abs=1e-12)


@pytest.mark.parametrize(("strength", "kept"), [((0.5, 0.5), 0.5), ((1.0, 0.25), 0.5), ((4.0, 1.0), 1.0)])
def test_what_is_neither_stain_fades_with_both_and_never_grows(strength: tuple[float, float], kept: float) -> None:
    """Of eosin restained much paler, what a scanner saw beside it stayed whole and turned it olive."""
    target = Appearance(basis_of((0.6, 0.7, 0.3), (0.1, 0.9, 0.4)), strength)
    amounts = np.array([0.3, 0.2, 0.1])
    restained = swap_map(Appearance(REFERENCE, (1.0, 1.0)), target).matrix @ (amounts @ REFERENCE)
    found = restained @ np.linalg.inv(target.vectors)
    assert found == pytest.approx([0.3 * strength[0], 0.2 * strength[1], 0.1 * kept])


@pytest.mark.parametrize("side", [128, 224, 256, 400, 512, 1000])
def test_pixels_looked_at_are_of_all_columns_and_rows(side: int) -> None:
    """Of tiles of 256 and 512 px they were every 8th and every 32nd column, the borders of JPEG's blocks."""
    tile = np.zeros((side, side, 3), np.uint8)
    tile[..., 0], tile[..., 1] = np.arange(side) % 100, np.arange(side)[:, None] % 100
    found = tissue_pixels(tile)
    assert found is not None
    assert len(found) <= MAX_PIXELS
    for channel in (0, 1):
        assert len(np.unique(found[:, channel])) >= 90
