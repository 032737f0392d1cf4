"""Links that publish and administer, of one backend: as many as there are calls at once."""

from __future__ import annotations

from collections.abc import Callable
from math import inf
from typing import Final

from kq.backends.rabbitmq_link import LEAST_PATIENCE, Link
from kq.backends.rabbitmq_publisher import Publisher
from kq.backends.within import within

#: Links that are kept for later calls, at most.
_KEPT: Final = 4


class Lane:
    """A link, what publishes over it, and what it knows of the broker. One thread at a time.

    Attributes:
        buckets: Milliseconds of the delays whose queues are known to be there.
    """

    __slots__ = ("buckets", "link", "publisher")

    def __init__(self, link: Link) -> None:
        self.link = link
        try:
            self.publisher = Publisher(link)
        except BaseException:
            link.close(wait=False)
            raise
        self.buckets: set[int] = set()

    def drop(self, *, wait: bool = False) -> None:
        """Give the connection up, after a goodbye if its end is to be waited for."""
        self.link.close(wait=wait)


class Lanes:
    """Those that are free are kept for later calls. Thread-safe: a list's `append` and `pop` are.

    Args:
        connect: Opens a link, within so many seconds.
    """

    def __init__(self, connect: Callable[[float], Link]) -> None:
        self._connect = connect
        self._idle: list[Lane] = []
        self._closed = False

    def idle(self) -> Lane | None:
        """Return a link that is free, the one that was used last; None if there is none."""
        try:
            return self._idle.pop()
        except IndexError:
            return None

    def fresh(self, patience: float = inf) -> Lane:
        """Return a new link; those that are free are suspect now and are given up.

        Raises:
            TimeoutError: If there is none within ``patience`` seconds; or what connecting raises.
        """
        while (lane := self.idle()) is not None:
            lane.drop()
        if patience == inf:
            return Lane(self._connect(patience))
        return Lane(
            within(max(LEAST_PATIENCE, patience), lambda: self._connect(patience), lambda link: link.close(wait=False))
        )

    def put_back(self, lane: Lane, *, wait: bool = True) -> None:
        """Keep a link for later calls: nothing has gone wrong on it.

        Args:
            lane: The link.
            wait: Whether the caller may wait for the broker to say goodbye to one that is too many.
        """
        self._idle.append(lane)
        if self._closed or len(self._idle) > _KEPT:
            self._trim(wait=wait)

    def close(self) -> None:
        """Close what is free; what is in use is closed when its call has ended."""
        self._closed = True
        self._trim(wait=True)

    def _trim(self, *, wait: bool) -> None:
        while len(self._idle) > (0 if self._closed else _KEPT) and (lane := self.idle()) is not None:
            lane.drop(wait=wait)
