"""A broker behind a wire that tests can cut."""

from __future__ import annotations

import socket
from contextlib import suppress
from threading import Lock, Thread
from urllib.parse import urlsplit


class Proxy:
    """Passes a broker's connections on, until it is told to freeze or to cut them."""

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        self._broker = (parts.hostname or "127.0.0.1", parts.port or 5672)
        self._listener = socket.create_server(("127.0.0.1", 0))
        port = self._listener.getsockname()[1]
        user, at, _ = parts.netloc.rpartition("@")
        self.url = parts._replace(netloc=f"{user}{at}127.0.0.1:{port}").geturl()
        self._lock = Lock()
        self._sockets: list[socket.socket] = []
        self._frozen: set[socket.socket] = set()
        self._until_cut: int | None = None
        Thread(target=self._accept, args=(self._listener,), daemon=True).start()

    def freeze(self) -> None:
        """Pass on nothing more over the connections there are."""
        with self._lock:
            self._frozen.update(self._sockets)

    def cut_after(self, count: int) -> None:
        """Cut the next connection that gets this many bytes from the broker, once."""
        with self._lock:
            self._until_cut = count

    def reopen(self) -> None:
        """Listen again at the same address, after `close`."""
        self._listener = socket.create_server(("127.0.0.1", urlsplit(self.url).port or 0))
        Thread(target=self._accept, args=(self._listener,), daemon=True).start()

    def close(self) -> None:
        """Cut everything."""
        # Shut down first: closing alone would let a waiting accept take one more.
        _cut(self._listener)
        with self._lock:
            for one in self._sockets:
                _cut(one)
            self._sockets.clear()

    def _accept(self, listener: socket.socket) -> None:
        with suppress(OSError):
            while True:
                client, _ = listener.accept()
                broker = socket.create_connection(self._broker)
                with self._lock:
                    self._sockets += (client, broker)
                    if listener.fileno() < 0:
                        # Closed in between.
                        _cut(client)
                        _cut(broker)
                Thread(target=self._pass, args=(client, broker, False), daemon=True).start()
                Thread(target=self._pass, args=(broker, client, True), daemon=True).start()

    def _pass(self, source: socket.socket, sink: socket.socket, down: bool) -> None:
        with suppress(OSError):
            while data := source.recv(65536):
                with self._lock:
                    if source in self._frozen:
                        # Neither read nor closed.
                        return
                    cut = down and self._until_cut is not None and len(data) >= self._until_cut
                    if down and self._until_cut is not None:
                        data, self._until_cut = data[: self._until_cut], None if cut else self._until_cut - len(data)
                sink.sendall(data)
                if cut:
                    break
        for one in (source, sink):
            _cut(one)


def _cut(one: socket.socket) -> None:
    with suppress(OSError):
        one.shutdown(socket.SHUT_RDWR)
    one.close()
