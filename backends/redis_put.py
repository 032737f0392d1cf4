"""Stores messages on Redis: a batch in as few calls as may be, and a long message without a copy made by Lua."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

from kq.backends.redis_call import SCRIPTS, Caller
from kq.backends.redis_command import LONG, Head
from kq.backends.redis_error import NoTransactions, is_full
from kq.backends.store import Entry
from kq.header import NORMAL

#: Messages that one Lua call handles at most: Redis serves nobody else meanwhile.
CHUNK: Final = 500
#: Bytes of messages that one Lua call stores at most.
_CHUNK_BYTES: Final = 4 * 2**20
_HSETNX: Final = Head("HSETNX")


class Putter:
    """What `Store.put` does on Redis. Thread-safe.

    Args:
        caller: Runs the scripts.

    Attributes:
        transacts: Whether the server has transactions, and lets this account have them, as far as known.
    """

    def __init__(self, caller: Caller) -> None:
        self._caller = caller
        self.transacts = True

    def put(self, prefix: str, entries: Sequence[Entry], max_length: int | None) -> int | None:
        """Store messages and return how many of them, from the first; None where there is no queue.

        Raises:
            RedisError: What the server answers, unless it has stored some and is full now; or if it cannot be reached.
        """
        if max_length is None and len(entries) == 1 and _is_plain(entries[0]):
            return self._put_one(prefix, entries[0])
        return self._put_all(prefix, entries, max_length)

    def _put_one(self, prefix: str, entry: Entry) -> int | None:
        if len(entry.raw) >= LONG and self.transacts:
            try:
                return self._put_long(prefix, entry)
            except NoTransactions:
                self.transacts = False
        return self._put_short(prefix, entry)

    def _put_short(self, prefix: str, entry: Entry) -> int | None:
        accepted: int = self._caller.run("PUT_PLAIN", (prefix,), (entry.id, entry.raw))
        return None if accepted < 0 else accepted

    def _put_all(self, prefix: str, entries: Sequence[Entry], max_length: int | None) -> int | None:
        script, head = _script(entries, max_length)
        calls: list[list[Any]] = []
        sizes: list[int] = []
        size = _CHUNK_BYTES + 1
        for entry in entries:
            if size + len(entry.raw) > _CHUNK_BYTES or sizes[-1] >= CHUNK:
                calls.append([*head])
                sizes.append(0)
                size = 0
            calls[-1] += _words(entry, script)
            sizes[-1] += 1
            size += len(entry.raw)
        # Where the queue has a length, one after the other: in a later call there might be room for what a call
        # before it found none for.
        lot = 1 if max_length is not None else len(calls)
        accepted = 0
        for i in range(0, len(calls), lot):
            answers = self._caller.run_all(script, [([prefix], call) for call in calls[i : i + lot]])
            for answer, expected in zip(answers, sizes[i : i + lot], strict=True):
                if isinstance(answer, Exception):
                    if accepted and is_full(answer):
                        # What is stored is stored; for the rest the caller says that there is no room.
                        return accepted
                    raise answer
                if answer < 0:
                    return None
                accepted += int(answer)
                if answer < expected:
                    return accepted
        return accepted

    def _put_long(self, prefix: str, entry: Entry) -> int | None:
        """Store one message whose body Lua does not see: it would copy it, which takes longer than all the rest.

        A queue that somebody deletes between the two round trips is as good as one that is deleted after them.
        """
        # Run whole: where a name is not known any more, the other command would be run all the same.
        commands = [
            *SCRIPTS["PUT_LONG"].whole.pieces([(1, prefix, entry.id)]),
            *_HSETNX.pieces([(prefix + "m", entry.id, entry.raw)]),
        ]
        may_put = SCRIPTS["MAY_PUT"].whole.pack((1, prefix))
        may, answers = self._caller.lines.transact(may_put, commands, 2)
        if may != 1:
            if may == -2:
                self.transacts = False
            return None if may == 0 else self._put_short(prefix, entry)
        for answer in answers:
            if isinstance(answer, Exception):
                raise answer
        return 1


def packed(prefix: str, entries: Sequence[Entry], max_length: int | None) -> bytes:
    """Return a command that stores messages, as `Putter.put` does, and is answered with how many."""
    name, words = _script(entries, max_length)
    for entry in entries:
        words += _words(entry, name)
    return SCRIPTS[name].by_name.pack((1, prefix, *words))


def _script(entries: Sequence[Entry], max_length: int | None) -> tuple[str, list[Any]]:
    """Return the name of what stores messages, and what it is told before them."""
    if max_length is None and all(map(_is_plain, entries)):
        return "PUT_PLAIN", []
    return "PUT", [-1 if max_length is None else max_length]


def _words(entry: Entry, script: str) -> tuple[Any, ...]:
    if script == "PUT_PLAIN":
        return entry.id, entry.raw
    return entry.id, entry.raw, entry.priority, entry.delay, entry.ttl


def _is_plain(entry: Entry) -> bool:
    return entry.priority == NORMAL and not entry.delay and not entry.ttl
