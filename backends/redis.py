"""``redis://`` and ``rediss://``: a store on a Redis server, 6.2 or newer.

Every primitive is one step of the server's: a Lua call, or a transaction where a body is long.
`kq.backends.redis_script` has the scripts, with a map of all keys. A message is never in a socket without a
lease: what a worker blocks on is a wake-up that carries nothing and may be lost without harm.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, Final

from kq.backend import Capabilities, Danger, Role
from kq.backends import redis_acl, tls_parameters
from kq.backends.redis_address import address_of
from kq.backends.redis_call import Call, Caller
from kq.backends.redis_command import Head
from kq.backends.redis_connection import Connector
from kq.backends.redis_error import RedisErrors, Refusal
from kq.backends.redis_key import prefix, to_id, to_key
from kq.backends.redis_line import Lines
from kq.backends.redis_put import CHUNK, Putter, packed
from kq.backends.redis_sent import Sent
from kq.backends.redis_take import Taker
from kq.backends.redis_wait import Watch
from kq.backends.store import (
    AGAIN,
    TAKE_BYTES,
    Ahead,
    Counts,
    Ending,
    Entry,
    Held,
    Lot,
    Move,
    Renewed,
    Taken,
)
from kq.config import hide_password
from kq.driver import Tls
from kq.errors import Error

#: Messages that one call looks for in lists, which takes the longer the more there are: others want their turn.
_FEW: Final = 20
#: Ids that one call passes over.
_PAGE: Final = 10_000

_TOPOLOGY: Final = "kq:topology"

_VERSION: Final = re.compile(rb"^redis_version:((\d{1,9})\.(\d{1,9})[\d.]*)", re.MULTILINE)


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
        self._taker = Taker(self._caller)
        self._watch = Watch(self._connector.connect, self._lines, self._taker, self._errors)

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
        with self._errors:
            return self._putter.put(prefix(queue), entries, max_length)

    def send(self, lots: Sequence[Lot]) -> Sent | None:
        """See `Store.send`."""
        with self._errors:
            line = self._lines.spare()
        if line is None:
            return None
        commands = b"".join([packed(prefix(queue), entries, most) for queue, entries, most in lots])
        return Sent(line, commands, [len(lot.entries) for lot in lots], self._lines, self._errors)

    def take(self, queue: str, limit: int, lease: int) -> Taken:
        """See `Store.take`."""
        with self._errors:
            return self._taker.take(queue, limit, lease)

    def settle(self, queue: str, endings: Sequence[Ending]) -> list[bool]:
        """See `Store.settle`."""
        acks = [ending for ending in endings if ending.action == "ack"]
        calls: list[tuple[str, list[Any]]] = []
        for i in range(0, len(acks), CHUNK):
            part = acks[i : i + CHUNK]
            call = [len(part), *(to_key(e.id) for e in part), *(e.token for e in part)]
            if any(e.keep for e in part):
                call += [item for e in part for item in (e.keep, e.completes)]
            calls.append(("ACK", call))
        others = [ending for ending in endings if ending.action != "ack"]
        for i in range(0, len(others), CHUNK):
            arguments: list[Any] = []
            for e in others[i : i + CHUNK]:
                arguments += (to_key(e.id), e.token, e.action, e.delay, e.attempts, e.crashes, e.deliveries)
            calls.append(("RETURN", arguments))
        p = prefix(queue)
        lost = {id for name, arguments in calls for id in self._run(name, [p], arguments)}
        return [to_key(ending.id) not in lost for ending in endings] if lost else [True] * len(endings)

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
            calls.append((keys, (to_key(id), lease, to_key(entry.id), entry.raw, entry.priority, entry.delay)))
        with self._errors:
            answers = self._caller.run_all("MOVE", calls)
        return [self._errors.of(answer) if isinstance(answer, Refusal) else bool(answer) for answer in answers]

    def renew(self, held: Held, lease: int, consumer: str) -> Renewed:
        """See `Store.renew`."""
        calls: list[Call] = []
        queues: list[str] = []
        for queue, pairs in held.items():
            for i in range(0, max(1, len(pairs)), CHUNK):
                flat = [item for id, token in pairs[i : i + CHUNK] for item in (to_key(id), token)]
                calls.append(([prefix(queue)], [lease, consumer, *flat]))
                queues.append(queue)
        with self._errors:
            answers = self._caller.run_all("RENEW", calls)
        lost: dict[str, set[bytes]] = {queue: set() for queue in held}
        failed: dict[str, Error] = {}
        for queue, answer in zip(queues, answers, strict=True):
            if isinstance(answer, Refusal):
                failed[queue] = self._errors.of(answer)
            else:
                lost[queue].update(answer)
        return {
            queue: failed.get(queue) or [to_key(id) not in lost[queue] for id, _ in pairs]
            for queue, pairs in held.items()
        }

    def leave(self, queues: Iterable[str], consumer: str) -> None:
        """See `Store.leave`."""
        commands = [Head("ZREM", prefix(queue) + "c", consumer).pack(()) for queue in queues]
        with self._errors:
            self._lines.ask(commands, len(commands))

    def counts(self, queue: str) -> Counts:
        """See `Store.counts`."""
        ready, delayed, leased, consumers, *heads = self._run("COUNTS", [prefix(queue)], [])
        return Counts(ready, delayed, leased, consumers, heads)

    def browse(self, queue: str, limit: int, offset: int) -> list[tuple[str, bytes]]:
        """See `Store.browse`."""
        found = self._run("BROWSE", [prefix(queue)], [limit, offset, TAKE_BYTES])
        return [(to_id(found[i]), found[i + 1]) for i in range(0, len(found), 2)]

    def look(self, queue: str, ids: Sequence[str]) -> Iterator[tuple[str, bytes]]:
        """See `Store.look`."""
        unique = dict.fromkeys(ids)
        yield from self._look(queue, [to_key(id) for id in unique])
        again: list[bytes] = []
        offset = 0
        while page := self._run("AGAIN", [prefix(queue)], [_PAGE, offset, AGAIN]):
            number, *keys = page
            offset += number
            again += (key for key in keys if to_id(key).partition(AGAIN)[0] in unique)
        yield from self._look(queue, again)

    def _look(self, queue: str, keys: Sequence[str | bytes]) -> Iterator[tuple[str, bytes]]:
        start = 0
        while start < len(keys):
            number, *found = self._run("LOOK", [prefix(queue)], [TAKE_BYTES, *keys[start : start + _FEW]])
            start += number
            yield from ((to_id(found[i]), found[i + 1]) for i in range(0, len(found), 2))

    def remove(self, queue: str, ids: Sequence[str] | None) -> int:
        """See `Store.remove`."""
        if ids is None:
            return int(self._run("CLEAR", [prefix(queue)], []))
        unique = [to_key(id) for id in dict.fromkeys(ids)]
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
        return self._watch.wait(queues, timeout, ahead)

    @property
    def ahead(self) -> Ahead | None:
        """See `Store.ahead`."""
        return self._watch.ahead

    def collect(self, *, withdraw: bool = False) -> list[tuple[Ahead, Taken]]:
        """See `Store.collect`."""
        return self._watch.collect(withdraw=withdraw)

    def nudge(self, queue: str) -> None:
        """See `Store.nudge`: only one hears of what comes."""
        self._run("NUDGE", [prefix(queue)], [])

    def wake(self) -> None:
        """See `Store.wake`."""
        self._watch.wake()

    def close(self) -> None:
        """See `Store.close`."""
        if self._errors.is_closed:
            return
        self._errors.close()
        self._watch.close()
        self._lines.close()

    def _run(self, name: str, keys: list[str], arguments: Sequence[Any]) -> Any:
        with self._errors:
            return self._caller.run(name, keys, arguments)

    def _say(self, *words: str) -> Any:
        """Give a command, and return what is answered."""
        with self._errors:
            return self._answer(Head(*words).pack(()))

    def _answer(self, command: bytes) -> Any:
        (answer,) = self._lines.ask([command])
        if isinstance(answer, Exception):
            raise answer
        return answer

    def _ask(self, *words: str) -> Any:
        """Give a command that an account may not give, or a server not know; return None then."""
        with self._errors:
            try:
                return self._answer(Head(*words).pack(()))
            except Refusal:
                return None

    def _setting(self, name: str) -> str | None:
        """Return a setting of the server's; None where it does not say."""
        found = self._ask("CONFIG", "GET", name)
        return found[1].decode(errors="replace") if found else None


def _field(info: bytes, name: str) -> str:
    """Return a field of what a server says of itself; empty where it does not say it."""
    found = re.search(rb"^%b:(\S*)" % name.encode(), info, re.MULTILINE)
    return found[1].decode(errors="replace") if found else ""
