"""kq's own Kombu transport, over any `Store`.

Plain Kombu programs run on it unchanged: direct, topic and fanout exchanges, priorities (9 first, as
in AMQP), message and queue time to live, requeue, ``SimpleQueue``, pools. What Kombu's interface lacks
hangs off the channel as ``channel.store``.

A delivered message is leased, not popped. A thread of the connection renews the leases of whatever
the program has not acknowledged; if the program dies, the messages return by themselves.
"""

from __future__ import annotations

import weakref
from contextlib import suppress
from threading import Event, Thread
from time import monotonic
from typing import Any, Final
from urllib.parse import quote
from uuid import uuid4

from kombu.transport import base, virtual
from kombu.utils.url import as_url, parse_url

from kq import forking
from kq.backend import BackendOptions
from kq.backends.store import UNREACHABLE, Store
from kq.backends.store_url import open_store
from kq.backends.virtual_channel import Channel
from kq.config import hide_password
from kq.errors import Error

#: Seconds after which a waiting consumer looks again although nothing woke it.
_LOOK_AGAIN: Final = 5.0


class Transport(virtual.Transport):
    """A Kombu transport for ``kq-memory``, ``kq-sqlite``, ``kq-redis`` and ``kq-rediss`` URLs."""

    Channel = Channel
    can_parse_url = True
    driver_type = "kq"
    driver_name = "kq"
    connection_errors = UNREACHABLE
    channel_errors = (*virtual.Transport.channel_errors, Error)
    recoverable_connection_errors = UNREACHABLE
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
            connect_timeout=float(options.get("connect_timeout", 5.0)),
            tls=options.get("tls"),
        )
        #: Milliseconds, as stores count them.
        self.lease = int(self.options.lease * 1000)
        # After a failover Kombu names the broker in pieces, which neither it nor we can always put together.
        client.hostname = _url_of(client)
        self.store: Store = open_store(client.hostname.removeprefix("kq-"), self.options)
        #: Messages delivered beyond one for each call of `drain_events`.
        self.events_ahead = 0
        self._waiting = False
        self._look_again_at = float("inf")
        self._keeper: _LeaseKeeper | None = None
        #: By which it is counted among the consumers of queues.
        self.consumer = uuid4().hex
        #: Whether the broker was away when we were to be counted no more.
        self.is_away = False
        forking.enrol(self, forking.Stage.OPENS)

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
        # One call for each message, as in AMQP: programs count them.
        if self.events_ahead > 0:
            self.events_ahead -= 1
            return
        deadline = None if timeout is None else monotonic() + timeout
        while True:
            self._look_again_at = float("inf")
            count = sum(channel.deliver() for channel in list(self.channels))
            if count:
                self.events_ahead = count - 1 if any(channel.consumers for channel in self.channels) else 0
                return
            now = monotonic()
            if deadline is not None and now >= deadline:
                raise TimeoutError("no message arrived in time")
            until = min(now + _LOOK_AGAIN, self._look_again_at, deadline or float("inf"))
            # Set before the room is counted: who makes room later ends the wait.
            self._waiting = True
            try:
                # Queues for which there is no room are not listened to: a wake-up that we cannot follow
                # would be missing elsewhere.
                queues = {queue for channel in list(self.channels) for queue in channel.awaited()}
                self.store.wait(sorted(queues), max(0.0, until - now))
            finally:
                self._waiting = False

    def made_room(self) -> None:
        """Note that a channel may take more messages. Safe in any thread."""
        if self._waiting:
            self.store.wake()

    def look_again_in(self, milliseconds: int | None) -> None:
        """Note that something becomes ready by itself."""
        if milliseconds is not None:
            self._look_again_at = min(self._look_again_at, monotonic() + milliseconds / 1000)

    def count_in(self, queue: str) -> None:
        """Have this connection be counted among the consumers of a queue, until it is counted out or gone."""
        answer = self.store.renew({queue: []}, self.lease, self.consumer)[queue]
        if isinstance(answer, Error):
            raise answer
        self.is_away = False
        self.keep_leases()

    def count_out(self, queue: str) -> None:
        """Count it no more, if none of its channels consumes the queue."""
        if not any(queue == consumed for channel in self.channels for consumed, _, _ in channel.consumers.values()):
            if self.is_away:
                # It is not waited for once more: we are forgotten by ourselves.
                return
            try:
                self.store.leave([queue], self.consumer)
            except UNREACHABLE:
                self.is_away = True
            except Error:
                pass

    def before_fork(self, timeout: float) -> None:
        """Nothing: what a child must not do it does not do."""

    def after_fork_in_parent(self) -> None:
        """Nothing."""

    def after_fork_in_child(self) -> None:
        """Leave to the parent what it holds: Kombu closes pooled connections in children of `multiprocessing`."""
        self.consumer = uuid4().hex
        for channel in self.channels:
            channel.held.clear()
            if channel._qos is not None:
                channel._qos.leave_to_parent()

    def keep_leases(self) -> None:
        """Have the leases of all channels renewed from now on."""
        # It is not there in a process that was forked from the one that has it.
        if self._keeper is None or not self._keeper.is_alive():
            self._keeper = _LeaseKeeper(self)
            self._keeper.start()


class _LeaseKeeper(Thread):
    """Renews what a connection's channels hold, every third of a lease, until the connection goes."""

    def __init__(self, transport: Transport) -> None:
        super().__init__(name="kq-leases", daemon=True)
        self._transport = weakref.ref(transport)
        self._every = transport.lease / 3000
        self._stopped = Event()

    def stop(self) -> None:
        self._stopped.set()

    def run(self) -> None:
        while not self._stopped.wait(self._every):
            if not self._renew():
                return

    def _renew(self) -> bool:
        """Renew once; False if the connection is gone. No reference to it outlives the call."""
        transport = self._transport()
        if transport is None:
            return False
        held: dict[str, list[tuple[str, int]]] = {}
        for channel in list(transport.channels):
            for queue, lease in list(channel.held.values()):
                held.setdefault(queue, []).append((lease.id, lease.token))
            for queue, _, _ in list(channel.consumers.values()):
                held.setdefault(queue, [])
        if held:
            # What is out of reach, or order, for now: there are two more tries before a lease runs out.
            with suppress(Error):
                transport.store.renew(held, transport.lease, transport.consumer)
                transport.is_away = False
        return True


def _url_of(client: Any) -> str:
    """Return the URL of a Kombu connection: the first one it has whole, alternatives taken apart."""
    host = client.hostname or ""
    if "://" in host:
        return str(host)
    for url in client.alt:
        if "://" in url:
            parts = parse_url(url)
            same = (
                parts["transport"] == client.transport_cls
                and all(parts[name] == getattr(client, name) for name in ("hostname", "userid", "password"))
                # Kombu lets these two of an earlier URL stand where the present one has none.
                and all(parts[name] in (None, getattr(client, name)) for name in ("port", "virtual_host"))
            )
            if same:
                return str(url)
    path = "" if client.virtual_host == "/" else quote(client.virtual_host)
    return str(as_url(client.transport_cls, host, client.port, client.userid, client.password, path))
