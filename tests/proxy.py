"""A broker behind a wire that tests can slow down, stall, clog, freeze, refuse and cut.

Each connection has a reader and a writer thread for each direction; between them every piece waits as long as the
wire is slow. What happens to a piece is decided when it is read.
"""

from __future__ import annotations

import socket
import struct
from contextlib import suppress
from dataclasses import dataclass, field
from queue import SimpleQueue
from threading import Event, Lock, Thread
from time import monotonic, sleep
from urllib.parse import urlsplit

#: Bytes that a clogged wire still takes: the least that the kernel grants.
_SMALL_BUFFER = 4096
#: And one that is slow.
_LITTLE_BUFFER = 65536
#: ``linger`` with 0 seconds: closing sends a reset.
_RESET = struct.pack("ii", 1, 0)

#: AMQP's ``basic.publish``, and frames of ``connection.blocked`` (by "an alarm") and ``connection.unblocked``.
_PUBLISH = b"\x00\x3c\x00\x28"
_BLOCKED = b"\x01\x00\x00\x00\x00\x00\x0d\x00\x0a\x00\x3c\x08an alarm\xce"
_UNBLOCKED = b"\x01\x00\x00\x00\x00\x00\x04\x00\x0a\x00\x3d\xce"

#: When to pass on what; None for the end.
_Pieces = SimpleQueue[tuple[float, bytes] | None]


@dataclass(eq=False)
class _Connection:
    """A client's connection, and ours to the broker on its behalf."""

    client: socket.socket
    broker: socket.socket
    #: Passes on nothing more. Whether it is still read is the wire's affair.
    frozen: bool = False
    #: Is not even read any more: what is sent to it piles up at the sender's.
    clogged: bool = False
    #: Becomes frozen with the next piece that is passed on.
    freeze_soon: bool = False
    #: On their way to the broker, and to the client.
    up: _Pieces = field(default_factory=SimpleQueue)
    down: _Pieces = field(default_factory=SimpleQueue)
    #: What the client has sent since RabbitMQ blocked the connection.
    held: list[bytes] = field(default_factory=list)

    def clog(self) -> None:
        self.clogged = True
        self.have_buffers(_SMALL_BUFFER)

    def have_buffers(self, size: int) -> None:
        for one in (self.client, self.broker):
            with suppress(OSError):
                one.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, size)


class Proxy:
    """Passes a broker's connections on, as well as it is told to. Thread-safe.

    Args:
        url: The broker's.

    Attributes:
        url: The same through the proxy.
        sent: Pieces that clients have sent so far.
        delay_up: Seconds that each piece to the broker is held.
        delay_down: Seconds that each piece from the broker is held.
        accepted: Connections so far, those to a broker that is down included.
    """

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        self._broker = (parts.hostname or "127.0.0.1", parts.port or {"redis": 6379}.get(parts.scheme, 5672))
        self._listener = socket.create_server(("127.0.0.1", 0))
        port = self._listener.getsockname()[1]
        user, at, _ = parts.netloc.rpartition("@")
        self.url = parts._replace(netloc=f"{user}{at}127.0.0.1:{port}").geturl()
        self.delay_up = self.delay_down = 0.0
        self.accepted = 0
        self.sent = 0
        self._lock = Lock()
        self._connections: list[_Connection] = []
        self._until_cut: int | None = None
        self._cut_freezes = False
        self._stalled = self._clogged = self._alarm = False
        self._reads = Event()
        self._reads.set()
        self._listen(self._listener)

    @property
    def open(self) -> int:
        """How many connections there are."""
        with self._lock:
            return len(self._connections)

    def freeze(self) -> None:
        """Pass on nothing more over the connections there are; new ones work: a failover, or a NAT that forgot."""
        with self._lock:
            for connection in self._connections:
                connection.frozen = True

    def stall(self) -> None:
        """Pass on nothing, over old connections and new ones; what is sent is read and lost."""
        with self._lock:
            self._stalled = True
            for connection in self._connections:
                connection.frozen = True

    def clog(self) -> None:
        """Read nothing more, from old connections and new ones: their senders' windows close."""
        with self._lock:
            self._clogged = True
            for connection in self._connections:
                connection.clog()

    def say(self, data: bytes) -> None:
        """Have each client hear this from its broker."""
        with self._lock:
            for connection in self._connections:
                connection.down.put((0.0, data))

    def pause(self) -> None:
        """Read nothing more until `resume`, with little room for what is sent meanwhile: a broker that is slow."""
        self._reads.clear()
        with self._lock:
            for connection in self._connections:
                connection.have_buffers(_LITTLE_BUFFER)

    def resume(self) -> None:
        """Go on reading."""
        self._reads.set()

    def heal(self) -> None:
        """Treat new connections well again; old ones that suffered stay as they are."""
        with self._lock:
            self._stalled = self._clogged = False
            self.delay_up = self.delay_down = 0.0

    def raise_alarm(self) -> None:
        """Read nothing more of a connection once it publishes, and tell it that: RabbitMQ whose memory is full."""
        with self._lock:
            self._alarm = True

    def end_alarm(self) -> None:
        """Pass on what was not read, and tell the clients that it is over."""
        with self._lock:
            self._alarm = False
            for connection in self._connections:
                if connection.held:
                    for data in connection.held:
                        connection.up.put((0.0, data))
                    connection.held.clear()
                    connection.down.put((0.0, _UNBLOCKED))

    def cut_after(self, count: int) -> None:
        """Cut the next connection that gets this many bytes from the broker, once, in the middle of what it gets."""
        with self._lock:
            self._until_cut, self._cut_freezes = count, False

    def freeze_after(self, count: int) -> None:
        """Freeze the next connection that gets this many bytes from the broker, once, in the middle of what it gets."""
        with self._lock:
            self._until_cut, self._cut_freezes = count, True

    def reset_all(self) -> int:
        """Reset every connection, and return how many there were."""
        with self._lock:
            connections, self._connections = self._connections, []
        for connection in connections:
            for one in (connection.client, connection.broker):
                with suppress(OSError):
                    one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
                _cut(one)
        return len(connections)

    def refuse(self) -> None:
        """Refuse new connections and cut the old ones; `reopen` ends it."""
        # Shut down first: closing alone would let a waiting accept take one more.
        _cut(self._listener)
        self.reset_all()

    def reopen(self) -> None:
        """Listen again at the same address, after `refuse` or `close`."""
        self._listener = socket.create_server(("127.0.0.1", urlsplit(self.url).port or 0))
        self._listen(self._listener)

    def close(self) -> None:
        """Cut everything."""
        _cut(self._listener)
        with self._lock:
            connections, self._connections = self._connections, []
        for connection in connections:
            _cut(connection.client)
            _cut(connection.broker)

    def _listen(self, listener: socket.socket) -> None:
        Thread(target=self._accept, args=(listener,), daemon=True).start()

    def _accept(self, listener: socket.socket) -> None:
        with suppress(OSError):
            while True:
                client, _ = listener.accept()
                self.accepted += 1
                try:
                    broker = socket.create_connection(self._broker)
                except OSError:
                    # The broker is down: whoever connects is to know at once.
                    _cut(client)
                    continue
                for one in (client, broker):
                    one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                with self._lock:
                    connection = _Connection(client, broker, frozen=self._stalled)
                    if self._clogged:
                        connection.clog()
                    self._connections.append(connection)
                    closed = listener.fileno() < 0
                if closed:
                    self._end(connection)
                    continue
                for source, sink, down in ((client, broker, False), (broker, client, True)):
                    pieces = connection.down if down else connection.up
                    Thread(target=self._read, args=(connection, source, pieces, down), daemon=True).start()
                    Thread(target=self._write, args=(connection, sink, pieces), daemon=True).start()

    def _read(self, connection: _Connection, source: socket.socket, pieces: _Pieces, down: bool) -> None:
        with suppress(OSError):
            while self._reads.wait() and (data := source.recv(65536)):
                with self._lock:
                    if connection.clogged:
                        return
                    if connection.frozen:
                        continue
                    cut = down and self._until_cut is not None and len(data) >= self._until_cut
                    if down and self._until_cut is not None:
                        data, self._until_cut = data[: self._until_cut], None if cut else self._until_cut - len(data)
                    wait = self.delay_down if down else self.delay_up
                    self.sent += not down
                    if not down and self._alarm and (connection.held or _PUBLISH in data):
                        if not connection.held:
                            connection.down.put((0.0, _BLOCKED))
                        connection.held.append(data)
                        continue
                pieces.put((monotonic() + wait, data))
                if cut and not self._cut_freezes:
                    break
                if cut:
                    # What is before the cut still arrives.
                    connection.freeze_soon = True
        # A wire that is dead does not tell one end that the other has gone.
        if not (connection.clogged or connection.frozen):
            pieces.put(None)

    def _write(self, connection: _Connection, sink: socket.socket, pieces: _Pieces) -> None:
        with suppress(OSError):
            while (piece := pieces.get()) is not None:
                due, data = piece
                sleep(max(0.0, due - monotonic()))
                if connection.frozen or connection.clogged:
                    return
                sink.sendall(data)
                if connection.freeze_soon:
                    connection.frozen = True
                    return
        self._end(connection)

    def _end(self, connection: _Connection) -> None:
        with self._lock, suppress(ValueError):
            self._connections.remove(connection)
        _cut(connection.client)
        _cut(connection.broker)


def _cut(one: socket.socket) -> None:
    with suppress(OSError):
        one.shutdown(socket.SHUT_RDWR)
    one.close()
