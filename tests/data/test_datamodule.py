"""The DataModule: disjoint splits, and batches that depend on seed, epoch and tile alone."""

import pickle
from pathlib import Path
from typing import Any

import albumentations as A
import numpy as np
import pandas as pd
import pytest
import torch

from pathokd.augment import ScannerJitter, ScannerSwap, StainSwap, StudentView
from pathokd.data.datamodule import TileDataModule
from pathokd.data.pack import PackSpec, pack_tiles
from pathokd.data.split import split_rows
from pathokd.data.views import Geometry
from pathokd.data.wsi import read_manifest
from pathokd.errors import ManifestError, SlideError
from pathokd.slides.manifest import TileManifest


def module(packed: Path, workers: int = 0, seed: int = 0, batch_size: int = 8) -> TileDataModule:
    data = TileDataModule(
        str(packed),
        batch_size=batch_size,
        workers=workers,
        geometry=Geometry(32, (0.5, 1.0)),
        photometric={"student": [A.RandomBrightnessContrast(p=1.0)]},
        val_fraction=0.3,
        seed=seed,
    )
    data.setup()
    return data


def drawn(data: TileDataModule, epochs: int = 2) -> dict[tuple[int, str], torch.Tensor]:
    loader = data.train_dataloader()
    views = {}
    for epoch in range(epochs):
        loader.batch_sampler.set_epoch(epoch)
        for batch in loader:
            for key, image in zip(batch["key"], batch["views"]["student"], strict=True):
                views[epoch, key] = image
    return views


def index(groups: dict[str, int]) -> pd.DataFrame:
    return pd.DataFrame(
        [{"slide_id": f"{name}-{i % 2}", "patient": name} for name, count in groups.items() for i in range(count)]
    )


def test_an_empty_column_of_patients_names_nobody() -> None:
    """It hid the column that did, and its name was all that the refusal said."""
    some = pd.DataFrame({"slide_id": [f"s{i // 5}" for i in range(20)], "case": ["a"] * 10 + ["b"] * 10})
    for blank in ("", " ", None):
        train, val = split_rows(some.assign(patient_id=blank), val_fraction=0.3)
        assert len(train) == len(val) == 10
        assert some["case"].iloc[train].nunique() == 1
    with pytest.raises(ManifestError, match=r"All tiles have patient_id = .*nan"):
        split_rows(some.assign(patient_id=float("nan")), val_fraction=0.3, split_by="patient_id")


def test_patients_lie_on_one_side_only(packed: Path) -> None:
    data = module(packed)
    assert data.source is not None
    patients = data.source.index["patient"]
    train, val = set(patients.iloc[data.train_rows]), set(patients.iloc[data.val_rows])
    assert train
    assert val
    assert not train & val
    assert len(data.train_rows) + len(data.val_rows) == 48


@pytest.mark.parametrize("seed", range(5))
def test_split_reaches_its_fraction_by_whole_groups(seed: int) -> None:
    frame = index({f"p{i}": 10 + i for i in range(20)})
    train, val = split_rows(frame, val_fraction=0.2, seed=seed)
    groups = frame["patient"]
    assert not set(groups.iloc[train]) & set(groups.iloc[val])
    assert 0.2 <= len(val) / len(frame) < 0.3
    again = split_rows(frame, val_fraction=0.2, seed=seed)
    assert np.array_equal(again[1], val)


def test_one_large_group_still_leaves_training_tiles() -> None:
    frame = index({"a": 100, "b": 1})
    for seed in range(4):
        train, val = split_rows(frame, val_fraction=0.5, seed=seed)
        assert len(train) > 0
        assert len(val) > 0


@pytest.mark.parametrize("seed", range(6))
def test_a_patient_of_most_tiles_is_learnt_from(seed: int) -> None:
    frame = index({"most": 90, "few": 6, "more": 8})
    _, val = split_rows(frame, val_fraction=0.1, seed=seed)
    assert "most" not in set(frame["patient"].iloc[val])


def test_the_split_is_said(packed: Path) -> None:
    data = module(packed)
    assert data.source is not None
    counts = [(len(rows), data.source.index.iloc[rows]) for rows in (data.train_rows, data.val_rows)]
    learnt, held = (
        f"{n} tiles of {part.slide_id.nunique()} slides, {part.patient.nunique()} by patient" for n, part in counts
    )
    assert data.described_split() == f"Learning from {learnt}; held out: {held}."
    data = TileDataModule(str(packed), val_fraction=0.0)
    assert data.described_split().endswith("; held out: nothing.")


def test_split_errors_are_sentences() -> None:
    with pytest.raises(ManifestError, match="val_fraction to 0"):
        split_rows(index({"only": 9}), val_fraction=0.1)
    with pytest.raises(ManifestError, match="split_by='hospital' is no column"):
        split_rows(index({"a": 9, "b": 9}), val_fraction=0.1, split_by="hospital")
    with pytest.raises(ValueError, match="val_fraction"):
        split_rows(index({"a": 9}), val_fraction=1.0)


def test_views_do_not_depend_on_the_number_of_workers(packed: Path) -> None:
    alone, two = drawn(module(packed)), drawn(module(packed, workers=2))
    assert alone.keys() == two.keys()
    assert all(torch.equal(alone[draw], two[draw]) for draw in alone)


@pytest.mark.parametrize(
    ("cores", "gpu", "workers"), [(1, False, 0), (2, False, 0), (2, True, 1), (4, False, 3), (64, True, 8)]
)
def test_as_many_workers_as_serve(
    cores: int, gpu: bool, workers: int, packed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside a model on two cores a reading process takes turns with it, which costs more than it saves."""
    monkeypatch.setattr("pathokd.data.datamodule.usable_cores", lambda: cores)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    assert TileDataModule(str(packed)).workers == workers


@pytest.mark.parametrize("workers", [0, 1])
def test_an_unreadable_tile_says_what_to_do(packed: Path, tmp_path: Path, workers: int) -> None:
    """Training and `cache` stop at it; nothing said that `pack` does not."""
    made = read_manifest(packed.parent / "manifest.parquet")
    gone = made.frame["path"].map(lambda path: str(tmp_path / Path(path).name))
    TileManifest(made.frame.assign(path=gone), made.spec).write(tmp_path / "manifest.parquet")
    data = module(tmp_path / "manifest.parquet", workers=workers)
    with pytest.raises(SlideError, match="`pathokd pack` leaves such tiles out and lists them"):
        drawn(data)


def test_no_two_draws_repeat_across_tiles_epochs_and_workers(packed: Path) -> None:
    views = drawn(module(packed, workers=2), epochs=3)
    keys = {key for _, key in views}
    for key in keys:
        seen = [views[draw].numpy().tobytes() for draw in views if draw[1] == key]
        assert len(set(seen)) == len(seen)
    # The photometric strength differs between tiles of one batch, whichever worker drew them.
    gains = [float(image.float().std()) for image in views.values()]
    assert len({round(gain, 4) for gain in gains}) > 0.9 * len(gains)


def test_another_seed_is_another_stream(packed: Path) -> None:
    one, other = drawn(module(packed), 1), drawn(module(packed, seed=1), 1)
    shared = one.keys() & other.keys()
    assert not any(torch.equal(one[draw], other[draw]) for draw in shared)


def test_validation_is_clean_and_in_order(packed: Path) -> None:
    data = module(packed)
    batches = list(data.val_dataloader())
    assert [key for batch in batches for key in batch["key"]] == [
        data.source.index["key"].iloc[row]  # type: ignore[union-attr]
        for row in data.val_rows
    ]
    assert all(set(batch["views"]) == {"clean"} for batch in batches)
    assert batches[0]["views"]["clean"].dtype == torch.uint8
    assert batches[0]["views"]["clean"].shape[1:] == (3, 32, 32)


def test_a_batch_that_cannot_be_filled_is_told(packed: Path) -> None:
    with pytest.raises(ManifestError, match="fill no batch of 500"):
        module(packed, batch_size=500).train_dataloader()


def test_loader_state_counts_batches_handed_out_not_read_ahead(packed: Path) -> None:
    loader = module(packed, workers=2).train_dataloader()
    iterator = iter(loader)
    next(iterator)
    assert loader.state_dict()["done"] == 1
    first = [next(iterator)["key"], next(iterator)["key"]]
    resumed = module(packed, workers=2).train_dataloader()
    resumed.load_state_dict({**loader.state_dict(), "done": 1})
    assert [batch["key"] for batch, _ in zip(resumed, range(2), strict=False)] == first


def test_a_position_in_other_tiles_is_refused(packed: Path, tmp_path: Path) -> None:
    """As many, of the same names and places; packed otherwise they are the same ones."""
    state = module(packed).train_dataloader().state_dict()
    for name, spec in (("shards", PackSpec(shard_tiles=7)), ("coarse", PackSpec(quality=50))):
        pack_tiles(packed.parent / "manifest.parquet", tmp_path / name, spec, workers=1)
    module(tmp_path / "shards").train_dataloader().load_state_dict(state)
    with pytest.raises(ValueError, match="written by a training on other tiles"):
        module(tmp_path / "coarse").train_dataloader().load_state_dict(state)
    other = module(packed)
    other.train_rows, other.val_rows = np.sort(np.r_[other.train_rows[16:], other.val_rows]), other.train_rows[:16]
    with pytest.raises(ValueError, match="written by a training on other tiles"):
        other.train_dataloader().load_state_dict(state)
    early = {key: value for key, value in state.items() if key != "tiles"}
    module(packed).train_dataloader().load_state_dict(early)


@pytest.mark.parametrize("augment", [StudentView(1.0), ScannerJitter(), ScannerSwap(), StainSwap()])
def test_workers_may_be_started_afresh(augment: A.BasicTransform, packed: Path) -> None:
    """macOS, Windows and Python 3.14 do not fork: a worker gets its dataset, views and sampler pickled."""
    data = TileDataModule(str(packed), batch_size=8, geometry=Geometry(32), photometric={"student": [augment]})
    data.setup()
    loader: Any = data.train_dataloader()
    again = pickle.loads(pickle.dumps((loader.dataset, loader.collate_fn, loader.worker_init_fn)))
    for draw in next(iter(loader.batch_sampler)):
        mine, other = loader.dataset[draw], again[0][draw]
        assert np.array_equal(mine["views"]["student"], other["views"]["student"])
