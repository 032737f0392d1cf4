"""The fetchers of several brokers, as one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from threading import Lock
from time import monotonic

from kq.backend import Settlement
from kq.fetcher import Fetcher


class Countdown:
    """Calls ``call`` when it has been counted down from ``number``. Thread-safe."""

    def __init__(self, number: int, call: Callable[[], None]) -> None:
        self._left = number
        self._call = call
        self._lock = Lock()

    def count(self) -> None:
        """Count one."""
        with self._lock:
            self._left -= 1
            last = self._left == 0
        if last:
            self._call()


class Intake:
    """Where a consumer's deliveries come from: one fetcher for each broker, each with a share of the window.

    Thread-safe. A broker that is away holds up nothing but its own deliveries.

    Args:
        fetchers: By the id of the queue that they fetch from; one may be there several times.
    """

    def __init__(self, fetchers: Mapping[str, Fetcher]) -> None:
        self._of = dict(fetchers)
        self._fetchers = list(dict.fromkeys(self._of.values()))

    @property
    def round_trip(self) -> float:
        """Seconds that the slowest broker takes to settle and to fetch."""
        return max(fetcher.round_trip for fetcher in self._fetchers)

    @property
    def shares(self) -> int:
        """Into how many parts the window is divided at most, each of which holds one delivery at least."""
        return len(self._fetchers)

    def start(self) -> None:
        """Start fetching."""
        for fetcher in self._fetchers:
            fetcher.start()

    def hold(self, wanted: int, held_back: int = 0) -> None:
        """Say how many deliveries to keep in hand from now on, of which so many wait for their own consumers.

        A busy broker may fill the window while the others are idle. But each can always have its equal share of
        it, at least one, so for a moment there may be more in hand than wanted.
        """
        if len(self._fetchers) == 1:
            self._fetchers[0].hold(wanted)
            return
        in_hand = {fetcher: fetcher.in_hand for fetcher in self._fetchers}
        total = sum(in_hand.values())
        for fetcher, mine in in_hand.items():
            share = max(1, (wanted - held_back) // len(in_hand))
            fetcher.hold(max(share, wanted - (total - mine)) if wanted else 0)

    def pause(self, timeout: float) -> None:
        """Hold nothing new from now on; what was being fetched has been handed over when this returns.

        Args:
            timeout: Seconds to wait for that; brokers that hang are not waited for longer, all together.
        """
        until = monotonic() + timeout
        self.hold(0)
        for fetcher in self._fetchers:
            fetcher.pause(max(0.0, until - monotonic()))

    def settle(self, settlements: Sequence[Settlement]) -> None:
        """Hand in settlements; see `Fetcher.settle`."""
        if len(self._fetchers) == 1:
            self._fetchers[0].settle(settlements)
            return
        shares: dict[Fetcher, list[Settlement]] = {}
        for settlement in settlements:
            shares.setdefault(self._of[settlement.delivery.queue], []).append(settlement)
        for fetcher, share in shares.items():
            fetcher.settle(share)

    def when_settled(self, queue: str, call: Callable[[], None]) -> None:
        """Have ``call`` called once when all that was handed in has been carried out; see `Fetcher.when_settled`.

        Of brokers that are away only the one that has ``queue`` is waited for.
        """
        left = Countdown(len(self._fetchers), call)
        for fetcher in self._fetchers:
            fetcher.when_settled(left.count, patient=fetcher is self._of[queue])

    def finished(self, queue: str, count: int = 1) -> None:
        """Say that ``count`` deliveries of a queue are out of our hands; see `Fetcher.finished`."""
        self._of[queue].finished(queue, count)

    def stop(self, timeout: float) -> bool:
        """Settle what has been handed in, release the rest, and end; False if that took too long."""
        until = monotonic() + timeout
        for fetcher in self._fetchers:
            # All begin to end before one is waited for.
            fetcher.end(until)
        # Each is waited for, also after one that took too long.
        ended = [fetcher.stop(max(0.0, until - monotonic())) for fetcher in self._fetchers]
        return all(ended)
