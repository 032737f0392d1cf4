from __future__ import annotations

import os
from collections.abc import Callable, Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kq.worker.slot import UNSENT_MAX, Running, SlotTable

Make = Callable[..., SlotTable]


@pytest.fixture
def make() -> Iterator[Make]:
    """Makes tables, and closes them."""
    tables: list[SlotTable] = []

    def table(count: int, fd: int | None = None) -> SlotTable:
        tables.append(SlotTable(count, fd))
        return tables[-1]

    yield table
    for one in tables:
        one.close()


def test_a_new_table_is_empty(make: Make) -> None:
    """Nothing runs and nothing waits in a new table."""
    table = make(4)
    assert (table.count, table.running(), table.unsent()) == (4, [], [])


def test_running_handlers_are_seen(make: Make) -> None:
    """What has started and not ended is seen, with its start."""
    table = make(3)
    table.enter(0, 7, 1.5)
    table.enter(2, 2**64 - 1, 2.5)
    assert table.running() == [Running(7, 1.5), Running(2**64 - 1, 2.5)]
    table.leave(0)
    assert table.running() == [Running(2**64 - 1, 2.5)]
    table.enter(2, 8, 3.5)
    assert table.running() == [Running(8, 3.5)]


def test_the_other_side_sees_the_same(make: Make) -> None:
    """A second table on the same file shows what the first one writes."""
    child = make(2)
    parent = make(2, os.dup(child.fd))
    child.enter(1, 5, 0.5)
    child.add_unsent(0, 4)
    assert parent.running() == [Running(5, 0.5)]
    assert parent.unsent() == [4]


def test_the_file_outlives_its_writer(make: Make) -> None:
    """What a process wrote can be read when it is gone."""
    writer = SlotTable(1)
    reader = make(1, os.dup(writer.fd))
    writer.enter(0, 9, 1.0)
    writer.close()
    assert reader.running() == [Running(9, 1.0)]


def test_unsent_results_are_counted(make: Make) -> None:
    """Tags of done jobs are kept in order until their results are sent."""
    table = make(2)
    table.enter(0, 1, 1.0)
    for index, tag in enumerate([11, 12, 13]):
        table.add_unsent(index, tag)
    assert table.unsent() == [11, 12, 13]
    table.clear_unsent()
    assert table.unsent() == []
    table.add_unsent(0, 14)
    assert table.unsent() == [14]
    assert table.running() == [Running(1, 1.0)]


def test_as_many_unsent_as_there_is_room(make: Make) -> None:
    """All places for unsent tags can be used, and they do not run into the slots."""
    table = make(3)
    for index in range(UNSENT_MAX):
        table.add_unsent(index, index + 1)
    for slot in range(3):
        table.enter(slot, 100 + slot, 1.0)
    assert table.unsent() == list(range(1, UNSENT_MAX + 1))
    assert [running.tag for running in table.running()] == [100, 101, 102]


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 2**64 - 1)), max_size=50))
def test_slots_are_independent(writes: list[tuple[int, int]]) -> None:
    """Each slot shows its last write; a tag of zero is nothing."""
    table, expected = SlotTable(5), [0] * 5
    for slot, tag in writes:
        table.enter(slot, tag, float(slot))
        expected[slot] = tag
    assert table.running() == [Running(tag, float(slot)) for slot, tag in enumerate(expected) if tag]
    table.close()


def test_a_strike_is_the_job_s(make: Make) -> None:
    """What has the slot next has not been struck, and may be given more time."""
    table = make(2)
    table.enter(1, 5, 1.0)
    table.strike(1, 5)
    assert table.running() == [Running(5, 1.0, True)]
    table.leave(1)
    table.enter(1, 6, 2.0)
    table.postpone(1, 0.5)
    assert table.running() == [Running(6, 2.5, False)]
    table.strike(1, 5)
    assert table.running() == [Running(6, 2.5, False)]
