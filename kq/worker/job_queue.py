"""Jobs that wait for a thread, and threads that wait for jobs. Threads are started as they are needed."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from queue import SimpleQueue
from threading import Lock

from kq.executor import Job


class JobQueue:
    """Jobs in the order of their arrival. Thread-safe.

    Args:
        concurrency: Jobs that run at once.
        start: Starts a thread that calls `take` until there is nothing more; raises ``RuntimeError`` if it cannot.
        before_wait: Called by a thread before it waits.
    """

    #: Threads beyond those that run something.
    _spare = 0

    def __init__(self, concurrency: int, start: Callable[[], None], before_wait: Callable[[], None]) -> None:
        self._start = start
        self._before_wait = before_wait
        self._concurrency = concurrency
        self._jobs: deque[Job] = deque()
        #: Slots in which nothing runs.
        self._free = list(reversed(range(concurrency)))
        self._lock = Lock()
        #: Threads that there are, that wait, and for how many of these somebody has rung.
        self._threads = self._waiting = self._rung = 0
        self._closed = False
        self._bell: SimpleQueue[None] = SimpleQueue()

    @property
    def is_empty(self) -> bool:
        """Whether no job waits."""
        return not self._jobs

    def put(self, jobs: Sequence[Job]) -> None:
        """Have jobs wait for a thread; never blocks.

        Raises:
            RuntimeError: If there is no thread at all, and none can be started.
        """
        with self._lock:
            self._jobs.extend(jobs)
            rings, starts = self._summon()
        if rings:
            self._ring(rings)
        for started in range(starts):
            try:
                self._start()
            except RuntimeError:
                # No room for another thread. Those there are will do; without any, nothing can run here.
                with self._lock:
                    self._threads -= starts - started
                    if self._threads:
                        return
                raise

    def take(self, slot: int | None) -> tuple[Job, int] | None:
        """Wait for a job and return it; None where none will come.

        Args:
            slot: Where the thread's last job ran, which has ended by now.

        Returns:
            The job, and the slot in which it runs until its thread comes for the next one: a number from 0 that no
            other one has meanwhile.
        """
        with self._lock:
            if slot is not None:
                self._free.append(slot)
            while not (self._jobs and self._free):
                if self._closed:
                    self._threads -= 1
                    return None
                self._waiting += 1
                self._lock.release()
                rings_heard = 0
                try:
                    self._before_wait()
                    rings_heard = self._wait()
                finally:
                    self._lock.acquire()
                    self._waiting -= 1
                    self._rung -= rings_heard
            return self._jobs.popleft(), self._free.pop()

    def recall(self) -> list[Job]:
        """Return the jobs that wait, and forget them; but not those that were settled before."""
        with self._lock:
            recalled = [job for job in self._jobs if not job.settled]
            # What was acknowledged beforehand is nobody else's any more: it runs here or never.
            self._jobs = deque(job for job in self._jobs if job.settled)
        return recalled

    def close(self) -> None:
        """Have threads end as soon as no job waits. What runs goes on."""
        with self._lock:
            self._closed = True
            rings = max(0, self._waiting - self._rung)
            self._rung += rings
        self._ring(rings)

    def _summon(self) -> tuple[int, int]:
        """Return for how many threads to ring and how many to start, and count them as such. Under the lock.

        What finds no free slot needs nobody: the thread that leaves one comes for it.
        """
        running = self._concurrency - len(self._free)
        runnable = min(len(self._jobs), len(self._free))
        # Those that neither run something nor wait are on their way to look.
        awake = self._threads - running - self._waiting
        rings = max(0, min(runnable - awake, self._waiting) - self._rung)
        self._rung += rings
        starts = max(0, running + runnable + self._spare - self._threads)
        self._threads += starts
        return rings, starts

    def _ring(self, number: int) -> None:
        """Wake up so many threads that wait, now or soon."""
        for _ in range(number):
            self._bell.put(None)

    def _wait(self) -> int:
        """Wait, and return whether that somebody has rung is what has ended it, as 0 or 1."""
        self._bell.get()
        return 1
