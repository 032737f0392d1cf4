"""Leases and delays of a SQLite file after another start of the machine, whose clocks they were counted by.

``boot`` says of which start: its id, and when it was, for a container may have an id of its own although it counts from
the same start, and whoever opens the file there is not to end what others hold.
"""

from __future__ import annotations

import os
import sqlite3
import sys
from contextlib import suppress
from typing import Final, NamedTuple

from kq import clock
from kq.backends.machine import BOOT_ID, TIME_OF_DAY, started_at
from kq.backends.machine import now as _since_start
from kq.backends.sqlite_rows import PART, time_of_day
from kq.backends.store import BrokerAway

#: Seconds by which two moments of a start differ at most: they are rounded, and a clock is corrected.
_SAME: Final = 2


class _Start(NamedTuple):
    """A start of the machine: its id, and its moment by the time of day, in seconds since 1970, where it is known."""

    id: str
    moment: int | None


def follow(db: sqlite3.Connection, path: str) -> None:
    """See that leases and delays are counted from this start of the machine.

    After another one no lease is left, and what is delayed waits until the time of day that it was delayed to.

    Args:
        db: A connection that waits by itself, in no transaction.
        path: The file, for people.

    Raises:
        BrokerAway: If this process cannot tell of which start it is, and others could.
    """
    # The clock of a machine that has just started may be one that nobody has set yet, and as it was at its last start.
    is_set = clock.now() + _SAME >= _written_at(path)

    def is_same(start: _Start) -> bool:
        if start.id == BOOT_ID:
            return True
        return is_set and TIME_OF_DAY not in (start.id, BOOT_ID) and _is_near(start)

    was = _known(db)
    if is_same(was) and _is_near(was):
        return
    if BOOT_ID == TIME_OF_DAY and sys.platform == "linux" and was.id not in ("", TIME_OF_DAY):
        raise BrokerAway(
            f"{path}: others count leases by the machine's clock, and this process, which cannot read "
            "/proc/sys/kernel/random/boot_id, would end them; let it read that (for systemd: ProcSubset=all), or use "
            "Redis or RabbitMQ",
            details={"reason": "refused"},
            retryable=False,
        )
    if not is_same(was):
        # In parts, each of which has room in a journal; whoever else comes meanwhile does the same, and it is the same.
        place: int | None = 0
        # Where the clock is not set yet, what is delayed would wait for years by it.
        time = max(time_of_day(), int(_written_at(path) * 1000))
        while place is not None and not is_same(_known(db)):
            place = _reckon(db, place, time)
    db.execute("BEGIN IMMEDIATE")
    if not is_same(_known(db)):
        db.execute("UPDATE message SET state = 0, token = 0, deliveries = deliveries + 1 WHERE state = 2")
        db.execute("DELETE FROM consumer")
    db.execute("UPDATE boot SET id = ?", (f"{BOOT_ID} {started_at()}",))
    db.execute("COMMIT")


def _known(db: sqlite3.Connection) -> _Start:
    """Return by which start a file's leases and delays are counted."""
    text = db.execute("SELECT id FROM boot").fetchone()[0]
    id, _, moment = text.rpartition(" ")
    # Files had no moment once.
    return _Start(id, int(moment)) if moment.removeprefix("-").isdecimal() else _Start(text, None)


def _is_near(start: _Start) -> bool:
    return start.moment is not None and abs(start.moment - started_at()) <= _SAME


def _written_at(path: str) -> float:
    """Return when a file was written to last, by the time of day as it was then."""
    times = [0.0]
    for name in (path, f"{path}-wal"):
        with suppress(OSError):
            times.append(os.stat(name).st_mtime)
    return max(times)


def _reckon(db: sqlite3.Connection, place: int, time: int) -> int | None:
    """Have some of what is delayed wait by this start's clock, from a place on; return the next, None at the end."""
    db.execute("BEGIN IMMEDIATE")
    rows = db.execute("SELECT place FROM message WHERE state = 1 AND place > ? ORDER BY place LIMIT ?", (place, PART))
    places = [row[0] for row in rows]
    if places:
        db.execute(
            "UPDATE message SET moment = max(0, due - ?) + ? WHERE state = 1 AND place > ? AND place <= ?",
            (time, _since_start(), place, places[-1]),
        )
    db.execute("COMMIT")
    return places[-1] if places else None
