"""The sampler's order is a function of seed, epoch and position."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pathokd.data.samplers import ResumableBatchSampler, epoch_order


def rows(sampler: ResumableBatchSampler) -> list[int]:
    return [draw.position for batch in sampler for draw in batch]


@given(n=st.integers(1, 200), seed=st.integers(0, 9), epoch=st.integers(0, 9))
def test_an_epoch_visits_every_tile_once(n: int, seed: int, epoch: int) -> None:
    assert sorted(epoch_order(n, seed=seed, epoch=epoch)) == list(range(n))


def test_epochs_and_seeds_differ_and_repeat() -> None:
    orders = {tuple(epoch_order(50, seed=seed, epoch=epoch)) for seed in range(3) for epoch in range(3)}
    assert len(orders) == 9
    assert tuple(epoch_order(50, seed=1, epoch=2)) in orders


@given(n=st.integers(1, 100), batch=st.integers(1, 7), world=st.integers(1, 4))
def test_ranks_share_an_epoch_without_overlap(n: int, batch: int, world: int) -> None:
    ranks = [ResumableBatchSampler(n, batch, rank=rank, world_size=world) for rank in range(world)]
    seen = [row for sampler in ranks for row in rows(sampler)]
    assert len(seen) == len(set(seen)) == (n // (batch * world)) * batch * world
    assert len({len(list(sampler)) for sampler in ranks}) == 1
    assert all(len(list(sampler)) == len(sampler) for sampler in ranks)


@given(n=st.integers(1, 60), batch=st.integers(1, 7))
def test_without_drop_last_nothing_is_left_out(n: int, batch: int) -> None:
    sampler = ResumableBatchSampler(n, batch, drop_last=False, shuffle=False)
    assert rows(sampler) == list(range(n))
    assert len(list(sampler)) == len(sampler)


@given(n=st.integers(1, 60), batch=st.integers(1, 7), world=st.integers(2, 4))
def test_ranks_share_the_validation_tiles_and_none_runs_out_of_batches(n: int, batch: int, world: int) -> None:
    n = max(n, world)
    options = {"drop_last": False, "shuffle": False, "world_size": world}
    ranks = [ResumableBatchSampler(n, batch, rank=rank, **options) for rank in range(world)]  # type: ignore[arg-type]
    assert sorted(row for sampler in ranks for row in rows(sampler)) == list(range(n))
    assert [rows(sampler)[:1] for sampler in ranks] == [[rank] for rank in range(world)]
    batches = [[len(drawn) for drawn in sampler] for sampler in ranks]
    assert {len(sizes) for sizes in batches} == {len(ranks[0])}
    assert all(1 <= size <= batch + 1 for sizes in batches for size in sizes)


@pytest.mark.parametrize("done", [0, 3, 9, 10])
def test_resuming_continues_exactly(done: int) -> None:
    whole = ResumableBatchSampler(40, 4, seed=3)
    expected = []
    for epoch in range(2):
        whole.set_epoch(epoch)
        expected += list(whole)
    first = ResumableBatchSampler(40, 4, seed=3)
    first.done = done
    second = ResumableBatchSampler(40, 4, seed=3)
    second.load_state_dict(first.state_dict())
    assert len(second) == 10
    rest = list(second)
    if second.epoch == 0:
        second.set_epoch(1)
        rest += list(second)
    assert rest == expected[done:]


def test_set_epoch_inside_the_epoch_keeps_the_place() -> None:
    sampler = ResumableBatchSampler(40, 4)
    sampler.load_state_dict({**sampler.state_dict(), "epoch": 2, "done": 5})
    sampler.set_epoch(2)
    assert len(list(sampler)) == 5
    sampler.set_epoch(3)
    assert len(list(sampler)) == 10


@pytest.mark.parametrize("name", ["n", "batch_size", "seed", "world_size"])
def test_a_state_of_another_run_is_refused_by_name(name: str) -> None:
    sampler = ResumableBatchSampler(40, 4)
    with pytest.raises(ValueError, match=name):
        sampler.load_state_dict({**sampler.state_dict(), name: 77})


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"batch_size": 0}, "batch_size"),
        ({"rank": 2, "world_size": 2}, "rank"),
        ({"drop_last": False, "world_size": 11}, "drop_last"),
    ],
)
def test_impossible_settings_are_refused(wrong: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ResumableBatchSampler(10, **{"batch_size": 2, **wrong})
