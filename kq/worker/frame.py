"""Frames between the supervisor and a child: four bytes of length, then msgpack.

Many small things go in one frame: a system call costs more than a message.
"""

from __future__ import annotations

from collections.abc import Sequence
from struct import Struct
from typing import Any

import msgspec

from kq.executor import Job
from kq.outcome import Outcome

_LENGTH = Struct("<I")
#: Bytes that one read asks for.
READ_SIZE = 1 << 18
#: Bytes of messages after which a frame takes no more jobs: the first ones run while the others are on their way.
_WORK_SIZE = 1 << 17


class Hello(msgspec.Struct, tag="hello"):
    """The first frame to a child: what to load and how to run it.

    Attributes:
        app: ``module:attribute``; empty for the app that the configuration file describes.
        overrides: Settings that the command line changed, by name.
        queues: The queues this worker consumes.
        concurrency: Handlers at once.
        log_level: As in `logging`.
        log_format: ``text`` or ``json``.
    """

    app: str
    overrides: dict[str, Any]
    queues: list[str]
    concurrency: int
    log_level: str
    log_format: str


class Work(msgspec.Struct, tag="work"):
    """Jobs for a child."""

    jobs: list[Job]


class Recall(msgspec.Struct, tag="recall"):
    """Asks a child to give back what it has not started, and to end if ``final`` once all is done."""

    final: bool = False


class Dump(msgspec.Struct, tag="dump"):
    """Asks a child to log what runs where."""


class Ready(msgspec.Struct, tag="ready"):
    """A child has loaded the app."""


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

_encoder = msgspec.msgpack.Encoder()
to_child = msgspec.msgpack.Decoder(ToChild)
from_child = msgspec.msgpack.Decoder(FromChild)


def encode(frame: ToChild | FromChild) -> bytes:
    """Return a frame as bytes, its length included."""
    body = _encoder.encode(frame)
    return _LENGTH.pack(len(body)) + body


def parts(jobs: Sequence[Job]) -> list[list[Job]]:
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


class Reader:
    """Cuts a stream of bytes into frames."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> list[bytes]:
        """Add what was read and return the frames that are complete."""
        buffer = self._buffer
        buffer += data
        frames, start, end = [], 0, len(buffer)
        while end - start >= 4:
            (length,) = _LENGTH.unpack_from(buffer, start)
            if end - start - 4 < length:
                break
            with memoryview(buffer) as view:
                frames.append(bytes(view[start + 4 : start + 4 + length]))
            start += 4 + length
        if start:
            del buffer[:start]
        return frames
