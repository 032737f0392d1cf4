from __future__ import annotations

import socket
from collections.abc import Iterator
from itertools import pairwise
from struct import pack
from threading import Thread

import pytest
from amqp.exceptions import UnexpectedFrame
from hypothesis import given
from hypothesis import strategies as st

from kq.backends.rabbitmq_socket import Frame, ReadsInTime

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
