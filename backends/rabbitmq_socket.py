"""Connections of py-amqp that read ahead, and whose reads end when their time is up, also in the middle of a frame.

py-amqp asks the system several times for each frame, and where a frame has begun and the rest does not come it goes on
in a loop: a broker, or a network, that goes silent at that point would hold up its reader for ever, at full speed.
Here one call reads what has arrived, for as many frames as that may be, and a read that has to wait longer than the
socket's timeout says so; what has been read of a frame is kept for the next one.
"""

from __future__ import annotations

import socket
import ssl
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from errno import EBADF
from struct import Struct
from time import monotonic
from typing import Any, Final

import kombu
from amqp.exceptions import UnexpectedFrame
from amqp.transport import TCPTransport
from kombu.transport import pyamqp

#: Bytes that one call asks for. Above this the allocator asks the system for memory each time.
_READ_SIZE: Final = 1 << 16
#: A frame: its type, its channel, and the size of the payload that follows...
_HEAD: Final = Struct(">BHI")
#: ...and what stands behind that.
_END: Final = 0xCE
#: Seconds that a read waits even where time is up: 0 would mean not to wait at all, and say so in another way.
_LEAST: Final = 0.001

#: A frame's type, channel and payload.
Frame = tuple[int, int, bytes]


class ReadsInTime:
    """A transport's way of reading; mixed into py-amqp's."""

    connected: bool
    #: Whether a read that returns less than it could has returned all there is.
    takes_all = True
    #: Whether something has been taken off the wire that no read has returned.
    is_ahead = False
    _quick_recv: Any
    write: Any
    sock: Any
    #: Until when reads wait together, and seconds that each does at most.
    _limits: tuple[float, float] | None = None
    _arrived = b""
    _at = 0

    @contextmanager
    def having_timeout(self, timeout: float | None) -> Iterator[Any]:
        """As py-amqp's; but where the connection has ended meanwhile, what is raised is why, not that it has."""
        met: BaseException | None = None
        within: Any = super()
        try:
            with within.having_timeout(timeout) as connected:
                try:
                    yield connected
                except BaseException as error:
                    met = error
                    raise
        except OSError as error:
            if met is None or error.errno != EBADF:
                raise
            # That the socket takes no timeout any more.
            raise met from None

    @contextmanager
    def having_limits(self, until: float, most: float) -> Iterator[None]:
        """Have all reads together wait no longer than until then, of `time.monotonic`, and each ``most`` seconds."""
        with self.having_timeout(most):
            self._limits = until, most
            try:
                yield
            finally:
                self._limits = None
                # The time it had before may be this very one: then nobody takes it back.
                with suppress(OSError, AttributeError):
                    self.sock.settimeout(most)

    @property
    def has_frame(self) -> bool:
        """Whether a whole frame has been read and not been taken: `select` knows nothing of it."""
        left = len(self._arrived) - self._at
        return left >= _HEAD.size and left > _HEAD.size + int(_HEAD.unpack_from(self._arrived, self._at)[2])

    def take_frame(self) -> Frame | None:
        """Return the next frame that has been read as a whole; None if there is none."""
        data, at = self._arrived, self._at
        start = at + _HEAD.size
        if len(data) < start:
            return None
        kind, channel, size = _HEAD.unpack_from(data, at)
        end = start + size
        if len(data) <= end:
            return None
        if data[end] != _END:
            raise UnexpectedFrame(f"expected a frame that ends with {_END:#04x}, got {data[end]:#04x}")
        self._at = end + 1
        return kind, channel, data[start:end]

    def read(self) -> bool:
        """Read what has arrived; where nothing has, wait for it. Returns whether more may have.

        Raises:
            TimeoutError: If nothing comes in time.
            OSError: If the connection breaks.
        """
        if self._limits is not None:
            until, most = self._limits
            self.sock.settimeout(max(_LEAST, min(most, until - monotonic())))
        return self._read()

    def _read(self, *flags: int) -> bool:
        try:
            data = self._quick_recv(_READ_SIZE, *flags)
        except (TimeoutError, BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError):
            raise TimeoutError from None
        except OSError:
            self.connected = False
            raise
        if not data:
            self.connected = False
            raise OSError("the broker closed the connection")
        rest = self._arrived[self._at :]
        self._arrived, self._at = rest + data if rest else data, 0
        return len(data) == _READ_SIZE or not self.takes_all

    def read_now(self) -> bool:
        """Read as `read` does, and wait for nothing."""
        with self.having_timeout(0.0):
            return self._read()

    def write_within(self, data: bytes | memoryview, timeout: float) -> None:
        """Write all of it.

        Raises:
            TimeoutError: If that is not possible within about ``timeout`` seconds.
            OSError: If the connection breaks.
        """
        with self.having_timeout(timeout):
            self.write(data)

    def write_now(self, data: bytes | memoryview) -> int:
        """Write as much of it as there is room for, wait for nothing, and return how much that was.

        Raises:
            OSError: If the connection breaks.
        """
        with self.having_timeout(0.0):
            return self._write_now(data)

    def _write_now(self, data: bytes | memoryview, *flags: int) -> int:
        try:
            sent: int = self.sock.send(data, *flags)
        except (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError):
            return 0
        except OSError:
            self.connected = False
            raise
        return sent

    def read_frame(self, unpack: Any = None) -> Frame:
        """Return the next frame, and wait for it; raises as `read`."""
        while (frame := self.take_frame()) is None:
            self.read()
        return frame


class _Socket(ReadsInTime, TCPTransport):  # type: ignore[misc, unused-ignore]
    """A plain socket. What need not wait is done by one call, and without a change of the socket's timeout."""

    sock: socket.socket

    def read_now(self) -> bool:
        return self._read(socket.MSG_DONTWAIT)

    def write_now(self, data: bytes | memoryview) -> int:
        return self._write_now(data, socket.MSG_DONTWAIT)

    def write_within(self, data: bytes | memoryview, timeout: float) -> None:
        sent = self.write_now(data)
        if sent < len(data):
            super().write_within(memoryview(data)[sent:], timeout)


class _Connection(pyamqp.Connection):  # type: ignore[misc, unused-ignore]
    def Transport(  # noqa: N802 - py-amqp's name for it
        self, host: str, connect_timeout: float, ssl: Any, read_timeout: float, write_timeout: float, **options: Any
    ) -> _Socket:
        return _Socket(
            host, connect_timeout=connect_timeout, read_timeout=read_timeout, write_timeout=write_timeout, **options
        )


class _Transport(pyamqp.Transport):  # type: ignore[misc, unused-ignore]
    Connection = _Connection


class PlainClient(kombu.Connection):  # type: ignore[misc, unused-ignore]
    """A Kombu connection without encryption."""

    def _init_params(self, **params: Any) -> None:
        # Where it is plain `amqp` Kombu looks for the package librabbitmq, each time: an import, which a child that is
        # forked in the middle of it would wait for in vain.
        super()._init_params(**{**params, "transport": "pyamqp"})

    def get_transport_cls(self) -> type[_Transport]:
        """Return the transport, whatever the URL in use is."""
        return _Transport
