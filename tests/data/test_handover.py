import pickle

import pytest
import torch

from pathokd.data.batch import TileBatch
from pathokd.data.handover import Parcel, unwrap, wrap


@pytest.fixture
def batch() -> TileBatch:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (3, 3, 5, 7), dtype=torch.uint8, generator=generator)
    stored = {
        "cls": torch.randn(3, 4, generator=generator).half(),
        "patches": torch.randint(-128, 128, (3, 2, 4), dtype=torch.int8, generator=generator),
        "patches_scale": torch.randn(3, 2, generator=generator),
    }
    return {
        "views": {"clean": pixels, "local": pixels.flip(-1)},
        "index": [4, 2, 9],
        "key": ["a", "b", "c"],
        "targets": {"t": stored},
        "place": torch.arange(3),
    }


def test_a_parcel_is_one_tensor_and_brings_the_batch_back(batch: TileBatch) -> None:
    parcel = wrap(batch)
    assert isinstance(parcel, Parcel)
    arrived = unwrap(pickle.loads(pickle.dumps(parcel)))
    assert arrived.keys() == batch.keys()
    assert (arrived["index"], arrived["key"]) == (batch["index"], batch["key"])
    wanted = {**batch["views"], **batch["targets"]["t"], "place": batch["place"]}
    found = {**arrived["views"], **arrived["targets"]["t"], "place": arrived["place"]}
    assert found.keys() == wanted.keys()
    for name, tensor in found.items():
        assert tensor.dtype == wanted[name].dtype
        assert torch.equal(tensor, wanted[name])
    assert len({tensor.untyped_storage().data_ptr() for tensor in found.values()}) == 1


def test_tensors_of_a_parcel_do_not_overlap(batch: TileBatch) -> None:
    arrived = unwrap(wrap(batch))
    before = batch["targets"]["t"]["cls"].clone()
    for tensor in (*arrived["views"].values(), arrived["place"], arrived["targets"]["t"]["patches"]):
        tensor.zero_()
    assert torch.equal(arrived["targets"]["t"]["cls"], before)
