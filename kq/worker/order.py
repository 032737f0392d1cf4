"""The order to stop, which a signal's handler may give."""

from __future__ import annotations

from contextlib import suppress
from queue import Empty, SimpleQueue


class Order:
    """It may be given in a thread that just does so, or waits for it: by a signal's handler.

    An `Event` has a lock, for which such a handler would wait for ever. A ``SimpleQueue`` may be interrupted by itself.
    """

    def __init__(self) -> None:
        self._is_given = False
        self._given = SimpleQueue[None]()

    def set(self) -> None:
        """Give it."""
        self._is_given = True
        self._given.put(None)

    def clear(self) -> None:
        """Take it back."""
        self._is_given = False
        self._given = SimpleQueue()

    def is_set(self) -> bool:
        """Tell whether it is given."""
        return self._is_given

    def wait(self, timeout: float) -> None:
        """Wait until it is given, or so many seconds."""
        if not self._is_given:
            with suppress(Empty):
                self._given.get(timeout=timeout)
