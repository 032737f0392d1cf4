"""Whether a failed attempt is tried again, and when: decisions as values, no I/O.

Retry is not middleware and cannot be removed: the executor asks `after_failure` and `after_crash`,
and the supervisor carries out what they say.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import msgspec

from kq import errors, limit
from kq.outcome import CRASH_LOOP, MAX_ATTEMPTS, NOT_RETRYABLE, Failure, Outcome

#: What a backoff may grow by; far beyond it one step passes every maximum.
_MAX_FACTOR: Final = 1e9


class Retry(Exception):
    """Raise it in a handler to have the message delivered again later.

    Args:
        delay: Seconds or ``timedelta`` until then; None takes the queue's backoff.
        count: Whether this run is charged as an attempt. An uncharged retry never ends in the
            dead-letter queue, so give it an end of your own.

    Raises:
        Invalid: If ``delay`` is no duration from 0 to 365 days.
    """

    def __init__(self, delay: Any = None, *, count: bool = True) -> None:
        super().__init__("retry" if delay is None else f"retry in {delay}")
        self.delay = None if delay is None else limit.seconds("delay", delay)
        self.count = count


@dataclass(frozen=True, slots=True)
class Backoff:
    """How long to wait between attempts: exponential, with jitter.

    The wait after attempt n is ``initial * factor ** (n - 1)`` seconds, at most ``max``. With full jitter
    (https://aws.amazon.com/blogs/architecture/exponential-backoff-and-jitter/) it is drawn evenly from
    zero to that, so that messages which failed together do not return together.

    Attributes:
        initial: Seconds after the first attempt.
        factor: Growth per attempt, at least 1.
        max: Seconds that no wait exceeds before jitter.
        jitter: ``"full"``, ``"none"`` or a fraction such as 0.2 for plus or minus 20 %.
    """

    initial: float = 1.0
    factor: float = 2.0
    max: float = 600.0
    jitter: str | float = "full"

    def __post_init__(self) -> None:
        object.__setattr__(self, "initial", limit.seconds("retry.initial", self.initial))
        object.__setattr__(self, "max", limit.seconds("retry.max", self.max))
        number = isinstance(self.factor, (int, float)) and not isinstance(self.factor, bool)
        if not (number and 1 <= self.factor <= _MAX_FACTOR):
            raise errors.Invalid(f"retry.factor: expected a number from 1 to {_MAX_FACTOR:g}, got {self.factor!r}")
        # As a float: powers of integers grow without end.
        object.__setattr__(self, "factor", float(self.factor))
        fraction = isinstance(self.jitter, (int, float)) and not isinstance(self.jitter, bool)
        if not (self.jitter in ("full", "none") or (fraction and 0 <= self.jitter <= 1)):  # type: ignore[operator]
            raise errors.Invalid(
                f'retry.jitter: expected "full", "none" or a fraction from 0 to 1, got {self.jitter!r}'
            )

    def delay(self, attempt: int, draw: Callable[[], float] = random.random) -> float:
        """Return the seconds to wait after ``attempt`` (from 1).

        Args:
            attempt: The attempt that failed.
            draw: Returns a number from 0 to 1.
        """
        try:
            wait = min(self.initial * self.factor ** max(0, attempt - 1), self.max)
        except OverflowError:
            wait = self.max if self.initial else 0.0
        if self.jitter == "full":
            return wait * draw()
        if self.jitter == "none":
            return wait
        return min(wait * (1 + float(self.jitter) * (2 * draw() - 1)), limit.MAX_DELAY)


class RetryPolicy(msgspec.Struct, frozen=True):
    """When a message has had enough.

    Attributes:
        max_attempts: Runs of any end, the first included.
        max_crashes: Runs that took their process with them.
        backoff: The wait between attempts.
    """

    max_attempts: int = 5
    max_crashes: int = 3
    backoff: Backoff = Backoff()


def after_failure(
    failure: Failure, policy: RetryPolicy, *, attempts: int, crashes: int, delay: float | None = None
) -> Outcome:
    """Return what to do after an attempt that failed.

    Args:
        failure: What went wrong.
        policy: The queue's, or the consumer's own.
        attempts: Charged so far, this one included.
        crashes: Charged so far.
        delay: Seconds that the handler asked for instead of the backoff.
    """
    if not failure.retryable:
        return Outcome("dead", 0.0, attempts, crashes, NOT_RETRYABLE, failure)
    if attempts >= policy.max_attempts:
        return Outcome("dead", 0.0, attempts, crashes, MAX_ATTEMPTS, failure)
    wait = policy.backoff.delay(attempts) if delay is None else delay
    return Outcome("retry", wait, attempts, crashes, "", failure)


def after_crash(failure: Failure, policy: RetryPolicy, *, attempts: int, crashes: int) -> Outcome:
    """Return what to do after an attempt under which the process died.

    Args:
        failure: How it died.
        policy: The queue's, or the consumer's own.
        attempts: Charged so far, this one included.
        crashes: Charged so far, this one included.
    """
    if crashes >= policy.max_crashes:
        return Outcome("dead", 0.0, attempts, crashes, CRASH_LOOP, failure)
    return after_failure(failure, policy, attempts=attempts, crashes=crashes)
