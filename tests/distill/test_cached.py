"""A student trained from stored targets: the losses of the running teacher, refusals, every tile's own targets."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import Callback

from pathokd.data.datamodule import TileDataModule
from pathokd.data.packed import PackedTiles
from pathokd.data.targets import TargetSpec, TargetStore
from pathokd.data.views import Geometry
from pathokd.distill.cached import CachedTeacher
from pathokd.distill.module import DistillationModule
from pathokd.distill.objective import Objective
from pathokd.distill.optim import OptimSpec
from pathokd.distill.prototype_fit import teacher_settings
from pathokd.distill.prototypes import made_from
from pathokd.distill.provenance import check_teacher, teacher_facts
from pathokd.embed.targets import write_targets
from pathokd.errors import StoreError, TrainingError
from pathokd.export import export_student
from pathokd.losses import MSE, Cosine
from pathokd.models import StudentSpec, TeacherSpec, build_student, build_teacher
from pathokd.models.teacher import Precision

TINY = {"embed_dim": 16, "depth": 2, "num_heads": 2, "patch_size": 8}
KINDS = {
    "fp32": TargetSpec("patches", dtype="fp32"),
    "fp16": TargetSpec("patches", dtype="fp16"),
    "int8": TargetSpec("patches", dtype="int8"),
    "pca": TargetSpec("patches", pca=12, dtype="int8"),
    "pooled": TargetSpec("cls+mean", dtype="fp32"),
    "cls": TargetSpec("cls", dtype="fp32"),
}


@pytest.fixture(scope="module")
def stored(packed: Path, tiny_teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Path]]:
    """A folder of targets for each of `KINDS`, not writable by anyone."""
    folder = tmp_path_factory.mktemp("targets")
    teacher = build_teacher(TeacherSpec(str(tiny_teacher)))
    for name, spec in KINDS.items():
        write_targets(teacher, PackedTiles(packed), folder / name, spec)
    for path in (*folder.rglob("*"), folder):
        path.chmod(0o555 if path.is_dir() else 0o444)
    yield {name: folder / name for name in KINDS}
    for path in (folder, *folder.rglob("*")):
        path.chmod(0o755 if path.is_dir() else 0o644)


def module(spec: TeacherSpec, **changes: Any) -> DistillationModule:
    settings: dict[str, Any] = {
        "student": StudentSpec("vit_tiny_patch16_224", TINY, image_px=32),
        "objectives": [Objective(MSE(), view="student"), Objective(Cosine(), tokens="patches", weight=0.5)],
        "optim": OptimSpec(lr=2e-3),
        "standardize_steps": 0,
    }
    built = DistillationModule(teachers={"t": spec}, **{**settings, **changes})
    torch.manual_seed(0)  # of the projectors
    built.configure_model()
    return built


def tiles(packed: Path, folder: Path, **changes: Any) -> TileDataModule:
    import albumentations as A

    settings: dict[str, Any] = {
        "batch_size": 4,
        "workers": 0,
        "geometry": Geometry(32),
        "photometric": {"student": [A.RandomBrightnessContrast(p=1.0)]},
        "val_fraction": 0.3,
        "targets": {"t": str(folder)},
    }
    return TileDataModule(str(packed), **{**settings, **changes})


class Losses(Callback):
    def __init__(self) -> None:
        self.seen: list[float] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.seen.append(float(outputs["loss"]))


def trainer(out: Path, *callbacks: Callback, **changes: Any) -> L.Trainer:
    settings: dict[str, Any] = {"max_epochs": 2, "logger": False, "enable_checkpointing": False}
    return L.Trainer(
        default_root_dir=out, accelerator="cpu", enable_progress_bar=False, enable_model_summary=False,
        num_sanity_val_steps=0, callbacks=[*callbacks], **{**settings, **changes},
    )  # fmt: skip


def test_a_training_from_fp32_targets_is_the_training_with_the_teacher(
    stored: dict[str, Path], packed: Path, tiny_teacher: Path, tmp_path: Path
) -> None:
    """Two epochs of optimiser steps on the same views: every loss to 1e-5, and validation too; no teacher is loaded."""
    online, cached = Losses(), Losses()
    runners = []
    for watch, spec in ((online, TeacherSpec(str(tiny_teacher))), (cached, TeacherSpec(targets=str(stored["fp32"])))):
        runners.append(trainer(tmp_path, watch))
        runners[-1].fit(module(spec), tiles(packed, stored["fp32"]))
    assert len(cached.seen) == 16
    assert max(abs(a - b) for a, b in zip(online.seen, cached.seen, strict=True)) < 1e-5
    assert online.seen[-1] < 0.9 * online.seen[0]
    measures = [{k: float(v) for k, v in r.callback_metrics.items() if k.startswith("val/")} for r in runners]
    assert {"val/cosine_cls", "val/cosine_patches", "val/cka", "val/knn_overlap"} <= measures[0].keys()
    assert measures[0] == pytest.approx(measures[1], abs=1e-4)


@pytest.mark.parametrize(
    ("kind", "within"), [("fp32", 1e-6), ("fp16", 2e-4), ("int8", 2e-3), ("pca", 0.2)], ids=lambda value: str(value)
)
def test_a_loss_is_off_by_no_more_than_the_stored_targets_are(
    kind: str, within: float, stored: dict[str, Path], packed: Path, tiny_teacher: Path
) -> None:
    """Cosine loss: |L - L'| <= mean 2 |t - t'| / |t|, since unit vectors of t and t' are at most that far apart.

    MSE: |L - L'| <= rms(t - t') (2 sqrt(L) + rms(t - t')), by the triangle inequality.
    """
    objectives = [Objective(MSE()), Objective(Cosine(), tokens="patches")]
    online = module(TeacherSpec(str(tiny_teacher)), objectives=objectives).eval()
    cached = module(TeacherSpec(targets=str(stored[kind])), objectives=objectives).eval()
    data = tiles(packed, stored[kind])
    data.setup()
    with torch.no_grad():
        for batch in data.train_dataloader():
            theirs, mine = online.losses(batch).parts, cached.losses(batch).parts
            wanted, read = online.teacher("t")(batch["views"]["clean"]), cached.teacher("t")(batch["targets"]["t"])
            relative = float((2 * (wanted.patches - read.patches).norm(dim=-1) / wanted.patches.norm(dim=-1)).mean())
            rms = float((wanted.cls - read.cls).square().mean().sqrt())
            cosine, mse = (abs(float(theirs[name] - mine[name])) for name in ("patches_cosine", "cls_mse"))
            assert cosine <= relative + 1e-6
            assert mse <= rms * (2 * float(theirs["cls_mse"]) ** 0.5 + rms) + 1e-6
            assert cosine < within
            assert relative < 10 * within


def test_standardisation_is_that_of_all_stored_targets(
    stored: dict[str, Path], packed: Path, tiny_teacher: Path
) -> None:
    online = module(TeacherSpec(str(tiny_teacher)), standardize_steps=5)
    cached = module(TeacherSpec(targets=str(stored["fp32"])), standardize_steps=5)
    kept = {name: np.load(stored["fp32"] / f"{name}.npy").reshape(-1, 24) for name in ("cls", "patches")}
    for name, values in kept.items():
        statistics = cached.statistics[f"t__{name}"]
        np.testing.assert_allclose(statistics.mean, values.mean(0), atol=1e-5)
        np.testing.assert_allclose(statistics.std, values.std(0, ddof=1), rtol=1e-4)
        online.statistics[f"t__{name}"].load_state_dict(statistics.state_dict())
    online.eval()
    data = tiles(packed, stored["fp32"])
    data.setup()
    before = {name: value.clone() for name, value in cached.statistics.state_dict().items()}
    with torch.no_grad():
        for batch in data.train_dataloader():
            assert float(cached.losses(batch).total) == pytest.approx(float(online.losses(batch).total), abs=1e-5)
    assert all(torch.equal(before[name], value) for name, value in cached.statistics.state_dict().items())


def test_a_dimension_that_hardly_varies_does_not_outweigh_the_others(
    packed: Path, tiny_teacher: Path, tmp_path: Path
) -> None:
    """A teacher says 0.1 of every tile, off by 1e-7, and fp16 rounds that by 2.4e-5."""
    teacher = build_teacher(TeacherSpec(str(tiny_teacher)))
    with torch.no_grad():
        teacher.encoder.model.norm.weight[3], teacher.encoder.model.norm.bias[3] = 1e-7, 0.1
    store = write_targets(teacher, PackedTiles(packed), tmp_path / "t", TargetSpec("cls", dtype="fp16"))
    cached = CachedTeacher(store)
    rows = torch.from_numpy(np.stack([store.read(row)["cls"] for row in range(len(store))]))
    scaled = cached.standardizer("cls")(cached({"cls": rows}).cls)
    assert 0 < float(store.codec()["cls.target_std"][3]) < 1e-6
    assert float(scaled[:, 3].abs().max()) < 1
    others = [dim for dim in range(scaled.shape[1]) if dim != 3]
    torch.testing.assert_close(scaled[:, others].std(0), torch.ones(len(others)), rtol=1e-2, atol=0)


def test_averaged_patches_meet_the_students_averaged_patches(stored: dict[str, Path], packed: Path) -> None:
    cached = module(TeacherSpec(targets=str(stored["pooled"])), objectives=[Objective(MSE(), tokens="patches")]).eval()
    data = tiles(packed, stored["pooled"])
    data.setup()
    batch = next(iter(data.train_dataloader()))
    with torch.no_grad():
        student = cached.net.heads["t__patches"](cached.net.encoder(batch["views"]["clean"]).patches).mean(1)
        wanted = np.load(stored["pooled"] / "patches.npy")[batch["index"], 0]
        loss = float(cached.losses(batch).total)
    assert loss == pytest.approx(float(((student.numpy() - wanted) ** 2).mean()), rel=1e-5)


def test_every_epoch_brings_every_tile_with_its_own_targets(stored: dict[str, Path], packed: Path) -> None:
    data = tiles(packed, stored["fp32"], workers=2)
    data.setup()
    loader = data.train_dataloader()
    kept = np.load(stored["fp32"] / "patches.npy")
    pictures: dict[int, set[bytes]] = {}
    for epoch in range(3):
        loader.batch_sampler.set_epoch(epoch)
        rows = []
        for batch in loader:
            rows += batch["index"]
            assert np.array_equal(batch["targets"]["t"]["patches"], kept[batch["index"]])
            for row, clean, student in zip(
                batch["index"], batch["views"]["clean"], batch["views"]["student"], strict=True
            ):
                pictures.setdefault(row, set()).add(clean.numpy().tobytes())
                assert not torch.equal(clean, student)
        assert sorted(rows) == sorted(data.train_rows.tolist())
    assert all(len(seen) == 1 for seen in pictures.values())  # one geometry for ever
    held_out = [row for batch in data.val_dataloader() for row in batch["index"]]
    assert held_out == data.val_rows.tolist()


def test_nothing_of_the_teacher_enters_a_checkpoint_or_learns(stored: dict[str, Path]) -> None:
    built = module(TeacherSpec(targets=str(stored["pca"])), standardize_steps=1)
    assert {name.split(".")[0] for name in built.state_dict()} == {"students", "statistics"}
    assert not list(built.teacher("t").parameters())
    assert isinstance(built.teacher("t"), CachedTeacher)
    half = built.teacher("t").half()
    assert half.codecs["patches"].rotation.dtype == torch.float32
    batch = {"cls": torch.zeros(1, 24, dtype=torch.int8), "cls_scale": torch.ones(1)}
    batch |= {"patches": torch.ones(1, 16, 12, dtype=torch.int8), "patches_scale": torch.ones(1, 16)}
    exact = half(batch).patches
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(half(batch).patches, exact)


def test_weights_beside_targets_are_compared_and_give_layers(
    stored: dict[str, Path], tiny_teacher: Path, tmp_path: Path
) -> None:
    args = {"embed_dim": 24, "depth": 2, "num_heads": 2, "patch_size": 8, "reg_tokens": 2}
    layers = StudentSpec("vit_tiny_patch16_224", args, image_px=32, init="teacher-layers")
    both = TeacherSpec(str(tiny_teacher), targets=str(stored["fp32"]))
    built = module(both, student=layers)
    source = build_teacher(TeacherSpec(str(tiny_teacher))).encoder.model
    assert torch.equal(built.net.encoder.model.blocks[0].attn.qkv.weight, source.blocks[0].attn.qkv.weight)
    assert built.teacher("t").encoder is None
    with pytest.raises(ValueError, match="name its weights, also beside targets"):
        module(TeacherSpec(targets=str(stored["fp32"])), student=layers)
    other = StudentSpec("vit_tiny_patch16_224", {**args, "depth": 3}, image_px=32, mpp=0.5, seed=8)
    export_student(build_student(other), tmp_path / "other", licence="MIT")
    with pytest.raises(StoreError, match=r"of another teacher than .*other: weights_sha256 is"):
        module(TeacherSpec(str(tmp_path / "other"), targets=str(stored["fp32"])))
    with pytest.raises(StoreError, match=r"mean is \[.*\] there and \(0\.5, 0\.5, 0\.5\) here"):
        module(TeacherSpec(str(tiny_teacher), targets=str(stored["fp32"]), mean=(0.5, 0.5, 0.5)))
    with pytest.raises(ValueError, match="or targets must name a folder"):
        TeacherSpec()


@pytest.mark.parametrize("made", ["fp32", "bf16"])
@pytest.mark.parametrize("here", ["fp32", "bf16"])
def test_a_teacher_is_known_in_either_precision(
    made: Precision, here: Precision, tiny_teacher: Path, packed: Path, tmp_path: Path
) -> None:
    """Targets and prototypes of one precision passed for another model's beside a run in the other one."""
    then, now = (build_teacher(TeacherSpec(str(tiny_teacher), precision)) for precision in (made, here))
    stored = CachedTeacher(write_targets(then, PackedTiles(packed), tmp_path / "t", TargetSpec()))
    assert made_from(teacher_settings(then), now) is None
    spec = TeacherSpec(str(tiny_teacher), here)
    check_teacher("t", spec, stored, None, teacher_facts(spec, now, None), training=False)
    check_teacher("t", spec, now, None, teacher_facts(spec, stored, None), training=False)
    other = StudentSpec("vit_tiny_patch16_224", {"embed_dim": 24, "depth": 3, "num_heads": 2}, image_px=32, seed=8)
    export_student(build_student(other), tmp_path / "other", licence="MIT")
    stranger = build_teacher(TeacherSpec(str(tmp_path / "other"), here))
    assert made_from(teacher_settings(then), stranger) is not None
    with pytest.raises(TrainingError, match="has other weights"):
        check_teacher("t", spec, stored, None, teacher_facts(spec, stranger, None), training=False)


def test_layers_of_a_teacher_in_bf16_are_not_rounded(tiny_teacher: Path) -> None:
    args = {"embed_dim": 24, "depth": 2, "num_heads": 2, "patch_size": 8, "reg_tokens": 2}
    layers = StudentSpec("vit_tiny_patch16_224", args, image_px=32, init="teacher-layers")
    built = module(TeacherSpec(str(tiny_teacher), precision="bf16"), student=layers)
    source = build_teacher(TeacherSpec(str(tiny_teacher))).encoder.model
    weight = source.blocks[0].attn.qkv.weight
    assert not torch.equal(weight, weight.bfloat16().float())
    assert torch.equal(built.net.encoder.model.blocks[0].attn.qkv.weight, weight)
    assert built.teacher("t").encoder.dtype == torch.bfloat16


def test_what_was_not_stored_is_refused(stored: dict[str, Path], packed: Path) -> None:
    with pytest.raises(StoreError, match=r"takes patch tokens, and .* holds class tokens only"):
        module(TeacherSpec(targets=str(stored["cls"])))
    objective = Objective(Cosine(), view="student", teacher_view="student")
    with pytest.raises(StoreError, match=r"teacher's view 'student', and the targets .* are of the view 'clean'"):
        module(TeacherSpec(targets=str(stored["fp32"])), objectives=[objective])
    with pytest.raises(StoreError, match=r"data\.geometry\.scale is \(0\.5, 1\.0\) and contradicts"):
        tiles(packed, stored["fp32"], geometry=Geometry(32, (0.5, 1.0))).setup()
    data = tiles(packed, stored["fp32"], targets=None)
    data.setup()
    with pytest.raises(ValueError, match="brings no targets of teacher 't'"):
        module(TeacherSpec(targets=str(stored["fp32"]))).losses(next(iter(data.train_dataloader())))


def test_a_run_goes_on_with_the_targets_it_began_with(
    stored: dict[str, Path], packed: Path, tiny_teacher: Path, tmp_path: Path
) -> None:
    runner = trainer(tmp_path, max_epochs=1)
    runner.fit(module(TeacherSpec(targets=str(stored["fp16"]))), tiles(packed, stored["fp16"]))
    runner.save_checkpoint(tmp_path / "c.ckpt")
    saved = torch.load(tmp_path / "c.ckpt", weights_only=True)
    copied = shutil.copytree(stored["fp16"], tmp_path / "copied")
    module(TeacherSpec(targets=str(copied))).on_load_checkpoint(saved)
    for spec in (TeacherSpec(str(tiny_teacher)), TeacherSpec(targets=str(stored["fp32"]))):
        with pytest.raises(TrainingError, match=r"'t' was the stored targets \w+ when .* resume with the same"):
            module(spec).on_load_checkpoint(saved)
    # Measuring the student against the running teacher is another matter.
    measured = trainer(tmp_path).validate(
        module(TeacherSpec(str(tiny_teacher))), tiles(packed, stored["fp16"]), ckpt_path=tmp_path / "c.ckpt",
        verbose=False, weights_only=True,
    )  # fmt: skip
    assert measured[0]["val/cosine_cls"] == pytest.approx(float(runner.callback_metrics["val/cosine_cls"]), abs=1e-3)


def test_two_students_read_one_folder_at_the_same_time(stored: dict[str, Path], packed: Path, tmp_path: Path) -> None:
    """Their steps take turns, so that both hold the maps open; each trains as it would alone."""
    alone, loaders, built = [], [], []
    for number in range(2):
        data = tiles(packed, stored["fp32"], seed=number)
        data.setup()
        built.append(module(TeacherSpec(targets=str(stored["fp32"]))).eval())
        alone.append([float(built[-1].losses(batch).total.detach()) for batch in data.train_dataloader()])
        loaders.append(iter(data.train_dataloader()))
    for step in range(len(alone[0])):
        for losses, loader, own in zip(built, loaders, alone, strict=True):
            assert float(losses.losses(next(loader)).total.detach()) == pytest.approx(own[step], abs=1e-6)
    assert TargetStore(stored["fp32"]).identity == built[0].teacher("t").identity


def test_class_tokens_alone_are_stored_in_eight_bits(packed: Path, tiny_teacher: Path, tmp_path: Path) -> None:
    teacher, source = build_teacher(TeacherSpec(str(tiny_teacher))), PackedTiles(packed)
    for _ in range(2):  # the second time it is checked only
        write_targets(teacher, source, tmp_path / "t", TargetSpec("cls", dtype="int8"))
    objectives = [Objective(MSE())]
    cached = module(TeacherSpec(targets=str(tmp_path / "t")), objectives=objectives).eval()
    online = module(TeacherSpec(str(tiny_teacher)), objectives=objectives).eval()
    data = tiles(packed, tmp_path / "t")
    data.setup()
    batch = next(iter(data.train_dataloader()))
    with torch.no_grad():
        mine, theirs = (float(each.losses(batch).total) for each in (cached, online))
    assert mine == pytest.approx(theirs, rel=2e-3)
