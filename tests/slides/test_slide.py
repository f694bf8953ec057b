"""`Slide` against images known in closed form, and under damage, threads, pickling and forks."""

import os
import pickle
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from PIL import ImageCms

from pathokd.errors import SlideError
from pathokd.slides import Slide, choose_level

Waves = Callable[[float, float, float, tuple[int, int]], npt.NDArray[np.float64]]
WriteSlide = Callable[..., Path]
BreakTile = Callable[[Path, int, int], None]


def as_levels(waves: Waves, sizes: list[tuple[int, int]]) -> list[npt.NDArray[np.uint8]]:
    width = sizes[0][0]
    return [np.rint(waves(0, 0, width / w, (w, h))).astype(np.uint8) for w, h in sizes]


def shift_and_stretch(got: npt.NDArray[np.floating], want: npt.NDArray[np.floating]) -> tuple[float, float]:
    """Displacement of `got` against `want` along rows, in pixels: at the middle, and end minus start.

    Least squares of the difference on the gradient (first order of Taylor), with and without a ramp.
    """
    gradient = np.gradient(want, axis=1)
    ramp = np.linspace(-0.5, 0.5, want.shape[1])[None] * gradient
    basis = np.stack([gradient.ravel(), ramp.ravel()], axis=1)
    middle, stretch = np.linalg.lstsq(basis, (got - want).ravel(), rcond=None)[0]
    return float(middle), float(stretch)


@pytest.mark.parametrize("mpp_level0", [0.2738, 0.3455, 0.25, 0.2211, 0.499])
@pytest.mark.parametrize("mpp", [0.5, 0.88, 2.0])
def test_field_of_view_at_odd_mpp(write_slide: WriteSlide, waves: Waves, mpp_level0: float, mpp: float) -> None:
    # 1999 / 500 = 3.998: a downsample that int() would take for 3, as 3.9994 is on real slides.
    path = write_slide(as_levels(waves, [(1999, 1999), (500, 500)]), mpp=mpp_level0)
    down = mpp / mpp_level0
    with Slide(path) as slide:
        assert slide.level_downsamples == pytest.approx((1, 3.998))
        for x, y in [(0, 0), (301, 403), (118, 7)]:
            got = slide.read_tile(x, y, mpp=mpp, tile_px=150).astype(float)
            want = waves(x, y, down, (150, 150))
            for channel, picture in enumerate((got[..., 0], got[..., 1].T)):
                truth = want[..., channel] if channel == 0 else want[..., channel].T
                shift, stretch = shift_and_stretch(picture, truth)
                matched = abs(choose_level(slide.level_downsamples, down).scale - 1) * 150 < 0.5
                assert abs(shift) < (0.51 if matched else 0.05)
                assert abs(stretch) < (0.51 if matched else 0.05)
            if not matched:
                # Two roundings to 8 bit; on a coarse level also OpenSlide's linear placement between its
                # pixels.
                assert np.abs(got - want).max() < (2.1 if down < 3.9 else 5)


def test_level_match_is_untouched(write_slide: WriteSlide, waves: Waves) -> None:
    levels = as_levels(waves, [(1999, 1999), (500, 500)])
    with Slide(write_slide(levels, mpp=0.25)) as slide:
        assert np.array_equal(slide.read_tile(37, 41, mpp=0.25, tile_px=64), levels[0][41:105, 37:101])
        got = slide.read_tile(400, 800, mpp=1.0, tile_px=64)
        # 400 / 3.998 = 100.05, 800 / 3.998 = 200.1: the nearest level pixels are 100 and 200. OpenSlide takes
        # whole level-0 pixels, so it lands within an eighth of a level pixel, and 31 grey levels per pixel is
        # the slope.
        assert np.abs(got.astype(int) - levels[1][200:264, 100:164]).max() <= 31 / 8 + 1


def test_upsampling_is_refused_unless_asked_for(write_slide: WriteSlide, waves: Waves) -> None:
    with Slide(write_slide(as_levels(waves, [(600, 600)]), mpp=0.5)) as slide:
        with pytest.raises(SlideError, match=r"0\.5 um/px at best.*coarser"):
            slide.read_tile(0, 0, mpp=0.25, tile_px=100)
        got = slide.read_tile(50, 60, mpp=0.25, tile_px=300, allow_upsampling=True)
        assert np.abs(got - waves(50, 60, 0.5, (300, 300))).max() < 3


def test_outside_and_transparent_are_white(write_slide: WriteSlide) -> None:
    grey = np.full((300, 300, 3), 100, np.uint8)
    with Slide(write_slide(grey, name="opaque.tif")) as slide:
        tile = slide.read_tile(-50, 250, mpp=0.5, tile_px=100)
        assert (tile[:50, 50:] == 100).all()
        assert (tile[50:] == 255).all()
        assert (tile[:, :50] == 255).all()
        far = slide.read_tile(5000, 5000, mpp=1.0, tile_px=16)
        assert (far == 255).all()
        small = slide.read_tile(-50, 250, mpp=1.0, tile_px=50)
        assert small.min() >= 100
        assert (small[:, :25] == 255).all()


def test_alpha_is_laid_on_white() -> None:
    from pathokd.slides.colour import on_white

    rgba = np.zeros((2, 2, 4), np.uint8)
    rgba[0, 0] = (10, 20, 30, 255)
    rgba[0, 1] = (200, 100, 0, 128)
    assert on_white(rgba).tolist() == [[[10, 20, 30], [227, 177, 127]], [[255] * 3, [255] * 3]]


def test_thumbnail(write_slide: WriteSlide, waves: Waves) -> None:
    with Slide(write_slide(as_levels(waves, [(1999, 1203)]), mpp=None)) as slide:
        thumb = slide.thumbnail(500)
        assert thumb.shape == (301, 500, 3)
        want = waves(0, 0, 1999 / 500, (500, 301))
        assert np.abs(thumb[:-1, :-1] - want[:-1, :-1]).max() < 2.1
        assert slide.thumbnail(10_000).shape == (1203, 1999, 3)


def test_no_mpp_opens_but_says_so(write_slide: WriteSlide, waves: Waves) -> None:
    with Slide(write_slide(as_levels(waves, [(300, 300)]), mpp=None)) as slide:
        with pytest.raises(SlideError, match=r"has no mpp: pass .*--mpp-level0 .*`mpp` column"):
            _ = slide.mpp
        with pytest.raises(SlideError, match="no mpp"):
            slide.read_tile(0, 0, mpp=0.5, tile_px=10)
        assert any("no mpp" in w for w in slide.warnings)


def test_given_mpp_wins(write_slide: WriteSlide, waves: Waves) -> None:
    with Slide(write_slide(as_levels(waves, [(300, 300)]), mpp=0.5), mpp=0.25) as slide:
        assert (slide.mpp, slide.mpp_source) == (0.25, "given")


def test_missing_and_foreign_files(tmp_path: Path) -> None:
    with pytest.raises(SlideError, match="does not exist"):
        Slide(tmp_path / "none.svs")
    (tmp_path / "text.tif").write_text("no slide")
    with pytest.raises(SlideError, match="of no format"):
        Slide(tmp_path / "text.tif")
    (tmp_path / "empty.svs").write_bytes(b"")
    with pytest.raises(SlideError, match="of no format"):
        Slide(tmp_path / "empty.svs")


def test_truncated_slide(write_slide: WriteSlide, waves: Waves) -> None:
    path = write_slide(as_levels(waves, [(1999, 1999), (500, 500)]))
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(SlideError):
        Slide(path).read_tile(0, 1500, mpp=0.5, tile_px=224)


@pytest.fixture
def damaged(write_slide: WriteSlide, waves: Waves, break_tile: BreakTile) -> Path:
    """1024 x 1024 px of JPEG tiles of 256 px; the second tile of the first row is broken."""
    path = write_slide(as_levels(waves, [(1024, 1024)]), compression="jpeg")
    break_tile(path, 0, 1)
    return path


def test_damage_is_local(damaged: Path) -> None:
    with Slide(damaged) as slide:
        before = slide.read_tile(0, 0, mpp=0.5, tile_px=256)
        with pytest.raises(SlideError, match=r"slide.tif cannot be read at x=256, y=0.*damaged"):
            slide.read_tile(256, 0, mpp=0.5, tile_px=256)
        assert np.array_equal(slide.read_tile(0, 0, mpp=0.5, tile_px=256), before)
        assert slide.read_tile(512, 512, mpp=0.5, tile_px=256).std() > 10
        with pytest.raises(SlideError, match=r"6.2% of"):
            slide.thumbnail(1024)
        unreadable = slide.overview(max_px=1024).unreadable
        assert unreadable[:256, 256:512].all()
        assert unreadable.sum() == 256 * 256


def test_damage_does_not_reach_other_threads(damaged: Path) -> None:
    with Slide(damaged) as slide:
        good = [(x, y) for y in range(256, 768, 64) for x in range(0, 768, 64)]
        truth = {c: slide.read_tile(*c, mpp=0.5, tile_px=224) for c in good}

        def read(corner: tuple[int, int]) -> bool:
            if corner == (256, 0):
                with pytest.raises(SlideError):
                    slide.read_tile(*corner, mpp=0.5, tile_px=224)
                return True
            return np.array_equal(slide.read_tile(*corner, mpp=0.5, tile_px=224), truth[corner])

        jobs = [c for corner in good for c in (corner, (256, 0))]
        with ThreadPoolExecutor(8) as pool:
            assert all(pool.map(read, jobs * 2))


def test_pickle_reopens(write_slide: WriteSlide, waves: Waves) -> None:
    with Slide(write_slide(as_levels(waves, [(600, 600)])), mpp=0.3) as slide:
        copy = pickle.loads(pickle.dumps(slide))
        assert copy._open is None
        assert copy.mpp == 0.3
        tile = slide.read_tile(9, 9, mpp=0.5, tile_px=100)
        assert np.array_equal(copy.read_tile(9, 9, mpp=0.5, tile_px=100), tile)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")  # Python 3.12 warns of what is tested here.
def test_fork_reopens(write_slide: WriteSlide, waves: Waves) -> None:
    with Slide(write_slide(as_levels(waves, [(600, 600)]))) as slide:
        tile = slide.read_tile(9, 9, mpp=1.0, tile_px=100)
        child = os.fork()
        if child == 0:
            parents = slide._open
            same = np.array_equal(slide.read_tile(9, 9, mpp=1.0, tile_px=100), tile)
            os._exit(0 if same and slide._open is not parents else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert np.array_equal(slide.read_tile(9, 9, mpp=1.0, tile_px=100), tile)


def test_close_and_read_again(write_slide: WriteSlide, waves: Waves) -> None:
    slide = Slide(write_slide(as_levels(waves, [(600, 600)])))
    slide.close()
    slide.close()
    assert slide.read_tile(0, 0, mpp=0.5, tile_px=8).shape == (8, 8, 3)
    slide.close()


def test_icc_is_applied_after_the_resize(write_slide: WriteSlide, tissue_like: npt.NDArray[np.uint8]) -> None:
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    # Red and blue exchanged in the tag table: a scanner whose conversion is known without a colour engine.
    names = {b"rXYZ": b"bXYZ", b"bXYZ": b"rXYZ"}
    swapped = re.sub(b"[rb]XYZ", lambda tag: names[tag.group()], srgb)
    path = write_slide(tissue_like, iccprofile=swapped)
    with Slide(path) as plain, Slide(path, icc=True) as managed:
        assert plain.icc_profile == swapped
        for mpp in (0.5, 1.7):
            a, b = (s.read_tile(100, 100, mpp=mpp, tile_px=200).astype(int) for s in (plain, managed))
            assert np.abs(a[..., ::-1] - b).max() <= 1
        assert not managed.warnings
    with Slide(write_slide(tissue_like, name="bare.tif"), icc=True) as bare:
        assert any("no ICC profile" in w for w in bare.warnings)


def test_broken_icc_profile(write_slide: WriteSlide, tissue_like: npt.NDArray[np.uint8]) -> None:
    path = write_slide(tissue_like, iccprofile=b"nonsense" * 20)
    with pytest.raises(SlideError, match="ICC"), Slide(path, icc=True) as slide:
        slide.read_tile(0, 0, mpp=0.5, tile_px=10)


def test_arguments(write_slide: WriteSlide, tissue_like: npt.NDArray[np.uint8]) -> None:
    with Slide(write_slide(tissue_like)) as slide:
        for mpp, side in [(0.0, 10), (float("nan"), 10), (0.5, 0)]:
            with pytest.raises(ValueError, match="positive"):
                slide.read_tile(0, 0, mpp=mpp, tile_px=side)
