"""What became of one delivery, as a value.

The executor decides, the supervisor settles; between them travels an `Outcome`, across a socket
if need be. Nothing here does I/O.
"""

from __future__ import annotations

import contextlib
import signal
from typing import Final, Literal

import msgspec

from kq import errors

Action = Literal["done", "retry", "dead", "release"]

# Why a message is in a dead-letter queue.
MAX_ATTEMPTS: Final = "max_attempts"
NOT_RETRYABLE: Final = "not_retryable"
CRASH_LOOP: Final = "crash_loop"
EXPIRED: Final = "expired"
UNDECODABLE: Final = "undecodable"
UNVERIFIED: Final = "unverified"
NO_HANDLER: Final = "no_handler"

#: Bytes of a traceback that a dead letter keeps, from its end.
MAX_TRACEBACK: Final = 4096
#: Bytes of an error message that a dead letter keeps.
MAX_MESSAGE: Final = 1024


class Death(msgspec.Struct, frozen=True, array_like=True):
    """How a process ended that ran a handler.

    Attributes:
        exit_code: What it exited with, or None where a signal killed it.
        exit_signal: The number of that signal, or None.
        peak_memory: Bytes of memory that it occupied at most; 0 where the system does not say.
    """

    exit_code: int | None = None
    exit_signal: int | None = None
    peak_memory: int = 0

    def __str__(self) -> str:
        if self.exit_signal is None and self.exit_code is None:
            return "ended, nobody knows how"
        if self.exit_signal is None:
            return f"exited with code {self.exit_code}"
        with contextlib.suppress(ValueError):
            return f"was killed by signal {self.exit_signal} ({signal.Signals(self.exit_signal).name})"
        return f"was killed by signal {self.exit_signal}"


class Failure(msgspec.Struct, frozen=True, array_like=True):
    """What went wrong in one attempt.

    Attributes:
        kind: An error kind of `kq.errors`.
        message: For people.
        retryable: Whether another attempt can help.
        traceback: Where; may be empty.
        death: How its process ended, where it did.
    """

    kind: str
    message: str
    retryable: bool
    traceback: str = ""
    death: Death | None = None


class Outcome(msgspec.Struct, frozen=True, array_like=True):
    """The end of one delivery.

    Attributes:
        action: ``done`` removes the message, ``retry`` returns it after ``delay``, ``dead`` moves it to
            the dead-letter queue, ``release`` puts it back where it was, uncharged.
        delay: Seconds, for ``retry``.
        attempts: Attempts charged so far, this one included, for ``retry`` and ``dead``.
        crashes: Crashes charged so far, likewise.
        reason: Why, for ``dead``.
        failure: What went wrong, where something did.
        deliveries: For ``release``, deliveries that nobody settled and that stay on the message's account.
    """

    action: Action
    delay: float = 0.0
    attempts: int = 0
    crashes: int = 0
    reason: str = ""
    failure: Failure | None = None
    deliveries: int = 0


DONE: Final = Outcome("done")
RELEASE: Final = Outcome("release")


def refused(reason: str, why: str, *, attempts: int, crashes: int) -> Outcome:
    """Return the end of a delivery that must not run, which is charged no attempt.

    Args:
        reason: For the dead letter, e.g. ``undecodable``.
        why: For people.
        attempts: Charged before.
        crashes: Likewise.
    """
    return Outcome("dead", 0.0, attempts, crashes, reason, Failure(errors.INVALID, clip(why, MAX_MESSAGE), False))


def given_up(deliveries: int, *, attempts: int, crashes: int) -> Outcome:
    """Return the end of a message that so many deliveries in a row have left unsettled."""
    text = f"{deliveries} workers in a row died or vanished while they held this message"
    return Outcome("dead", 0.0, attempts, crashes, CRASH_LOOP, Failure(errors.INTERNAL, text, False))


def clip(text: str, limit: int, *, end: bool = False) -> str:
    """Return at most ``limit`` bytes of ``text`` as valid UTF-8, from its start or its ``end``."""
    data = text.encode("utf-8", "replace")
    if len(data) <= limit:
        return data.decode()
    return (data[len(data) - limit :] if end else data[:limit]).decode("utf-8", "ignore")
