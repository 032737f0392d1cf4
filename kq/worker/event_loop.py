"""Runs async handlers: an event loop in a thread of its own."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import traceback
from collections import deque
from threading import Thread
from time import monotonic
from types import FrameType
from typing import Any, Protocol

from kq.executor import Executor, Job, Run
from kq.outcome import Outcome
from kq.worker.slot import SlotTable
from kq.worker.time_limit import TimeLimit

logger = logging.getLogger("kq.worker")


class Reports(Protocol):
    """Where the ends of jobs are told."""

    def report(self, job: Job, outcome: Outcome | None) -> None:
        """Take a result; None if the handler settled the message itself before."""
        ...

    def report_now(self, job: Job, outcome: Outcome) -> None:
        """Take the result of a handler that settled its message and runs on."""
        ...

    def end_fork(self, outcome: Outcome) -> None:
        """End the process if it is a copy that a handler made of this one."""
        ...

    def on_out_of_memory(self) -> None:
        """Hear that a handler ran out of memory, once its result was reported."""
        ...

    def break_off(self, error: BaseException) -> None:
        """Hear that nothing goes on here, because of an exception that is being handled."""
        ...


class EventLoop(Thread):
    """A thread with an event loop that runs async handlers.

    Args:
        runner: Who is told of their ends.
        executor: Turns a job into an outcome.
        concurrency: Handlers at once.
        slots: Where to note what runs: the second ``concurrency`` of them.
    """

    def __init__(self, runner: Reports, executor: Executor, concurrency: int, slots: SlotTable) -> None:
        super().__init__(name="kq-loop", daemon=True)
        self._runner = runner
        self._executor = executor
        self._slots = slots
        self._free = list(range(2 * concurrency - 1, concurrency - 1, -1))
        self._waiting: deque[Job] = deque()
        #: What each task runs, and in which slot.
        self._tasks: dict[asyncio.Task[None], tuple[Job, int]] = {}
        #: What runs the handlers, by their jobs' tags.
        self._calls: dict[int, asyncio.Task[Outcome]] = {}
        self._loop = asyncio.new_event_loop()
        self._stopping = False

    def run(self) -> None:
        """Run the loop until stopped."""
        asyncio.set_event_loop(self._loop)
        try:
            while not self._run_until_stopped():
                pass
            self._loop.close()
        except BaseException as error:
            self._runner.break_off(error)

    def _run_until_stopped(self) -> bool:
        try:
            self._loop.run_forever()
        except (SystemExit, KeyboardInterrupt):
            # Raised in a task that a handler has started: asyncio has given it to whoever awaits the task, and lets it
            # through here as well.
            return False
        # A handler may have stopped it: it is not the handler's.
        return self._stopping

    def submit(self, job: Job) -> None:
        """Queue a job; never blocks."""
        self._waiting.append(job)
        self._loop.call_soon_threadsafe(self._start)

    def recall(self) -> list[int]:
        """Return the tags of jobs that have not started, and forget them; but not of those settled before."""
        tags, kept = [], []
        with contextlib.suppress(IndexError):
            while True:
                job = self._waiting.popleft()
                if job.settled:
                    kept.append(job)
                else:
                    tags.append(job.tag)
        if kept:
            self._waiting.extend(kept)
            # The loop may have found nothing meanwhile.
            self._loop.call_soon_threadsafe(self._start)
        return tags

    def stop(self) -> None:
        """Let the loop end as soon as it is idle."""

        def end_when_idle() -> None:
            self._stopping = True
            if not self._tasks:
                self._loop.stop()

        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(end_when_idle)

    def dump(self) -> list[str]:
        """Return what runs, with stacks."""
        parts = []
        for task, (job, _) in list(self._tasks.items()):
            # The handler has a task of its own, which is cancelled when its time is over.
            stack = "".join(traceback.format_list(_stack(self._calls.get(job.tag, task))))
            parts.append(f"the event loop runs {job.id} of {job.queue}\n{stack}")
        return parts

    def _start(self) -> None:
        while self._waiting and self._free:
            try:
                job = self._waiting.popleft()
            except IndexError:
                return
            slot = self._free.pop()
            task = self._loop.create_task(self._work_on(job, slot))
            self._tasks[task] = job, slot
            task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        job, slot = self._tasks.pop(task)
        if task.cancelled():
            # Before it began, by a handler that cancels whatever there is.
            self._waiting.appendleft(job)
            self._free.append(slot)
        self._start()
        if self._stopping and not self._tasks:
            self._loop.stop()

    async def _work_on(self, job: Job, slot: int) -> None:
        try:
            await self._work(job, slot)
        except BaseException as error:
            self._runner.break_off(error)

    async def _work(self, job: Job, slot: int) -> None:
        outcome: Outcome | None
        out_of_memory = False
        self._slots.enter(slot, job.tag, monotonic())
        try:
            prepared = self._executor.prepare(job, self._runner.report_now)
            if isinstance(prepared, Outcome):
                outcome = prepared
            else:
                outcome = await self._run(prepared, job.tag, slot)
                out_of_memory = prepared.out_of_memory
                outcome = self._executor.conclude(prepared, outcome)
        except Exception as error:
            logger.exception("unexpected failure around %s of %s", job.id, job.queue)
            outcome = self._executor.last_resort(job, error)
        self._runner.report(job, outcome)
        self._slots.leave(slot)
        self._free.append(slot)
        if out_of_memory:
            self._runner.on_out_of_memory()

    async def _call(self, run: Run, tag: int, slot: int) -> Outcome:
        if run.consumer.timeout is None:
            outcome = await self._executor.run_async(run)
        else:
            outcome = await self._call_in_time(run, run.consumer.timeout, tag, slot)
        # Here, where nothing else runs in between.
        self._runner.end_fork(outcome)
        return outcome

    async def _call_in_time(self, run: Run, seconds: float, tag: int, slot: int) -> Outcome:
        limit = TimeLimit(
            self._executor.run_async(run),
            seconds,
            on_strike=lambda: self._slots.strike(slot, tag),
            on_moved=lambda moved: self._slots.postpone(slot, moved),
        )
        try:
            outcome = await limit
        except asyncio.CancelledError:
            if not limit.has_struck:
                raise
        else:
            # Or it has blocked the loop, which came to its end before it came to its limit.
            if not (limit.has_struck or limit.has_overrun):
                return outcome
        return self._executor.timed_out(run)

    async def _run(self, run: Run, tag: int, slot: int) -> Outcome:
        task = self._calls[tag] = self._loop.create_task(self._call(run, tag, slot))
        try:
            return await task
        except asyncio.CancelledError:
            if task.done() and not task.cancelled():
                # We have been cancelled, by a handler that cancels whatever there is, after this one had ended.
                return task.result()
            return self._executor.canceled(run)
        finally:
            del self._calls[tag]


def _stack(task: asyncio.Task[Any]) -> traceback.StackSummary:
    """Return where a task is, from its own frame to that of what it waits for; a task itself knows only the first."""
    frames: list[FrameType] = []
    waits_for: Any = task.get_coro()
    while waits_for is not None:
        # Of a coroutine, a generator that is one, or an asynchronous generator.
        kind = next((kind for kind in ("cr", "gi", "ag") if hasattr(waits_for, f"{kind}_frame")), None)
        if kind is None:
            break
        frame = getattr(waits_for, f"{kind}_frame")
        if frame is not None:
            frames.append(frame)
        if frame is not None and frame.f_code is TimeLimit.__await__.__code__:
            waits_for = frame.f_locals.get("coroutine")
        else:
            waits_for = getattr(waits_for, "gi_yieldfrom" if kind == "gi" else f"{kind}_await")
    return traceback.StackSummary.extract((frame, frame.f_lineno) for frame in frames)
