"""What may take longer than its caller has."""

from __future__ import annotations

import threading
from threading import Event

import pytest

from kq.backends.within import within

_DONE = 30.0


def never(what: object) -> None:
    """Drop nothing."""
    raise AssertionError(what)


def test_what_is_made_in_time_is_returned() -> None:
    """And what is raised is raised here."""

    def fail() -> str:
        raise LookupError("no such host")

    assert within(_DONE, lambda: "made", never) == "made"
    with pytest.raises(LookupError, match="no such host"):
        within(_DONE, fail, never)


def test_what_takes_longer_is_dropped_when_it_is_there() -> None:
    """Nobody waits for it any more, and nobody else would ever close it."""
    go_on, dropped = Event(), Event()
    found: list[str] = []

    def make() -> str:
        assert go_on.wait(_DONE)
        return "late"

    def drop(what: str) -> None:
        found.append(what)
        dropped.set()

    with pytest.raises(TimeoutError, match=r"nothing within 0\.01 s"):
        within(0.01, make, drop)
    go_on.set()
    assert dropped.wait(_DONE)
    assert found == ["late"]


def test_without_room_for_a_thread_it_is_made_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """However long that takes: it may well be in time."""

    def no_room(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", no_room)
    assert within(0.0, threading.current_thread, never) is threading.current_thread()
