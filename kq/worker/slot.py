"""What a child is running, and what it has done but not yet said, in memory that outlives it.

One slot a handler: the job's tag and when it started, written by the child before the handler starts
and cleared after it; and the tag once more when its time limit has struck. The supervisor reads the table
of a child that died and knows whom to charge, and that of a living one to find who is late. Behind the
slots stand the tags of jobs that are done and whose results wait in the child to be sent together: a crash
does not undo them. Nothing is sent for any of it: a shared page costs no system call.

The two processes share no lock. So each number is one aligned word, written at once, and in an order
that makes no sense of half an entry: a start before its tag, a tag before the count that includes it.
"""

from __future__ import annotations

import mmap
import os
from typing import NamedTuple

#: Bytes of a number, and numbers of a slot.
_WORD = 8
_SLOT = 3
#: Finished jobs whose results may wait to be sent.
UNSENT_MAX = 256


class Running(NamedTuple):
    """A handler that runs, or ran when its process died."""

    tag: int
    started_at: float
    #: Whether it has been told that its time is over.
    is_struck: bool = False


class SlotTable:
    """``count`` slots in a shared file without a name. Each slot has one writer, but for `strike`."""

    def __init__(self, count: int, fd: int | None = None) -> None:
        self.count = count
        size = (_SLOT * count + 1 + UNSENT_MAX) * _WORD
        if fd is None:
            self.fd = _shared(size)
        else:
            self.fd = fd
        self._memory = mmap.mmap(self.fd, size)
        # Slot i: tag in word 3i, start in word 3i + 1, tag of what was struck in word 3i + 2. Then how many tags are
        # unsent, and these.
        self._tags = memoryview(self._memory).cast("Q")
        self._starts = memoryview(self._memory).cast("d")
        self._unsent = _SLOT * count

    def enter(self, slot: int, tag: int, started_at: float) -> None:
        """Note that a handler starts.

        Args:
            slot: Whose.
            tag: The job's; not 0.
            started_at: Seconds of the machine's monotonic clock.
        """
        self._starts[_SLOT * slot + 1] = started_at
        self._tags[_SLOT * slot] = tag

    def postpone(self, slot: int, seconds: float) -> None:
        """Have a handler count as started so much later: it was kept from running for as long."""
        self._starts[_SLOT * slot + 1] += seconds

    def strike(self, slot: int, tag: int) -> None:
        """Note that a handler has been told that its time is over. Not the slot's writer may say so."""
        # As in `leave`.
        try:  # noqa: SIM105
            self._tags[_SLOT * slot + 2] = tag
        except ValueError:
            pass

    def leave(self, slot: int) -> None:
        """Note that it has ended, and that this has been reported."""
        # The table may be closed by then, by whoever took the report. Not with `suppress`, which takes longer than the
        # rest, for each message.
        try:  # noqa: SIM105
            self._tags[_SLOT * slot] = 0
        except ValueError:
            pass

    def running(self) -> list[Running]:
        """Return what runs."""
        found = []
        for i in range(0, _SLOT * self.count, _SLOT):
            tag = self._tags[i]
            if tag:
                started_at = self._starts[i + 1]
                is_struck = self._tags[i + 2] == tag
                # The slot may have changed hands in between: then it belongs to one that has just started.
                if self._tags[i] == tag:
                    found.append(Running(tag, started_at, is_struck))
        return found

    def add_unsent(self, index: int, tag: int) -> None:
        """Note that a job is done, as the ``index``-th of those whose results wait."""
        self._tags[self._unsent + 1 + index] = tag
        self._tags[self._unsent] = index + 1

    def clear_unsent(self) -> None:
        """Note that no result waits."""
        # As in `leave`.
        try:  # noqa: SIM105
            self._tags[self._unsent] = 0
        except ValueError:
            pass

    def unsent(self) -> list[int]:
        """Return the tags of done jobs whose results waited."""
        first = self._unsent + 1
        return list(self._tags[first : first + min(self._tags[self._unsent], UNSENT_MAX)])

    def close(self) -> None:
        """Give the memory back."""
        self._tags.release()
        self._starts.release()
        self._memory.close()
        os.close(self.fd)


def _shared(size: int) -> int:
    """Return a descriptor of memory to be shared: all of it there, for a page that is missing kills who touches it.

    Raises:
        OSError: If there is not enough.
    """
    if hasattr(os, "memfd_create"):
        fd = os.memfd_create("kq-slots")
        os.truncate(fd, size)
        return fd
    import tempfile

    with tempfile.TemporaryFile() as file:
        file.write(bytes(size))
        file.flush()
        return os.dup(file.fileno())
