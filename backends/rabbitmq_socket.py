"""Connections of py-amqp whose reads end when their time is up, also in the middle of a frame.

py-amqp's own go on reading in a loop where a frame has begun and the rest does not come: a broker, or a network, that
goes silent at that point would hold up its reader for ever, at full speed. Here a read that has to wait longer than
the socket's timeout says so, and what has been read of the frame is kept for the next one.
"""

from __future__ import annotations

import ssl
from typing import Any

import kombu
from amqp.transport import TCPTransport
from kombu.transport import pyamqp


class ReadsInTime:
    """A transport's way of reading; mixed into py-amqp's."""

    _quick_recv: Any
    _read_buffer: bytes

    def _read(self, n: int, initial: bool = False) -> bytes:
        """Return exactly ``n`` bytes.

        Raises:
            TimeoutError: If they do not come in time.
            OSError: If the connection breaks.
        """
        buffer = self._read_buffer
        try:
            while len(buffer) < n:
                try:
                    data = self._quick_recv(n - len(buffer))
                except (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError):
                    raise TimeoutError from None
                if not data:
                    raise OSError("the broker closed the connection")
                buffer += data
        finally:
            self._read_buffer = buffer
        self._read_buffer = buffer[n:]
        return buffer[:n]


class _Socket(ReadsInTime, TCPTransport):  # type: ignore[misc, unused-ignore]
    """A plain socket."""


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

    def get_transport_cls(self) -> type[_Transport]:
        """Return the transport, whatever the URL in use is."""
        return _Transport
