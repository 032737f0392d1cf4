"""A broker behind TLS: what comes encrypted is passed on in the clear."""

from __future__ import annotations

import select
import socket
import ssl
from contextlib import suppress
from threading import Thread
from urllib.parse import urlsplit

_SCHEMES = {"redis": "rediss", "amqp": "amqps"}


class TlsProxy:
    """Ends the encryption of connections to a broker.

    Args:
        url: The broker's.
        context: The server's side of the encryption.
        host: What the URL calls this machine.
    """

    def __init__(self, url: str, context: ssl.SSLContext, host: str = "localhost") -> None:
        parts = urlsplit(url)
        self._broker = (parts.hostname or "127.0.0.1", parts.port or {"redis": 6379}.get(parts.scheme, 5672))
        self._context = context
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        user, at, _ = parts.netloc.rpartition("@")
        self.url = parts._replace(scheme=_SCHEMES[parts.scheme], netloc=f"{user}{at}{host}:{self.port}").geturl()
        #: What the handshakes have agreed on, e.g. TLSv1.3.
        self.versions: list[str | None] = []
        #: Connections, encrypted or not.
        self.accepted = 0
        self._open: list[socket.socket] = []
        Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        """End everything."""
        # Shut down first: a thread that waits for one more would go on, with whatever gets this one's number.
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for one in self._open:
            with suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                self.accepted += 1
                self._open.append(client)
                Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, plain: socket.socket) -> None:
        with suppress(OSError), plain, self._context.wrap_socket(plain, server_side=True) as client:
            self.versions.append(client.version())
            self._open.append(client)
            with socket.create_connection(self._broker) as broker:
                # One thread for both ways: an SSL socket is not for two at once.
                while True:
                    ready = [client] if client.pending() else select.select([client, broker], [], [])[0]
                    for source, sink in ((client, broker), (broker, client)):
                        if source in ready:
                            data = source.recv(65536)
                            if not data:
                                return
                            sink.sendall(data)
