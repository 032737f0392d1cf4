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
        stands_for: Where it is waited for also when the broker has blocked the connection: what `Publisher.send` knows
            it by when it is to be sent once more, which it is not as long as it may still be stored.
    """

    exchange: str
    routing_key: str
    envelope: Envelope
    stands_for: object = None


#: Exchange, routing key and message id, by which a message that comes back is known.
_Route = tuple[str, str, str]


class _Late:
    """A message that is waited for since the broker blocked the connection."""

    __slots__ = ("answer", "is_returned", "route", "stands_for", "tag")

    def __init__(self, tag: int, route: _Route, stands_for: object) -> None:
        #: None once it is answered.
        self.tag: int | None = tag
        self.route = route
        # Held, so that its identity is no other's.
        self.stands_for = stands_for
        self.is_returned = False
        self.answer: Internal | None = None


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
        #: Places of those messages of the batch whose sending has begun.
        self._sent: list[int] = []
        self._batch: Sequence[Outgoing] = ()
        self._returned: set[_Route] = set()
        #: By the identity of what they stand for.
        self._late: dict[int, _Late] = {}

    @property
    def awaits(self) -> bool:
        """Whether messages are waited for that a blocked connection holds."""
        return bool(self._late)

    def awaits_one(self, stands_for: object) -> bool:
        """Tell whether the message is among them that stands for this."""
        return id(stands_for) in self._late

    def forget(self, stands_for: object) -> None:
        """Wait no more for the message that stands for this."""
        self._late.pop(id(stands_for), None)

    def send(self, batch: Sequence[Outgoing], deadline: float) -> list[Internal | None]:
        """Send messages and return each one's answer: None if it is stored, else why not.

        Raises:
            OSError, amqp.AMQPError: If the connection breaks; then `answered` says what is known.
        """
        self._results = [None] * len(batch)
        self._sent = []
        self._batch = batch
        self._pending.clear()
        self._returned.clear()
        if self._late:
            self._take_up()
        # Most have none of those that are taken up.
        places: Sequence[int] = range(len(batch))
        if self._sent:
            begun = set(self._sent)
            places = [place for place in places if place not in begun]
        last = places[-1] if places else -1
        unwritten: list[bytes] = []
        size = 0
        for nth, index in enumerate(places):
            if not unwritten and self._is_over(deadline):
                return self._give_up(places[nth:], "blocked" if self._link.blocked else "timeout")
            exchange, routing_key, envelope, _ = batch[index]
            try:
                frames = self._writer.frames(exchange, routing_key, envelope)
            except TooLarge as error:
                self._results[index] = Internal(str(error), details={"reason": "refused", "headers": error.size})
                self._sent.append(index)
            else:
                unwritten.append(frames)
                size += len(frames)
                self._last_tag += 1
                self._pending[self._last_tag] = index
                self._sent.append(index)
            if not unwritten:
                continue
            if size < _WRITE_SIZE and len(unwritten) < _LOOK_EVERY and index != last:
                continue
            # A connection that nobody reads any more blocks whoever writes to it.
            self._link.write(b"".join(unwritten), max(_LEAST, deadline - monotonic()))
            unwritten.clear()
            size = 0
            if index != last:
                self._link.drain_all()
            while len(self._pending) >= _WINDOW and not self._is_over(deadline):
                self._link.drain(_LOOK)
            if len(self._pending) >= _WINDOW:
                why = "blocked" if self._link.blocked else "timeout"
                return self._give_up(places[nth + 1 :], why)
        while self._pending and not self._is_over(deadline):
            self._link.drain(max(0.0, min(_LOOK, deadline - monotonic())))
        if self._pending:
            return self._give_up((), "blocked" if self._link.blocked else "timeout")
        return self._results

    def frames(self, batch: Sequence[Outgoing]) -> bytes:
        """Return messages as the frames that they are.

        Raises:
            TooLarge: If the headers of one do not fit into a frame.
        """
        return b"".join([self._writer.frames(exchange, key, envelope) for exchange, key, envelope, _ in batch])

    def begin(self, batch: Sequence[Outgoing]) -> None:
        """Take note of messages that the caller writes from here on, as `frames` returns them."""
        self._results = [None] * len(batch)
        self._sent = list(range(len(batch)))
        self._batch = batch
        self._returned.clear()
        first = self._last_tag + 1
        self._last_tag += len(batch)
        self._pending = dict(zip(range(first, self._last_tag + 1), self._sent, strict=True))

    def answers(self) -> list[Internal | None] | None:
        """Return each one's answer, as `send` does; None as long as there are not all of them.

        Those that a broker leaves unanswered that has blocked the connection are answered with that.
        """
        if not self._pending:
            return self._results
        return self._give_up((), "blocked") if self._link.blocked else None

    def answered(self) -> dict[int, Internal | None]:
        """Return the answers to the last batch so far, by the places of their messages."""
        unknown = set(self._pending.values())
        return {place: self._results[place] for place in self._sent if place not in unknown}

    def _take_up(self) -> None:
        """Have those of the batch that are waited for already answered by what comes, or has come, of them."""
        taken = []
        for place, outgoing in enumerate(self._batch):
            if outgoing.stands_for is None or (late := self._late.pop(id(outgoing.stands_for), None)) is None:
                continue
            self._sent.append(place)
            if late.tag is None:
                self._results[place] = late.answer
                continue
            taken.append((late.tag, place))
            if late.is_returned:
                self._returned.add(late.route)
        # In the order of sending, which comes before all that is sent from here on.
        self._pending.update(sorted(taken))

    def _is_over(self, deadline: float) -> bool:
        return monotonic() >= deadline or bool(self._link.blocked)

    def _give_up(self, unsent: Sequence[int], why: str) -> list[Internal | None]:
        if why == "blocked":
            late = away(f"RabbitMQ takes no messages now ({self._link.blocked}); it may still store this one", why)
            never = away(f"RabbitMQ takes no messages now ({self._link.blocked})", why)
        else:
            late = never = unconfirmed()
        for tag, index in self._pending.items():
            self._results[index] = late
            if why == "blocked" and (stands_for := self._batch[index].stands_for) is not None:
                route = self._route(index)
                self._late[id(stands_for)] = kept = _Late(tag, route, stands_for)
                kept.is_returned = route in self._returned
        for index in unsent:
            self._results[index] = never
        self._pending.clear()
        return self._results

    def _on_ack(self, tag: int, multiple: bool) -> None:
        for index in self._take(tag, multiple):
            if self._returned and self._route(index) in self._returned:
                self._results[index] = _unroutable()
        for late in self._answered_late(tag, multiple):
            late.answer = _unroutable() if late.is_returned else None

    def _on_nack(self, tag: int, multiple: bool) -> None:
        for index in self._take(tag, multiple):
            self._results[index] = _refused()
        for late in self._answered_late(tag, multiple):
            late.answer = _refused()

    def _on_return(self, error: Exception, exchange: str, routing_key: str, message: Any) -> None:
        # Comes before the confirm of the same message, which says nothing of it.
        route = exchange, routing_key, message.properties.get("message_id", "")
        self._returned.add(route)
        for late in self._late.values():
            late.is_returned |= late.tag is not None and late.route == route

    def _route(self, index: int) -> _Route:
        outgoing = self._batch[index]
        return outgoing.exchange, outgoing.routing_key, outgoing.envelope.id

    def _answered_late(self, tag: int, multiple: bool) -> list[_Late]:
        """Return those of a blocked connection that an answer is for, which are unanswered no more."""
        found = [late for late in self._late.values() if late.tag == tag or (multiple and late.tag and late.tag < tag)]
        for late in found:
            late.tag = None
        return found

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


def unconfirmed() -> Internal:
    """Return the error for a message that was not answered in time."""
    return away("RabbitMQ did not confirm in time; it may still store the message", "timeout")


def _unroutable() -> Internal:
    return away("no queue took the message: it was deleted", "unroutable")


def _refused() -> Internal:
    return away("RabbitMQ refused the message: the queue is full, or not there yet", "full")
