"""What a child is running, in memory that outlives it.

One slot a handler: the job's tag and when it started, written by the child before the handler starts
and cleared after it. The supervisor reads the table of a child that died and knows whom to charge, and
that of a living one to find who is late. Nothing is sent for it: a shared page costs no system call.
"""

from __future__ import annotations

import mmap
import os
import tempfile
from struct import Struct
from typing import NamedTuple

#: Tag (0: free) and start, in seconds of the machine's monotonic clock.
_SLOT = Struct("<Qd")


class Running(NamedTuple):
    """A handler that runs, or ran when its process died."""

    tag: int
    started_at: float


class SlotTable:
    """``count`` slots in a shared file without a name. Each slot has one writer."""

    def __init__(self, count: int, fd: int | None = None) -> None:
        self.count = count
        size = max(1, count) * _SLOT.size
        if fd is None:
            with tempfile.TemporaryFile() as file:
                file.truncate(size)
                self.fd = os.dup(file.fileno())
        else:
            self.fd = fd
        self._memory = mmap.mmap(self.fd, size)

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

    def close(self) -> None:
        """Give the memory back."""
        self._memory.close()
        os.close(self.fd)
