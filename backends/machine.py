"""Clocks that all processes of one machine share and that nobody sets: milliseconds since its start.

Where there are none, as on macOS, they are the time of day.
"""

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

#: What stands for a start where the clocks are the time of day.
TIME_OF_DAY: Final = "the time of day"
#: Which start of the machine `now` and `awake` count from. Where that cannot be told it is the time of day, which may
#: jump.
BOOT_ID: Final = _BOOT if _BOOT and _CLOCK is not None else TIME_OF_DAY


def started_at() -> int:
    """Return when the machine started, in seconds since 1970 by the time of day as it is now; 0 where nobody can tell.

    Containers may have a `BOOT_ID` of their own, though they count from the same start.
    """
    return 0 if _CLOCK is None or not _BOOT else round(clock.now() - time.clock_gettime(_CLOCK))


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
