"""The comparison on real files with real (small, untrained) models, and fidelity with real adaptor heads."""

from pathlib import Path

import numpy as np
import pytest
import torch

from pathokd.data.packed import PackedTiles
from pathokd.embed import Embedder
from pathokd.errors import ManifestError
from pathokd.evaluate import RegisteredPair, compare_models, measure_fidelity, score_retrieval
from pathokd.evaluate.compare import probe_rows
from pathokd.evaluate.fidelity import spread_rows
from pathokd.export import export_student, load_adaptors
from pathokd.models import Encoder, Standardizer, make_projector


def test_compare_models(packed: PackedTiles, encoders: dict[str, Encoder]) -> None:
    scores = compare_models(encoders, packed.folder, readout="mean", batch_size=48, cost_seconds=0.0)
    assert list(scores) == ["teacher", "student"]
    for name, score in scores.items():
        assert score.name == name
        assert score.cost.params == sum(p.numel() for p in encoders[name].parameters())
        # Flat colours per class: any model keeps them apart in its patch tokens.
        assert score.probe.accuracy > 0.9
        assert (score.probe.n, score.probe.n_groups, score.probe.n_classes) == (288, 72, 3)
        assert score.cross_scanner is not None
        assert score.cross_staining is not None
        # Pixel-doubled scans shrink back to the same pixels, so the partner is always the nearest.
        assert score.cross_scanner.topk == 1.0
        assert score.cross_scanner.ci == (1.0, 1.0)
        assert (score.cross_scanner.n_tiles, score.cross_scanner.n_pairs) == (72, 2)
        assert score.cross_scanner.n_places == 72
        assert score.cross_scanner.chance == pytest.approx(10 / 143)
        assert score.cross_staining.topk < 1.0
        assert score.cross_scanner.separation > score.cross_staining.separation


def test_group_columns_name_the_resampled_unit(packed: PackedTiles, encoders: dict[str, Encoder]) -> None:
    one = {"student": encoders["student"]}
    scores = compare_models(one, packed, group_columns=("slide_id",), batch_size=48, cost_seconds=0.0)
    assert scores["student"].probe.n_groups == 8


def test_patients_with_several_slides_are_held_out_whole_and_not_paired(
    packed: PackedTiles, encoders: dict[str, Encoder], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With patients as cases their blocks were paired with each other; with blocks as cases patients leaked."""
    one, cases = {"student": encoders["student"]}, packed.index["case"]
    by_case = compare_models(one, packed, batch_size=48, cost_seconds=0.0)["student"]
    block = packed.index["slide_id"]
    index = packed.index.assign(case=block, patient_id=cases)
    monkeypatch.setattr(PackedTiles, "index", property(lambda _: index))
    by_patient = compare_models(one, packed, batch_size=48, cost_seconds=0.0)["student"]
    assert by_patient.probe.accuracy == by_case.probe.accuracy
    assert by_patient.cross_scanner is None  # no case is seen under two scanners
    index = packed.index.assign(case="all", patient_id=cases)
    with pytest.warns(UserWarning, match="left out: case all has several slides under .*column patient_id still"):
        crowded = compare_models(one, packed, batch_size=48, cost_seconds=0.0)["student"]
    assert crowded.probe.accuracy == by_case.probe.accuracy
    assert crowded.cross_scanner is crowded.cross_staining is None


def test_many_cases_are_what_is_resampled(
    packed: PackedTiles, encoders: dict[str, Encoder], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Places of a case go up and down together, and intervals by places were half as wide as they should be."""
    row = (packed.index["y"] * packed.index["mpp_level0"] / 28).astype(int)
    index = packed.index.assign(case=packed.index["case"] + "-" + row.astype(str))  # each row of tiles is a case
    monkeypatch.setattr(PackedTiles, "index", property(lambda _: index))
    asked = []
    monkeypatch.setattr(
        "pathokd.evaluate.retrieval.weighted_mean_interval", lambda *a: asked.append(a[2]) or (0.0, 1.0)
    )
    one = compare_models({"student": encoders["student"]}, packed, batch_size=48, cost_seconds=0.0)["student"]
    assert (one.probe.n, one.probe.n_groups) == (288, 12)
    assert [len(np.unique(groups)) for groups in asked] == [12, 12]
    assert one.cross_scanner is not None
    assert one.cross_scanner.n_places == 72


def test_a_constant_encoder_scores_chance() -> None:
    features = np.ones((40, 5), np.float32)
    pair = RegisteredPair("HE", "S1", "S2", np.arange(20), np.arange(20, 40))
    score = score_retrieval(features, [pair], np.arange(40).astype(str))
    assert score is not None
    assert score.topk == pytest.approx(10 / 39)
    assert score.topk == pytest.approx(score.chance)
    assert (score.cosine, score.separation, score.tied) == pytest.approx((1.0, 0.0, 1.0), abs=1e-6)


def test_pairs_count_once_whatever_their_size() -> None:
    rng = np.random.default_rng(0)
    features = rng.normal(size=(60, 8)).astype(np.float32)
    features[20:40] = features[:20]  # a perfect pair of 20, and one of 10 unrelated tiles
    pairs = [
        RegisteredPair("HE", "S1", "S2", np.arange(20), np.arange(20, 40)),
        RegisteredPair("HE", "S1", "S3", np.arange(40, 50), np.arange(50, 60)),
    ]
    both = score_retrieval(features, pairs, np.arange(60), k=1)
    apart = [score_retrieval(features, [pair], np.arange(60), k=1) for pair in pairs]
    assert both is not None
    assert both.topk == pytest.approx(np.mean([one.topk for one in apart if one]))
    assert score_retrieval(features, [], np.arange(60)) is None


def test_probe_rows(packed: PackedTiles) -> None:
    frame = packed.index.copy()
    assert len(probe_rows(frame)) == len(frame)
    frame.loc[:9, "label_share"] = 0.5
    frame.loc[10:19, "label"] = "background"
    frame.loc[20:24, "label"] = "necrosis"  # in one case only
    assert probe_rows(frame).tolist() == list(range(25, len(frame)))
    with pytest.raises(ManifestError, match="needs two that share two classes"):
        probe_rows(frame[frame["case"] == "c0"])


def test_missing_metadata_is_named(packed: PackedTiles, encoders: dict[str, Encoder]) -> None:
    with pytest.raises(ManifestError, match="lack these columns: hospital"):
        compare_models(encoders, packed, condition_columns=("stain", "hospital"))


def test_fidelity_of_a_model_to_itself_is_one(packed: PackedTiles, encoders: dict[str, Encoder]) -> None:
    teacher = Embedder(encoders["teacher"], batch_size=32)
    identity = make_projector("linear", 96, 96)
    with torch.no_grad():
        identity.net[0].weight.copy_(torch.eye(96))
        identity.net[0].bias.zero_()
    heads = {"embedded.cls": identity, "embedded.patches": identity}
    got = measure_fidelity(teacher, teacher, heads, packed, max_tiles=60)
    assert got[:4] == pytest.approx((1.0, 1.0, 1.0, 1.0), abs=1e-5)
    assert got.n == 60


def test_fidelity_through_exported_heads(packed: PackedTiles, encoders: dict[str, Encoder], tmp_path: Path) -> None:
    torch.manual_seed(0)
    statistics = Standardizer(96)
    statistics.update(torch.randn(50, 96) * 3 + 5)
    heads = {
        "embedded.cls": make_projector("linear", 48, 96),
        "embedded.cls.statistics": statistics,
        "embedded.patches": make_projector("mlp", 48, 96),
    }
    export_student(encoders["student"], tmp_path / "student", adaptors=heads, facts={"teacher": "embedded"})
    student = Embedder(str(tmp_path / "student"), batch_size=16)
    teacher = Embedder(encoders["teacher"], batch_size=16)
    rows = np.array([3, 100, 200, 287, 5, 6, 7, 8, 9, 10, 11, 12])
    got = measure_fidelity(teacher, student, load_adaptors(tmp_path / "student"), packed, rows=rows)

    images = np.stack([packed.read(int(row)) for row in rows])
    ours, theirs = student.features(images), teacher.features(images)
    with torch.no_grad():
        cls = torch.cosine_similarity(
            statistics(heads["embedded.cls"](ours.cls)), statistics(theirs.cls), dim=-1
        ).mean()
        patches = torch.cosine_similarity(heads["embedded.patches"](ours.patches), theirs.patches, dim=-1).mean()
    assert got.cosine_cls == pytest.approx(float(cls), abs=1e-5)
    assert got.cosine_patches == pytest.approx(float(patches), abs=1e-5)
    assert 0.0 <= got.cka <= 1.0
    without = measure_fidelity(teacher, student, {}, packed, rows=rows)
    assert (without.cosine_cls, without.cosine_patches) == (None, None)
    assert without.cka == got.cka


def test_fidelity_to_one_of_several_teachers_names_it(packed: PackedTiles, encoders: dict[str, Encoder]) -> None:
    """Without a key the first one's head was taken, and a misspelt key found none, both without a word."""
    teacher = Embedder(encoders["teacher"], batch_size=32)
    heads = {f"{key}.cls": make_projector("linear", 96, 96) for key in ("one", "two")}
    for key in (None, "three"):
        with pytest.raises(ValueError, match="key should name one of the teachers one, two that the heads lead to"):
            measure_fidelity(teacher, teacher, heads, packed, key=key, max_tiles=20)
    first, second = (measure_fidelity(teacher, teacher, heads, packed, key=key, max_tiles=20) for key in ("one", "two"))
    assert first.cosine_cls != second.cosine_cls


def test_fidelity_needs_neighbours(packed: PackedTiles, encoders: dict[str, Encoder]) -> None:
    teacher = Embedder(encoders["teacher"])
    with pytest.raises(ValueError, match="10 neighbours"):
        measure_fidelity(teacher, teacher, {}, packed, max_tiles=10)


def test_spread_rows_cover_the_whole_table() -> None:
    assert spread_rows(5, 10).tolist() == [0, 1, 2, 3, 4]
    some = spread_rows(1000, 10)
    assert (len(some), some[0], some[-1]) == (10, 0, 999)
