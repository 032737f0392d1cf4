"""``memory://``: a store inside this process, for tests and single-process programs.

Stores of the same name are one. Everything happens under one lock; a consumer waits on a condition
that every arrival notifies, so nothing polls.
"""

from __future__ import annotations

import heapq
import os
from collections import OrderedDict, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import count, islice
from threading import Condition, Lock
from time import monotonic
from typing import Any, ClassVar, Final

import msgspec

from kq.backend import Capabilities, Role
from kq.backends.store import (
    AGAIN,
    Ahead,
    BrokerAway,
    Counts,
    Ending,
    Entry,
    Held,
    Lease,
    Lot,
    Move,
    Near,
    Renewed,
    Taken,
)
from kq.errors import Error

#: Stale items of a heap that are no matter.
_STALE: Final = 1000


class _Message(msgspec.Struct):
    """A message and its state; ``place`` orders it within its priority."""

    entry: Entry
    place: int
    expires_at: float | None
    attempts: int = 0
    crashes: int = 0
    deliveries: int = 0
    token: int = 0
    until: float = 0.0


class _Queue(msgspec.Struct):
    """A queue: every message by id, and where each one stands.

    ``ready`` holds (-priority, place, id) as a heap. Removal leaves a stale item behind, which is
    skipped when its message is gone or elsewhere: hence the ``place`` in it. So does ``delayed``.
    """

    arguments: dict[str, Any]
    messages: dict[str, _Message] = msgspec.field(default_factory=OrderedDict)
    ready: list[tuple[int, int, str]] = msgspec.field(default_factory=list)
    delayed: list[tuple[float, int, str]] = msgspec.field(default_factory=list)
    waiting: set[str] = msgspec.field(default_factory=set)
    held: dict[str, _Message] = msgspec.field(default_factory=dict)
    consumers: dict[str, float] = msgspec.field(default_factory=dict)
    completed: OrderedDict[str, float] = msgspec.field(default_factory=OrderedDict)


class _World:
    """What all stores of one name share."""

    def __init__(self) -> None:
        self.changed = Condition()
        self.queues: dict[str, _Queue] = {}
        self.places = count(1)
        self.tokens = count(1)
        self.topology = ("{}", 0)
        #: How often it has been told that something came.
        self.told = 0

    def tell(self) -> None:
        """Say that something has come. Under the lock."""
        self.told += 1
        self.changed.notify_all()


_worlds: dict[str, _World] = defaultdict(_World)
_worlds_lock = Lock()


def _forget_worlds() -> None:
    """Leave the parent's messages to the parent: nobody else sees the copies, and their locks may be held."""
    global _worlds_lock
    _worlds_lock = Lock()
    _of_parent.update(_worlds)
    _worlds.clear()


#: The names under which a process that was forked finds only copies.
_of_parent: set[str] = set()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_worlds)


class MemoryStore(Near):
    """A store in this process's memory, shared by name."""

    capabilities: ClassVar[Capabilities] = Capabilities(
        survives="nothing: the process's end is the messages' end",
        shared=False,
        deduplicates=True,
        priorities="always",
        counts_delayed=True,
        counts_in_flight=True,
        tells_age=True,
        remembers_completed=True,
    )

    def __init__(self, name: str) -> None:
        with _worlds_lock:
            self._world = _worlds[name]
        self._name = name
        self._woken = False
        self._heard = 0

    def ping(self) -> None:
        """See that this is the process that the messages live in."""
        if self._name in _of_parent:
            raise BrokerAway(
                f"memory://{self._name} lives in the process that forked this one; use another broker to reach it",
                details={"reason": "unavailable"},
                retryable=False,
            )

    def warnings(self) -> list[str]:
        """Say that nothing survives."""
        return ["memory:// keeps messages in this process only; they are gone when it ends"]

    def acl(self, role: Role, queues: Sequence[str]) -> str:
        """Say that there is nothing to grant."""
        return f"# {role}: memory:// lives in one process; there are no accounts, and there is nothing to grant"

    def declare(self, queue: str, arguments: Mapping[str, Any]) -> dict[str, Any] | None:
        """See `Store.declare`."""
        with self._world.changed:
            found = self._world.queues.get(queue)
            if found is not None:
                return dict(found.arguments)
            self._world.queues[queue] = _Queue(dict(arguments))
            return None

    def arguments(self, queue: str) -> dict[str, Any] | None:
        """See `Store.arguments`."""
        with self._world.changed:
            found = self._world.queues.get(queue)
            return None if found is None else dict(found.arguments)

    def delete(self, queue: str, *, if_empty: bool = False, if_unused: bool = False) -> bool:
        """See `Store.delete`."""
        with self._world.changed:
            found = self._world.queues.get(queue)
            if found is not None:
                now = monotonic()
                if if_empty and found.messages:
                    return False
                if if_unused and any(until > now for until in found.consumers.values()):
                    return False
                del self._world.queues[queue]
            return True

    def put(self, queue: str, entries: Sequence[Entry], max_length: int | None) -> int | None:
        """See `Store.put`."""
        self.ping()
        with self._world.changed:
            found = self._world.queues.get(queue)
            if found is None:
                return None
            # Whoever waits has to wait for this lock as well.
            self._world.tell()
            for accepted, entry in enumerate(entries):
                if entry.id in found.messages:
                    continue
                if max_length is not None and len(found.messages) - len(found.held) >= max_length:
                    return accepted
                self._add(found, entry)
            return len(entries)

    def send(self, lots: Sequence[Lot]) -> None:
        """See `Store.send`: whoever holds the lock may keep it for a while."""

    def take(self, queue: str, limit: int, lease: int) -> Taken:
        """See `Store.take`."""
        with self._world.changed:
            found = self._world.queues.get(queue)
            if found is None:
                return Taken([], None)
            now = monotonic()
            self._reclaim(found, now)
            self._promote(found, now)
            leases: list[Lease] = []
            while found.ready and len(leases) < limit:
                _, place, id = heapq.heappop(found.ready)
                message = found.messages.get(id)
                if message is None or message.place != place or id not in found.waiting:
                    continue
                found.waiting.discard(id)
                message.token = next(self._world.tokens)
                message.until = now + lease / 1000
                found.held[id] = message
                expired = message.expires_at is not None and message.expires_at <= now
                leases.append(
                    Lease(
                        id,
                        message.entry.raw,
                        message.token,
                        message.attempts,
                        message.crashes,
                        message.deliveries,
                        expired,
                    )
                )
            return Taken(leases, self._more_in(found, now))

    def settle(self, queue: str, endings: Sequence[Ending]) -> list[bool]:
        """See `Store.settle`."""
        with self._world.changed:
            found = self._world.queues.get(queue)
            if found is None:
                return [False] * len(endings)
            settled = [self._end(found, ending) for ending in endings]
            self._world.tell()
            return settled

    def completed(self, queue: str, ids: Sequence[str]) -> set[str]:
        """See `Store.completed`."""
        with self._world.changed:
            found = self._world.queues.get(queue)
            now = monotonic()
            return set() if found is None else {id for id in ids if found.completed.get(id, now) > now}

    def move(self, source: str, target: str, moves: Sequence[Move]) -> list[bool | Error]:
        """See `Store.move`."""
        with self._world.changed:
            moved: list[bool | Error] = [self._move(source, target, move) for move in moves]
            self._world.tell()
            return moved

    def _move(self, source: str, target: str, move: Move) -> bool:
        found = self._world.queues.get(source)
        message = found.messages.get(move.id) if found is not None else None
        if found is None or message is None:
            return False
        if (move.token is None and move.id in found.held) or (move.token is not None and message.token != move.token):
            return False
        into = self._world.queues.setdefault(target, _Queue({}))
        if move.entry.id in into.messages:
            return False
        self._drop(found, move.id)
        self._add(into, move.entry)
        return True

    def renew(self, held: Held, lease: int, consumer: str) -> Renewed:
        """See `Store.renew`."""
        renewed: Renewed = {}
        with self._world.changed:
            until = monotonic() + lease / 1000
            for queue, pairs in held.items():
                found = self._world.queues.get(queue)
                if found is not None:
                    found.consumers[consumer] = until
                renewed[queue] = [found is not None and _renew(found, id, token, until) for id, token in pairs]
        return renewed

    def leave(self, queues: Iterable[str], consumer: str) -> None:
        """See `Store.leave`."""
        with self._world.changed:
            for queue in queues:
                if (found := self._world.queues.get(queue)) is not None:
                    found.consumers.pop(consumer, None)

    def counts(self, queue: str) -> Counts:
        """See `Store.counts`."""
        with self._world.changed:
            found = self._world.queues.get(queue)
            if found is None:
                return Counts(0, 0, 0, 0, [])
            now = monotonic()
            self._promote(found, now)
            ready = self._in_order(found)
            alive = sum(1 for until in found.consumers.values() if until > now)
            held = len(found.held)
            oldest = min(ready, key=lambda id: found.messages[id].place, default=None)
            heads = [found.messages[oldest].entry.raw] if oldest is not None else []
            return Counts(len(ready), len(found.messages) - held - len(ready), held, alive, heads)

    def browse(self, queue: str, limit: int, offset: int) -> list[tuple[str, bytes]]:
        """See `Store.browse`."""
        with self._world.changed:
            found = self._world.queues.get(queue)
            if found is None:
                return []
            ids = self._in_order(found)
            seen = set(ids) | found.held.keys()
            ids += [id for id in found.messages if id not in seen]
            return [(id, found.messages[id].entry.raw) for id in islice(ids, offset, offset + limit)]

    def look(self, queue: str, ids: Sequence[str]) -> Iterator[tuple[str, bytes]]:
        """See `Store.look`."""
        with self._world.changed:
            found = self._world.queues.get(queue)
            if found is None:
                return iter(())
            wanted = set(ids)
            same = [*ids, *(id for id in found.messages if AGAIN in id and id.partition(AGAIN)[0] in wanted)]
            return iter(
                [(id, found.messages[id].entry.raw) for id in same if id in found.messages and id not in found.held]
            )

    def remove(self, queue: str, ids: Sequence[str] | None) -> int:
        """See `Store.remove`."""
        with self._world.changed:
            found = self._world.queues.get(queue)
            if found is None:
                return 0
            chosen = [
                id
                for id in dict.fromkeys(list(found.messages) if ids is None else ids)
                if id in found.messages and id not in found.held
            ]
            for id in chosen:
                self._drop(found, id)
            return len(chosen)

    def read_topology(self) -> tuple[str, int]:
        """See `Store.read_topology`."""
        with self._world.changed:
            return self._world.topology

    def write_topology(self, document: str, version: int) -> bool:
        """See `Store.write_topology`."""
        with self._world.changed:
            if self._world.topology[1] != version:
                return False
            self._world.topology = (document, version + 1)
            return True

    def wait(self, queues: Sequence[str], timeout: float, ahead: Ahead | None = None) -> list[str]:
        """See `Store.wait`."""
        with self._world.changed:
            world = self._world
            if not self._woken and self._heard == world.told and not any(map(self._has_ready, queues)):
                world.changed.wait(timeout)
            self._woken = False
            # What has come need not be ready: when it will be is for a take to say.
            has_come = self._heard != world.told
            self._heard = world.told
            return [queue for queue in queues if has_come or self._has_ready(queue)]

    def wake(self) -> None:
        """See `Store.wake`."""
        with self._world.changed:
            self._woken = True
            self._world.changed.notify_all()

    def close(self) -> None:
        """Do nothing: other stores of the name go on."""

    # Each of these runs under the lock.

    def _add(self, queue: _Queue, entry: Entry) -> None:
        now = monotonic()
        expires_at = now + entry.ttl / 1000 if entry.ttl else None
        message = _Message(entry, next(self._world.places), expires_at)
        queue.messages[entry.id] = message
        if entry.delay:
            self._hold_back(queue, message, now + entry.delay / 1000)
        else:
            self._make_ready(queue, message)

    def _make_ready(self, queue: _Queue, message: _Message) -> None:
        queue.waiting.add(message.entry.id)
        heapq.heappush(queue.ready, (-message.entry.priority, message.place, message.entry.id))

    def _hold_back(self, queue: _Queue, message: _Message, until: float) -> None:
        message.until = until
        heapq.heappush(queue.delayed, (until, message.place, message.entry.id))

    def _drop(self, queue: _Queue, id: str) -> None:
        queue.messages.pop(id, None)
        queue.held.pop(id, None)
        queue.waiting.discard(id)
        if len(queue.ready) > _STALE + 2 * len(queue.waiting):
            # Nobody may ever take from a queue of dead letters, by which what is stale would go.
            messages = ((queue.messages[id], id) for id in queue.waiting)
            queue.ready = [(-message.entry.priority, message.place, id) for message, id in messages]
            heapq.heapify(queue.ready)

    def _end(self, queue: _Queue, ending: Ending) -> bool:
        message = queue.held.get(ending.id)
        if message is None or message.token != ending.token:
            return False
        if ending.action == "ack":
            self._drop(queue, ending.id)
            if ending.keep:
                self._remember(queue, ending)
            return True
        del queue.held[ending.id]
        message.token = 0
        message.deliveries = ending.deliveries
        if ending.action == "release":
            self._make_ready(queue, message)
            return True
        message.attempts, message.crashes = ending.attempts, ending.crashes
        message.place = next(self._world.places)
        if ending.delay:
            self._hold_back(queue, message, monotonic() + ending.delay / 1000)
        else:
            self._make_ready(queue, message)
        return True

    def _remember(self, queue: _Queue, ending: Ending) -> None:
        now = monotonic()
        # The latest stands last, and as a rule all are kept equally long: what is over stands first.
        queue.completed.pop(ending.completes, None)
        queue.completed[ending.completes] = now + ending.keep / 1000
        while queue.completed[first := next(iter(queue.completed))] <= now:
            del queue.completed[first]

    def _reclaim(self, queue: _Queue, now: float) -> None:
        for id in [id for id, message in queue.held.items() if message.until <= now]:
            message = queue.held.pop(id)
            message.token = 0
            message.deliveries += 1
            self._make_ready(queue, message)

    def _promote(self, queue: _Queue, now: float) -> None:
        while queue.delayed and queue.delayed[0][0] <= now:
            _, place, id = heapq.heappop(queue.delayed)
            message = queue.messages.get(id)
            if message is not None and message.place == place and id not in queue.held:
                self._make_ready(queue, message)

    def _more_in(self, queue: _Queue, now: float) -> int | None:
        moments = [message.until for message in queue.held.values()]
        while queue.delayed:
            due, place, id = queue.delayed[0]
            message = queue.messages.get(id)
            if message is not None and message.place == place and id not in queue.held:
                moments.append(due)
                break
            # Purged, or moved.
            heapq.heappop(queue.delayed)
        return None if not moments else max(1, round((min(moments) - now) * 1000 + 0.5))

    def _in_order(self, queue: _Queue) -> list[str]:
        def rank(id: str) -> tuple[int, int]:
            return (-queue.messages[id].entry.priority, queue.messages[id].place)

        return sorted(queue.waiting, key=rank)

    def _has_ready(self, name: str) -> bool:
        queue = self._world.queues.get(name)
        return queue is not None and bool(queue.waiting)


def _renew(queue: _Queue, id: str, token: int, until: float) -> bool:
    """Extend a lease, and tell whether it is still held."""
    message = queue.held.get(id)
    if message is None or message.token != token:
        return False
    message.until = until
    return True
