"""What a fork waits for, so that a child does not inherit something half done.

The system's own hooks run in the reverse order of their registration, which is that of imports, and leave out those
that are registered meanwhile (https://docs.python.org/3/library/os.html#os.register_at_fork). Here there is one hook,
and the order is a `Stage`: whoever opens others is held before those that it opens.

`logging` has a fork hold its lock, too, which whoever opens a backend may need: it is imported here so that its hook
is the earlier one, and runs after this one.
"""

from __future__ import annotations

import logging  # noqa: F401
import os
from enum import IntEnum
from threading import RLock, local
from typing import Final, Protocol
from weakref import WeakSet

#: Seconds that a fork waits for any of them: half a module, or half a transaction, is of no use to a child.
WAIT: Final = 5.0


class Stage(IntEnum):
    """When something is held before a fork: after all of the stages before."""

    OPENS = 1
    OPENED = 2


class Forks(Protocol):
    """What must not be in the middle of something when the process forks. Hashed by identity."""

    def before_fork(self) -> bool:
        """Wait at most `WAIT` seconds for whoever is in the middle of something, and have others wait; False in vain.

        Called by the thread that forks, as are the others.
        """
        ...

    def after_fork_in_parent(self) -> None:
        """Let others go on. Only where `before_fork` was not in vain."""
        ...

    def after_fork_in_child(self) -> None:
        """Begin anew: no other thread is left, whatever it held."""
        ...


#: Held while something is enrolled, and by a fork from its last stage on: what comes later waits for the fork to end.
_enrolling = RLock()
_enrolled: dict[Stage, WeakSet[Forks]] = {stage: WeakSet() for stage in Stage}


class _Held(local):
    """Of a thread that forks: who has to be let go."""

    def __init__(self) -> None:
        self.all: list[Forks] = []
        self.enrolling = False


_held = _Held()


def enrol(what: Forks, stage: Stage) -> None:
    """Have forks wait for it, from now on, as long as it lives. Waits for a fork that is under way. Thread-safe."""
    with _enrolling:
        _enrolled[stage].add(what)


def _members(stage: Stage) -> list[Forks]:
    """Return them in the same order to everybody who forks."""
    with _enrolling:
        return sorted(_enrolled[stage], key=id)


def _before() -> None:
    for what in _members(Stage.OPENS):
        if what.before_fork():
            _held.all.append(what)
    # Whoever opens something now is not held and so was made meanwhile: what it opens has to wait.
    _held.enrolling = _enrolling.acquire(timeout=WAIT)
    for what in _members(Stage.OPENED):
        if what.before_fork():
            _held.all.append(what)


def _after_in_parent() -> None:
    held, _held.all = _held.all, []
    for what in reversed(held):
        what.after_fork_in_parent()
    if _held.enrolling:
        _held.enrolling = False
        _enrolling.release()


def _after_in_child() -> None:
    global _enrolling
    _enrolling = RLock()
    _held.enrolling = False
    _held.all = []
    for stage in Stage:
        for what in _members(stage):
            what.after_fork_in_child()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before, after_in_parent=_after_in_parent, after_in_child=_after_in_child)
