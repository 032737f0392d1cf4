"""``amqp://`` and ``amqps://``: RabbitMQ 3.10 or newer, over Kombu's pyamqp transport.

Two kinds of links: those that publish and administer, one for each call at once, and one for each feed.
`rabbitmq_topology` says what is declared, `rabbitmq_sender` how messages are published, `rabbitmq_publisher` how that
is confirmed, `rabbitmq_feed` how messages are consumed.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from heapq import nsmallest
from time import monotonic
from typing import Any, Final, TypeVar

from amqp import spec
from amqp.exceptions import PreconditionFailed

from kq.backend import CALL_PART, BackendOptions, Capabilities, Publication, QueueInfo, QueueSpec, Role, Unconfirmed
from kq.backends import rabbitmq_acl, rabbitmq_aside, tls_parameters
from kq.backends import tls as encryption
from kq.backends.rabbitmq_due import due
from kq.backends.rabbitmq_error import RabbitErrors, away
from kq.backends.rabbitmq_feed import RabbitFeed
from kq.backends.rabbitmq_lane import Lane, Lanes
from kq.backends.rabbitmq_link import Link
from kq.backends.rabbitmq_sender import Courier, Sender
from kq.backends.rabbitmq_tls import secured
from kq.backends.rabbitmq_topology import (
    DELIVERY_LIMIT,
    dead_letter_arguments,
    explain_rejection,
    queue_arguments,
    to_envelope,
)
from kq.config import hide_password
from kq.envelope import Envelope
from kq.errors import Conflict, Error, Internal, NotFound, PermissionDenied

_T = TypeVar("_T")

#: Seconds after which RabbitMQ, unless told otherwise, closes the channel of an unsettled delivery
#: (https://www.rabbitmq.com/docs/consumers#acknowledgement-timeout).
_CONSUMER_TIMEOUT: Final = 1800.0
#: Messages of one subscription that may be looked at together: as many as RabbitMQ can be told.
_LOOK_WINDOW: Final = 2**16 - 1
#: Seconds without any more message of a queue after which it is asked whether there are any.
_PAUSE: Final = 0.1
#: Seconds to wait for a queue to take back what was only looked at.
_BACK_WITHIN: Final = 1.0
#: Seconds that a publish on a worker's behalf may take.
_WORKER_TIMEOUT: Final = 10.0
#: Seconds that a call of a consumer is given in any case.
_LEAST_TIMEOUT: Final = 2.0
#: Looks at a queue without anything coming of it, a `_PAUSE` each, after which somebody else must have it for itself.
_IN_VAIN: Final = 50


class RabbitBackend:
    """A RabbitMQ broker."""

    capabilities = Capabilities(
        survives="the death of processes, of the broker and, in a cluster, of a minority of its nodes",
        shared=True,
        deduplicates=False,
        priorities="declared",
        counts_delayed=False,
        counts_in_flight=False,
        tells_age=False,
        remembers_completed=False,
        concurrent_publishes=4,
        sends=True,
    )

    def __init__(self, url: str, options: BackendOptions) -> None:
        # The URL's own words on TLS are not for Kombu.
        self._url, tls = tls_parameters.separate(url, options.tls)
        self._unsafe = tls_parameters.warnings(self._url, tls)
        self._errors = RabbitErrors(self._url)
        self._secured = None if tls is None else secured(encryption.context(tls), tls.server_name, self._url)
        self._options = options
        self._lanes = Lanes(self._connect)
        self._sender = Sender(self._url, self._lanes, self._errors)

    def __repr__(self) -> str:
        return f"<RabbitBackend {hide_password(self._url)}>"

    def declare(self, queue: QueueSpec, *, create: bool, exact: bool) -> None:
        """See `Backend.declare`."""
        arguments = queue_arguments(queue)

        def declare(link: Link) -> None:
            if not create:
                link.channel.queue_declare(queue.id, passive=True)
                return
            if queue.dead_letter is not None:
                self._declare_dead_letters(link, queue.dead_letter)
            try:
                _declare(link, queue.id, arguments)
            except PreconditionFailed as error:
                text = str(error.reply_text)
                if exact and _is_about_limit(text) and not _names_limit(queue):
                    # One that was made by somebody else, or by kq before it named a limit, is one as well.
                    text = _difference_but_for_limit(link, queue.id, arguments)
                if exact and text:
                    raise Conflict(_difference(queue, text)) from None

        try:
            self._administer(declare)
        except NotFound:
            raise NotFound(f"queue {queue.id} does not exist; declare it, or let create_queues make it") from None
        except PermissionDenied as error:
            self._see_that_it_exists(queue.id, error)

    def _see_that_it_exists(self, queue: str, refusal: PermissionDenied) -> None:
        """Do without declaring a queue that somebody else has: a publisher need not be allowed to."""
        try:
            self._administer(lambda link: _passively(link, queue))
        except NotFound:
            raise PermissionDenied(
                f"queue {queue} does not exist, and this account may not declare it; start a worker of it first "
                f"({refusal.message})",
                details=refusal.details,
            ) from None

    def _declare_dead_letters(self, link: Link, name: str) -> None:
        # Declared otherwise by somebody it is a queue as well, and that is enough.
        with suppress(PreconditionFailed), link.brief_channel() as channel:
            channel.queue_declare(name, durable=True, auto_delete=False, arguments=dead_letter_arguments())
        with link.brief_channel() as channel:
            channel.exchange_declare(name, "fanout", durable=True, auto_delete=False)
            channel.queue_bind(name, name)

    def publish(self, batch: Sequence[Publication], timeout: float) -> list[Error | None]:
        """See `Backend.publish`."""
        return self._sender.publish(batch, timeout)

    def send(self, batch: Sequence[Publication]) -> Unconfirmed | None:
        """See `Backend.send`."""
        return self._sender.send(batch, self._options.timeout * CALL_PART)

    def feed(self, queues: Sequence[QueueSpec], prefetch: int) -> RabbitFeed:
        """See `Backend.feed`."""
        ids = [queue.id for queue in queues]

        def open_link() -> Link:
            with self._errors:
                heartbeat = self._options.heartbeat
                # Who waits longer for an answer than for a heartbeat waits for nobody.
                return Link(
                    self._url, self._options, purpose="consumer", heartbeat=heartbeat, secured=self._secured,
                    timeout=min(self._options.timeout, max(_LEAST_TIMEOUT, heartbeat)),
                )  # fmt: skip

        return RabbitFeed(
            self._url,
            open_link,
            courier=Courier(self._sender, self._worker_timeout),
            declare=lambda queue: self.declare(queue, create=True, exact=False),
            probe=lambda queue: self._administer(lambda link: rabbitmq_aside.probe(link, queue)),
            soonest=lambda: due.soonest(self._url, ids),
            queues=queues,
            prefetch=prefetch,
        )

    def info(self, queue: QueueSpec) -> QueueInfo:
        """See `Backend.info`."""
        try:
            answer = self._administer(lambda link: _passively(link, queue.id))
        except NotFound:
            raise NotFound(f"queue {queue.id} does not exist; check its id and the broker's URL") from None
        dead = None
        if queue.dead_letter is not None:
            try:
                dead = self._administer(lambda link: int(_passively(link, queue.dead_letter).message_count))
            except NotFound:
                dead = 0
        return QueueInfo(answer.message_count, answer.message_count, None, None, dead, answer.consumer_count, None)

    def purge(self, queue: QueueSpec) -> int:
        """See `Backend.purge`."""

        def purge(link: Link) -> int:
            with link.brief_channel() as channel:
                return int(channel.queue_purge(queue.id))

        return self._administer(purge)

    def browse(self, queue: QueueSpec, limit: int, offset: int) -> list[Envelope]:
        """See `Backend.browse`."""

        def look(link: Link) -> list[Envelope]:
            with self._looking(link, queue.id) as found:
                letters = (explain_rejection(envelope, queue.id) for envelope, _ in found)
                # All of them: what has been looked at stands behind what has not, for a while or for ever.
                return nsmallest(offset + limit, letters, key=_time)[offset:]

        return self._administer(look)

    def find(self, queue: QueueSpec, id: str) -> Envelope | None:
        """See `Backend.find`."""

        def look(link: Link) -> Envelope | None:
            with self._looking(link, queue.id) as found:
                same = (explain_rejection(envelope, queue.id) for envelope, _ in found if envelope.id == id)
                return min(same, key=_time, default=None)

        return self._administer(look)

    def remove(self, queue: QueueSpec, ids: Sequence[str] | None) -> int:
        """See `Backend.remove`."""
        if ids is None:
            return self.purge(queue)
        wanted = set(ids)

        def drop(link: Link) -> int:
            dropped = 0
            with self._looking(link, queue.id) as found:
                for envelope, ack in found:
                    if envelope.id in wanted:
                        ack()
                        dropped += 1
            return dropped

        return self._administer(drop)

    def replay(
        self, dead: QueueSpec, ids: Sequence[str] | None, target: QueueSpec, revive: Callable[[Envelope], Envelope]
    ) -> int:
        """See `Backend.replay`."""
        wanted = None if ids is None else set(ids)

        def replay(link: Link) -> int:
            replayed = 0
            with self._looking(link, dead.id) as found:
                for envelope, ack in found:
                    letter = explain_rejection(envelope, target.id)
                    origin = letter.headers.get("x_original_queue")
                    if origin != target.id or (wanted is not None and envelope.id not in wanted):
                        continue
                    error = self.publish([Publication(target, revive(letter))], _WORKER_TIMEOUT)[0]
                    if error is not None:
                        raise error
                    ack()
                    replayed += 1
            return replayed

        return self._administer(replay)

    def check(self, handler_timeout: float | None = None) -> list[str]:
        """See `Backend.check`."""
        properties = self._administer(lambda link: dict(link.connection.server_properties))
        warnings = list(self._unsafe)
        product, version = str(properties.get("product", "")), str(properties.get("version", ""))
        if product != "RabbitMQ":
            warnings.append(f"the broker is {product or 'unknown'}, not RabbitMQ; quorum queues may be missing")
        elif tuple(int(part) for part in version.split(".")[:2] if part.isdigit()) < (3, 10):
            warnings.append(f"RabbitMQ {version} is too old; expected 3.10 or newer")
        if handler_timeout is not None and handler_timeout >= _CONSUMER_TIMEOUT:
            warnings.append(
                f"a handler may take {handler_timeout:g} s, but RabbitMQ takes a message back after its "
                f"consumer_timeout ({_CONSUMER_TIMEOUT:g} s unless changed): raise that above the handler's timeout"
            )
        return warnings

    def acl(self, role: Role, queues: Sequence[str]) -> str:
        """See `kq.backend.Granting`."""
        return rabbitmq_acl.acl(role, queues, self._url)

    def close(self) -> None:
        """See `Backend.close`."""
        self._lanes.close()

    @property
    def _worker_timeout(self) -> float:
        """Seconds that a publish on a worker's behalf may take: meanwhile it sends no heartbeats."""
        return max(1.0, min(_WORKER_TIMEOUT, self._options.heartbeat / 2))

    def _connect(self, patience: float) -> Link:
        # No heartbeat: a program that only publishes may do nothing for hours. The kernel probes the
        # connection, and every publish has a deadline.
        return Link(
            self._url, self._options, purpose="publisher", heartbeat=0, secured=self._secured, patience=patience
        )

    def _administer(self, call: Callable[[Link], _T]) -> _T:
        """Run a call on a link; once more on a new one if one that had been idle turned out dead, or blocked."""
        lane = self._lanes.idle()
        if lane is not None:
            try:
                return self._call(lane, call)
            except Internal as error:
                if error.details.get("reason") != "unavailable":
                    raise
        with self._errors:
            lane = self._lanes.fresh()
        return self._call(lane, call)

    def _call(self, lane: Lane, call: Callable[[Link], _T]) -> _T:
        try:
            with self._errors:
                lane.link.drain_all()
                if lane.link.blocked:
                    # Of what has published the broker reads nothing; of a connection that has not it does.
                    raise away(f"RabbitMQ reads nothing now ({lane.link.blocked})", "unavailable")
                answer = call(lane.link)
        except BaseException as error:
            # Interrupted, perhaps in the middle of a frame, unless it is one of ours.
            lane.drop(wait=isinstance(error, Error) and not lane.link.blocked)
            raise
        self._lanes.put_back(lane)
        return answer

    @contextmanager
    def _looking(self, link: Link, queue: str) -> Iterator[Iterator[tuple[Envelope, Callable[[], None]]]]:
        """Yield all messages of a queue with a way to remove each; the rest goes back, in the same order."""
        channel = link.looker
        unsettled: dict[int, None] = {}

        def messages() -> Iterator[tuple[Envelope, Callable[[], None]]]:
            for message in _all_of(link, queue):
                tag = message.delivery_tag
                unsettled[tag] = None
                yield to_envelope(message), partial(settle, tag)

        def settle(tag: int) -> None:
            channel.basic_ack(tag)
            del unsettled[tag]

        try:
            yield messages()
        finally:
            if unsettled:
                channel.send_method(spec.Basic.Nack, "Lbb", (max(unsettled), True, True))
                # A quorum queue takes messages back a moment later; whoever looks again is to find them.
                until = monotonic() + _BACK_WITHIN
                while monotonic() < until:
                    if channel.queue_declare(queue, passive=True).message_count >= len(unsettled):
                        break


def _all_of(link: Link, queue: str) -> Iterator[Any]:
    """Subscribe to a queue, and yield its messages until there are no more, or as many as there were."""
    channel = link.looker
    arrived: deque[Any] = deque()
    consumers = []

    def subscribe() -> None:
        channel.basic_qos(0, _LOOK_WINDOW, False)
        consumers.append(channel.basic_consume(queue, callback=arrived.append))

    waiting = channel.queue_declare(queue, passive=True).message_count
    subscribe()
    seen = in_vain = 0
    while seen < waiting:
        if not arrived and not link.drain(_PAUSE):
            if not channel.queue_declare(queue, passive=True).message_count:
                # Others have the rest. What was on its way has come before the answer, or comes before the end.
                break
            in_vain += 1
            if in_vain > _IN_VAIN:
                text = f"queue {queue}: messages wait and none comes: another consumer has the queue for itself"
                raise away(text, "refused")
            # The windows are full.
            subscribe()
        while arrived:
            yield arrived.popleft()
            seen += 1
            in_vain = 0
    for consumer in consumers:
        channel.basic_cancel(consumer)
    yield from arrived


def _time(letter: Envelope) -> float:
    """Return when a dead letter died."""
    at = letter.headers.get("x_dead_letter_time")
    return float(at) if isinstance(at, (int, float)) else 0.0


def _passively(link: Link, queue: str | None) -> Any:
    """Return what the broker says of a queue that it has."""
    with link.brief_channel() as channel:
        return channel.queue_declare(queue, passive=True)


def _declare(link: Link, queue: str, arguments: Mapping[str, Any]) -> None:
    with link.brief_channel() as channel:
        channel.queue_declare(queue, durable=True, auto_delete=False, arguments=dict(arguments))


def _names_limit(queue: QueueSpec) -> bool:
    return DELIVERY_LIMIT in queue.options.get("amqp", {}).get("arguments", {})


def _difference_but_for_limit(link: Link, queue: str, arguments: Mapping[str, Any]) -> str:
    """Return what the broker says of two declarations that differ in something else than the limit, or nothing."""
    try:
        _declare(link, queue, {name: value for name, value in arguments.items() if name != DELIVERY_LIMIT})
    except PreconditionFailed as error:
        # It names the first difference only: a limit of somebody's own is no matter either.
        return "" if _is_about_limit(text := str(error.reply_text)) else text
    return ""


def _is_about_limit(text: str) -> bool:
    return f"inequivalent arg '{DELIVERY_LIMIT}'" in text


def _difference(queue: QueueSpec, text: str) -> str:
    """Name the argument on which two declarations disagree, from the broker's own words.

    They read: ``inequivalent arg 'x-max-length' for queue 'a:b' in vhost '/': received the value '5' of
    type 'signedint' but current is none``.
    """
    argument = text.partition("inequivalent arg '")[2].partition("'")[0]
    ours = {
        "x-max-length": f"max_length={queue.max_length!r}",
        "x-max-priority": f"max_priority={queue.max_priority!r}",
        "x-dead-letter-exchange": f"dead_letter={queue.dead_letter!r}",
    }.get(argument, argument or "other arguments")
    what = text.partition(": ")[2] or text
    return (
        f"queue {queue.id} exists with another {argument or 'declaration'}, declared here with {ours}: {what}; "
        "declare it alike (max_priority, max_length, dead_letter and options are to be the same in every program and "
        "file), or delete the queue first"
    )
