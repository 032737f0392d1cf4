"""Publishing from event loops, with a commit that is a function."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from threading import Event, Lock, Thread, current_thread
from time import monotonic

import pytest

from kq import commit_threads, errors, group_commit
from kq.async_commit import AsyncCommit
from kq.backend import Publication, QueueSpec
from kq.envelope import Envelope
from kq.group_commit import MAX_GROUP, GroupCommit
from kq.loop_commit import no_sender

QUEUE = QueueSpec("app:a")
Results = list[errors.Error | None]


def batch(*ids: str) -> list[Publication]:
    """Publications with these ids."""
    return [Publication(QUEUE, Envelope(id, {}, {}, b"1")) for id in ids]


class Broker:
    """Notes what is committed; holds up a group whose first message is ``slow`` until `go_on` is set."""

    def __init__(self) -> None:
        self.groups: list[list[str]] = []
        self.threads: list[Thread] = []
        self.began, self.go_on = Event(), Event()

    def commit(self, group: Sequence[Publication], timeout: float) -> Results:
        """Commit a group, each message with its id as its error if it is bad."""
        ids = [publication.envelope.id for publication in group]
        self.groups.append(ids)
        self.threads.append(current_thread())
        if ids[0] == "slow":
            self.began.set()
            assert self.go_on.wait(30)
        return [errors.Internal(id) if "bad" in id else None for id in ids]


@contextmanager
def committing(broker: Broker, width: int = 1) -> Iterator[AsyncCommit]:
    """An `AsyncCommit` that is closed at the end, whose broker has been found as it should be."""
    group = GroupCommit(broker.commit, lambda: width)
    assert group.publish(batch("first"), 5.0) == [None]
    commit = AsyncCommit(group, no_sender)
    try:
        yield commit
    finally:
        broker.go_on.set()
        commit.close(20)


def test_what_comes_meanwhile_goes_out_together() -> None:
    """While one task's message is under way those of the others become one group; each task has its own results."""
    broker = Broker()

    async def publish(commit: AsyncCommit) -> list[Results]:
        slow = asyncio.create_task(commit.publish(batch("slow"), 30.0))
        await asyncio.to_thread(broker.began.wait, 30)
        rest = [asyncio.create_task(commit.publish(batch(f"{n}", f"{n}-bad"), 30.0)) for n in range(100)]
        await asyncio.sleep(0)
        broker.go_on.set()
        assert await slow == [None]
        return await asyncio.gather(*rest)

    with committing(broker) as commit:
        results = asyncio.run(publish(commit))
    assert broker.groups[1:] == [["slow"], [id for n in range(100) for id in (f"{n}", f"{n}-bad")]]
    assert [[error and error.message for error in result] for result in results] == [
        [None, f"{n}-bad"] for n in range(100)
    ]


def test_a_group_has_a_limit() -> None:
    """Many tasks' messages go out in several groups, none of them beyond the limit of all."""
    broker = Broker()

    async def publish(commit: AsyncCommit) -> None:
        slow = asyncio.create_task(commit.publish(batch("slow"), 30.0))
        await asyncio.to_thread(broker.began.wait, 30)
        rest = [asyncio.create_task(commit.publish(batch(f"{n}"), 30.0)) for n in range(MAX_GROUP + 10)]
        await asyncio.sleep(0)
        broker.go_on.set()
        assert await asyncio.gather(slow, *rest) == [[None]] * (MAX_GROUP + 11)

    with committing(broker) as commit:
        asyncio.run(publish(commit))
    assert [len(group) for group in broker.groups] == [1, 1, MAX_GROUP, 10]


def test_several_loops_publish_together() -> None:
    """Tasks of several loops in several threads get their own results; everything is committed once, in order."""
    broker = Broker()

    async def publish(commit: AsyncCommit, number: int) -> bool:
        async def one(n: int) -> bool:
            ids = [f"{number}-{n}-ok", f"{number}-{n}-bad"]
            results = await commit.publish(batch(*ids), 30.0)
            return [error and error.message for error in results] == [None, ids[1]]

        return all(await asyncio.gather(*(one(n) for n in range(100))))

    with committing(broker) as commit, ThreadPoolExecutor(4) as threads:
        assert all(threads.map(lambda number: asyncio.run(publish(commit, number)), range(4)))
    committed = [id for group in broker.groups[1:] for id in group]
    assert len(committed) == len(set(committed)) == 800
    for number in range(4):
        mine = [id for id in committed if id.startswith(f"{number}-")]
        assert mine == [f"{number}-{n}-{end}" for n in range(100) for end in ("ok", "bad")]


def test_who_is_canceled_beforehand_publishes_nothing() -> None:
    """A task that is cancelled while another one's message is under way takes its own along."""
    broker = Broker()

    async def publish(commit: AsyncCommit) -> None:
        slow = asyncio.create_task(commit.publish(batch("slow"), 30.0))
        await asyncio.to_thread(broker.began.wait, 30)
        canceled = asyncio.create_task(commit.publish(batch("canceled"), 30.0))
        kept = asyncio.create_task(commit.publish(batch("kept"), 30.0))
        await asyncio.sleep(0)
        canceled.cancel()
        with pytest.raises(asyncio.CancelledError):
            await canceled
        broker.go_on.set()
        assert [await slow, await kept] == [[None], [None]]

    with committing(broker) as commit:
        asyncio.run(publish(commit))
    assert broker.groups == [["first"], ["slow"], ["kept"]]


def test_who_waits_too_long_is_late() -> None:
    """A task has its answer within its own time; what nobody has begun with by then is not sent later."""
    broker = Broker()

    async def publish(commit: AsyncCommit) -> list[errors.Error | None]:
        slow = asyncio.create_task(commit.publish(batch("slow"), 0.05))
        await asyncio.to_thread(broker.began.wait, 30)
        late = await commit.publish(batch("b", "c"), 0.05)
        found = [*await slow, *late]
        broker.go_on.set()
        assert await commit.publish(batch("d"), 30.0) == [None]
        return found

    with committing(broker) as commit:
        found = asyncio.run(publish(commit))
    assert [(error.kind, error.retryable, error.details) for error in found if error] == [
        ("INTERNAL", True, {"reason": "timeout"})
    ] * 3
    first, *rest = (error.message for error in found if error)
    assert first == "the broker did not confirm in time; the message may arrive"
    assert rest == ["what was published before has taken all the time; it was not sent"] * 2
    assert broker.groups == [["first"], ["slow"], ["d"]]


def test_a_loop_that_was_held_up_sends_nothing_late() -> None:
    """A message whose time is over before anybody could begin with it is not sent, and its task is told just that."""
    broker = Broker()

    async def publish(commit: AsyncCommit) -> list[errors.Error | None]:
        slow = asyncio.create_task(commit.publish(batch("slow"), 30.0))
        await asyncio.to_thread(broker.began.wait, 30)
        hasty = asyncio.create_task(commit.publish(batch("hasty"), 0.05))
        await asyncio.sleep(0)
        # From here on the loop stands still, so no timer tells anybody anything.
        until = monotonic() + 0.05
        while monotonic() <= until:
            pass
        broker.go_on.set()
        # Ends when the thread has seen all that was handed in.
        commit.close(20)
        assert await slow == [None]
        return await hasty

    with committing(broker) as commit:
        (error,) = asyncio.run(publish(commit))
    assert error is not None
    assert error.message == "what was published before has taken all the time; it was not sent"
    assert broker.groups == [["first"], ["slow"]]


def test_what_goes_wrong_reaches_every_task() -> None:
    """An exception that is not ours reaches all whose messages were in the group, and the next ones are published."""
    failures = [ZeroDivisionError("no")]

    def commit(group: Sequence[Publication], timeout: float) -> Results:
        if failures:
            raise failures.pop()
        return [None] * len(group)

    async def publish(commit: AsyncCommit) -> None:
        with pytest.raises(ZeroDivisionError):
            await commit.publish(batch("a"), 5.0)
        assert await commit.publish(batch("b"), 5.0) == [None]

    committing = AsyncCommit(GroupCommit(commit), no_sender)
    asyncio.run(publish(committing))
    committing.close(20)


def test_closing_publishes_what_was_handed_in() -> None:
    """What has been handed in is published before closing ends, also where its loop is gone; later it goes on."""
    broker = Broker()

    async def leave(commit: AsyncCommit) -> None:
        loop = asyncio.get_running_loop()
        tasks = [asyncio.create_task(commit.publish(batch(id), 30.0)) for id in ("slow", "a", "b")]
        await asyncio.to_thread(broker.began.wait, 30)
        closing = loop.run_in_executor(None, commit.close, 20.0)
        broker.go_on.set()
        await closing
        assert await asyncio.gather(*tasks) == [[None]] * 3
        assert await commit.publish(batch("c"), 30.0) == [None]

    with committing(broker) as commit:
        asyncio.run(leave(commit))
        commit.close(20)
        commit.close(20)
    assert [id for group in broker.groups for id in group] == ["first", "slow", "a", "b", "c"]
    assert not any(thread.is_alive() for thread in broker.threads if thread.name == "kq-publish")


def test_a_loop_that_has_ended_is_no_harm() -> None:
    """A loop that is closed while its message is under way hears nothing of it, and others go on."""
    broker = Broker()

    async def leave(commit: AsyncCommit) -> None:
        task = asyncio.create_task(commit.publish(batch("slow"), 30.0))
        await asyncio.to_thread(broker.began.wait, 30)
        assert not task.done()

    with committing(broker) as commit:
        asyncio.run(leave(commit))
        broker.go_on.set()
        assert asyncio.run(commit.publish(batch("next"), 30.0)) == [None]
    assert broker.groups == [["first"], ["slow"], ["next"]]


def test_a_quiet_thread_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """The thread ends when nobody has published for a while, and the next task starts another one."""
    monkeypatch.setattr(commit_threads, "_QUIET", 0.01)
    broker = Broker()
    with committing(broker) as commit:
        for n in range(3):
            assert asyncio.run(commit.publish(batch(f"{n}"), 30.0)) == [None]
            broker.threads[-1].join(30)
            assert not broker.threads[-1].is_alive()
    assert len(set(broker.threads)) == 4


def test_a_thread_that_ends_misses_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    """However close together the end of a quiet thread and the next message are, the message is published."""
    monkeypatch.setattr(commit_threads, "_QUIET", 0.0)
    broker = Broker()

    async def publish(commit: AsyncCommit) -> None:
        for n in range(500):
            assert await commit.publish(batch(f"{n}"), 30.0) == [None]

    with committing(broker) as commit:
        asyncio.run(publish(commit))


def test_without_room_for_a_thread_it_is_unavailable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where no thread can be started the task is told so at once; the next one may find room."""

    def no_room(thread: Thread) -> None:
        raise RuntimeError("can't start new thread")

    broker = Broker()
    with committing(broker) as commit:
        with monkeypatch.context() as patched:
            patched.setattr(Thread, "start", no_room)
            with pytest.raises(errors.Internal, match="no thread to publish with") as caught:
                asyncio.run(commit.publish(batch("a"), 5.0))
        assert caught.value.details["reason"] == "unavailable"
        assert asyncio.run(commit.publish(batch("b"), 5.0)) == [None]
    assert broker.groups == [["first"], ["b"]]


def test_threads_and_loops_share_commits() -> None:
    """One commit at a time, whether a thread or a task has asked for it."""
    lock = Lock()
    committed: list[str] = []

    def commit(group: Sequence[Publication], timeout: float) -> Results:
        assert lock.acquire(blocking=False), "two commits at once"
        committed.extend(publication.envelope.id for publication in group)
        lock.release()
        return [None] * len(group)

    group = GroupCommit(commit)
    tasks = AsyncCommit(group, no_sender)

    async def publish() -> None:
        await asyncio.gather(*(tasks.publish(batch(f"task-{n}"), 30.0) for n in range(300)))

    with ThreadPoolExecutor(4) as threads:
        done = [threads.submit(group.publish, batch(f"thread-{n}"), 30.0) for n in range(300)]
        asyncio.run(publish())
        assert all(future.result() == [None] for future in done)
    tasks.close(20)
    assert len(committed) == len(set(committed)) == 600


def test_time_is_the_tasks_own() -> None:
    """A task with more time does not have another one wait for it: each is told when its own is over."""
    broker = Broker()

    async def publish(commit: AsyncCommit) -> float:
        slow = asyncio.create_task(commit.publish(batch("slow"), 30.0))
        await asyncio.to_thread(broker.began.wait, 30)
        began = monotonic()
        patient = asyncio.create_task(commit.publish(batch("patient"), 30.0))
        (error,) = await commit.publish(batch("hasty"), 0.05)
        assert error is not None
        took = monotonic() - began
        broker.go_on.set()
        assert [await slow, await patient] == [[None], [None]]
        return took

    with committing(broker) as commit:
        assert 0.05 <= asyncio.run(publish(commit)) < 15
    assert broker.groups == [["first"], ["slow"], ["patient"]]


def test_a_slow_group_holds_no_other_task_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the broker can do several things at once, another thread publishes what comes behind a group that is late.

    It ends with the first group that is not, and leaves the rest to one.
    """
    monkeypatch.setattr(group_commit, "_LONG", 1e-9)
    broker = Broker()

    async def publish(commit: AsyncCommit) -> None:
        slow = asyncio.create_task(commit.publish(batch("slow"), 30.0))
        await asyncio.to_thread(broker.began.wait, 30)
        for n in range(3):
            assert await commit.publish(batch(f"{n}"), 30.0) == [None]
        assert not slow.done()
        assert len(commit._threads) == 2
        broker.go_on.set()
        assert await slow == [None]
        monkeypatch.setattr(group_commit, "_LONG", 60.0)
        while len(commit._threads) > 1:
            assert await commit.publish(batch("quick"), 30.0) == [None]
        assert await commit.publish(batch("last"), 30.0) == [None]

    with committing(broker, 2) as commit:
        asyncio.run(publish(commit))


def test_a_long_group_brings_a_thread_for_those_behind_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """What has waited for a group that took long is reason enough for another thread, without anything new."""
    monkeypatch.setattr(group_commit, "_LONG", 60.0)
    broker = Broker()

    async def publish(commit: AsyncCommit) -> None:
        slow = asyncio.create_task(commit.publish(batch("slow"), 30.0))
        await asyncio.to_thread(broker.began.wait, 30)
        behind = asyncio.create_task(commit.publish(batch("slow too"), 30.0))
        await asyncio.sleep(0)
        assert len(commit._threads) == 1
        monkeypatch.setattr(group_commit, "_LONG", 1e-9)
        monkeypatch.setattr(group_commit, "_LONG_EACH", 0.0)
        broker.go_on.set()
        assert list(await asyncio.gather(slow, behind)) == [[None], [None]]
        assert len(commit._threads) == 2

    with committing(broker, 2) as commit:
        asyncio.run(publish(commit))
    assert len(commit._threads) == 0
