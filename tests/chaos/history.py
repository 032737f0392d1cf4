"""What happened to each message, written down as it happens.

One file for each kind of event, one line for each event, one ``write`` for each line on a descriptor opened for
appending: a process that is killed at any instruction has written a line wholly or not at all.

================  =============================================================================
``attempted``     a publisher is about to publish the message, for the first time
``acked``         the publisher was told that the message is stored
``rejected``      the publisher was told that it may not be
``started``       a handler has begun
``done``          a handler has had its effect, and is about to return
================  =============================================================================
"""

from __future__ import annotations

import os
from pathlib import Path
from time import monotonic
from typing import Final, NamedTuple

EVENTS: Final = ("attempted", "acked", "rejected", "started", "done")


class Line(NamedTuple):
    """An event.

    Attributes:
        id: The message's id.
        attempt: Which attempt, for handlers; which try, for publishers.
        pid: Whose.
        at: Seconds of the machine's monotonic clock, the same for all its processes.
        text: More, without line breaks.
    """

    id: str
    attempt: int
    pid: int
    at: float
    text: str


class Writer:
    """Appends events. Safe in any thread and after a fork."""

    def __init__(self, folder: str | Path) -> None:
        self._files = {
            event: os.open(Path(folder) / event, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600) for event in EVENTS
        }

    def write(self, event: str, id: str, attempt: int = 1, text: str = "") -> None:
        """Append one event."""
        line = f"{id}\t{attempt}\t{os.getpid()}\t{monotonic():.6f}\t{' '.join(text.split())}\n"
        os.write(self._files[event], line.encode())

    def close(self) -> None:
        """Give the descriptors back."""
        for file in self._files.values():
            os.close(file)


class History:
    """Reads what was written.

    Args:
        folder: Where the files are; made if there are none.
    """

    def __init__(self, folder: str | Path) -> None:
        self._folder = Path(folder)
        for event in EVENTS:
            (self._folder / event).touch()

    def lines(self, event: str, id: str | None = None) -> list[Line]:
        """Return events of a kind, in the order in which they were written."""
        found = []
        for raw in (self._folder / event).read_text().splitlines():
            name, attempt, pid, at, text = raw.split("\t")
            if id is None or name == id:
                found.append(Line(name, int(attempt), int(pid), float(at), text))
        return found

    def ids(self, event: str) -> list[str]:
        """Return the ids of events of a kind, with repetitions."""
        return [raw.partition("\t")[0] for raw in (self._folder / event).read_text().splitlines()]

    def count(self, event: str) -> int:
        """Return how many events of a kind there are."""
        return (self._folder / event).read_bytes().count(b"\n")
