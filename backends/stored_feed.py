"""Consuming from a store's queues: what is leased, when to look again, and how each lease ends."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence, Set
from contextlib import contextmanager, suppress
from math import ceil, inf
from time import monotonic
from typing import Any, Final
from uuid import uuid4

from kq import clock
from kq.backend import Delivery, QueueSpec, Settlement, Settling
from kq.backends.store import (
    TAKE_BYTES,
    TAKE_MOST,
    UNREACHABLE,
    Ahead,
    Ending,
    Entry,
    Lease,
    Move,
    Store,
    Taken,
    in_lots,
    under_another_id,
)
from kq.envelope import bury, identify, pack, unpack_or_wrap
from kq.errors import Error
from kq.header import NORMAL
from kq.outcome import EXPIRED, refused

#: Seconds after which a feed looks at a quiet queue although nothing woke it: the insurance against
#: a wake-up that died with the worker it went to.
_LOOK_AGAIN: Final = 5.0
#: Seconds between two such looks of one feed, so that a feed of many queues stays quiet as well.
_LOOK_SPACING: Final = 0.75
#: Seconds between two looks into queues that nobody listens to, because others keep the worker busy.
_LOOK_ASIDE: Final = 0.05
#: How much of a lease one fetch may take: between two of them the leases are renewed...
_FETCH_PART: Final = 1 / 6
#: ...and how much may have passed since then where many queues are settled.
_SETTLE_PART: Final = 1 / 2
#: Messages that are taken at most as soon as there are some, before anybody asks for them.
_AHEAD: Final = 10
_NONE: Final[Set[int]] = frozenset()


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
        #: When each was looked into or listened to last, and when one is looked into that has been neither for long.
        self._heard_at = dict.fromkeys(self._specs, 0.0)
        self._look_aside_at = 0.0
        #: Queues for which we have been woken, or in which something is due before others would look by themselves.
        #: They may not have heard of it: if we cannot follow, they must.
        self._owed: set[str] = set()
        #: Queues of which more could be fetched, and how much.
        self._room: dict[str, int] = {}
        #: Whether time was over in the last fetch before every queue had been looked into that was to be.
        self._cut_short = False
        #: What was taken ahead and has not been fetched.
        self._early: deque[Delivery] = deque()
        #: The queue that had something last.
        self._latest = self._order[0] if self._order else ""
        self._closed = False
        self.losses = 0
        self._renewed_at = 0.0
        self.renew()

    def fetch(self, credit: int, caps: Mapping[str, int]) -> list[Delivery]:
        """See `Feed.fetch`."""
        self._collect()
        caps = dict(caps)
        deliveries = self._hand_over(credit, caps) if self._early else []
        self._room.clear()
        self._order.rotate(-1)
        self._look_aside()
        until = monotonic() + self._lease / 1000 * _FETCH_PART
        self._cut_short = False
        for index, queue in enumerate(self._order):
            if monotonic() >= until:
                # The next fetch begins with this one.
                self._order.rotate(1 - index)
                self._cut_short = True
                break
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
            elif room <= 0 and queue in self._owed:
                self._pass_on(queue)
        return deliveries

    def _pass_on(self, queue: str) -> None:
        """Have somebody else look into a queue that is owed a look, if somebody waits."""
        self._owed.discard(queue)
        # Else it is a little late.
        with suppress(Error):
            self._store.nudge(queue)

    def _look_aside(self) -> None:
        """Have a queue looked into that has been neither looked into nor listened to for longest, if for too long.

        Whoever never waits hears of nothing.
        """
        now = monotonic()
        if now < self._look_aside_at:
            return
        self._look_aside_at = now + _LOOK_ASIDE
        queue = min(self._heard_at, key=self._heard_at.__getitem__, default=None)
        if queue is not None and self._heard_at[queue] < now - _LOOK_ASIDE:
            self._look_at[queue] = 0.0
            # Also where there is no room for its messages: then it is the next one's turn.
            self._heard_at[queue] = now

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
        if again := {lease.id for lease in taken.leases if lease.deliveries}:
            self._lose(queue, again)
        for id, raw, token, attempts, crashes, before, expired in taken.leases:
            delivery = Delivery(queue, id, raw, attempts, crashes, before, token, token in replayed)
            if expired:
                # By the word of a plain Kombu program; kq's own is in a header.
                why = "the time to live that it was published with was over before a worker came to it"
                delivery.refused = refused(EXPIRED, why, attempts=attempts, crashes=crashes)
            self._held[queue, id, token] = delivery
            deliveries.append(delivery)
            size += len(raw)
        self._owed.discard(queue)
        if deliveries:
            self._latest = queue
        self._heard_at[queue] = monotonic()
        if len(deliveries) < min(limit, TAKE_MOST) and size < TAKE_BYTES:
            quiet = self._look_again if taken.more_in is None else min(self._look_again, taken.more_in / 1000)
            self._look_at[queue] = monotonic() + quiet
            if quiet < min(self._look_again, self._lease / 2000):
                # And no lease that is renewed: such a one has longer to go.
                self._owed.add(queue)
        else:
            self._look_at[queue] = 0.0
        return deliveries

    def _lose(self, queue: str, again: Set[str]) -> None:
        """Give up earlier leases of ours on messages that have come back: we have been held up for longer than that."""
        for key in [key for key in self._held if key[0] == queue and key[1] in again]:
            self._held.pop(key).lost = True
            self.losses += 1

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
            self._renew_if_late()
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
            except UNREACHABLE:
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
        burials = [(s, _burial(self._specs[queue], s)) for s in group if _ending(self._specs[queue], s) is None]
        # Late, or a letter of this id is there already: of another queue, or of an earlier life.
        again = [(settlement, _renamed(move)) for settlement, move in self._bury(queue, burials, failed)]
        for settlement, _ in self._bury(queue, again, failed):
            self._let_go(settlement, False, late)

    def _bury(self, queue: str, burials: Sequence[_Burial], failed: list[tuple[Settlement, Error]]) -> list[_Burial]:
        """Move dead letters to where they belong, and return those that were not moved."""
        target = self._specs[queue].dead_letter
        left: list[_Burial] = []
        away: Error | None = None
        start = 0
        for lot in in_lots([move for _, move in burials]):
            part = burials[start : start + len(lot)]
            start += len(lot)
            assert target is not None
            for burial, answer in zip(part, self._moved(queue, target, lot), strict=True):
                if isinstance(answer, UNREACHABLE):
                    away = answer
                elif isinstance(answer, Error):
                    failed.append((burial[0], answer))
                elif answer:
                    self._let_go(burial[0], True, [])
                else:
                    left.append(burial)
            if away is not None:
                # What the others of its lot have come to is noted.
                raise away
        return left

    def _moved(self, queue: str, target: str, lot: Sequence[Move]) -> list[bool | Error]:
        try:
            return self._store.move(queue, target, lot)
        except UNREACHABLE:
            raise
        except Error as error:
            # What there is no room for all of, there may be for one.
            return [error] if len(lot) == 1 else [self._moved(queue, target, [move])[0] for move in lot]

    def _let_go(self, settlement: Settlement, in_time: bool, late: list[Settlement]) -> None:
        key = _key(settlement.delivery)
        self._held.pop(key, None)
        if in_time:
            self._settled.add(key)
        else:
            late.append(settlement)

    def put_back(self) -> None:
        """See `Feed.put_back`."""
        self._collect(withdraw=True)
        self._give_back_early()

    def _give_back_early(self) -> None:
        """Give back what was taken ahead and has not been fetched."""
        if self._early:
            # Ours until they are back: what cannot be given back now is handed over, or given back later.
            try:
                self.settle([Settlement(delivery, delivery.as_it_came) for delivery in self._early])
            finally:
                self._early = deque(delivery for delivery in self._early if _key(delivery) in self._held)

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
        began = monotonic()
        failures: list[Error] = []
        for queue, kept in self._store.renew(held, self._lease, self._name).items():
            if isinstance(kept, Error):
                failures.append(kept)
                continue
            for (id, token), ours in zip(held[queue], kept, strict=True):
                if not ours:
                    self._held.pop((queue, id, token)).lost = True
                    self.losses += 1
        # From before the call: then the leases had as long to go as they are said to have, or longer.
        self._renewed_at = began
        if failures:
            # One that says that the store is away says more than the others.
            raise next((failure for failure in failures if isinstance(failure, UNREACHABLE)), failures[0])

    def _renew_if_late(self) -> None:
        """Renew where whoever is to do so every third of a lease is kept from it by what we do."""
        if monotonic() - self._renewed_at > self._lease / 1000 * _SETTLE_PART:
            with _but_unreachable():
                self.renew()

    def wait(self, timeout: float) -> None:
        """See `Feed.wait`."""
        # The last fetch has left no room for that, and others may have.
        self._give_back_early()
        if self._cut_short:
            return
        # Queues in which the last fetch left no room are not listened to: a wake-up that we cannot
        # follow would be missing elsewhere.
        soonest = min((self._look_at[queue] for queue in self._room), default=inf)
        until = min(timeout, soonest - monotonic())
        if until <= 0 and self._room:
            return
        for queue in self._store.wait(sorted(self._room), max(0.0, until), self._ahead()):
            self._look_at[queue] = 0.0
            self._owed.add(queue)
        self._heard_at.update(dict.fromkeys(self._room, monotonic()))

    def _ahead(self) -> Ahead | None:
        """Return what to take as soon as it is there: of the queue that had something last, as far as one can tell."""
        queue = self._latest if self._latest in self._room else next(iter(self._room), None)
        return None if queue is None else Ahead(queue, min(self._room[queue], _AHEAD), self._lease)

    def wake(self) -> None:
        """See `Feed.wake`."""
        self._store.wake()

    def close(self, patience: float = 0.0) -> None:
        """See `Feed.close`: nothing is sent on by itself."""
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
            for queue in self._specs:
                # One queue that is out of order is not to cost the others a lease's time.
                with _but_unreachable():
                    if queue in by_queue:
                        self._store.settle(queue, by_queue[queue])
            with _but_unreachable():
                self._store.leave(self._specs, self._name)
            for queue in tuple(self._owed):
                self._pass_on(queue)
        except UNREACHABLE:
            pass  # the leases run out by themselves
        finally:
            self._held.clear()
            self._connection.close()


@contextmanager
def _but_unreachable() -> Iterator[None]:
    """Let errors pass that say nothing of the store as a whole."""
    try:
        yield
    except UNREACHABLE:
        raise
    except Error:
        pass


def _key(delivery: Delivery) -> tuple[str, str, int]:
    return delivery.queue, delivery.id, delivery.receipt


#: A settlement, and how it is carried out.
_Burial = tuple[Settlement, Move]


def _burial(queue: QueueSpec, settlement: Settlement) -> Move:
    delivery = settlement.delivery
    letter = bury(unpack_or_wrap(delivery.raw, delivery.id), queue.id, settlement.outcome, clock.now())
    # One priority for all: dead letters are kept in the order of their deaths.
    return Move(delivery.id, delivery.receipt, Entry(letter.id, pack(letter), NORMAL))


def _renamed(move: Move) -> Move:
    return move._replace(entry=under_another_id(move.entry))


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
