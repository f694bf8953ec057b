import pytest

from pathokd.errors import SlideError
from pathokd.slides.resolution import resolve_mpp

OPENSLIDE = {"openslide.mpp-x": "0.25", "openslide.mpp-y": "0.25"}
OME = {"ome.PhysicalSizeX": "0.3", "ome.PhysicalSizeY": "0.3"}
# 20000 pixels per cm are 0.5 um each.
TIFF = {"tiff.ResolutionUnit": "centimeter", "tiff.XResolution": "20000", "tiff.YResolution": "20000"}
INCH = {"tiff.ResolutionUnit": "inch", "tiff.XResolution": "25400"}
POWER = {"openslide.objective-power": "40"}


@pytest.mark.parametrize(
    ("properties", "given", "mpp", "source"),
    [
        (OPENSLIDE | OME | TIFF | POWER, 0.7, 0.7, "given"),
        (OPENSLIDE | OME | TIFF | POWER, None, 0.25, "openslide"),
        (OME | TIFF | POWER, None, 0.3, "ome"),
        (TIFF | POWER, None, 0.5, "tiff"),
        (INCH, None, 1.0, "tiff"),
        (POWER, None, 0.25, "objective"),
        ({"openslide.mpp-x": "0.4"}, None, 0.4, "openslide"),
        ({"openslide.mpp-x": "nonsense"} | POWER, None, 0.25, "objective"),
        ({"tiff.ResolutionUnit": "centimeter", "tiff.XResolution": "0"} | POWER, None, 0.25, "objective"),
    ],
)
def test_order(properties: dict[str, str], given: float | None, mpp: float, source: str) -> None:
    found = resolve_mpp(properties, given, "a.svs")
    assert (found.mpp_x, found.mpp_y) == pytest.approx((mpp, mpp))
    assert found.source == source
    assert not found.warnings


def test_implausible_is_passed_over_with_a_warning() -> None:
    found = resolve_mpp({"openslide.mpp-x": "264.58", "openslide.mpp-y": "264.58"} | POWER, None, "a.svs")
    assert (found.mpp_x, found.source) == (0.25, "objective")
    assert "264.6 um/px (openslide.mpp-x)" in found.warnings[0]


@pytest.mark.parametrize("mpp", ["264.6", "0.01", "0", "-1", "nan", "inf"])
def test_only_implausible(mpp: str) -> None:
    with pytest.raises(SlideError, match=r"a\.svs has only an mpp of .*outside 0\.05 to 20 um/px: pass .*--mpp-level0"):
        resolve_mpp({"openslide.mpp-x": mpp, "openslide.mpp-y": mpp}, None, "a.svs")


def test_same_number_from_two_sources_is_named_once() -> None:
    properties = {
        "openslide.mpp-x": "264.58333",
        "tiff.ResolutionUnit": "inch",
        "tiff.XResolution": "96",
        "tiff.YResolution": "96",
    }
    with pytest.raises(SlideError) as caught:
        resolve_mpp(properties, None, "a.svs")
    assert str(caught.value).count("264.6") == 1


def test_given_must_be_plausible() -> None:
    with pytest.raises(SlideError, match=r"given for a\.svs is 250 um/px"):
        resolve_mpp(OPENSLIDE, 250.0, "a.svs")


def test_anisotropy() -> None:
    assert not resolve_mpp({"openslide.mpp-x": "0.25", "openslide.mpp-y": "0.2524"}, None, "a").warnings
    found = resolve_mpp({"openslide.mpp-x": "0.25", "openslide.mpp-y": "0.26"}, None, "a")
    assert "not square" in found.warnings[0]


def test_otherwise_comes_last() -> None:
    mute = {"openslide.mpp-x": "264.6", "openslide.mpp-y": "264.6"}
    assert resolve_mpp(mute, None, "a.svs", 0.5)[:3] == (0.5, 0.5, "given")
    assert resolve_mpp(POWER, None, "a.svs", 0.5)[:3] == (0.25, 0.25, "objective")
    assert resolve_mpp(POWER, 0.3, "a.svs", 0.5)[:3] == (0.3, 0.3, "given")
    assert not resolve_mpp(POWER, None, "a.svs", 0.2501).warnings
    with pytest.raises(SlideError, match=r"given for a\.svs is 0 um/px"):
        resolve_mpp(POWER, None, "a.svs", 0.0)
