from __future__ import annotations

from datetime import datetime, timezone
from decimal import Decimal
from time import time
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from kq import errors
from kq.backend import QueueSpec
from kq.backends import rabbitmq_topology as topology
from kq.backends.rabbitmq_topology import (
    BUCKETS,
    bucket_for,
    due_in,
    legible_table,
    queue_arguments,
    read_count,
)

YEAR = 365 * 86400.0
#: Rounding a delay up to whole milliseconds costs at most this.
ROUNDING = 0.002
DELAYS = st.one_of(
    st.floats(0.01, YEAR), st.floats(0.01, 100.0), st.floats(-2.0, 7.49).map(lambda power: min(10.0**power, YEAR))
)
#: Delays that need as many steps as there can be: each rest falls just short of the next bucket.
WORST = (73.861, 373.861, 1873.861, 7873.861, 37873.861, 187873.861, 787873.861, 3787873.861, 18787873.861)


def walk(delay: float) -> list[tuple[float, float]]:
    """The steps of a delay: what remained before each, and how long it took."""
    steps: list[tuple[float, float]] = []
    remaining = delay
    while remaining > 0 and len(steps) < 100:
        step = bucket_for(remaining) / 1000
        steps.append((remaining, step))
        remaining -= step
    return steps


@given(DELAYS)
@example(0.01)
@example(YEAR)
@example(WORST[-1])
def test_a_delay_is_kept_to_within_a_quarter_second(delay: float) -> None:
    """All steps together are never shorter than the delay, and at most 250 ms longer."""
    total = sum(step for _, step in walk(delay))
    assert delay - 1e-6 <= total <= delay + 0.25 + ROUNDING


@given(DELAYS)
def test_short_delays_are_kept_more_exactly(delay: float) -> None:
    """All steps together are at most 2 % too long, or 10 ms where that is more."""
    assert sum(step for _, step in walk(delay)) <= delay + max(0.01, 0.02 * delay) + ROUNDING


@given(DELAYS)
@example(YEAR)
def test_no_step_is_longer_than_what_remains(delay: float) -> None:
    """Each step fits what remains, but for the tolerance."""
    for remaining, step in walk(delay):
        assert step <= remaining + min(0.25, max(0.01, 0.02 * remaining)) + ROUNDING


@given(DELAYS)
@example(YEAR)
@example(WORST[0])
@example(WORST[-1])
def test_a_delay_takes_few_steps(delay: float) -> None:
    """Up to 365 days a message is sent on at most 14 times."""
    assert len(walk(delay)) <= 14


@pytest.mark.parametrize("milliseconds", BUCKETS)
def test_a_round_delay_is_one_step(milliseconds: int) -> None:
    """A delay that has a bucket waits once, in it or in one that is hardly longer."""
    ((_, step),) = walk(milliseconds / 1000)
    assert 0 <= step * 1000 - milliseconds <= 10


def test_buckets_are_few_and_ordered() -> None:
    """Buckets go from 10 ms to nearly a year, each longer than the one before."""
    assert list(BUCKETS) == sorted(set(BUCKETS))
    assert BUCKETS[0] == 10
    assert BUCKETS[-1] <= YEAR * 1000
    assert len(BUCKETS) < 100


@given(st.floats(-1e6, 1e9))
def test_every_remainder_has_a_bucket(remaining: float) -> None:
    """Whatever remains, past or far ahead, the answer is a bucket that exists."""
    assert bucket_for(remaining) in BUCKETS


def test_bucket_arguments() -> None:
    """A bucket sends back through the default exchange what has waited, with nothing lost on the way."""
    assert topology.bucket_name(1500) == "kq.delay.1500"
    assert topology.bucket_arguments(1500) == {
        "x-queue-type": "quorum",
        "x-message-ttl": 1500,
        "x-dead-letter-exchange": "",
        "x-dead-letter-strategy": "at-least-once",
        "x-overflow": "reject-publish",
    }


QUORUM = {
    "x-queue-type": "quorum",
    "x-delivery-limit": 10**9,
    "x-dead-letter-exchange": "app:a.dead",
    "x-dead-letter-strategy": "at-least-once",
    "x-overflow": "reject-publish",
}
CLASSIC = {"x-queue-type": "classic", "x-dead-letter-exchange": "app:a.dead"}


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({}, QUORUM),
        ({"max_length": 5}, {**QUORUM, "x-max-length": 5}),
        ({"max_priority": 9}, {**CLASSIC, "x-max-priority": 9}),
        (
            {"max_priority": 9, "max_length": 5},
            {**CLASSIC, "x-max-priority": 9, "x-max-length": 5, "x-overflow": "reject-publish"},
        ),
        ({"options": {"amqp": {"queue_type": "classic"}}}, CLASSIC),
        ({"options": {"amqp": {"queue_type": "quorum"}}}, QUORUM),
        ({"options": {"amqp": {"arguments": {"x-delivery-limit": 5}}}}, {**QUORUM, "x-delivery-limit": 5}),
        ({"options": {"redis": {"anything": 1}}}, QUORUM),
        ({"dead_letter": None}, {"x-queue-type": "quorum", "x-delivery-limit": 10**9}),
    ],
)
def test_queue_arguments(values: dict[str, Any], expected: dict[str, Any]) -> None:
    """Quorum with at-least-once dead-lettering by default, classic where priorities are asked for."""
    queue = QueueSpec("app:a", **{"dead_letter": "app:a.dead", **values})
    assert queue_arguments(queue) == expected
    assert topology.is_classic(queue) is (expected["x-queue-type"] == "classic")


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (
            {"options": {"amqp": {"queue_typ": 1}}},
            "unknown option 'queue_typ' for amqp; expected arguments, queue_type",
        ),
        ({"options": {"amqp": {"queue_type": "stream"}}}, "queue_type: expected quorum or classic, got 'stream'"),
        (
            {"options": {"amqp": {"queue_type": ["quorum"]}}},
            r"queue_type: expected quorum or classic, got \['quorum'\]",
        ),
        ({"options": {"amqp": {"arguments": 5}}}, "arguments: expected a mapping, got 5"),
        ({"options": {"amqp": {"queue_type": "quorum"}}, "max_priority": 9}, "a quorum queue has no priorities"),
    ],
)
def test_bad_queue_options(values: dict[str, Any], expected: str) -> None:
    """Options that RabbitMQ would not understand, or that exclude each other, are Invalid and name the queue."""
    with pytest.raises(errors.Invalid, match=f"queue app:a: .*{expected}"):
        queue_arguments(QueueSpec("app:a", **values))


@pytest.mark.parametrize(("value", "count"), [(0, 0), (5, 5), (999_999, 999_999)])
def test_counts_are_read(value: int, count: int) -> None:
    """A counter in the headers is read."""
    assert read_count({"x_attempts": value}, "x_attempts") == count


@pytest.mark.parametrize("value", [None, -1, 10**6, 2**63, "5", 5.0, True, [5]])
def test_counts_that_make_no_sense_are_zero(value: Any) -> None:
    """A counter that is missing, of another type or out of range counts as zero."""
    assert read_count({"x_attempts": value}, "x_attempts") == 0
    assert read_count({}, "x_attempts") == 0


@pytest.mark.parametrize("ahead", [0.5, 60, YEAR - 60, -60])
def test_due_in_counts_down(ahead: float) -> None:
    """A message is due when its time has come, and until then the rest is told."""
    assert due_in({"x_due_at": time() + ahead}) == pytest.approx(ahead, abs=5)
    assert (due_in({"x_due_at": time() + ahead}) <= 0) is (ahead < 0)


@pytest.mark.parametrize("at", [None, "soon", True, [1], float("nan"), float("inf"), float("-inf"), 1e300, 2**63 - 1])
def test_a_due_time_that_makes_no_sense_is_now(at: Any) -> None:
    """A due time that is none, or beyond every delay, does not hold a message back."""
    assert due_in({"x_due_at": at}) <= 0
    assert due_in({}) <= 0


def test_headers_are_what_a_handler_gets() -> None:
    """Times and decimals of AMQP's tables are text in a handler, and so they are wherever headers are shown."""
    table = {
        "t": datetime(2026, 1, 2, 3, 4, 5, tzinfo=timezone.utc),
        "d": Decimal("1.5"),
        "deep": {"b": b"\xff", "l": [Decimal(2)]},
        "n": 1,
    }
    expected = {"t": "2026-01-02T03:04:05+00:00", "d": "1.5", "deep": {"b": "\\xff", "l": ["2"]}, "n": 1}
    assert legible_table(table) == expected
