"""kq's own Kombu transport, over any `Store`.

Plain Kombu programs run on it unchanged: direct, topic and fanout exchanges, priorities (9 first, as
in AMQP), message and queue time to live, requeue, ``SimpleQueue``, pools. What Kombu's interface lacks
hangs off the channel as ``channel.store``.

A delivered message is leased, not popped. A thread of the connection renews the leases of whatever
the program has not acknowledged; if the program dies, the messages return by themselves.
"""

from __future__ import annotations

import json
import socket
import weakref
from collections.abc import Callable, Iterable
from threading import Event, Thread
from time import monotonic
from typing import Any, Final
from uuid import uuid4

from kombu.transport import base, virtual

from kq.backend import Envelope, pack, unpack_or_wrap
from kq.backends.store import BrokerAway, Ending, Entry, Lease, Store
from kq.config import hide_password
from kq.errors import Error, Internal, Invalid
from kq.registry import BackendOptions

#: Messages that one pass delivers to a consumer without a prefetch limit.
_BATCH: Final = 100
#: Seconds after which a waiting consumer looks again although nothing woke it.
_LOOK_AGAIN: Final = 5.0
#: Properties that are Kombu's own book-keeping and do not travel.
_LOCAL: Final = frozenset({"delivery_info", "delivery_tag", "body_encoding"})


def open_store(url: str, options: BackendOptions) -> Store:
    """Return an unconnected store for ``memory://``, ``sqlite://``, ``redis://`` or ``rediss://``.

    Raises:
        Invalid: If the URL is ill-formed.
    """
    scheme, _, rest = url.partition("://")
    if scheme == "memory":
        from kq.backends.memory import MemoryStore

        if not all(c.isalnum() or c in "._-" for c in rest):
            raise Invalid(f"broker: expected memory:// or memory://name, got {hide_password(url)!r}")
        return MemoryStore(rest)
    if scheme == "sqlite":
        from kq.backends.sqlite import SQLiteStore, path_of

        return SQLiteStore(path_of(url), options.timeout)
    from kq.backends.redis import RedisStore

    return RedisStore(url, timeout=options.timeout, heartbeat=options.heartbeat, name=options.name)


class QoS(virtual.QoS):
    """Unacknowledged messages of a channel, each under its lease."""

    def ack(self, delivery_tag: str) -> None:
        self.channel.end(delivery_tag, "ack")
        super().ack(delivery_tag)

    def reject(self, delivery_tag: str, requeue: bool = False) -> None:
        if requeue:
            self.channel.end(delivery_tag, "release")
        else:
            self.channel.discard(delivery_tag)
        self._quick_ack(delivery_tag)

    def restore_unacked(self) -> list[Any]:
        self._flush()
        tags = list(self._delivered)
        self._delivered.clear()
        for tag in tags:
            self.channel.end(tag, "release")
        return []

    def restore_unacked_once(self, stderr: Any = None) -> None:
        self._on_collect.cancel()
        try:
            self.restore_unacked()
        except Error:
            pass  # unreachable: their leases run out by themselves
        self._delivered.restored = True


class Channel(virtual.Channel):
    """A channel whose queues live in a store."""

    QoS = QoS
    supports_fanout = True
    body_encoding = None

    def __init__(self, connection: Transport, **kwargs: Any) -> None:
        super().__init__(connection, **kwargs)
        self.consumers: dict[str, tuple[str, Callable[[Any], Any], bool]] = {}
        self.held: dict[str, tuple[str, Lease]] = {}
        self._ttl: dict[str, int] = {}
        self._max_length: dict[str, int | None] = {}

    @property
    def store(self) -> Store:
        """The store: all that Kombu's interface has no word for."""
        store: Store = self.connection.store
        return store

    # Publishing.

    def prepare_message(self, body: Any, priority: int | None = None, *args: Any, **kwargs: Any) -> dict[str, Any]:
        message: dict[str, Any] = super().prepare_message(body, priority, *args, **kwargs)
        if priority is not None:
            message["properties"]["priority"] = priority
        return message

    def _inplace_augment_message(self, message: dict[str, Any], exchange: str, routing_key: str) -> None:
        message["properties"].setdefault("delivery_info", {}).update(exchange=exchange, routing_key=routing_key)

    def basic_publish(self, message: dict[str, Any], exchange: str, routing_key: str, **kwargs: Any) -> Any:
        if exchange:
            self._load_topology()
        return super().basic_publish(message, exchange, routing_key, **kwargs)

    def _put(self, queue: str, message: dict[str, Any], **kwargs: Any) -> None:
        envelope = _to_envelope(message)
        ttls = [self._queue_ttl(queue), _milliseconds(message["properties"].get("expiration"))]
        entry = Entry(uuid4().hex, pack(envelope), envelope.priority, 0, min((ttl for ttl in ttls if ttl), default=0))
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
        self.consumers[consumer_tag] = (queue, callback, no_ack)
        self._consumers.add(consumer_tag)
        self._active_queues.append(queue)

    def basic_cancel(self, consumer_tag: str) -> None:
        found = self.consumers.pop(consumer_tag, None)
        if found is not None:
            self._consumers.discard(consumer_tag)
            self._active_queues.remove(found[0])

    def basic_get(self, queue: str, no_ack: bool = False, **kwargs: Any) -> Any:
        messages = self._take(queue, 1, no_ack)
        return messages[0] if messages else None

    def deliver(self) -> int:
        """Hand what is ready to the consumers of this channel, and return how much that was."""
        count = 0
        for queue, callback, no_ack in list(self.consumers.values()):
            room = self.qos.can_consume_max_estimate()
            messages = self._take(queue, _BATCH if room is None else min(room, _BATCH), no_ack)
            for index, message in enumerate(messages):
                try:
                    callback(message)
                except BaseException:
                    for later in reversed(messages[index + 1 :]):
                        if not no_ack:
                            self.qos.reject(later.delivery_tag, requeue=True)
                    raise
            count += len(messages)
        return count

    def _take(self, queue: str, limit: int, no_ack: bool) -> list[Any]:
        if limit <= 0:
            return []
        taken = self.store.take(queue, limit, self.connection.lease)
        self.connection.look_again_in(taken.more_in)
        messages = []
        for lease in taken.leases:
            tag = uuid4().hex
            self.held[tag] = (queue, lease)
            if lease.expired:
                self.discard(tag)
                continue
            if no_ack:
                self.end(tag, "ack")
            message = self.Message(_to_payload(lease, queue, tag), channel=self)
            if not no_ack:
                self.qos.append(message, tag)
            messages.append(message)
        if self.held:
            self.connection.keep_leases()
        return messages

    def end(self, tag: str, action: str) -> None:
        """Settle a message that this channel holds; one whose lease was lost is somebody else's."""
        found = self.held.pop(tag, None)
        if found is not None:
            queue, lease = found
            self.store.settle(queue, [Ending(lease.id, lease.token, action)])

    def discard(self, tag: str) -> None:
        """Dead-letter a message where its queue says to (``x-dead-letter-exchange``), else drop it."""
        found = self.held.get(tag)
        if found is None:
            return
        queue, lease = found
        arguments = self.store.arguments(queue) or {}
        exchange = arguments.get("x-dead-letter-exchange")
        if exchange is None:
            self.end(tag, "ack")
            return
        payload = _to_payload(lease, queue, tag)
        key = arguments.get("x-dead-letter-routing-key") or queue
        payload["properties"].pop("expiration", None)
        if exchange:
            self._load_topology()
        for target in self._lookup(exchange, key):
            self._put(target, payload)
        self.end(tag, "ack")

    # Queues, exchanges and bindings.

    def _new_queue(self, queue: str, **kwargs: Any) -> None:
        arguments = dict(kwargs.get("arguments") or {})
        found = self.store.declare(queue, arguments)
        self._learn(queue, arguments if found is None else found)

    def _has_queue(self, queue: str, **kwargs: Any) -> bool:
        return self.store.arguments(queue) is not None

    def queue_delete(self, queue: str, if_unused: bool = False, if_empty: bool = False, **kwargs: Any) -> None:
        if if_empty and self._size(queue):
            return
        if if_unused and self.store.counts(queue).consumers:
            return
        self._change_topology(lambda: self._unbind_everywhere(queue))
        self.store.delete(queue)

    def _unbind_everywhere(self, queue: str) -> None:
        self.state.queue_bindings_delete(queue)
        for exchange in self.state.exchanges.values():
            exchange["table"] = [row for row in exchange["table"] if row[2] != queue]

    def _size(self, queue: str) -> int:
        return self.store.counts(queue).ready

    def _purge(self, queue: str) -> int:
        return self.store.remove(queue, None)

    def _queue_bind(self, *args: Any) -> None:
        """Do nothing: bindings are kept with the exchanges."""

    def exchange_declare(self, *args: Any, **kwargs: Any) -> None:
        self._change_topology(lambda: super(Channel, self).exchange_declare(*args, **kwargs))

    def exchange_delete(self, exchange: str, *args: Any, **kwargs: Any) -> None:
        self._change_topology(lambda: self.state.exchanges.pop(exchange, None))

    def queue_bind(self, queue: str, exchange: str | None = None, *args: Any, **kwargs: Any) -> None:
        def bind() -> None:
            name = exchange or "amq.direct"
            if name not in self.state.exchanges and name.startswith("amq."):
                super(Channel, self).exchange_declare(name, name.removeprefix("amq."), durable=True)
            super(Channel, self).queue_bind(queue, name, *args, **kwargs)

        self._change_topology(bind)

    def queue_unbind(self, *args: Any, **kwargs: Any) -> None:
        self._change_topology(lambda: super(Channel, self).queue_unbind(*args, **kwargs))

    def _load_topology(self) -> tuple[str, int]:
        document, version = self.store.read_topology()
        self.connection.state = _to_state(document)
        return document, version

    def _change_topology(self, change: Callable[[], Any]) -> None:
        """Apply a change to what all programs share; whoever was faster is not overwritten."""
        while True:
            before, version = self._load_topology()
            change()
            after = _to_document(self.state)
            if after == before or self.store.write_topology(after, version):
                return

    def _queue_ttl(self, queue: str) -> int:
        if queue not in self._ttl:
            self._learn(queue, self.store.arguments(queue) or {})
        return self._ttl[queue]

    def _learn(self, queue: str, arguments: dict[str, Any]) -> None:
        self._ttl[queue] = _milliseconds(arguments.get("x-message-ttl"))
        length = arguments.get("x-max-length", arguments.get("max_length"))
        self._max_length[queue] = length if isinstance(length, int) else None


class Transport(virtual.Transport):
    """A Kombu transport for ``kq-memory``, ``kq-sqlite``, ``kq-redis`` and ``kq-rediss`` URLs."""

    Channel = Channel
    can_parse_url = True
    driver_type = "kq"
    driver_name = "kq"
    connection_errors = (BrokerAway,)
    recoverable_connection_errors = (BrokerAway,)
    implements = base.Transport.implements.extend(
        asynchronous=False, exchange_type=frozenset(["direct", "topic", "fanout"]), heartbeats=False
    )

    def __init__(self, client: Any, **kwargs: Any) -> None:
        super().__init__(client, **kwargs)
        options = client.transport_options
        self.options = BackendOptions(
            lease=float(options.get("lease", 30.0)),
            heartbeat=float(options.get("heartbeat", 30.0)),
            timeout=float(options.get("timeout", 10.0)),
            name=str(options.get("name", "kombu")),
        )
        #: Milliseconds, as stores count them.
        self.lease = int(self.options.lease * 1000)
        self.store: Store = open_store(client.hostname.removeprefix("kq-"), self.options)
        self._look_again_at = float("inf")
        self._keeper: _LeaseKeeper | None = None

    @classmethod
    def as_uri(cls, uri: str, include_password: bool = False, mask: str = "**") -> str:
        return uri if include_password else hide_password(uri)

    def driver_version(self) -> str:
        from kq.version import __version__

        return __version__

    def establish_connection(self) -> Any:
        self.store.ping()
        return super().establish_connection()

    def close_connection(self, connection: Any) -> None:
        super().close_connection(connection)
        if self._keeper is not None:
            self._keeper.stop()
        self.store.close()

    def drain_events(self, connection: Any, timeout: float | None = None) -> None:
        deadline = None if timeout is None else monotonic() + timeout
        while True:
            self._look_again_at = float("inf")
            if sum(channel.deliver() for channel in list(self.channels)):
                return
            now = monotonic()
            if deadline is not None and now >= deadline:
                raise socket.timeout("no message arrived in time")
            until = min(now + _LOOK_AGAIN, self._look_again_at, deadline or float("inf"))
            queues = {queue for channel in self.channels for queue, _, _ in channel.consumers.values()}
            self.store.wait(sorted(queues), max(0.0, until - now))

    def look_again_in(self, milliseconds: int | None) -> None:
        """Note that something becomes ready by itself."""
        if milliseconds is not None:
            self._look_again_at = min(self._look_again_at, monotonic() + milliseconds / 1000)

    def keep_leases(self) -> None:
        """Have the leases of all channels renewed from now on."""
        if self._keeper is None:
            self._keeper = _LeaseKeeper(self)
            self._keeper.start()


class _LeaseKeeper(Thread):
    """Renews what a connection's channels hold, every third of a lease, until the connection goes."""

    def __init__(self, transport: Transport) -> None:
        super().__init__(name="kq-leases", daemon=True)
        self._transport = weakref.ref(transport)
        self._every = transport.lease / 3000
        self._name = uuid4().hex
        self._stopped = Event()

    def stop(self) -> None:
        self._stopped.set()

    def run(self) -> None:
        while not self._stopped.wait(self._every):
            transport = self._transport()
            if transport is None:
                return
            held: dict[str, list[tuple[str, int]]] = {}
            for channel in list(transport.channels):
                for queue, lease in list(channel.held.values()):
                    held.setdefault(queue, []).append((lease.id, lease.token))
            for queue, pairs in held.items():
                try:
                    transport.store.renew(queue, pairs, transport.lease, self._name)
                except Error:
                    break  # unreachable for now: there are two more tries before a lease runs out
            del transport




def _to_envelope(message: dict[str, Any]) -> Envelope:
    """Turn Kombu's message into an envelope."""
    properties = {
        key: value for key, value in message["properties"].items() if key not in _LOCAL and value is not None
    }
    for key, name in (("content-type", "content_type"), ("content-encoding", "content_encoding")):
        if message.get(key) is not None:
            properties[name] = message[key]
    body = message["body"]
    id = properties.get("message_id")
    return Envelope(
        id if isinstance(id, str) and id else uuid4().hex,
        dict(message.get("headers") or {}),
        properties,
        body.encode() if isinstance(body, str) else bytes(body or b""),
    )


def _to_payload(lease: Lease, queue: str, tag: str) -> dict[str, Any]:
    """Turn a leased envelope into the mapping that Kombu makes its message from."""
    envelope = unpack_or_wrap(lease.raw, lease.id)
    properties = dict(envelope.properties)
    content_type = properties.pop("content_type", None)
    content_encoding = properties.pop("content_encoding", None)
    properties.setdefault("message_id", envelope.id)
    properties["delivery_tag"] = tag
    properties["delivery_info"] = {
        "exchange": "",
        "routing_key": queue,
        "redelivered": bool(lease.attempts or lease.deliveries),
    }
    return {
        "body": envelope.body,
        "content-type": content_type,
        "content-encoding": content_encoding,
        "headers": envelope.headers,
        "properties": properties,
    }


def _milliseconds(value: Any) -> int:
    """Read a time to live as AMQP writes it; 0 for none. One of 0 ms expires at once: the least we count."""
    try:
        return max(1, int(value))
    except (TypeError, ValueError):
        return 0


def _to_state(document: str) -> virtual.base.BrokerState:
    data = json.loads(document)
    state = virtual.base.BrokerState()
    for name, exchange in data.get("exchanges", {}).items():
        state.exchanges[name] = {**exchange, "table": [tuple(row) for row in exchange["table"]]}
    for queue, exchange, routing_key, arguments in data.get("bindings", []):
        state.binding_declare(queue, exchange, routing_key, arguments)
    return state


def _to_document(state: virtual.base.BrokerState) -> str:
    bindings: Iterable[Any] = sorted(([*key], arguments) for key, arguments in state.bindings.items())
    return json.dumps(
        {"exchanges": state.exchanges, "bindings": [[*key, arguments] for key, arguments in bindings]},
        sort_keys=True,
    )
