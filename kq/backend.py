"""The contract between kq and a broker: a few values and one Protocol.

A backend moves envelopes. It does not decode payloads, route, run handlers or decide about
retries; what a broker can and cannot do is data (`Capabilities`), not a special case above it.

A `Backend` is shared by the threads of a process. It publishes for as many of them at once as its
`Capabilities` say (`kq.group_commit` sees to that), beside whatever else it is asked. A `Feed` belongs
to the one thread that fetches and settles, except for `Feed.wake`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal, NamedTuple, Protocol, runtime_checkable

import msgspec

from kq.driver import Tls
from kq.envelope import Envelope
from kq.errors import Error, Internal, Invalid
from kq.outcome import Outcome
from kq.retry import RetryPolicy

#: Why a broker did not confirm; ``details["reason"]`` of the error that publishing raises.
Reason = Literal["unavailable", "timeout", "refused", "blocked", "unroutable", "full"]


#: How much of a caller's time a single call to a broker may take: what it failed of is to be said before that is over.
CALL_PART: Final = 0.9

#: Messages of one `Backend.send` at most, bytes of their bodies together, and of each: what takes an event loop no time
#: to prepare.
SEND_MOST: Final = 200
SEND_BYTES: Final = 2**20
SEND_LONG: Final = 65536


class QueueSpec(msgspec.Struct, frozen=True):
    """A queue as declared.

    Attributes:
        id: ``namespace:name``; also its name on the broker.
        codec: The codec for payloads published here, and for bodies without a content type.
        dead_letter: The queue id of its dead letters; None for a dead-letter queue itself.
        policy: When a message has had enough.
        max_length: Messages it holds before publishing is refused with reason ``full``.
        max_priority: Levels of priority, where a broker must know beforehand (RabbitMQ).
        require_signature: Whether unsigned messages are dead-lettered.
        options: What one kind of broker understands, by its name.
        replay_window: Seconds for which the ids of completed messages are remembered, where the broker can.
        driver: The name of the driver whose broker it lives on; empty for the app's own.
    """

    id: str
    codec: str = "json/plain"
    dead_letter: str | None = None
    policy: RetryPolicy = RetryPolicy()
    max_length: int | None = None
    max_priority: int | None = None
    require_signature: bool = False
    options: Mapping[str, Mapping[str, Any]] = msgspec.field(default_factory=dict)
    replay_window: float = 0.0
    driver: str = ""


#: Seconds in which a broker that is restarted may be back.
_RECONNECT_WAIT: Final = 2.0


class BackendOptions(msgspec.Struct, frozen=True):
    """What a backend is opened with. Durations are seconds.

    Attributes:
        lease: For how long a delivery stays with a worker that does not renew it.
        heartbeat: How often a silent connection is probed.
        timeout: How long a single call to the broker may take.
        name: Who connects, for the broker's own list of connections.
        connect_timeout: How long connecting may take.
        tls: How connections are encrypted; None for the defaults, which verify.
    """

    lease: float
    heartbeat: float
    timeout: float
    name: str
    connect_timeout: float = 5.0
    tls: Tls | None = None

    @property
    def reconnect_wait(self) -> float:
        """Seconds after which a broker that was not there is tried once more: in time for whoever waits for a call."""
        return min(_RECONNECT_WAIT, self.timeout / 4)


class Publication(msgspec.Struct, frozen=True):
    """One message on its way to a broker.

    Attributes:
        queue: Where to.
        envelope: What.
        delay: Seconds that the broker holds it back.
    """

    queue: QueueSpec
    envelope: Envelope
    delay: float = 0.0


class Delivery(msgspec.Struct):
    """One arrival of a message at this process.

    Attributes:
        queue: The queue id.
        id: The message's id.
        raw: The packed envelope, or whatever a stranger put there.
        attempts: Charged before this delivery.
        crashes: Charged before this delivery.
        deliveries: Earlier deliveries in a row that nobody settled: their worker died.
        receipt: The backend's own, to settle it by.
        replayed: Whether a message of this id has been completed within the queue's replay window.
        refused: Its end, where it is known beforehand that it must not run.
        lost: Set once the delivery is known to belong to another worker by now.
    """

    queue: str
    id: str
    raw: bytes
    attempts: int
    crashes: int
    deliveries: int
    receipt: Any
    replayed: bool = False
    refused: Outcome | None = None
    lost: bool = False

    @property
    def as_it_came(self) -> Outcome:
        """The outcome with which a message goes back that proved nothing here: what is on its account stays there."""
        return Outcome("release", deliveries=self.deliveries)


class Settlement(msgspec.Struct, frozen=True):
    """A delivery and its end."""

    delivery: Delivery
    outcome: Outcome


class Settling(NamedTuple):
    """What became of settlements that were not simply carried out.

    Attributes:
        late: Those whose delivery is another worker's by now.
        failed: Those that could not be carried out, and why.
    """

    late: list[Settlement]
    failed: list[tuple[Settlement, Error]]


@dataclass(frozen=True, slots=True)
class QueueInfo:
    """What a broker knows of a queue; None where it cannot tell.

    Attributes:
        message_count: Ready, delayed and in flight together, as far as known.
        ready: Waiting for a worker.
        delayed: Waiting for their time.
        in_flight: With a worker.
        dead: In the dead-letter queue.
        consumer_count: Workers that consume it.
        oldest_age: Seconds since the oldest ready message was published.
    """

    message_count: int
    ready: int
    delayed: int | None
    in_flight: int | None
    dead: int | None
    consumer_count: int | None
    oldest_age: float | None


class Capabilities(msgspec.Struct, frozen=True):
    """What a broker can do, as data; ``kq check`` prints it and a test holds it to account.

    Attributes:
        survives: What published messages outlive, in words.
        shared: Whether other processes see the same queues.
        deduplicates: Whether a second publish of an id that is still queued has no effect.
        priorities: ``always``, or ``declared`` where a queue must ask for them with ``max_priority``.
        counts_delayed: Whether ``info`` can count delayed messages.
        counts_in_flight: Whether ``info`` can count messages that workers hold.
        tells_age: Whether ``info`` knows how old the oldest message is.
        remembers_completed: Whether the ids of completed messages are kept for `QueueSpec.replay_window`.
        concurrent_publishes: Calls of `Backend.publish` that may be under way at once, each in a thread of its own.
        sends: Whether messages can be sent without waiting, by `Backend.send`.
    """

    survives: str
    shared: bool
    deduplicates: bool
    priorities: Literal["always", "declared"]
    counts_delayed: bool
    counts_in_flight: bool
    tells_age: bool
    remembers_completed: bool
    concurrent_publishes: int = 1
    sends: bool = False


class Unconfirmed(Protocol):
    """Messages on their way to a broker, which are confirmed later. Owned by one thread.

    Attributes:
        timeout: Seconds within which they are to be confirmed.
        way: What they go over, such as a connection; the same for those after them that go over the same.
    """

    timeout: float
    way: object

    def fileno(self) -> int:
        """Return what becomes readable once there is an answer, and writable once there is room for more."""
        ...

    def write(self) -> bool:
        """Send what has not been sent, as far as there is room, and tell whether that is all; waits for nothing."""
        ...

    def confirm(self) -> Sequence[bool | Error] | None:
        """Read what the broker has answered, without waiting.

        Returns:
            For each message whether it is known to be stored. If not, it is to be published, under the same id; but for
            one with an error: that is its answer. None as long as not all has been answered.
        """
        ...

    def known(self) -> Sequence[bool | None]:
        """Return what is known of each message when its time is over, as `confirm` does; None where nothing is."""
        ...

    def late(self) -> Error:
        """Return the error for messages that are not confirmed in time."""
        ...

    def close(self) -> None:
        """Make free what is taken for it: when they have been answered, or are given up and may arrive still."""
        ...


class Feed(Protocol):
    """A worker's, or a puller's, connection to its queues. Owned by one thread.

    Attributes:
        losses: How many deliveries have been lost to other workers so far; each has its ``lost`` set.
    """

    losses: int

    def fetch(self, credit: int, caps: Mapping[str, int]) -> list[Delivery]:
        """Take what is ready, without waiting.

        Args:
            credit: Messages to take at most, of all queues together.
            caps: Messages to take at most of single queues, by id.

        What is returned is leased to this feed, and to nobody else until it is settled, the feed is
        closed, or the lease ran out because nobody renewed it.
        """
        ...

    def settle(self, settlements: Sequence[Settlement]) -> Settling:
        """Carry out outcomes, in one batch, each for itself: one that fails holds up no other.

        A delivery whose lease has passed to another worker is left alone and reported as late. One that
        cannot be settled now (its dead-letter queue is gone or full) stays ours, and is reported as failed:
        try it again later. After a raised error nothing is known; the same call can be made again.
        """
        ...

    def put_back(self) -> None:
        """Give back what has been taken beforehand and not been fetched: nothing more will be, for now."""
        ...

    def due_in(self) -> float | None:
        """Look at every queue, announced or not, and return the seconds until there is work.

        0.0 means that something is ready; None that nothing is ready, delayed or with another worker, as
        far as the broker can tell.
        """
        ...

    def renew(self) -> None:
        """Extend every lease and show that this consumer lives; cheap, call it every third of a lease."""
        ...

    def wait(self, timeout: float) -> None:
        """Block until something may be ready, `wake` is called, or ``timeout`` seconds have passed."""
        ...

    def wake(self) -> None:
        """End a `wait`, the present or the next one. Safe in any thread and in signal handlers."""
        ...

    def close(self, patience: float = 0.0) -> None:
        """Release what is unsettled, uncharged, and give up the connection. Idempotent.

        Args:
            patience: Seconds to wait, at most, for what the feed has sent on by itself and the broker has yet to take.
        """
        ...


class Backend(Protocol):
    """A broker, as far as kq is concerned."""

    capabilities: Capabilities

    def declare(self, queue: QueueSpec, *, create: bool, exact: bool) -> None:
        """Make sure a queue and its dead-letter queue exist.

        Args:
            queue: The queue.
            create: Whether to make one that is missing.
            exact: Whether one that exists must have been declared with these very values.

        Raises:
            NotFound: If it is missing and not to be created.
            Conflict: If it exists with other values; the message names the argument.
            Invalid: If ``options`` has something unknown for this broker.
        """
        ...

    def publish(self, batch: Sequence[Publication], timeout: float) -> list[Error | None]:
        """Store messages and return once the broker has confirmed them.

        Args:
            batch: Messages, in order; their queues have been declared.
            timeout: Seconds for all of it.

        Returns:
            For each message None if it is stored, else the error.
        """
        ...

    def send(self, batch: Sequence[Publication]) -> Unconfirmed | None:
        """Prepare messages to be sent and stored without waiting for anything; None where that cannot be.

        Then `publish` is to do it. Nothing is sent before `Unconfirmed.write` is called. For event loops, which nothing
        may hold up. Thread-safe, and no call of `publish` as far as `Capabilities.concurrent_publishes` goes.

        Args:
            batch: Messages, in order; their queues have been declared. No more than `SEND_MOST`, and no larger than
                `SEND_BYTES` and `SEND_LONG` say.

        Raises:
            Error: If the backend is closed.
        """
        ...

    def feed(self, queues: Sequence[QueueSpec], prefetch: int) -> Feed:
        """Open a feed of declared queues.

        Args:
            queues: What to consume.
            prefetch: Deliveries it will hold at once, at most.
        """
        ...

    def info(self, queue: QueueSpec) -> QueueInfo:
        """Count a queue's messages; raises ``NotFound`` for one that does not exist."""
        ...

    def purge(self, queue: QueueSpec) -> int:
        """Drop what waits in a queue, delayed or not, and return how many that were, as far as known.

        Messages that a worker holds are not touched.
        """
        ...

    def browse(self, queue: QueueSpec, limit: int, offset: int) -> list[Envelope]:
        """Return messages that wait in a queue, oldest first, and leave them there."""
        ...

    def find(self, queue: QueueSpec, id: str) -> Envelope | None:
        """Return the first message of an id that waits in a queue, and leave it there; None if there is none."""
        ...

    def remove(self, queue: QueueSpec, ids: Sequence[str] | None) -> int:
        """Drop these messages (None: all) from what waits in a queue, and return how many that were."""
        ...

    def replay(
        self, dead: QueueSpec, ids: Sequence[str] | None, target: QueueSpec, revive: Callable[[Envelope], Envelope]
    ) -> int:
        """Move dead letters (None: all) back into ``target`` as new messages under their old ids.

        ``revive`` makes a message of a dead letter. Each is in one of the two queues at any moment.
        """
        ...

    def check(self, handler_timeout: float | None = None) -> list[str]:
        """Reach the broker and return warnings about its settings; those that endanger messages are a `Danger`.

        Args:
            handler_timeout: Seconds that the slowest handler may take, where that is limited.

        Raises:
            Internal: If it cannot be reached.
            PermissionDenied: If it refuses us.
        """
        ...

    def close(self) -> None:
        """Give up all connections. Idempotent."""
        ...


class UntrustedBroker(Internal):
    """No encrypted connection comes about: a certificate, say, is not what it must be. Its reason is ``refused``.

    It may be mended, but not in the next moment: whoever tries again takes the time.
    """


class Danger(str):
    """A warning about a broker's setting under which acknowledged messages may be lost."""

    __slots__ = ()


def insist(warnings: Sequence[str]) -> None:
    """Refuse a broker that may lose acknowledged messages.

    Args:
        warnings: What `Backend.check` returned.

    Raises:
        Invalid: If there is a danger among them; the message has them all.
    """
    dangers = [warning for warning in warnings if isinstance(warning, Danger)]
    if dangers:
        raise Invalid("durability is required, but " + "; ".join(dangers))


#: What an account on a broker is for.
Role = Literal["publisher", "worker"]


@runtime_checkable
class Granting(Protocol):
    """A backend that knows what an account on its broker needs; all of kq's own do."""

    def acl(self, role: Role, queues: Sequence[str]) -> str:
        """Return the least rights of an account, as an administrator types them; nothing is connected.

        Comments in it say what such an account can do all the same, because the broker has no finer grain.

        Args:
            role: What the account is for. A worker's rights include those of a publisher.
            queues: The ids of the queues to grant, dead-letter queues among them; none for all.
        """
        ...


def unknown_options(queue: QueueSpec, scheme: str, known: frozenset[str]) -> None:
    """Refuse options that the backend does not know.

    Raises:
        Invalid: Naming the first of them.
    """
    for name in queue.options.get(scheme, {}):
        if name not in known:
            expected = ", ".join(sorted(known)) or "none"
            raise Invalid(f"queue {queue.id}: unknown option {name!r} for {scheme}; expected {expected}")
