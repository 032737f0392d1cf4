from __future__ import annotations

from typing import Any

import pytest

from kq.router import Consumer, limits
from kq.worker.round_robin import RoundRobin


def handle(payload: Any) -> None:
    """Does nothing."""


def consumers(*caps: int | None) -> list[Consumer]:
    """Consumers of one queue with these caps."""
    return [Consumer("app:a", f"c{number}", handle, concurrency=most) for number, most in enumerate(caps)]


def takes(turns: RoundRobin, count: int) -> list[int | None]:
    """Who gets the next messages."""
    return [turns.take() for _ in range(count)]


def test_consumers_take_turns() -> None:
    """Each message goes to the next consumer, and after the last comes the first."""
    assert takes(RoundRobin(consumers(None, None, None)), 7) == [0, 1, 2, 0, 1, 2, 0]


def test_a_single_consumer_gets_everything() -> None:
    """A queue with one consumer gives it every message, up to its cap."""
    assert takes(RoundRobin(consumers(None)), 3) == [0, 0, 0]
    assert takes(RoundRobin(consumers(2)), 3) == [0, 0, None]


def test_a_full_consumer_is_passed_over() -> None:
    """One that runs as many as it may gets nothing; the others do, in turn, until all are full."""
    assert takes(RoundRobin(consumers(1, 2, 3)), 7) == [0, 1, 2, 1, 2, 2, None]


def test_room_is_given_back() -> None:
    """A consumer whose run has ended gets the next message, and only that one has room."""
    turns = RoundRobin(consumers(1, 2))
    takes(turns, 3)
    turns.leave(1)
    assert takes(turns, 2) == [1, None]
    turns.leave(0)
    turns.leave(1)
    assert takes(turns, 3) == [0, 1, None]


def test_what_must_run_runs() -> None:
    """What was acknowledged beforehand goes to whoever has room, and to the next where nobody has."""
    turns = RoundRobin(consumers(1, 2))
    assert [turns.take_anyway() for _ in range(5)] == [0, 1, 1, 0, 1]
    turns.leave(0)
    assert turns.take() is None
    turns.leave(0)
    assert turns.take() == 0


@pytest.mark.parametrize(
    ("rules", "expected"),
    [
        ([{}], None),
        ([{"concurrency": 2}], 2),
        ([{"concurrency": 2, "prefetch": 5}], 5),
        ([{"concurrency": 2}, {"concurrency": 3, "prefetch": 7}], 9),
        ([{"concurrency": 2}, {}], None),
    ],
)
def test_a_worker_holds_what_the_consumers_of_a_queue_need(rules: list[dict[str, int]], expected: int | None) -> None:
    """The needs of a queue's consumers add up; one without bounds takes them off the queue."""
    competing = [Consumer("app:a", f"c{number}", handle, **each) for number, each in enumerate(rules)]  # type: ignore[arg-type]
    assert limits({"app:a": competing}).get("app:a") == expected
