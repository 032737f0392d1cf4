"""When a worker gives back what waits here and others could run. Pure.

Handlers that were fast have earned wide windows, and what is fetched for those may turn out to be slow. As long as it
waits here no other worker gets it.
"""

from __future__ import annotations

from typing import Final, NamedTuple

#: Seconds for which there has to be too much: a window lasts a tenth of that at a steady pace. Then for as long what
#: comes back from places goes as well.
HOARDS_AFTER: Final = 1.0


class Surplus(NamedTuple):
    """What is to go back.

    Attributes:
        messages: How many, of those that wait.
        is_new: Whether places are to be asked for what has not started.
    """

    messages: int
    is_new: bool


_NONE: Final = Surplus(0, False)


class Hoard:
    """Decides how much is too much. One thread's at a time."""

    def __init__(self) -> None:
        #: Since when there is too much, and until when it goes back.
        self._since: float | None = None
        self._open_until: float | None = None

    def surplus(self, in_hand: int, wanted: int, shares: int, now: float) -> Surplus:
        """Return what to give back.

        Args:
            in_hand: How many messages there are that run, or wait for any place that has room.
            wanted: How many there are to be.
            shares: Brokers; each may bring its part of what is wanted, or one, whatever the others have brought.
            now: Seconds on a clock that only goes forward.
        """
        most = wanted + (shares - 1) * max(1, wanted // shares)
        if self._open_until is not None and (in_hand <= most or now >= self._open_until):
            self.close()
        if self._open_until is not None:
            return Surplus(in_hand - most, False)
        if in_hand <= 2 * most:
            self._since = None
            return _NONE
        if self._since is None:
            self._since = now
        if now - self._since < HOARDS_AFTER:
            return _NONE
        self._open_until = now + HOARDS_AFTER
        return Surplus(in_hand - most, True)

    def close(self) -> None:
        """Give nothing more back, as long as there is not too much for long once more."""
        self._open_until = self._since = None

    @property
    def is_watched(self) -> bool:
        """Whether there is too much, and time decides."""
        return self._since is not None
