"""What a fork waits for, so that a child does not inherit something half done.

The system's own hooks run in the reverse order of their registration, which is that of imports, and leave out those
that are registered meanwhile (https://docs.python.org/3/library/os.html#os.register_at_fork). Here there is one hook,
and the order is a `Stage`: whoever opens others is held before those that it opens.

`logging` has a fork hold its lock, too, which whoever opens a backend may need: it is imported here so that its hook
is the earlier one, and runs after this one.

What a hook raises is printed and forgotten by Python, so that a handler's time limit must not strike in one; and where
a signal's handler raises in the middle of it, all that may be held is let go all the same.
"""

from __future__ import annotations

import logging  # noqa: F401
import os
from contextlib import suppress
from enum import IntEnum
from threading import Lock, RLock, local
from time import monotonic
from typing import Final, Protocol
from weakref import WeakValueDictionary

from kq.shield import Shield, shielding

#: Seconds that a fork waits at most, for all of them together: half a module, or half a transaction, is of no use to a
#: child. And seconds that somebody new waits for a fork at most.
WAIT: Final = 5.0


class Stage(IntEnum):
    """When something is held before a fork: after all of the stages before."""

    OPENS = 1
    OPENED = 2
    #: Where what nobody closed is closed in the end, which may happen at any time.
    DROPPED = 3


class Forks(Protocol):
    """What must not be in the middle of something when the process forks."""

    def before_fork(self, timeout: float) -> None:
        """Wait at most so many seconds for whoever is in the middle of something, and have others wait."""
        ...

    def after_fork_in_parent(self) -> None:
        """Let others go on; a `RuntimeError` where they have not been held in the end. By the thread that forked."""
        ...

    def after_fork_in_child(self) -> None:
        """Begin anew: no other thread is left, whatever it held."""
        ...


_Members = WeakValueDictionary[int, Forks]


class _Fork:
    """One fork, from before it to after it."""

    def __init__(self) -> None:
        self.until = monotonic() + WAIT
        #: Who is to be let go, by identity; in here before it is held, for what comes in between may be an exception.
        self.held: dict[int, Forks] = {}
        self.enrolling = 0
        self._shield: Shield | None = None

    def shield(self) -> None:
        self._shield = shielding()
        if self._shield is not None:
            self._shield.__enter__()

    def unshield(self) -> None:
        if self._shield is not None:
            self._shield.leave()

    def has(self, stage: Stage) -> bool:
        return all(id(what) in self.held for what in _members(stage))

    def hold(self, stage: Stage) -> None:
        for what in _members(stage):
            if id(what) not in self.held:
                self.held[id(what)] = what
                what.before_fork(max(0.0, self.until - monotonic()))

    def stop_enrolling(self) -> None:
        self.enrolling += bool(_enrolling.acquire(timeout=max(0.0, self.until - monotonic())))

    def go_on_enrolling(self) -> None:
        while self.enrolling:
            self.enrolling -= 1
            _enrolling.release()

    def let_go(self) -> None:
        for what in reversed(self.held.values()):
            with suppress(RuntimeError):
                what.after_fork_in_parent()
        self.go_on_enrolling()

    def forget(self) -> None:
        self.held.clear()
        self.enrolling = 0
        if self._shield is not None:
            # The watchdog, which may have held it, is not in the child.
            self._shield.lock = Lock()


class _UnderWay(local):
    """The forks of a thread: of more than one where a signal's handler forks in the middle of another."""

    def __init__(self) -> None:
        self.forks: list[_Fork] = []


#: Held while something is enrolled, and by a fork from its second stage on: what comes later waits for the fork to end.
_enrolling = RLock()
_enrolled: Final[dict[Stage, _Members]] = {stage: WeakValueDictionary() for stage in Stage}
_under_way = _UnderWay()
#: The process that has what is enrolled; and, by process, what is held by whoever sees to it in a child first.
_pid = os.getpid()
_noticing: Final[dict[int, RLock]] = {}


def enrol(what: Forks, stage: Stage) -> None:
    """Have forks wait for it, from now on, as long as it lives. Waits for a fork that is under way. Thread-safe."""
    # Not for ever: the fork may be waiting for a lock of somebody else's that this thread holds.
    is_held = _enrolling.acquire(timeout=WAIT)
    try:
        _enrolled[stage][id(what)] = what
    finally:
        if is_held:
            _enrolling.release()


def _members(stage: Stage) -> list[Forks]:
    """Return them in the same order to everybody who forks."""
    # In one step, as others come and go.
    alive = (reference() for reference in _enrolled[stage].valuerefs())
    return sorted((what for what in alive if what is not None), key=id)


def _before() -> None:
    fork = _Fork()
    _under_way.forks.append(fork)
    fork.shield()
    fork.hold(Stage.OPENS)
    fork.stop_enrolling()
    while monotonic() < fork.until and not fork.has(Stage.OPENS):
        # Somebody came while others were waited for, and may be in the middle of opening something.
        fork.go_on_enrolling()
        fork.hold(Stage.OPENS)
        fork.stop_enrolling()
    fork.hold(Stage.OPENED)
    fork.hold(Stage.DROPPED)


def _after_in_parent() -> None:
    fork = _under_way.forks.pop()
    fork.let_go()
    fork.unshield()


def _after_in_child() -> None:
    global _enrolling, _pid
    _enrolling = RLock()
    for fork in _under_way.forks:
        # Theirs are the locks that are made anew here.
        fork.forget()
    for stage in Stage:
        for what in _members(stage):
            what.after_fork_in_child()
    _pid = os.getpid()
    if _under_way.forks:
        # Else nobody was told before: some application servers run this hook alone.
        _under_way.forks.pop().unshield()


def notice() -> None:
    """Begin anew in a process that was forked without hooks, as some application servers do it. Thread-safe.

    Two processes on one connection would take each other's confirmations for their own.
    """
    if os.getpid() != _pid:
        with _noticing.setdefault(os.getpid(), RLock()):
            if os.getpid() != _pid:
                _after_in_child()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before, after_in_parent=_after_in_parent, after_in_child=_after_in_child)
