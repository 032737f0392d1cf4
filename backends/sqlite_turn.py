"""Waits for the turn to write to a SQLite file, which one connection at a time may.

SQLite itself waits 1, 2, 5, 10, 15 and so on up to 100 ms before it looks again, however soon the file is free
(``sqliteDefaultBusyCallback``). Whoever writes all the time, as a busy worker does, is there again before; the others
starve. Here everybody looks again soon. SQLite tells nobody that it is free: there is nothing else to wait for.
"""

from __future__ import annotations

import sqlite3
from time import monotonic, sleep
from typing import Final

#: Seconds before the second look, and between two of them at most. A transaction takes a third of a millisecond.
_FIRST: Final = 0.0002
_LONGEST: Final = 0.005
_GROWTH: Final = 1.3


def begin(db: sqlite3.Connection, timeout: float) -> None:
    """Begin a transaction that writes.

    Args:
        db: A connection that does not wait by itself.
        timeout: Seconds to wait at most.

    Raises:
        sqlite3.OperationalError: If the file is not free in time, or for any other reason.
    """
    until = monotonic() + timeout
    pause = _FIRST
    while True:
        try:
            db.execute("BEGIN IMMEDIATE")
        except sqlite3.OperationalError as error:
            if "locked" not in str(error) or monotonic() >= until:
                raise
        else:
            return
        sleep(pause)
        pause = min(pause * _GROWTH, _LONGEST)
