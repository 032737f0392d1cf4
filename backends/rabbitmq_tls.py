"""Encrypted connections of py-amqp.

py-amqp makes a context of its own for each connection; what it takes as ``ssl={"context": ...}`` are arguments
for one, and with them it checks no host names; nor does it where Kombu's ``amqps`` is given nothing. Ours takes a
context that is ready, and every connection goes through it, also after Kombu has turned to another broker.
"""

from __future__ import annotations

import ssl
from contextlib import suppress
from typing import Any

import kombu
from amqp.transport import SSLTransport
from kombu.transport import pyamqp

from kq.backends.rabbitmq_socket import ReadsInTime
from kq.backends.tls import explain


class UnsafeConnection(Exception):
    """No encrypted connection came about. Not among the errors that Kombu retries."""


class _Socket(ReadsInTime, SSLTransport):  # type: ignore[misc, unused-ignore]
    """A socket that is encrypted before anything is said."""

    sock: Any
    #: Records are decrypted one at a time.
    takes_all = False

    @property
    def is_ahead(self) -> bool:  # type: ignore[override]
        """See `ReadsInTime`."""
        return bool(self.sock.pending())

    def _setup_transport(self) -> None:
        context: ssl.SSLContext = self.sslopts["context"]
        name: str = self.sslopts["server_name"] or self.sslopts["hosts"].get(self.host, self.host)
        plain = self.sock
        # The handshake is a part of connecting; after it calls have the patience that calls have.
        plain.settimeout(self.connect_timeout)
        try:
            self.sock = context.wrap_socket(plain, server_hostname=name)
        except (ssl.SSLEOFError, ssl.SSLZeroReturnError):
            # As a proxy does before a broker that is away: that may pass in a moment.
            plain.close()
            raise ConnectionResetError("the server closed the connection while it was being encrypted") from None
        except ssl.SSLError as error:
            plain.close()
            raise UnsafeConnection(explain(error)) from None
        self.sock.settimeout(self.read_timeout)
        self._quick_recv = self.sock.read

    def _shutdown_transport(self) -> None:
        # Says goodbye, and does not wait for the answer of a broker that may be dead.
        if self.sock is not None:
            with suppress(OSError, ValueError):
                self.sock.settimeout(0)
                self.sock.unwrap()


class _Connection(pyamqp.Connection):  # type: ignore[misc, unused-ignore]
    def Transport(  # noqa: N802 - py-amqp's name for it
        self, host: str, connect_timeout: float, ssl: Any, read_timeout: float, write_timeout: float, **options: Any
    ) -> _Socket:
        return _Socket(
            host,
            connect_timeout=connect_timeout,
            ssl=ssl,
            read_timeout=read_timeout,
            write_timeout=write_timeout,
            **options,
        )


class _Transport(pyamqp.SSLTransport):  # type: ignore[misc, unused-ignore]
    Connection = _Connection


class TlsClient(kombu.Connection):  # type: ignore[misc, unused-ignore]
    """A Kombu connection, all of whose connections to brokers are encrypted with the context given.

    Its ``ssl`` argument is what `secured` returns.
    """

    def get_transport_cls(self) -> type[_Transport]:
        """Return the transport, whatever the URL in use is."""
        return _Transport


def secured(context: ssl.SSLContext, server_name: str | None, url: str) -> dict[str, Any]:
    """Return the ``ssl`` argument of a `TlsClient`.

    Args:
        context: What to encrypt with.
        server_name: The name that the certificate must bear; None for the host's.
        url: The broker's.
    """
    # Kombu connects to 127.0.0.1 where a URL says localhost; the certificate is for what the URL says.
    hosts = {"127.0.0.1": "localhost"} if "127.0.0.1" not in url else {}
    return {"context": context, "server_name": server_name, "hosts": hosts}
