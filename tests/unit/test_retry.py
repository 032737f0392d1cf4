from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

import kq
from kq import errors
from kq.outcome import Failure, Outcome
from kq.retry import Backoff, Retry, RetryPolicy, after_crash, after_failure

AGAIN = Failure("INTERNAL", "no", True)
NEVER = Failure("INVALID", "no", False)
EXACT = RetryPolicy(max_attempts=3, max_crashes=2, backoff=Backoff(jitter="none"))


def test_backoff_defaults() -> None:
    """The documented defaults: 1 s, doubled, at most 10 minutes, full jitter; 5 attempts, 3 crashes."""
    assert kq.Backoff() == Backoff(initial=1.0, factor=2.0, max=600.0, jitter="full")
    assert RetryPolicy() == RetryPolicy(max_attempts=5, max_crashes=3, backoff=Backoff())


@pytest.mark.parametrize(("attempt", "wait"), [(1, 1.0), (2, 2.0), (3, 4.0), (10, 512.0), (11, 600.0), (10**6, 600.0)])
def test_backoff_grows_up_to_its_maximum(attempt: int, wait: float) -> None:
    """The wait doubles after each attempt and stays at the maximum."""
    assert Backoff(jitter="none").delay(attempt) == wait


@pytest.mark.parametrize(("draw", "wait"), [(0.0, 0.0), (0.5, 2.0), (1.0, 4.0)])
def test_full_jitter_is_drawn_from_zero(draw: float, wait: float) -> None:
    """Full jitter lies between nothing and the whole wait."""
    assert Backoff().delay(3, lambda: draw) == wait


@pytest.mark.parametrize(("draw", "wait"), [(0.0, 3.2), (0.5, 4.0), (1.0, 4.8)])
def test_fractional_jitter_is_around_the_wait(draw: float, wait: float) -> None:
    """A fraction of 0.2 means plus or minus 20 percent."""
    assert Backoff(jitter=0.2).delay(3, lambda: draw) == pytest.approx(wait)


@given(
    st.floats(0, 365 * 86400), st.one_of(st.floats(1, 1e9), st.integers(1, 10**9)), st.floats(0, 365 * 86400),
    st.sampled_from(["full", "none", 0, 1, 0.5]), st.integers(1, 10**6), st.floats(0, 1),
)  # fmt: skip
@example(0.0, 2.0, 600.0, "none", 10**6, 0.5)
@example(0.0, 1e9, 600.0, "full", 2000, 1.0)
@example(1.0, 10**9, 600.0, "none", 10**6, 0.5)
def test_backoff_is_always_a_delay(
    initial: float, factor: float, most: float, jitter: str | float, attempt: int, draw: float
) -> None:
    """Whatever the backoff, the wait can be published: from 0 to 365 days, and 0 where it starts at 0."""
    wait = Backoff(initial, factor, most, jitter).delay(attempt, lambda: draw)
    assert 0 <= wait <= 365 * 86400
    assert wait <= most * 2
    if initial == 0:
        assert wait == 0


def test_backoff_takes_timedeltas() -> None:
    """Durations may be timedeltas."""
    backoff = Backoff(initial=timedelta(seconds=2), max=timedelta(minutes=1))  # type: ignore[arg-type]
    assert (backoff.initial, backoff.max) == (2.0, 60.0)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"initial": -1}, r"retry\.initial: expected a number of seconds from 0, got -1"),
        ({"initial": "1"}, r"retry\.initial: expected seconds or a timedelta, got '1'"),
        ({"max": float("inf")}, r"retry\.max: expected a number of seconds from 0, got inf"),
        ({"max": 366 * 86400}, r"retry\.max: expected at most"),
        ({"factor": 0.5}, r"retry\.factor: expected a number from 1.*got 0\.5"),
        ({"factor": float("nan")}, r"retry\.factor: expected a number from 1.*got nan"),
        ({"factor": float("inf")}, r"retry\.factor: expected a number from 1.*got inf"),
        ({"factor": True}, r"retry\.factor: expected a number from 1.*got True"),
        ({"factor": "2"}, r"retry\.factor: expected a number from 1.*got '2'"),
        ({"jitter": "half"}, r"retry\.jitter: expected \"full\", \"none\" or a fraction from 0 to 1, got 'half'"),
        ({"jitter": 1.1}, r"retry\.jitter: expected .*, got 1\.1"),
        ({"jitter": -0.1}, r"retry\.jitter: expected .*, got -0\.1"),
        ({"jitter": True}, r"retry\.jitter: expected .*, got True"),
        ({"jitter": None}, r"retry\.jitter: expected .*, got None"),
        ({"jitter": float("nan")}, r"retry\.jitter: expected .*, got nan"),
        ({"jitter": 10**400}, r"retry\.jitter: expected .*, got 1000"),
        ({"jitter": ["full"]}, r"retry\.jitter: expected .*, got \['full'\]"),
    ],
)
def test_backoff_refuses(arguments: dict[str, Any], expected: str) -> None:
    """A value that makes no sense is Invalid, by name, with what was expected and what was got."""
    with pytest.raises(errors.Invalid, match=expected):
        Backoff(**arguments)


@pytest.mark.parametrize(("delay", "seconds"), [(None, None), (0, 0.0), (5, 5.0), (timedelta(minutes=1), 60.0)])
def test_retry_takes_a_delay(delay: Any, seconds: float | None) -> None:
    """``kq.Retry`` has a delay in seconds, or none, and is charged unless told otherwise."""
    retry = Retry(delay)
    assert (retry.delay, retry.count) == (seconds, True)
    assert Retry(delay, count=False).count is False


@pytest.mark.parametrize("delay", [-1, "5", float("nan"), 366 * 86400])
def test_retry_refuses_what_is_no_delay(delay: Any) -> None:
    """A delay that could not be published is Invalid where it is raised."""
    with pytest.raises(errors.Invalid, match="delay: expected"):
        Retry(delay)


@pytest.mark.parametrize(("attempts", "wait"), [(1, 1.0), (2, 2.0)])
def test_failure_is_retried_after_the_backoff(attempts: int, wait: float) -> None:
    """Before the last attempt a retryable failure goes back, with the counters as they are."""
    found = after_failure(AGAIN, EXACT, attempts=attempts, crashes=1)
    assert found == Outcome("retry", wait, attempts, 1, "", AGAIN)


@pytest.mark.parametrize("attempts", [3, 4])
def test_last_attempt_is_dead(attempts: int) -> None:
    """Once ``max_attempts`` attempts have run, the message is dead for that reason."""
    found = after_failure(AGAIN, EXACT, attempts=attempts, crashes=0)
    assert found == Outcome("dead", 0.0, attempts, 0, "max_attempts", AGAIN)


@pytest.mark.parametrize("attempts", [1, 3])
def test_not_retryable_is_dead_at_once(attempts: int) -> None:
    """A failure that a retry cannot help is dead at its first attempt, and says so at its last as well."""
    found = after_failure(NEVER, EXACT, attempts=attempts, crashes=0)
    assert found == Outcome("dead", 0.0, attempts, 0, "not_retryable", NEVER)


@pytest.mark.parametrize("delay", [0.0, 77.0])
def test_delay_replaces_the_backoff(delay: float) -> None:
    """The handler's own delay wins, zero included."""
    assert after_failure(AGAIN, EXACT, attempts=2, crashes=0, delay=delay).delay == delay


def test_delay_does_not_prolong_life() -> None:
    """After the last attempt a delay changes nothing."""
    assert after_failure(AGAIN, EXACT, attempts=3, crashes=0, delay=5.0).reason == "max_attempts"


@pytest.mark.parametrize(
    ("attempts", "crashes", "action", "reason"),
    [
        (1, 1, "retry", ""),
        (2, 2, "dead", "crash_loop"),
        (3, 1, "dead", "max_attempts"),
        (3, 2, "dead", "crash_loop"),
        (2, 3, "dead", "crash_loop"),
    ],
)
def test_crashes_count_in_both(attempts: int, crashes: int, action: str, reason: str) -> None:
    """After ``max_crashes`` crashes it is a crash loop, after ``max_attempts`` of any kind it is that."""
    found = after_crash(AGAIN, EXACT, attempts=attempts, crashes=crashes)
    assert (found.action, found.reason, found.attempts, found.crashes) == (action, reason, attempts, crashes)
