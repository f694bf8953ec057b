"""Threads ahead of the model: order, bounds and errors."""

import os
import sys
import threading

import pytest

from pathokd.embed.reading import AHEAD_BATCHES, NICENESS, read_batches


def test_batches_keep_order() -> None:
    got = list(read_batches(lambda i: i * i, range(10), batch_size=4, workers=3))
    assert [len(batch) for batch in got] == [4, 4, 2]
    assert [pair for batch in got for pair in batch] == [(i, i * i) for i in range(10)]


def test_no_rows_no_batches() -> None:
    assert list(read_batches(lambda i: i, [], batch_size=4, workers=1)) == []


def test_reading_stays_a_few_batches_ahead() -> None:
    started = []
    batches = read_batches(lambda i: started.append(i), range(1000), batch_size=2, workers=2)
    next(batches)
    assert len(started) <= AHEAD_BATCHES * 2 + 2
    batches.close()
    assert not [t for t in threading.enumerate() if t.name.startswith("tiles")]


def test_an_error_surfaces_and_threads_end() -> None:
    def read(row: int) -> int:
        if row == 3:
            raise OSError("row 3 is damaged")
        return row

    with pytest.raises(OSError, match="row 3"):
        list(read_batches(read, range(100), batch_size=2, workers=2))
    assert not [t for t in threading.enumerate() if t.name.startswith("tiles")]


def test_arguments_are_checked() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        list(read_batches(lambda i: i, [1], batch_size=1, workers=0))


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has a niceness for threads")
def test_reading_gives_way_to_the_model() -> None:
    own = os.getpriority(os.PRIO_PROCESS, threading.get_native_id())
    reading = read_batches(
        lambda row: os.getpriority(os.PRIO_PROCESS, threading.get_native_id()), range(3), batch_size=3, workers=2
    )
    assert {nice for _, nice in next(reading)} == {max(own, NICENESS)}
    assert os.getpriority(os.PRIO_PROCESS, threading.get_native_id()) == own
