"""The backend for every store: memory, SQLite and Redis differ only in their primitives.

It reaches its store through kq's own Kombu transport, as ``channel.store``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence, Set
from math import ceil, isfinite
from threading import RLock
from time import monotonic
from typing import Any, Final

import kombu

from kq import clock
from kq.backend import (
    CALL_PART,
    BackendOptions,
    Capabilities,
    Publication,
    QueueInfo,
    QueueSpec,
    Role,
    Unconfirmed,
    unknown_options,
)
from kq.backends import kombu_lock  # noqa: F401
from kq.backends.store import PAGE, UNREACHABLE, BrokerAway, Entry, Lot, Store, pages
from kq.backends.stored_feed import StoredFeed
from kq.backends.stored_replay import Replay
from kq.backends.tls_parameters import separate
from kq.config import hide_password
from kq.envelope import Envelope, identify, pack, unpack_or_wrap
from kq.errors import Conflict, Error, Internal, NotFound

#: How much of a lease a single call may take, but seconds that it is given in any case.
_LEASE_PART: Final = 0.5
_LEAST_TIMEOUT: Final = 2.0


class StoredBackend:
    """A broker made of a store."""

    def __init__(self, url: str, options: BackendOptions) -> None:
        scheme = url.partition("://")[0].lower()
        if scheme in ("redis", "rediss"):
            # Before Kombu sees an ill-formed one, whose error would name pieces of it.
            separate(url, options.tls)
        self._url = url
        self._options = options
        self._scheme = scheme.replace("rediss", "redis")
        # A signal's handler may close it while the same thread connects: then that comes when it has done so.
        self._lock = RLock()
        self._is_connecting = self._is_to_be_closed = False
        # Not connected yet; but an ill-formed URL fails here.
        self._connection: Any = self._connect()
        self._own: Store = self._connection.transport.store
        self._shared: Store | None = None
        self._max_length: dict[str, int | None] = {}
        self.capabilities: Capabilities = self._own.capabilities

    def __repr__(self) -> str:
        return f"<StoredBackend {hide_password(self._url)}>"

    def _connect(self, timeout: float | None = None) -> Any:
        options = self._options
        return kombu.Connection(
            f"kq-{self._url}",
            transport_options={
                "lease": options.lease,
                "heartbeat": options.heartbeat,
                "timeout": options.timeout * CALL_PART if timeout is None else timeout,
                "name": options.name,
                "connect_timeout": options.connect_timeout,
                "tls": options.tls,
            },
        )

    def _store(self) -> Store:
        with self._lock:
            if self._shared is None:
                self._is_connecting = True
                try:
                    self._reach(self._connection)
                    self._shared = self._connection.channel().store
                finally:
                    self._is_connecting = False
                    if self._is_to_be_closed:
                        self.close()
            return self._own if self._shared is None else self._shared

    def _reach(self, connection: Any) -> None:
        # Tried again a little later; not where the broker has let us wait already.
        connection.ensure_connection(
            max_retries=1,
            interval_start=self._options.reconnect_wait,
            reraise_as_library_errors=False,
            timeout=min(self._options.connect_timeout, self._options.timeout) / 2,
        )

    def declare(self, queue: QueueSpec, *, create: bool, exact: bool) -> None:
        """See `Backend.declare`."""
        unknown_options(queue, self._scheme, frozenset())
        store = self._store()
        wanted = {"max_length": queue.max_length, "dead_letter": queue.dead_letter}
        found = store.declare(queue.id, wanted) if create else store.arguments(queue.id)
        if found is None and not create:
            raise NotFound(f"queue {queue.id} does not exist; declare it, or let create_queues make it")
        if found is not None and exact:
            for name, value in wanted.items():
                if name in found and found[name] != value:
                    raise Conflict(
                        f"queue {queue.id} exists with {name}={found[name]!r}, declared here with {name}={value!r}; "
                        "declare it alike, or delete the queue first"
                    )
        # Somebody who is not kq may have made the queue, without a word about that.
        length = (found or {}).get("max_length", queue.max_length)
        if length is None:
            # Some publishers have a new queue for each client.
            self._max_length.pop(queue.id, None)
        else:
            self._max_length[queue.id] = length
        if queue.dead_letter is not None:
            store.declare(queue.dead_letter, {})

    def publish(self, batch: Sequence[Publication], timeout: float) -> list[Error | None]:
        """See `Backend.publish`."""
        deadline = monotonic() + timeout
        # One that is not answered takes all the time that a call may.
        again_until = deadline - min(timeout, self._options.timeout) * CALL_PART
        store = self._store()
        results: list[Error | None] = [None] * len(batch)
        by_queue: dict[str, list[int]] = {}
        for index, publication in enumerate(batch):
            by_queue.setdefault(publication.queue.id, []).append(index)
        away: Error | None = None
        for queue, indexes in by_queue.items():
            entries = [_entry(batch[index]) for index in indexes]
            try:
                if away is not None:
                    raise away
                accepted = self._put(store, queue, entries, deadline, again_until)
            except Error as error:
                for index in indexes:
                    results[index] = error
                if isinstance(error, UNREACHABLE):
                    # From the others as well: each would wait for it as long.
                    away = error
                continue
            if accepted == len(entries):
                continue
            if accepted is None:
                text = f"queue {queue} does not exist any more; the next publish makes it again"
                failed = Internal(text, details={"reason": "unroutable"})
                accepted = 0
            else:
                length = self._max_length.get(queue)
                why = "the broker has no room for more" if length is None else f"it holds {length} messages"
                failed = Internal(f"queue {queue} is full: {why}", details={"reason": "full"})
            for index in indexes[accepted:]:
                results[index] = failed
        return results

    def send(self, batch: Sequence[Publication]) -> Unconfirmed | None:
        """See `Backend.send`."""
        # Not through `_store`, which waits for whoever connects.
        store = self._shared
        if store is None:
            return None
        if self._max_length and len(batch) > 1:
            # Of several there may be room for some, and those may have been taken by when all are published once more.
            limited = [publication.queue.id for publication in batch if publication.queue.id in self._max_length]
            if len(limited) > len(set(limited)):
                return None
        lots: list[Lot] = []
        for publication in batch:
            queue = publication.queue.id
            if not lots or lots[-1].queue != queue:
                lots.append(Lot(queue, [], self._max_length.get(queue)))
            lots[-1].entries.append(_entry(publication))
        return store.send(lots)

    def _put(self, store: Store, queue: str, entries: list[Entry], deadline: float, again_until: float) -> int | None:
        def put() -> int | None:
            if monotonic() >= deadline:
                raise Internal("the broker did not confirm in time", details={"reason": "timeout"})
            return store.put(queue, entries, self._max_length.get(queue))

        try:
            return put()
        except BrokerAway as error:
            if error.details.get("reason") != "unavailable" or not error.retryable or monotonic() > again_until:
                raise
        # A connection that broke: the same ids again are harmless.
        return put()

    def feed(self, queues: Sequence[QueueSpec], prefetch: int) -> StoredFeed:
        """See `Backend.feed`."""
        # A call that hangs for longer would cost the leases of all that is in hand.
        connection = self._connect(min(self._options.timeout, max(_LEAST_TIMEOUT, self._options.lease * _LEASE_PART)))
        store: Store = connection.transport.store
        try:
            self._reach(connection)
            return StoredFeed(connection, store, queues, self._options.lease)
        except BaseException:
            connection.close()
            store.close()
            raise

    def info(self, queue: QueueSpec) -> QueueInfo:
        """See `Backend.info`."""
        store = self._store()
        if store.arguments(queue.id) is None:
            raise NotFound(f"queue {queue.id} does not exist; check its id and the broker's URL")
        counts = store.counts(queue.id)
        dead = None
        if queue.dead_letter is not None:
            letters = store.counts(queue.dead_letter)
            dead = letters.ready + letters.delayed + letters.leased
        stamps = [unpack_or_wrap(raw, "").properties.get("timestamp") for raw in counts.heads]
        ages = [clock.now() - stamp for stamp in stamps if isinstance(stamp, (int, float)) and isfinite(stamp)]
        return QueueInfo(
            message_count=counts.ready + counts.delayed + counts.leased,
            ready=counts.ready,
            delayed=counts.delayed,
            in_flight=counts.leased,
            dead=dead,
            consumer_count=counts.consumers,
            oldest_age=max(0.0, *ages) if ages else None,
        )

    def purge(self, queue: QueueSpec) -> int:
        """See `Backend.purge`."""
        return self._store().remove(queue.id, None)

    def browse(self, queue: QueueSpec, limit: int, offset: int) -> list[Envelope]:
        """See `Backend.browse`."""
        store = self._store()
        letters: list[Envelope] = []
        while len(letters) < limit:
            page = store.browse(queue.id, min(PAGE, limit - len(letters)), offset + len(letters))
            if not page:
                break
            letters += (unpack_or_wrap(raw, id) for id, raw in page)
        return letters

    def find(self, queue: QueueSpec, id: str) -> Envelope | None:
        """See `Backend.find`."""
        store = self._store()
        # A stranger may have stored it under any other id.
        for pairs in (store.look(queue.id, [id]), pages(store, queue.id)):
            for letter, _ in _among(pairs, {id}):
                return letter
        return None

    def remove(self, queue: QueueSpec, ids: Sequence[str] | None) -> int:
        """See `Backend.remove`."""
        store = self._store()
        if ids is None:
            return store.remove(queue.id, None)
        # Several letters may have one id: then all but the first are kept under others.
        keys = {key: letter.id for letter, key in _among(store.look(queue.id, ids), set(ids))}
        if missing := set(ids).difference(keys.values()):
            # Or all, if a stranger has put them there.
            keys |= {key: letter.id for letter, key in _among(pages(store, queue.id), missing)}
        return store.remove(queue.id, list(keys)) if keys else 0

    def replay(
        self, dead: QueueSpec, ids: Sequence[str] | None, target: QueueSpec, revive: Callable[[Envelope], Envelope]
    ) -> int:
        """See `Backend.replay`."""
        replay = Replay(self._store(), dead.id, target.id, revive)
        return replay.all() if ids is None else replay.these(ids)

    def check(self, handler_timeout: float | None = None) -> list[str]:
        """See `Backend.check`."""
        return self._store().warnings()

    def acl(self, role: Role, queues: Sequence[str]) -> str:
        """See `kq.backend.Granting`."""
        return self._own.acl(role, queues)

    def close(self) -> None:
        """See `Backend.close`."""
        with self._lock:
            self._is_to_be_closed = self._is_connecting
            if self._is_connecting:
                return
            self._shared = None
        self._connection.close()
        self._own.close()


def _entry(publication: Publication) -> Entry:
    envelope = publication.envelope
    return Entry(envelope.id, pack(envelope), envelope.priority, ceil(publication.delay * 1000))


def _among(pairs: Iterable[tuple[str, bytes]], ids: Set[str]) -> Iterator[tuple[Envelope, str]]:
    """Yield those messages that have one of these ids, and what they are stored under."""
    for key, raw in pairs:
        # All of it is read only where it may be one: most are not.
        if key in ids or identify(raw, key) in ids:
            letter = unpack_or_wrap(raw, key)
            if letter.id in ids:
                yield letter, key
