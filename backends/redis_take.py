"""Takes messages on Redis: what is asked for, and what the answer holds."""

from __future__ import annotations

import re
from typing import Final

import msgspec

from kq.backends.redis_call import SCRIPTS, Caller
from kq.backends.redis_command import Head
from kq.backends.redis_key import prefix, to_id
from kq.backends.store import TAKE_BYTES, TAKE_MOST, Ahead, Lease, Taken

#: Bytes of a body, on average, from which on bodies are fetched by a call of their own.
_LARGE: Final = 1024
_HMGET: Final = Head("HMGET")
_STATE: Final = re.compile(rb"(\d{1,9}):(\d{1,9}):(\d{1,9})")

_blobs = msgspec.msgpack.Decoder(list[bytes])


class Taker:
    """What `Store.take` does on Redis. Thread-safe.

    Args:
        caller: Runs the script.
    """

    def __init__(self, caller: Caller) -> None:
        self._caller = caller
        #: Queues whose bodies are large.
        self._large: set[str] = set()

    def take(self, queue: str, limit: int, lease: int) -> Taken:
        """Take messages, at most ``limit``, for ``lease`` milliseconds.

        Raises:
            RedisError: What the server answers, or if it cannot be reached.
        """
        return self.taken(queue, self._caller.run("TAKE", [prefix(queue)], self._arguments(queue, limit, lease)))

    def packed(self, ahead: Ahead) -> bytes:
        """Return a take, as it is sent; what is answered to it is for `taken`."""
        return SCRIPTS["TAKE"].by_name.pack((1, prefix(ahead.queue), *self._arguments(*ahead)))

    def taken(self, queue: str, answer: bytes) -> Taken:
        """Return what a take has answered, and the bodies that it has left out.

        Raises:
            RedisError: As `take`.
        """
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
                leases.append(Lease(to_id(key), body, token, *_to_state(state), b"x" in marks))
            token += 1
        if leases:
            # As the last ones were, so the next ones will be.
            (self._large.add if size > _LARGE * len(leases) else self._large.discard)(queue)
        return Taken(leases, int(more) if more else None)

    def _bodies(self, p: str, ids: list[bytes]) -> dict[bytes, bytes | None]:
        """Return the bodies of messages that are leased already; None where somebody has removed one."""
        if not ids:
            return {}
        (answer,) = self._caller.lines.ask([_HMGET.pack((p + "m", *ids))])
        if isinstance(answer, Exception):
            raise answer
        return dict(zip(ids, answer, strict=True))

    def _arguments(self, queue: str, limit: int, lease: int) -> tuple[int, ...]:
        return min(limit, TAKE_MOST), lease, TAKE_BYTES, int(queue in self._large)


def _to_state(text: bytes) -> tuple[int, int, int]:
    """Return attempts, crashes and deliveries; nought where there are none, or a stranger wrote something else."""
    if not text:
        return 0, 0, 0
    found = _STATE.fullmatch(text)
    return (int(found[1]), int(found[2]), int(found[3])) if found else (0, 0, 0)
