"""Every real file: who opens, who is refused, and with which words."""

import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pathokd.slides import Slide, TileManifest, TileSpec, find_slides, inspect_slide, tile_slides, tissue_mask

USABLE = {
    "CMU-1-Small-Region.svs": ("aperio", 0.499, "openslide"),
    "OS-1-detail.ome.tif": ("ome-tiff", 0.2271, "ome"),
    "OS-2-ndpi.ome.tif": ("ome-tiff", 0.2271, "ome"),
    "OS-2-vsi.ome.tif": ("ome-tiff", 0.3461, "ome"),
    "instanseg_HE_example.tif": ("ome-tiff", 0.5001, "ome"),
    "openslide_small.svs": ("aperio", 0.499, "openslide"),
}
REFUSED = {
    "TCGA-CR-7395-01A-01-TS1.svs": "no mpp",
    "CropBreastSlide.tiff": r"264\.6 um/px",
    "boxes.tiff": r"352\.8 um/px",
    "test3-DAPI-2-387.ndpi": "brightfield",
    "test3-TRITC-2-560.ndpi": "brightfield",
    "pathml_small_dicom.dcm": "refuses",
    "camelyon_jpeg.dcm": r"28\.97 um/px",
    "camelyon_jpeg2000.dcm": r"28\.97 um/px",
}


def file_named(real_data: Path, name: str) -> Path:
    return real_data / ("wsi_dicom" if name.endswith(".dcm") else "wsi_small") / name


@pytest.mark.parametrize("name", USABLE)
def test_usable(real_data: Path, name: str) -> None:
    facts = inspect_slide(file_named(real_data, name))
    vendor, mpp, source = USABLE[name]
    assert (facts["usable"], facts["vendor"], facts["mpp_source"]) == (True, vendor, source)
    assert facts["mpp"] == pytest.approx(mpp, abs=1e-4)


@pytest.mark.parametrize("name", REFUSED)
def test_refused(real_data: Path, name: str) -> None:
    error = inspect_slide(file_named(real_data, name))["error"]
    assert error is not None
    assert re.search(REFUSED[name], error)
    assert error.endswith(".")


def test_same_field_on_two_scanners(real_data: Path) -> None:
    # The README: the same 500 x 500 um field, aligned by eye to about 5 px.
    views = []
    for name in ("OS-2-ndpi.ome.tif", "OS-2-vsi.ome.tif"):
        with Slide(file_named(real_data, name)) as slide:
            views.append(slide.read_tile(0, 0, mpp=4.0, tile_px=124).astype(float).mean(axis=2))
    assert np.corrcoef(views[0].ravel(), views[1].ravel())[0, 1] > 0.6


def test_jpeg2000_with_icc(real_data: Path) -> None:
    path = file_named(real_data, "TCGA-CR-7395-01A-01-TS1.svs")
    with Slide(path, mpp=0.25) as plain, Slide(path, mpp=0.25, icc=True) as managed:
        a, b = (s.read_tile(1500, 1500, mpp=0.5, tile_px=224).astype(int) for s in (plain, managed))
    # This slide's profile is sRGB itself.
    assert np.abs(a - b).max() <= 1
    assert a.std() > 10


def test_tile_everything(real_data: Path, tmp_path: Path) -> None:
    sources = find_slides([real_data / "wsi_small", real_data / "wsi_dicom", real_data / "wsi_cmu1"])
    summary = tile_slides(sources, TileSpec(), tmp_path).set_index("slide_id")
    assert len(summary) == 19  # of 21 files: two DICOM series have two
    assert (summary["status"] == "failed").sum() == len(REFUSED) + 1
    assert "upsampling" in summary.loc["CMU-1_overview_5x", "message"]
    # By eye: both sections fill about half their field, 9400 x 11500 px hold 41 x 51 tiles.
    assert 1050 < summary.loc["CMU-1_section2_20x", "n_tiles"] < 1250
    assert summary.loc["OS-1-detail", "n_tiles"] == 4
    assert len(TileManifest.read(tmp_path / "manifest.parquet").frame) == summary["n_tiles"].sum()


def picture(real_data: Path, name: str) -> np.ndarray:
    return np.asarray(Image.open(real_data / "qc_tiles" / name).convert("RGB"))


@pytest.mark.parametrize(
    ("name", "mpp", "low", "high"),
    [
        ("histolab_almost-white-1.png", 0.5, 0, 0),
        ("histolab_no-tissue.png", 0.5, 0, 0),
        ("histolab_no-tissue-green-pen.png", 0.5, 0, 0),
        ("histolab_high-nuclei-score-level0.png", 0.5, 0.98, 1),
        ("histolab_medium-nuclei-score-level0.png", 0.5, 0.95, 1),
        ("histoqc_coverslip_edge.png", 20, 0.35, 0.55),
        ("histoqc_pen_green.png", 20, 0.14, 0.3),
        ("histoqc_pen_red.png", 20, 0.4, 0.5),
    ],
)
def test_masks_of_quality_control_pictures(real_data: Path, name: str, mpp: float, low: float, high: float) -> None:
    assert low <= tissue_mask(picture(real_data, name), mpp).mean() <= high


def test_pen_around_the_tissue_is_left_out(real_data: Path) -> None:
    mask = tissue_mask(picture(real_data, "histoqc_pen_red.png"), 20)
    # The thick stroke on the left, and the tissue in the middle.
    assert not mask[200:330, 50:68].any()
    assert mask[200:350, 150:300].mean() > 0.95
