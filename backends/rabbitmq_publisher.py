"""Confirmed publishing: every message is tracked by its delivery tag until the broker has answered.

Messages are pipelined: many are sent before the first answer is read. An answer that comes after its
publisher has given up is recognised by its tag and ignored; it is never taken for another's.
"""

from __future__ import annotations

from collections.abc import Sequence
from time import monotonic
from typing import Any, Final, NamedTuple

from kq.backends.rabbitmq_error import away
from kq.backends.rabbitmq_link import Link
from kq.backends.rabbitmq_publication import TooLarge, Writer
from kq.envelope import Envelope
from kq.errors import Internal

#: Messages sent but unconfirmed at most.
_WINDOW: Final = 2000
#: Messages that are written at once, and bytes after which no more are: between them is a look at the answers.
_LOOK_EVERY: Final = 64
_WRITE_SIZE: Final = 1 << 18
#: Seconds that a write is given even where time is up: 0 would mean not to write at all.
_LEAST: Final = 0.001
#: Seconds of one wait for answers, after which to look whether the broker has blocked us.
_LOOK: Final = 0.5


class Outgoing(NamedTuple):
    """A message on its way.

    Attributes:
        exchange: Where to; empty for the default exchange.
        routing_key: The queue's name.
        envelope: What.
    """

    exchange: str
    routing_key: str
    envelope: Envelope


#: Exchange, routing key and message id, by which a message that comes back is known.
_Route = tuple[str, str, str]


class Publisher:
    """Publishes over one link. One thread at a time."""

    def __init__(self, link: Link) -> None:
        self._link = link
        self._channel: Any = link.channel
        self._channel.events["basic_ack"].add(self._on_ack)
        self._channel.events["basic_nack"].add(self._on_nack)
        self._channel.events["basic_return"].add(self._on_return)
        self._channel.confirm_select()
        self._writer = Writer(self._channel.channel_id, link.connection.frame_max)
        self._last_tag = 0
        #: Unanswered tags in the order of sending, and each one's place in the batch of `send`.
        self._pending: dict[int, int] = {}
        self._results: list[Internal | None] = []
        #: Messages of the batch whose sending has begun; they come first in it.
        self._sent = 0
        self._routes: list[_Route] = []
        self._returned: set[_Route] = set()

    def send(self, batch: Sequence[Outgoing], deadline: float) -> list[Internal | None]:
        """Send messages and return each one's answer: None if it is stored, else why not.

        Raises:
            OSError, amqp.AMQPError: If the connection breaks; then `answered` says what is known.
        """
        self._results = [None] * len(batch)
        self._sent = 0
        self._routes = [(o.exchange, o.routing_key, o.envelope.id) for o in batch]
        self._pending.clear()
        self._returned.clear()
        unwritten: list[bytes] = []
        size = 0
        for index, (exchange, routing_key, envelope) in enumerate(batch):
            if not unwritten and self._is_over(deadline):
                return self._give_up(range(index, len(batch)), "blocked" if self._link.blocked else "timeout")
            try:
                frames = self._writer.frames(exchange, routing_key, envelope)
            except TooLarge as error:
                self._results[index] = Internal(str(error), details={"reason": "refused", "headers": error.size})
                self._sent = index + 1
            else:
                unwritten.append(frames)
                size += len(frames)
                self._last_tag += 1
                self._pending[self._last_tag] = index
                self._sent = index + 1
            if not unwritten:
                continue
            if size < _WRITE_SIZE and len(unwritten) < _LOOK_EVERY and index + 1 < len(batch):
                continue
            # A connection that nobody reads any more blocks whoever writes to it.
            self._link.write(b"".join(unwritten), max(_LEAST, deadline - monotonic()))
            unwritten.clear()
            size = 0
            if index + 1 < len(batch):
                self._link.drain_all()
            while len(self._pending) >= _WINDOW and not self._is_over(deadline):
                self._link.drain(_LOOK)
            if len(self._pending) >= _WINDOW:
                why = "blocked" if self._link.blocked else "timeout"
                return self._give_up(range(index + 1, len(batch)), why)
        while self._pending and not self._is_over(deadline):
            self._link.drain(max(0.0, min(_LOOK, deadline - monotonic())))
        if self._pending:
            return self._give_up((), "blocked" if self._link.blocked else "timeout")
        return self._results

    def answered(self) -> dict[int, Internal | None]:
        """Return the answers to the last batch so far, by the places of their messages."""
        unknown = set(self._pending.values())
        return {place: self._results[place] for place in range(self._sent) if place not in unknown}

    def _is_over(self, deadline: float) -> bool:
        return monotonic() >= deadline or bool(self._link.blocked)

    def _give_up(self, unsent: Sequence[int] | range, why: str) -> list[Internal | None]:
        if why == "blocked":
            late = away(f"RabbitMQ takes no messages now ({self._link.blocked}); it may still store this one", why)
            never = away(f"RabbitMQ takes no messages now ({self._link.blocked})", why)
        else:
            late = never = away("RabbitMQ did not confirm in time; it may still store the message", why)
        for index in self._pending.values():
            self._results[index] = late
        for index in unsent:
            self._results[index] = never
        self._pending.clear()
        return self._results

    def _on_ack(self, tag: int, multiple: bool) -> None:
        for index in self._take(tag, multiple):
            if self._returned and self._routes[index] in self._returned:
                self._results[index] = away("no queue took the message: it was deleted", "unroutable")

    def _on_nack(self, tag: int, multiple: bool) -> None:
        for index in self._take(tag, multiple):
            self._results[index] = away("RabbitMQ refused the message: the queue is full, or not there yet", "full")

    def _on_return(self, error: Exception, exchange: str, routing_key: str, message: Any) -> None:
        # Comes before the confirm of the same message, which says nothing of it.
        self._returned.add((exchange, routing_key, message.properties.get("message_id", "")))

    def _take(self, tag: int, multiple: bool) -> list[int]:
        if not multiple:
            index = self._pending.pop(tag, None)
            return [] if index is None else [index]
        tags = []
        for pending in self._pending:
            if pending > tag:
                break
            tags.append(pending)
        return [self._pending.pop(pending) for pending in tags]
