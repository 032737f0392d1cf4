"""Clocks that all processes of one machine share and that nobody sets: milliseconds since its start."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Final

from kq import clock


def _boot_id() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


_BOOT: Final = _boot_id()
_CLOCK: Final = getattr(time, "CLOCK_BOOTTIME", None)

#: Which start of the machine `now` and `awake` count from. Where that cannot be told it is the time of day, which may
#: jump.
BOOT_ID: Final = _BOOT if _BOOT and _CLOCK is not None else "the time of day"


def now() -> int:
    """Return the milliseconds since the machine's start, the time that it slept included."""
    if _CLOCK is None or not _BOOT:
        return int(clock.now() * 1000)
    return time.clock_gettime_ns(_CLOCK) // 1_000_000


def awake() -> int:
    """Return the milliseconds since the machine's start without the time that it slept, in which nobody renews a lease.

    Where there is no `now` it is the time of day as well.
    """
    if _CLOCK is None or not _BOOT:
        return now()
    return time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1_000_000
