"""Ends another thread's wait on sockets: the self-pipe trick (https://cr.yp.to/docs/selfpipe.html)."""

from __future__ import annotations

import select
import socket
from contextlib import suppress
from math import ceil
from typing import Final, Generic, Protocol, TypeVar


class Readable(Protocol):
    """What has a descriptor."""

    def fileno(self) -> int:
        """Return it."""
        ...


_T = TypeVar("_T", bound=Readable)

#: Seconds that the system can wait at most, in a number of 32 bits of milliseconds.
_LONGEST: Final = 2_000_000.0


class Lookout(Generic[_T]):
    """Waits for the same sources again and again. Unlike ``select.select`` it takes descriptors beyond 1023.

    Args:
        sources: What to wait for; open, and each with the descriptor that it has now.
    """

    def __init__(self, *sources: _T) -> None:
        self._sources = {source.fileno(): source for source in sources}
        poll = select.poll()
        for descriptor in self._sources:
            poll.register(descriptor, select.POLLIN)
        self._poll = poll.poll

    def ready(self, timeout: float) -> list[_T]:
        """Return those that can be read, waiting for the first at most ``timeout`` seconds."""
        # Rounded up: a wait that ends too early is made again, and again.
        found = self._poll(ceil(min(timeout, _LONGEST) * 1000) if timeout > 0 else 0)
        return [self._sources[descriptor] for descriptor, _ in found]


class Waker:
    """Becomes readable when somebody calls `wake`, until it is drained."""

    def __init__(self) -> None:
        self._reader, self._writer = socket.socketpair()
        self._reader.setblocking(False)
        self._writer.setblocking(False)

    def fileno(self) -> int:
        """Return the descriptor to wait on."""
        return self._reader.fileno()

    def wake(self) -> None:
        """End the wait, the present or the next one. Safe in any thread and in signal handlers."""
        # It fails when it is full of wake-ups already, or closed meanwhile.
        with suppress(OSError):
            self._writer.send(b"!")

    def drain(self) -> None:
        """Forget the wake-ups so far."""
        drain(self._reader)

    def close(self) -> None:
        """Give both ends up. Idempotent."""
        self._reader.close()
        self._writer.close()


def drain(reader: socket.socket) -> bool:
    """Read what a non-blocking socket holds, and tell whether that was anything."""
    found = False
    try:
        while reader.recv(4096):
            found = True
    except OSError:
        pass  # nothing more
    return found
