"""Runs jobs in this process: threads for sync handlers, one event loop for async ones.

The same in a child process, in the supervisor's own (``--pool threads``) and in ``app.drain()``. Jobs
come in through `submit`, outcomes go out in batches through ``emit``: at once when nothing is waiting,
otherwise together with the next ones.
"""

from __future__ import annotations

import ctypes
import logging
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from itertools import count
from threading import Event, Lock, Thread, get_ident
from time import monotonic
from typing import TYPE_CHECKING

from kq.errors import Invalid
from kq.executor import Executor, Job, Run
from kq.outcome import DONE, Outcome
from kq.shield import HandlerTimeout, Shield, carry
from kq.worker.job_queue import JobQueue
from kq.worker.process import flush
from kq.worker.slot import UNSENT_MAX, SlotTable
from kq.worker.wire_queue import Wire, WireQueue

if TYPE_CHECKING:
    from kq.worker.event_loop import EventLoop

logger = logging.getLogger("kq.worker")

#: Seconds that a finished job's outcome waits for company while others are queued.
_FLUSH_AFTER = 0.002
#: Seconds after which it is sent at the latest, when every handler is busy.
_FLUSH_LATEST = 0.01

#: A job's tag and its outcome; None if the handler settled it itself before.
Result = tuple[int, Outcome | None]


class Runner:
    """Runs up to ``concurrency`` sync handlers and as many async ones.

    Args:
        executor: Turns a job into an outcome.
        concurrency: Handlers of each kind at once.
        shortest_timeout: Seconds of the shortest time limit of any handler, or None.
        slots: Where to note what runs; twice ``concurrency`` of them.
        emit: Takes results, in any thread, one call at a time; with True for those of handlers that
            have settled their message and run on.
        on_out_of_memory: Called in a handler's thread, after its result was reported, when it ran out of memory.
        on_broken: Called in a thread that cannot go on, because of the exception that is being handled there: what it
            was to run or to report waits for ever unless the process, or whoever waits, ends.
        wire: From which handlers' threads read what `submit` is called with (`WireQueue`), from `read_wire` on.
    """

    def __init__(
        self,
        executor: Executor,
        *,
        concurrency: int,
        shortest_timeout: float | None,
        slots: SlotTable,
        emit: Callable[[list[Result], bool], None],
        on_broken: Callable[[], None],
        on_out_of_memory: Callable[[], None] = lambda: None,
        wire: Wire | None = None,
    ) -> None:
        self._pid = os.getpid()
        self._executor = executor
        self.on_out_of_memory = on_out_of_memory
        self._on_broken = on_broken
        self._concurrency = concurrency
        self._slots = slots
        self._emit = emit
        self._wired = None if wire is None else WireQueue(concurrency, self._start_thread, self.flush, wire)
        self._jobs = self._wired or JobQueue(concurrency, self._start_thread, self.flush)
        self._threads: list[_HandlerThread] = []
        self._outbox: list[Result] = []
        self._outbox_lock = Lock()
        self._flushed_at = 0.0
        self._loop: EventLoop | None = None
        self._flusher = _Flusher(self)
        self._watchdog = None if shortest_timeout is None else _Watchdog(self._threads, shortest_timeout)
        if self._watchdog is not None:
            self._watchdog.start()

    def submit(self, jobs: Sequence[Job]) -> None:
        """Queue jobs; never blocks."""
        own = []
        for job in jobs:
            if self._executor.is_async(job):
                self._event_loop().submit(job)
            else:
                own.append(job)
        if own:
            self._jobs.put(own)

    def read_wire(self) -> None:
        """Have threads read the wire from now on.

        Raises:
            RuntimeError: If none can be started.
        """
        assert self._wired is not None
        self._wired.open()

    def recall(self) -> list[int]:
        """Return the tags of jobs that have not started, and forget them; but not of those settled before."""
        tags = [job.tag for job in self._jobs.recall()]
        if self._loop is not None:
            tags += self._loop.recall()
        return tags

    def stop(self) -> None:
        """Let threads end as soon as they are idle. What runs goes on."""
        self._jobs.close()
        if self._loop is not None:
            self._loop.stop()
        self._flusher.stop()
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
                or self._jobs.is_empty
                or monotonic() - self._flushed_at > _FLUSH_AFTER
            ):
                self._send()
            else:
                self._slots.add_unsent(len(self._outbox) - 1, job.tag)
                if len(self._outbox) == 1 and not self._flusher.expect():
                    self._send()

    def _send(self) -> None:
        # The lock is held while sending, so that two batches never mix.
        self._flushed_at = monotonic()
        if self._outbox:
            batch, self._outbox = self._outbox, []
            self._emit(batch, False)
            self._slots.clear_unsent()

    def report_now(self, job: Job, outcome: Outcome) -> None:
        """Take the result of a handler that settled its message and runs on.

        Raises:
            Invalid: In a fork that a handler has made.
        """
        # Before the lock, which nobody opens in a fork if somebody held it.
        if os.getpid() != self._pid:
            raise Invalid("this process is a fork of the one that handles the message, which alone can settle it")
        with self._outbox_lock:
            self._emit([(job.tag, outcome)], True)

    def end_fork(self, outcome: Outcome) -> None:
        """End the process if it is a copy that a handler made of this one with ``os.fork`` and that has come back.

        It would settle a message that is its original's affair, and run what waits in its copy of the queue.
        """
        if os.getpid() != self._pid:
            try:
                flush()
            finally:
                os._exit(outcome is not DONE)

    def break_off(self, error: BaseException) -> None:
        """Say that this thread cannot go on, because of an exception that is being handled."""
        while True:
            try:
                return self._on_broken()
            except BaseException:
                # There is no memory, not even for that call. What takes it may be held by the error.
                error.__traceback__ = error.__context__ = error.__cause__ = None

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

    def _event_loop(self) -> EventLoop:
        if self._loop is None:
            # Imported here: a process that has no async handlers does without the largest of all modules.
            from kq.worker.event_loop import EventLoop

            self._loop = EventLoop(self, self._executor, self._concurrency, self._slots)
            self._loop.start()
        return self._loop

    def _start_thread(self) -> None:
        thread = _HandlerThread(self, self._executor, self._jobs, self._slots)
        thread.start()
        self._threads.append(thread)


class _Flusher(Thread):
    """Sends results that wait for company which does not come, because every handler is busy."""

    def __init__(self, runner: Runner) -> None:
        super().__init__(name="kq-flusher", daemon=True)
        self._runner = runner
        self._expected = Event()
        self._stopped = Event()

    def expect(self) -> bool:
        """Say that a result has begun to wait; False if it is not to, for want of room for one more thread."""
        if not self.is_alive() and not self._stopped.is_set():
            try:
                self.start()
            except (RuntimeError, MemoryError):
                return False
        self._expected.set()
        return True

    def run(self) -> None:
        try:
            while True:
                self._expected.wait()
                if self._stopped.wait(_FLUSH_LATEST):
                    return
                self._expected.clear()
                self._runner.flush()
        except BaseException as error:
            self._runner.break_off(error)

    def stop(self) -> None:
        self._stopped.set()
        self._expected.set()


class _HandlerThread(Thread):
    """A thread that runs sync handlers, one after the other."""

    _numbers = count(1)

    def __init__(self, runner: Runner, executor: Executor, jobs: JobQueue, slots: SlotTable) -> None:
        super().__init__(name=f"kq-handler-{next(self._numbers)}", daemon=True)
        self._runner = runner
        self._executor = executor
        self._jobs = jobs
        self._slots = slots
        self.job: Job | None = None
        self._slot = 0
        #: Guards the moment between a handler's end and the watchdog's shot.
        self._shield = Shield()
        self._deadline: float | None = None
        self._out_of_memory = False

    def run(self) -> None:
        try:
            self._serve()
        except BaseException as error:
            self._runner.break_off(error)

    def _serve(self) -> None:
        carry(self._shield)
        slot = None
        while (turn := self._jobs.take(slot)) is not None:
            job, slot = turn
            self._out_of_memory = False
            # From before anything is read of the message until its end is reported: whatever kills the process
            # in between is charged to it.
            self._slots.enter(slot, job.tag, monotonic())
            self._slot = slot
            outcome = self._work_on(job)
            self._runner.report(job, outcome)
            self._slots.leave(slot)
            if self._out_of_memory:
                self._runner.on_out_of_memory()

    def _work_on(self, job: Job) -> Outcome | None:
        try:
            prepared = self._executor.prepare(job, self._runner.report_now)
            if isinstance(prepared, Outcome):
                return prepared
            outcome = self._run(job, prepared)
            self._out_of_memory = prepared.out_of_memory
            # Out of the watchdog's reach: what is claimed here is also reported.
            return self._executor.conclude(prepared, outcome)
        except Exception as error:
            logger.exception("unexpected failure around %s of %s", job.id, job.queue)
            return self._executor.last_resort(job, error)

    def _run(self, job: Job, run: Run) -> Outcome:
        timeout = run.consumer.timeout
        now = monotonic()
        is_late = False
        self.job = job
        try:
            try:
                if timeout is not None:
                    with self._shield.lock:
                        self._shield.depth = 0
                        self._shield.is_due = False
                        self._deadline = now + timeout
                outcome = self._executor.run(run)
                self._runner.end_fork(outcome)
            finally:
                if timeout is not None:
                    with self._shield.lock:
                        # Its limit has struck, or is due, whatever the handler has made of it.
                        is_late = self._deadline is None or monotonic() > self._deadline
                        self._deadline = None
                        self._shield.is_due = False
            return self._executor.timed_out(run) if is_late else outcome
        except HandlerTimeout:
            return self._executor.timed_out(run)
        finally:
            self.job = None

    def expire(self, now: float) -> float | None:
        """Stop the handler if its time is over; return when to look at it again."""
        with self._shield.lock:
            deadline = self._deadline
            if deadline is None or deadline > now:
                return deadline
            self._deadline = None
            if self.job is not None:
                self._slots.strike(self._slot, self.job.tag)
            if self._shield.depth:
                self._shield.is_due = True
                return None
            ctypes.pythonapi.PyThreadState_SetAsyncExc(
                ctypes.c_ulong(self.ident or get_ident()), ctypes.py_object(HandlerTimeout)
            )
            return None


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
