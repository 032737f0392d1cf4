"""The time of day, for moments that are written down. What only lasts is measured with `time.monotonic`.

Clocks jump, and those of two machines differ: nothing that decides who owns a message is read from this one.
"""

from __future__ import annotations

import os
import time
from typing import Final

#: Seconds that this process's clock is wrong by, for tests.
_OFFSET: Final = float(os.environ.get("KQ_TEST_CLOCK_OFFSET") or 0)


def now() -> float:
    """Return the seconds since the epoch."""
    return time.time() + _OFFSET
