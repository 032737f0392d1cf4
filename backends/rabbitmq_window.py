"""How wide the windows of a feed are to be: how many messages of each queue RabbitMQ may push at most.

A wide window hoards what others could run, and what it brings waits before anything of another queue; a narrow one
has the broker wait for answers, and work for each few messages.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import ceil, inf
from typing import Final, NamedTuple

import msgspec

#: Seconds between two changes, up and down.
WIDEN_EVERY: Final = 0.05
NARROW_AFTER: Final = 5.0
#: How much wider than what is wanted the windows of all queues together are at first: some are empty.
_SHARES: Final = 4
#: By how much a window grows that was not enough, and how much too wide one is that shrinks.
_FACTOR: Final = 4


class Demand(NamedTuple):
    """What is wanted of a queue.

    Attributes:
        wanted: Unsettled messages of it that the worker would hold, at most.
        here: How many have come and are not settled.
    """

    wanted: int
    here: int


class Widen(msgspec.Struct, frozen=True):
    """Windows that do not bring what is wanted, and what they are to be; 0 is no subscription."""

    windows: Mapping[str, int]


class Narrow(msgspec.Struct, frozen=True):
    """Windows that have been too wide for long, and what they are to be."""

    windows: Mapping[str, int]


class Windows:
    """Decides when windows change; changes none. One thread's.

    Args:
        most: The widest window.

    Attributes:
        widen_at: When windows that are too narrow may be widened, where it was too soon; else infinity.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._changed_at = -inf
        self._narrow_since: float | None = None
        self.widen_at = inf

    def changed(self, now: float) -> None:
        """Take note that windows have been changed."""
        self._changed_at = now
        self.widen_at = inf

    def hurry(self) -> None:
        """Let the next change come at once: the last one has not brought all that it could."""
        self._changed_at = -inf
        self.widen_at = inf

    def decide(
        self, windows: Mapping[str, int], demands: Mapping[str, Demand], *, is_enough: bool, now: float
    ) -> Widen | Narrow | None:
        """Return what is to be changed, or None.

        Args:
            windows: By queue.
            demands: Of the same queues.
            is_enough: Whether as much as is wanted has come already; then no window is widened.
            now: Seconds on a clock that only goes forward.
        """
        self.widen_at = inf
        wider = {}
        narrower = {}
        for queue, demand in demands.items():
            window = windows[queue]
            widest = _rounded(demand.wanted, self._most)
            # Of many queues each has a share at first, and as much as all of them when it alone has messages.
            least = min(widest, _rounded(ceil(demand.wanted * _SHARES / len(demands)), self._most))
            if window == 0 and least:
                wider[queue] = least
            elif not is_enough and window < widest and demand.here * 2 >= window:
                wider[queue] = max(least, min(window * _FACTOR, widest))
            elif widest * _FACTOR <= window and window:
                narrower[queue] = least
        if wider:
            self._narrow_since = None
            at = self._changed_at + WIDEN_EVERY
            if now < at:
                self.widen_at = at
                return None
            return Widen(wider)
        if not narrower:
            self._narrow_since = None
            return None
        if self._narrow_since is None:
            self._narrow_since = now
        if now - self._narrow_since < NARROW_AFTER:
            return None
        self._narrow_since = None
        return Narrow(narrower)


def _rounded(number: int, most: int) -> int:
    """Return a number that is larger by an eighth at most: not each little change of what is wanted is one of a window.

    What is beyond what is wanted waits here, and be it behind handlers that take hours.
    """
    if number <= 0:
        return 0
    step = 1 << max(0, number.bit_length() - 4)
    return min(-(-number // step) * step, most)
