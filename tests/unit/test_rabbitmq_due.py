from __future__ import annotations

import os

import pytest

from kq.backends import rabbitmq_due
from kq.backends.rabbitmq_due import Due


def test_the_soonest_of_some_queues() -> None:
    """Only what was sent to these queues of this broker counts."""
    due = Due()
    assert due.soonest("a", ["q", "r"]) is None
    due.note("a", "q", 30)
    due.note("a", "q", 20)
    due.note("a", "r", 10)
    due.note("b", "q", 5)
    assert due.soonest("a", ["q"]) == pytest.approx(20, abs=1)
    assert due.soonest("a", ["q", "r"]) == pytest.approx(10, abs=1)
    assert due.soonest("b", ["r"]) is None


def test_what_has_been_due_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    """A broker may be a little late; after that the message is where it can be seen."""
    now = 100.0
    monkeypatch.setattr(rabbitmq_due, "monotonic", lambda: now)
    due = Due()
    due.note("a", "q", 1)
    now = 101.5
    assert due.soonest("a", ["q"]) == -0.5
    now = 102.5
    assert due.soonest("a", ["q"]) is None


def test_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of many the soonest are remembered."""
    monkeypatch.setattr(rabbitmq_due, "_MOST", 100)
    due = Due()
    for delay in range(1000, 0, -1):
        due.note("a", "q", delay)
    assert due.soonest("a", ["q"]) == pytest.approx(1, abs=1)
    assert len(due._times["a", "q"]) <= 100


def test_queues_on_which_nothing_is_due_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    """Some publishers have a queue for each client; what is still to come is remembered, on however many."""
    now = 100.0
    monkeypatch.setattr(rabbitmq_due, "monotonic", lambda: now)
    monkeypatch.setattr(rabbitmq_due, "_QUEUES", 10)
    due = Due()
    for n in range(30):
        due.note("a", f"long {n}", 3600)
    for n in range(1000):
        due.note("a", f"short {n}", 1)
        now += 2
    assert len(due._times) <= 70
    assert [due.soonest("a", [f"long {n}"]) is None for n in range(30)] == [False] * 30


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there are no forks")
def test_a_fork_has_sent_nothing() -> None:
    """What was noted before a fork is the parent's, and a lock that was held then is free in the fork."""
    rabbitmq_due.due.note("fork", "q", 30)
    with rabbitmq_due.due._lock:
        pid = os.fork()
        if not pid:
            os._exit(0 if rabbitmq_due.due.soonest("fork", ["q"]) is None else 1)
    assert os.waitpid(pid, 0)[1] == 0
    assert rabbitmq_due.due.soonest("fork", ["q"]) is not None
