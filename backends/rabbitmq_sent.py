"""Messages that are sent to RabbitMQ, and whose confirms nobody stands waiting for."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from kq.backends.rabbitmq_lane import Lane, Lanes
from kq.backends.rabbitmq_publisher import Outgoing, unconfirmed
from kq.errors import Error


class Sent:
    """Such messages. Owned by one thread, which has the link until it is closed.

    Args:
        lane: Over which they are sent. Nothing else is on its way there.
        batch: What is sent.
        frames: The same as the frames that they are.
        lanes: Where the link goes once all have been answered.
        timeout: See `kq.backend.Unconfirmed`.
        on_stored: Called for each of them that is stored, with its place.

    Attributes:
        timeout: See `kq.backend.Unconfirmed`.
        way: Likewise.
    """

    __slots__ = (
        "_batch", "_frames", "_is_begun", "_is_broken", "_is_free", "_lane", "_lanes", "_on_stored", "timeout", "way",
    )  # fmt: skip

    def __init__(
        self, lane: Lane, batch: Sequence[Outgoing], frames: bytes, lanes: Lanes, timeout: float,
        on_stored: Callable[[int], None],
    ) -> None:  # fmt: skip
        self._lane = lane
        self.way: object = lane
        self._batch = batch
        #: What there has been no room for so far.
        self._frames = memoryview(frames)
        self._lanes = lanes
        self.timeout = timeout
        self._on_stored = on_stored
        self._is_begun = False
        self._is_broken = False
        #: Whether all that is on its way over the link is known by its tag: nobody takes its answer for another's.
        self._is_free = True

    def fileno(self) -> int:
        """See `kq.backend.Unconfirmed`."""
        number: int = self._lane.link.connection.sock.fileno()
        return number

    def write(self) -> bool:
        """See `kq.backend.Unconfirmed`."""
        if not self._is_begun:
            self._is_begun, self._is_free = True, False
            self._lane.publisher.begin(self._batch)
        try:
            while self._frames:
                sent = self._lane.link.write_now(self._frames)
                if not sent:
                    return False
                self._frames = self._frames[sent:]
        except Exception:
            # Whoever reads meets it as well, or has the broker's silence. Nothing else is sent over this one.
            self._frames, self._is_broken = self._frames[:0], True
        return True

    def confirm(self) -> list[bool | Error] | None:
        """See `kq.backend.Unconfirmed`."""
        if not self._is_begun:
            # What it knows by now is another batch's.
            return None
        publisher = self._lane.publisher
        try:
            self._lane.link.drain_now()
        except Exception:
            # What it says of the connection is not looked into here: whoever publishes the rest finds out.
            return [bool(stored) for stored in self.known()]
        answers = publisher.answers()
        if answers is None:
            return None
        # In the middle of a frame nothing else can be sent.
        self._is_free = not (self._frames or self._is_broken)
        return [self._told(place, answer) for place, answer in enumerate(answers)]

    def known(self) -> list[bool | None]:
        """See `kq.backend.Unconfirmed`."""
        answered = self._lane.publisher.answered() if self._is_begun else {}
        return [
            self._told(place, answered[place]) is True if place in answered else None
            for place in range(len(self._batch))
        ]

    def late(self) -> Error:
        """See `kq.backend.Unconfirmed`."""
        return unconfirmed()

    def close(self) -> None:
        """See `kq.backend.Unconfirmed`."""
        if self._is_free:
            self._lanes.put_back(self._lane, wait=False)
        else:
            # Silence may mean that it is dead.
            self._lane.drop()

    def _told(self, place: int, answer: Error | None) -> bool | Error:
        if answer is None:
            self._on_stored(place)
            return True
        # The queue of a delay may have gone.
        self._lane.buckets.clear()
        # It may still be stored; who sent it once more would meet the same, and store it twice.
        return answer if answer.details["reason"] == "blocked" else False
