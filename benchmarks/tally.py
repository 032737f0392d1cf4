"""Counts what handlers have done, in memory that all their processes share.

Each thread of each process has a slot of its own: nobody waits for anybody, and a count costs less than a microsecond.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import struct
import threading
from pathlib import Path
from time import monotonic
from typing import Final, NamedTuple

_HEAD: Final = struct.Struct("<Q")
#: Handled, when the first began, when the last began.
_SLOT: Final = struct.Struct("<Qdd")
_SAMPLE: Final = struct.Struct("<d")
_SLOTS: Final = 4096
_SIZE: Final = 64 + _SLOTS * _SLOT.size


class Count(NamedTuple):
    """What has been counted.

    Attributes:
        done: Messages handled.
        first: Seconds of the monotonic clock at which the first one began.
        last: The same of the last one.
    """

    done: int
    first: float
    last: float

    @property
    def rate(self) -> float:
        """Messages a second, from the first to the last: how long processes take to start is not in it."""
        return (self.done - 1) / max(1e-9, self.last - self.first)


class Tally:
    """Counts, in one process of several. Thread-safe.

    Args:
        path: A file that `create` has made.
    """

    def __init__(self, path: str | Path) -> None:
        self._path = Path(path)
        self._file = os.open(self._path, os.O_RDWR)
        self._begun = os.open(self._path.with_suffix(".begun"), os.O_RDWR | os.O_CREAT, 0o600)
        self._samples = os.open(self._path.with_suffix(".samples"), os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        self._map = mmap.mmap(self._file, _SIZE)
        self._mine = threading.local()
        self._taking = threading.Lock()

    @classmethod
    def create(cls, path: str | Path) -> Tally:
        """Make the file, and return a tally on it."""
        Path(path).write_bytes(bytes(_SIZE))
        return cls(path)

    def _slot(self) -> tuple[int, int, float]:
        # The file's lock is the process's: among its threads it keeps nobody out.
        with self._taking:
            return self._take_slot()

    def _take_slot(self) -> tuple[int, int, float]:
        fcntl.flock(self._file, fcntl.LOCK_EX)
        try:
            (taken,) = _HEAD.unpack_from(self._map, 0)
            if taken == _SLOTS:
                raise RuntimeError(f"expected at most {_SLOTS} threads that handle messages")
            _HEAD.pack_into(self._map, 0, taken + 1)
        finally:
            fcntl.flock(self._file, fcntl.LOCK_UN)
        return 64 + taken * _SLOT.size, 0, monotonic()

    def count(self, published_at: float = 0.0) -> None:
        """Count a message, and note how long it took to come if it says when it was published."""
        now = monotonic()
        try:
            place, done, first = self._mine.slot
        except AttributeError:
            place, done, first = self._slot()
        self._mine.slot = (place, done + 1, first)
        _SLOT.pack_into(self._map, place, done + 1, first, now)
        if published_at:
            os.write(self._samples, _SAMPLE.pack(now - published_at))

    def begin(self, number: int) -> bool:
        """Note that a message of this number is handled, and tell whether it is so for the first time."""
        is_first = os.pread(self._begun, 1, number) != b"1"
        os.pwrite(self._begun, b"1", number)
        return is_first

    def read(self) -> Count:
        """Return what all have counted so far."""
        (taken,) = _HEAD.unpack_from(self._map, 0)
        slots = [_SLOT.unpack_from(self._map, 64 + n * _SLOT.size) for n in range(taken)]
        used = [slot for slot in slots if slot[0]]
        if not used:
            return Count(0, 0.0, 0.0)
        return Count(sum(slot[0] for slot in used), min(slot[1] for slot in used), max(slot[2] for slot in used))

    def samples(self) -> list[float]:
        """Return the seconds that messages took from their publisher to their handler, in order of size."""
        raw = self._path.with_suffix(".samples").read_bytes()
        return sorted(value for (value,) in _SAMPLE.iter_unpack(raw))

    def close(self) -> None:
        """Give up the file's descriptors."""
        self._map.close()
        os.close(self._file)
        os.close(self._begun)
        os.close(self._samples)
