"""Files that OpenSlide refuses (OME-TIFF, plain and planar TIFF, pictures), tiles decoded beside OpenSlide, and the
sentences for what nobody reads."""

import pickle
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import tifffile
from PIL import Image

from pathokd.errors import SlideError
from pathokd.phantom import write_pyramid
from pathokd.phantom.pyramid import Flavour
from pathokd.slides import Slide, inspect_slide
from pathokd.slides.readers import OpenSlideReader
from pathokd.slides.tiled import TiledPage, _TileCache

Picture = npt.NDArray[np.uint8]


@pytest.fixture
def picture() -> Picture:
    return np.random.default_rng(0).integers(0, 255, (700, 900, 3)).astype(np.uint8)


def write_ome(path: Path, levels: list[Picture], unit: str = "µm", size: float = 0.25) -> Path:
    facts = {
        "PhysicalSizeX": size,
        "PhysicalSizeXUnit": unit,
        "PhysicalSizeY": size,
        "PhysicalSizeYUnit": unit,
    }
    options = {"photometric": "rgb", "tile": (256, 256), "compression": "zlib"}
    with tifffile.TiffWriter(path, ome=True) as writer:
        writer.write(levels[0], subifds=len(levels) - 1, metadata={"axes": "YXS", **facts}, **options)
        for level in levels[1:]:
            writer.write(level, subfiletype=1, **options)
    return path


def test_ome_pyramid(tmp_path: Path, picture: Picture) -> None:
    half = picture[::2, ::2].copy()
    with Slide(write_ome(tmp_path / "a.ome.tif", [picture, half])) as slide:
        assert (slide.vendor, slide.mpp, slide.mpp_source) == ("ome-tiff", 0.25, "ome")
        assert slide.dimensions == (900, 700)
        assert slide.level_downsamples == (1.0, 2.0)
        assert np.array_equal(slide.read_tile(130, 270, mpp=0.25, tile_px=300), picture[270:570, 130:430])
        assert np.array_equal(slide.read_tile(100, 200, mpp=0.5, tile_px=150), half[100:250, 50:200])
        edge = slide.read_tile(800, 600, mpp=0.25, tile_px=200)
        assert np.array_equal(edge[:100, :100], picture[600:, 800:])
        assert (edge[100:] == 255).all()
        assert (slide.read_tile(-300, 0, mpp=0.25, tile_px=100) == 255).all()
        copy = pickle.loads(pickle.dumps(slide))
        assert np.array_equal(copy.thumbnail(100), slide.thumbnail(100))


def test_the_largest_image_of_an_ome_is_the_slide(tmp_path: Path, picture: Picture) -> None:
    """Label and macro may come first, with a resolution and an objective of their own."""
    path = tmp_path / "a.ome.tif"
    with tifffile.TiffWriter(path, ome=True) as writer:
        for name, image, um in (("macro", picture[::7, ::7], 30.0), ("scan", picture, 0.25)):
            facts = {"Name": name, "PhysicalSizeX": um, "PhysicalSizeY": um}
            writer.write(image.copy(), metadata={"axes": "YXS", **facts}, photometric="rgb", tile=(256, 256))
    xml = tifffile.tiffcomment(path)
    powers = "".join(f'<Objective ID="{i}" NominalMagnification="{power}"/>' for i, power in enumerate(("1", "40")))
    for i in (0, 1):
        xml = xml.replace(f'<Pixels ID="Pixels:{i}"', f'<ObjectiveSettings ID="{i}"/><Pixels ID="Pixels:{i}"')
    start = xml.index("<Image")
    tifffile.tiffcomment(path, f"{xml[:start]}<Instrument>{powers}</Instrument>{xml[start:]}".encode())
    with Slide(path) as slide:
        assert (slide.dimensions, slide.mpp, slide.mpp_source) == ((900, 700), 0.25, "ome")
        assert slide.properties["openslide.objective-power"] == "40"
        assert slide.associated_images == ("macro",)
        assert np.array_equal(slide.read_tile(130, 270, mpp=0.25, tile_px=300), picture[270:570, 130:430])


@pytest.mark.parametrize(("unit", "size"), [("\u03bcm", 0.25), ("nm", 250.0), ("mm", 0.00025)])
def test_ome_units(tmp_path: Path, picture: Picture, unit: str, size: float) -> None:
    with Slide(write_ome(tmp_path / "a.ome.tif", [picture], unit, size)) as slide:
        assert slide.mpp == pytest.approx(0.25)


@pytest.mark.parametrize(
    "options", [{}, {"planarconfig": "separate"}, {"tile": (256, 256), "planarconfig": "separate"}]
)
def test_plain_tiff(tmp_path: Path, picture: Picture, options: dict[str, object]) -> None:
    path = tmp_path / "plain.tif"
    planar = "planarconfig" in options
    tifffile.imwrite(
        path, np.moveaxis(picture, -1, 0) if planar else picture, photometric="rgb",
        resolution=(40_000, 40_000), resolutionunit="CENTIMETER", metadata=None, **options,
    )  # fmt: skip
    with Slide(path) as slide:
        assert slide.mpp == 0.25
        assert np.array_equal(slide.read_tile(500, 400, mpp=0.25, tile_px=100), picture[400:500, 500:600])


@pytest.mark.parametrize(
    "pixels",
    [np.zeros((64, 64), np.uint8), np.zeros((64, 64, 3), np.uint16), np.zeros((5, 64, 64), np.uint8)],
)
def test_no_rgb(tmp_path: Path, pixels: npt.NDArray[np.generic]) -> None:
    path = tmp_path / "odd.ome.tif"
    tifffile.imwrite(path, pixels)
    with pytest.raises(SlideError, match="expected one 8-bit RGB image"):
        Slide(path)


@pytest.mark.parametrize("kind", ["unassalpha", "assocalpha"])
@pytest.mark.parametrize("options", [{}, {"tile": (256, 256), "metadata": {"axes": "YXS"}}], ids=["strips", "ome"])
def test_transparent_pixels_of_a_tiff_are_white(
    tmp_path: Path, picture: Picture, kind: str, options: dict[str, object]
) -> None:
    alpha = np.full((700, 900, 1), 255, np.uint8)
    alpha[:100], alpha[100:200] = 0, 51
    stored = (picture * (alpha / 255)).round() if kind == "assocalpha" else picture
    path = tmp_path / ("a.ome.tif" if options else "a.tif")
    rgba = np.concatenate([np.where(alpha > 0, stored, 0).astype(np.uint8), alpha], axis=2)
    tifffile.imwrite(path, rgba, photometric="rgb", extrasamples=[kind], **options)
    with Slide(path, mpp=0.25) as slide:
        assert slide.vendor in ("tifffile", "ome-tiff")
        found = slide.read_tile(0, 0, mpp=0.25, tile_px=700).astype(int)
    assert (found[:100] == 255).all()
    assert np.abs(found[100:200] - (255 + (picture[100:200, :700] - 255.0) * 0.2)).max() <= 1
    assert np.array_equal(found[200:], picture[200:, :700])


def test_colours_that_are_not_rgb_are_refused(tmp_path: Path, picture: Picture) -> None:
    for mode in ("CMYK", "YCbCr"):
        Image.fromarray(picture).convert(mode).save(tmp_path / "a.tif")
        with pytest.raises(SlideError, match=r"stores its colours as (SEPARATED|YCBCR), expected RGB"):
            Slide(tmp_path / "a.tif")
    Image.fromarray(picture[..., 0].astype(np.uint16) * 257).save(tmp_path / "deep.png")
    with pytest.raises(SlideError, match="holds pixels of the kind I;16, expected 8 bits a channel"):
        Slide(tmp_path / "deep.png")


def test_a_jpeg_tile_that_the_end_of_the_file_cuts_off_is_not_made_up(tmp_path: Path, picture: Picture) -> None:
    path = tmp_path / "cut.tif"
    options = {"photometric": "rgb", "compression": "jpeg", "tile": (256, 256), "metadata": None}
    with tifffile.TiffWriter(path) as writer:
        writer.write(picture, resolution=(40_000, 40_000), resolutionunit="CENTIMETER", **options)
        writer.write(picture[::2, ::2].copy(), subfiletype=1, **options)  # OpenSlide hashes all of this one
    with tifffile.TiffFile(path, mode="r+b") as file:
        page, end = file.pages[0], path.stat().st_size
        offset, count = page.dataoffsets[5], page.databytecounts[5]
        half = path.read_bytes()[offset : offset + count // 2]
        page.tags["TileOffsets"].overwrite([*page.dataoffsets[:5], end, *page.dataoffsets[6:]])
    with open(path, "ab") as raw:
        raw.write(half)
    with tifffile.TiffFile(path) as file, pytest.raises(tifffile.TiffFileError, match="the file ends within tile 5"):
        TiledPage(file.pages[0]).read(256, 256, (256, 256))
    with Slide(path) as slide:
        assert slide.read_tile(0, 0, mpp=0.25, tile_px=256).any()
        with pytest.raises(SlideError, match="cannot be read at x=256, y=256"):
            slide.read_tile(256, 256, mpp=0.25, tile_px=256)


def test_damaged_ome_tile(tmp_path: Path, picture: Picture) -> None:
    path = write_ome(tmp_path / "a.ome.tif", [picture])
    with tifffile.TiffFile(path) as file:
        offset = file.pages[0].dataoffsets[0]
    with open(path, "r+b") as raw:
        raw.seek(offset)
        raw.write(b"\0" * 5000)
    with Slide(path) as slide:
        with pytest.raises(SlideError, match="cannot be read at x=0, y=0"):
            slide.read_tile(0, 0, mpp=0.25, tile_px=100)
        assert np.array_equal(slide.read_tile(300, 300, mpp=0.25, tile_px=100), picture[300:400, 300:400])


def test_png_with_alpha_and_given_mpp(tmp_path: Path, picture: Picture) -> None:
    alpha = np.full((700, 900), 255, np.uint8)
    alpha[:100] = 0
    Image.fromarray(np.dstack([picture, alpha])).save(tmp_path / "field.png")
    with Slide(tmp_path / "field.png", mpp=0.5) as slide:
        assert slide.vendor == "picture"
        tile = slide.read_tile(10, 50, mpp=0.5, tile_px=100)
        assert (tile[:50] == 255).all()
        assert np.array_equal(tile[50:], picture[100:150, 10:110])
    assert "no mpp" in inspect_slide(tmp_path / "field.png")["error"]


def test_inspect(tmp_path: Path, picture: Picture) -> None:
    facts = inspect_slide(write_ome(tmp_path / "a.ome.tif", [picture, picture[::2, ::2].copy()]))
    assert facts["usable"]
    assert facts["error"] is None
    assert facts["levels"][1] == {"width": 450, "height": 350, "downsample": 2.0, "mpp": 0.5}
    broken = inspect_slide(tmp_path / "none.svs")
    assert not broken["usable"]
    assert "does not exist" in broken["error"]


def both_ways(reader: OpenSlideReader, level: int, rng: np.random.Generator, boxes: int) -> Iterator[bool]:
    """Whether direct and composited pixels are equal, for boxes in and across the edges of a level."""
    width, height = reader.dimensions
    down = reader.level_downsamples[level]
    for _ in range(boxes):
        size = (int(rng.integers(1, 600)), int(rng.integers(1, 600)))
        at = [round(int(rng.integers(-300, side + 100) / down) * down) for side in (width, height)]
        if at[0] % down == 0 and at[1] % down == 0:
            box = reader._direct[level].read(round(at[0] / down), round(at[1] / down), size)
            yield np.array_equal(box, reader._composited((at[0], at[1]), level, size))


@pytest.mark.parametrize("flavour", ["generic-tiff", "aperio"])
def test_direct_pixels_are_openslides(tmp_path: Path, picture: Picture, flavour: Flavour) -> None:
    reader = OpenSlideReader(write_pyramid(tmp_path / "slide.tif", picture, 0.5, flavour=flavour, downsamples=(4.0,)))
    assert set(reader._direct) == {0, 1}
    equal = [same for level in (0, 1) for same in both_ways(reader, level, np.random.default_rng(1), 40)]
    assert len(equal) > 60
    assert all(equal)


@pytest.mark.parametrize("flavour", ["generic-tiff", "aperio"])
def test_left_out_tiles_are_as_openslide_has_them(tmp_path: Path, picture: Picture, flavour: Flavour) -> None:
    """White, but for coarser levels of Aperio slides, which OpenSlide draws from the finer one."""
    path = write_pyramid(tmp_path / "slide.tif", picture[:600, :800], 0.5, flavour=flavour, downsamples=(2.0,))
    with tifffile.TiffFile(path, mode="r+b") as file:
        for page in (page for page in file.pages if page.is_tiled):
            page.tags["TileByteCounts"].overwrite([*page.databytecounts[:-1], 0])
    reader = OpenSlideReader(path)
    for level in (0, 1):
        assert reader.read_region((0, 0), level, (200, 200)).std() > 1  # whereupon a page is trusted
        width, height = reader.level_dimensions[level]
        found = reader.read_region((0, 0), level, (width, height))
        assert np.array_equal(found, reader._composited((0, 0), level, (width, height)))
        left_out = found[height - height % 256 :, width - width % 256 :]
        assert (left_out == 255).all() == (level == 0 or flavour == "generic-tiff")


@pytest.mark.parametrize("name", ["wsi_cmu1/CMU-1_section2_20x.tif", "wsi_small/CMU-1-Small-Region.svs"])
def test_direct_pixels_are_openslides_on_real_slides(real_data: Path, name: str) -> None:
    reader = OpenSlideReader(real_data / name)
    equal = [same for level in reader._direct for same in both_ways(reader, level, np.random.default_rng(2), 25)]
    assert len(equal) >= 25
    assert all(equal)


def test_a_page_that_differs_is_left_to_openslide(tmp_path: Path, picture: Picture) -> None:
    path = write_pyramid(tmp_path / "slide.tif", picture, 0.5)
    reader, other = OpenSlideReader(path), OpenSlideReader(path)
    reader._direct = {0: TiledPage(_shifted(other))}
    expected = reader._composited((0, 0), 0, (300, 300))
    assert np.array_equal(reader.read_region((0, 0), 0, (300, 300)), expected)
    assert reader._direct == {}


def _shifted(reader: OpenSlideReader) -> object:
    """The first page of an open slide, with its tiles rolled by one: plausible pixels in the wrong place."""
    page = reader._file.pages[0]
    page.dataoffsets = page.dataoffsets[1:] + page.dataoffsets[:1]
    page.databytecounts = page.databytecounts[1:] + page.databytecounts[:1]
    return page


def test_threads_share_decoded_tiles(tmp_path: Path, picture: Picture) -> None:
    with Slide(write_pyramid(tmp_path / "slide.tif", picture, 0.5)) as slide:
        corners = [(x, y) for y in range(0, 450, 50) for x in range(0, 650, 50)]
        alone = [slide.read_tile(*corner, mpp=0.5, tile_px=224) for corner in corners]
        with ThreadPoolExecutor(8) as pool:
            together = list(pool.map(lambda corner: slide.read_tile(*corner, mpp=0.5, tile_px=224), corners))
        assert all(np.array_equal(a, b) for a, b in zip(alone, together, strict=True))


def test_the_cache_keeps_its_size() -> None:
    cache = _TileCache(10 * 300)
    for number in range(50):
        tile = cache.get((0, number), lambda key: np.full((10, 10, 3), key[1], np.uint8))
        assert tile is not None
        assert (tile == number).all()
    assert cache._held <= 10 * 300
    with pytest.raises(ValueError, match="broken"):
        cache.get((0, 99), _broken)
    assert cache.get((0, 99), lambda key: None) is None


def _broken(key: tuple[int, int]) -> Picture:
    raise ValueError("broken")
