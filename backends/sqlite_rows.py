"""What SQLite's transactions do to rows, and what they ask of them. Each function runs within its caller's.

`sqlite_schema` has the tables.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Sequence
from typing import Any, Final

from kq import clock
from kq.backends.machine import awake as _awake
from kq.backends.machine import now as _since_start
from kq.backends.sqlite_schema import DELAYED, READY
from kq.backends.store import Ending, Entry, Move

#: Rows that one statement names at most; SQLite's own limit on parameters is far above.
CHUNK: Final = 500
#: Rows that one transaction makes ready, or has wait anew, at most.
PART: Final = 1_000
#: What was stored, wherever it stands.
RAW: Final = "CASE WHEN apart THEN (SELECT apart.raw FROM apart WHERE number = message.apart) ELSE here END"
#: A message, where it is under a lease of ours.
_MINE: Final = "WHERE queue = ? AND id = ? AND state = 2 AND token = ?"
_ACK: Final = f"DELETE FROM message {_MINE}"
#: Bytes of a message that fit on a page of SQLite's with what else is in its row; what has more stands apart.
_FITS: Final = 3_500


def time_of_day() -> int:
    """Return milliseconds since 1970, by which what outlives the machine's start is counted."""
    return int(clock.now() * 1000)


def consumers_of(db: sqlite3.Connection, queue: str) -> int:
    """Return how many consumers a queue has."""
    found = db.execute("SELECT count(*) FROM consumer WHERE queue = ? AND until > ?", (queue, _awake()))
    return int(found.fetchone()[0])


def arguments_of(db: sqlite3.Connection, queue: str) -> dict[str, Any] | None:
    """Return what a queue was made with; None if there is no such queue."""
    row = db.execute("SELECT arguments FROM queue WHERE name = ?", (queue,)).fetchone()
    return None if row is None else dict(json.loads(row[0]))


def count_of(db: sqlite3.Connection, queue: str, where: str) -> int:
    """Return how many messages of a queue are as ``where`` says."""
    return int(db.execute(f"SELECT count(*) FROM message WHERE queue = ? AND {where}", (queue,)).fetchone()[0])


def new_tokens(db: sqlite3.Connection, count: int) -> int:
    """Return the first of so many tokens in a row, which nobody has ever had.

    They are not before the time in microseconds: a file that is restored from a copy counts from there again.
    """
    least = time_of_day() * 1000 + count
    db.execute("UPDATE sequence SET value = max(value + ?, ?) WHERE name = 'token'", (count, least))
    last = int(db.execute("SELECT value FROM sequence WHERE name = 'token'").fetchone()[0])
    return last - count + 1


def move_one(db: sqlite3.Connection, source: str, target: str, move: Move, now: int) -> bool:
    """Carry a move out; False where the message is not there, or another one of the new id is."""
    if db.execute("SELECT 1 FROM message WHERE queue = ? AND id = ?", (target, move.entry.id)).fetchone():
        return False
    held = "state <> 2" if move.token is None else f"state = 2 AND token = {move.token:d}"
    gone = db.execute(f"DELETE FROM message WHERE queue = ? AND id = ? AND {held}", (source, move.id))
    if not gone.rowcount:
        return False
    insert(db, target, move.entry, now)
    return True


def insert(db: sqlite3.Connection, queue: str, entry: Entry, now: int) -> int:
    """Store a message behind all others, unless its id is there; return 1, or 0."""
    here, apart = entry.raw, 0
    if len(here) > _FITS:
        if db.execute("SELECT 1 FROM message WHERE queue = ? AND id = ?", (queue, entry.id)).fetchone():
            return 0
        apart = db.execute("INSERT INTO apart (raw) VALUES (?)", (here,)).lastrowid or 0
        here = b""
    # SQLite gives it a place: one more than the last (https://www.sqlite.org/autoinc.html).
    return db.execute(
        "INSERT INTO message (queue, id, priority, state, moment, due, expires, here, apart) "
        "VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT (queue, id) DO NOTHING",
        (
            queue,
            entry.id,
            entry.priority,
            DELAYED if entry.delay else READY,
            _since_start() + entry.delay,
            now + entry.delay,
            now + entry.ttl if entry.ttl else 0,
            here,
            apart,
        ),
    ).rowcount


def end_all(db: sqlite3.Connection, queue: str, endings: Sequence[Ending], now: int) -> list[bool]:
    """End leases, and tell of each whether it was there to be ended."""
    if len(endings) > 1 and all(ending.action == "ack" for ending in endings):
        db.execute("SAVEPOINT acks")
        keys = [(queue, ending.id, ending.token) for ending in endings]
        if db.executemany(_ACK, keys).rowcount == len(endings):
            return [True] * len(endings)
        # Some were not: once more, to learn which.
        db.execute("ROLLBACK TO acks")
    return [_end(db, queue, ending, now) for ending in endings]


def _end(db: sqlite3.Connection, queue: str, ending: Ending, now: int) -> bool:
    key = (queue, ending.id, ending.token)
    if ending.action == "ack":
        return db.execute(_ACK, key).rowcount == 1
    if ending.action == "release":
        kept = "UPDATE message SET state = 0, token = 0, deliveries = ?"
        return db.execute(f"{kept} {_MINE}", (ending.deliveries, *key)).rowcount == 1
    return (
        db.execute(
            "UPDATE message SET state = ?, moment = ?, due = ?, token = 0, deliveries = 0, "
            f"attempts = ?, crashes = ?, place = (SELECT max(place) + 1 FROM message) {_MINE}",
            (
                DELAYED if ending.delay else READY,
                _since_start() + ending.delay,
                now + ending.delay,
                ending.attempts,
                ending.crashes,
                *key,
            ),
        ).rowcount
        == 1
    )


def remember(db: sqlite3.Connection, queue: str, endings: Sequence[Ending], now: int) -> None:
    """Note what these acks complete, and forget more than that of what has been remembered long enough."""
    rows = [(queue, ending.completes, now + ending.keep) for ending in endings if ending.keep]
    db.executemany("INSERT OR REPLACE INTO completed VALUES (?, ?, ?)", rows)
    db.execute(
        "DELETE FROM completed WHERE (queue, id) IN "
        "(SELECT queue, id FROM completed WHERE until <= ? ORDER BY until LIMIT ?)",
        (now, CHUNK + len(rows)),
    )


def listeners_if_there(db: sqlite3.Connection, queue: str) -> list[str] | None:
    """Return whom to wake for a queue; None if there is no such queue."""
    rows = db.execute(
        "SELECT listener.path FROM queue LEFT JOIN listener ON listener.queue = queue.name WHERE queue.name = ?",
        (queue,),
    ).fetchall()
    return [path for (path,) in rows if path is not None] if rows else None


def listeners_of(db: sqlite3.Connection, queue: str) -> list[str]:
    """Return whom to wake for a queue."""
    return [row[0] for row in db.execute("SELECT path FROM listener WHERE queue = ?", (queue,))]
