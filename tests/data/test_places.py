"""Which tiles show one place under several conditions, and the batches made of them."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from pathokd.data.batch import Draw
from pathokd.data.datamodule import TileDataModule
from pathokd.data.packed import PackedTiles
from pathokd.data.places import Registered, RegisteredSpec, place_ids, registered_tiles
from pathokd.data.samplers import PlaceBatchSampler
from pathokd.data.targets import TargetSpec, TargetStore
from pathokd.data.views import Geometry, orientation, whole_tile
from pathokd.embed.targets import write_targets
from pathokd.errors import ManifestError
from pathokd.evaluate import registered_pairs
from pathokd.evaluate.paired_readers import _tiles
from pathokd.models import TeacherSpec, build_teacher


def frame(rows: list[tuple[str, str, float, float, float]]) -> pd.DataFrame:
    """Case, scanner, microns per pixel, and the tile's corner in microns; tiles are 112 um."""
    table = pd.DataFrame(rows, columns=["case", "scanner", "mpp_level0", "ux", "uy"])
    x, y = (np.rint(table[name] / table["mpp_level0"]).astype(int) for name in ("ux", "uy"))
    return table.assign(x=x, y=y, mpp=0.5, tile_px=224, stain="HE")


def test_two_blocks_of_a_patient_are_not_one_tissue() -> None:
    """Tiles of one block were paired with those of the other, wherever only one of them had tissue."""
    blocks = [("a", scanner, 0.5, 112.0 * n, 0) for scanner in ("S50", "S45") for n in (0, 1, 1, 2)]
    table = frame(blocks).assign(slide_id=["A1", "A1", "B1", "B1", "A2", "A2", "B2", "B2"])
    for read in (registered_tiles, lambda t: registered_pairs(t, "scanner", "stain"), lambda t: _tiles(t, len, "here")):
        with pytest.raises(ManifestError, match=r"case a has several slides under .*, such as A1 and B1, but slides"):
            read(table)
        read(table.assign(case=table["slide_id"].str[0]))  # one case a block
        read(table.assign(slide_id=table["slide_id"].str[0]))  # simulated: the same slide under both
    stains = table.assign(stain=["HE", "HE", "IHC", "IHC"] * 2)
    assert (
        registered_tiles(stains, RegisteredSpec(conditions=("scanner",))).place.max() == 2
    )  # the same block, restained


def test_a_place_is_the_same_microns_of_a_case() -> None:
    table = frame(
        [
            ("a", "S50", 0.5, 0, 112),
            ("a", "S45", 0.4545, 0, 112),  # the same, in other pixels
            ("a", "S50", 0.5, 112, 112),  # no partner
            ("b", "S45", 0.4545, 112, 112),  # another case
            ("b", "S50", 0.5, 0, 0),
            ("b", "S45", 0.4545, 20, 0),  # same square of the grid, 20 um off
            ("b", "S50", 0.5, 112, 0),
            ("b", "S50", 0.5, 112, 0),  # the same condition twice: the first counts
            ("b", "S45", 0.4545, 112, 0),
        ]
    )
    found = registered_tiles(table)
    assert found.place.tolist() == [0, 0, -1, -1, -1, -1, 1, -1, 1]
    assert (found.condition == (table["scanner"] == "S50")).all()


def test_a_place_has_one_size() -> None:
    """Of a slide cut at two magnifications, tiles around one point were one place."""
    fine = frame([("a", scanner, 0.5, 112.0, 112.0) for scanner in ("S50", "S45")])
    coarse = frame([("a", scanner, 0.5, 56.0, 56.0) for scanner in ("S50", "S45")]).assign(mpp=1.0)
    assert registered_tiles(pd.concat([fine, coarse], ignore_index=True)).place.tolist() == [0, 0, 1, 1]


def test_slides_of_unknown_case_are_registered_with_nothing() -> None:
    rows = [(case, scanner, 0.5, 0.0, 0.0) for case in ("a", "", " ") for scanner in ("S50", "S45")]
    table = frame(rows).assign(slide_id=list("123456"))
    assert registered_tiles(table).place.tolist() == [0, 0, -1, -1, -1, -1]
    assert len(set(place_ids(table))) == 5
    (pair,) = registered_pairs(pd.concat([table, table.assign(x=448)]), vary="scanner", hold="stain")
    assert len(pair.rows_first) == 2


def test_tiles_of_a_place_answer_to_its_reference() -> None:
    table = frame(
        [
            ("a", "S45", 0.5, 0, 0),
            ("a", "S50", 0.5, 0, 0),
            ("a", "S25", 0.5, 0, 0),
            ("b", "S45", 0.5, 0, 0),  # never seen by the reference
            ("b", "S25", 0.5, 0, 0),
            ("a", "S50", 0.5, 224, 0),  # no partner
        ]
    )
    found = registered_tiles(table, RegisteredSpec(conditions=("scanner",), reference=("S50",)))
    assert found.place.tolist() == [0, 0, 0, -1, -1, -1]
    assert found.answers_to is not None
    assert found.answers_to[:3].tolist() == [1, 1, 1]
    assert registered_tiles(table, RegisteredSpec(conditions=("scanner",))).answers_to is None
    with pytest.raises(ManifestError, match="under the reference S99: the tiles have S25, S45, S50 in scanner"):
        registered_tiles(table, RegisteredSpec(conditions=("scanner",), reference=("S99",)))
    with pytest.raises(ValueError, match="one value for each of the conditions stain, scanner, got S50"):
        RegisteredSpec(reference=("S50",))


@pytest.mark.parametrize(("start", "stride"), [(0, 112), (56, 112), (0, 56), (13.3, 37.5)])
def test_any_grid_is_paired(start: float, stride: float) -> None:
    """Also one of half a tile, or of overlapping tiles, whose positions lie between two squares."""
    spots = [start + stride * k for k in range(8)]
    rows = [("a", s, mpp, ux, uy) for s, mpp in (("S50", 0.5), ("S45", 0.2274)) for ux in spots for uy in spots]
    found = registered_tiles(frame(rows))
    assert len(set(found.place.tolist())) == 64
    assert (found.place[:64] == found.place[64:]).all()
    assert found.place.min() == 0


def test_tiles_without_pairs_are_refused(packed: Path) -> None:
    table = frame([("a", "S50", 0.5, 0, 0), ("a", "S45", 0.5, 112, 0), ("b", "S45", 0.5, 0, 0)])
    with pytest.raises(ManifestError, match=r"no registered pairs: no place of a case is seen under two of the 2 cond"):
        registered_tiles(table)
    with pytest.raises(ManifestError, match="lack these columns: batch"):
        registered_tiles(table, RegisteredSpec(conditions=("batch",)))
    data = TileDataModule(str(packed), batch_size=4, geometry=Geometry(32), registered=RegisteredSpec("patient"))
    with pytest.raises(ManifestError, match="stain, scanner"):
        data.train_dataloader()


def grid(places: int = 20, conditions: int = 3, missing: int = 7) -> Registered:
    """Every place under every condition, less some."""
    place, condition = (a.ravel() for a in np.mgrid[:places, :conditions])
    place = place.copy()
    place[np.random.default_rng(0).permutation(len(place))[:missing]] = -1
    return Registered(place.astype(np.int64), condition.astype(np.int64))


@pytest.mark.parametrize("world", [1, 2])
def test_a_batch_is_places_under_the_same_two_conditions(world: int) -> None:
    registered = grid()
    ranks = [PlaceBatchSampler(registered, 4, rank=rank, world_size=world) for rank in range(world)]
    batches = [list(sampler) for sampler in ranks]
    assert len(batches[0]) == len(ranks[0]) == 20 // (2 * world)
    seen = set()
    for step in zip(*batches, strict=True):
        rows = np.array([[draw.position for draw in batch] for batch in step])
        assert (registered.place[rows] >= 0).all()
        first, second = rows[:, :2], rows[:, 2:]
        assert (registered.place[first] == registered.place[second]).all()
        assert len(np.unique(registered.place[first])) == 2 * world  # no place on two ranks or twice in one
        a, b = np.unique(registered.condition[first]), np.unique(registered.condition[second])
        assert (len(a), len(b)) == (1, 1)
        assert a[0] != b[0]
        seen.add((int(a[0]), int(b[0])))
    assert len(seen) > 1


def test_two_processes_draw_the_batches_of_one_and_tear_no_place_apart() -> None:
    registered = grid()
    one, two = (
        PlaceBatchSampler(registered, 8),
        [PlaceBatchSampler(registered, 4, rank=r, world_size=2) for r in (0, 1)],
    )
    assert len(one) == len(two[0]) > 3
    for epoch in range(3):
        for sampler in (one, *two):
            sampler.set_epoch(epoch)
        for whole, *shares in zip(one, *two, strict=True):
            assert sorted(whole) == sorted([*shares[0], *shares[1]])  # the same visits, so the same views
            for share in shares:
                places = registered.place[[draw.position for draw in share]]
                assert (np.unique(places, return_counts=True)[1] == 2).all()


def test_no_two_visits_share_their_views() -> None:
    sampler, draws = PlaceBatchSampler(grid(), 8), []
    for epoch in range(4):
        sampler.set_epoch(epoch)
        draws += [draw for batch in sampler for draw in batch]
    assert len(set(draws)) == len(draws)
    assert len({draw.position for draw in draws}) < len(draws)


@pytest.mark.parametrize("done", [0, 2, 5])
def test_resuming_continues_exactly(done: int) -> None:
    def sampler() -> PlaceBatchSampler:
        return PlaceBatchSampler(grid(), 8, seed=3)

    def epoch(of: PlaceBatchSampler, number: int) -> list[list[Draw]]:
        of.set_epoch(number)
        return list(of)

    expected = [*epoch(sampler(), 0), *epoch(sampler(), 1)]
    first, second = sampler(), sampler()
    first.done = done
    second.load_state_dict(first.state_dict())
    rest = list(second) if second.epoch == 0 else []
    assert rest + epoch(second, 1) == expected[done:]


def test_a_checkpoint_of_other_batches_is_refused() -> None:
    from pathokd.data.samplers import ResumableBatchSampler

    sampler, plain = PlaceBatchSampler(grid(), 8), ResumableBatchSampler(60, 8)
    with pytest.raises(ValueError, match="registered="):
        sampler.load_state_dict(PlaceBatchSampler(grid(missing=6), 8).state_dict())
    answering = grid()._replace(answers_to=np.zeros(60, np.int64))
    with pytest.raises(ValueError, match="registered="):
        sampler.load_state_dict(PlaceBatchSampler(answering, 8).state_dict())
    with pytest.raises(ValueError, match="registered=None"):
        sampler.load_state_dict(plain.state_dict())
    with pytest.raises(ValueError, match="registered="):
        plain.load_state_dict(sampler.state_dict())


def test_batches_that_cannot_be_are_refused() -> None:
    for size in (2, 5):
        with pytest.raises(ValueError, match=f"even and at least 4 for registered pairs, got {size}"):
            PlaceBatchSampler(grid(), size)
    with pytest.raises(ManifestError, match=r"needs 64 places under .* share more than 1\d: lower data.batch_size"):
        PlaceBatchSampler(grid(), 64, world_size=2)


def test_a_batch_says_places_and_conditions(registered_packed: Path) -> None:
    spec = RegisteredSpec()
    data = TileDataModule(
        str(registered_packed), batch_size=8, workers=0, geometry=Geometry(32), val_fraction=0.3, registered=spec
    )
    index = PackedTiles(registered_packed).index
    for batch in data.train_dataloader():
        rows = index.iloc[batch["index"]]
        names = rows["case"] + "/" + rows["x"].astype(str) + "/" + rows["y"].astype(str)
        together = batch["place"][:, None] == batch["place"]
        assert (together.numpy() == (names.to_numpy()[:, None] == names.to_numpy())).all()
        named = (rows["stain"] + rows["scanner"]).to_numpy()
        assert ((batch["condition"][:, None] == batch["condition"]).numpy() == (named[:, None] == named)).all()
        assert together.sum() == 16
        assert batch["views"]["clean"].shape == (8, 3, 32, 32)


def test_a_tile_has_the_targets_of_its_reference_and_is_turned_like_it(
    registered_packed: Path, tiny_teacher: Path, tmp_path: Path
) -> None:
    source, out = PackedTiles(registered_packed), tmp_path / "targets"
    write_targets(build_teacher(TeacherSpec(str(tiny_teacher))), source, out, TargetSpec("patches", None, "fp32"))
    data = TileDataModule(
        str(registered_packed), batch_size=8, workers=0, geometry=Geometry(32), val_fraction=0.0,
        targets={"t": str(out)}, registered=RegisteredSpec(reference=("HE", "S45")),
    )  # fmt: skip
    index, store = source.index, TargetStore(out)
    turned = 0
    for batch in data.train_dataloader():
        for number, row in enumerate(batch["index"]):
            tile = index.iloc[row]
            same = (index["case"] == tile["case"]) & (index["x"] == tile["x"]) & (index["y"] == tile["y"])
            reference = int(np.flatnonzero(same & (index["stain"] == "HE") & (index["scanner"] == "S45"))[0])
            for name, wanted in store.read(reference).items():
                np.testing.assert_array_equal(batch["targets"]["t"][name][number].numpy(), wanted)
            picture = whole_tile(source.read(row), 32, orientation(index["key"][reference]))
            np.testing.assert_array_equal(batch["views"]["clean"][number].permute(1, 2, 0).numpy(), picture)
            turned += row != reference and orientation(index["key"][reference]) != orientation(index["key"][row])
    assert turned > 10
    alone = TileDataModule(
        str(registered_packed), 8, geometry=Geometry(32), registered=RegisteredSpec(reference=("HE", "S45"))
    )
    with pytest.raises(ValueError, match="must be stored: run `pathokd cache`"):
        alone.train_dataloader()


def test_conditions_too_small_for_a_batch_are_told() -> None:
    """They were never trained on, without a word."""
    place = np.concatenate([np.arange(20), np.arange(20), np.arange(3)])
    condition = np.repeat([0, 1, 2], [20, 20, 3])
    with pytest.warns(UserWarning, match=r"^3 of the 43 registered tiles never come: .* fewer than the 4 places"):
        sampler = PlaceBatchSampler(Registered(place, condition), 8)
    assert {int(condition[draw.position]) for batch in sampler for draw in batch} == {0, 1}
    PlaceBatchSampler(Registered(place, condition), 6)  # three places each: all come
