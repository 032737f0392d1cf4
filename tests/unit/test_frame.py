from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kq.executor import Job
from kq.outcome import DONE, Failure, Outcome
from kq.worker import frame

DEAD = Outcome("dead", 0.0, 5, 3, "crash_loop", Failure("INTERNAL", "no", True, "t"))


@pytest.mark.parametrize(
    "value",
    [
        frame.Hello(
            "shop:app", {"broker": "redis://h", "lease": 3.0, "create_queues": False}, ["app:a"], 8, "INFO", "text"
        ),
        frame.Work([]),
        frame.Work([Job(1, "app:a", "m-1", b"\x00\xff", 2, 1, True), Job(2, "app:a", "m-2", b"")]),
        frame.Recall(),
        frame.Recall(final=True),
        frame.Dump(),
    ],
)
def test_frames_to_a_child(value: frame.ToChild) -> None:
    """What the supervisor sends arrives as it was."""
    (body,) = frame.Reader().feed(frame.encode(value))
    assert frame.to_child.decode(body) == value


@pytest.mark.parametrize(
    "value",
    [
        frame.Ready(),
        frame.Failed("no app"),
        frame.Results([1, 2], [(3, DEAD), (4, None), (2**63, DONE)]),
        frame.Results([], [(1, None)], early=True),
        frame.Returned([1, 2, 3]),
    ],
)
def test_frames_from_a_child(value: frame.FromChild) -> None:
    """What a child sends arrives as it was."""
    (body,) = frame.Reader().feed(frame.encode(value))
    assert frame.from_child.decode(body) == value


def test_directions_are_not_mixed_up() -> None:
    """A frame for the other direction is refused."""
    (body,) = frame.Reader().feed(frame.encode(frame.Ready()))
    with pytest.raises(msgspec.ValidationError, match="ready"):
        frame.to_child.decode(body)


def test_length_is_four_little_endian_bytes() -> None:
    """A frame starts with the length of what follows."""
    data = frame.encode(frame.Ready())
    assert int.from_bytes(data[:4], "little") == len(data) - 4


@given(st.lists(st.lists(st.integers(0, 2**63), max_size=20), max_size=10), st.data())
def test_frames_survive_any_fragmentation(tags: list[list[int]], data: Any) -> None:
    """However a stream is cut into reads, the same frames come out, in order."""
    stream = b"".join(frame.encode(frame.Returned(some)) for some in tags)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=20)))
    reader, found = frame.Reader(), []
    for start, end in zip([0, *cuts], [*cuts, len(stream)], strict=True):
        found += reader.feed(stream[start:end])
    assert [frame.from_child.decode(body) for body in found] == [frame.Returned(some) for some in tags]


def test_a_frame_comes_out_with_its_last_byte() -> None:
    """Nothing comes out of part of a frame, and nothing is left behind."""
    data = frame.encode(frame.Failed("x" * 1000))
    reader = frame.Reader()
    assert [reader.feed(data[i : i + 1]) for i in range(len(data) - 1)] == [[]] * (len(data) - 1)
    assert len(reader.feed(data[-1:])) == 1
    assert reader.feed(b"") == []


def test_empty_frames_are_frames() -> None:
    """A length of zero is an empty frame, not the end."""
    assert frame.Reader().feed(b"\0\0\0\0" * 2) == [b"", b""]


@given(st.lists(st.integers(0, 300_000), max_size=12))
def test_large_jobs_go_in_several_frames(sizes: list[int]) -> None:
    """In order, at least one in each, and no more once a frame is large enough: a child runs the first ones sooner."""
    jobs = [Job(tag, "app:q", f"m{tag}", bytes(size)) for tag, size in enumerate(sizes, 1)]
    parts = frame.parts(jobs)
    assert [job for part in parts for job in part] == jobs
    assert all(parts)
    for part in parts:
        assert sum(len(job.raw) for job in part[:-1]) < 2**17
    assert len(parts) <= 1 + sum(sizes) // 2**17
