"""The HDF5 file: round trip, what MIL code sees, truncation, overflow and a full disk."""

import resource
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

from pathokd.embed import read_embeddings, read_header, write_embeddings
from pathokd.embed.store import sealed
from pathokd.errors import StoreError
from pathokd.files import make_header


def write(path: Path, features: np.ndarray, **options: object) -> None:
    n = len(features)
    flag = np.array([""] * n, dtype=object)
    flag[np.isnan(features).any(axis=1)] = "unreadable"
    write_embeddings(
        path,
        features,
        np.arange(2 * n).reshape(n, 2),
        flag=flag,
        tissue_fraction=np.linspace(0, 1, n, dtype=np.float32),
        header=make_header("embeddings/1", {"encoder": "tiny"}),
        coords_attrs={"patch_size": 224, "patch_size_level0": 448, "name": "s1"},
        features_attrs={"encoder": "tiny", "name": "s1"},
        **options,  # type: ignore[arg-type]
    )


def draw(n: int = 6, dim: int = 4) -> np.ndarray:
    return np.random.default_rng(0).normal(size=(n, dim)).astype(np.float32)


@pytest.mark.parametrize(("dtype", "numpy_dtype"), [("fp16", np.float16), ("fp32", np.float32)])
def test_round_trip(tmp_path: Path, dtype: str, numpy_dtype: type) -> None:
    features = draw()
    features[2] = np.nan
    write(tmp_path / "s1.h5", features, dtype=dtype)
    got = read_embeddings(tmp_path / "s1.h5")
    assert got.features.dtype == numpy_dtype
    np.testing.assert_array_equal(got.features, features.astype(numpy_dtype))
    assert got.coords.dtype == np.int64
    assert got.coords.tolist() == np.arange(12).reshape(6, 2).tolist()
    assert got.flag.tolist() == ["", "", "unreadable", "", "", ""]
    assert got.good.tolist() == [True, True, False, True, True, True]
    assert got.tissue_fraction[-1] == 1.0
    assert got.coords_attrs["patch_size_level0"] == 448
    assert got.header["settings"] == {"encoder": "tiny"}
    with h5py.File(tmp_path / "s1.h5") as file:
        assert file["features"].chunks is None  # contiguous


def test_no_tiles_is_a_valid_file(tmp_path: Path) -> None:
    write(tmp_path / "s1.h5", np.empty((0, 4), np.float32))
    assert read_embeddings(tmp_path / "s1.h5").features.shape == (0, 4)


def test_clam_reads_it(tmp_path: Path) -> None:
    """CLAM: two keys, whole arrays, straight into a linear layer."""
    write(tmp_path / "s1.h5", draw())
    with h5py.File(tmp_path / "s1.h5", "r") as hdf5_file:
        features = hdf5_file["features"][:]
        coords = hdf5_file["coords"][:]
    bag = torch.from_numpy(features)
    assert torch.nn.Linear(4, 2)(bag).shape == (6, 2)
    assert coords.shape == (6, 2)


def test_trident_reads_it(tmp_path: Path) -> None:
    """TRIDENT: attributes of `coords` say where the patches lie; features may get a batch axis."""
    write(tmp_path / "s1.h5", draw())
    with h5py.File(tmp_path / "s1.h5", "r") as file:
        attrs = dict(file["coords"].attrs)
        coords = file["coords"][:]
        features = torch.from_numpy(file["features"][:]).unsqueeze(0)
        name = file["features"].attrs["encoder"]
    x, y = coords[0]
    assert int(attrs["patch_size_level0"]) == 448
    assert (int(x) + attrs["patch_size_level0"], int(y)) == (448, 1)
    assert features.shape == (1, 6, 4)
    assert name == "tiny"


@pytest.mark.parametrize("keep", [0, 100, 1500, -len(sealed(b"")) - 1])
def test_a_truncated_file_is_refused(tmp_path: Path, keep: int) -> None:
    path = tmp_path / "s1.h5"
    write(path, draw())
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(StoreError, match="embed the slide again"):
        read_header(path)


def test_other_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="does not exist"):
        read_header(tmp_path / "none.h5")
    with h5py.File(tmp_path / "clam.h5", "w") as file:
        for name, shape in (
            ("features", (2, 4)),
            ("coords", (2, 2)),
            ("flag", (2,)),
            ("tissue_fraction", (2,)),
        ):
            file.create_dataset(name, data=np.zeros(shape))
    with pytest.raises(StoreError, match="schema None"):
        read_header(tmp_path / "clam.h5")


def test_fp16_overflow_is_an_error_and_leaves_nothing(tmp_path: Path) -> None:
    features = draw()
    features[0, 0] = 1e5
    with pytest.raises(StoreError, match=r"1e\+05 do not fit fp16; use fp32"):
        write(tmp_path / "s1.h5", features, dtype="fp16")
    assert list(tmp_path.iterdir()) == []
    write(tmp_path / "s1.h5", features)


def test_misaligned_arrays_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"one row per tile \(6\); look at coords, flag"):
        write_embeddings(
            tmp_path / "s1.h5",
            draw(),
            np.zeros((5, 2), int),
            flag=np.array([""] * 5, dtype=object),
            tissue_fraction=np.zeros(6, np.float32),
            header={},
            coords_attrs={},
            features_attrs={},
        )


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path) -> None:
    """A limit on file size stands in for a full disk: the kernel refuses the write half-way."""
    target = tmp_path / "s1.h5"
    write(target, draw())
    before = target.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1024, hard))
    try:
        with pytest.raises((StoreError, OSError)):
            write(target, draw(4000, 64))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert target.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["s1.h5"]
