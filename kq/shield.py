"""Keeps a handler's time limit from striking inside kq's own work.

A handler that runs past its limit is stopped by an exception raised in its thread, wherever that is. In
the middle of a publish it would leave a lock held or a transaction open, for everybody. Such work runs
under a shield: the exception waits until it is over.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock, local


class Shield:
    """What a thread that runs handlers and its watchdog share.

    Attributes:
        lock: Held while either decides.
        depth: How many pieces of work the thread is in that must not be interrupted.
    """

    __slots__ = ("depth", "lock")

    def __init__(self) -> None:
        self.lock = Lock()
        self.depth = 0


_mine = local()


def carry(shield: Shield) -> None:
    """Make ``shield`` the one of the calling thread."""
    _mine.shield = shield


@contextmanager
def shielded() -> Iterator[None]:
    """Hold off the time limit of the handler that runs in this thread, if any, while the block runs."""
    shield: Shield | None = getattr(_mine, "shield", None)
    if shield is None:
        yield
        return
    with shield.lock:
        shield.depth += 1
    try:
        yield
    finally:
        with shield.lock:
            shield.depth -= 1
