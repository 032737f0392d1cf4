from __future__ import annotations

import math
import sys
from datetime import datetime, timedelta, timezone, tzinfo
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kq import errors, limit

NOW = 1_700_000_000.0
NOW_AT = datetime.fromtimestamp(NOW, timezone.utc)
YEAR = 365 * 86400
LONG = "a" * 100


@pytest.mark.parametrize(
    "queue_id",
    ["app:emails", "a:b", "0:9", "A.b_c-d:E.f_g-h", f"{LONG}:{LONG}", "app:emails.dead", f"{LONG}:{LONG}.dead"],
)
def test_queue_id_accepts(queue_id: str) -> None:
    """A well-formed queue id is returned as it is; ``.dead`` comes on top of the length limit."""
    assert limit.queue_id(queue_id) == queue_id


@pytest.mark.parametrize(
    "queue_id",
    [
        "app", "app:", ":emails", "app:a:b", "app:a b", " app:a", "app:a\n", "_app:a", "app:-a", ".app:a", "app:.dead",
        "app:é", "app:a/b", "app:{a}", f"{LONG}a:b", f"a:{LONG}a", f"a:{LONG}a.dead", f"a:{LONG}.dead.dead",
        f"{LONG}.dead:b", None, 5, b"app:a", ["app:a"], 10**5000,
    ],
    ids=lambda value: type(value).__name__,
)  # fmt: skip
def test_queue_id_refuses(queue_id: Any) -> None:
    """Anything else is refused, with the form that was expected."""
    with pytest.raises(errors.Invalid, match=r'ill-formed queue id .*expected "namespace:name"'):
        limit.queue_id(queue_id)


def test_empty_queue_id_is_called_empty() -> None:
    """An empty queue id is refused in words of its own."""
    with pytest.raises(errors.Invalid, match='queue id is empty; expected "namespace:name"'):
        limit.queue_id("")


@given(st.text())
def test_queue_id_has_no_byte_with_a_meaning(text: str) -> None:
    """Whatever text is accepted consists of the few characters that no broker interprets."""
    try:
        limit.queue_id(text)
    except errors.Invalid:
        return
    assert text.isascii()
    assert text.count(":") == 1
    assert all(char.isalnum() or char in "._-:" for char in text)


@pytest.mark.parametrize("value", ["a", "a" * 128, "with space ~!", "0"])
def test_message_id_accepts(value: str) -> None:
    """1 to 128 printable ASCII characters are an id."""
    assert limit.message_id(value) == value


@pytest.mark.parametrize("value", ["", "a" * 129, "a\n", "\t", "é", "\x7f", None, 7, b"a", 10**5000], ids=type)
def test_message_id_refuses(value: Any) -> None:
    """Anything else is no id; the error says what is one."""
    with pytest.raises(errors.Invalid, match="message_id: expected 1 to 128 printable ASCII characters, got"):
        limit.message_id(value)


@pytest.mark.parametrize(
    ("value", "expected"),
    [(0, 0.0), (5, 5.0), (0.25, 0.25), (timedelta(minutes=2), 120.0), (YEAR, float(YEAR)), (timedelta(365), YEAR)],
)
def test_seconds_accepts(value: Any, expected: float) -> None:
    """Numbers and timedeltas from 0 to 365 days become float seconds."""
    found = limit.seconds("delay", value)
    assert found == expected
    assert type(found) is float


@pytest.mark.parametrize("value", ["5", None, True, [], b"5", 5j])
def test_seconds_refuses_other_types(value: Any) -> None:
    """What is no number is refused by the argument's name, and shown."""
    with pytest.raises(errors.Invalid, match="delay: expected seconds or a timedelta, got"):
        limit.seconds("delay", value)


@pytest.mark.parametrize(
    "value", [-1, -0.001, float("nan"), float("inf"), float("-inf"), timedelta(seconds=-1), -(10**5000)], ids=type
)
def test_seconds_refuses_negative_and_not_finite(value: Any) -> None:
    """A duration starts at zero and is finite."""
    with pytest.raises(errors.Invalid, match="delay: expected a number of seconds from 0, got"):
        limit.seconds("delay", value)


@pytest.mark.parametrize("value", [YEAR + 0.001, timedelta.max, 1e300, 10**400, 10**5000], ids=type)
def test_seconds_refuses_more_than_a_year(value: Any) -> None:
    """More than 365 days is refused, also where the number is too large for a float."""
    with pytest.raises(errors.Invalid, match=r"delay: expected at most 31,536,000 seconds, got"):
        limit.seconds("delay", value)


def test_seconds_takes_another_maximum() -> None:
    """The longest duration is the caller's to choose."""
    assert limit.seconds("timeout", 10, maximum=10) == 10.0
    with pytest.raises(errors.Invalid, match="timeout: expected at most 10 seconds, got 11"):
        limit.seconds("timeout", 11, maximum=10)
    assert limit.seconds("timeout", 10**400, maximum=math.inf) == sys.float_info.max


def test_long_values_are_shortened_in_errors() -> None:
    """An error does not repeat a megabyte of input."""
    with pytest.raises(errors.Invalid) as caught:
        limit.message_id("x" * 10**6)
    assert len(caught.value.message) < 300


def test_a_value_without_a_repr_is_refused_all_the_same() -> None:
    """A value whose repr fails is named by its type."""

    class Odd:
        def __repr__(self) -> str:
            raise RuntimeError("no")

    with pytest.raises(errors.Invalid, match="got a value of type Odd"):
        limit.seconds("delay", Odd())


def test_holding_time_defaults_to_none_at_all() -> None:
    """Without delay and at a message is not held back."""
    assert limit.holding_time(None, None, NOW) == 0.0


def test_holding_time_of_a_delay() -> None:
    """A delay is held as it is, as a number or a timedelta."""
    assert limit.holding_time(1.5, None, NOW) == 1.5
    assert limit.holding_time(timedelta(hours=1), None, NOW) == 3600.0


@pytest.mark.parametrize(
    "zone", [timezone.utc, timezone(timedelta(hours=5, minutes=30)), timezone(timedelta(hours=-8))]
)
def test_holding_time_of_a_moment(zone: tzinfo) -> None:
    """``at`` is held until that moment, whatever its zone."""
    at = (NOW_AT + timedelta(seconds=90)).astimezone(zone)
    assert limit.holding_time(None, at, NOW) == 90.0


@pytest.mark.parametrize(
    "at",
    [
        NOW_AT - timedelta(days=1),
        NOW_AT,
        datetime.min.replace(tzinfo=timezone.utc),
        datetime.min.replace(tzinfo=timezone(timedelta(hours=14))),
    ],
)
def test_a_moment_in_the_past_means_now(at: datetime) -> None:
    """``at`` in the past is no error, down to the first datetime there is."""
    assert limit.holding_time(None, at, NOW) == 0.0


@pytest.mark.parametrize(
    "at", [datetime.max.replace(tzinfo=timezone.utc), datetime.max.replace(tzinfo=timezone(timedelta(hours=-14)))]
)
def test_a_moment_too_far_ahead_is_invalid(at: datetime) -> None:
    """``at`` beyond 365 days is refused, up to the last datetime there is."""
    with pytest.raises(errors.Invalid, match="at: expected at most"):
        limit.holding_time(None, at, NOW)


def test_delay_and_at_exclude_each_other() -> None:
    """Both at once are refused, even a delay of zero."""
    with pytest.raises(errors.Invalid, match="delay and at: expected one of the two, got both"):
        limit.holding_time(0, NOW_AT, NOW)


def test_naive_datetime_is_refused() -> None:
    """A datetime without a zone is refused, and the error says how to give it one."""
    with pytest.raises(errors.Invalid, match=r"expected an aware datetime, got the naive 2030-01-02.*timezone\.utc"):
        limit.holding_time(None, datetime(2030, 1, 2), NOW)  # noqa: DTZ001


@pytest.mark.parametrize("at", [5, "2030-01-01", timedelta(1)])
def test_at_must_be_a_datetime(at: Any) -> None:
    """Anything but a datetime is refused by name."""
    with pytest.raises(errors.Invalid, match="at: expected an aware datetime, got"):
        limit.holding_time(None, at, NOW)


def test_body_size_counts_from_the_limit() -> None:
    """A body of exactly the limit passes, one byte more does not; the error has both numbers."""
    limit.body_size(b"x" * 1024, 1024)
    with pytest.raises(errors.Invalid, match=r"too large: the encoded body has 1,025 bytes, the limit is 1,024"):
        limit.body_size(b"x" * 1025, 1024)


def test_limits_are_those_of_the_wire_format() -> None:
    """The numbers that other programs rely on."""
    assert (limit.MAX_BODY, limit.MAX_BODY_CEILING, limit.MAX_DELAY, limit.MAX_NESTING) == (2**20, 2**23, YEAR, 64)
