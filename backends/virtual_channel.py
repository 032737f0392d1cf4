"""The channels of kq's own Kombu transport: what is published into a store's queues, leased from them, and settled."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import TYPE_CHECKING, Any, ClassVar, Final
from uuid import uuid4

from kombu.transport import base, virtual

from kq import clock
from kq.backends.store import UNREACHABLE, Ending, Entry, Lease, Move, under_another_id
from kq.backends.virtual_exchange import TopicExchange
from kq.backends.virtual_message import milliseconds, to_envelope, to_payload
from kq.backends.virtual_topology import TopologyChannel
from kq.envelope import bury, pack, unpack_or_wrap
from kq.errors import Error, Internal
from kq.header import NORMAL
from kq.outcome import EXPIRED, Outcome

if TYPE_CHECKING:
    from kq.backends.virtual import Transport

#: Messages that one pass delivers to a consumer without a prefetch limit.
_BATCH: Final = 100
#: Milliseconds after which an expired message is dead-lettered again for which there was no room.
_FULL: Final = 5_000


class QoS(virtual.QoS):
    """Unacknowledged messages of a channel, each under its lease."""

    def ack(self, delivery_tag: str) -> None:
        self.channel.end(delivery_tag, "ack")
        self._settled(delivery_tag)

    def up_to(self, delivery_tag: str) -> list[str]:
        """Return what is not acknowledged and was delivered before this message, and this one."""
        tags = [tag for tag in list(self._delivered) if tag not in self._dirty]
        return tags[: tags.index(delivery_tag) + 1] if delivery_tag in tags else [delivery_tag]

    def reject(self, delivery_tag: str, requeue: bool = False) -> None:
        if requeue:
            self.channel.give_back([delivery_tag])
        else:
            self.channel.discard(delivery_tag)
        self._settled(delivery_tag)

    def forget(self, delivery_tag: str) -> None:
        """Count a message no more that never reached its consumer. For the consuming thread."""
        self._delivered.pop(delivery_tag, None)

    def leave_to_parent(self) -> None:
        """Forget what another process has to settle."""
        self._delivered.clear()
        self._dirty.clear()

    def _settled(self, delivery_tag: str) -> None:
        # What came without need of acknowledgement was never counted, so it must not be subtracted.
        if delivery_tag in self._delivered:
            self._quick_ack(delivery_tag)
            if self.prefetch_count:
                self.channel.connection.made_room()

    def restore_unacked(self) -> list[Any]:
        self._flush()
        tags = list(self._delivered)
        self._delivered.clear()
        self.channel.give_back(tags)
        return []

    def restore_unacked_once(self, stderr: Any = None) -> None:
        self._on_collect.cancel()
        # Unreachable, perhaps: their leases run out by themselves.
        with suppress(Error):
            self.restore_unacked()
        self._delivered.restored = True


class Channel(TopologyChannel):
    """A channel whose queues live in a store."""

    QoS = QoS
    supports_fanout = True
    exchange_types: ClassVar = {**virtual.Channel.exchange_types, "topic": TopicExchange}
    body_encoding = None

    def __init__(self, connection: Transport, **kwargs: Any) -> None:
        super().__init__(connection, **kwargs)
        self.consumers: dict[str, tuple[str, Callable[[Any], Any], bool]] = {}
        self.held: dict[str, tuple[str, Lease]] = {}
        self._ttl: dict[str, int] = {}
        self._max_length: dict[str, int | None] = {}

    # Publishing.

    def prepare_message(self, body: Any, priority: int | None = None, *args: Any, **kwargs: Any) -> dict[str, Any]:
        message: dict[str, Any] = super().prepare_message(body, priority, *args, **kwargs)
        if priority is not None:
            message["properties"]["priority"] = priority
        return message

    def _inplace_augment_message(self, message: dict[str, Any], exchange: str, routing_key: str) -> None:
        route = message["properties"].setdefault("delivery_info", {})
        route.update(exchange=exchange, routing_key=routing_key)

    def basic_publish(self, message: dict[str, Any], exchange: str, routing_key: str, **kwargs: Any) -> Any:
        if exchange:
            self._load_topology()
            if kwargs.get("mandatory") and not self._lookup(exchange, routing_key):
                text = f"no queue takes a message for {routing_key!r} from the exchange {exchange!r}"
                raise Internal(text, details={"reason": "unroutable"})
        return super().basic_publish(message, exchange, routing_key, **kwargs)

    def _put(self, queue: str, message: dict[str, Any], **kwargs: Any) -> None:
        envelope = to_envelope(message)
        priority = envelope.priority
        if "priority" in message["properties"]:
            priority = self._get_message_priority(message)
        ttls = [self._queue_ttl(queue), milliseconds(message["properties"].get("expiration"))]
        entry = Entry(uuid4().hex, pack(envelope), priority, 0, min((ttl for ttl in ttls if ttl), default=0))
        accepted = self.store.put(queue, [entry], self._max_length.get(queue))
        if accepted is None:
            self._new_queue(queue)
            accepted = self.store.put(queue, [entry], None)
        if not accepted:
            raise Internal(f"queue {queue} is full", details={"reason": "full"})

    def _put_fanout(self, exchange: str, message: dict[str, Any], routing_key: str, **kwargs: Any) -> None:
        for queue in self._lookup(exchange, routing_key):
            self._put(queue, message)

    # Consuming.

    def basic_consume(
        self, queue: str, no_ack: bool, callback: Callable[[Any], Any], consumer_tag: str, **kwargs: Any
    ) -> None:
        self.connection.count_in(queue)
        self.consumers[consumer_tag] = (queue, callback, no_ack)
        self._consumers.add(consumer_tag)
        self._active_queues.append(queue)

    def basic_cancel(self, consumer_tag: str) -> None:
        found = self.consumers.pop(consumer_tag, None)
        if found is not None:
            self._consumers.discard(consumer_tag)
            self._active_queues.remove(found[0])
            self.connection.events_ahead = 0
            self.connection.count_out(found[0])

    def basic_ack(self, delivery_tag: str, multiple: bool = False) -> None:
        for tag in self.qos.up_to(delivery_tag) if multiple else [delivery_tag]:
            self.qos.ack(tag)

    def basic_get(self, queue: str, no_ack: bool = False, **kwargs: Any) -> Any:
        messages = self._take(queue, 1, no_ack)
        if not messages:
            return None
        if no_ack:
            self._end_unseen(messages[0].delivery_tag)
        return messages[0]

    def awaited(self) -> set[str]:
        """Return the queues of which a message could be delivered now."""
        room = self.qos.can_consume()
        return {queue for queue, _, no_ack in list(self.consumers.values()) if room or no_ack}

    def deliver(self) -> int:
        """Hand what is ready to the consumers of this channel, and return how much that was."""
        count = 0
        for consumer_tag, (queue, callback, no_ack) in list(self.consumers.items()):
            if consumer_tag not in self.consumers:
                continue
            room = None if no_ack else self.qos.can_consume_max_estimate()
            messages = deque(self._take(queue, _BATCH if room is None else min(room, _BATCH), no_ack))
            try:
                # A callback may raise, cancel its consumer or close the channel: what is left goes back.
                while messages and consumer_tag in self.consumers:
                    message = messages.popleft()
                    if no_ack:
                        self._end_unseen(message.delivery_tag)
                    count += 1
                    callback(message)
            finally:
                if messages:
                    self._give_back_undelivered(messages)
        return count

    def _give_back_undelivered(self, messages: Iterable[Any]) -> None:
        tags = [message.delivery_tag for message in messages]
        for tag in tags:
            self.qos.forget(tag)
        # Unreachable, perhaps: their leases run out by themselves.
        with suppress(Error):
            self.give_back(tags, delivered=False)

    def _take(self, queue: str, limit: int, no_ack: bool) -> list[Any]:
        messages: list[Any] = []
        #: What has expired, and where it belongs there is no room for it.
        stuck: list[str] = []
        # Behind nothing but expired ones there may be others.
        while limit > 0 and not messages and self._take_some(queue, limit, messages, stuck):
            if len(stuck) >= _BATCH:
                # Somebody waits for an answer.
                self.connection.look_again_in(1)
                break
        if not no_ack:
            for message in messages:
                self.qos.append(message, message.delivery_tag)
        return messages

    def _take_some(self, queue: str, limit: int, messages: list[Any], stuck: list[str]) -> bool:
        """Take what is ready, and tell whether it was anything."""
        taken = self.store.take(queue, limit, self.connection.lease)
        self.connection.look_again_in(taken.more_in)
        leases = {uuid4().hex: lease for lease in taken.leases}
        self.held.update((tag, (queue, lease)) for tag, lease in leases.items())
        if leases:
            self.connection.keep_leases()
        try:
            for tag, lease in leases.items():
                if not lease.expired:
                    messages.append(self.Message(to_payload(lease, queue, tag), channel=self))
                elif not self._discard_expired(tag):
                    stuck.append(tag)
        except BaseException:
            self.give_back(leases, delivered=False)
            raise
        return bool(leases)

    def _discard_expired(self, tag: str) -> bool:
        try:
            self.discard(tag, EXPIRED)
        except UNREACHABLE:
            raise
        except Error:
            # Where it belongs there is no room for it. It is tried again later, and is in nobody's way meanwhile.
            queue, lease = self.held.pop(tag)
            ending = Ending(lease.id, lease.token, "retry", _FULL, lease.attempts, lease.crashes)
            self.store.settle(queue, [ending])
            return False
        return True

    def give_back(self, tags: Iterable[str], *, delivered: bool = True) -> None:
        """Make messages that this channel holds ready again, at their old places.

        Args:
            tags: Which.
            delivered: Whether somebody has seen them: the next one is told that they are delivered again.
        """
        by_queue: dict[str, list[Ending]] = {}
        for tag in tags:
            found = self.held.pop(tag, None)
            if found is not None:
                queue, lease = found
                deliveries = max(int(delivered), lease.deliveries)
                by_queue.setdefault(queue, []).append(Ending(lease.id, lease.token, "release", deliveries=deliveries))
        for queue, endings in by_queue.items():
            self.store.settle(queue, endings)

    def end(self, tag: str, action: str) -> None:
        """Settle a message that this channel holds; one whose lease was lost is somebody else's."""
        found = self.held.get(tag)
        if found is not None:
            queue, lease = found
            self.store.settle(queue, [Ending(lease.id, lease.token, action)])
            # Only now: what failed can be tried again, and is kept for that.
            self.held.pop(tag, None)

    def _end_unseen(self, tag: str) -> None:
        """Acknowledge what nobody will: where that fails it comes back, when its lease ends."""
        try:
            self.end(tag, "ack")
        except BaseException:
            self.held.pop(tag, None)
            raise

    def _bury(self, queue: str, lease: Lease, target: str, reason: str) -> None:
        outcome = Outcome("dead", 0.0, lease.attempts, lease.crashes, reason)
        letter = bury(unpack_or_wrap(lease.raw, lease.id), queue, outcome, clock.now())
        entry = Entry(letter.id, pack(letter), NORMAL)
        # Once more under another id, where a letter of this one is there already; or the lease was lost.
        for stored in (entry, under_another_id(entry)):
            (moved,) = self.store.move(queue, target, [Move(lease.id, lease.token, stored)])
            if isinstance(moved, Error):
                raise moved
            if moved:
                return

    def discard(self, tag: str, reason: str = "rejected") -> None:
        """Dead-letter a message where its queue says to (``x-dead-letter-exchange``, or as kq's do), else drop it.

        Args:
            tag: Which.
            reason: Why, where kq's dead letters say so.
        """
        found = self.held.get(tag)
        if found is None:
            return
        queue, lease = found
        arguments = self.store.arguments(queue) or {}
        exchange = arguments.get("x-dead-letter-exchange")
        if exchange is None and arguments.get("dead_letter"):
            self._bury(queue, lease, str(arguments["dead_letter"]), reason)
            self.held.pop(tag, None)
            return
        if exchange is None:
            self.end(tag, "ack")
            return
        payload = to_payload(lease, queue, tag)
        # As AMQP has it: by the key that it was published with, unless the queue names another one.
        key = arguments.get("x-dead-letter-routing-key") or payload["properties"]["delivery_info"]["routing_key"]
        payload["properties"].pop("expiration", None)
        payload["properties"]["delivery_info"] = {"exchange": exchange, "routing_key": key}
        if exchange:
            self._load_topology()
            targets = self._lookup(exchange, key)
        else:
            # The default exchange has no queue made.
            targets = [key] if key and self._has_queue(key) else []
        for target in targets:
            self._put(target, payload)
        self.end(tag, "ack")

    # Queues, exchanges and bindings.

    def prepare_queue_arguments(self, arguments: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        prepared: dict[str, Any] = base.to_rabbitmq_queue_arguments(arguments, **kwargs)
        return prepared

    def _new_queue(self, queue: str, **kwargs: Any) -> None:
        arguments = dict(kwargs.get("arguments") or {})
        found = self.store.declare(queue, arguments)
        self._learn(queue, arguments if found is None else found)

    def _has_queue(self, queue: str, **kwargs: Any) -> bool:
        return self.store.arguments(queue) is not None

    def queue_delete(self, queue: str, if_unused: bool = False, if_empty: bool = False, **kwargs: Any) -> None:
        is_certain = not (if_empty or if_unused)
        if is_certain:
            # First: what is routed there in between would make it again.
            self.unbind_everywhere(queue)
        if self.store.delete(queue, if_empty=if_empty, if_unused=if_unused) and not is_certain:
            self.unbind_everywhere(queue)

    def _size(self, queue: str) -> int:
        return self.store.counts(queue).ready

    def _purge(self, queue: str) -> int:
        return self.store.remove(queue, None)

    def _queue_ttl(self, queue: str) -> int:
        if queue not in self._ttl:
            self._learn(queue, self.store.arguments(queue) or {})
        return self._ttl[queue]

    def _learn(self, queue: str, arguments: dict[str, Any]) -> None:
        self._ttl[queue] = milliseconds(arguments.get("x-message-ttl"))
        length = arguments.get("x-max-length", arguments.get("max_length"))
        self._max_length[queue] = length if isinstance(length, int) else None
