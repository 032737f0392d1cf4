"""How much a child may hold: what its pace says."""

from __future__ import annotations

import socket
from time import monotonic
from types import SimpleNamespace
from typing import Any

import pytest

from kq.executor import Job
from kq.worker import frame
from kq.worker.child_process import ChildProcess
from kq.worker.process_pool import ProcessPool


class Child:
    """What is known of a child's pace, on a clock of its own."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, handlers: int) -> None:
        self.now = 1000.0
        monkeypatch.setattr("kq.worker.process_pool.monotonic", lambda: self.now)
        self.child: Any = SimpleNamespace(window=handlers, window_min=handlers, finished=0, measured_at=self.now)

    def ends(self, count: int, after: float) -> int:
        """Have so many handlers end after so many seconds, and return what it may hold then."""
        self.now += after
        ProcessPool._measure(self.child, count)
        window: int = self.child.window
        return window


def test_fast_handlers_have_more_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tenth of a second's work, as soon as each has ended once."""
    child = Child(monkeypatch, 8)
    assert [child.ends(4, 0.003) for _ in range(2)] == [8, 8 + int(8 / 0.006 * 0.1)]


def test_handlers_that_end_together_are_not_fast_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """A hundred that wait for three seconds each end within some milliseconds, round by round."""
    child = Child(monkeypatch, 100)
    widest = 0
    for _ in range(4):
        child.now += 3.0
        for _ in range(100):
            widest = max(widest, child.ends(1, 0.0002))
    assert widest <= 104


def test_slow_handlers_soon_have_no_more_than_they_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each end halves what was more, however few there are."""
    child = Child(monkeypatch, 8)
    child.child.window = 1000
    assert [child.ends(1, 1.0) for _ in range(3)] == [504, 256, 132]


def test_a_child_that_has_had_nothing_keeps_its_pace(monkeypatch: pytest.MonkeyPatch) -> None:
    """For some seconds, its first job included: its silence counts from there on, not from before."""
    ours, theirs = socket.socketpair()
    process: Any = SimpleNamespace(socket=ours, slots=None)
    hello = frame.Hello("app", {}, [], 8, "INFO", "text")
    child = ChildProcess(1, 1000, process=process, hello=hello, window_min=8)
    pool: Any = SimpleNamespace(_children=[child])
    began = monotonic()

    def look(after: float) -> int:
        monkeypatch.setattr("kq.worker.process_pool.monotonic", lambda: monotonic() + after)
        ProcessPool._narrow(pool)
        return child.window

    try:
        child.heard_at = began - 3.0
        assert look(0.0) == 1000
        child.submit([Job(1, "app:a", "id", b"")])
        assert look(0.0) == 1000
        assert look(1.0) == 8
        child.window = 1000
        child.tags.clear()
        child.heard_at = began - 5.0
        assert look(0.0) == 8
    finally:
        ours.close()
        theirs.close()


def test_what_waits_in_a_child_is_watched_over() -> None:
    """It was given as much because its handlers were fast: somebody has to look whether they are."""
    child = SimpleNamespace(window_min=8, tags=set(range(8)))
    pool: Any = object.__new__(ProcessPool)
    pool._children, pool._timeout_of = [child], None
    assert not pool.needs_watching
    child.tags.add(8)
    assert pool.needs_watching


class Undying:
    """A process that is in a call of the system's which does not end."""

    def __init__(self, ours: socket.socket) -> None:
        self.pid, self.concurrency, self.pid_fd = 0, 1, None
        self.socket = ours
        self.slots = SimpleNamespace(running=list)
        self.is_closed = False

    def kill(self) -> None: ...

    def reap(self, *, wait: bool = False) -> None:
        assert not wait, "it would be waited for without end"

    def close(self) -> None:
        self.is_closed = True


def test_a_child_that_cannot_die_holds_nothing_up(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It is given nothing more, another one takes its place, and it is left behind where the worker ends."""
    monkeypatch.setattr("kq.worker.process_pool._KILLED", 0.1)
    pairs = [socket.socketpair() for _ in range(3)]
    processes: list[Any] = [Undying(ours) for ours, _ in pairs]
    for process in processes:
        process.socket.setblocking(False)
    hello = frame.Hello("app", {}, [], 1, "INFO", "text")
    pool = ProcessPool(1, hello, None, forks=processes[:])
    try:
        for count, is_stuck in ((1, False), (2, False), (2, True)):
            with pool.lock:
                pool.start()
                assert (len(pool.places), pool.is_stuck) == (count, is_stuck)
                for child in pool._children:
                    child.ready = True
                    child.kill("it was late")
                    assert not child.room
        # Nobody is left who could take anything, and nobody is coming, which is said once.
        with pool.lock:
            for _ in range(2):
                pool.poll(0.0)
        assert sum("none is started beside them" in record.getMessage() for record in caplog.records) == 1
        assert pool.close(0.0) == []
        assert [process.is_closed for process in processes] == [False, True, True]
        assert sum("does not die; it is left behind" in record.getMessage() for record in caplog.records) == 2
    finally:
        for pair in pairs:
            for end in pair:
                end.close()
