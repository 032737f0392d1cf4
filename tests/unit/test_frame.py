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
    assert frame.in_child().feed(frame.encode(value)) == [value]


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
    assert frame.in_supervisor().feed(frame.encode(value)) == [value]


def test_directions_are_not_mixed_up() -> None:
    """A frame for the other direction is refused."""
    with pytest.raises(msgspec.ValidationError, match="ready"):
        frame.in_child().feed(frame.encode(frame.Ready()))


def test_length_is_four_little_endian_bytes() -> None:
    """A frame starts with the length of what follows."""
    data = frame.encode(frame.Ready())
    assert int.from_bytes(data[:4], "little") == len(data) - 4


@given(st.lists(st.lists(st.integers(0, 2**63), max_size=20), max_size=10), st.data())
def test_frames_survive_any_fragmentation(tags: list[list[int]], data: Any) -> None:
    """However a stream is cut into reads, the same frames come out, in order."""
    stream = b"".join(frame.encode(frame.Returned(some)) for some in tags)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=20)))
    reader, found = frame.in_supervisor(), []
    for start, end in zip([0, *cuts], [*cuts, len(stream)], strict=True):
        found += reader.feed(stream[start:end])
    assert found == [frame.Returned(some) for some in tags]


def test_a_frame_comes_out_with_its_last_byte() -> None:
    """Nothing comes out of part of a frame, and nothing is left behind."""
    data = frame.encode(frame.Failed("x" * 1000))
    reader = frame.in_supervisor()
    assert [reader.feed(data[i : i + 1]) for i in range(len(data) - 1)] == [[]] * (len(data) - 1)
    assert len(reader.feed(data[-1:])) == 1
    assert reader.feed(b"") == []


def test_an_empty_frame_is_none() -> None:
    """A length of zero is refused, and is not the end."""
    with pytest.raises(msgspec.DecodeError):
        frame.in_supervisor().feed(b"\0\0\0\0")


SIZES = st.lists(st.integers(0, 1000) | st.integers(30_000, 40_000) | st.integers(100_000, 300_000), max_size=12)


def jobs_of(sizes: list[int]) -> list[Job]:
    return [Job(tag, "app:q", f"m{tag}", bytes([tag]) * size) for tag, size in enumerate(sizes, 1)]


@given(SIZES)
def test_large_jobs_go_in_several_frames(sizes: list[int]) -> None:
    """In order, at least one in each, and no more once a frame is large enough: a child runs the first ones sooner."""
    found = frame.in_child().feed(b"".join(frame.work(jobs_of(sizes))))
    parts = [work.jobs for work in found if isinstance(work, frame.Work)]
    assert [job for part in parts for job in part] == jobs_of(sizes)
    assert all(parts)
    for part in parts:
        assert sum(len(job.raw) for job in part[:-1]) < 2**17
    assert len(parts) <= 1 + sum(sizes) // 2**17


@given(SIZES, st.data())
def test_work_survives_any_fragmentation(sizes: list[int], data: Any) -> None:
    """Whether a message is in its frame or behind it, and however that is cut, the same jobs come out, in order."""
    stream = b"".join([*frame.work(jobs_of(sizes)), frame.encode(frame.Recall())])
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=20)))
    reader, found = frame.in_child(), []
    for start, end in zip([0, *cuts], [*cuts, len(stream)], strict=True):
        found += reader.feed(stream[start:end])
    assert found.pop() == frame.Recall()
    assert [job for work in found for job in work.jobs] == jobs_of(sizes)  # type: ignore[union-attr]


def test_a_large_message_is_not_copied() -> None:
    """What is written is the message itself, behind a frame that is small; the job keeps it."""
    job = Job(1, "app:q", "m1", bytes(2**16))
    header, message = frame.work([job])
    assert message is job.raw
    assert len(header) < 100
