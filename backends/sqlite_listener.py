"""How processes that share an SQLite file wake each other: a datagram on a Unix socket."""

from __future__ import annotations

import os
import socket
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from uuid import uuid4

from kq.waker import drain


class Listener:
    """The socket on which this store hears of arrivals."""

    def __init__(self) -> None:
        # Not beside the database: the path of a Unix socket holds about a hundred bytes.
        folder = os.path.join(tempfile.gettempdir(), f"kq-{os.getuid()}")
        os.makedirs(folder, mode=0o700, exist_ok=True)
        self.path = os.path.join(folder, uuid4().hex)
        self.queues: frozenset[str] = frozenset()
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(self.path)
        self._socket.setblocking(False)

    def covers(self, queues: Sequence[str]) -> bool:
        """Tell whether it listens for all of these queues."""
        return self.queues.issuperset(queues)

    def fileno(self) -> int:
        """Return the descriptor to wait on."""
        return self._socket.fileno()

    def drain(self) -> bool:
        """Forget the wake-ups so far, and tell whether there were any."""
        return drain(self._socket)

    def close(self) -> None:
        """Give the socket up, and its name."""
        self._socket.close()
        with suppress(OSError):
            os.unlink(self.path)
