from __future__ import annotations

import msgspec
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from kq import outcome
from kq.outcome import Failure, Outcome, clip


def test_words_for_dead_letters() -> None:
    """The reasons that other programs find in ``x_dead_letter_reason``."""
    assert [
        outcome.MAX_ATTEMPTS,
        outcome.NOT_RETRYABLE,
        outcome.CRASH_LOOP,
        outcome.EXPIRED,
        outcome.UNDECODABLE,
        outcome.UNVERIFIED,
        outcome.NO_HANDLER,
    ] == ["max_attempts", "not_retryable", "crash_loop", "expired", "undecodable", "unverified", "no_handler"]


@pytest.mark.parametrize(
    "value",
    [outcome.DONE, outcome.RELEASE, Outcome("dead", 0.0, 5, 3, "crash_loop", Failure("TIMEOUT", "m", True, "t"))],
)
def test_outcomes_cross_a_socket(value: Outcome) -> None:
    """An outcome is the same value after it has been sent."""
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(value), type=Outcome) == value


def test_outcomes_are_values() -> None:
    """An outcome cannot be changed."""
    with pytest.raises(AttributeError):
        outcome.DONE.delay = 5.0  # type: ignore[misc]


@pytest.mark.parametrize(
    ("text", "limit", "end", "expected"),
    [
        ("abc", 3, False, "abc"),
        ("abcd", 3, False, "abc"),
        ("abcd", 3, True, "bcd"),
        ("éé", 3, False, "é"),
        ("éé", 3, True, "é"),
        ("abc", 0, False, ""),
        ("abc", 0, True, ""),
        ("a\ud800b", 9, False, "a?b"),
        ("", 5, True, ""),
    ],
)
def test_clip(text: str, limit: int, end: bool, expected: str) -> None:
    """Text is cut to bytes, from either side, and never within a character."""
    assert clip(text, limit, end=end) == expected


@given(st.text(), st.integers(0, 40), st.booleans())
@example("\ud800" * 10, 5, True)
def test_clip_fits_and_is_utf8(text: str, limit: int, end: bool) -> None:
    """Whatever the text, the result is valid UTF-8 within the limit, and short of it by at most 3 bytes."""
    size = len(clip(text, limit, end=end).encode())
    assert min(len(text.encode("utf-8", "replace")), limit) - 3 <= size <= limit


def test_limits_of_dead_letters() -> None:
    """A dead letter keeps the last 4 KiB of a traceback."""
    assert outcome.MAX_TRACEBACK == 4096
