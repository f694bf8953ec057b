"""Directions that were put there are found; a run's targets are without them; another teacher's are refused."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pathokd.cli.main import main
from pathokd.data.conditions import Condition
from pathokd.data.packed import PackedTiles
from pathokd.data.simulate import SimulatedTiles
from pathokd.distill.denoise_fit import DenoiseSpec, PlaceMoments, fit_denoiser
from pathokd.distill.module import DistillationModule
from pathokd.distill.objective import Objective
from pathokd.distill.provenance import check_teacher, teacher_facts
from pathokd.errors import ManifestError, StoreError, TrainingError
from pathokd.export import export_student
from pathokd.losses import DINO, MSE, RKD, Cosine
from pathokd.models import StudentSpec, TeacherSpec, build_student, build_teacher, load_encoder
from pathokd.models.denoise import read_denoiser

TINY = {"embed_dim": 16, "depth": 2, "num_heads": 2, "patch_size": 8}


def module(spec: TeacherSpec, **changes: Any) -> DistillationModule:
    settings: dict[str, Any] = {
        "student": StudentSpec("vit_tiny_patch16_224", TINY, image_px=32),
        "objectives": [Objective(MSE()), Objective(Cosine(), tokens="patches")],
        "standardize_steps": 0,
    }
    built = DistillationModule(teachers={"t": spec}, **{**settings, **changes})
    built.configure_model()
    return built


@pytest.fixture(scope="module")
def denoiser(registered_packed: Path, tiny_teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("denoise") / "d.safetensors"
    teacher = build_teacher(TeacherSpec(str(tiny_teacher)))
    fit_denoiser(teacher, PackedTiles(registered_packed), path, DenoiseSpec(rank=3), workers=0)
    return path


def test_the_directions_that_conditions_move_along_are_found() -> None:
    """Tissue varies in 12 dimensions, conditions move tokens along two fixed ones: these come out, in this order."""
    rng = np.random.default_rng(0)
    q, _ = np.linalg.qr(rng.standard_normal((12, 12)))
    moments = PlaceMoments(12)
    for _ in range(400):
        tissue = rng.standard_normal((1, 1, 12))
        shift = rng.standard_normal((5, 1, 2)) * [4.0, 2.0] @ q[:2]
        moments.add(torch.from_numpy(tissue + shift))
    mean, std = moments.statistics()
    found = moments.top(2)
    # In the standardised space the directions are those of q over std, the span of both.
    span, _ = np.linalg.qr((q[:2] / std.numpy()).T)
    overlap = np.linalg.svd(found.directions.numpy() @ span, compute_uv=False)
    assert overlap.min() > 1 - 1e-9
    assert sum(found.share) == pytest.approx(1, abs=1e-9)
    assert found.share[0] > found.share[1]
    assert torch.allclose(mean, torch.zeros(12).double(), atol=1.0)
    assert 0 < found.lost < 1


@pytest.mark.parametrize(("shift", "rank"), [(1.0, 1), (0.0, 0)])
def test_no_direction_is_drawn_by_chance(shift: float, rank: int) -> None:
    """Conditions that differ along one direction, or not at all: the others would be tissue's."""
    rng = np.random.default_rng(0)
    direction, moments = rng.standard_normal((1, 1, 12)), PlaceMoments(12)
    for _ in range(50):
        tissue = rng.standard_normal((1, 1, 12))
        moments.add(torch.from_numpy(np.concatenate([tissue, tissue + shift * direction])).float())
    found = moments.top(4)
    assert found.directions.shape == (rank, 12)
    assert found.share == pytest.approx([1.0] * rank)
    assert (found.lost > 0) == bool(rank)


def test_moments_are_those_of_all_rows() -> None:
    generator = torch.Generator().manual_seed(0)
    places = [torch.randn(k, 4, 6, generator=generator) * 2 + 5 for k in (2, 3, 4)]
    moments = PlaceMoments(6)
    for place in places:
        moments.add(place)
    rows = np.concatenate([place.numpy().reshape(-1, 6) for place in places]).astype(np.float64)
    off = np.concatenate([(p.numpy() - p.numpy().mean(0)).reshape(-1, 6) for p in places]) / rows.std(0)
    values = np.sort(np.linalg.eigvalsh(off.T @ off))[::-1]
    assert moments.statistics()[0].numpy() == pytest.approx(rows.mean(0))
    assert moments.statistics()[1].numpy() == pytest.approx(rows.std(0))
    assert moments.top(3).share == pytest.approx(values[:3] / values.sum(), rel=1e-6)


def test_a_fitted_file_brings_conditions_together(denoiser: Path, registered_packed: Path, tiny_teacher: Path) -> None:
    """On its own tiles: less of the variance is between conditions than before, by the shares it states."""
    tiles, (header, parts) = PackedTiles(registered_packed), read_denoiser(denoiser)
    frame = tiles.index
    images = torch.from_numpy(np.stack([tiles.read(row)[::2, ::2] for row in range(len(tiles))])).permute(0, 3, 1, 2)
    with torch.no_grad():
        cls = load_encoder(str(tiny_teacher)).eval()(images).cls
    place = (frame["case"] + frame["x"].astype(str) + "/" + frame["y"].astype(str)).to_numpy()
    std = parts["cls"].std

    def between(x: torch.Tensor) -> float:
        return float(sum(((x[place == p] - x[place == p].mean(0)) / std).square().sum() for p in np.unique(place)))

    assert between(parts["cls"](cls)) < 0.6 * between(cls)
    result = header["results"]["cls"]
    assert result["tokens"] == len(tiles)
    assert len(result["share"]) == 3


def test_targets_are_without_the_directions(denoiser: Path, tiny_teacher: Path) -> None:
    built = module(TeacherSpec(str(tiny_teacher), denoise=str(denoiser))).eval()
    images = {"views": {"clean": torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8)}, "index": [0, 1, 2]}
    with torch.no_grad():
        losses = built.losses({**images, "key": list("abc")})  # type: ignore[typeddict-item]
        t = load_encoder(str(tiny_teacher)).eval()(images["views"]["clean"])  # type: ignore[index]
        s = built.net.encoder(images["views"]["clean"])  # type: ignore[index]
        projected = built.net.heads["t__cls"](s.cls)
    expected = (projected - read_denoiser(denoiser)[1]["cls"](t.cls)).square().mean()
    assert float(losses.parts["cls_mse"]) == pytest.approx(float(expected), abs=1e-6)
    plain = (projected - t.cls).square().mean()
    assert abs(float(plain) - float(expected)) > 1e-4
    assert not any("denois" in name for name in built.state_dict())


def test_stored_and_running_teachers_are_denoised_alike(
    denoiser: Path, registered_packed: Path, tiny_teacher: Path, tmp_path: Path
) -> None:
    from pathokd.data.datamodule import TileDataModule
    from pathokd.data.targets import TargetSpec
    from pathokd.data.views import Geometry
    from pathokd.embed.targets import write_targets

    source = PackedTiles(registered_packed)
    write_targets(
        build_teacher(TeacherSpec(str(tiny_teacher))), source, tmp_path / "t", TargetSpec("patches", dtype="fp32")
    )
    data = TileDataModule(
        str(registered_packed), 8, workers=0, geometry=Geometry(32), val_fraction=0, targets={"t": str(tmp_path / "t")}
    )
    batch = next(iter(data.train_dataloader()))
    totals, spread = [], []
    for where in ({"weights": str(tiny_teacher)}, {"targets": str(tmp_path / "t")}):
        torch.manual_seed(0)
        built = module(TeacherSpec(**where, denoise=str(denoiser)), objectives=[Objective(MSE()), Objective(RKD())])
        with torch.no_grad():
            totals.append(float(built.eval().losses(batch).total))
        built = module(TeacherSpec(**where, denoise=str(denoiser)), standardize_steps=5)
        spread.append({})
        for name, statistics in built.statistics.items():
            for number, each in enumerate(data.train_dataloader()):
                cache = built.train()._targets_of(each)
                seen = cache.get("t", name.removeprefix("t__"), "clean", (4, 4))
                assert int(statistics.count) == (number + 1) * 8 * (1 if name == "t__cls" else 16)
            spread[-1][name] = statistics.std.clone()
            assert 0.7 < float(seen.flatten(0, -2).std(0).mean()) < 1.3, name
    assert totals[0] == pytest.approx(totals[1], abs=1e-5)
    for name, std in spread[0].items():  # of raw targets they were up to 14 times as large in some dimensions
        torch.testing.assert_close(std, spread[1][name], rtol=1e-4, atol=1e-5)


def test_another_teachers_directions_are_refused(denoiser: Path, tmp_path: Path) -> None:
    args = {"embed_dim": 24, "depth": 3, "num_heads": 2, "patch_size": 8, "reg_tokens": 2}
    other = build_student(StudentSpec("vit_tiny_patch16_224", args, image_px=32, mpp=0.5, seed=8))
    export_student(other, tmp_path / "other", licence="MIT")
    with pytest.raises(TrainingError, match="were taken from tiny with weights_sha256"):
        module(TeacherSpec(str(tmp_path / "other"), denoise=str(denoiser)))


def test_a_run_goes_on_with_the_targets_it_began_with(denoiser: Path, tiny_teacher: Path) -> None:
    facts: Any = {}
    for name, path in (("raw", None), ("denoised", str(denoiser))):
        built = module(TeacherSpec(str(tiny_teacher), denoise=path))
        here = built.teacher_specs["t"], built.teacher("t"), built.denoised_by.get("t")
        facts[name] = teacher_facts(*here)
        check_teacher("t", *here, facts[name], training=True)
    with pytest.raises(TrainingError, match=r"was not denoised when .*model\.teachers\.t\.denoise"):
        check_teacher("t", *here, facts["raw"], training=True)
    check_teacher("t", *here, facts["raw"], training=False)


@pytest.mark.filterwarnings("ignore:.* is changed as if it had the reference")  # its tiles are no H&E
def test_slides_scanned_once_are_paired_by_simulation(packed: Path, tiny_teacher: Path, tmp_path: Path) -> None:
    """`pathokd simulate` of unregistered tiles is what `pathokd denoise` takes, without a further option."""
    simulated, out = str(tmp_path / "simulated"), tmp_path / "d.safetensors"
    words = ["simulate", str(packed), "--out", simulated, "--stain", "h-long-e-short", "--scanner", "soft-warm"]
    assert main([*words, "--severity", "0.8"]) == 0
    assert main(["denoise", str(tiny_teacher), simulated, "--out", str(out), "--rank", "1", "--workers", "0"]) == 0
    result = read_denoiser(out)[0]["results"]["cls"]
    assert result["tokens"] == 2 * len(PackedTiles(packed))
    assert 0.2 < result["share"][0] <= 1


def test_conditions_that_do_not_differ_leave_no_file(packed: Path, tiny_teacher: Path, tmp_path: Path) -> None:
    same = SimulatedTiles(PackedTiles(packed), [Condition(scanner="soft-warm", severity=0.0)])
    teacher, out = build_teacher(TeacherSpec(str(tiny_teacher))), tmp_path / "d.safetensors"
    with pytest.raises(ManifestError, match=r"nothing to take out.*columns stain, scanner tell which"):
        fit_denoiser(teacher, same, out, workers=0)
    assert not out.exists()


def test_prototypes_see_raw_tokens(denoiser: Path, tiny_teacher: Path, tiny_prototypes: Path) -> None:
    dino = Objective(DINO(str(tiny_prototypes), diagonal=True))
    images: Any = {"views": {"clean": torch.zeros(2, 3, 32, 32, dtype=torch.uint8)}, "key": ["a", "b"]}
    totals = []
    for path in (None, str(denoiser)):
        torch.manual_seed(0)
        built = module(TeacherSpec(str(tiny_teacher), denoise=path), objectives=[dino]).eval()
        with torch.no_grad():
            totals.append(float(built.losses(images).total))
    assert totals[0] == totals[1]


def test_the_verb(
    registered_packed: Path, packed: Path, tiny_teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "d.safetensors"
    words = ["denoise", str(tiny_teacher), str(registered_packed), "--out", str(out), "--workers", "0"]
    assert main([*words, "--rank", "2", "--device", "cpu"]) == 0
    said = capsys.readouterr().out
    assert "cls: 2 directions hold" in said
    assert "--model.teachers.NAME.denoise" in said
    before = out.stat().st_mtime_ns
    assert main([*words, "--rank", "2", "--device", "cpu"]) == 0
    assert out.stat().st_mtime_ns == before
    assert main([*words, "--rank", "3"]) == 1
    assert "pass --overwrite" in capsys.readouterr().err
    assert main([*words, "--rank", "9"]) == 1
    assert "1 to 8, got 9" in capsys.readouterr().err
    assert main(["denoise", str(tiny_teacher), str(packed), "--out", str(tmp_path / "none")]) == 1
    assert "lack these columns: case" in capsys.readouterr().err
    with pytest.raises(StoreError, match="rank"):
        fit_denoiser(
            build_teacher(TeacherSpec(str(tiny_teacher))), PackedTiles(registered_packed), out, DenoiseSpec(rank=1)
        )
