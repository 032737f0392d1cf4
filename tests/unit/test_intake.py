from __future__ import annotations

from collections.abc import Iterator, Mapping
from uuid import uuid4

import pytest

from kq.backend import Backend, Delivery
from kq.config import Settings
from kq.driver import Driver
from kq.fetcher import Fetcher
from kq.intake import Intake
from kq.queue_spec import default_spec
from kq.scheme import open_backend


@pytest.fixture
def backend() -> Iterator[Backend]:
    """A broker in memory."""
    found = open_backend(Settings(broker=f"memory://{uuid4().hex}"), "test")
    yield found
    found.close()


def make(backend: Backend, in_hand: Mapping[str, int], prefetch: int = 100) -> tuple[Intake, dict[str, Fetcher]]:
    """An intake of one fetcher for each queue, with deliveries in hand."""

    def ignore(deliveries: list[Delivery]) -> None: ...

    fetchers = {}
    for queue, count in in_hand.items():
        specs, driver = [default_spec(queue)], Driver("memory://")
        fetcher = Fetcher(backend, specs, driver=driver, prefetch=prefetch, lease=30, on_deliveries=ignore)
        fetcher.in_hand = count
        fetchers[queue] = fetcher
    return Intake(fetchers), fetchers


@pytest.mark.parametrize(
    ("wanted", "in_hand", "expected"),
    [
        (10, [0], [10]),
        (10, [0, 0], [10, 10]),
        (10, [3, 0], [10, 7]),
        (10, [10, 0], [10, 5]),
        (10, [5, 5], [5, 5]),
        (9, [9, 0, 0], [9, 3, 3]),
        (1, [1, 0], [1, 1]),
        (2, [1, 1, 1], [1, 1, 1]),
        (0, [5, 0], [0, 0]),
    ],
)
def test_the_window_is_shared(backend: Backend, wanted: int, in_hand: list[int], expected: list[int]) -> None:
    """Each may hold what the others leave, its equal share at least, one at least; and nothing if nothing is wanted."""
    intake, fetchers = make(backend, {f"app:q{number}": count for number, count in enumerate(in_hand)})
    intake.hold(wanted)
    assert [fetcher.target for fetcher in fetchers.values()] == expected


def test_what_waits_for_its_own_consumer_is_nobody_elses_share(backend: Backend) -> None:
    """Ninety-nine that wait here leave the other broker as much as if they were not there."""
    intake, fetchers = make(backend, {"app:a": 100, "app:b": 0})
    intake.hold(103, 99)
    assert [fetcher.target for fetcher in fetchers.values()] == [100, 3]


def test_no_fetcher_holds_more_than_the_prefetch(backend: Backend) -> None:
    """The prefetch bounds each fetcher, however much is wanted."""
    intake, fetchers = make(backend, {"app:a": 0, "app:b": 0}, prefetch=7)
    intake.hold(1000)
    assert [fetcher.target for fetcher in fetchers.values()] == [7, 7]


def test_what_is_finished_makes_room_where_it_came_from(backend: Backend) -> None:
    """The end of a delivery is told to the fetcher of its queue, and to no other."""
    intake, fetchers = make(backend, {"app:a": 3, "app:b": 3})
    intake.finished("app:a", 2)
    assert [fetcher.in_hand for fetcher in fetchers.values()] == [1, 3]
