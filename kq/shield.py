"""Keeps a handler's time limit from striking inside kq's own work.

A handler that runs past its limit is stopped by an exception raised in its thread, wherever that is. In
the middle of a publish it would leave a lock held or a transaction open, for everybody. Such work runs
under a shield: the exception is raised where it ends.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from threading import Lock, local
from typing import Final


class HandlerTimeout(BaseException):
    """Raised in a handler's thread at its time limit; no ``except Exception`` swallows it."""


class Shield:
    """What a thread that runs handlers and its watchdog share. As a context manager it is the thread's alone.

    Attributes:
        lock: Held while either decides.
        depth: How many pieces of work the thread is in that must not be interrupted.
        is_due: Whether time was up meanwhile: then the outermost of them ends with the exception.
    """

    __slots__ = ("depth", "is_due", "lock")

    def __init__(self) -> None:
        self.lock = Lock()
        self.depth = 0
        self.is_due = False

    def __enter__(self) -> None:
        with self.lock:
            self.depth += 1

    def leave(self) -> None:
        """End a piece of work where nothing can be raised: what is due strikes at the end of the next one."""
        with self.lock:
            self.depth -= 1

    def __exit__(self, *exc: object) -> None:
        with self.lock:
            self.depth -= 1
            strikes = self.is_due and not self.depth
            if strikes:
                self.is_due = False
        if strikes:
            raise HandlerTimeout


class _Deferring:
    """Holds off a thread's time limit while a block runs, and has it strike at the end of the next shielded one."""

    __slots__ = ("_shield",)

    def __init__(self, shield: Shield) -> None:
        self._shield = shield

    def __enter__(self) -> None:
        self._shield.__enter__()

    def __exit__(self, *exc: object) -> None:
        self._shield.leave()


_mine = local()
_NONE: Final = nullcontext()


def carry(shield: Shield) -> None:
    """Make ``shield`` the one of the calling thread."""
    _mine.shield = shield


def shielding() -> Shield | None:
    """Return what holds off the time limit of the handler that runs in this thread; None where no handler does."""
    return getattr(_mine, "shield", None)


def shielded() -> AbstractContextManager[None]:
    """Return what holds off the time limit of the handler that runs in this thread, if any, while a block runs."""
    return shielding() or _NONE


def deferring() -> AbstractContextManager[None]:
    """Return what does so where nothing may be raised, as in a callback of an event loop, which would only log it.

    Whoever goes on after such a block calls `strike`.
    """
    shield = shielding()
    return _NONE if shield is None else _Deferring(shield)


def strike() -> None:
    """Have the time limit of the handler that runs in this thread strike, if it is due.

    Raises:
        HandlerTimeout: If it is.
    """
    shield = shielding()
    if shield is not None:
        with shield:
            pass
