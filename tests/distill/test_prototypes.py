"""Prototype objectives in the module: pairs and weights by hand, what they train, and what is refused."""

import hashlib
import resource
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch

from pathokd.data.pack import PackSpec, pack_tiles
from pathokd.data.views import resize
from pathokd.data.wsi import WsiTiles, open_tiles
from pathokd.distill.module import DistillationModule
from pathokd.distill.network import ProjectorSpec
from pathokd.distill.objective import Objective
from pathokd.distill.prototype_fit import KINDS, PrototypeSpec, _kmeans, fit_prototypes
from pathokd.distill.prototype_tokens import TokenShards, TokenSpec
from pathokd.distill.prototypes import Agreement, perplexity, plan_temperatures, view_pairs
from pathokd.distill.schedules import warmup_linear
from pathokd.errors import ManifestError, StoreError, TrainingError
from pathokd.losses import DINO, IBOT, Cosine, KoLeo
from pathokd.losses.assignment import balanced_centres
from pathokd.models import StudentSpec, TeacherSpec
from pathokd.models.dino_head import DinoHeadSpec
from pathokd.models.prototype_head import TENSORS, PrototypeHead, read_head, read_header, write_heads
from pathokd.models.teacher import build_teacher
from pathokd.progress import Bars
from pathokd.slides.manifest import TileManifest
from pathokd.types import Rgb

TINY = {"embed_dim": 16, "depth": 2, "num_heads": 2, "patch_size": 8, "dynamic_img_size": True}
CROSS = {"view": ["student", "global2/student", "local/student"], "teacher_view": ["clean", "global2"]}
SAME = {"view": ["student", "global2/student"], "teacher_view": ["clean", "global2"]}
SPEC = PrototypeSpec(6, 10, TokenSpec(views=2, patches=4), iterations=5)


@pytest.fixture(scope="module")
def head(packed: Path, tiny_teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("head")
    fit_prototypes(build_teacher(TeacherSpec(str(tiny_teacher))), open_tiles(packed), out, SPEC, workers=0)
    return out


def module(teacher: Path, objectives: list[Objective], **changes: Any) -> DistillationModule:
    settings: dict[str, Any] = {
        "teachers": {"t": TeacherSpec(str(teacher))},
        "student": StudentSpec("vit_tiny_patch16_224", TINY, image_px=32),
        "objectives": objectives,
        "projector": ProjectorSpec(),
        "dino_head": DinoHeadSpec(12, 5),
        "standardize_steps": 0,
    }
    built = DistillationModule(**{**settings, **changes})
    built.configure_model()
    return built


def batch(n: int = 3) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)

    def images(*shape: int) -> torch.Tensor:
        return torch.randint(0, 256, (*shape, 3, 32, 32), dtype=torch.uint8, generator=generator)

    views = {name: images(n) for name in ("clean", "student", "global2", "global2/student")}
    local = torch.randint(0, 256, (n, 4, 3, 16, 16), dtype=torch.uint8, generator=generator)
    return {"views": {**views, "local/student": local}, "index": list(range(n)), "key": ["a", "b", "c"][:n]}


def cross_entropy(built: DistillationModule, tokens: str, images: Any, view: str, teacher_view: str) -> Any:
    """H of each token, (images, tokens), float64, at the final temperature."""
    fixed, own = built.prototype_head("t", tokens), built.net.dino_head("t", tokens)  # type: ignore[arg-type]
    with torch.no_grad():
        t, s = (getattr(net(images[name]), tokens) for net, name in
                ((built.teacher("t"), teacher_view), (built.net.encoder, view)))  # fmt: skip
        x = (t.double() - fixed.mean.double()) / (fixed.std.double() + 1e-6)
        z = x / x.norm(dim=-1, keepdim=True) @ fixed.centroids.double().T
        q = ((z - fixed.centre_at(0.07).double()) / 0.07).softmax(-1)
        p = ((own(s).double() @ own.prototypes().double().T) / 0.1).log_softmax(-1)
    return -(q * p).sum(-1)


def test_dino_weighs_its_pairs_as_published(tiny_teacher: Path, head: Path) -> None:
    """2/18 for the other global view and 16/18 for local ones, here with four of them: 2/10 and 8/10."""
    built = module(tiny_teacher, [Objective(DINO(str(head)), **CROSS)]).eval()  # type: ignore[arg-type]
    images = batch()
    with torch.no_grad():
        total = built.losses(images).total.item()  # type: ignore[arg-type]
    views = dict(images["views"])
    views |= {f"crop{i}": views["local/student"][:, i] for i in range(4)}

    def mean(view: str, teacher_view: str) -> float:
        return float(cross_entropy(built, "cls", views, view, teacher_view).mean())

    cross = (mean("student", "global2") + mean("global2/student", "clean")) / 2
    local = np.mean([mean(f"crop{i}", g) for i in range(4) for g in ("clean", "global2")])
    assert total == pytest.approx(2 / 10 * cross + 8 / 10 * float(local), abs=1e-5)
    built.objectives[0] = Objective(DINO(str(head), diagonal=True), **CROSS)  # type: ignore[arg-type]
    same = (mean("student", "clean") + mean("global2/student", "global2")) / 2
    with torch.no_grad():
        total = built.losses(images).total.item()  # type: ignore[arg-type]
    assert total == pytest.approx((4 * (cross + same) / 2 + 8 * float(local)) / 12, abs=1e-5)


def test_ibot_compares_each_patch_with_its_own(tiny_teacher: Path, head: Path) -> None:
    built = module(tiny_teacher, [Objective(IBOT(str(head)), tokens="patches", **SAME)]).eval()  # type: ignore[arg-type]
    images = batch()
    with torch.no_grad():
        total = built.losses(images).total.item()  # type: ignore[arg-type]
    pairs = (("student", "clean"), ("global2/student", "global2"))
    found = [cross_entropy(built, "patches", images["views"], *pair) for pair in pairs]
    assert found[0].shape == (3, 16)
    assert total == pytest.approx(float(torch.stack(found).mean()), abs=1e-5)
    built.objectives[0] = Objective(IBOT(str(head), share=0.5), tokens="patches", **SAME)  # type: ignore[arg-type]
    torch.manual_seed(5)
    rows = [IBOT(str(head), share=0.5).sample(3, 16) for _ in range(2)]
    torch.manual_seed(5)
    with torch.no_grad():
        total = built.losses(images).total.item()  # type: ignore[arg-type]
    some = torch.stack([part.flatten()[row] for part, row in zip(found, rows, strict=True)])
    assert total == pytest.approx(float(some.mean()), abs=1e-5)


def test_the_whole_recipe_trains_what_it_should(tiny_teacher: Path, head: Path) -> None:
    objectives = [
        Objective(DINO(str(head)), **CROSS),  # type: ignore[arg-type]
        Objective(IBOT(str(head)), tokens="patches", **SAME),  # type: ignore[arg-type]
        Objective(KoLeo(), view=["student", "global2/student"], weight=0.2),
    ]
    built = module(tiny_teacher, objectives)
    losses = built.losses(batch())  # type: ignore[arg-type]
    losses.total.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in built.net.dino_heads.parameters())
    assert built.net.encoder.model.cls_token.grad.abs().sum() > 0
    assert not any(p.requires_grad for p in built.teacher("t").encoder.parameters())
    assert not any("prototypes." in name for name in built.state_dict())
    assert built.best_measure == ("val/kl_cls", "min")
    assert list(losses.parts)[1] == "patches_ibot@student+global2/student"
    koleo = [built.net.encoder(batch()["views"][name]).cls for name in ("student", "global2/student")]
    expected = (KoLeo()(koleo[0]) + KoLeo()(koleo[1])) / 2
    assert losses.parts["cls_koleo@student+global2/student"].item() == pytest.approx(expected.item(), abs=1e-5)
    trained = {id(p) for group in built.configure_optimizers().param_groups for p in group["params"]}
    assert trained == {id(p) for p in built.net.parameters()}


def test_koleo_does_not_part_the_crops_of_a_tile(tiny_teacher: Path) -> None:
    """DINOv2: "we don't apply koleo loss between cls tokens of a same image"."""
    images = batch()
    built = module(tiny_teacher, [Objective(KoLeo(), view=["clean", "local/student"])]).eval()
    with torch.no_grad():
        total = built.losses(images).total.item()  # type: ignore[arg-type]
        clean, *draws = (
            built.net.encoder(x).cls for x in (images["views"]["clean"], *images["views"]["local/student"].unbind(1))
        )
    assert len(draws) == 4
    expected = (KoLeo()(clean) + torch.stack([KoLeo()(x) for x in draws]).mean()) / 2
    assert total == pytest.approx(expected.item(), abs=1e-5)


def test_a_probe_is_not_felt_by_the_student(tiny_teacher: Path) -> None:
    built = module(tiny_teacher, [Objective(Cosine(), detach=True)])
    built.losses(batch()).total.backward()  # type: ignore[arg-type]
    assert all(p.grad is None for p in built.net.encoder.parameters())
    assert all(p.grad is not None for p in built.net.heads.parameters())
    assert built.best_measure == ("val/cosine_cls", "max")


def test_temperatures_rise_and_stay() -> None:
    values = warmup_linear(10, start=0.04, final=0.07, warmup_steps=3)
    assert np.allclose(values, [0.04, 0.05, 0.06, *[0.07] * 7])
    assert len(warmup_linear(2, start=0.04, final=0.07, warmup_steps=5)) == 2
    objective = Objective(DINO("head", warmup=0.3), view="local/student")
    assert np.allclose(plan_temperatures([objective], 10)[objective.name], values)
    with pytest.raises(ValueError, match="must not be negative"):
        warmup_linear(2, start=0.0, final=1.0, warmup_steps=-1)


def test_a_view_without_partner_is_refused() -> None:
    with pytest.raises(ValueError, match="set diagonal: true"):
        view_pairs(Objective(DINO("head"), view="student"), {"clean"})
    with pytest.raises(ValueError, match="patches of the crop 'global2' with those of 'clean'"):
        view_pairs(Objective(Cosine(), tokens="patches", view="global2"), {"clean", "global2"})
    assert view_pairs(Objective(Cosine(), **CROSS), {"clean", "global2", "local"})[1] == ("student", "global2")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="IBOT is for tokens: patches, got cls"):
        Objective(IBOT("head"))
    with pytest.raises(ValueError, match="DINO would train nothing"):
        Objective(DINO("head"), detach=True)


def test_agreement_tells_a_copy_from_a_collapsed_student() -> None:
    fixed = PrototypeHead.random(6, 8, 0)
    x = torch.nn.functional.normalize(torch.randn(300, 6, generator=torch.Generator().manual_seed(0)), dim=1)
    loss = DINO(random_prototypes_for_tests=8, student_temperature=0.07)
    copy, collapsed = Agreement(fixed, loss), Agreement(fixed, loss)
    for part in (x[:100], x[100:]):
        copy.add(part, fixed.centroids, part)
        collapsed.add(x[:1].expand_as(part), fixed.centroids, part)
    same = copy.compute("cls")
    assert float(same["kl_cls"]) == pytest.approx(0, abs=1e-5)
    assert float(same["same_prototype_cls"]) == 1
    assert float(same["spread_cls"]) == pytest.approx(1, abs=1e-5)
    one = collapsed.compute("cls")
    assert float(one["kl_cls"]) > 1
    assert float(one["spread_cls"]) < 0.5
    assert float(perplexity(torch.tensor([0.25] * 4 + [0.0]))) == pytest.approx(4)


def test_agreement_is_measured_in_fp32_under_autocast() -> None:
    """Validation runs under the training's precision, which must not be what it measures."""
    fixed = PrototypeHead.random(6, 500, 0)
    x = torch.nn.functional.normalize(torch.randn(200, 6, generator=torch.Generator().manual_seed(0)), dim=1)
    loss = DINO(random_prototypes_for_tests=500, student_temperature=0.07)
    plain, mixed = Agreement(fixed, loss), Agreement(fixed, loss)
    plain.add(x.flip(0), fixed.centroids, x)
    with torch.autocast("cpu", torch.bfloat16):
        mixed.add(x.flip(0), fixed.centroids, x)
    expected, found = plain.compute("cls"), mixed.compute("cls")
    for name, value in expected.items():
        assert float(found[name]) == pytest.approx(float(value), rel=1e-5), name


def test_the_file_is_what_its_tokens_say(head: Path, packed: Path, tiny_teacher: Path) -> None:
    """Statistics, counts and centres from a second look at all class tokens, by plain means."""
    teacher, tiles = build_teacher(TeacherSpec(str(tiny_teacher))), open_tiles(packed)
    fixed = read_head(head, "cls")
    assert (fixed.count, int(fixed.counts.sum())) == (6, 2 * len(tiles))
    assert read_head(head, "patches").counts.sum() == 2 * 4 * len(tiles)
    assert torch.allclose(fixed.centroids.norm(dim=1), torch.ones(6), atol=1e-5)
    from pathokd.data.views import Geometry, Views

    views = Views(Geometry(32, (0.32, 1.0)), seed=0)
    draws = TokenSpec(views=2).draws(len(tiles))
    crops: list[Rgb] = [views(tiles.read(draw.position), draw)["clean"] for draw in draws]
    x = teacher(torch.from_numpy(np.stack(crops)).movedim(-1, 1)).cls
    assert torch.allclose(x.mean(0), fixed.mean, atol=2e-3)
    assert torch.allclose(x.std(0), fixed.std, atol=2e-3)
    z = fixed(x) @ fixed.centroids.T
    assert torch.allclose(z.mean(0), fixed.mean_centre, atol=2e-3)
    expected = balanced_centres(lambda: [fixed(x)], fixed.centroids, [0.04, 0.05, 0.06, 0.07])
    assert torch.allclose(expected, fixed.centres, atol=2e-3)
    assert not (head / "tokens").exists()


class Failing:
    """A disk that fails after some reads."""

    def __init__(self, source: Any, reads: int) -> None:
        self.source, self.left, self.index = source, reads, source.index

    def __len__(self) -> int:
        return len(self.source)

    def read(self, row: int) -> Rgb:
        self.left -= 1
        if self.left < 0:
            raise StoreError("the disk is gone")
        tile: Rgb = self.source.read(row)
        return tile


def test_a_run_that_was_cut_off_goes_on_to_the_same_file(packed: Path, tiny_teacher: Path, tmp_path: Path) -> None:
    teacher, tiles = build_teacher(TeacherSpec(str(tiny_teacher))), open_tiles(packed)
    spec = PrototypeSpec(6, 10, TokenSpec(views=24, patches=2), iterations=4)  # 1,152 views: two shards
    fit_prototypes(teacher, tiles, tmp_path / "whole", spec, workers=0)
    with pytest.raises(StoreError, match="the disk is gone"):
        fit_prototypes(teacher, Failing(tiles, 1100), tmp_path / "cut", spec, workers=0)
    shard = tmp_path / "cut/tokens/tokens-000000.safetensors"
    written = shard.stat().st_mtime_ns
    with pytest.raises(StoreError, match="this run asks for"):
        fit_prototypes(teacher, tiles, tmp_path / "cut", PrototypeSpec(7, 10, spec.tokens), workers=0)
    assert shard.stat().st_mtime_ns == written
    fit_prototypes(teacher, Failing(tiles, 140), tmp_path / "cut", spec, workers=0)  # the second shard's 128 reads
    one, other = ((tmp_path / name / "prototypes.safetensors").read_bytes() for name in ("whole", "cut"))
    assert one == other
    before = (tmp_path / "cut/prototypes.safetensors").stat().st_mtime_ns
    assert fit_prototypes(teacher, Failing(tiles, 0), tmp_path / "cut", spec, workers=0)["cls"].k == 6
    assert (tmp_path / "cut/prototypes.safetensors").stat().st_mtime_ns == before


def test_a_disk_that_fills_up_is_one_sentence_and_no_loss(packed: Path, tiny_teacher: Path, tmp_path: Path) -> None:
    """A limit on the size of files gives the same error from the same call as a full disk."""
    teacher, tiles = build_teacher(TeacherSpec(str(tiny_teacher))), open_tiles(packed)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
    try:
        with pytest.raises(StoreError, match=r"Cannot write .*tokens-000000\.safetensors: File too large\. Free some"):
            fit_prototypes(teacher, tiles, tmp_path, SPEC, workers=0)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert fit_prototypes(teacher, tiles, tmp_path, SPEC, workers=0)["cls"].k == SPEC.k


def test_prototypes_of_the_same_tiles_in_other_pixels_are_no_answer(
    head: Path, packed: Path, tiny_teacher: Path, tmp_path: Path
) -> None:
    teacher, manifest = build_teacher(TeacherSpec(str(tiny_teacher))), packed.parent / "manifest.parquet"
    pack_tiles(manifest, tmp_path / "shards", PackSpec(shard_tiles=7), workers=1)
    pack_tiles(manifest, tmp_path / "coarse", PackSpec(quality=50), workers=1)
    assert fit_prototypes(teacher, open_tiles(tmp_path / "shards"), head, SPEC, workers=0)["cls"].k == SPEC.k
    with pytest.raises(StoreError, match=r"was made with tiles = .* pass --overwrite"):
        fit_prototypes(teacher, open_tiles(tmp_path / "coarse"), head, SPEC, workers=0)


def test_prototypes_of_another_slide_of_the_same_name_are_no_answer(
    packed: Path, tiny_teacher: Path, tmp_path: Path
) -> None:
    """As of a cohort and its stain-normalised copies in another folder."""
    teacher, manifest = (
        build_teacher(TeacherSpec(str(tiny_teacher))),
        TileManifest.read(packed.parent / "manifest.parquet"),
    )
    originals = [Path(path) for path in manifest.frame["path"].unique()]
    moved = manifest.frame.assign(path=[str(tmp_path / Path(path).name) for path in manifest.frame["path"]])
    for path in originals:
        shutil.copy(path, tmp_path)
    tiles = WsiTiles(TileManifest(moved, manifest.spec))
    fit_prototypes(teacher, WsiTiles(manifest), tmp_path / "head", SPEC, workers=0)
    broken = WsiTiles(manifest)
    broken.read = Mock(side_effect=StoreError("the disk is gone"))  # type: ignore[method-assign]
    with pytest.raises(StoreError, match="the disk is gone"):
        fit_prototypes(teacher, broken, tmp_path / "cut", SPEC, workers=0)
    assert fit_prototypes(teacher, tiles, tmp_path / "head", SPEC, workers=0)["cls"].k == SPEC.k
    shutil.copy(originals[1], tmp_path / originals[0].name)
    for name in ("head", "cut"):
        with pytest.raises(
            StoreError, match=r"computed on another slide slide 0.*`pathokd prototypes` with --overwrite"
        ):
            fit_prototypes(teacher, tiles, tmp_path / name, SPEC, workers=0)


def test_what_a_killed_overwrite_left_is_not_taken_for_ones_own(
    packed: Path, tiny_teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Folders are removed in no order: the header may go before the tokens that it speaks of."""

    def kill(folder: Path, **_: Any) -> None:
        (folder / "header.json").unlink()
        raise KeyboardInterrupt

    teacher, tiles = build_teacher(TeacherSpec(str(tiny_teacher))), open_tiles(packed)
    one = PrototypeSpec(6, 10, TokenSpec(views=24, patches=2), iterations=4)
    other = replace(one, tokens=replace(one.tokens, seed=1))
    fit_prototypes(teacher, tiles, tmp_path / "whole", other, workers=0)
    with pytest.raises(StoreError, match="the disk is gone"):
        fit_prototypes(teacher, Failing(tiles, 1100), tmp_path / "cut", one, workers=0)
    with monkeypatch.context() as patch:
        patch.setattr("pathokd.distill.prototype_fit.shutil.rmtree", kill)
        with pytest.raises(KeyboardInterrupt):
            fit_prototypes(teacher, tiles, tmp_path / "cut", other, workers=0, overwrite=True)
    fit_prototypes(teacher, tiles, tmp_path / "cut", other, workers=0)
    found, wanted = ((tmp_path / name / "prototypes.safetensors").read_bytes() for name in ("cut", "whole"))
    assert found == wanted


def test_a_run_killed_at_its_very_end_leaves_no_tokens(
    packed: Path, tiny_teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher, tiles = build_teacher(TeacherSpec(str(tiny_teacher))), open_tiles(packed)
    with monkeypatch.context() as patch:
        patch.setattr("pathokd.distill.prototype_fit.shutil.rmtree", Mock(side_effect=KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            fit_prototypes(teacher, tiles, tmp_path, SPEC, workers=0)
    assert (tmp_path / "tokens").exists()
    fit_prototypes(teacher, Failing(tiles, 0), tmp_path, SPEC, workers=0)
    assert [path.name for path in tmp_path.iterdir()] == ["prototypes.safetensors"]


def test_half_a_file_of_an_unfinished_run_is_one_sentence(packed: Path, tiny_teacher: Path, tmp_path: Path) -> None:
    teacher, tiles = build_teacher(TeacherSpec(str(tiny_teacher))), open_tiles(packed)
    spec = replace(SPEC, tokens=TokenSpec(views=24, patches=2))
    with pytest.raises(StoreError, match="the disk is gone"):
        fit_prototypes(teacher, Failing(tiles, 1100), tmp_path, spec, workers=0)
    shard = tmp_path / "tokens/tokens-000000.safetensors"
    shard.write_bytes(shard.read_bytes()[:5000])
    with pytest.raises(StoreError, match=r"tokens-000000\.safetensors is damaged .* start again with --overwrite"):
        fit_prototypes(teacher, tiles, tmp_path, spec, workers=0)


def test_a_dimension_that_hardly_varies_does_not_outweigh_the_others(
    packed: Path, tiny_teacher: Path, tmp_path: Path
) -> None:
    """Tokens are stored in fp16 and trained on in fp32: of a constant 0.1 the difference is 2.4e-5."""
    teacher, tiles = build_teacher(TeacherSpec(str(tiny_teacher))), open_tiles(packed)
    with torch.no_grad():
        teacher.encoder.model.norm.weight[3], teacher.encoder.model.norm.bias[3] = 1e-7, 0.1
    fit_prototypes(teacher, tiles, tmp_path, SPEC, workers=0)
    x = teacher(torch.from_numpy(np.stack([resize(tiles.read(row), 32) for row in range(8)])).movedim(-1, 1)).cls
    assert float(read_head(tmp_path, "cls")(x)[:, 3].abs().max()) < 0.2


def test_kmeans_goes_on_from_its_last_step(tmp_path: Path) -> None:
    x = torch.nn.functional.normalize(torch.randn(900, 6, generator=torch.Generator().manual_seed(0)), dim=1)
    found = []
    for name, stops in (("whole", [12]), ("cut", [3, 4, 12])):
        for stop in stops:
            spec = PrototypeSpec(20, iterations=stop)
            state = tmp_path / f"{name}.safetensors"
            with Bars() as bars:
                found.append(_kmeans(lambda: torch.split(x, 100), 900, KINDS[0], spec, state, bars))
    assert torch.equal(found[0][0], found[-1][0])
    assert found[0][1] == found[-1][1]
    assert found[1][1] == 3


@pytest.mark.parametrize("changed", ["centres", "std", "temperatures"])
def test_a_resume_asks_for_the_whole_head(changed: str, head: Path, tiny_teacher: Path, tmp_path: Path) -> None:
    """The same centroids with other centres, scale or temperatures are other targets."""
    heads = {kind: read_head(head, kind) for kind in KINDS}
    tensors = {kind: {name: torch.as_tensor(getattr(found, name)) for name in TENSORS} for kind, found in heads.items()}
    tensors["cls"][changed] = tensors["cls"][changed] * 1.001
    write_heads(tmp_path, tensors, read_header(head))
    rises = {"teacher_temperature": (0.05, 0.06)}
    saved = module(tiny_teacher, [Objective(DINO(str(head), diagonal=True, **rises))])  # type: ignore[arg-type]
    other = module(tiny_teacher, [Objective(DINO(str(tmp_path), diagonal=True, **rises))])  # type: ignore[arg-type]
    checkpoint: dict[str, Any] = {"state_dict": saved.state_dict()}
    saved._trainer = Mock(callback_metrics={}, precision="32-true")
    saved.on_save_checkpoint(checkpoint)
    module(tiny_teacher, saved.objectives).on_load_checkpoint(checkpoint)
    with pytest.raises(TrainingError, match="prototypes of t__cls are others"):
        other.on_load_checkpoint(checkpoint)
    older = hashlib.sha256(heads["cls"].centroids.numpy().tobytes()).hexdigest()
    checkpoint["pathokd"]["prototypes"] = {"t__cls": older}
    other.on_load_checkpoint(checkpoint)


def test_wrong_heads_are_one_sentence(head: Path, packed: Path, tiny_teacher: Path, tmp_path: Path) -> None:
    from pathokd.export import export_student
    from pathokd.models.student import build_student

    other = build_student(StudentSpec("vit_tiny_patch16_224", TINY, image_px=32, seed=99))
    export_student(other, tmp_path / "other", licence="MIT")
    cross = {"view": "local/student", "teacher_view": "clean"}
    with pytest.raises(TrainingError, match="were made from tiny with weights_sha256"):
        module(tmp_path / "other", [Objective(DINO(str(head)), **cross)])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"from 0.04 to 0.07, got 0.2"):
        module(tiny_teacher, [Objective(DINO(str(head), teacher_temperature=(0.04, 0.2)), **cross)])  # type: ignore[arg-type]
    two = [Objective(DINO(str(head)), **cross), Objective(DINO(random_prototypes_for_tests=4), **cross)]  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="name two heads"):
        module(tiny_teacher, two)
    low = {"t": TeacherSpec(str(tiny_teacher), precision="bf16")}
    module(tiny_teacher, [Objective(DINO(str(head)), **cross)], teachers=low)  # type: ignore[arg-type]
    with pytest.raises(ManifestError, match=r"48 class tokens are too few for 100 prototypes.*--views 9"):
        fit_prototypes(
            build_teacher(TeacherSpec(str(tiny_teacher))), open_tiles(packed), tmp_path / "few", PrototypeSpec(100)
        )
    with pytest.raises(ValueError, match=r"scale must be a range within \(0, 1\]"):
        TokenSpec(scale=(0.3, 2.0))
    assert TokenShards(tmp_path, 1).path(0).name == "tokens-000000.safetensors"
