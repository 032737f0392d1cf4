from __future__ import annotations

import socket
import sys
from collections.abc import Iterator
from itertools import pairwise
from struct import pack
from threading import Event, Thread
from time import monotonic
from typing import Any

import pytest
from amqp.exceptions import NotAllowed, UnexpectedFrame
from hypothesis import given
from hypothesis import strategies as st

from kq.backends.rabbitmq_socket import Frame, PlainClient, ReadsInTime, _Socket
from kq.waker import Lookout

FRAMES = st.lists(st.tuples(st.integers(1, 8), st.integers(0, 65535), st.binary(max_size=200)), max_size=20)


class Reader(ReadsInTime):
    """Reads one end of a pair of sockets."""

    def __init__(self, source: socket.socket) -> None:
        self.connected = True
        self._quick_recv = source.recv


@pytest.fixture
def ends() -> Iterator[tuple[socket.socket, socket.socket]]:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.settimeout(0.05)
        yield ours, theirs


def written(frame: Frame) -> bytes:
    kind, channel, payload = frame
    return pack(">BHI", kind, channel, len(payload)) + payload + b"\xce"


@given(FRAMES, st.lists(st.integers(0, 5000)))
def test_frames_come_out_as_they_went_in(frames: list[Frame], cuts: list[int]) -> None:
    """However the stream is cut, and also where a read ends in the middle of a frame."""
    stream = b"".join(map(written, frames))
    edges = sorted({0, len(stream), *(cut for cut in cuts if cut < len(stream))})
    parts = [stream[start:end] for start, end in pairwise(edges)]
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.setblocking(False)
        reader = Reader(ours)
        found = []
        for part in parts:
            theirs.sendall(part)
            assert reader.read() is False
            while reader.has_frame:
                found.append(reader.take_frame())
            assert reader.take_frame() is None
        with pytest.raises(TimeoutError):
            reader.read_frame()
    assert found == frames
    assert reader.connected


def test_a_frame_that_does_not_end_is_waited_for_no_longer_than_its_time(
    ends: tuple[socket.socket, socket.socket],
) -> None:
    """And what has come of it is kept."""
    ours, theirs = ends
    reader = Reader(ours)
    data = written((1, 2, b"abc"))
    theirs.sendall(data[:5])
    with pytest.raises(TimeoutError):
        reader.read_frame()
    theirs.sendall(data[5:])
    assert reader.read_frame() == (1, 2, b"abc")


def test_large_frames_and_the_end(ends: tuple[socket.socket, socket.socket]) -> None:
    """A frame may be larger than a read; a closed connection is an error, and noted."""
    ours, theirs = ends
    ours.settimeout(5.0)
    reader = Reader(ours)
    frame = (3, 1, bytes(range(256)) * 2000)

    def write() -> None:
        theirs.sendall(written(frame))
        theirs.shutdown(socket.SHUT_WR)

    writer = Thread(target=write)
    writer.start()
    assert reader.read_frame() == frame
    writer.join()
    with pytest.raises(OSError, match="closed the connection"):
        reader.read_frame()
    assert not reader.connected


def test_a_frame_with_the_wrong_end_is_an_error(ends: tuple[socket.socket, socket.socket]) -> None:
    """So that nothing is read from a stream that is out of step."""
    ours, theirs = ends
    reader = Reader(ours)
    theirs.sendall(written((1, 2, b"abc"))[:-1] + b"\x00")
    with pytest.raises(UnexpectedFrame, match="0xce"):
        reader.read_frame()


@pytest.fixture
def connected() -> Iterator[tuple[_Socket, socket.socket]]:
    """A transport, as py-amqp connects it, and the other end."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        # What the other end accepts has this as well: so much is taken that nobody reads, whatever the system's limit.
        server.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 16)
        transport = _Socket(
            f"127.0.0.1:{server.getsockname()[1]}", connect_timeout=5.0, ssl=False, read_timeout=5.0, write_timeout=5.0
        )
        transport.connect()
        theirs, _ = server.accept()
        with theirs:
            assert theirs.recv(8) == b"AMQP\x00\x00\x09\x01"
            yield transport, theirs
        transport.close()


def test_a_connection_imports_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """An import that another thread is in the middle of is one that the child of a fork waits for in vain."""
    asked = []

    class Finder:
        @staticmethod
        def find_spec(name: str, path: object = None, target: object = None) -> None:
            asked.append(name)

    monkeypatch.setattr(sys, "meta_path", [Finder, *sys.meta_path])
    for url in ("amqp://localhost//", "amqp://localhost//;amqp://elsewhere//"):
        client: Any = PlainClient(url)
        client.maybe_switch_next()
        client.release()
    assert asked == []


def test_a_read_that_waits_for_nothing(connected: tuple[_Socket, socket.socket]) -> None:
    """It takes what is there, and says at once that nothing is; the socket's timeout stays what it was."""
    transport, theirs = connected
    before = transport.sock.gettimeout()
    began = monotonic()
    with pytest.raises(TimeoutError):
        transport.read_now()
    assert monotonic() - began < 1.0
    theirs.sendall(written((1, 2, b"abc")))
    assert Lookout[Any](transport.sock).ready(5.0)
    assert transport.read_now() is False
    assert transport.take_frame() == (1, 2, b"abc")
    assert transport.sock.gettimeout() == before
    theirs.close()
    assert Lookout[Any](transport.sock).ready(5.0)
    with pytest.raises(OSError, match="closed the connection"):
        transport.read_now()
    assert not transport.connected


def test_a_write_ends_in_time(connected: tuple[_Socket, socket.socket]) -> None:
    """Also where the other end takes a part and then nothing; and what it takes it takes in order."""
    transport, theirs = connected
    transport.sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 16)
    data = bytes(range(256)) * 40_000
    got: list[bytes] = []

    def read() -> None:
        while sum(map(len, got)) < len(data):
            got.append(theirs.recv(1 << 16))

    reader = Thread(target=read)
    reader.start()
    transport.write_within(data, 30.0)
    reader.join()
    assert b"".join(got) == data
    began = monotonic()
    with pytest.raises(TimeoutError):
        transport.write_within(data, 0.2)
    assert 0.1 < monotonic() - began < 3.0


def test_why_a_connection_has_ended_is_told(ends: tuple[socket.socket, socket.socket]) -> None:
    """Where it ends within a time of its own, the socket takes no other any more, which tells nobody anything."""
    ours, _ = ends
    transport = _Socket("127.0.0.1:1", connect_timeout=1.0, read_timeout=1.0, write_timeout=1.0)
    transport.sock = ours

    def end() -> None:
        with transport.having_timeout(1.0):
            ours.close()
            raise NotAllowed("the vhost is down")

    with pytest.raises(NotAllowed, match="the vhost is down"):
        end()


def test_a_time_of_its_own_is_taken_back(ends: tuple[socket.socket, socket.socket]) -> None:
    """However what is done in it ends; and what it raises of its own is raised."""
    ours, _ = ends
    transport = _Socket("127.0.0.1:1", connect_timeout=1.0, read_timeout=1.0, write_timeout=1.0)
    transport.sock = ours
    with transport.having_timeout(1.0):
        assert ours.gettimeout() == 1.0
    with pytest.raises(OSError, match="broken"), transport.having_timeout(1.0):
        raise OSError(32, "broken")
    assert ours.gettimeout() == 0.05


def test_reads_share_a_time(connected: tuple[_Socket, socket.socket]) -> None:
    """Each of them comes to something, and together they have no more time than one."""
    transport, theirs = connected

    def trickle() -> None:
        while not over.wait(0.05):
            theirs.sendall(written((1, 0, b"x")))

    over = Event()
    before = transport.sock.gettimeout()
    other = Thread(target=trickle)
    other.start()
    began = monotonic()

    def read() -> None:
        with transport.having_limits(began + 0.3, 5.0):
            while True:
                transport.read_frame()

    try:
        with pytest.raises(TimeoutError):
            read()
    finally:
        over.set()
        other.join()
    assert monotonic() - began < 2.0
    assert transport.sock.gettimeout() == before


def test_the_time_of_all_reads_is_taken_back(ends: tuple[socket.socket, socket.socket]) -> None:
    """Also where each of them had as long before, as on an encrypted connection."""
    ours, _ = ends
    transport = _Socket("127.0.0.1:1", connect_timeout=1.0, read_timeout=1.0, write_timeout=1.0)
    transport.sock = ours
    transport._quick_recv = ours.recv
    ours.settimeout(5.0)
    with pytest.raises(TimeoutError), transport.having_limits(monotonic() + 0.05, 5.0):
        transport.read()
    assert ours.gettimeout() == 5.0
