"""Both kinds of queue: jobs that somebody puts there, and jobs that threads read from a wire themselves."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from threading import Barrier, Event, Lock, Thread
from typing import NoReturn

import pytest

from kq.executor import Job
from kq.worker.job_queue import JobQueue
from kq.worker.wire_queue import CAN_SHARE, WireQueue

CONCURRENCY = 4
PATIENCE = 30.0
KINDS = ["put", pytest.param("wire", marks=pytest.mark.skipif(not CAN_SHARE, reason="this system cannot share a wire"))]


def jobs(*tags: int, settled: bool = False) -> list[Job]:
    """Jobs with these tags."""
    return [Job(tag, "app:a", str(tag), b"", settled=settled) for tag in tags]


class Socket:
    """A wire on which each byte is a job's tag."""

    def __init__(self) -> None:
        self.ours, self.theirs = socket.socketpair()
        self.queue: WireQueue | None = None
        self.heard: set[int] = set()
        self.has_heard = Event()

    def fileno(self) -> int:
        return self.theirs.fileno()

    def read(self) -> bool:
        data = self.theirs.recv(65536)
        assert self.queue is not None
        if 0 in data:
            # What is no job, such as a word to the process.
            self.has_heard.set()
        self.queue.put(jobs(*filter(None, data)))
        return bool(data)

    def fail(self) -> NoReturn:
        raise AssertionError("the wire cannot be waited for")


class Rig:
    """A queue with threads that do ``work`` with each job."""

    def __init__(self, kind: str, work: Callable[[Job], None], concurrency: int = CONCURRENCY) -> None:
        self.work = work
        self.lock = Lock()
        self.threads: list[Thread] = []
        self.running: set[int] = set()
        self.most = 0
        self.done: list[int] = []
        self.count = 0
        self.awaited = 0
        self.waits = 0
        self.reached = Event()
        self.wire = Socket() if kind == "wire" else None
        self.queue: JobQueue
        if self.wire is None:
            self.queue = JobQueue(concurrency, self.start, self.before_wait)
        else:
            self.queue = self.wire.queue = WireQueue(concurrency, self.start, self.before_wait, self.wire)
            self.wire.queue.open()

    def before_wait(self) -> None:
        with self.lock:
            self.waits += 1

    def start(self) -> None:
        thread = Thread(target=self.run, daemon=True)
        self.threads.append(thread)
        thread.start()

    def run(self) -> None:
        slot = None
        while (turn := self.queue.take(slot)) is not None:
            job, slot = turn
            with self.lock:
                assert slot not in self.running
                self.running.add(slot)
                self.most = max(self.most, len(self.running))
            self.work(job)
            with self.lock:
                self.running.remove(slot)
                self.done.append(job.tag)
                if len(self.done) >= self.awaited:
                    self.reached.set()

    def give(self, tags: Sequence[int]) -> None:
        """Have jobs arrive together."""
        if self.wire is None:
            self.queue.put(jobs(*tags))
        else:
            self.wire.ours.sendall(bytes(tags))

    def give_and_wait(self, tags: Sequence[int]) -> None:
        """Have jobs arrive together, and wait until they are done."""
        with self.lock:
            self.count += len(tags)
            self.awaited = self.count
            self.reached.clear()
        self.give(tags)
        assert self.reached.wait(PATIENCE), f"{len(self.done)} of {self.awaited} are done"


@contextmanager
def rig(kind: str, work: Callable[[Job], None], concurrency: int = CONCURRENCY) -> Iterator[Rig]:
    """A rig whose threads have all ended afterwards."""
    it = Rig(kind, work, concurrency)
    try:
        yield it
    finally:
        it.queue.close()
        for thread in it.threads:
            thread.join(PATIENCE)
        if it.wire is not None:
            it.wire.ours.close()
            it.wire.theirs.close()
    assert not any(thread.is_alive() for thread in it.threads)


@pytest.mark.parametrize("kind", KINDS)
def test_every_job_runs_once_and_never_too_many(kind: str) -> None:
    """However many arrive together, each gets a slot to itself, and no more run than may."""
    sizes = [1, 2, 3, CONCURRENCY, 100, 1, 255] * 30
    with rig(kind, lambda job: None) as it:
        for size in sizes:
            it.give_and_wait(range(1, size + 1))
        assert it.most <= CONCURRENCY
        assert sorted(it.done) == sorted(tag for size in sizes for tag in range(1, size + 1))


@pytest.mark.parametrize("kind", KINDS)
def test_as_many_run_as_may(kind: str) -> None:
    """Jobs that wait for each other find threads, each time: nobody sleeps through what waits."""
    together = Barrier(CONCURRENCY)

    def meet(job: Job) -> None:
        together.wait(PATIENCE)

    with rig(kind, meet) as it:
        for n in range(500):
            # All at once, and one after the other.
            if n % 2:
                it.give_and_wait(range(1, CONCURRENCY + 1))
            else:
                it.count += CONCURRENCY - 1
                for tag in range(1, CONCURRENCY):
                    it.give([tag])
                it.give_and_wait([CONCURRENCY])
        assert it.most == CONCURRENCY


@pytest.mark.parametrize("kind", KINDS)
def test_no_more_threads_than_are_needed(kind: str) -> None:
    """One job at a time needs one thread, and on a wire another one that could read; that one is not woken up."""
    with rig(kind, lambda job: None) as it:
        for _ in range(100):
            it.give_and_wait([1])
        # A job may come before the thread that was there for the one before it has come back.
        assert len(it.threads) <= 3
        assert it.waits <= 100 + 10


@pytest.mark.parametrize("kind", KINDS)
def test_one_at_a_time_run_in_the_order_of_their_arrival(kind: str) -> None:
    """Whoever reads them."""
    with rig(kind, lambda job: None, concurrency=1) as it:
        it.count = 250 - 1
        for tag in range(1, 250):
            it.give([tag])
        it.give_and_wait([250])
        assert it.done == list(range(1, 251))


@pytest.mark.parametrize("kind", KINDS)
def test_what_waits_can_be_recalled_but_for_what_was_settled(kind: str) -> None:
    """What runs goes on; what was settled before runs later."""
    gate, begun = Event(), Barrier(CONCURRENCY + 1)

    def work(job: Job) -> None:
        if job.tag <= CONCURRENCY:
            begun.wait(PATIENCE)
            gate.wait(PATIENCE)

    with rig(kind, work) as it:
        it.give(range(1, CONCURRENCY + 1))
        begun.wait(PATIENCE)
        it.queue.put([*jobs(101, 102), *jobs(103, settled=True), *jobs(104)])
        assert [job.tag for job in it.queue.recall()] == [101, 102, 104]
        # Those that run, and the one that was not recalled.
        it.count = CONCURRENCY + 1
        gate.set()
        it.give_and_wait([105])
        assert sorted(it.done) == [*range(1, CONCURRENCY + 1), 103, 105]


@pytest.mark.skipif(not CAN_SHARE, reason="this system cannot share a wire")
def test_the_wire_is_read_while_all_threads_run_something() -> None:
    """Somebody can always be told, for instance to give back what waits."""
    gate, begun = Event(), Barrier(CONCURRENCY + 1)

    def work(job: Job) -> None:
        begun.wait(PATIENCE)
        gate.wait(PATIENCE)

    with rig("wire", work) as it:
        assert it.wire is not None
        it.give(range(1, CONCURRENCY + 1))
        begun.wait(PATIENCE)
        it.give([0])
        assert it.wire.has_heard.wait(PATIENCE)
        gate.set()


def test_without_room_for_more_threads_those_there_are_will_do() -> None:
    """With none at all it is an error."""
    room = 0
    done = Event()

    def start() -> None:
        if len(threads) >= room:
            raise RuntimeError("can't start new thread")
        threads.append(Thread(target=run, daemon=True))
        threads[-1].start()

    def run() -> None:
        slot = None
        while (turn := queue.take(slot)) is not None:
            job, slot = turn
            if job.tag == 9:
                done.set()

    threads: list[Thread] = []
    queue = JobQueue(CONCURRENCY, start, lambda: None)
    with pytest.raises(RuntimeError):
        queue.put(jobs(1))
    room = 1
    queue.put(jobs(*range(2, 10)))
    assert done.wait(PATIENCE)
    queue.close()
    threads[0].join(PATIENCE)
    assert not threads[0].is_alive()
