"""What a fork waits for, and in which order."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final

import pytest

from kq import forking
from kq.forking import Stage
from kq.shield import HandlerTimeout, Shield, carry

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="the system does not fork")

_DONE: Final = 30.0


class Recorder:
    """Notes what a fork calls it for, and can be in the middle of something."""

    def __init__(self, name: str, calls: list[str]) -> None:
        self.name = name
        self.calls = calls
        self.lock = threading.RLock()

    def before_fork(self, timeout: float) -> None:
        self.lock.acquire(timeout=timeout)
        self.calls.append(f"{self.name} held")

    def after_fork_in_parent(self) -> None:
        self.calls.append(f"{self.name} let go")
        self.lock.release()

    def after_fork_in_child(self) -> None:
        self.calls.append(f"{self.name} begins anew")


class Forking(Recorder):
    """A signal's handler comes, and forks, while a fork waits for it the first time."""

    forks = True

    def before_fork(self, timeout: float) -> None:
        if self.forks:
            self.forks = False
            fork_and_tell([])
        super().before_fork(timeout)


class Interrupted(Recorder):
    """A signal's handler raises as soon as it is held."""

    def before_fork(self, timeout: float) -> None:
        super().before_fork(timeout)
        raise KeyboardInterrupt


class Late(Recorder):
    """A handler's time is over while it is waited for."""

    shield: Shield

    def before_fork(self, timeout: float) -> None:
        # As the watchdog does it.
        assert self.shield.depth
        self.shield.is_due = True
        super().before_fork(timeout)


class Waiting(Recorder):
    """Needs a lock of somebody else's."""

    wait_for: threading.Lock
    going: threading.Event

    def before_fork(self, timeout: float) -> None:
        self.going.set()
        with self.wait_for:
            super().before_fork(timeout)


def hold_and_enrol(lock: threading.Lock, holding: threading.Event, going: threading.Event, new: Recorder) -> None:
    """Enrol something, with a lock that a fork waits for."""
    with lock:
        holding.set()
        assert going.wait(_DONE)
        forking.enrol(new, Stage.OPENED)


def fork_and_tell(calls: list[str]) -> list[str]:
    """Fork, and return what the child saw called."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.write(writer, "\n".join(calls).encode())
        finally:
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as file:
        told = file.read().split("\n")
    os.waitpid(pid, 0)
    return told


def test_who_opens_others_is_held_first() -> None:
    """Whatever was enrolled first; the parent lets go in reverse, and a child begins anew in order."""
    calls: list[str] = []
    store, registry = Recorder("store", calls), Recorder("registry", calls)
    forking.enrol(store, Stage.OPENED)
    forking.enrol(registry, Stage.OPENS)

    told = fork_and_tell(calls)

    assert calls == ["registry held", "store held", "store let go", "registry let go"]
    assert told == ["registry held", "store held", "registry begins anew", "store begins anew"]


def test_what_is_opened_while_a_fork_waits_is_held_too() -> None:
    """A thread in the middle of opening something is waited for, and so is what it has opened by then."""
    calls: list[str] = []
    registry, store = Recorder("registry", calls), Recorder("store", calls)
    forking.enrol(registry, Stage.OPENS)
    opening = threading.Event()

    def open_store() -> None:
        with registry.lock:
            opening.set()
            forking.enrol(store, Stage.OPENED)

    thread = threading.Thread(target=open_store)
    thread.start()
    assert opening.wait(_DONE)
    fork_and_tell(calls)
    thread.join(_DONE)

    assert calls == ["registry held", "store held", "store let go", "registry let go"]


_ASKS_FOR_A_LOGGER: Final = """
import os, threading
from kq import forking
import logging

class Registry:
    lock, waiting, opening = threading.Lock(), threading.Event(), threading.Event()

    def before_fork(self, timeout):
        self.waiting.set()
        print(self.lock.acquire(timeout=timeout), flush=True)

    def after_fork_in_parent(self):
        self.lock.release()

    def after_fork_in_child(self):
        os._exit(0)

    def open(self):
        with self.lock:
            self.opening.set()
            self.waiting.wait()
            logging.getLogger("backend")

registry = Registry()
forking.enrol(registry, forking.Stage.OPENS)
thread = threading.Thread(target=registry.open)
thread.start()
registry.opening.wait()
os.waitpid(os.fork(), 0)
thread.join()
"""


def test_whoever_opens_something_may_ask_for_a_logger_while_a_fork_waits() -> None:
    """The lock that `logging` has a fork hold is not taken before whoever needs it is through."""
    done = subprocess.run(
        [sys.executable, "-c", _ASKS_FOR_A_LOGGER], capture_output=True, text=True, timeout=_DONE, check=False
    )

    assert done.stdout == "True\n", done.stderr


#: Application servers written in C may run none of Python's hooks, or the last one alone.
_FORKS_WITHOUT_HOOKS = """
import ctypes, os, sys
import kq

path, last_alone = sys.argv[1], sys.argv[2] == "last"
libc = ctypes.PyDLL(None)
going, go_on = os.pipe()
done, tell = os.pipe()
with kq.App("forked", broker=f"sqlite:///{path}") as app:
    app.publish("app:q", 1)
    ours = app.registry.opened("")
    lock = app.registry._lock
    child = libc.fork()
    if child == 0:
        try:
            if last_alone:
                libc.PyOS_AfterFork_Child()
            app.publish("app:q", 2)
            theirs = app.registry.opened("")
            print(theirs is not ours and app.registry._lock is not lock, flush=True)
            os.write(tell, b"2")
            os.read(going, 1)
            app.publish("app:q", 3)
        finally:
            os._exit(0)
    # Nothing is left to wait for where the child has died.
    os.close(tell)
    os.read(done, 1)
    app.publish("app:q", 4)
    print(app.registry.opened("") is ours)
# Whoever is the last one, as far as the system knows, takes the journal away.
os.write(go_on, b"3")
os.waitpid(child, 0)
with kq.App("other", broker=f"sqlite:///{path}") as app:
    print(app.info("app:q").ready)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the C library is found otherwise there")
@pytest.mark.parametrize(
    "hooks",
    [
        "none",
        # From 3.13 on Python itself ends a process in which this hook runs and the first one did not.
        pytest.param("last", marks=pytest.mark.skipif(sys.version_info >= (3, 13), reason="Python ends there")),
    ],
)
def test_a_fork_without_hooks_is_noticed(tmp_path: Path, hooks: str) -> None:
    """Two processes on one connection would take each other's confirmations for their own."""
    done = subprocess.run(
        [sys.executable, "-c", _FORKS_WITHOUT_HOOKS, str(tmp_path / "kq.db"), hooks],
        capture_output=True, text=True, timeout=_DONE, check=False,
    )  # fmt: skip

    assert (done.stdout, done.stderr) == ("True\nTrue\n4\n", "")


def test_a_signals_handler_may_fork_while_a_fork_waits() -> None:
    """Each lets go of what it has held itself, and the outer one still waits for the rest."""
    calls: list[str] = []
    store, registry = Forking("store", calls), Recorder("registry", calls)
    forking.enrol(store, Stage.OPENED)
    forking.enrol(registry, Stage.OPENS)

    fork_and_tell(calls)

    assert calls == [
        "registry held", "registry held", "store held", "store let go", "registry let go", "store held", "store let go",
        "registry let go",
    ]  # fmt: skip
    others = threading.Thread(target=fork_and_tell, args=([],))
    others.start()
    others.join(_DONE)
    assert not others.is_alive()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_what_is_interrupted_while_it_is_held_is_let_go() -> None:
    """An exception in a hook is lost, which is Python's way; the locks are not."""
    calls: list[str] = []
    registry = Interrupted("registry", calls)
    forking.enrol(registry, Stage.OPENS)
    fork_and_tell(calls)
    assert calls == ["registry held", "registry let go"]
    with ThreadPoolExecutor(1) as other:
        assert other.submit(registry.lock.acquire, blocking=False).result(_DONE)


def test_a_time_limit_does_not_strike_in_the_middle() -> None:
    """It strikes when kq's next piece of work ends: in the hook it would be lost."""
    calls: list[str] = []
    shield = Shield()
    registry = Late("registry", calls)
    registry.shield = shield
    forking.enrol(registry, Stage.OPENS)

    def handler() -> None:
        carry(shield)
        fork_and_tell(calls)
        assert shield.depth == 0
        with pytest.raises(HandlerTimeout), shield:
            pass
        calls.append("struck")

    thread = threading.Thread(target=handler)
    thread.start()
    thread.join(_DONE)
    assert calls == ["registry held", "registry let go", "struck"]


def test_a_watchdog_that_looks_at_the_moment_of_a_fork_is_not_waited_for_in_the_child() -> None:
    """It is not there to let go of what it holds."""
    shield = Shield()
    told: list[str] = []

    def handler() -> None:
        carry(shield)
        # Taken by the watchdog right before the fork itself, and let go of right after it.
        forking.enrol(watched, Stage.OPENS)
        told.extend(fork_and_tell(["through"]))

    class Watched(Recorder):
        def before_fork(self, timeout: float) -> None:
            super().before_fork(timeout)
            shield.lock.acquire()

        def after_fork_in_parent(self) -> None:
            shield.lock.release()
            super().after_fork_in_parent()

    watched = Watched("watched", [])
    thread = threading.Thread(target=handler, daemon=True)
    thread.start()
    thread.join(_DONE)
    assert told == ["through"]


def test_somebody_new_waits_for_a_fork_no_longer_than_it_waits_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fork may be waiting for a lock of somebody else's, which the one who is new holds."""
    monkeypatch.setattr(forking, "WAIT", 0.1)
    calls: list[str] = []
    lock = threading.Lock()
    going, holding = threading.Event(), threading.Event()
    enrolled = threading.Thread(target=lambda: hold_and_enrol(lock, holding, going, Recorder("new", calls)))
    first = Waiting("first", calls)
    first.wait_for, first.going = lock, going
    forking.enrol(first, Stage.OPENED)
    enrolled.start()
    assert holding.wait(_DONE)

    fork_and_tell(calls)
    enrolled.join(_DONE)

    assert not enrolled.is_alive()
    assert "first held" in calls


def test_what_is_gone_is_not_waited_for() -> None:
    """Nothing is kept alive by being enrolled."""
    calls: list[str] = []
    forking.enrol(Recorder("gone", calls), Stage.OPENED)

    fork_and_tell(calls)

    assert calls == []
