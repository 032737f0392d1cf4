"""How processes that share an SQLite file wake each other: a datagram on a Unix socket."""

from __future__ import annotations

import os
import socket
import stat
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from typing import Final
from uuid import uuid4

from kq.waker import drain

#: Bytes of a socket's path that every system has room for, with the name.
_LONGEST: Final = 100
_NAME: Final = 32


def _folder() -> str:
    """Return a folder for sockets of this user: where temporary files are, unless the path is too long for one."""
    # Not beside the database, for the same reason.
    mine = f"kq-{os.getuid()}"
    folders = [os.path.join(place, mine) for place in (tempfile.gettempdir(), "/tmp", "/var/tmp")]
    folder = next((folder for folder in folders if len(os.fsencode(folder)) + 1 + _NAME <= _LONGEST), folders[0])
    os.makedirs(folder, mode=0o700, exist_ok=True)
    return folder


def forget(path: str) -> None:
    """Remove the name that somebody who was killed has left behind, if it is one of this user's.

    Args:
        path: As it stands in the file; whoever may write that may have written anything.
    """
    with suppress(OSError, ValueError):
        ours = os.path.basename(os.path.dirname(path)) == f"kq-{os.getuid()}"
        if ours and stat.S_ISSOCK(os.lstat(path).st_mode):
            os.unlink(path)


class Listener:
    """The socket on which this store hears of arrivals."""

    def __init__(self) -> None:
        self.path = os.path.join(_folder(), uuid4().hex)
        self.queues: frozenset[str] = frozenset()
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        try:
            self._socket.bind(self.path)
        except BaseException:
            self._socket.close()
            raise
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

    def close(self, *, forget: bool = True) -> None:
        """Give the socket up, and its name if nobody else has it."""
        self._socket.close()
        if forget:
            with suppress(OSError):
                os.unlink(self.path)
