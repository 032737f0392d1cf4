"""``sqlite:///file.db``: a store in one file, for many processes of one machine.

Theory of operation
===================

`sqlite_schema` has the tables. Each primitive is one ``BEGIN IMMEDIATE`` transaction, so that writers queue up instead
of failing.

``journal_mode=WAL`` with ``synchronous=FULL``: a commit that returned is on disk
(https://www.sqlite.org/pragma.html#pragma_synchronous). WAL needs shared memory, so network file
systems are refused.

Waking other processes: a consumer binds a datagram socket and registers its path in ``listener``.
Whoever commits something that makes a message ready sends one byte to each listener of the queue.
Nothing polls, but for a process that has no place for a socket; one whose owner died is struck off by the first sender
that notices.
"""

from __future__ import annotations

import json
import socket
import sqlite3
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from threading import RLock
from time import monotonic
from typing import Any, ClassVar, Final
from uuid import uuid4

from kq import forking
from kq.backend import Capabilities, Role
from kq.backends.machine import awake as _awake
from kq.backends.machine import now as _since_start
from kq.backends.sqlite_error import SQLiteErrors
from kq.backends.sqlite_file import Disk, journal_size
from kq.backends.sqlite_listener import Listener, forget
from kq.backends.sqlite_open import Identity, connect, identity, wait_by_itself
from kq.backends.sqlite_rows import (
    CHUNK,
    PART,
    RAW,
    arguments_of,
    consumers_of,
    count_of,
    end_all,
    insert,
    listeners_if_there,
    listeners_of,
    move_one,
    new_tokens,
    remember,
    time_of_day,
)
from kq.backends.sqlite_schema import DELAYED, LEASED
from kq.backends.sqlite_turn import begin
from kq.backends.store import (
    AGAIN,
    TAKE_BYTES,
    Ahead,
    BrokerAway,
    Counts,
    Ending,
    Entry,
    Held,
    Lease,
    Lot,
    Move,
    Near,
    Renewed,
    Taken,
)
from kq.errors import Error
from kq.failure_log import logger
from kq.waker import Lookout, Waker

#: Seconds between two looks of a process that nobody can wake, and after which it tries again to be woken.
_LOOK: Final = 0.5
_DEAF_FOR: Final = 30.0
#: Rows that one transaction drops of a queue that is purged or deleted.
_DROPPED: Final = 5_000
#: Seconds after which a transaction has taken long. Where one follows the other that did, those of the dead do not end.
_LONG: Final = 1.0


class SQLiteStore(Near):
    """A store in a SQLite file. One connection, used by one thread at a time."""

    capabilities: ClassVar[Capabilities] = Capabilities(
        survives="the death of processes and of the machine",
        shared=True,
        deduplicates=True,
        priorities="always",
        counts_delayed=True,
        counts_in_flight=True,
        tells_age=True,
        remembers_completed=True,
    )

    def __init__(self, path: str, timeout: float) -> None:
        self._path = path
        self._disk = Disk(path)
        self._errors = SQLiteErrors(path)
        self._timeout = timeout
        # A signal's handler may close it, or fork, in the middle of a transaction of the same thread.
        self._lock = RLock()
        #: Whether a thread, which holds the lock, is in the middle of something.
        self._is_busy = False
        #: Until when it is known that there is no place for the socket on which others would wake us.
        self._deaf_until = 0.0
        self._connection: sqlite3.Connection | None = None
        #: Bytes of messages that are taken at once, as of `TAKE_BYTES`.
        self._take_bytes = TAKE_BYTES
        #: Which file the connection has open.
        self._identity: Identity | None = None
        self._listener: Listener | None = None
        #: Queues for which somebody may have rung and which `wait` has not returned since.
        self._rung: set[str] = set()
        self._waker = Waker()
        self._sender = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._sender.setblocking(False)
        self._closed = False
        forking.enrol(self, forking.Stage.OPENED)

    def ping(self) -> None:
        """See `Store.ping`."""
        with self._errors, self._turn(self._timeout):
            self._connect()

    def warnings(self) -> list[str]:
        """See `Store.warnings`."""
        self.ping()
        return []

    def acl(self, role: Role, queues: Sequence[str]) -> str:
        """Say that the file's permissions are all there is."""
        return (
            f"# {role}: SQLite has no accounts. Whoever may write the file and its folder, where SQLite keeps a\n"
            "# journal, can do everything; who may not can neither publish nor consume: grant both by the\n"
            "# permissions of the folder and of the file, to a user or a group of their own."
        )

    def declare(self, queue: str, arguments: Mapping[str, Any]) -> dict[str, Any] | None:
        """See `Store.declare`."""
        with self._transaction() as db:
            found = arguments_of(db, queue)
            if found is None:
                db.execute("INSERT INTO queue VALUES (?, ?)", (queue, json.dumps(dict(arguments))))
            return found

    def arguments(self, queue: str) -> dict[str, Any] | None:
        """See `Store.arguments`."""
        with self._reading() as db:
            return arguments_of(db, queue)

    def delete(self, queue: str, *, if_empty: bool = False, if_unused: bool = False) -> bool:
        """See `Store.delete`."""
        if not (if_empty or if_unused):
            # Else all of it is one step.
            self._drop(queue, "")
            self._forget_completed(queue)
        with self._transaction() as db:
            if if_empty and db.execute("SELECT 1 FROM message WHERE queue = ? LIMIT 1", (queue,)).fetchone():
                return False
            if if_unused and consumers_of(db, queue):
                return False
            db.execute("DELETE FROM message WHERE queue = ?", (queue,))
            db.execute("DELETE FROM completed WHERE queue = ?", (queue,))
            db.execute("DELETE FROM queue WHERE name = ?", (queue,))
            return True

    def put(self, queue: str, entries: Sequence[Entry], max_length: int | None) -> int | None:
        """See `Store.put`."""
        self._disk.reserve([len(entry.raw) for entry in entries], self._unused)
        with self._transaction() as db:
            listeners = listeners_if_there(db, queue)
            if listeners is None:
                return None
            accepted = len(entries)
            room = None
            if max_length is not None:
                # Of each state by itself: for that there are indexes.
                room = max_length - count_of(db, queue, "state = 0") - count_of(db, queue, "state = 1")
            now = time_of_day()
            for index, entry in enumerate(entries):
                if room is not None and room <= 0:
                    known = db.execute("SELECT 1 FROM message WHERE queue = ? AND id = ?", (queue, entry.id))
                    if known.fetchone() is None:
                        accepted = index
                        break
                added = insert(db, queue, entry, now)
                if room is not None:
                    room -= added
        self._notify(listeners)
        return accepted

    def send(self, lots: Sequence[Lot]) -> None:
        """See `Store.send`: a file has everybody wait."""

    def take(self, queue: str, limit: int, lease: int) -> Taken:
        """See `Store.take`."""
        with self._transaction() as db:
            now, since_start, awake = time_of_day(), _since_start(), _awake()
            # Not all that there may be: others wait, and a journal for all of it may have no room.
            over = "SELECT place FROM message WHERE queue = ? AND moment <= ? AND state ="
            db.execute(
                "UPDATE message SET state = 0, token = 0, deliveries = deliveries + 1 "
                f"WHERE place IN ({over} {LEASED} LIMIT ?)",
                (queue, awake, PART),
            )
            db.execute(f"UPDATE message SET state = 0 WHERE place IN ({over} {DELAYED} LIMIT ?)",
                       (queue, since_start, PART))  # fmt: skip
            rows, size = [], 0
            for row in db.execute(
                f"SELECT place, id, {RAW}, attempts, crashes, deliveries, expires FROM message "
                "WHERE queue = ? AND state = 0 ORDER BY priority DESC, place LIMIT ?",
                (queue, limit),
            ):
                rows.append(row)
                size += len(row[2])
                if size >= self._take_bytes:
                    break
            token = new_tokens(db, len(rows)) if rows else 0
            db.executemany(
                "UPDATE message SET state = 2, token = ?, moment = ? WHERE place = ?",
                [(token + index, awake + lease, row[0]) for index, row in enumerate(rows)],
            )
            soonest = []
            for state, moment in ((DELAYED, since_start), (LEASED, awake)):
                first = db.execute(f"SELECT min(moment) FROM message WHERE queue = ? AND state = {state}", (queue,))
                soonest += [found - moment for (found,) in first if found is not None]
        leases = [
            Lease(id, raw, token + index, attempts, crashes, deliveries, 0 < expires <= now)
            for index, (_, id, raw, attempts, crashes, deliveries, expires) in enumerate(rows)
        ]
        return Taken(leases, max(1, min(soonest)) if soonest else None)

    def settle(self, queue: str, endings: Sequence[Ending]) -> list[bool]:
        """See `Store.settle`."""
        listeners: list[str] = []
        with self._transaction() as db:
            now = time_of_day()
            settled = end_all(db, queue, endings, now)
            if any(ending.keep for ending in endings):
                remember(db, queue, [ending for ending, done in zip(endings, settled, strict=True) if done], now)
            if any(ending.action != "ack" for ending in endings):
                listeners = listeners_of(db, queue)
        self._notify(listeners)
        return settled

    def completed(self, queue: str, ids: Sequence[str]) -> set[str]:
        """See `Store.completed`."""
        found: set[str] = set()
        with self._reading() as db:
            now = time_of_day()
            for i in range(0, len(ids), CHUNK):
                part = ids[i : i + CHUNK]
                marks = ", ".join("?" * len(part))
                rows = db.execute(
                    f"SELECT id FROM completed WHERE queue = ? AND until > ? AND id IN ({marks})", (queue, now, *part)
                )
                found.update(row[0] for row in rows)
        return found

    def move(self, source: str, target: str, moves: Sequence[Move]) -> list[bool | Error]:
        """See `Store.move`."""
        with self._transaction() as db:
            now = time_of_day()
            moved: list[bool | Error] = [move_one(db, source, target, move, now) for move in moves]
            if any(moved):
                db.execute("INSERT OR IGNORE INTO queue VALUES (?, '{}')", (target,))
            listeners = listeners_of(db, target) if any(moved) else []
        self._notify(listeners)
        return moved

    def renew(self, held: Held, lease: int, consumer: str) -> Renewed:
        """See `Store.renew`."""
        renewed: Renewed = {}
        with self._transaction() as db:
            until = _awake() + lease
            for queue, pairs in held.items():
                db.execute("INSERT OR REPLACE INTO consumer VALUES (?, ?, ?)", (queue, consumer, until))
                if self._listener is not None and self._listener.covers([queue]):
                    # Somebody who could not see our socket for a moment may have struck us off.
                    db.execute("INSERT OR IGNORE INTO listener VALUES (?, ?)", (queue, self._listener.path))
                renewed[queue] = [
                    db.execute(
                        "UPDATE message SET moment = ? WHERE queue = ? AND id = ? AND state = 2 AND token = ?",
                        (until, queue, id, token),
                    ).rowcount
                    == 1
                    for id, token in pairs
                ]
        return renewed

    def leave(self, queues: Iterable[str], consumer: str) -> None:
        """See `Store.leave`."""
        with self._transaction() as db:
            gone = [(queue, consumer) for queue in queues]
            db.executemany("DELETE FROM consumer WHERE queue = ? AND name = ?", gone)
            db.execute("DELETE FROM consumer WHERE until < ?", (_awake(),))

    def counts(self, queue: str) -> Counts:
        """See `Store.counts`."""
        with self._reading() as db:
            held = count_of(db, queue, f"state = 2 AND moment > {_awake()}")
            delayed = count_of(db, queue, f"state = 1 AND moment > {_since_start()}")
            consumers = consumers_of(db, queue)
            # One indexed look at the head of each priority, however many messages wait.
            heads = [
                row[0]
                for level in range(10)
                for row in db.execute(
                    f"SELECT {RAW} FROM message WHERE queue = ? AND state = 0 AND priority = ? ORDER BY place LIMIT 1",
                    (queue, level),
                )
            ]
            return Counts(count_of(db, queue, "1") - held - delayed, delayed, held, consumers, heads)

    def browse(self, queue: str, limit: int, offset: int) -> list[tuple[str, bytes]]:
        """See `Store.browse`."""
        found: list[tuple[str, bytes]] = []
        size = 0
        with self._reading() as db:
            # Each state in the order of its own index: nothing is sorted, and what is passed over, or not asked for any
            # more, is not read.
            for state, order in ((0, "priority DESC, place"), (1, "moment")):
                rows = db.execute(
                    f"SELECT id, {RAW} FROM message WHERE queue = ? AND state = {state} "
                    f"ORDER BY {order} LIMIT ? OFFSET ?",
                    (queue, limit - len(found), offset),
                )
                for row in rows:
                    found.append(row)
                    size += len(row[1])
                    if size >= TAKE_BYTES:
                        return found
                if len(found) == limit:
                    break
                offset = 0 if found else max(0, offset - count_of(db, queue, f"state = {state}"))
        return found

    def look(self, queue: str, ids: Sequence[str]) -> Iterator[tuple[str, bytes]]:
        """See `Store.look`."""
        unique = list(dict.fromkeys(ids))
        again = f"SELECT id FROM message WHERE queue = ? AND id > ? || '{AGAIN}' AND id < ? || '{chr(ord(AGAIN) + 1)}'"
        with self._reading() as db:
            same = [key for id in unique for (key,) in db.execute(again, (queue, id, id))]
        for key in (*unique, *same):
            with self._reading() as db:
                row = db.execute(
                    f"SELECT id, {RAW} FROM message WHERE queue = ? AND id = ? AND state <> 2", (queue, key)
                ).fetchone()
            if row is not None:
                yield row

    def remove(self, queue: str, ids: Sequence[str] | None) -> int:
        """See `Store.remove`."""
        if ids is None:
            return self._drop(queue, "AND state <> 2")
        with self._transaction() as db:
            return sum(
                db.execute("DELETE FROM message WHERE queue = ? AND id = ? AND state <> 2", (queue, id)).rowcount
                for id in dict.fromkeys(ids)
            )

    def _drop(self, queue: str, which: str) -> int:
        """Drop messages of a queue, in parts: leases are to be renewed, and messages published, in between."""
        # A row of no queue: as long as it stands, what comes meanwhile is placed behind it, whatever has gone by then.
        mark = ("", uuid4().hex)
        with self._transaction() as db:
            end = db.execute(
                "INSERT INTO message (queue, id, priority, state, here) VALUES (?, ?, 0, 0, x'')", mark
            ).lastrowid
        removed, gone = 0, _DROPPED
        try:
            while gone == _DROPPED:
                with self._transaction() as db:
                    gone = db.execute(
                        f"DELETE FROM message WHERE place IN (SELECT place FROM message WHERE queue = ? {which} "
                        "AND place < ? LIMIT ?)",
                        (queue, end, _DROPPED),
                    ).rowcount
                removed += gone
        finally:
            with self._transaction() as db:
                db.execute("DELETE FROM message WHERE queue = ? AND id = ?", mark)
        return removed

    def _forget_completed(self, queue: str) -> None:
        """Forget what has been completed in a queue, in parts."""
        gone = _DROPPED
        while gone == _DROPPED:
            with self._transaction() as db:
                gone = db.execute(
                    "DELETE FROM completed WHERE queue = ?1 "
                    "AND id IN (SELECT id FROM completed WHERE queue = ?1 LIMIT ?2)",
                    (queue, _DROPPED),
                ).rowcount

    def read_topology(self) -> tuple[str, int]:
        """See `Store.read_topology`."""
        with self._reading() as db:
            document, version = db.execute("SELECT document, version FROM topology").fetchone()
            return document, version

    def write_topology(self, document: str, version: int) -> bool:
        """See `Store.write_topology`."""
        with self._transaction() as db:
            return (
                db.execute(
                    "UPDATE topology SET document = ?, version = version + 1 WHERE version = ?", (document, version)
                ).rowcount
                == 1
            )

    def wait(self, queues: Sequence[str], timeout: float, ahead: Ahead | None = None) -> list[str]:
        """See `Store.wait`."""
        if self._listener is None or not self._listener.covers(queues):
            if not self._listen(queues):
                # Whoever cannot be woken looks.
                Lookout(self._waker).ready(min(timeout, _LOOK))
                self._waker.drain()
            # Something may have arrived between the last look and the registration.
            return list(queues)
        assert self._listener is not None
        if self._rung.intersection(queues):
            timeout = 0.0
        ready = Lookout[Any](self._listener, self._waker).ready(timeout)
        self._waker.drain()
        if self._listener in ready and self._listener.drain():
            # It does not say for which of them; those that nobody waits for now are looked at when somebody does.
            self._rung.update(self._listener.queues)
        found = [queue for queue in queues if queue in self._rung]
        self._rung.difference_update(found)
        return found

    def wake(self) -> None:
        """See `Store.wake`."""
        self._waker.wake()

    def close(self) -> None:
        """See `Store.close`."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            listener, connection = self._listener, self._connection
            self._listener = self._connection = None
            self._waker.close()
            self._sender.close()
            try:
                if listener is not None and connection is not None:
                    connection.execute("DELETE FROM listener WHERE path = ?", (listener.path,))
            except sqlite3.Error:
                pass  # whoever sends next will strike it off
            finally:
                if listener is not None:
                    listener.close()
                if connection is not None:
                    connection.close()

    def __del__(self) -> None:
        connection = getattr(self, "_connection", None)
        if connection is not None:
            with _dropped.lock, suppress(sqlite3.Error):
                connection.close()

    def before_fork(self, timeout: float) -> None:
        """Close the connection, which nobody uses meanwhile, so that a child does not inherit it.

        SQLite keeps in memory which locks its process has on a file. A child would take its parent's for its own, which
        the system does not give it: it would wait for ever for one that is never released, or see its journal deleted.
        """
        if self._lock.acquire(timeout=timeout):
            self._disconnect()

    def after_fork_in_parent(self) -> None:
        """Let the connection be opened again, by the next who needs it."""
        self._lock.release()

    def after_fork_in_child(self) -> None:
        """The same; and a connection in the middle of something is the parent's, for good.

        One that is still there, for nobody has asked before the fork, is closed: what SQLite keeps in memory of it
        would have a new one do without the system's locks, which this process has none of.
        """
        if self._lock.acquire(blocking=False) and not self._is_busy:
            self._disconnect()
        self._lock = RLock()
        self._is_busy = False
        if self._connection is not None:
            _left_behind.append(self._connection)
            self._connection = None
        if self._listener is not None:
            # Its name is the parent's as well.
            self._listener.close(forget=False)
            self._listener = None

    # Connection and transactions.

    def _connect(self) -> sqlite3.Connection:
        if self._closed:
            raise BrokerAway("the SQLite store is closed", details={"reason": "unavailable"})
        if self._connection is None:
            self._connection, self._identity = connect(self._path, self._timeout)
            # All that is taken at once goes through the journal.
            self._take_bytes = min(TAKE_BYTES, 2 * journal_size(self._path))
        return self._connection

    def _see_that_it_is_free(self) -> None:
        """Refuse a signal's handler whose thread, which holds the lock, is in the middle of something."""
        if self._is_busy:
            raise BrokerAway(
                f"{self._path}: this thread is in the middle of something there; a signal's handler cannot use it",
                details={"reason": "unavailable"},
            )

    def _unused(self) -> int:
        """Return how many bytes of the file hold nothing."""
        with self._reading() as db:
            return int(
                db.execute("PRAGMA freelist_count").fetchone()[0] * db.execute("PRAGMA page_size").fetchone()[0]
            )  # fmt: skip

    @contextmanager
    def _transaction(self, patience: float | None = None) -> Iterator[sqlite3.Connection]:
        """Write: all of the block, or nothing.

        Args:
            patience: Seconds to wait for those who write at most; None for as long as any call may take.
        """
        with self._errors, self._turn(self._timeout if patience is None else patience) as left:
            self._see_that_it_is_free()
            self._is_busy = True
            try:
                db = self._connect()
                try:
                    _roll_back(db)
                    begin(db, left)
                    began = monotonic()
                    yield db
                    _make_up_for(db, monotonic() - began)
                    self._see_that_it_is_there()
                    db.execute("COMMIT")
                except BaseException as error:
                    # A commit that fails (a full disk) leaves the transaction open, too.
                    _roll_back(db)
                    if isinstance(error, BrokerAway) or (
                        isinstance(error, sqlite3.DatabaseError) and not isinstance(error, sqlite3.OperationalError)
                    ):
                        self._disconnect()
                    raise
            finally:
                self._is_busy = False

    @contextmanager
    def _turn(self, patience: float) -> Iterator[float]:
        """Have the connection for this thread alone, and yield how many seconds are left of ``patience``."""
        # Another one after a fork in the middle of it.
        lock: Any = self._lock
        was_ours = lock._is_owned()
        has_it = False
        try:
            has_it = lock.acquire(blocking=False)
            left = patience
            if not has_it:
                until = monotonic() + patience
                has_it = lock.acquire(timeout=patience)
                left = max(0.0, until - monotonic())
            if not has_it:
                text = f"{self._path}: another thread of this process has been busy there for {patience:g} s"
                raise BrokerAway(text, details={"reason": "timeout"})
            yield left
        finally:
            # A signal's handler may raise before we could note that we have it.
            if has_it or (not was_ours and lock._is_owned()):
                lock.release()

    def _see_that_it_is_there(self) -> None:
        """Refuse a file that somebody has deleted or replaced: nobody else would see what we store."""
        if identity(self._path) != self._identity:
            raise BrokerAway(
                f"{self._path} has been deleted or replaced under us; connecting anew",
                details={"reason": "unavailable"},
            )

    def _disconnect(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            with suppress(sqlite3.Error):
                connection.close()

    @contextmanager
    def _reading(self) -> Iterator[sqlite3.Connection]:
        with self._errors, self._turn(self._timeout) as left:
            self._see_that_it_is_free()
            self._is_busy = True
            try:
                if self._connection is not None and (identity(self._path) or self._identity) != self._identity:
                    # Somebody has put another file in its place: what there is stands there. Where there is none yet,
                    # none is to be made by whoever only reads.
                    self._disconnect()
                db = self._connect()
                try:
                    _roll_back(db)
                    # Hardly ever: while somebody opens the file after a crash, or closes it as the last one.
                    wait_by_itself(db, left)
                    db.execute("BEGIN")
                    yield db
                finally:
                    _roll_back(db)
                    wait_by_itself(db, 0.0)
            finally:
                self._is_busy = False

    # Waking each other.

    def _listen(self, queues: Sequence[str]) -> bool:
        """Have others wake us; False where there is no place for a socket."""
        if monotonic() < self._deaf_until:
            return False
        try:
            listener = self._listener or Listener()
        except OSError as error:
            if not self._deaf_until:
                logger.warning(
                    "%s: nobody can wake this process, which looks every %g s instead: no socket can be had (%s); "
                    "if it is for want of a folder for temporary files, set TMPDIR to one that this user may write to",
                    self._path, _LOOK, error, extra={"action": "deaf"},
                )  # fmt: skip
            self._deaf_until = monotonic() + _DEAF_FOR
            return False
        # Those of before as well, which are only not waited for at the moment.
        queues = sorted(listener.queues.union(queues))
        try:
            with self._transaction() as db:
                db.execute("DELETE FROM listener WHERE path = ?", (listener.path,))
                db.executemany("INSERT INTO listener VALUES (?, ?)", [(queue, listener.path) for queue in queues])
        except BaseException:
            if listener is not self._listener:
                listener.close()
            raise
        listener.queues = frozenset(queues)
        self._listener = listener
        return True

    def _notify(self, paths: Iterable[str]) -> None:
        gone = []
        for path in paths:
            try:
                self._sender.sendto(b"!", path)
            except (ConnectionRefusedError, FileNotFoundError):
                gone.append(path)
                forget(path)
            except OSError:
                pass  # most likely its buffer is full of wake-ups already; it says nothing of the owner
        if gone:
            # What was to be made known is committed: whether the dead can be struck off changes nothing, and nobody is
            # to wait for it.
            with suppress(Error), self._transaction(patience=0.0) as db:
                db.executemany("DELETE FROM listener WHERE path = ?", [(path,) for path in gone])


def _roll_back(db: sqlite3.Connection) -> None:
    """End the transaction, if any: a caller who was interrupted at the wrong moment has left one open."""
    if db.in_transaction:
        db.execute("ROLLBACK")


def _make_up_for(db: sqlite3.Connection, seconds: float) -> None:
    """Have leases end later by as much as a transaction took that took long: nobody could renew them meanwhile."""
    if seconds >= _LONG:
        db.execute(
            "UPDATE message SET moment = moment + ? "
            "WHERE place IN (SELECT place FROM message INDEXED BY message_leased WHERE state = 2)",
            (int(1000 * seconds),),
        )
        db.execute("UPDATE consumer SET until = until + ?", (int(1000 * seconds),))


class _Dropped:
    """What a fork waits for while SQLite closes what nobody has closed: a lock of its own is held meanwhile."""

    def __init__(self) -> None:
        self.lock = RLock()
        forking.enrol(self, forking.Stage.DROPPED)

    def before_fork(self, timeout: float) -> None:
        """Have nothing closed from now on."""
        self.lock.acquire(timeout=timeout)

    def after_fork_in_parent(self) -> None:
        """Have it closed again."""
        self.lock.release()

    def after_fork_in_child(self) -> None:
        """Whoever closed something is not here."""
        self.lock = RLock()


_dropped = _Dropped()
#: Of a parent's, kept from the garbage collector, which would close them.
_left_behind: list[sqlite3.Connection] = []
