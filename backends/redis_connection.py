"""Connects to a Redis server: TCP, encryption where wanted, and signing in, in one round trip."""

from __future__ import annotations

# Which looking an address up loads: not then, when a process may be forked in the middle of it.
import encodings.idna  # noqa: F401
import os
import socket
from contextlib import suppress
from typing import TYPE_CHECKING, Final

from kq.backends.keepalive import keepalive
from kq.backends.redis_address import Address
from kq.backends.redis_answer import Answers
from kq.backends.redis_command import Head
from kq.backends.redis_error import Broken, Late, Refusal, Unsafe, as_met
from kq.version import __version__

if TYPE_CHECKING:
    from ssl import SSLContext

_AUTH: Final = Head("AUTH")
_SELECT: Final = Head("SELECT")
_SETNAME: Final = Head("CLIENT", "SETNAME")
#: For whoever lists the server's clients. Redis 7.2 and newer know it, and not every account may.
_INTRODUCTION: Final = (
    Head("CLIENT", "SETINFO").pack(("LIB-NAME", "kq")),
    Head("CLIENT", "SETINFO").pack(("LIB-VER", __version__)),
)


class Connection:
    """A connection that is signed in. What is said on it is up to whoever has it.

    Args:
        connected: Its socket.
        not_now: See below.

    Attributes:
        socket: Its socket.
        not_now: What it raises where it is not to block, and there is nothing to be read, or no room.
    """

    __slots__ = ("_pid", "not_now", "socket")

    def __init__(self, connected: socket.socket, not_now: tuple[type[OSError], ...] = (BlockingIOError,)) -> None:
        self.socket = connected
        self.not_now = not_now
        self._pid = os.getpid()

    def __del__(self) -> None:
        self.close()

    @property
    def is_closed(self) -> bool:
        """Whether it has been closed."""
        return self.socket.fileno() < 0

    @property
    def is_of_parent(self) -> bool:
        """Whether a process made it that has forked this one, and has it as well."""
        return self._pid != os.getpid()

    def close(self) -> None:
        """Close it, also where a forked process has it too. Idempotent."""
        if os.getpid() == self._pid:
            # Closed, or broken.
            with suppress(OSError):
                self.socket.shutdown(socket.SHUT_RDWR)
        self.socket.close()


class Connector:
    """Makes connections. Thread-safe.

    Args:
        address: Where to, and as whom.
        timeout: Seconds that a single write or read may take on them.
        connect_timeout: Seconds that connecting may take, for each address of the host, and the handshake of TLS.
        heartbeat: Seconds after which a silent connection is known to be dead.
        name: What the server's list of clients shows.
        tls: What they are encrypted with; None for not at all.
        server_name: The name that the server's certificate must bear; None for the host's.
    """

    def __init__(
        self, address: Address, *, timeout: float, connect_timeout: float, heartbeat: float, name: str,
        tls: SSLContext | None = None, server_name: str | None = None,
    ) -> None:  # fmt: skip
        self._address = address
        self._timeout = timeout
        self._connect_timeout = connect_timeout
        options = {socket.TCP_NODELAY: 1, **keepalive(heartbeat)}
        self._options = [
            (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
            *((socket.IPPROTO_TCP, name, value) for name, value in options.items()),
        ]
        self._tls = tls
        self._server_name = server_name
        self._not_now: tuple[type[OSError], ...] = (BlockingIOError,)
        if tls is not None:
            from ssl import SSLWantReadError, SSLWantWriteError

            self._not_now = (SSLWantReadError, SSLWantWriteError)
        required: list[bytes] = []
        if address.username is not None:
            required.append(_AUTH.pack((address.username, address.password or "")))
        elif address.password is not None:
            required.append(_AUTH.pack((address.password,)))
        shown = "".join(c if c.isascii() and c.isalnum() else "-" for c in name)
        if shown:
            required.append(_SETNAME.pack((shown,)))
        if address.database:
            required.append(_SELECT.pack((address.database,)))
        self._required = len(required)
        self._greeting = b"".join((*required, *_INTRODUCTION))

    def connect(self) -> Connection:
        """Return a new connection.

        Raises:
            RedisError: If there is no way to the server, or it does not let us in.
        """
        try:
            connection = Connection(self._connected(), self._not_now)
        except UnicodeError:
            raise Broken(f"{self._address.host!r} is no name of a host") from None
        except OSError as error:
            raise as_met(error, f"no connection within {self._connect_timeout:g} s") from None
        try:
            self._sign_in(connection.socket)
        except BaseException as error:
            connection.close()
            raise as_met(error, f"no answer within {self._timeout:g} s") from None
        return connection

    def _connected(self) -> socket.socket:
        address = self._address
        plain = socket.create_connection((address.host, address.port), self._connect_timeout)
        try:
            for option in self._options:
                plain.setsockopt(*option)
            # The handshake is a part of connecting.
            made = plain if self._tls is None else self._encrypted(plain, self._tls)
            made.settimeout(self._timeout)
        except BaseException:
            plain.close()
            raise
        return made

    def _encrypted(self, plain: socket.socket, context: SSLContext) -> socket.socket:
        from ssl import SSLEOFError, SSLError, SSLZeroReturnError

        from kq.backends.tls import explain

        try:
            return context.wrap_socket(plain, server_hostname=self._server_name or self._address.host)
        except TimeoutError:
            text = f"no TLS connection within {self._connect_timeout:g} s: does the server speak TLS on this port?"
            raise Late(text) from None
        except (SSLEOFError, SSLZeroReturnError):
            raise Broken("the server closed the connection while it was being encrypted") from None
        except SSLError as error:
            raise Unsafe(explain(error)) from None

    def _sign_in(self, connected: socket.socket) -> None:
        connected.sendall(self._greeting)
        source = Answers(connected)
        for number in range(self._required + len(_INTRODUCTION)):
            answer = source.read()
            if isinstance(answer, Broken) or (number < self._required and isinstance(answer, Refusal)):
                raise answer
