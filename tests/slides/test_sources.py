from pathlib import Path

import pytest

from pathokd.errors import ManifestError
from pathokd.slides import find_slides, sources


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("a.svs", "sub/a.tif", "b.ome.tif", "notes.txt", ".hidden/c.svs", "D.NDPI", ".x.svs.part"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.touch()
    return tmp_path


def test_folder(folder: Path) -> None:
    found = find_slides(folder)
    assert [s.path.name for s in found] == ["D.NDPI", "a.svs", "b.ome.tif", "a.tif"]
    ids = [s.slide_id for s in found]
    assert len(set(ids)) == 4
    assert ids[0] == "D"
    assert ids[2] == "b"
    # Equal stems: both get a hash, so that the order of listing does not decide who keeps the name.
    assert ids[1].startswith("a-")
    assert ids[3].startswith("a-")
    assert find_slides(folder) == found


def test_glob_and_list_and_doubles(folder: Path) -> None:
    assert [s.slide_id for s in find_slides(str(folder / "*.svs"))] == ["a"]
    assert len(find_slides([folder / "a.svs", str(folder / "*.svs"), folder])) == 4


def test_what_a_csv_says_of_a_slide_is_not_lost_beside_its_folder(folder: Path) -> None:
    """Named after the folder, the CSV went for nothing."""
    (folder / "l.csv").write_text("path,case,,\na.svs,7,,\n\na.svs,7,,,\n")  # the last cells as a spreadsheet ends rows
    for items in ([folder, folder / "l.csv"], [folder / "l.csv", folder]):
        cases = {s.path.name: s.metadata.get("case") for s in find_slides(items)}
        assert cases == {"D.NDPI": None, "a.svs": "7", "b.ome.tif": None, "a.tif": None}


def test_case_is_no_difference(tmp_path: Path) -> None:
    (tmp_path / "A.svs").touch()
    (tmp_path / "a.tif").touch()
    ids = [s.slide_id.casefold() for s in find_slides(tmp_path)]
    assert len(set(ids)) == 2


def test_csv(folder: Path) -> None:
    table = folder / "list.csv"
    table.write_text(
        "﻿slide_id, path ,mpp,stain,label_map\nx,a.svs,0.25,HE,maps/x.png\n,sub/a.tif,,IHC,\n",
        encoding="utf-8",
    )
    first, second = find_slides(table, mpp=0.5)
    assert (first.slide_id, first.path, first.mpp) == ("x", folder / "a.svs", 0.25)
    assert first.metadata == {"stain": "HE", "label_map": str(folder / "maps/x.png")}
    assert (second.slide_id, second.mpp, second.metadata["stain"]) == ("a", None, "IHC")
    assert {first.mpp_else, second.mpp_else} == {0.5}


@pytest.mark.parametrize("header", ["wsi,mpp", "image_path,spacing_at_level_0", "sample_id,image_path,mpp"])
def test_aliases(folder: Path, header: str) -> None:
    row = {"wsi": "a.svs", "image_path": "a.svs", "mpp": "0.3", "spacing_at_level_0": "0.3", "sample_id": "q"}
    (folder / "l.csv").write_text(f"{header}\n{','.join(row[c] for c in header.split(','))}\n")
    (source,) = find_slides(folder / "l.csv")
    assert (source.path, source.mpp, source.metadata) == (folder / "a.svs", 0.3, {})
    assert source.slide_id == ("q" if "sample_id" in header else "a")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name,stain\na,b\n", "expected one of path"),
        ("path,mpp\na.svs,half\n", "line 2: mpp is 'half'"),
        ("path,mpp\n,0.5\n", "line 2: the path is empty"),
        ("path,flag\na.svs,1\n", "column flag"),
        ("slide_id,path\nq,a.svs\nq,D.NDPI\n", "2 slides have the slide_id 'q'"),
        ("slide_id,path\nq/r,a.svs\n", "slashes"),
        ("path\n", "No slides in"),
        ("path,stain,scanner\na.svs,HE, pale,S50\n", "line 2: there are more cells than columns"),
        ("slide_id,path,case\nx,a.svs,1\ny,a.svs,2\n", "two rows of .*a.svs that say different things"),
    ],
)
def test_csv_errors(folder: Path, text: str, message: str) -> None:
    (folder / "l.csv").write_text(text)
    with pytest.raises(ManifestError, match=message):
        find_slides(folder / "l.csv")


def test_nothing_found(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ManifestError, match="No slides in"):
        find_slides(tmp_path / "empty")
    with pytest.raises(ManifestError, match="No slides in"):
        find_slides(str(tmp_path / "*.svs"))
    with pytest.raises(ManifestError, match="does not exist"):
        find_slides(tmp_path / "nowhere")
    with pytest.raises(ManifestError, match="an empty list"):
        find_slides([])


def test_one_place_without_slides_is_not_passed_over(folder: Path, tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    for nothing in (empty, f"{empty}/*.svs"):
        with pytest.raises(ManifestError, match=r"No slides in .*empty"):
            find_slides([folder, nothing])


def test_a_packed_folder_is_told_from_an_empty_one(packed: Path) -> None:
    with pytest.raises(ManifestError, match="it is a packed folder, of tiles without their slides"):
        find_slides(packed)


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ("path,key", "column key, which manifests or packed"),
        ("path,size", "column size, which manifests or packed"),
        ("path,case,case", "two columns case"),
    ],
)
def test_columns_that_would_be_lost(tmp_path: Path, header: str, message: str) -> None:
    """`pathokd pack` failed in pandas' words, wrote bytes over a size, and of two columns the last was taken."""
    (tmp_path / "slides.csv").write_text(f"{header}\na.svs,x,y\n")
    with pytest.raises(ManifestError, match=message):
        find_slides(tmp_path / "slides.csv")


def test_files_of_a_dicom_series_are_one_slide(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    series = {"a/1.dcm": "X", "a/2.dcm": "X", "a/3.dcm": "Y", "a/4.dcm": None, "a/5.dcm": None, "b/1.dcm": "X"}
    for name in series:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    monkeypatch.setattr(sources, "series_uid", lambda path: series[str(path.relative_to(tmp_path))])
    wanted = [tmp_path / name for name in ("a/1.dcm", "a/3.dcm", "a/4.dcm", "a/5.dcm", "b/1.dcm")]
    assert [s.path for s in find_slides(tmp_path)] == wanted
    assert [s.path for s in find_slides([tmp_path / name for name in series])] == wanted  # as a shell expands a/*.dcm
    (tmp_path / "list.csv").write_text("slide_id,path\n" + "\n".join(f"{n[0]}{n[2]},{n}" for n in series))
    assert len(find_slides(tmp_path / "list.csv")) == len(series)


def test_files_of_a_real_dicom_series_are_one_slide(real_data: Path) -> None:
    found = {source.path.name for source in find_slides(real_data / "wsi_dicom")}
    assert "openslide_boxes_0.dcm" in found
    assert not found & {"openslide_boxes_1.dcm", "highdicom_sm_image_control.dcm"}
    assert len(found) == 5


def test_long_names_in_any_letters_get_ids(tmp_path: Path) -> None:
    """Of letters of four bytes the shortened name was still too long, and the whole folder was refused."""
    for letter, count in (("T", 250), ("病", 80), ("𝔸", 60)):
        (tmp_path / f"{letter * count}.svs").touch()
    ids = [source.slide_id for source in find_slides(tmp_path)]
    assert len(set(ids)) == 3
    assert all(len(slide_id.encode()) <= 200 for slide_id in ids)
