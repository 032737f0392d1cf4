"""What a fork waits for, and in which order."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from typing import Final

import pytest

from kq import forking
from kq.forking import Stage

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="the system does not fork")

_DONE: Final = 30.0


class Recorder:
    """Notes what a fork calls it for, and can be in the middle of something."""

    def __init__(self, name: str, calls: list[str]) -> None:
        self.name = name
        self.calls = calls
        self.lock = threading.Lock()

    def before_fork(self) -> bool:
        held = self.lock.acquire(timeout=forking.WAIT)
        self.calls.append(f"{self.name} held")
        return held

    def after_fork_in_parent(self) -> None:
        self.calls.append(f"{self.name} let go")
        self.lock.release()

    def after_fork_in_child(self) -> None:
        self.calls.append(f"{self.name} begins anew")


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

    def before_fork(self):
        self.waiting.set()
        print(self.lock.acquire(timeout=forking.WAIT), flush=True)
        return True

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


def test_what_is_gone_is_not_waited_for() -> None:
    """Nothing is kept alive by being enrolled."""
    calls: list[str] = []
    forking.enrol(Recorder("gone", calls), Stage.OPENED)

    fork_and_tell(calls)

    assert calls == []
