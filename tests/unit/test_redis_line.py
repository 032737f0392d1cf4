from __future__ import annotations

import re
import socket
from collections.abc import Iterator
from contextlib import closing, suppress
from itertools import count
from threading import Event, Thread
from typing import Any

import pytest
import redis
from hypothesis import given
from hypothesis import strategies as st

from kq.backend import BackendOptions, Publication, QueueSpec
from kq.backends.redis_address import address_of
from kq.backends.redis_answer import Answers
from kq.backends.redis_command import Head
from kq.backends.redis_connection import Connection, Connector
from kq.backends.redis_error import Broken, Late, RedisErrors, Refusal
from kq.backends.redis_line import Lines
from kq.backends.redis_sent import Sent
from kq.backends.stored import StoredBackend
from kq.envelope import Envelope

VALUES = st.recursive(
    st.none() | st.integers() | st.binary(max_size=100), lambda inner: st.lists(inner, max_size=5), max_leaves=20
)


def written(value: Any) -> bytes:
    """Return an answer as Redis writes it."""
    if value is None:
        return b"$-1\r\n"
    if isinstance(value, int):
        return b":%d\r\n" % value
    if isinstance(value, bytes):
        return b"$%d\r\n%b\r\n" % (len(value), value)
    return b"*%d\r\n" % len(value) + b"".join(map(written, value))


class Trickle:
    """A socket that gives what it has in pieces."""

    def __init__(self, data: bytes, sizes: list[int]) -> None:
        self.data = data
        self.sizes = sizes

    def recv(self, size: int) -> bytes:
        size = min(size, self.sizes.pop() if self.sizes else size)
        part, self.data = self.data[:size], self.data[size:]
        return part


def answers(data: bytes, sizes: list[int] | None = None) -> Answers:
    return Answers(Trickle(data, sizes or []))  # type: ignore[arg-type]


@given(st.lists(VALUES, min_size=1, max_size=5), st.lists(st.integers(1, 20)))
def test_answers_come_out_as_they_went_in(values: list[Any], sizes: list[int]) -> None:
    """However the stream is cut."""
    source = answers(b"".join(map(written, values)), sizes)
    assert [source.read() for _ in values] == values


def test_errors_are_values() -> None:
    """Each with its code, also within others; those that will pass are as a connection that broke."""
    source = answers(
        b"-NOSCRIPT No matching script\r\n-OOM\r\n-ERR what\r\n*1\r\n-ERR in it\r\n"
        b"-LOADING x\r\n-MASTERDOWN x\r\n-ERR max number of clients reached\r\n+OK\r\n"
    )
    found = [source.read() for _ in range(3)]
    assert [error.code for error in found] == ["NOSCRIPT", "OOM", "ERR"]
    assert str(found[2]) == "ERR what"
    (inner,) = source.read()
    assert isinstance(inner, Refusal)
    assert [type(source.read()) for _ in range(3)] == [Broken] * 3
    assert source.read() == b"OK"
    with pytest.raises(Broken, match="closed"):
        source.read()


@pytest.mark.parametrize("line", [b"what", b":abc", b"$abc", b"$-5", b"*x", b"*-2"])
def test_what_is_no_answer_is_shown(line: bytes) -> None:
    """What is before and behind it is not."""
    source = answers(b"+OK\r\n*2\r\n:1\r\n" + line + b"\r\n+OK\r\n")
    assert source.read() == b"OK"
    with pytest.raises(Broken, match=re.escape(f"expected an answer of Redis, got {line!r}") + "$"):
        source.read()


def test_lists_in_lists_without_end_are_no_answer() -> None:
    with pytest.raises(Broken, match="expected an answer of Redis"):
        answers(b"*1\r\n" * 3000).read()


@given(st.lists(st.text() | st.binary() | st.integers(), max_size=10))
def test_commands_are_packed_as_redis_py_packs_them(items: list[Any]) -> None:
    """Byte for byte, whatever is in them; text as UTF-8."""
    items = [item for item in items if not isinstance(item, str) or item.isprintable()]
    connection: Any = redis.Connection()  # type: ignore[no-untyped-call, unused-ignore]
    expected = b"".join(connection.pack_command("EVALSHA", "name", *items))
    assert Head("EVALSHA", "name").pack(items) == expected


class Server:
    """Answers connections one after the other, each up to so many pings, and then closes it."""

    def __init__(self, *lives: int) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self.pings = 0
        self._lives = lives
        self._thread = Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        for life in self._lives:
            connection, _ = self._listener.accept()
            with connection:
                left = life
                while data := connection.recv(1000):
                    if b"PING" in data:
                        self.pings += 1
                        left -= 1
                    if left >= 0:
                        # What is said first, of ourselves, is answered as well.
                        connection.sendall(b"+OK\r\n" * (1 + data.count(b"\r\n*")))
                    if left <= 0 and b"PING" in data:
                        break

    def close(self) -> None:
        self._thread.join(10.0)
        self._listener.close()


@pytest.fixture
def lines() -> Iterator[Any]:
    made: list[tuple[Lines, Server]] = []

    def make(*lives: int) -> tuple[Lines, Server]:
        server = Server(*lives)
        address = address_of(f"redis://127.0.0.1:{server.port}")
        connector = Connector(address, timeout=5.0, connect_timeout=5.0, heartbeat=30.0, name="test")
        made.append((Lines(connector.connect, 5.0), server))
        return made[-1]

    yield make
    for line, server in made:
        line.close()
        server.close()


def test_a_server_that_is_a_replica_by_now_is_left() -> None:
    """Its connection stays open, and the same name may lead to the new master."""
    made: list[socket.socket] = []

    def connect() -> Connection:
        ours, theirs = socket.socketpair()
        theirs.sendall(b"+OK\r\n" if made else b"-READONLY You can't write against a read only replica.\r\n")
        made.append(theirs)
        return Connection(ours)

    lines = Lines(connect, 5.0)
    (refusal,) = lines.ask([b"SET"])
    assert isinstance(refusal, Refusal)
    assert lines.ask([b"SET"]) == [b"OK"]
    lines.close()
    for server in made:
        server.close()


def test_connecting_ends_in_the_calls_time() -> None:
    """Whatever it waits for: the system looks a name up for as long as it likes."""
    go_on = Event()

    def connect() -> Any:
        assert go_on.wait(30)
        raise Broken("no such host")

    lines = Lines(connect, 0.05)
    try:
        with pytest.raises(Late, match=r"no connection within 0\.05 s"):
            lines.ask([b"PING"])
    finally:
        go_on.set()


def test_a_connection_that_broke_while_idle_is_replaced_once(lines: Any) -> None:
    """The command is sent again over a new one; what breaks in the middle of a first call is an error."""
    line, server = lines(1, 1, 0)
    ping = Head("PING").pack(())
    assert line.ask([ping]) == [b"OK"]
    assert line.ask([ping]) == [b"OK"]
    assert server.pings == 2
    # The second connection is closed by now, and the third one answers nothing.
    with pytest.raises(Broken):
        line.ask([ping])


def test_what_has_taken_time_before_is_part_of_a_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """A connection that broke, the first of two round trips: what comes then has the rest, so that a publish ends."""
    ticks = count()
    monkeypatch.setattr("kq.backends.redis_line.monotonic", lambda: next(ticks) * 0.5)
    made: list[socket.socket] = []

    def connect() -> Connection:
        ours, theirs = socket.socketpair()
        theirs.sendall((b"+OK\r\n", b":1\r\n+OK\r\n")[len(made)])
        ours.settimeout(2.5)
        made.append(theirs)
        return Connection(ours)

    lines = Lines(connect, 2.5)
    assert lines.ask([b"PING"]) == [b"OK"]
    made[0].close()
    # Of two and a half, half a second each between four looks at the clock.
    with pytest.raises(Late, match=r"no answer within 0\.5 s"):
        lines.transact(b"condition", [b"command"], 1)
    assert len(made) == 2
    made[1].close()


class Hanging:
    """Answers what is said at first, and hangs up on each script, after so many seconds."""

    def __init__(self, after: float) -> None:
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]
        self.scripts = 0
        self._after = after
        self._over = Event()
        self._thread = Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        while not self._over.is_set():
            with suppress(OSError):
                connection, _ = self.listener.accept()
                with connection:
                    while data := connection.recv(1000):
                        if b"EVAL" in data:
                            self.scripts += 1
                            self._over.wait(self._after)
                            break
                        connection.sendall(b"+OK\r\n" * (1 + data.count(b"\r\n*")))

    def close(self) -> None:
        self._over.set()
        self.listener.shutdown(socket.SHUT_RDWR)
        self._thread.join(10)
        self.listener.close()


@pytest.mark.parametrize(("after", "scripts"), [(0.0, 3), (0.6, 2)])
def test_a_publish_is_tried_again_as_long_as_there_is_time(after: float, scripts: int) -> None:
    """Over the connection that there was, over a new one, and once more: unless that could take longer than it may."""
    with closing(Hanging(after)) as server:
        options = BackendOptions(lease=30.0, heartbeat=30.0, timeout=3.0, name="test")
        with closing(StoredBackend(f"redis://127.0.0.1:{server.port}", options)) as backend:
            message = Publication(QueueSpec("app:q"), Envelope("id", {}, {}, b"1"))
            (error,) = backend.publish([message], 3.0)
        assert error is not None
        assert error.details["reason"] == "unavailable"
        assert server.scripts == scripts


class Wire:
    """A connection whose other end is here, to send over without waiting."""

    def __init__(self) -> None:
        ours, self.server = socket.socketpair()
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        ours.settimeout(0)
        self.server.settimeout(10)
        self.line = Connection(ours)
        self.lines = Lines(_none, 5.0)

    def prepare(self, commands: bytes, *numbers: int) -> Sent:
        """Prepare something to be sent."""
        return Sent(self.line, commands, numbers, self.lines, RedisErrors("redis://host"))

    def send(self, commands: bytes, *numbers: int) -> Sent:
        """Send as much as there is room for."""
        sent = self.prepare(commands, *numbers)
        sent.write()
        return sent

    @property
    def is_free(self) -> bool:
        """Whether the connection has been put back for others; takes it."""
        line = self.lines.spare()
        assert line in (None, self.line)
        return line is not None


def _none() -> Connection:
    raise Broken("there is none")


@pytest.fixture
def wire() -> Iterator[Wire]:
    """One with little room."""
    made = Wire()
    yield made
    made.line.close()
    made.server.close()


def test_answers_to_what_was_sent_come_in_pieces(wire: Wire) -> None:
    """As long as one is missing nothing is known; then the connection is free."""
    sent = wire.send(b"x", 3, 1)
    for piece in (b":", b"3\r", b"\n:1"):
        assert sent.confirm() is None
        wire.server.sendall(piece)
    assert sent.confirm() is None
    wire.server.sendall(b"\r\n")
    assert sent.confirm() == [True] * 4
    assert not wire.is_free
    sent.close()
    assert wire.is_free


@pytest.mark.parametrize(
    ("answer", "stored", "is_free"),
    [
        (b":2\r\n:1\r\n", [True, True, True], True),
        (b":-1\r\n:1\r\n", [False, False, True], True),
        (b":1\r\n:0\r\n", [False, False, False], True),
        (b":2\r\n-NOSCRIPT No matching script\r\n", [True, True, False], False),
        (b"-READONLY no\r\n-READONLY no\r\n", [False] * 3, False),
        (b"what\r\n", [False] * 3, False),
        (b":2\r\n-LOADING soon\r\n", [True, True, False], False),
    ],
)
def test_what_is_known_to_be_stored(wire: Wire, answer: bytes, stored: list[bool], is_free: bool) -> None:
    """What was answered otherwise is not; a connection on which something went wrong is not used again."""
    sent = wire.send(b"x", 2, 1)
    wire.server.sendall(answer)
    assert sent.confirm() == stored
    # Whoever was interrupted then asks again.
    assert sent.confirm() == stored
    sent.close()
    assert wire.is_free == is_free
    assert wire.line.is_closed != is_free


def test_what_breaks_after_a_part_is_stored_in_part(wire: Wire) -> None:
    """What was answered before counts."""
    sent = wire.send(b"x", 2, 1, 1)
    wire.server.sendall(b":2\r\n:")
    wire.server.close()
    assert sent.confirm() == [True, True, False, False]


def test_what_there_is_no_room_for_is_sent_later(wire: Wire) -> None:
    """Piece by piece, in order; what cannot be sent any more is found out by reading."""
    commands = bytes(range(256)) * 400
    sent = wire.send(commands, 1)
    assert not sent.write()
    assert sent.confirm() is None
    got = b""
    while len(got) < len(commands):
        got += wire.server.recv(1 << 20)
        sent.write()
    assert got == commands
    assert sent.write()

    more = wire.send(commands, 1)
    assert not more.write()
    wire.server.close()
    assert more.write()
    assert more.confirm() == [False]


def test_what_is_given_up_leaves_no_answer_behind(wire: Wire) -> None:
    """Its connection is closed, not kept: the next one would read it."""
    sent = wire.send(b"x", 1)
    assert sent.confirm() is None
    error = sent.late()
    assert error.details["reason"] == "timeout"
    assert "redis://host: no answer within 5 s" in str(error)
    sent.close()
    assert wire.line.is_closed
    assert not wire.is_free


def test_what_is_known_of_what_is_given_up(wire: Wire) -> None:
    """What has been answered by then; of the rest nothing is known."""
    sent = wire.send(b"x", 2, 1, 1)
    wire.server.sendall(b":2\r\n:0\r\n")
    assert sent.confirm() is None
    assert sent.known() == [True, True, False, None]


def test_what_was_not_sent_leaves_the_connection_as_it_was(wire: Wire) -> None:
    """Which others can have."""
    wire.prepare(b"x", 1).close()
    assert wire.is_free
