"""The tables of a SQLite file, and how an older file gets them.

One table holds every message of every queue; ``state`` says where a message stands:

====  =========  ==========================================================
0     ready      taken in the order of ``priority`` (down) and ``place`` (up)
1     delayed    becomes ready at ``moment``
2     leased     under ``token``; ready again at ``moment`` unless renewed
====  =========  ==========================================================

A message is in its row (``here``), or, where it is large, in a table of its own under a number that the row has
(``apart``): SQLite writes a row as a whole, however little of it is changed, and a lease changes it.

A new message is placed behind all that there are. Tokens are never given twice: ``sequence`` counts them.

The time of day may jump, and must not end anybody's lease or delay: ``moment`` is read from clocks that count
since the machine's start; ``boot`` says of which start. After the next one no lease is left, and what is delayed
waits for the time of day in ``due``. A lease's clock stands still while the machine sleeps, for so does whoever would
renew it.
"""

from __future__ import annotations

import sqlite3
from typing import Final

from kq.errors import Invalid

READY: Final = 0
DELAYED: Final = 1
LEASED: Final = 2

#: What every file has; nothing of it changes what is there.
_TABLES: Final = """
CREATE TABLE IF NOT EXISTS queue (name TEXT PRIMARY KEY, arguments TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS message (
    place INTEGER PRIMARY KEY,
    queue TEXT NOT NULL,
    id TEXT NOT NULL,
    priority INTEGER NOT NULL,
    state INTEGER NOT NULL,
    moment INTEGER NOT NULL DEFAULT 0,
    due INTEGER NOT NULL DEFAULT 0,
    token INTEGER NOT NULL DEFAULT 0,
    expires INTEGER NOT NULL DEFAULT 0,
    attempts INTEGER NOT NULL DEFAULT 0,
    crashes INTEGER NOT NULL DEFAULT 0,
    deliveries INTEGER NOT NULL DEFAULT 0,
    here BLOB NOT NULL,
    apart INTEGER NOT NULL DEFAULT 0,
    UNIQUE (queue, id)
);
CREATE TABLE IF NOT EXISTS apart (number INTEGER PRIMARY KEY, raw BLOB NOT NULL);
CREATE INDEX IF NOT EXISTS message_ready ON message (queue, priority DESC, place) WHERE state = 0;
CREATE INDEX IF NOT EXISTS message_delayed ON message (queue, moment) WHERE state = 1;
CREATE INDEX IF NOT EXISTS message_leased ON message (queue, moment) WHERE state = 2;
CREATE TABLE IF NOT EXISTS sequence (name TEXT PRIMARY KEY, value INTEGER NOT NULL) WITHOUT ROWID;
INSERT OR IGNORE INTO sequence VALUES ('token', 0);
CREATE TABLE IF NOT EXISTS listener (queue TEXT, path TEXT, PRIMARY KEY (queue, path)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS consumer (queue TEXT, name TEXT, until INTEGER, PRIMARY KEY (queue, name)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS completed (
    queue TEXT, id TEXT, until INTEGER NOT NULL, PRIMARY KEY (queue, id)
) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS completed_until ON completed (until);
CREATE TABLE IF NOT EXISTS topology (one INTEGER PRIMARY KEY, version INTEGER NOT NULL, document TEXT NOT NULL);
INSERT OR IGNORE INTO topology VALUES (1, 0, '{}');
CREATE TABLE IF NOT EXISTS boot (one INTEGER PRIMARY KEY, id TEXT NOT NULL);
INSERT OR IGNORE INTO boot VALUES (1, '');
"""
#: However a message goes, what stands apart of it goes with it.
_TRIGGER: Final = """
CREATE TRIGGER IF NOT EXISTS message_gone AFTER DELETE ON message WHEN old.apart
BEGIN DELETE FROM apart WHERE number = old.apart; END
"""
#: What makes the tables of a version those of the next one, as far as creating what is not there does not.
_STEPS: Final = {
    # Leases and delays by a clock that nobody sets.
    1: """
ALTER TABLE message ADD COLUMN due INTEGER NOT NULL DEFAULT 0;
UPDATE message SET due = moment WHERE state = 1;
""",
    # Large messages stand apart; an older kq that has the file open is not to find those empty, but no column to read.
    # Places are not counted any more: that was one page more to write for each message.
    2: """
ALTER TABLE message RENAME COLUMN raw TO here;
ALTER TABLE message ADD COLUMN apart INTEGER NOT NULL DEFAULT 0;
DELETE FROM sequence WHERE name = 'place';
""",
    # Leases by a clock that stands still while the machine sleeps.
    3: """
UPDATE message SET state = 0, token = 0 WHERE state = 2;
DELETE FROM consumer;
""",
}
_VERSION: Final = 4


def prepare(db: sqlite3.Connection, path: str) -> None:
    """See that a file has all tables. It is written to only where something is missing.

    Args:
        db: A connection that waits by itself, in no transaction.
        path: The file, for people.

    Raises:
        Invalid: If it was made by a newer kq.
        sqlite3.DatabaseError: If it is none of ours, or cannot be written to.
    """
    if _version(db) == _VERSION:
        return
    db.execute("BEGIN IMMEDIATE")
    # Whoever came first has done it by now.
    version = _version(db)
    if version > _VERSION:
        raise Invalid(f"broker: {path} has schema {version}, this kq knows {_VERSION}; use a newer kq or another file")
    steps = [step for since, step in _STEPS.items() if 0 < version <= since]
    for script in (*steps, _TABLES):
        for statement in script.split(";"):
            db.execute(statement)
    db.execute(_TRIGGER)
    db.execute(f"PRAGMA user_version = {_VERSION}")
    db.execute("COMMIT")


def _version(db: sqlite3.Connection) -> int:
    return int(db.execute("PRAGMA user_version").fetchone()[0])
