from __future__ import annotations

from enum import Enum
from http import HTTPStatus
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kq import errors, header

VALUES = st.one_of(st.text(st.characters(codec="utf-8"), max_size=50), st.integers(-(2**63), 2**63 - 1), st.booleans(),
                   st.floats(allow_nan=False, allow_infinity=False))  # fmt: skip


@pytest.mark.parametrize("headers", [None, {}])
def test_no_headers(headers: Any) -> None:
    """No headers are no headers."""
    assert header.check(headers) == {}


@given(
    st.dictionaries(
        st.from_regex(r"[a-w][a-z.-]{0,20}", fullmatch=True).filter(lambda k: k not in ("task", "priority")),
        VALUES,
        max_size=20,
    )
)
def test_headers_travel_verbatim(headers: dict[str, Any]) -> None:
    """Strings, integers, floats and bools come back as they are, in a copy."""
    checked = header.check(headers)
    assert checked == headers
    assert [type(value) for value in checked.values()] == [type(value) for value in headers.values()]
    assert checked is not headers


@pytest.mark.parametrize("key", ["amqp.app_id", "redis.x", "sqs.group", "content_type", "encoding", "schema", "source",
                                 "é", "x-custom", "X_mine", "cc", "Task", "x-deaths"])  # fmt: skip
def test_keys_that_pass_through(key: str) -> None:
    """Driver-prefixed keys, descriptive keys and anything not reserved pass."""
    assert header.check({key: "v"}) == {key: "v"}


@pytest.mark.parametrize("key", ["x_", "x_kq", "x_attempts", "x_mine", "task", "CC", "BCC", "x-death", "x-delay",
                                 "x-delivery-count", "x-acquired-count", "x-first-death-queue", "x-first-death-",
                                 "x-last-death-reason", "x-last-death-\n"])  # fmt: skip
def test_reserved_keys_are_refused(key: str) -> None:
    """What is kq's own, and what a broker would obey or forge, is refused by name."""
    with pytest.raises(errors.Invalid, match="is reserved") as caught:
        header.check({key: "v"})
    assert repr(key) in caught.value.message


@pytest.mark.parametrize("headers", [[], [("a", 1)], "a", 0, 5, ""])
def test_headers_must_be_a_mapping(headers: Any) -> None:
    """Anything but a mapping is refused, also where it is empty."""
    with pytest.raises(errors.Invalid, match=f"headers: expected a mapping, got {type(headers).__name__}"):
        header.check(headers)


def test_empty_key_is_refused() -> None:
    """A key has at least one character."""
    with pytest.raises(errors.Invalid, match="headers: a key is empty"):
        header.check({"": "v"})


@pytest.mark.parametrize("key", [1, None, b"k", ("k",)])
def test_keys_are_strings(key: Any) -> None:
    """A key of another type is refused with its type."""
    with pytest.raises(errors.Invalid, match=f"expected string keys, got .* of type {type(key).__name__}"):
        header.check({key: "v"})


@pytest.mark.parametrize("value", [None, b"v", [1], {"a": 1}, 1j, object()], ids=type)
def test_values_of_other_types_are_refused(value: Any) -> None:
    """A value that cannot travel verbatim is refused by key and type."""
    with pytest.raises(
        errors.Invalid, match="'k': expected a string, integer, float or bool, got " + type(value).__name__
    ):
        header.check({"k": value})


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_floats_are_finite(value: float) -> None:
    """NaN and infinity are refused and shown."""
    with pytest.raises(errors.Invalid, match=r"'k': expected a finite number, got -?(nan|inf)"):
        header.check({"k": value})


@pytest.mark.parametrize("value", [2**63 - 1, -(2**63)])
def test_integers_of_64_bits_pass(value: int) -> None:
    """The largest and the smallest 64-bit integer pass."""
    assert header.check({"k": value}) == {"k": value}


@pytest.mark.parametrize("value", [2**63, -(2**63) - 1, 10**5000], ids=["above", "below", "huge"])
def test_integers_beyond_64_bits_are_refused(value: int) -> None:
    """An integer that AMQP cannot carry is refused by key."""
    with pytest.raises(errors.Invalid, match="'k': expected an integer of at most 64 bits"):
        header.check({"k": value})


@pytest.mark.parametrize("headers", [{"\ud800": "v"}, {"k": "a\udfffb"}])
def test_lone_surrogates_are_refused(headers: dict[str, Any]) -> None:
    """A lone surrogate is no text, neither in a key nor in a value."""
    with pytest.raises(errors.Invalid, match="lone surrogate"):
        header.check(headers)


def test_count_limit() -> None:
    """64 headers pass, 65 do not."""
    assert len(header.check({f"k{i}": i for i in range(64)})) == 64
    with pytest.raises(errors.Invalid, match="headers: expected at most 64, got 65"):
        header.check({f"k{i}": i for i in range(65)})


@pytest.mark.parametrize("char", ["k", "é"])
def test_key_limit_is_in_bytes(char: str) -> None:
    """A key has at most 128 bytes."""
    fits = char * (128 // len(char.encode()))
    assert header.check({fits: 1})
    with pytest.raises(errors.Invalid, match=r"expected keys of at most 128 bytes, got 1\d\d"):
        header.check({fits + char: 1})


@pytest.mark.parametrize("char", ["v", "é"])
def test_value_limit_is_in_bytes(char: str) -> None:
    """A value has at most 4 KiB."""
    fits = char * (4096 // len(char.encode()))
    assert header.check({"k": fits})
    with pytest.raises(errors.Invalid, match=r"'k': expected at most 4,096 bytes, got 4,09\d"):
        header.check({"k": fits + char})


def test_total_limit() -> None:
    """All keys and values together have at most 16 KiB."""
    exact = {"a": "v" * 4095, "b": "v" * 4095, "c": "v" * 4095, "d": "v" * 4095}
    assert header.check(exact) == exact
    with pytest.raises(errors.Invalid, match="headers: expected at most 16,384 bytes together, got 16,385"):
        header.check({**exact, "d": "v" * 4096})


@pytest.mark.parametrize(
    ("value", "level"), [("low", 1), ("normal", 4), ("high", 7), ("critical", 9), *((i, i) for i in range(10))]
)
def test_priorities(value: Any, level: int) -> None:
    """Names and levels mean the same level, and the header keeps what was given."""
    assert header.priority(value) == level
    assert header.check({"priority": value}) == {"priority": value}


@pytest.mark.parametrize("value", ["urgent", "HIGH", "", "5", -1, 10, 4.0, True])
def test_bad_priorities_are_refused(value: Any) -> None:
    """Anything else is refused, with the names that exist."""
    with pytest.raises(
        errors.Invalid, match="priority: expected an integer 0 to 9 or one of low, normal, high, critical; got"
    ):
        header.check({"priority": value})


def test_normal_is_the_default_priority() -> None:
    """A message that names no priority has level 4."""
    assert header.NORMAL == header.priority("normal") == 4


def test_mirrored_properties() -> None:
    """Three headers are also AMQP properties, as text; others are not."""
    given_headers: dict[str, header.Value] = {
        "correlation_id": "c",
        "reply_to": "app:r",
        "message_type": 7,
        "other": "o",
        "type": "t",
    }
    assert header.properties(given_headers) == {"correlation_id": "c", "reply_to": "app:r", "type": "7"}


def test_too_long_for_a_property_stays_a_header() -> None:
    """A value of more than 255 bytes is not mirrored."""
    assert header.properties({"correlation_id": "c" * 255}) == {"correlation_id": "c" * 255}
    assert header.properties({"correlation_id": "c" * 256, "reply_to": "é" * 128}) == {}


def test_values_are_those_that_travel() -> None:
    """An enum, or another type that derives from text or a number, becomes the plain value that policies see too."""

    class Level(str, Enum):
        HIGH = "high"

    class Odd(str):
        def __eq__(self, other: object) -> bool:
            return False

        __hash__ = str.__hash__

    class Ratio(float):
        pass

    values = {"priority": Level.HIGH, Odd("odd"): Odd("text"), "number": HTTPStatus.OK, "ratio": Ratio(0.5)}
    checked = header.check(values)
    assert checked == {"priority": "high", "odd": "text", "number": 200, "ratio": 0.5}
    assert [type(value) for value in checked.values()] == [str, str, int, float]
    assert {type(key) for key in checked} == {str}
