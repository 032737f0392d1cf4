"""The small contract that a store implements to become a kq broker: its primitives.

Each primitive is atomic: one critical section in memory, one transaction in SQLite, one Lua call in
Redis. Times are the store's own, in milliseconds; tokens fence off workers whose lease ran out.
What a message is, when it is retried and where dead letters go is decided above.

A message is in exactly one state: *ready*, *delayed* until a moment, or *leased* under a token. A
lease that nobody renews ends by itself: the message is ready again, at its old place, with one more
unsettled delivery on its account.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, Final, NamedTuple, Protocol
from uuid import uuid4

from kq.backend import Capabilities, Role, Unconfirmed, UntrustedBroker
from kq.errors import Error, Internal

#: Bytes of messages after which one `Store.take` takes no more, so that large ones fill nobody's memory.
TAKE_BYTES: Final = 8 * 2**20
#: Messages of one take that say that there may be more, however many were asked for: some stores return no more.
TAKE_MOST: Final = 500


#: Stands in the keys of dead letters whose id another one has already, behind the id. No publisher's id has it.
AGAIN: Final = "\x02"


#: Messages that are looked at in one `Store.browse`, at most.
PAGE: Final = 5000
#: Messages, and bytes of them, that one `Store.move` carries at most, but for a single one.
_LOT: Final = 64
_LOT_BYTES: Final = 4 * 2**20


class BrokerAway(Internal):
    """The broker cannot be reached, or did not answer; what `kombu` calls a connection error."""


#: What is raised where there is no way to the broker: whatever else is to be asked for meets it as well.
UNREACHABLE: Final = (BrokerAway, UntrustedBroker)


class Entry(NamedTuple):
    """A message to store.

    Attributes:
        id: Unique among what the queue holds; a second one is ignored.
        raw: The packed envelope.
        priority: 0 to 9, 9 first.
        delay: Milliseconds until it is ready.
        ttl: Milliseconds after which it counts as expired; 0 for never.
    """

    id: str
    raw: bytes
    priority: int
    delay: int = 0
    ttl: int = 0


class Lot(NamedTuple):
    """Messages to store in one queue.

    Attributes:
        queue: Which.
        entries: The messages, in order.
        max_length: Messages that the queue holds, at most; None for any number.
    """

    queue: str
    entries: list[Entry]
    max_length: int | None


class Move(NamedTuple):
    """A message that goes to another queue, rewritten.

    Attributes:
        id: The message's id.
        token: The lease it is held under, or None for one that waits.
        entry: What to store there.
    """

    id: str
    token: int | None
    entry: Entry


def under_another_id(entry: Entry) -> Entry:
    """Return a dead letter as it is stored where another one of its id is there already."""
    return entry._replace(id=f"{entry.id}{AGAIN}{uuid4().hex}")


def in_lots(moves: Iterable[Move]) -> Iterator[list[Move]]:
    """Divide moves, in their order, into as many as one call carries."""
    lot: list[Move] = []
    size = 0
    for move in moves:
        if lot and (len(lot) == _LOT or size + len(move.entry.raw) > _LOT_BYTES):
            yield lot
            lot, size = [], 0
        lot.append(move)
        size += len(move.entry.raw)
    if lot:
        yield lot


def pages(store: Store, queue: str) -> Iterator[tuple[str, bytes]]:
    """Yield (id, raw) of all messages of a queue that wait; see `Store.browse`."""
    offset = 0
    while page := store.browse(queue, PAGE, offset):
        yield from page
        offset += len(page)


class Lease(NamedTuple):
    """A message that a consumer holds.

    Attributes:
        id: The message's id.
        raw: The packed envelope.
        token: What fences off everybody else.
        attempts: Charged so far.
        crashes: Charged so far.
        deliveries: Leases in a row that ran out.
        expired: Whether its time to live is over.
    """

    id: str
    raw: bytes
    token: int
    attempts: int
    crashes: int
    deliveries: int
    expired: bool


class Taken(NamedTuple):
    """What `Store.take` found.

    Attributes:
        leases: The messages, in order.
        more_in: Milliseconds until a delayed message is due or a lease runs out; None if there is none.
    """

    leases: list[Lease]
    more_in: int | None


class Ahead(NamedTuple):
    """A `Store.take` that is to follow the end of a `Store.wait` at once.

    Attributes:
        queue: Where from.
        limit: Messages at most.
        lease: Milliseconds.
    """

    queue: str
    limit: int
    lease: int


class Ending(NamedTuple):
    """The end of a lease.

    Attributes:
        id: The message's id.
        token: The lease's.
        action: ``ack`` removes it, ``retry`` makes it ready after ``delay``, ``release`` puts it back.
        delay: Milliseconds, for ``retry``.
        attempts: Charged from now on, for ``retry``.
        crashes: Charged from now on, for ``retry``.
        keep: Milliseconds for which `Store.completed` knows of it, for ``ack``; 0 for not at all.
        deliveries: Leases that ran out and stay on the account, for ``release``.
        completes: The id by which it does: the envelope's. A stranger may have stored it under another one.
    """

    id: str
    token: int
    action: str
    delay: int = 0
    attempts: int = 0
    crashes: int = 0
    keep: int = 0
    completes: str = ""
    deliveries: int = 0


class Counts(NamedTuple):
    """What a queue holds, and the packed envelopes at its head, by which to tell its age."""

    ready: int
    delayed: int
    leased: int
    consumers: int
    heads: list[bytes]


#: Leases by queue, each as its message's id and its token.
Held = Mapping[str, Sequence[tuple[str, int]]]
#: Whether each of them is still held; or what went wrong with its queue.
Renewed = dict[str, "list[bool] | Error"]


class Store(Protocol):
    """Messages in queues. Thread-safe, but for `wait` and `collect`, which one thread calls.

    Every call may raise `BrokerAway`, and ``Internal`` with reason ``full`` where space has run out.
    """

    capabilities: ClassVar[Capabilities]

    def ping(self) -> None:
        """Reach the broker, or raise."""
        ...

    def warnings(self) -> list[str]:
        """Return what is wrong with the broker's settings."""
        ...

    def acl(self, role: Role, queues: Sequence[str]) -> str:
        """See `kq.backend.Granting`."""
        ...

    def declare(self, queue: str, arguments: Mapping[str, Any]) -> dict[str, Any] | None:
        """Make a queue, and return None; or return the arguments it was made with before."""
        ...

    def arguments(self, queue: str) -> dict[str, Any] | None:
        """Return the arguments a queue was made with, or None if there is no such queue."""
        ...

    def delete(self, queue: str, *, if_empty: bool = False, if_unused: bool = False) -> bool:
        """Drop a queue with everything in it, and return whether that was done.

        Args:
            queue: Which.
            if_empty: Not if it holds anything.
            if_unused: Not if it has consumers.
        """
        ...

    def put(self, queue: str, entries: Sequence[Entry], max_length: int | None) -> int | None:
        """Store messages in order until the queue is full.

        Returns:
            How many were accepted, duplicates included; None if there is no such queue.
        """
        ...

    def send(self, lots: Sequence[Lot]) -> Unconfirmed | None:
        """Prepare messages to be stored as `put` would; see `kq.backend.Backend.send`."""
        ...

    def take(self, queue: str, limit: int, lease: int) -> Taken:
        """Lease up to ``limit`` ready messages for ``lease`` milliseconds, the most urgent first.

        Not many more once they have `TAKE_BYTES` together.

        What is due becomes ready first, and so does what leases that ran out held.
        """
        ...

    def settle(self, queue: str, endings: Sequence[Ending]) -> list[bool]:
        """End leases; False for each whose token is not the message's any more.

        What an ``ack`` with ``keep`` completes is remembered in the same step that removes the message.
        """
        ...

    def completed(self, queue: str, ids: Sequence[str]) -> set[str]:
        """Return those of the ids that were completed here, by `Ending.completes`, and are still remembered."""
        ...

    def move(self, source: str, target: str, moves: Sequence[Move]) -> list[bool | Error]:
        """Move messages to another queue, each in one step.

        Args:
            source: Where they are.
            target: Where they go; made if it does not exist.
            moves: Not more than fit into one call; see `in_lots`.

        Returns:
            For each of them whether it was moved, by this call or by one with the same lease whose answer got lost:
            False, with nothing changed, if it is not there or under another lease, or ``target`` has one of the
            entry's id; or the error that it met.

        Raises:
            Error: If none of them was moved for it.
        """
        ...

    def renew(self, held: Held, lease: int, consumer: str) -> Renewed:
        """Extend the leases of several queues, and count ``consumer`` among their consumers for a while.

        In one call, however many queues there are: while one is renewed, none of the others ends.

        Args:
            held: By queue, the leases as (id, token); or none of them.
            lease: Milliseconds.
            consumer: Its name.

        Returns:
            By queue, False for each lease that is lost; or the error that this queue met, which costs no other.
        """
        ...

    def leave(self, queues: Iterable[str], consumer: str) -> None:
        """Count ``consumer`` no more."""
        ...

    def counts(self, queue: str) -> Counts:
        """Count a queue's messages and consumers."""
        ...

    def browse(self, queue: str, limit: int, offset: int) -> list[tuple[str, bytes]]:
        """Return (id, raw) of waiting messages in the order in which they would be taken.

        Fewer than there are where they come to more than `TAKE_BYTES`; none where there are no more.
        """
        ...

    def look(self, queue: str, ids: Sequence[str]) -> Iterator[tuple[str, bytes]]:
        """Yield (id, raw) of waiting messages: of these ids first, then of those kept `under_another_id` of them.

        Each is read when it is asked for; what has gone by then is left out.
        """
        ...

    def remove(self, queue: str, ids: Sequence[str] | None) -> int:
        """Drop these waiting messages (None: all of them), and return how many that were."""
        ...

    def read_topology(self) -> tuple[str, int]:
        """Return the exchanges and bindings of plain Kombu programs, as JSON, and their version."""
        ...

    def write_topology(self, document: str, version: int) -> bool:
        """Replace them if they are still of ``version``."""
        ...

    @property
    def ahead(self) -> Ahead | None:
        """What was to be taken ahead, and has not been collected."""
        ...

    def wait(self, queues: Sequence[str], timeout: float, ahead: Ahead | None = None) -> list[str]:
        """Block until a queue may have something ready, `wake`, or ``timeout`` seconds.

        Args:
            queues: What to wait for.
            timeout: Seconds.
            ahead: What may be taken as soon as it is there, where that saves a round trip; what it brings is
                collected, now or later.

        Returns:
            The queues worth a look, as far as known.
        """
        ...

    def collect(self, *, withdraw: bool = False) -> list[tuple[Ahead, Taken]]:
        """Return what has been taken ahead.

        Args:
            withdraw: Whether to have nothing more taken ahead; else what is not there yet may come later.
        """
        ...

    def nudge(self, queue: str) -> None:
        """Have one of those who wait for a queue look into it, if any does: what we know of it, we cannot follow."""
        ...

    def wake(self) -> None:
        """End a `wait`, the present or the next one. Safe in any thread."""
        ...

    def close(self) -> None:
        """Give up connections. Idempotent."""
        ...


class Near:
    """What is `Store`'s where a take costs no round trip, and all who wait for a queue hear of what comes into it."""

    ahead: None = None

    def nudge(self, queue: str) -> None:
        """See `Store.nudge`: they know."""

    def collect(self, *, withdraw: bool = False) -> list[tuple[Ahead, Taken]]:
        """See `Store.collect`."""
        return []
