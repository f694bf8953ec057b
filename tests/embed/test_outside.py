"""Networks from elsewhere: a module with its transform, and encoders that a real installed distribution offers."""

import importlib.metadata
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torchvision import transforms

from pathokd.cli.main import main
from pathokd.embed import Embedder, embed_slides, read_embeddings
from pathokd.embed.doctor import examine
from pathokd.errors import StoreError, WeightsError
from pathokd.models import Encoder, VectorEncoder, open_model
from pathokd.models.outside import describe
from pathokd.models.weights import state_sha256
from pathokd.phantom import make_scene, render, write_pyramid
from pathokd.slides import TileSpec, find_slides, tile_slides

TRANSFORM = transforms.Compose(
    [transforms.Resize((32, 32)), transforms.ToTensor(), transforms.Normalize((0.5, 0.5, 0.5), (0.25, 0.25, 0.25))]
)


def network(seed: int = 0) -> nn.Module:
    """A small real CNN with batch norm and dropout, so that forgetting eval() shows."""
    torch.manual_seed(seed)
    layers = [nn.Conv2d(3, 8, 3, stride=2), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.5)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5))


def tiles(n: int = 5, side: int = 48) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (n, side, side, 3), dtype=np.uint8)


def test_vectors_are_the_networks_own() -> None:
    module = network()
    embedder = Embedder(module, transform=TRANSFORM, batch_size=2)
    with torch.no_grad():
        expected = module.eval()(torch.stack([TRANSFORM(Image.fromarray(tile)) for tile in tiles()])).numpy()
    got = embedder(tiles())
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, expected, atol=1e-6)
    assert embedder.dim == 5
    assert embedder([]).shape == (0, 5)
    mixed = embedder([tiles()[0], tiles(1, 64)[0], Image.fromarray(tiles()[1])])
    np.testing.assert_allclose(mixed[[0, 2]], expected[:2], atol=1e-6)
    assert Embedder(module, precision="bf16", transform=TRANSFORM)(tiles()).dtype == np.float32


def test_provenance_tells_networks_apart() -> None:
    first = Embedder(network(0), transform=TRANSFORM)
    assert first.weights_sha256 == state_sha256(network(0).state_dict())
    assert Embedder(network(1), transform=TRANSFORM).weights_sha256 != first.weights_sha256
    module = network(0)
    module[1].running_mean.add_(1)  # a buffer counts as well as a parameter
    assert Embedder(module, transform=TRANSFORM).weights_sha256 != first.weights_sha256
    assert first.facts.origin["encoder_class"] == "torch.nn.modules.container.Sequential"
    assert "Normalize(mean=(0.5, 0.5, 0.5)" in first.facts.origin["transform"]


def to_tensor(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1).float() / 255


class PlainCallable:
    def __call__(self, image: Image.Image) -> torch.Tensor:
        return to_tensor(image)


def test_descriptions_are_the_same_in_every_process() -> None:
    assert describe(to_tensor) == f"{__name__}.to_tensor"
    assert describe(PlainCallable()) == describe(PlainCallable())
    assert "0x" not in describe(PlainCallable())
    assert "\n" not in describe(TRANSFORM)
    assert describe(TRANSFORM) != describe(transforms.Compose(TRANSFORM.transforms[1:]))


class Strange(nn.Module):
    def __init__(self, out: object) -> None:
        super().__init__()
        self.out = out

    def forward(self, pixels: torch.Tensor) -> object:
        return self.out(pixels) if callable(self.out) else self.out


@pytest.mark.parametrize(
    ("out", "what"),
    [
        (lambda x: x, r"torch.float32 \(2, 3, 48, 48\)"),
        (lambda x: x.flatten(1)[:1], r"torch.float32 \(1, 6912\)"),
        (lambda x: x.flatten(1).long(), r"torch.int64"),
        ({"cls": 1}, "dict"),
    ],
)
def test_a_forward_that_gives_no_vectors_is_said(out: object, what: str) -> None:
    with pytest.raises(ValueError, match=rf"Strange should return one vector per image.*{what}"):
        Embedder(Strange(out), transform=to_tensor)(tiles(2))


def test_what_does_not_fit_is_said(encoder: Encoder) -> None:
    module = network()
    with pytest.raises(ValueError, match="Sequential does not say how it wants its input: pass transform="):
        Embedder(module)
    with pytest.raises(ValueError, match="brings its own preprocessing"):
        Embedder(encoder, transform=TRANSFORM)
    with pytest.raises(ValueError, match="readout chooses among tokens"):
        Embedder(module, "mean", transform=TRANSFORM)
    with pytest.raises(TypeError):
        Embedder(3, transform=TRANSFORM)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"transform of Sequential should return tensors .*, got Image"):
        Embedder(module, transform=lambda image: image)(tiles())  # type: ignore[arg-type,return-value]
    embedder = Embedder(module, transform=TRANSFORM)
    with pytest.raises(ValueError, match="returns one vector per image and no tokens"):
        embedder.tokens(tiles())
    with pytest.raises(WeightsError, match="holds _extra_state, which is no tensor"):
        _ = Embedder(Extra(), transform=TRANSFORM).weights_sha256


class Extra(nn.Module):
    def get_extra_state(self) -> dict[str, int]:
        return {"scale": 3}

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return pixels.flatten(1)


@pytest.fixture(scope="module")
def scan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    image = render(make_scene(4, 260.0, margin_um=20.0, region_um=90.0), "HE", "S50")
    return write_pyramid(tmp_path_factory.mktemp("slide") / "one.tif", image, 0.5)


def test_a_cohort_is_not_resumed_with_another_transform(scan: Path, tmp_path: Path) -> None:
    tile_slides(find_slides(scan), TileSpec(mpp=0.5, tile_px=64), tmp_path / "tiles")
    out = tmp_path / "out"
    assert embed_slides(VectorEncoder(network(), TRANSFORM, "mine"), tmp_path / "tiles", out)["status"][0] == "ok"
    again = embed_slides(VectorEncoder(network(), TRANSFORM, "mine"), tmp_path / "tiles", out)
    assert again["status"].to_list() == ["skipped"]
    other = transforms.Compose([transforms.Resize((40, 40)), *TRANSFORM.transforms[1:]])
    with pytest.raises(StoreError, match="transform = "):
        embed_slides(VectorEncoder(network(), other, "mine"), tmp_path / "tiles", out)
    with pytest.raises(StoreError, match="weights_sha256 = "):
        embed_slides(VectorEncoder(network(1), TRANSFORM, "mine"), tmp_path / "tiles", out)
    stored = read_embeddings(out / "one.h5")
    assert stored.features_attrs["encoder"] == "mine"
    assert stored.features_attrs["encoder_class"] == "torch.nn.modules.container.Sequential"
    assert stored.features_attrs["readout"] == "output"
    found = Embedder(network(), transform=TRANSFORM).slide(scan, mpp=0.5, tile_px=64)
    np.testing.assert_allclose(found.features, stored.features, atol=1e-5)


PACKAGE = """
import torch
from torch import nn
from torchvision import transforms


def acme_small():
    torch.manual_seed(3)
    module = nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(12, 7))
    return module, transforms.Compose([transforms.Resize((32, 32)), transforms.ToTensor()])


def acme_vit():
    from pathokd.models import StudentSpec, build_student
    args = {"embed_dim": 24, "depth": 1, "num_heads": 2, "patch_size": 8}
    return build_student(StudentSpec("vit_tiny_patch16_224", args, image_px=32, mpp=0.5, seed=7))


def acme_half():
    return nn.Flatten()


def acme_broken():
    import a_module_that_is_not_there
"""
PROJECT = """
[build-system]
requires = ["setuptools"]
build-backend = "setuptools.build_meta"

[project]
name = "acme-encoders"
version = "1.2"

[project.entry-points."pathokd.encoders"]
acme_small = "acme_encoders:acme_small"
acme_vit = "acme_encoders:acme_vit"
acme_half = "acme_encoders:acme_half"
acme_broken = "acme_encoders:acme_broken"
uni_v1 = "acme_encoders:acme_small"

[tool.setuptools]
py-modules = ["acme_encoders"]
"""


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A distribution of somebody else, built and installed by pip into a folder of its own."""
    source, target = tmp_path_factory.mktemp("acme"), tmp_path_factory.mktemp("site")
    (source / "acme_encoders.py").write_text(PACKAGE)
    (source / "pyproject.toml").write_text(PROJECT)
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation", "--no-index"]
    done = subprocess.run([*command, "--target", str(target), str(source)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return target


@pytest.fixture
def acme(target: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.syspath_prepend(str(target))
    importlib.invalidate_caches()
    yield
    sys.modules.pop("acme_encoders", None)


def test_an_installed_encoder_is_found_by_name(acme: None, scan: Path, tmp_path: Path) -> None:
    assert main(["embed", "acme_small", str(scan), "--out", str(tmp_path / "out"), "--tile-px", "64"]) == 0
    with h5py.File(tmp_path / "out/one.h5") as file:
        attrs, features = dict(file["features"].attrs), file["features"][:]
    assert features.shape[1] == 7
    assert attrs["encoder"] == "acme_small"
    assert attrs["weights_sha256"] == Embedder("acme_small").weights_sha256
    assert attrs["transform"].startswith("Compose(")
    assert main(["verify", str(tmp_path / "out")]) == 0
    assert main(["export", str(tmp_path / "out"), "--layout", "trident", "--out", str(tmp_path / "trident")]) == 0
    assert (tmp_path / "trident/20x_64px_0px_overlap/features_acme_small/one.h5").is_file()


def test_an_installed_encoder_with_a_card_keeps_its_tokens(acme: None) -> None:
    embedder = Embedder("acme_vit", readout="cls+mean")
    assert embedder(tiles(2, 32)).shape == (2, 48)
    assert embedder.tokens(tiles(2, 32)).shape == (2, 4, 4, 24)


def test_nothing_is_imported_before_it_is_asked_for(acme: None) -> None:
    found = [f for f in examine() if f.topic == "encoders of other packages"]
    assert "acme_encoders" not in sys.modules
    assert {f.text for f in found if f.fine} == {
        f"{name}: acme-encoders 1.2" for name in ("acme_small", "acme_vit", "acme_half", "acme_broken")
    }
    assert "uni_v1" in next(f.text for f in found if not f.fine)


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("uni_v1", "'uni_v1' is a model card of pathokd and an encoder of acme-encoders 1.2: uninstall"),
        ("acme_half", r"should return \(module, transform\) or a pathokd.Encoder, got Flatten"),
        ("acme_broken", r"fails with ModuleNotFoundError: No module named 'a_module_that_is_not_there'"),
    ],
)
def test_what_is_wrong_with_an_encoder_is_one_sentence(
    acme: None, name: str, sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(WeightsError, match=sentence):
        open_model(name)
    assert main(["embed", name, str(tmp_path), "--out", str(tmp_path / "out")]) == 1
    assert len(capsys.readouterr().err.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_names_nobody_knows(acme: None) -> None:
    with pytest.raises(
        ValueError, match=r"No model card is called 'acme_smal'.*other packages: acme_broken, acme_half"
    ):
        open_model("acme_smal")


def test_two_packages_of_one_encoder(acme: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    info = tmp_path / "rival-3.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: rival\nVersion: 3.0\n")
    (info / "entry_points.txt").write_text("[pathokd.encoders]\nacme_small = rival:encoder\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(WeightsError, match=r"is an encoder of .* and of .*: uninstall one of them"):
        open_model("acme_small")
