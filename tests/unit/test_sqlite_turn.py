from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path
from statistics import median
from threading import Barrier, Event, Thread
from time import monotonic, sleep

import pytest

import kq
from kq.backends.sqlite import SQLiteStore
from kq.backends.sqlite_turn import begin
from kq.backends.store import BrokerAway, Entry
from kq.envelope import Envelope, pack
from kq.errors import Internal


def connect(path: Path) -> sqlite3.Connection:
    db = sqlite3.connect(path, timeout=0.0, isolation_level=None, check_same_thread=False)
    db.execute("PRAGMA journal_mode = WAL")
    return db


def test_the_turn_comes_soon_after_the_file_is_free(tmp_path: Path) -> None:
    """Whoever has waited for a quarter of a second is told within milliseconds; SQLite's own way takes 78 more."""
    waited = []
    with closing(connect(tmp_path / "x.db")) as other, closing(connect(tmp_path / "x.db")) as ours:
        for _ in range(5):
            begin(other, 1.0)
            ready = Barrier(2)
            turns: list[float] = []

            def wait(ready: Barrier = ready, turns: list[float] = turns) -> None:
                ready.wait(10.0)
                begin(ours, 10.0)
                turns.append(monotonic())
                ours.execute("COMMIT")

            thread = Thread(target=wait)
            thread.start()
            ready.wait(10.0)
            # What is tested is a wait of this length.
            sleep(0.25)
            other.execute("COMMIT")
            free = monotonic()
            thread.join(20.0)
            waited.append(turns[0] - free)
    assert median(waited) < 0.05


def test_whose_turn_does_not_come_is_told_so(tmp_path: Path) -> None:
    """As SQLite does it, and not sooner; what else goes wrong is said at once."""
    with closing(connect(tmp_path / "x.db")) as other, closing(connect(tmp_path / "x.db")) as ours:
        begin(other, 1.0)
        started = monotonic()
        with pytest.raises(sqlite3.OperationalError, match="locked"):
            begin(ours, 0.1)
        assert monotonic() - started >= 0.1
        started = monotonic()
        with pytest.raises(sqlite3.OperationalError, match="within a transaction"):
            begin(other, 10.0)
        assert monotonic() - started < 5.0


def test_a_publisher_is_told_what_it_has_waited_for(tmp_path: Path) -> None:
    """Before its own time is over, after which all that could be said is that nobody has confirmed."""
    url = f"sqlite:///{tmp_path / 'x.db'}"
    with closing(kq.App("shop", broker=url)) as app:
        app.publish("shop:emails", 1)
    with closing(connect(tmp_path / "x.db")) as other:
        begin(other, 1.0)
        with closing(kq.App("shop", broker=url, publish_timeout=1.0)) as late, pytest.raises(Internal) as caught:
            late.publish("shop:emails", 2)
    assert "locked by another process" in caught.value.message
    assert caught.value.details["reason"] == "timeout"


def test_a_thread_that_takes_long_is_waited_for_no_longer_than_another_process(tmp_path: Path) -> None:
    """One connection serves all threads: who waits for another one's transaction has that much less for the file."""
    entry = Entry("a", pack(Envelope("a", {}, {}, b"1")), 4)
    store = SQLiteStore(str(tmp_path / "x.db"), 0.5)
    store.declare("app:q", {})
    began, over = Event(), Event()

    def purge() -> None:
        with store._transaction():
            began.set()
            over.wait(30.0)

    other = Thread(target=purge)
    other.start()
    try:
        assert began.wait(10.0)
        started = monotonic()
        with pytest.raises(BrokerAway, match="another thread of this process") as caught:
            store.put("app:q", [entry], None)
        assert monotonic() - started < 5.0
        assert caught.value.details["reason"] == "timeout"
    finally:
        over.set()
        other.join()
    assert store.put("app:q", [entry], None) == 1
    with store._turn(0.5) as left:
        assert left == 0.5
    store.close()
