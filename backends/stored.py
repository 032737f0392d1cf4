"""The backend for every store: memory, SQLite and Redis differ only in their primitives.

It reaches its store through kq's own Kombu transport, as ``channel.store``.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from contextlib import suppress
from math import ceil, inf
from threading import Lock
from time import monotonic
from typing import Any, Final
from uuid import uuid4

import kombu

from kq import clock
from kq.backend import (
    BackendOptions,
    Capabilities,
    Delivery,
    Envelope,
    Publication,
    QueueInfo,
    QueueSpec,
    Role,
    Settlement,
    Settling,
    bury,
    identify,
    pack,
    unknown_options,
    unpack_or_wrap,
)
from kq.backends.store import AGAIN, TAKE_BYTES, Ahead, BrokerAway, Ending, Entry, Lease, Store, Taken
from kq.backends.tls import separate
from kq.config import hide_password
from kq.errors import Conflict, Error, Internal, NotFound
from kq.header import NORMAL

#: Seconds after which a feed looks at a quiet queue although nothing woke it: the insurance against
#: a wake-up that died with the worker it went to.
_LOOK_AGAIN: Final = 5.0
#: Seconds between two such looks of one feed, so that a feed of many queues stays quiet as well.
_LOOK_SPACING: Final = 0.75
#: How much of a lease a single call may take, but seconds that it is given in any case.
_LEASE_PART: Final = 0.5
_LEAST_TIMEOUT: Final = 2.0
#: Messages that are taken at most as soon as there are some, before anybody asks for them.
_AHEAD: Final = 10
#: Messages that one look into a queue of dead letters reads.
_PAGE: Final = 200
_NONE: Final[Set[int]] = frozenset()


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
        self._lock = Lock()
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
                "timeout": options.timeout if timeout is None else timeout,
                "name": options.name,
                "connect_timeout": options.connect_timeout,
                "tls": options.tls,
            },
        )

    def _store(self) -> Store:
        with self._lock:
            if self._shared is None:
                self._reach(self._connection)
                self._shared = self._connection.channel().store
            return self._shared

    def _reach(self, connection: Any) -> None:
        # Kombu tries again two seconds later; not where the broker has let us wait already.
        within = self._options.connect_timeout / 2
        connection.ensure_connection(max_retries=1, reraise_as_library_errors=False, timeout=within)

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
        self._max_length[queue.id] = queue.max_length if found is None else found.get("max_length")
        if queue.dead_letter is not None:
            store.declare(queue.dead_letter, {})

    def publish(self, batch: Sequence[Publication], timeout: float) -> list[Error | None]:
        """See `Backend.publish`."""
        deadline = monotonic() + timeout
        store = self._store()
        results: list[Error | None] = [None] * len(batch)
        by_queue: dict[str, list[int]] = {}
        for index, publication in enumerate(batch):
            by_queue.setdefault(publication.queue.id, []).append(index)
        for queue, indexes in by_queue.items():
            entries = [_entry(batch[index]) for index in indexes]
            try:
                accepted = self._put(store, queue, entries, deadline)
            except Error as error:
                for index in indexes:
                    results[index] = error
                continue
            if accepted == len(entries):
                continue
            if accepted is None:
                text = f"queue {queue} does not exist any more; the next publish makes it again"
                failed = Internal(text, details={"reason": "unroutable"})
                accepted = 0
            else:
                length = self._max_length.get(queue)
                failed = Internal(f"queue {queue} is full: it holds {length} messages", details={"reason": "full"})
            for index in indexes[accepted:]:
                results[index] = failed
        return results

    def _put(self, store: Store, queue: str, entries: list[Entry], deadline: float) -> int | None:
        def put() -> int | None:
            if monotonic() >= deadline:
                raise Internal("the broker did not confirm in time", details={"reason": "timeout"})
            return store.put(queue, entries, self._max_length.get(queue))

        try:
            return put()
        except BrokerAway as error:
            if error.details.get("reason") != "unavailable" or not error.retryable:
                raise
        # A connection that broke while it was idle: the same ids again are harmless.
        store.ping()
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
            raise NotFound(f"queue {queue.id} does not exist")
        counts = store.counts(queue.id)
        dead = None
        if queue.dead_letter is not None:
            letters = store.counts(queue.dead_letter)
            dead = letters.ready + letters.delayed + letters.leased
        stamps = [unpack_or_wrap(raw, "").properties.get("timestamp") for raw in counts.heads]
        ages = [clock.now() - stamp for stamp in stamps if isinstance(stamp, (int, float))]
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
        return [unpack_or_wrap(raw, id) for id, raw in self._store().browse(queue.id, limit, offset)]

    def remove(self, queue: QueueSpec, ids: Sequence[str] | None) -> int:
        """See `Backend.remove`."""
        store = self._store()
        if ids is None:
            return store.remove(queue.id, None)
        wanted = set(ids)
        # Several letters may have one id: then all but the first are kept under others.
        again = [key for key, raw in _pages(store, queue.id) if AGAIN in key and identify(raw, key) in wanted]
        return store.remove(queue.id, [*ids, *again])

    def replay(
        self, dead: QueueSpec, ids: Sequence[str] | None, target: QueueSpec, revive: Callable[[Envelope], Envelope]
    ) -> int:
        """See `Backend.replay`."""
        store = self._store()
        wanted = None if ids is None else set(ids)
        chosen = []
        for id, raw in _pages(store, dead.id):
            envelope = unpack_or_wrap(raw, id)
            origin = envelope.headers.get("x_original_queue", target.id)
            if origin == target.id and (wanted is None or envelope.id in wanted):
                chosen.append((id, revive(envelope)))
        moved = 0
        for id, envelope in chosen:
            entry = Entry(envelope.id, pack(envelope), envelope.priority)
            moved += store.move(dead.id, target.id, id, None, entry)
        return moved

    def check(self, handler_timeout: float | None = None) -> list[str]:
        """See `Backend.check`."""
        return self._store().warnings()

    def acl(self, role: Role, queues: Sequence[str]) -> str:
        """See `kq.backend.Granting`."""
        return self._own.acl(role, queues)

    def close(self) -> None:
        """See `Backend.close`."""
        with self._lock:
            self._shared = None
        self._connection.close()
        self._own.close()


class StoredFeed:
    """A consumer of a store's queues. One thread's, but for `wake`."""

    def __init__(self, connection: Any, store: Store, queues: Sequence[QueueSpec], lease: float) -> None:
        self._connection = connection
        self._store = store
        self._specs = {queue.id: queue for queue in queues}
        self._order = deque(self._specs)
        self._lease = int(lease * 1000)
        self._name = uuid4().hex
        self._held: dict[tuple[str, str, int], Delivery] = {}
        #: What a `settle` carried out before it raised: when it is called again, that is not late.
        self._settled: set[tuple[str, str, int]] = set()
        self._look_again = max(_LOOK_AGAIN, len(self._specs) * _LOOK_SPACING)
        self._look_at = dict.fromkeys(self._specs, 0.0)
        #: Queues of which more could be fetched, and how much.
        self._room: dict[str, int] = {}
        #: What was taken ahead and has not been fetched.
        self._early: deque[Delivery] = deque()
        #: The queue that had something last.
        self._latest = self._order[0] if self._order else ""
        self._closed = False
        self.losses = 0
        self.renew()

    def fetch(self, credit: int, caps: Mapping[str, int]) -> list[Delivery]:
        """See `Feed.fetch`."""
        self._collect()
        caps = dict(caps)
        deliveries = self._hand_over(credit, caps) if self._early else []
        self._room.clear()
        self._order.rotate(-1)
        for queue in self._order:
            try:
                if self._is_in_the_way(queue, credit - len(deliveries), caps):
                    self._collect(withdraw=True)
                    deliveries += self._hand_over(credit - len(deliveries), caps)
                room = min(credit - len(deliveries), caps.get(queue, credit))
                if room > 0 and self._look_at[queue] <= monotonic():
                    ahead = self._store.ahead
                    limit = room if ahead is None else room - ahead.limit
                    found = self._received(queue, self._store.take(queue, limit, self._lease), limit)
                    deliveries += found
                    room -= len(found)
            except Error:
                if not deliveries:
                    raise
                # These are leased already and must reach their worker; the next fetch meets the error.
                break
            if room > 0 and self._look_at[queue] > monotonic():
                self._room[queue] = room
        return deliveries

    def _is_in_the_way(self, queue: str, credit: int, caps: Mapping[str, int]) -> bool:
        """Tell whether it is time to look into a queue, and what may still be taken ahead has the room for it."""
        ahead = self._store.ahead
        if ahead is None or self._look_at[queue] > monotonic():
            return False
        return ahead.queue == queue or min(credit, caps.get(queue, credit)) <= ahead.limit

    def _received(self, queue: str, taken: Taken, limit: int) -> list[Delivery]:
        """Hold what was taken, and decide when to look again."""
        ask = bool(taken.leases) and self._specs[queue].replay_window > 0
        replayed = self._replayed(queue, taken.leases) if ask else _NONE
        deliveries = []
        size = 0
        for id, raw, token, attempts, crashes, before, _ in taken.leases:
            delivery = Delivery(queue, id, raw, attempts, crashes, before, token, token in replayed)
            self._held[queue, id, token] = delivery
            deliveries.append(delivery)
            size += len(raw)
        if deliveries:
            self._latest = queue
        if len(deliveries) < limit and size < TAKE_BYTES:
            quiet = self._look_again if taken.more_in is None else min(self._look_again, taken.more_in / 1000)
            self._look_at[queue] = monotonic() + quiet
        else:
            self._look_at[queue] = 0.0
        return deliveries

    def _collect(self, *, withdraw: bool = False) -> None:
        """Hold what was taken ahead."""
        for ahead, taken in self._store.collect(withdraw=withdraw):
            self._early.extend(self._received(ahead.queue, taken, ahead.limit))

    def _hand_over(self, credit: int, caps: dict[str, int]) -> list[Delivery]:
        """Return what was taken ahead, as far as there is room for it, and take that off ``caps``."""
        deliveries: list[Delivery] = []
        kept: deque[Delivery] = deque()
        while self._early:
            delivery = self._early.popleft()
            if delivery.lost:
                continue
            room = caps.get(delivery.queue, credit)
            if len(deliveries) < credit and room > 0:
                deliveries.append(delivery)
                if delivery.queue in caps:
                    caps[delivery.queue] = room - 1
            else:
                kept.append(delivery)
        self._early = kept
        return deliveries

    def _replayed(self, queue: str, leases: Sequence[Lease]) -> Set[int]:
        """Return the tokens of those leases whose message has been completed before."""
        # By the envelope's id, which is what is signed: a copy may be stored under any other.
        ids = {lease.token: identify(lease.raw, lease.id) for lease in leases}
        try:
            completed = self._store.completed(queue, list(ids.values()))
        except BaseException:
            # Nobody may see them unchecked. If they cannot be put back, they return when their leases run out.
            with suppress(Error):
                self._store.settle(queue, [
                    Ending(lease.id, lease.token, "release", deliveries=lease.deliveries) for lease in leases
                ])  # fmt: skip
            raise
        return {token for token, id in ids.items() if id in completed}

    def settle(self, settlements: Sequence[Settlement]) -> Settling:
        """See `Feed.settle`."""
        late: list[Settlement] = []
        failed: list[tuple[Settlement, Error]] = []
        by_queue: dict[str, list[Settlement]] = {}
        for settlement in settlements:
            key = _key(settlement.delivery)
            if key in self._held:
                by_queue.setdefault(settlement.delivery.queue, []).append(settlement)
            elif key not in self._settled:
                late.append(settlement)
        for queue, group in by_queue.items():
            self._settle_plain(queue, group, late, failed)
            self._settle_dead(queue, group, late, failed)
        self._settled.clear()
        return Settling(late, failed)

    def _settle_plain(
        self, queue: str, group: list[Settlement], late: list[Settlement], failed: list[tuple[Settlement, Error]]
    ) -> None:
        spec = self._specs[queue]
        pairs = [(settlement, ending) for settlement in group if (ending := _ending(spec, settlement)) is not None]
        # What takes no room first, and apart: it can be carried out where the rest finds the store full.
        acks = [pair for pair in pairs if pair[1].action == "ack"]
        for part in (acks, [pair for pair in pairs if pair[1].action != "ack"]):
            if not part:
                continue
            try:
                answers = self._store.settle(queue, [ending for _, ending in part])
            except BrokerAway:
                raise
            except Error as error:
                failed += [(settlement, error) for settlement, _ in part]
                continue
            for (settlement, ending), in_time in zip(part, answers, strict=True):
                self._let_go(settlement, in_time, late)
                if in_time and ending.action != "ack":
                    soon = monotonic() + ending.delay / 1000
                    self._look_at[queue] = min(self._look_at[queue], soon)

    def _settle_dead(
        self, queue: str, group: list[Settlement], late: list[Settlement], failed: list[tuple[Settlement, Error]]
    ) -> None:
        for settlement in group:
            if _ending(self._specs[queue], settlement) is not None:
                continue
            try:
                in_time = self._bury(settlement)
            except BrokerAway:
                raise
            except Error as error:
                failed.append((settlement, error))
            else:
                self._let_go(settlement, in_time, late)

    def _let_go(self, settlement: Settlement, in_time: bool, late: list[Settlement]) -> None:
        key = _key(settlement.delivery)
        self._held.pop(key, None)
        if in_time:
            self._settled.add(key)
        else:
            late.append(settlement)

    def _bury(self, settlement: Settlement) -> bool:
        delivery, outcome = settlement.delivery, settlement.outcome
        target = self._specs[delivery.queue].dead_letter
        assert target is not None
        letter = bury(unpack_or_wrap(delivery.raw, delivery.id), delivery.queue, outcome, clock.now())
        # One priority for all: dead letters are kept in the order of their deaths.
        entry = Entry(letter.id, pack(letter), NORMAL)
        if self._store.move(delivery.queue, target, delivery.id, delivery.receipt, entry):
            return True
        # It is late, or a letter of this id is there already: of another queue, or of an earlier life.
        entry = entry._replace(id=f"{letter.id}{AGAIN}{uuid4().hex}")
        return self._store.move(delivery.queue, target, delivery.id, delivery.receipt, entry)

    def put_back(self) -> None:
        """See `Feed.put_back`."""
        self._collect(withdraw=True)
        early, self._early = self._early, deque()
        if early:
            self.settle([Settlement(delivery, delivery.as_it_came) for delivery in early])

    def due_in(self) -> float | None:
        """See `Feed.due_in`."""
        self._collect(withdraw=True)
        if self._early:
            return 0.0
        soonest = None
        for queue in self._specs:
            more_in = self._store.take(queue, 0, self._lease).more_in
            if self._store.counts(queue).ready:
                self._look_at[queue] = 0.0
                more_in = 0
            if more_in is not None and (soonest is None or more_in < soonest):
                soonest = more_in
                self._look_at[queue] = min(self._look_at[queue], monotonic() + more_in / 1000)
        return None if soonest is None else soonest / 1000

    def renew(self) -> None:
        """See `Feed.renew`."""
        with suppress(Error):
            # What nobody has noticed yet has a lease as well.
            self._collect()
        held: dict[str, list[tuple[str, int]]] = {queue: [] for queue in self._specs}
        for queue, id, token in self._held:
            held[queue].append((id, token))
        failure: Error | None = None
        for queue, pairs in held.items():
            try:
                kept = self._store.renew(queue, pairs, self._lease, self._name)
            except BrokerAway:
                raise
            except Error as error:
                # One queue that is out of order is not to cost the others their leases.
                failure = error
                continue
            for (id, token), ours in zip(pairs, kept, strict=True):
                if not ours:
                    self._held.pop((queue, id, token)).lost = True
                    self.losses += 1
        if failure is not None:
            raise failure

    def wait(self, timeout: float) -> None:
        """See `Feed.wait`."""
        # Queues in which the last fetch left no room are not listened to: a wake-up that we cannot
        # follow would be missing elsewhere.
        soonest = min((self._look_at[queue] for queue in self._room), default=inf)
        until = min(timeout, soonest - monotonic())
        if until <= 0 and self._room:
            return
        for queue in self._store.wait(sorted(self._room), max(0.0, until), self._ahead()):
            self._look_at[queue] = 0.0

    def _ahead(self) -> Ahead | None:
        """Return what to take as soon as it is there: of the queue that had something last, as far as one can tell."""
        queue = self._latest if self._latest in self._room else next(iter(self._room), None)
        return None if queue is None else Ahead(queue, min(self._room[queue], _AHEAD), self._lease)

    def wake(self) -> None:
        """See `Feed.wake`."""
        self._store.wake()

    def close(self) -> None:
        """See `Feed.close`."""
        if self._closed:
            return
        self._closed = True
        with suppress(Error):
            self._collect(withdraw=True)
        try:
            by_queue: dict[str, list[Ending]] = {}
            for (queue, id, token), delivery in self._held.items():
                # As it came: that it was here for a moment settles nothing of what others have lost.
                ending = Ending(id, token, "release", deliveries=delivery.deliveries)
                by_queue.setdefault(queue, []).append(ending)
            for queue, endings in by_queue.items():
                self._store.settle(queue, endings)
            for queue in self._specs:
                self._store.leave(queue, self._name)
        except Error:
            pass  # unreachable: the leases run out by themselves
        finally:
            self._held.clear()
            self._connection.close()


def _entry(publication: Publication) -> Entry:
    envelope = publication.envelope
    return Entry(envelope.id, pack(envelope), envelope.priority, ceil(publication.delay * 1000))


def _key(delivery: Delivery) -> tuple[str, str, int]:
    return delivery.queue, delivery.id, delivery.receipt


def _ending(queue: QueueSpec, settlement: Settlement) -> Ending | None:
    """Return how a store ends a lease, or None if the message goes to the dead-letter queue."""
    delivery, outcome = settlement.delivery, settlement.outcome
    if outcome.action == "done":
        if not queue.replay_window:
            return Ending(delivery.id, delivery.receipt, "ack")
        keep = ceil(queue.replay_window * 1000)
        id = identify(delivery.raw, delivery.id)
        return Ending(delivery.id, delivery.receipt, "ack", keep=keep, completes=id)
    if outcome.action == "release":
        return Ending(delivery.id, delivery.receipt, "release", deliveries=outcome.deliveries)
    delay = outcome.delay
    if outcome.action == "dead":
        if queue.dead_letter is not None:
            return None
        # A dead-letter queue has none of its own: what fails there stays, and rests before it is tried again.
        delay = queue.policy.backoff.max
    return Ending(delivery.id, delivery.receipt, "retry", ceil(delay * 1000), outcome.attempts, outcome.crashes)


def _pages(store: Store, queue: str) -> Iterator[tuple[str, bytes]]:
    offset = 0
    while True:
        page = store.browse(queue, _PAGE, offset)
        yield from page
        if len(page) < _PAGE:
            return
        offset += len(page)
