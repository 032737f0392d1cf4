"""Frames between the supervisor and a child: four bytes of length, then msgpack.

Many small things go in one frame: a system call costs more than a message. A large message is in no frame but follows
one, as it is: to copy it costs more than a system call.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from struct import Struct
from typing import Any, Generic, TypeVar

import msgspec

from kq.executor import Job
from kq.outcome import Outcome

_LENGTH = Struct("<I")
#: Bytes that one read asks for.
READ_SIZE = 1 << 18
#: Bytes of messages after which a frame takes no more jobs: the first ones run while the others are on their way.
_WORK_SIZE = 1 << 17
#: Bytes of a message from which on it follows its frame.
_APART = 1 << 15


class Hello(msgspec.Struct, tag="hello"):
    """The first frame to a child: what to load and how to run it.

    Attributes:
        app: ``module:attribute``; empty for the app that the configuration file describes.
        overrides: Settings that the command line changed, by name.
        queues: The queues this worker consumes.
        concurrency: Handlers at once.
        log_level: As in `logging`.
        log_format: ``text`` or ``json``.
        fingerprint: What `App.fingerprint` says of the worker's app.
    """

    app: str
    overrides: dict[str, Any]
    queues: list[str]
    concurrency: int
    log_level: str
    log_format: str
    fingerprint: str = ""


class Work(msgspec.Struct, tag="work"):
    """Jobs for a child.

    Attributes:
        jobs: The jobs.
        apart: Those of them whose messages follow the frame: where in the list they stand, and how many bytes it is.
    """

    jobs: list[Job]
    apart: list[tuple[int, int]] = []


class Recall(msgspec.Struct, tag="recall"):
    """Asks a child to give back what it has not started, and to end if ``final`` once all is done."""

    final: bool = False


class Dump(msgspec.Struct, tag="dump"):
    """Asks a child to log what runs where."""


class Ready(msgspec.Struct, tag="ready"):
    """A child has loaded the app.

    Attributes:
        is_other: Whether its configuration, or its kq, is not the worker's.
    """

    is_other: bool = False


class Exhausted(msgspec.Struct, tag="exhausted"):
    """A child whose handler ran out of memory, and which should be replaced."""


class Failed(msgspec.Struct, tag="failed"):
    """A child could not load the app."""

    why: str


class Results(msgspec.Struct, tag="results"):
    """What became of jobs.

    Attributes:
        done: The tags of those that are simply done.
        others: The other tags and their outcomes; None where the handler settled the message before.
        early: Whether the handlers have settled their messages themselves and run on.
    """

    done: list[int]
    others: list[tuple[int, Outcome | None]]
    early: bool = False


class Returned(msgspec.Struct, tag="returned"):
    """Jobs that a child gives back unstarted."""

    tags: list[int]


ToChild = Hello | Work | Recall | Dump
FromChild = Ready | Exhausted | Failed | Results | Returned
_Frame = TypeVar("_Frame")

_encoder = msgspec.msgpack.Encoder()
_to_child = msgspec.msgpack.Decoder(ToChild)
_from_child = msgspec.msgpack.Decoder(FromChild)


def encode(frame: ToChild | FromChild) -> bytes:
    """Return a frame as bytes, its length included."""
    body = _encoder.encode(frame)
    return _LENGTH.pack(len(body)) + body


def work(jobs: Sequence[Job]) -> Iterator[bytes]:
    """Return jobs as what is to be written one after the other: frames, and the messages that follow them."""
    for part in _parts(jobs):
        apart = [(index, len(job.raw)) for index, job in enumerate(part) if len(job.raw) >= _APART]
        if not apart:
            yield encode(Work(part))
            continue
        messages = [part[index].raw for index, _ in apart]
        for index, _ in apart:
            part[index] = msgspec.structs.replace(part[index], raw=b"")
        yield encode(Work(part, apart))
        yield from messages


def _parts(jobs: Sequence[Job]) -> list[list[Job]]:
    """Return jobs in as many parts as there are to be frames."""
    found: list[list[Job]] = []
    size = _WORK_SIZE
    for job in jobs:
        if size >= _WORK_SIZE:
            found.append([])
            size = 0
        found[-1].append(job)
        size += len(job.raw)
    return found


class Reader(Generic[_Frame]):
    """Cuts a stream of bytes into frames. Use `in_child` and `in_supervisor`."""

    def __init__(self, decoder: msgspec.msgpack.Decoder[_Frame]) -> None:
        self._decode = decoder.decode
        self._buffer = bytearray()
        #: Jobs of which messages are still to come, what of the first of these is here, and how much of it is missing.
        self._work: Work | None = None
        self._pieces: list[bytes] = []
        self._missing = 0

    def feed(self, data: bytes) -> list[_Frame]:
        """Add what was read and return the frames that are complete.

        Raises:
            msgspec.MsgspecError: If it is none. There is nothing more to be read then.
        """
        frames: list[_Frame] = []
        at = self._follow(data, 0, frames)
        buffer = self._buffer
        buffer += data[at:]
        start, end = 0, len(buffer)
        with memoryview(buffer) as view:
            while end - start >= 4:
                (length,) = _LENGTH.unpack_from(view, start)
                if end - start - 4 < length:
                    break
                with view[start + 4 : start + 4 + length] as body:
                    frame = self._decode(body)
                start += 4 + length
                if isinstance(frame, Work) and frame.apart:
                    self._work, self._missing = frame, frame.apart[0][1]
                    start = self._follow(view, start, frames)
                else:
                    frames.append(frame)
        if start:
            del buffer[:start]
        return frames

    def _follow(self, data: bytes | memoryview, at: int, frames: list[Any]) -> int:
        """Take from ``data`` what follows a frame, and return up to where that is."""
        while self._work is not None:
            piece = bytes(data[at : at + self._missing])
            self._pieces.append(piece)
            at += len(piece)
            self._missing -= len(piece)
            if self._missing:
                break
            index, _ = self._work.apart.pop(0)
            self._work.jobs[index].raw = b"".join(self._pieces)
            self._pieces = []
            if self._work.apart:
                self._missing = self._work.apart[0][1]
            else:
                frames.append(self._work)
                self._work = None
        return at


def in_child() -> Reader[ToChild]:
    """Return a reader of what the supervisor sends."""
    return Reader(_to_child)


def in_supervisor() -> Reader[FromChild]:
    """Return a reader of what a child sends."""
    return Reader(_from_child)
