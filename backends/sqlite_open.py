"""Opens a SQLite file: how it keeps what is stored, what is in it, and which file it is."""

from __future__ import annotations

import os
import sqlite3
from typing import Final

from kq.backends.sqlite_boot import follow
from kq.backends.sqlite_file import check_place, journal_size
from kq.backends.sqlite_schema import prepare
from kq.backends.store import BrokerAway

#: How much of the journal stays when nothing is in it, as a multiple of what it usually has.
_STAYS: Final = 4
#: Bytes of one of its pages.
_PAGE: Final = 4096

#: Which file it is, whatever it is called.
Identity = tuple[int, int]


def connect(path: str, timeout: float) -> tuple[sqlite3.Connection, Identity | None]:
    """Open a file, which is made and completed where that is needed, for a connection that does not wait by itself.

    Args:
        path: The file.
        timeout: Seconds to wait at most for others who write.

    Returns:
        A connection, for any thread, and which file it has open.

    Raises:
        BrokerAway: If the place is not one for such a file, or it has been replaced meanwhile.
        Invalid: If it was made by a newer kq.
        sqlite3.Error: If it is none of ours, or cannot be opened.
    """
    check_place(path)
    before = identity(path)
    db = sqlite3.connect(path, timeout=timeout, isolation_level=None, check_same_thread=False, cached_statements=64)
    try:
        _keep_log(db, path)
        db.execute("PRAGMA synchronous = FULL")
        # On macOS a disk is not told to write otherwise; elsewhere these have no effect.
        db.execute("PRAGMA fullfsync = ON")
        db.execute("PRAGMA checkpoint_fullfsync = ON")
        # Some build SQLite so that it overwrites all that is deleted: as many bytes again for each message.
        db.execute("PRAGMA secure_delete = FAST")
        size = journal_size(path)
        db.execute(f"PRAGMA wal_autocheckpoint = {size // _PAGE}")
        # What a large transaction has taken is not kept from others for ever.
        db.execute(f"PRAGMA journal_size_limit = {size * _STAYS}")
        prepare(db, path)
        follow(db, path)
        wait_by_itself(db, 0.0)
        after = identity(path)
        if before not in (None, after):
            raise BrokerAway(
                f"{path} has been deleted or replaced while it was opened; connecting anew",
                details={"reason": "unavailable"},
            )
    except BaseException:
        db.close()
        raise
    return db, after


def identity(path: str) -> Identity | None:
    """Return which file there is; None where there is none."""
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_dev, found.st_ino


def wait_by_itself(db: sqlite3.Connection, seconds: float) -> None:
    """Have SQLite wait for others, in its own way, or not at all."""
    db.execute(f"PRAGMA busy_timeout = {round(seconds * 1000)}")


def _keep_log(db: sqlite3.Connection, path: str) -> None:
    # Changing the mode needs the file for itself for a moment: only where it is not set yet.
    mode = db.execute("PRAGMA journal_mode").fetchone()[0]
    if mode != "wal":
        mode = db.execute("PRAGMA journal_mode = WAL").fetchone()[0]
    if mode != "wal":
        raise BrokerAway(
            f"{path}: SQLite can keep no write-ahead log there (journal_mode stays {mode}), for which processes have "
            "to share memory; use a local disk",
            details={"reason": "refused"},
            retryable=False,
        )
