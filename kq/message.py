"""The message that a handler is handling, and how code finds it.

The current message lives in a context variable: handlers, what they call, threads started with a
copied context and coroutines all find the same one.
"""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from enum import Enum
from threading import RLock
from typing import Any

from kq import limit
from kq.envelope import Envelope
from kq.errors import Invalid
from kq.shield import shielded


class Settled(Enum):
    """How a handler settled its message itself."""

    ACK = "ack"
    NACK = "nack"


class Message:
    """What a handler sees of a message: id, headers, settlement.

    Safe to use from several threads. After the handler has returned every method raises
    ``Invalid``: the message is another worker's by then, or nobody's.
    """

    __slots__ = ("_attempt", "_crashes", "_envelope", "_lock", "_on_settle", "_queue", "_released", "_settled")

    def __init__(
        self,
        envelope: Envelope,
        *,
        queue: str,
        attempt: int,
        crashes: int,
        on_settle: Callable[[Settled, float | None], None],
        settled: bool = False,
    ) -> None:
        self._envelope = envelope
        self._queue = queue
        self._attempt = attempt
        self._crashes = crashes
        self._on_settle = on_settle
        # A signal's handler may close the consumer, in a thread that is settling.
        self._lock = RLock()
        self._settled = settled
        self._released = False

    def id(self) -> str:
        """Return the message's id: the publisher's, or the one given on arrival."""
        return self._live().id

    def queue_id(self) -> str:
        """Return the id of the queue that delivered it."""
        self._live()
        return self._queue

    def attempt(self) -> int:
        """Return the number of this attempt, from 1; runs that were not charged do not count."""
        self._live()
        return self._attempt

    def header(self, key: str) -> Any:
        """Return one header's value, or None; asking for one of kq's own by name is asking enough."""
        return self.headers(reserved=True).get(key) if key.startswith("x_") else self._live().headers.get(key)

    def headers(self, *, reserved: bool = False) -> dict[str, Any]:
        """Return a copy of the headers.

        Args:
            reserved: With kq's own, whose names start with ``x_``: ``x_attempts`` (this one included) and ``x_crashes``
                are what is on the message's account; where that is kept in its headers, as on RabbitMQ, whoever
                publishes can forge it. ``x_kq`` is there on what kq has published.
        """
        headers = self._live().headers
        if not reserved:
            return {key: value for key, value in headers.items() if not key.startswith("x_")}
        shown = {**headers, "x_attempts": self._attempt, "x_crashes": self._crashes}
        if "x_kq" in shown and type(shown["x_kq"]) is not int:
            # A stranger's: the version of the wire format is a number.
            del shown["x_kq"]
        return shown

    def ack(self) -> None:
        """Settle the message as done, now, whatever the handler does afterwards.

        Raises:
            Invalid: If it is settled already.
        """
        self._settle(Settled.ACK, None)

    def nack(self, delay: Any = None) -> None:
        """Settle the message as a failed attempt, now: retried, or dead-lettered after the last one.

        Args:
            delay: Seconds or ``timedelta`` until the retry; None takes the queue's backoff.

        Raises:
            Invalid: If it is settled already, or ``delay`` is no duration.
        """
        self._settle(Settled.NACK, None if delay is None else limit.seconds("delay", delay))

    def claim(self) -> bool:
        """Settle it on the executor's behalf; False if the handler was first. Strictly private."""
        with self._lock:
            first, self._settled = not self._settled, True
            return first

    def release(self) -> None:
        """End the message's life in this process. Strictly private."""
        self._released = True

    def _settle(self, how: Settled, delay: float | None) -> None:
        # A time limit that struck in here would leave open whether it is settled.
        with shielded(), self._lock:
            self._live()
            if self._settled:
                raise Invalid("message already settled; expected one ack or nack for each message")
            # Under the lock, so that whoever finds it settled knows that the settlement is on its way.
            self._on_settle(how, delay)
            self._settled = True

    def _live(self) -> Envelope:
        if self._released:
            raise Invalid(
                "message released: its handler has returned, or its consumer is closed; keep what you need in variables"
            )
        return self._envelope

    def __repr__(self) -> str:
        state = "released" if self._released else "settled" if self._settled else "live"
        return f"<Message {self._envelope.id} of {self._queue}, attempt {self._attempt}, {state}>"


_current: ContextVar[Message | None] = ContextVar("kq_message", default=None)

#: Strictly private: how the executor puts a message into the context.
enter = _current.set


def current() -> Message:
    """Return the message being handled.

    Raises:
        Invalid: If no delivery is in context.
    """
    message = _current.get()
    if message is None:
        raise Invalid("no delivery in context: queue.message() works inside a handler, while it runs")
    return message


def is_handling() -> bool:
    """Tell whether this code runs inside a handler."""
    return _current.get() is not None
