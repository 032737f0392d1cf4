"""Runs jobs in this process: threads for sync handlers, one event loop for async ones.

The same in a child process, in the supervisor's own (``--pool threads``) and in ``app.drain()``. Jobs
come in through `submit`, outcomes go out in batches through ``emit``: at once when nothing is waiting,
otherwise together with the next ones.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import sys
import traceback
from collections import deque
from collections.abc import Callable, Sequence
from queue import Empty, SimpleQueue
from threading import Event, Lock, Thread, get_ident
from time import monotonic

from kq.executor import Executor, HandlerTimeout, Job, Run
from kq.outcome import DONE, Outcome
from kq.worker.slot import UNSENT_MAX, SlotTable

#: Seconds that a finished job's outcome waits for company while others are queued.
_FLUSH_AFTER = 0.002

#: A job's tag and its outcome; None if the handler settled it itself before.
Result = tuple[int, Outcome | None]


class Runner:
    """Runs up to ``concurrency`` sync handlers and as many async ones.

    Args:
        executor: Turns a job into an outcome.
        concurrency: Handlers of each kind at once.
        is_async: Tells whether a queue's handler is async.
        shortest_timeout: Seconds of the shortest time limit of any handler, or None.
        slots: Where to note what runs; twice ``concurrency`` of them.
        emit: Takes results, in any thread, one call at a time; with True for those of handlers that
            have settled their message and run on.
    """

    def __init__(
        self,
        executor: Executor,
        *,
        concurrency: int,
        is_async: Callable[[str], bool],
        shortest_timeout: float | None,
        slots: SlotTable,
        emit: Callable[[list[Result], bool], None],
    ) -> None:
        self._executor = executor
        self._concurrency = concurrency
        self._is_async = is_async
        self._slots = slots
        self._emit = emit
        self._jobs: SimpleQueue[Job | None] = SimpleQueue()
        self._threads: list[_HandlerThread] = []
        self._idle = 0
        self._lock = Lock()
        self._outbox: list[Result] = []
        self._outbox_lock = Lock()
        self._flushed_at = 0.0
        self._loop: _LoopThread | None = None
        self._watchdog = None if shortest_timeout is None else _Watchdog(self._threads, shortest_timeout)
        if self._watchdog is not None:
            self._watchdog.start()

    def submit(self, jobs: Sequence[Job]) -> None:
        """Queue jobs; never blocks."""
        waiting = 0
        for job in jobs:
            if self._is_async(job.queue):
                self._event_loop().submit(job)
            else:
                self._jobs.put(job)
                waiting += 1
        if waiting:
            self._start_threads(waiting)

    def recall(self) -> list[int]:
        """Return the tags of jobs that have not started, and forget them."""
        tags = []
        with contextlib.suppress(Empty):
            while True:
                job = self._jobs.get_nowait()
                if job is not None:
                    tags.append(job.tag)
        if self._loop is not None:
            tags += self._loop.recall()
        return tags

    def stop(self) -> None:
        """Let threads end as soon as they are idle. What runs goes on."""
        for _ in self._threads:
            self._jobs.put(None)
        if self._loop is not None:
            self._loop.stop()
        if self._watchdog is not None:
            self._watchdog.stop()

    def flush(self) -> None:
        """Send the results that wait for company."""
        with self._outbox_lock:
            self._send()

    def report(self, job: Job, outcome: Outcome | None) -> None:
        """Take a result. A success may wait for company; anything else is sent at once."""
        with self._outbox_lock:
            self._outbox.append((job.tag, outcome))
            if (
                outcome is not DONE
                or len(self._outbox) == UNSENT_MAX
                or self._jobs.empty()
                or monotonic() - self._flushed_at > _FLUSH_AFTER
            ):
                self._send()
            else:
                self._slots.add_unsent(len(self._outbox) - 1, job.tag)

    def _send(self) -> None:
        # The lock is held while sending, so that two batches never mix.
        self._flushed_at = monotonic()
        if self._outbox:
            batch, self._outbox = self._outbox, []
            self._emit(batch, False)
            self._slots.clear_unsent()

    def report_now(self, job: Job, outcome: Outcome) -> None:
        """Take the result of a handler that settled its message and runs on."""
        with self._outbox_lock:
            self._emit([(job.tag, outcome)], True)

    def dump(self) -> str:
        """Return what runs where, with stacks."""
        frames = sys._current_frames()
        parts = []
        for thread in list(self._threads):
            job = thread.job
            if job is not None and thread.ident in frames:
                stack = "".join(traceback.format_stack(frames[thread.ident]))
                parts.append(f"{thread.name} runs {job.id} of {job.queue}\n{stack}")
        if self._loop is not None:
            parts += self._loop.dump()
        return "\n".join(parts) or "nothing runs"

    def _event_loop(self) -> _LoopThread:
        if self._loop is None:
            self._loop = _LoopThread(self, self._executor, self._concurrency, self._slots)
            self._loop.start()
        return self._loop

    def _start_threads(self, waiting: int) -> None:
        with self._lock:
            missing = min(waiting - self._idle, self._concurrency - len(self._threads))
            for _ in range(missing):
                thread = _HandlerThread(self, self._executor, len(self._threads), self._slots)
                self._threads.append(thread)
                thread.start()

    def next_job(self) -> Job | None:
        """Return the next job for a sync handler, flushing before a wait; None to end."""
        try:
            return self._jobs.get_nowait()
        except Empty:
            self.flush()
        with self._lock:
            self._idle += 1
        try:
            return self._jobs.get()
        finally:
            with self._lock:
                self._idle -= 1


class _HandlerThread(Thread):
    """A thread that runs sync handlers, one after the other."""

    def __init__(self, runner: Runner, executor: Executor, slot: int, slots: SlotTable) -> None:
        super().__init__(name=f"kq-handler-{slot + 1}", daemon=True)
        self._runner = runner
        self._executor = executor
        self._slot = slot
        self._slots = slots
        self.job: Job | None = None
        #: Guards the moment between a handler's end and the watchdog's shot.
        self._aim = Lock()
        self._deadline: float | None = None

    def run(self) -> None:
        while True:
            job = self._runner.next_job()
            if job is None:
                return
            outcome: Outcome | None
            prepared = self._executor.prepare(job, self._runner.report_now)
            outcome = prepared if isinstance(prepared, Outcome) else self._run(job, prepared)
            self._runner.report(job, outcome)

    def _run(self, job: Job, run: Run) -> Outcome | None:
        timeout = run.consumer.timeout
        now = monotonic()
        self._slots.enter(self._slot, job.tag, now)
        self.job = job
        try:
            try:
                if timeout is not None:
                    with self._aim:
                        self._deadline = now + timeout
                return self._executor.run(run)
            finally:
                if timeout is not None:
                    with self._aim:
                        self._deadline = None
        except HandlerTimeout:
            return self._executor.timed_out(run)
        finally:
            self.job = None
            self._slots.leave(self._slot)

    def expire(self, now: float) -> float | None:
        """Stop the handler if its time is over; return the deadline of one that may go on."""
        with self._aim:
            deadline = self._deadline
            if deadline is not None and deadline <= now:
                self._deadline = None
                ctypes.pythonapi.PyThreadState_SetAsyncExc(
                    ctypes.c_ulong(self.ident or get_ident()), ctypes.py_object(HandlerTimeout)
                )
                return None
            return deadline


class _Watchdog(Thread):
    """Stops sync handlers at their time limits.

    It sleeps until the nearest deadline, but never longer than the shortest limit: a handler that
    starts meanwhile cannot be late before that.
    """

    def __init__(self, threads: list[_HandlerThread], shortest: float) -> None:
        super().__init__(name="kq-watchdog", daemon=True)
        self._threads = threads
        self._shortest = shortest
        self._stopped = Event()

    def run(self) -> None:
        pause = 0.0
        while not self._stopped.wait(pause):
            now = monotonic()
            deadlines = [deadline for t in list(self._threads) if (deadline := t.expire(now)) is not None]
            pause = max(0.0, min([now + self._shortest, *deadlines]) - monotonic())

    def stop(self) -> None:
        self._stopped.set()


class _LoopThread(Thread):
    """A thread with an event loop that runs async handlers."""

    def __init__(self, runner: Runner, executor: Executor, concurrency: int, slots: SlotTable) -> None:
        super().__init__(name="kq-loop", daemon=True)
        self._runner = runner
        self._executor = executor
        self._slots = slots
        self._free = list(range(2 * concurrency - 1, concurrency - 1, -1))
        self._waiting: deque[Job] = deque()
        self._tasks: dict[asyncio.Task[None], Job] = {}
        self._loop = asyncio.new_event_loop()
        self._stopping = False

    def run(self) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            self._loop.run_forever()
        finally:
            self._loop.close()

    def submit(self, job: Job) -> None:
        self._waiting.append(job)
        self._loop.call_soon_threadsafe(self._start)

    def recall(self) -> list[int]:
        tags = []
        with contextlib.suppress(IndexError):
            while True:
                tags.append(self._waiting.popleft().tag)
        return tags

    def stop(self) -> None:
        def end_when_idle() -> None:
            self._stopping = True
            if not self._tasks:
                self._loop.stop()

        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(end_when_idle)

    def dump(self) -> list[str]:
        parts = []
        for task, job in list(self._tasks.items()):
            stack = "".join(line for frame in task.get_stack() for line in traceback.format_stack(frame, 1))
            parts.append(f"the event loop runs {job.id} of {job.queue}\n{stack}")
        return parts

    def _start(self) -> None:
        while self._waiting and self._free:
            try:
                job = self._waiting.popleft()
            except IndexError:
                return
            task = self._loop.create_task(self._handle(job, self._free.pop()))
            self._tasks[task] = job
            task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.pop(task, None)
        self._start()
        if self._stopping and not self._tasks:
            self._loop.stop()

    async def _handle(self, job: Job, slot: int) -> None:
        try:
            prepared = self._executor.prepare(job, self._runner.report_now)
            if isinstance(prepared, Outcome):
                outcome: Outcome | None = prepared
            else:
                self._slots.enter(slot, job.tag, monotonic())
                outcome = await self._run(prepared)
        finally:
            self._slots.leave(slot)
            self._free.append(slot)
        self._runner.report(job, outcome)

    async def _run(self, run: Run) -> Outcome | None:
        task = self._loop.create_task(self._executor.run_async(run))
        late = False

        def expire() -> None:
            nonlocal late
            late = True
            task.cancel()

        timer = None if run.consumer.timeout is None else self._loop.call_later(run.consumer.timeout, expire)
        try:
            return await task
        except asyncio.CancelledError:
            if late:
                return self._executor.timed_out(run)
            return self._executor.canceled(run)
        finally:
            if timer is not None:
                timer.cancel()
