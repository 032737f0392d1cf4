from __future__ import annotations

import os
import sqlite3
import sys
from collections.abc import Iterator
from contextlib import closing
from itertools import count
from pathlib import Path
from threading import Barrier, Thread
from types import SimpleNamespace

import pytest

from kq import clock
from kq.backends import machine, sqlite, sqlite_boot, sqlite_open, sqlite_rows
from kq.backends.sqlite import SQLiteStore
from kq.backends.sqlite_file import Disk
from kq.backends.sqlite_schema import prepare
from kq.backends.store import BrokerAway, Ending, Entry, Move
from kq.errors import Internal, Invalid

#: What undoes a version's step.
UNDO = {
    # Moments were times of day.
    1: "DROP TABLE completed; DROP TABLE boot; UPDATE message SET moment = due; ALTER TABLE message DROP COLUMN due; "
    "PRAGMA user_version = 1;",
    2: "DROP TRIGGER message_gone; DROP TABLE apart; ALTER TABLE message DROP COLUMN apart; "
    "ALTER TABLE message RENAME COLUMN here TO raw; INSERT INTO sequence VALUES ('place', 1); PRAGMA user_version = 2;",
    # Leases counted the time that the machine slept.
    3: "UPDATE message SET moment = moment + 1000000000000 WHERE state = 2; PRAGMA user_version = 3;",
}


@pytest.fixture
def path(tmp_path: Path) -> str:
    return str(tmp_path / "kq.db")


@pytest.fixture
def db(path: str) -> Iterator[sqlite3.Connection]:
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        yield connection


def tables(db: sqlite3.Connection) -> dict[str, str]:
    """Return what makes the tables and indexes of a file, by name."""
    return {name: str(sql).split("(", 1)[0] for name, sql in db.execute("SELECT name, sql FROM sqlite_master")}


def test_a_file_is_completed_once(path: str, db: sqlite3.Connection) -> None:
    """And not written to any more, also while somebody else writes to it."""
    prepare(db, path)
    assert {"message", "queue", "sequence", "completed", "boot"} <= tables(db).keys()
    assert not db.in_transaction
    with closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        prepare(db, path)


@pytest.mark.parametrize("version", UNDO)
def test_an_older_file_keeps_its_messages(path: str, version: int) -> None:
    """It gets what it lacks, and what is new stands behind what is there."""
    with closing(SQLiteStore(path, 10.0)) as store:
        store.declare("app:q", {})
        store.put("app:q", [Entry("a", b"raw", 4), Entry("later", b"raw", 4, 3_600_000)], None)
        store.take("app:q", 1, 30_000)
    with closing(sqlite3.connect(path)) as db:
        complete = tables(db)
        for step in range(3, version - 1, -1):
            db.executescript(UNDO[step])
        assert ("apart" in tables(db)) == (version > 2)

    with closing(SQLiteStore(path, 10.0)) as store:
        store.put("app:q", [Entry("b", b"raw", 4)], None)
        leases = store.take("app:q", 10, 30_000).leases
        assert [lease.id for lease in leases] == ["a", "b"]
        assert store.counts("app:q").delayed == 1
        acks = [Ending(lease.id, lease.token, "ack", keep=60_000, completes=lease.id) for lease in leases]
        assert store.settle("app:q", acks) == [True, True]
        assert store.completed("app:q", ["a", "b", "later"]) == {"a", "b"}
    with closing(sqlite3.connect(path)) as db:
        assert tables(db) == complete
        assert db.execute("SELECT name FROM sequence").fetchall() == [("token",)]


def test_an_older_kq_that_has_the_file_open_takes_nothing(path: str, db: sqlite3.Connection) -> None:
    """It would find large messages empty."""
    with closing(SQLiteStore(path, 10.0)) as store:
        store.ping()
    db.executescript(UNDO[2])
    take = "SELECT place, id, raw FROM message WHERE queue = ?"
    assert db.execute(take, ("app:q",)).fetchall() == []
    with closing(SQLiteStore(path, 10.0)) as store:
        store.ping()
    with pytest.raises(sqlite3.OperationalError, match="no such column: raw"):
        db.execute(take, ("app:q",))


def test_a_newer_file_is_left_alone(path: str, db: sqlite3.Connection) -> None:
    db.execute("PRAGMA user_version = 99")
    with pytest.raises(Invalid, match=r"has schema 99, this kq knows \d+; use a newer kq"):
        prepare(db, path)
    assert tables(db) == {}


def test_several_may_open_an_older_file_at_once(path: str) -> None:
    """One of them completes it, and the others see that it is done."""
    for _ in range(5):
        with closing(SQLiteStore(path, 10.0)) as store:
            store.ping()
        with closing(sqlite3.connect(path)) as db:
            db.executescript(UNDO[2] + UNDO[1])
        ready = Barrier(4)
        failed: list[BaseException] = []

        def run(ready: Barrier = ready, failed: list[BaseException] = failed) -> None:
            try:
                with closing(sqlite3.connect(path, timeout=10.0, isolation_level=None)) as db:
                    db.execute("SELECT count(*) FROM message").fetchone()
                    ready.wait(10.0)
                    prepare(db, path)
            except BaseException as error:
                failed.append(error)

        threads = [Thread(target=run) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(20.0)
        assert failed == []


def test_of_many_acks_those_that_are_late_are_told(path: str) -> None:
    """The others count, whether few or all are late, and whatever else is settled with them."""
    with closing(SQLiteStore(path, 10.0)) as store:
        store.declare("app:q", {})
        store.put("app:q", [Entry(str(n), b"raw", 4) for n in range(8)], None)
        leases = store.take("app:q", 8, 30_000).leases
        acks = [Ending(lease.id, lease.token, "ack") for lease in leases]
        late = acks[1]._replace(token=acks[1].token + 100)
        assert store.settle("app:q", [acks[0], late, acks[2]]) == [True, False, True]
        assert store.settle("app:q", [acks[0], acks[2]]) == [False, False]
        assert store.settle("app:q", [acks[1], acks[3]]) == [True, True]
        release = Ending(leases[4].id, leases[4].token, "release")
        assert store.settle("app:q", [acks[0], release, acks[5]]) == [False, True, True]
        counts = store.counts("app:q")
        assert (counts.ready, counts.leased) == (1, 2)


def test_a_retry_goes_behind_what_waits(path: str) -> None:
    """Also where it had the last place itself."""
    with closing(SQLiteStore(path, 10.0)) as store:
        store.declare("app:q", {})
        store.put("app:q", [Entry("a", b"raw", 4), Entry("b", b"raw", 4)], None)
        for expected in ("a", "b", "a", "b"):
            (lease,) = store.take("app:q", 1, 30_000).leases
            assert lease.id == expected
            assert store.settle("app:q", [Ending(lease.id, lease.token, "retry", attempts=1)]) == [True]
        store.put("app:q", [Entry("c", b"raw", 4)], None)
        assert [lease.id for lease in store.take("app:q", 3, 30_000).leases] == ["a", "b", "c"]


def apart(path: str) -> int:
    """Return how many messages stand apart in a file."""
    with closing(sqlite3.connect(path)) as db:
        return int(db.execute("SELECT count(*) FROM apart").fetchone()[0])


@pytest.mark.parametrize("end", ["ack", "remove", "clear", "move", "delete"])
def test_what_is_large_stands_apart_and_goes_with_its_message(path: str, end: str) -> None:
    """Small and large ones come out as they went in, and nothing is left of any."""
    raws = {"small": b"s" * 100, "large": b"l" * 10_000, "largest": b"x" * 500_000}
    with closing(SQLiteStore(path, 10.0)) as store:
        for queue in ("app:q", "app:q.dead"):
            store.declare(queue, {})
        store.put("app:q", [Entry(id, raw, 4) for id, raw in raws.items()], None)
        # Again under the same ids: nothing happens.
        assert store.put("app:q", [Entry(id, b"other" + raw, 4) for id, raw in raws.items()], None) == len(raws)
        assert apart(path) == 2
        assert dict(store.browse("app:q", 10, 0)) == raws
        assert store.counts("app:q").heads == [raws["small"]]
        if end == "ack":
            leases = store.take("app:q", 10, 30_000).leases
            assert {lease.id: lease.raw for lease in leases} == raws
            assert (
                store.settle("app:q", [Ending(one.id, one.token, "retry", attempts=1) for one in leases]) == [True] * 3
            )
            leases = store.take("app:q", 10, 30_000).leases
            assert {lease.id: lease.raw for lease in leases} == raws
            assert store.settle("app:q", [Ending(one.id, one.token, "ack") for one in leases]) == [True] * 3
        elif end == "remove":
            assert store.remove("app:q", list(raws)) == 3
        elif end == "clear":
            assert store.remove("app:q", None) == 3
        elif end == "move":
            for id, raw in raws.items():
                assert store.move("app:q", "app:q.dead", [Move(id, None, Entry(id, raw, 4))]) == [True]
            assert apart(path) == 2
            assert dict(store.browse("app:q.dead", 10, 0)) == raws
            store.delete("app:q.dead")
        else:
            store.delete("app:q")
    assert apart(path) == 0


def test_of_what_is_large_nothing_is_written_again(path: str) -> None:
    """Neither when it is taken, nor when it is acknowledged, as a row that is changed or overwritten would be."""
    with closing(SQLiteStore(path, 10.0)) as store, closing(sqlite3.connect(path, isolation_level=None)) as other:
        store.declare("app:q", {})
        store.put("app:q", [Entry(str(n), b"x" * 400_000, 4) for n in range(10)], None)
        other.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
        log = Path(f"{path}-wal")
        assert log.stat().st_size == 0
        leases = store.take("app:q", 10, 30_000).leases
        assert len(leases) == 10
        assert 0 < log.stat().st_size < 100_000
        assert all(store.settle("app:q", [Ending(lease.id, lease.token, "ack") for lease in leases]))
        assert log.stat().st_size < 400_000


def test_a_machine_that_sleeps_ends_no_lease(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody can renew one meanwhile; what is delayed becomes due."""
    with closing(SQLiteStore(path, 10.0)) as store:
        store.declare("app:q", {})
        store.put("app:q", [Entry("held", b"raw", 4), Entry("later", b"raw", 4, 600_000)], None)
        assert [lease.id for lease in store.take("app:q", 10, 30_000).leases] == ["held"]
        store.renew({"app:q": []}, 30_000, "consumer")
        now = machine.now
        for module in (sqlite, sqlite_rows):
            monkeypatch.setattr(module, "_since_start", lambda: now() + 3_600_000)

        assert [lease.id for lease in store.take("app:q", 10, 30_000).leases] == ["later"]
        counts = store.counts("app:q")
        assert (counts.ready, counts.delayed, counts.leased, counts.consumers) == (0, 0, 2, 1)


def test_who_writes_for_long_ends_no_lease(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody can renew one meanwhile."""
    with closing(SQLiteStore(path, 10.0)) as store:
        store.declare("app:q", {})
        store.put("app:q", [Entry("held", b"raw", 4)], None)
        assert [lease.id for lease in store.take("app:q", 10, 30_000).leases] == ["held"]
        store.renew({"app:q": []}, 30_000, "consumer")
        with monkeypatch.context() as patched:
            patched.setattr(sqlite, "monotonic", count(0.0, 60.0).__next__)
            store.put("app:q", [Entry("many", b"raw", 4)], None)
        awake = machine.awake
        monkeypatch.setattr(sqlite, "_awake", lambda: awake() + 60_000)

        assert [lease.id for lease in store.take("app:q", 10, 30_000).leases] == ["many"]
        counts = store.counts("app:q")
        assert (counts.leased, counts.consumers) == (2, 1)


def boot(path: str, *new: str) -> str:
    """Return by which start a file counts; have it count by another one."""
    with closing(sqlite3.connect(path, isolation_level=None)) as db:
        if new:
            db.execute("UPDATE boot SET id = ?", new)
        return str(db.execute("SELECT id FROM boot").fetchone()[0])


def test_after_another_start_no_lease_is_left(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """And what is delayed waits for the time of day, however much that is: it is gone through in parts."""
    monkeypatch.setattr(sqlite_boot, "PART", 2)
    with closing(SQLiteStore(path, 10.0)) as store:
        store.declare("app:q", {})
        store.put("app:q", [Entry("held", b"raw", 4)], None)
        store.put("app:q", [Entry(f"soon{n}", b"raw", 4, 3_600_000) for n in range(5)], None)
        store.put("app:q", [Entry(f"late{n}", b"raw", 4, 7_200_000) for n in range(2)], None)
        assert len(store.take("app:q", 10, 30_000).leases) == 1
    # An hour before this one, by a clock that had counted much further.
    boot(path, f"another {machine.started_at() - 3600}")
    with closing(sqlite3.connect(path)) as db:
        db.execute("UPDATE message SET moment = moment + 1000000000000, due = due - 3600000 WHERE state = 1")
        db.commit()

    with closing(SQLiteStore(path, 10.0)) as store:
        assert {lease.id: lease.deliveries for lease in store.take("app:q", 10, 30_000).leases} == {
            "held": 1, **{f"soon{n}": 0 for n in range(5)},
        }  # fmt: skip
        assert store.counts("app:q").delayed == 2
    assert boot(path).startswith(machine.BOOT_ID)


def test_a_container_with_an_id_of_its_own_ends_nobodys_lease(path: str) -> None:
    """It counts from the same start as all others on its machine, and leaves the file as it is."""
    with closing(SQLiteStore(path, 10.0)) as store:
        store.declare("app:q", {})
        store.put("app:q", [Entry("held", b"raw", 4)], None)
        assert len(store.take("app:q", 10, 30_000).leases) == 1
    known = boot(path, f"of-a-container {machine.started_at() - 1}")
    with closing(SQLiteStore(path, 10.0)) as store:
        assert store.take("app:q", 10, 30_000).leases == []
        assert store.counts("app:q").leased == 1
    assert boot(path) == known


def test_a_clock_that_nobody_has_set_yet_tells_no_start(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine without a clock of its own begins at the same time each time: what was leased before is free."""
    with closing(SQLiteStore(path, 10.0)) as store:
        store.declare("app:q", {})
        store.put("app:q", [Entry("held", b"raw", 4)], None)
        assert len(store.take("app:q", 10, 30_000).leases) == 1
        store.put("app:q", [Entry("later", b"raw", 4, 3_600_000)], None)
    monkeypatch.setattr(clock, "_OFFSET", -2e9)
    assert machine.started_at() < 0
    boot(path, f"another {machine.started_at()}")
    with closing(SQLiteStore(path, 10.0)) as store:
        assert [lease.id for lease in store.take("app:q", 10, 30_000).leases] == ["held"]
    with closing(SQLiteStore(path, 10.0)) as store:
        assert store.counts("app:q").leased == 1
    with closing(sqlite3.connect(path)) as db:
        # What is delayed waits no longer than it would have.
        (moment,) = db.execute("SELECT moment FROM message WHERE state = 1").fetchone()
    assert 3_500_000 < moment - machine.now() <= 3_600_000


def test_a_clock_that_is_set_starts_nothing(path: str) -> None:
    """The start is the same one, and its moment is noted anew."""
    with closing(SQLiteStore(path, 10.0)) as store:
        store.declare("app:q", {})
        store.put("app:q", [Entry("held", b"raw", 4)], None)
        assert len(store.take("app:q", 10, 30_000).leases) == 1
    # As a file of before has it, too.
    for known in (machine.BOOT_ID, f"{machine.BOOT_ID} {machine.started_at() - 1000}"):
        boot(path, known)
        with closing(SQLiteStore(path, 10.0)) as store:
            assert store.counts("app:q").leased == 1
        assert abs(int(boot(path).split()[-1]) - machine.started_at()) <= 1


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere nobody has such a clock")
def test_who_cannot_tell_the_start_is_refused(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the time of day every lease of the others would be over."""
    with closing(SQLiteStore(path, 10.0)) as store:
        store.ping()
    monkeypatch.setattr(sqlite_boot, "BOOT_ID", machine.TIME_OF_DAY)
    with closing(SQLiteStore(path, 10.0)) as store, pytest.raises(BrokerAway, match="boot_id") as caught:
        store.ping()
    assert not caught.value.retryable


def test_what_is_due_is_made_ready_in_parts(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A transaction is to have room on a disk that is nearly full; what is left is looked for at once."""
    monkeypatch.setattr(sqlite, "PART", 2)
    with closing(SQLiteStore(path, 10.0)) as store:
        store.declare("app:q", {})
        store.put("app:q", [Entry(str(n), b"raw", 4, 3_600_000) for n in range(5)], None)
        later = machine.now() + 3_600_001
        monkeypatch.setattr(sqlite, "_since_start", lambda: later)
        taken = store.take("app:q", 10, 30_000)
        assert (len(taken.leases), taken.more_in) == (2, 1)
        assert store.counts("app:q").ready == 3
        assert [len(store.take("app:q", 10, 30_000).leases) for _ in range(3)] == [2, 1, 0]


def test_a_long_queue_is_deleted_in_parts(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With all that is leased or delayed, and unless it is still wanted."""
    monkeypatch.setattr(sqlite, "_DROPPED", 2)
    with closing(SQLiteStore(path, 10.0)) as store:
        store.declare("app:q", {})
        store.declare("app:other", {})
        entries = [Entry(str(n), b"raw" * n * 1000, 4, n % 2 * 3_600_000) for n in range(1, 8)]
        for queue in ("app:q", "app:other"):
            store.put(queue, entries, None)
        store.take("app:q", 1, 30_000)
        assert not store.delete("app:q", if_empty=True)
        store.renew({"app:q": []}, 30_000, "consumer")
        assert not store.delete("app:q", if_unused=True)
        assert store.counts("app:q").ready + store.counts("app:q").delayed == 6
        with monkeypatch.context() as patched:
            # One step: else what comes in between, or what somebody has just taken, would be lost.
            patched.delattr(store.__class__, "_drop")
            assert not store.delete("app:q", if_empty=True, if_unused=True)
        assert store.delete("app:q")
        assert store.arguments("app:q") is None
        assert store.counts("app:other").ready == 3
    assert apart(path) == 6


def test_tokens_of_a_file_that_was_restored_are_new(path: str) -> None:
    """It has forgotten which it has given; whoever still has one is not to settle another delivery with it."""
    with closing(SQLiteStore(path, 10.0)) as store:
        store.declare("app:q", {})
        store.put("app:q", [Entry("a", b"raw", 4)], None)
        (first,) = store.take("app:q", 1, 30_000).leases
        with closing(sqlite3.connect(path, isolation_level=None)) as db:
            db.execute("UPDATE sequence SET value = 0")
            db.execute("UPDATE message SET state = 0, token = 0")
        (second,) = store.take("app:q", 1, 30_000).leases
        assert second.token > first.token
        assert store.settle("app:q", [Ending("a", first.token, "ack")]) == [False]


def test_a_file_that_is_replaced_while_it_is_opened_is_not_used(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody would see what is stored there."""
    with closing(SQLiteStore(path, 10.0)) as store:
        store.declare("app:q", {})
    whole = Path(path).read_bytes()

    def replaced(db: sqlite3.Connection, where: str) -> None:
        prepare(db, where)
        monkeypatch.setattr(sqlite_open, "prepare", prepare)
        Path(path).rename(path + ".old")
        Path(path).write_bytes(whole)

    monkeypatch.setattr(sqlite_open, "prepare", replaced)
    with closing(SQLiteStore(path, 10.0)) as store:
        with pytest.raises(BrokerAway, match="replaced while it was opened"):
            store.put("app:q", [Entry("a", b"raw", 4)], None)
        assert store.put("app:q", [Entry("a", b"raw", 4)], None) == 1
    with closing(SQLiteStore(path, 10.0)) as store:
        assert store.counts("app:q").ready == 1


def test_a_full_disk_takes_messages_again_when_they_are_handled(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file stays as large as it was, and has room."""
    free = SimpleNamespace(f_bavail=10 * 2**20, f_frsize=1, f_blocks=2**30)
    with closing(SQLiteStore(path, 10.0)) as store:
        store.declare("app:q", {})
        store.put("app:q", [Entry(str(n), bytes(2**20), 4) for n in range(12)], None)
        monkeypatch.setattr(os, "statvfs", lambda path: free)
        monkeypatch.setattr(store, "_disk", Disk(path))
        with pytest.raises(Internal, match="bytes are free"):
            store.put("app:q", [Entry("more", b"raw", 4)], None)
        leases = store.take("app:q", 100, 30_000).leases + store.take("app:q", 100, 30_000).leases
        assert len(leases) == 12
        store.settle("app:q", [Ending(lease.id, lease.token, "ack") for lease in leases])
        assert store.put("app:q", [Entry("more", b"raw", 4)], None) == 1


def test_a_database_without_a_log_is_not_used() -> None:
    """A commit is on disk only with one; SQLite itself says nothing where it can have none, as here in memory."""
    with pytest.raises(BrokerAway, match="no write-ahead log there") as caught:
        sqlite_open.connect(":memory:", 1.0)
    assert not caught.value.retryable
