"""``redis://`` and ``rediss://``: a store on a Redis server, 6.2 or newer.

Every primitive is one step of the server's: a Lua call, or a transaction where a body is long.
`kq.backends.redis_script` has the scripts, with a map of all keys. A message is never in a socket without a
lease: what a worker blocks on is a wake-up that carries nothing and may be lost without harm.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence, Set
from time import monotonic
from typing import Any, ClassVar, Final

import msgspec

from kq import limit
from kq.backend import Capabilities, Danger, Role
from kq.backends import redis_acl, tls_parameters
from kq.backends.redis_address import address_of
from kq.backends.redis_bell import Bell, Ring, unblock
from kq.backends.redis_call import SCRIPTS, Call, Caller
from kq.backends.redis_command import Head
from kq.backends.redis_connection import Connection, Connector
from kq.backends.redis_error import Late, RedisErrors, Refusal
from kq.backends.redis_line import Lines
from kq.backends.redis_put import CHUNK, Putter, packed
from kq.backends.redis_sent import Sent
from kq.backends.store import (
    AGAIN,
    TAKE_BYTES,
    TAKE_MOST,
    Ahead,
    BrokerAway,
    Counts,
    Ending,
    Entry,
    Lease,
    Lot,
    Move,
    Taken,
)
from kq.backends.within import within
from kq.config import hide_password
from kq.driver import Tls
from kq.errors import Error
from kq.waker import Lookout, Waker

#: Seconds after which a blocked call that has not ended is told so again.
_TOLD_AGAIN: Final = 0.05
#: Bytes of a body, on average, from which on bodies are fetched by a call of their own.
_LARGE: Final = 1024
_HMGET: Final = Head("HMGET")
_RPUSH: Final = Head("RPUSH")
#: Messages that one call looks for in lists, which takes the longer the more there are: others want their turn.
_FEW: Final = 20
#: Ids that one call passes over.
_PAGE: Final = 10_000

_TOPOLOGY: Final = "kq:topology"

#: What an id starts with that is no UTF-8, before its bytes in hexadecimal. No publisher's id has such a thing.
_FOREIGN: Final = "\x01"
_VERSION: Final = re.compile(rb"^redis_version:((\d{1,9})\.(\d{1,9})[\d.]*)", re.MULTILINE)
_STATE: Final = re.compile(rb"(\d{1,9}):(\d{1,9}):(\d{1,9})")

_blobs = msgspec.msgpack.Decoder(list[bytes])


class RedisStore:
    """A store on a Redis server. Thread-safe, but for `wait`."""

    capabilities: ClassVar[Capabilities] = Capabilities(
        survives="the death of processes; the server's as far as its own persistence goes",
        shared=True,
        deduplicates=True,
        priorities="always",
        counts_delayed=True,
        counts_in_flight=True,
        tells_age=True,
        remembers_completed=True,
        concurrent_publishes=16,
        sends=True,
    )

    def __init__(
        self, url: str, *, timeout: float, heartbeat: float, name: str, connect_timeout: float = 5.0,
        tls: Tls | None = None,
    ) -> None:  # fmt: skip
        url, tls = tls_parameters.separate(url, tls)
        self._shown = hide_password(url)
        self._timeout = timeout
        self._unsafe = tls_parameters.warnings(url, tls)
        context = None
        if tls is not None:
            from kq.backends import tls as encryption

            context = encryption.context(tls)
        self._connector = Connector(
            address_of(url),
            timeout=timeout,
            connect_timeout=min(timeout, connect_timeout),
            heartbeat=heartbeat,
            name=name,
            tls=context,
            server_name=None if tls is None else tls.server_name,
        )
        # A connection that died while it was idle is replaced once. Every script may run twice: ids keep messages
        # from doubling, tokens keep leases apart. A call that timed out is not repeated.
        self._lines = Lines(self._connector.connect, timeout)
        self._caller = Caller(self._lines)
        self._putter = Putter(self._caller)
        self._errors = RedisErrors(self._shown)
        #: Queues whose bodies are large.
        self._large: set[str] = set()
        self._bell: Bell | None = None
        #: Queues for which somebody has rung and which `wait` has not returned, and what is to be collected.
        self._rung: set[str] = set()
        self._early: list[tuple[Ahead, Taken]] = []
        self._waker = Waker()
        self._closed = False

    def __repr__(self) -> str:
        return f"<RedisStore {self._shown}>"

    def ping(self) -> None:
        """See `Store.ping`."""
        self._say("PING")

    def warnings(self) -> list[str]:
        """See `Store.warnings`: an evicting, an unpersisted and an outdated server."""
        self.ping()
        found = list(self._unsafe)
        info = self._ask("INFO") or b""
        version = _VERSION.search(info)
        if version and (int(version[2]), int(version[3])) < (6, 2):
            found.append(f"Redis {version[1].decode()} is too old; expected 6.2 or newer")
        # Where one of the two may not be asked for, the other says it as well.
        policy = self._setting("maxmemory-policy") or _field(info, "maxmemory_policy")
        appends = self._setting("appendonly") or {"0": "no", "1": "yes"}.get(_field(info, "aof_enabled"))
        if not policy or not appends:
            text = (
                "whether acknowledged messages survive a restart of Redis cannot be checked: it does not let this "
                "account ask; allow +info or +config|get"
            )
            found.append(Danger(text))
        if policy and policy != "noeviction":
            text = (
                f"Redis evicts keys when full (maxmemory-policy {policy}), and a queue is a key: set it to noeviction"
            )
            found.append(Danger(text))
        if appends == "no":
            kept = "keeps nothing on disk" if self._setting("save") == "" else "keeps snapshots only"
            text = f"Redis {kept} (appendonly no): acknowledged messages do not survive its restart; set appendonly yes"
            found.append(Danger(text))
        return found

    def acl(self, role: Role, queues: Sequence[str]) -> str:
        """See `kq.backend.Granting`."""
        return redis_acl.acl(role, queues)

    def declare(self, queue: str, arguments: Mapping[str, Any]) -> dict[str, Any] | None:
        """See `Store.declare`."""
        found = self._run("DECLARE", [prefix(queue)], [json.dumps(dict(arguments))])
        return None if found is None else dict(json.loads(found))

    def arguments(self, queue: str) -> dict[str, Any] | None:
        """See `Store.arguments`."""
        found = self._say("GET", prefix(queue) + "q")
        return None if found is None else dict(json.loads(found))

    def delete(self, queue: str, *, if_empty: bool = False, if_unused: bool = False) -> bool:
        """See `Store.delete`."""
        return bool(self._run("DELETE", [prefix(queue)], [int(if_empty), int(if_unused)]))

    def put(self, queue: str, entries: Sequence[Entry], max_length: int | None) -> int | None:
        """See `Store.put`."""
        with self._mapped():
            return self._putter.put(prefix(queue), entries, max_length)

    def send(self, lots: Sequence[Lot]) -> Sent | None:
        """See `Store.send`."""
        with self._mapped():
            line = self._lines.spare()
        if line is None:
            return None
        commands = b"".join([packed(prefix(queue), entries, most) for queue, entries, most in lots])
        return Sent(line, commands, [len(lot.entries) for lot in lots], self._lines, self._errors)

    def take(self, queue: str, limit: int, lease: int) -> Taken:
        """See `Store.take`."""
        return self._taken(queue, self._run("TAKE", [prefix(queue)], self._take_arguments(queue, limit, lease)))

    def _take_arguments(self, queue: str, limit: int, lease: int) -> tuple[int, ...]:
        return min(limit, TAKE_MOST), lease, TAKE_BYTES, int(queue in self._large)

    def _taken(self, queue: str, answer: bytes) -> Taken:
        """Return what a take has answered, and the bodies that it has left out."""
        p = prefix(queue)
        more, first, *parts = _blobs.decode(answer)
        token = int(first)
        bodies = self._bodies(p, [parts[i] for i in range(0, len(parts), 4) if b"l" in parts[i + 3]])
        leases = []
        size = 0
        for i in range(0, len(parts), 4):
            key, raw, state, marks = parts[i : i + 4]
            body = bodies.get(key) if b"l" in marks else raw
            if body is not None:
                size += len(body)
                leases.append(Lease(_to_id(key), body, token, *_to_state(state), b"x" in marks))
            token += 1
        if leases:
            # As the last ones were, so the next ones will be.
            (self._large.add if size > _LARGE * len(leases) else self._large.discard)(queue)
        return Taken(leases, int(more) if more else None)

    def _bodies(self, p: str, ids: list[bytes]) -> dict[bytes, bytes | None]:
        """Return the bodies of messages that are leased already; None where somebody has removed one."""
        if not ids:
            return {}
        with self._mapped():
            return dict(zip(ids, self._answer(_HMGET.pack((p + "m", *ids))), strict=True))

    def settle(self, queue: str, endings: Sequence[Ending]) -> list[bool]:
        """See `Store.settle`."""
        acks = [ending for ending in endings if ending.action == "ack"]
        calls: list[tuple[str, list[Any]]] = []
        for i in range(0, len(acks), CHUNK):
            part = acks[i : i + CHUNK]
            call = [len(part), *(_to_key(e.id) for e in part), *(e.token for e in part)]
            if any(e.keep for e in part):
                call += [item for e in part for item in (e.keep, e.completes)]
            calls.append(("ACK", call))
        others = [ending for ending in endings if ending.action != "ack"]
        for i in range(0, len(others), CHUNK):
            arguments: list[Any] = []
            for e in others[i : i + CHUNK]:
                arguments += (_to_key(e.id), e.token, e.action, e.delay, e.attempts, e.crashes, e.deliveries)
            calls.append(("RETURN", arguments))
        p = prefix(queue)
        lost = {id for name, arguments in calls for id in self._run(name, [p], arguments)}
        return [_to_key(ending.id) not in lost for ending in endings] if lost else [True] * len(endings)

    def completed(self, queue: str, ids: Sequence[str]) -> set[str]:
        """See `Store.completed`."""
        parts = [ids[i : i + CHUNK] for i in range(0, len(ids), CHUNK)]
        numbers = [self._run("COMPLETED", [prefix(queue)], part) for part in parts]
        return {part[n - 1] for part, found in zip(parts, numbers, strict=True) for n in found}

    def move(self, source: str, target: str, moves: Sequence[Move]) -> list[bool | Error]:
        """See `Store.move`."""
        keys = [prefix(source), prefix(target)]
        calls: list[Call] = []
        for id, token, entry in moves:
            lease = "" if token is None else token
            calls.append((keys, (_to_key(id), lease, _to_key(entry.id), entry.raw, entry.priority, entry.delay)))
        with self._mapped():
            answers = self._caller.run_all("MOVE", calls)
        return [self._errors.of(answer) if isinstance(answer, Refusal) else bool(answer) for answer in answers]

    def renew(self, queue: str, held: Sequence[tuple[str, int]], lease: int, consumer: str) -> list[bool]:
        """See `Store.renew`."""
        lost: set[bytes] = set()
        for i in range(0, max(1, len(held)), CHUNK):
            arguments: list[Any] = [lease, consumer]
            for id, token in held[i : i + CHUNK]:
                arguments += (_to_key(id), token)
            lost.update(self._run("RENEW", [prefix(queue)], arguments))
        return [_to_key(id) not in lost for id, _ in held]

    def leave(self, queue: str, consumer: str) -> None:
        """See `Store.leave`."""
        self._say("ZREM", prefix(queue) + "c", consumer)

    def counts(self, queue: str) -> Counts:
        """See `Store.counts`."""
        ready, delayed, leased, consumers, *heads = self._run("COUNTS", [prefix(queue)], [])
        return Counts(ready, delayed, leased, consumers, heads)

    def browse(self, queue: str, limit: int, offset: int) -> list[tuple[str, bytes]]:
        """See `Store.browse`."""
        found = self._run("BROWSE", [prefix(queue)], [limit, offset, TAKE_BYTES])
        return [(_to_id(found[i]), found[i + 1]) for i in range(0, len(found), 2)]

    def look(self, queue: str, ids: Sequence[str]) -> Iterator[tuple[str, bytes]]:
        """See `Store.look`."""
        unique = dict.fromkeys(ids)
        yield from self._look(queue, [_to_key(id) for id in unique])
        again: list[bytes] = []
        offset = 0
        while page := self._run("AGAIN", [prefix(queue)], [_PAGE, offset, AGAIN]):
            number, *keys = page
            offset += number
            again += (key for key in keys if _to_id(key).partition(AGAIN)[0] in unique)
        yield from self._look(queue, again)

    def _look(self, queue: str, keys: Sequence[str | bytes]) -> Iterator[tuple[str, bytes]]:
        start = 0
        while start < len(keys):
            number, *found = self._run("LOOK", [prefix(queue)], [TAKE_BYTES, *keys[start : start + _FEW]])
            start += number
            yield from ((_to_id(found[i]), found[i + 1]) for i in range(0, len(found), 2))

    def remove(self, queue: str, ids: Sequence[str] | None) -> int:
        """See `Store.remove`."""
        if ids is None:
            return int(self._run("CLEAR", [prefix(queue)], []))
        unique = [_to_key(id) for id in dict.fromkeys(ids)]
        parts = [unique[i : i + _FEW] for i in range(0, len(unique), _FEW)]
        return sum(int(self._run("REMOVE", [prefix(queue)], part)) for part in parts)

    def read_topology(self) -> tuple[str, int]:
        """See `Store.read_topology`."""
        document, version = self._say("HMGET", _TOPOLOGY, "document", "version")
        return (document or b"{}").decode(), int(version or 0)

    def write_topology(self, document: str, version: int) -> bool:
        """See `Store.write_topology`."""
        return bool(self._run("TOPOLOGY", [_TOPOLOGY], [document, version]))

    def wait(self, queues: Sequence[str], timeout: float, ahead: Ahead | None = None) -> list[str]:
        """See `Store.wait`."""
        self._leave_to_parent()
        with self._mapped():
            if self._bell is None and queues:
                # In the thread that renews leases: what it waits for must come to an end.
                connection = within(self._timeout, self._connector.connect, Connection.close)
                self._bell = Bell(connection, _bell_key, self._waker)
            if self._bell is None:
                Lookout(self._waker).ready(timeout)
                self._waker.drain()
            elif not self._rung:
                try:
                    if self._bell.number is not None and not self._bell.covers(queues):
                        # There is room again in one that nobody listens to.
                        self._hear(self._withdrawn(self._bell))
                    if not (self._rung or self._early):
                        take = b"" if ahead is None or self._bell.is_asked else self._take_call(ahead)
                        self._hear(self._bell.wait(queues, timeout, ahead, take))
                except BaseException:
                    self._drop_bell()
                    raise
            if not self._rung:
                return []
            found = sorted(self._rung.intersection(queues))
            self._pass_on(self._rung.difference(queues))
            return found

    @property
    def ahead(self) -> Ahead | None:
        """See `Store.ahead`."""
        return None if self._bell is None else self._bell.ahead

    def collect(self, *, withdraw: bool = False) -> list[tuple[Ahead, Taken]]:
        """See `Store.collect`."""
        self._leave_to_parent()
        bell = self._bell
        if bell is not None and bell.ahead is not None:
            with self._mapped():
                try:
                    self._hear(self._withdrawn(bell) if withdraw else bell.collect())
                except BaseException:
                    self._drop_bell()
                    raise
        if withdraw and self._rung:
            with self._mapped():
                self._pass_on(self._rung)
        early, self._early = self._early, []
        return early

    def _leave_to_parent(self) -> None:
        """Forget a bell of a process that has forked this one, and what it has heard and taken."""
        if self._bell is not None and self._bell.is_of_parent:
            self._bell = None
            self._rung.clear()
            self._early.clear()

    def _withdrawn(self, bell: Bell) -> Ring:
        assert bell.number is not None
        until = monotonic() + self._timeout
        while monotonic() < until:
            # Once more where the server has read this before it read what it is to end.
            self._lines.ask([unblock(bell.number)])
            ring = bell.collect(_TOLD_AGAIN)
            if ring is not None:
                return ring
        # What it has taken, if anything, comes back when its lease ends.
        raise Late("a blocked call does not end")

    def _take_call(self, ahead: Ahead) -> bytes:
        arguments = self._take_arguments(*ahead)
        return SCRIPTS["TAKE"].by_name.pack((1, prefix(ahead.queue), *arguments))

    def _drop_bell(self) -> None:
        bell, self._bell = self._bell, None
        if bell is not None:
            bell.close()

    def _hear(self, ring: Ring | None) -> None:
        if ring is None:
            return
        if ring.queue is not None:
            self._rung.add(ring.queue)
        if ring.ahead is not None:
            queue = ring.ahead.queue
            if isinstance(ring.taken, Exception):
                # Whoever looks into the queue meets the error, or none: a server forgets scripts.
                self._rung.add(queue)
            else:
                self._early.append((ring.ahead, self._taken(queue, ring.taken)))
                self._rung.discard(queue)
        if ring.refusal is not None:
            raise ring.refusal

    def _pass_on(self, queues: Set[str]) -> None:
        """Ring for queues that we cannot follow now: somebody else may."""
        found = sorted(queues)
        self._rung.clear()
        for queue in found:
            try:
                self._answer(_RPUSH.pack((_bell_key(queue), "1")))
            except Refusal as refusal:
                # On a full server whoever looks next without being woken finds the work.
                if refusal.code != "OOM":
                    raise

    def nudge(self, queue: str) -> None:
        """See `Store.nudge`: only one hears of what comes."""
        self._run("NUDGE", [prefix(queue)], [])

    def wake(self) -> None:
        """See `Store.wake`."""
        self._waker.wake()

    def close(self) -> None:
        """See `Store.close`."""
        if self._closed:
            return
        self._closed = True
        self._drop_bell()
        self._lines.close()
        self._waker.close()

    def _run(self, name: str, keys: list[str], arguments: Sequence[Any]) -> Any:
        with self._mapped():
            return self._caller.run(name, keys, arguments)

    def _say(self, *words: str) -> Any:
        """Give a command, and return what is answered."""
        with self._mapped():
            return self._answer(Head(*words).pack(()))

    def _answer(self, command: bytes) -> Any:
        (answer,) = self._lines.ask([command])
        if isinstance(answer, Exception):
            raise answer
        return answer

    def _ask(self, *words: str) -> Any:
        """Give a command that an account may not give, or a server not know; return None then."""
        with self._mapped():
            try:
                return self._answer(Head(*words).pack(()))
            except Refusal:
                return None

    def _setting(self, name: str) -> str | None:
        """Return a setting of the server's; None where it does not say."""
        found = self._ask("CONFIG", "GET", name)
        return found[1].decode(errors="replace") if found else None

    def _mapped(self) -> RedisErrors:
        """Return what turns the errors met here into kq's, as long as the store is open."""
        if self._closed:
            raise BrokerAway("the connection to Redis is closed", details={"reason": "unavailable"})
        return self._errors


def prefix(queue: str) -> str:
    """Return what the keys of a queue start with.

    A dead-letter queue's stand under the tag of the queue beside it, so that both share a hash slot.
    Two queues never share a prefix: a queue id holds neither braces nor a slash.
    """
    if queue.endswith(limit.DEAD_SUFFIX):
        return f"{{kq:{queue.removesuffix(limit.DEAD_SUFFIX)}}}.dead:"
    return f"{{kq:{queue}}}:"


def _field(info: bytes, name: str) -> str:
    """Return a field of what a server says of itself; empty where it does not say it."""
    found = re.search(rb"^%b:(\S*)" % name.encode(), info, re.MULTILINE)
    return found[1].decode(errors="replace") if found else ""


def _bell_key(queue: str) -> str:
    return prefix(queue) + "w"


def _to_id(key: bytes) -> str:
    """Return the id under which Redis keeps a message; a stranger's may be any bytes."""
    try:
        id = key.decode()
    except UnicodeDecodeError:
        return _FOREIGN + key.hex()
    return _FOREIGN + key.hex() if id.startswith(_FOREIGN) else id


def _to_key(id: str) -> bytes:
    """Return what `_to_id` has made an id of; or the key for an id that a stranger's envelope has."""
    if id.startswith(_FOREIGN):
        try:
            return bytes.fromhex(id[len(_FOREIGN) :])
        except ValueError:
            pass
    return id.encode()


def _to_state(text: bytes) -> tuple[int, int, int]:
    """Return attempts, crashes and deliveries; nought where there are none, or a stranger wrote something else."""
    if not text:
        return 0, 0, 0
    found = _STATE.fullmatch(text)
    return (int(found[1]), int(found[2]), int(found[3])) if found else (0, 0, 0)
