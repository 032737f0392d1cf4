"""What a child is running, and what it has done but not yet said, in memory that outlives it.

One slot a handler: the job's tag and when it started, written by the child before the handler starts
and cleared after it. The supervisor reads the table of a child that died and knows whom to charge, and
that of a living one to find who is late. Behind the slots stand the tags of jobs that are done and
whose results wait in the child to be sent together: a crash does not undo them. Nothing is sent for any
of it: a shared page costs no system call.
"""

from __future__ import annotations

import mmap
import os
import tempfile
from struct import Struct
from typing import NamedTuple

#: Tag (0: free) and start, in seconds of the machine's monotonic clock.
_SLOT = Struct("<Qd")
#: A tag, or how many there are.
_TAG = Struct("<Q")
#: Finished jobs whose results may wait to be sent.
UNSENT_MAX = 256


class Running(NamedTuple):
    """A handler that runs, or ran when its process died."""

    tag: int
    started_at: float


class SlotTable:
    """``count`` slots in a shared file without a name. Each slot has one writer."""

    def __init__(self, count: int, fd: int | None = None) -> None:
        self.count = count
        size = self.size_of(count)
        self._unsent_at = count * _SLOT.size
        if fd is None:
            with tempfile.TemporaryFile() as file:
                file.truncate(size)
                self.fd = os.dup(file.fileno())
        else:
            self.fd = fd
        self._memory = mmap.mmap(self.fd, size)

    @staticmethod
    def size_of(count: int) -> int:
        """Return the bytes that ``count`` slots and the unsent tags take."""
        return count * _SLOT.size + (1 + UNSENT_MAX) * _TAG.size

    def enter(self, slot: int, tag: int, started_at: float) -> None:
        """Note that a handler starts."""
        _SLOT.pack_into(self._memory, slot * _SLOT.size, tag, started_at)

    def leave(self, slot: int) -> None:
        """Note that it has ended."""
        _SLOT.pack_into(self._memory, slot * _SLOT.size, 0, 0.0)

    def running(self) -> list[Running]:
        """Return what runs."""
        entries = (_SLOT.unpack_from(self._memory, i * _SLOT.size) for i in range(self.count))
        return [Running(tag, started_at) for tag, started_at in entries if tag]

    def add_unsent(self, index: int, tag: int) -> None:
        """Note that a job is done, as the ``index``-th of those whose results wait."""
        _TAG.pack_into(self._memory, self._unsent_at + (1 + index) * _TAG.size, tag)
        _TAG.pack_into(self._memory, self._unsent_at, index + 1)

    def clear_unsent(self) -> None:
        """Note that no result waits."""
        _TAG.pack_into(self._memory, self._unsent_at, 0)

    def unsent(self) -> list[int]:
        """Return the tags of done jobs whose results waited."""
        (count,) = _TAG.unpack_from(self._memory, self._unsent_at)
        first = self._unsent_at + _TAG.size
        return [_TAG.unpack_from(self._memory, first + i * _TAG.size)[0] for i in range(min(count, UNSENT_MAX))]

    def close(self) -> None:
        """Give the memory back."""
        self._memory.close()
        os.close(self.fd)
