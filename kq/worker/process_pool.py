"""Children: started, fed, watched, replaced when they die."""

from __future__ import annotations

import logging
import selectors
from collections.abc import Callable, Sequence
from threading import Lock
from time import monotonic
from typing import Any

import msgspec

from kq.executor import Job
from kq.outcome import DONE, Death, Outcome
from kq.waker import Waker
from kq.worker import frame
from kq.worker.child_process import ChildProcess
from kq.worker.pool import OVERDUE, Died, Event, Finished, Place, Returned, StartFailed
from kq.worker.process import Process

logger = logging.getLogger("kq.worker")

#: Seconds that a handler which ignores its time limit is given before its process is killed.
KILL_AFTER = 2.0
#: Seconds before a child that could not start is tried again: the first and the longest wait.
_START_BACKOFF = (0.5, 30.0)
#: Failed starts in a row after which the worker gives up.
_START_TRIES = 5
#: Seconds that a child may take to load the app.
_START_PATIENCE = 120.0
#: Seconds that a child with nothing left to do is given to end.
_LINGER = 10.0
#: Seconds that one is given that has hung up: whoever is dying is dead by then.
_HUNG_UP = 0.5
#: Seconds after which one that was killed, and is still there, is left behind where the worker ends.
_KILLED = 2.0
#: Seconds without a result after which a child's pace is forgotten, and its waiting jobs are offered to others.
_SHARE_AFTER = 0.5
#: Seconds after which the pace of one that has nothing to do is forgotten.
_IDLE = 4.0
#: Seconds of work that a child holds beyond what its handlers run.
_LOOKAHEAD = 0.1
#: Jobs that a child holds at most.
_WINDOW_MAX = 1000
#: Seconds over which a child's pace is measured, at least.
_MEASURE = 0.005
#: Seconds between two looks at children where the system cannot announce their deaths.
_LOOK_AT_CHILDREN = 0.2


class ProcessPool:
    """A pool of child processes.

    Args:
        size: How many.
        hello: What each is told first.
        timeout_of: Returns the time limit of a job by its tag, or None.
        max_tasks: Jobs after which a child is replaced, as soon as its successor is ready; None for never.
        forks: Processes that wait to become children; whichever is used is taken from the list.
    """

    def __init__(
        self,
        size: int,
        hello: frame.Hello,
        timeout_of: Callable[[int], float | None] | None,
        *,
        max_tasks: int | None = None,
        forks: list[Process] | None = None,
    ) -> None:
        self._max_tasks = max_tasks
        self._size = size
        self._hello = hello
        self._forks = [] if forks is None else forks
        self._timeout_of = timeout_of
        self.places: list[Place] = []
        self.lock = Lock()
        self._children: list[ChildProcess] = []
        self._selector = selectors.DefaultSelector()
        self._waker = Waker()
        self._selector.register(self._waker, selectors.EVENT_READ, None)
        self._failed_starts = 0
        self._start_at = 0.0
        self._numbers = 0
        self._closing = False
        self._recalled = False
        self._has_worked = False
        #: When handlers' time limits were looked at last, and since when that has been done without a break.
        self._looked_at = self._steady_since = 0.0
        #: Whether it has been said that those that were killed keep others from being started.
        self._has_complained = False

    def start(self) -> None:
        """See `Pool.start`."""
        while self._is_short() and monotonic() >= self._start_at:
            try:
                self._add()
            except OSError as error:
                # No memory or no descriptors for a process: those that run go on.
                self._count_failed_start(self._numbers, str(error))

    def submit(self, place: Place, jobs: Sequence[Job]) -> None:
        """See `Pool.submit`."""
        assert isinstance(place, ChildProcess)
        place.submit(jobs)
        self._watch(place)

    def poll(self, timeout: float) -> list[Event]:
        """See `Pool.poll`."""
        events: list[Event] = []
        patience = self._patience(timeout)
        self.lock.release()
        try:
            ready = self._selector.select(patience)
        finally:
            self.lock.acquire()
        for key, mask in ready:
            child = key.data
            if child is None:
                self._waker.drain()
                continue
            if mask & selectors.EVENT_WRITE:
                child.write()
            if mask & selectors.EVENT_READ and key.fileobj is child.socket:
                self._read(child, events)
            self._watch(child)
        self._stop_late_handlers()
        self._narrow()
        self._share_out()
        self._end_lingering()
        for child in list(self._children):
            death = child.process.reap()
            if death is not None:
                self._bury(child, death, events)
        if not self._closing and not self._recalled and self._is_short() and monotonic() >= self._start_at:
            self.start()
        self._complain()
        return events

    @property
    def needs_watching(self) -> bool:
        """See `Pool.needs_watching`: handlers may run late, and what waits in a child may turn out to wait for long."""
        return self._timeout_of is not None or any(len(child.tags) > child.window_min for child in self._children)

    def wake(self) -> None:
        """See `Pool.wake`."""
        self._waker.wake()

    def recall(self) -> None:
        """See `Pool.recall`."""
        self._recalled = True
        for child in self._children:
            self._retire(child)

    def resume(self) -> None:
        """See `Pool.resume`."""
        if self._recalled and not self._closing:
            self._recalled = False
            # `poll` starts as many as are missing.
            self.wake()

    def give_back(self) -> None:
        """See `Pool.give_back`."""
        for child in self._children:
            if child.tags and not child.ended:
                child.send(frame.Recall())
                self._watch(child)

    def replace(self) -> None:
        """See `Pool.replace`."""
        if self._closing or self._recalled:
            return
        for child in self._children:
            child.outdated = True
        self._start_at = 0.0
        self._failed_starts = 0
        self.start()

    def dump(self, name_of: Callable[[int], str]) -> None:
        """See `Pool.dump`."""
        for child in self._children:
            running = ", ".join(
                f"{name_of(slot.tag)} for {monotonic() - slot.started_at:.1f} s" for slot in child.slots.running()
            )
            logger.warning(
                "child %d (pid %d) holds %d messages; running: %s",
                child.number, child.process.pid, len(child.tags), running or "none",
                extra={"action": "dump"},
            )  # fmt: skip
            child.send(frame.Dump())
            self._watch(child)

    def close(self, patience: float) -> list[Event]:
        """See `Pool.close`."""
        with self.lock:
            return self._close(patience)

    def _close(self, patience: float) -> list[Event]:
        self._closing = True
        events: list[Event] = []
        until = monotonic() + patience
        for child in self._children:
            self._retire(child)
            if child.tags:
                # Whoever closes has waited for its handlers as long as it meant to.
                child.doomed_at = monotonic() + min(patience, OVERDUE)
        while self._children and monotonic() < until:
            events += self.poll(until - monotonic())
        for child in self._children:
            child.process.kill()
        until = monotonic() + _KILLED
        while self._children and monotonic() < until:
            events += self.poll(until - monotonic())
        for child in list(self._children):
            # In a call of the system's, such as to a file server that is away, which ends when that does.
            logger.error(
                "child %d (pid %d) was killed and does not die; it is left behind",
                child.number, child.process.pid, extra={"action": "child_left"},
            )  # fmt: skip
            self._forget(child)
        self._selector.close()
        self._waker.close()
        return events

    def _active(self) -> list[ChildProcess]:
        return [child for child in self._children if not child.leaving and not child.outdated]

    def _is_short(self) -> bool:
        """Tell whether there are too few children; those that are killed and do not die are not replaced for ever."""
        return len(self._active()) < self._size and not self._is_full_of_killed

    @property
    def _is_full_of_killed(self) -> bool:
        """Whether so many that were killed are still there that no other one is started beside them."""
        return sum(child.is_killed for child in self._children) > self._size

    def _complain(self) -> None:
        """Say once that there is nobody to run anything, because those that were killed do not die."""
        is_blocked = self._is_full_of_killed and self.is_stuck and not self._closing
        if is_blocked and not self._has_complained:
            logger.error(
                "%d children were killed and do not die; none is started beside them, and this worker does nothing "
                "until they are gone; pids: %s",
                sum(child.is_killed for child in self._children),
                ", ".join(str(child.process.pid) for child in self._children if child.is_killed),
                extra={"action": "children_stay"},
            )
        self._has_complained = is_blocked

    def _add(self) -> None:
        self._numbers += 1
        concurrency = self._hello.concurrency
        process = self._forks.pop() if self._forks else Process.spawn(concurrency)
        child = ChildProcess(self._numbers, concurrency, process=process, hello=self._hello, window_min=concurrency)
        child.doomed_at = monotonic() + _START_PATIENCE
        self._children.append(child)
        self.places.append(child)
        self._selector.register(child.socket, selectors.EVENT_READ, child)
        if process.pid_fd is not None:
            self._selector.register(process.pid_fd, selectors.EVENT_READ, child)
        self._watch(child)

    def _retire(self, child: ChildProcess) -> None:
        child.leaving = True
        child.accepting = False
        child.send(frame.Recall(final=True))
        self._watch(child)

    def _watch(self, child: ChildProcess) -> None:
        """Ask for writability exactly while there is something to write."""
        if child.ended:
            return
        wanted = selectors.EVENT_READ | (selectors.EVENT_WRITE if child.outgoing else 0)
        if self._selector.get_key(child.socket).events != wanted:
            self._selector.modify(child.socket, wanted, child)

    def _read(self, child: ChildProcess, events: list[Event]) -> None:
        try:
            for message in child.read():
                self._take(child, message, events)
        except msgspec.MsgspecError:
            logger.exception("child %d speaks nonsense; killing it", child.number, extra={"action": "child_broken"})
            child.kill("it spoke nonsense")
        if child.ended and child.watched:
            # Its end of the socket is closed; its process says when it is over. It can report nothing more.
            child.watched = False
            child.accepting = False
            self._selector.unregister(child.socket)
            child.doomed_at = monotonic() + (_HUNG_UP if child.tags else _LINGER)

    def _take(self, child: ChildProcess, message: Any, events: list[Event]) -> None:
        if isinstance(message, frame.Results):
            results: list[tuple[int, Outcome | None]] = [(tag, DONE) for tag in message.done] + message.others
            if message.early:
                events.append(Finished(child, results, early=True))
                return
            child.tags.difference_update(tag for tag, _ in results)
            self._measure(child, len(results))
            child.heard_at = monotonic()
            child.served += len(results)
            if self._max_tasks is not None and child.served >= self._max_tasks:
                child.outdated = True
            events.append(Finished(child, results))
        elif isinstance(message, frame.Returned):
            child.tags.difference_update(message.tags)
            events.append(Returned(child, message.tags))
        elif isinstance(message, frame.Ready):
            child.ready = True
            child.doomed_at = None
            if message.is_other:
                logger.warning(
                    "child %d (pid %d) has loaded another configuration, or another kq, than its worker goes by, whose "
                    "time limits and queues are those of before: send the worker a HUP",
                    child.number, child.process.pid, extra={"action": "child_differs"},
                )  # fmt: skip
            self._failed_starts = 0
            self._has_worked = True
            for old in self._children:
                if old.outdated and not old.leaving:
                    self._retire(old)
                    break
        elif isinstance(message, frame.Exhausted):
            logger.warning(
                "child %d (pid %d): a handler ran out of memory; replacing the child",
                child.number, child.process.pid, extra={"action": "out_of_memory"},
            )  # fmt: skip
            child.outdated = True
        elif isinstance(message, frame.Failed):
            child.why_failed = message.why
            child.doomed_at = monotonic() + _LINGER

    @staticmethod
    def _measure(child: ChildProcess, count: int) -> None:
        """Fit the window to the child's pace: slow handlers hoard nothing, fast ones never wait."""
        child.finished += count
        now = monotonic()
        elapsed = now - child.measured_at
        if elapsed >= _MEASURE:
            ahead = int(child.finished / elapsed * _LOOKAHEAD)
            target = min(child.window_min + ahead, _WINDOW_MAX)
            if target >= child.window and child.finished < child.window_min:
                # Handlers that have begun together end together: that is no pace yet.
                return
            child.window = max(child.window_min, (child.window + target) // 2 if target < child.window else target)
            child.finished = 0
            child.measured_at = now

    def _narrow(self) -> None:
        """Forget the pace of children of which nothing has been heard for a while: what comes next may be slow."""
        now = monotonic()
        for child in self._children:
            if child.window > child.window_min and now - child.heard_at >= (_SHARE_AFTER if child.tags else _IDLE):
                child.window = child.window_min

    def _bury(self, child: ChildProcess, death: Death, events: list[Event]) -> None:
        # What it wrote before it died still counts.
        self._read(child, events)
        unsent = [tag for tag in child.slots.unsent() if tag in child.tags]
        if unsent:
            child.tags.difference_update(unsent)
            events.append(Finished(child, [(tag, DONE) for tag in unsent]))
        running = [slot.tag for slot in child.slots.running() if slot.tag in child.tags]
        queued = sorted(child.tags.difference(running))
        expected = child.leaving and death.exit_code == 0
        how = child.how_it_ended(death)
        self._forget(child)
        if not child.ready and not child.leaving:
            self._count_failed_start(child.number, child.why_failed or f"the process {death}")
        elif not expected and not self._closing:
            is_missed = not self._recalled and self._is_short()
            logger.error(
                "child %d (pid %d) %s while running %d and holding %d jobs%s",
                child.number, child.process.pid, how, len(running), len(queued),
                "; starting a new one" if is_missed else "",
                extra={"action": "child_died"},
            )  # fmt: skip
        # Also where it held nothing: nobody is to count on it any more.
        events.append(Died(child, death, how, running, queued, child.late, child.held_up))

    def _forget(self, child: ChildProcess) -> None:
        if child.watched:
            self._selector.unregister(child.socket)
        if child.process.pid_fd is not None:
            self._selector.unregister(child.process.pid_fd)
        child.process.close()
        self._children.remove(child)
        self.places.remove(child)

    @property
    def is_stuck(self) -> bool:
        """See `Pool.is_stuck`."""
        if not self._is_full_of_killed and self._failed_starts < _START_TRIES * self._size:
            return False
        # One that is on its way out takes nothing.
        return not any(place.ready and place.accepting for place in self.places)

    def _count_failed_start(self, number: int, why: str) -> None:
        self._failed_starts += 1
        if self._failed_starts >= _START_TRIES * self._size and not self._has_worked:
            raise StartFailed(why)
        first, longest = _START_BACKOFF
        wait = min(longest, first * 2 ** min(10, (self._failed_starts - 1) // self._size))
        self._start_at = monotonic() + wait
        logger.error(
            "child %d could not start: %s; next try in %.1f s", number, why, wait,
            extra={"action": "child_failed"},
        )  # fmt: skip

    def _share_out(self) -> None:
        """Ask for what waits behind slow handlers of one child while another one has handlers with nothing to do."""
        hoarders = self._hoarders()
        now = monotonic()
        for child in hoarders:
            if now - child.heard_at >= _SHARE_AFTER:
                child.heard_at = now
                child.send(frame.Recall())
                self._watch(child)

    def _hoarders(self) -> list[ChildProcess]:
        if len(self._children) < 2 or not any(
            child.room and len(child.tags) < child.window_min for child in self._children
        ):
            return []
        return [
            child for child in self._children
            if len(child.tags) > child.window_min and not child.ended and not child.leaving
        ]  # fmt: skip

    def _end_lingering(self) -> None:
        """Kill children that should have ended by now, or be ready."""
        now = monotonic()
        for child in self._children:
            if child.leaving and not child.tags and child.doomed_at is None:
                # From when it had nothing left to do, not from when it was told.
                child.doomed_at = now + _LINGER
            if child.doomed_at is not None and now >= child.doomed_at:
                child.doomed_at = None if child.ready else now + _START_PATIENCE
                child.why_failed = child.why_failed or f"it did not load the app within {_START_PATIENCE:g} s"
                late = "it had hung up" if child.ended else "it did not end in time"
                child.kill(late if child.ready else child.why_failed)

    def _stop_late_handlers(self) -> None:
        """Kill a child whose handler does not heed its time limit."""
        if self._timeout_of is None:
            return
        now = monotonic()
        if now - self._looked_at > KILL_AFTER / 2:
            # We have been stopped, and so have they, as it seems: they are to have the time to stop by themselves.
            self._steady_since = now
        self._looked_at = now
        if now - self._steady_since < KILL_AFTER:
            return
        for child in self._children:
            if child.late or child.held_up:
                continue
            overdue = {
                slot: now - slot.started_at - limit
                for slot in child.slots.running()
                if slot.tag in child.tags and (limit := self._timeout_of(slot.tag)) is not None
            }
            if any(seconds > KILL_AFTER for seconds in overdue.values()):
                # Others that are late as well are charged as well, and do not get another turn for it.
                child.late = frozenset(slot.tag for slot, over in overdue.items() if over > 0 and slot.is_struck)
                child.held_up = frozenset(
                    slot.tag for slot, over in overdue.items() if over > KILL_AFTER and not slot.is_struck
                )
                child.kill(f"a handler went on {KILL_AFTER:g} s beyond its time limit")

    def _patience(self, timeout: float) -> float:
        now = monotonic()
        if any(child.process.pid_fd is None for child in self._children):
            timeout = min(timeout, _LOOK_AT_CHILDREN)
        for child in self._children:
            if child.doomed_at is not None:
                timeout = min(timeout, max(0.0, child.doomed_at - now))
            elif child.leaving:
                timeout = min(timeout, _LINGER / 4)
        if not self._closing and not self._recalled and self._is_short():
            timeout = min(timeout, max(0.0, self._start_at - now))
        if self._hoarders() or any(child.tags and child.window > child.window_min for child in self._children):
            timeout = min(timeout, _SHARE_AFTER)
        if self._timeout_of is not None:
            for child in self._children:
                for slot in child.slots.running():
                    # One that has been killed for it is waited for.
                    limit = None if child.late or child.held_up else self._timeout_of(slot.tag)
                    if limit is not None:
                        kill_at = max(slot.started_at + limit, self._steady_since) + KILL_AFTER + 0.01
                        timeout = min(timeout, max(0.0, kill_at - now))
                if child.tags:
                    # One that starts while we sleep is looked at in time as well.
                    timeout = min(timeout, KILL_AFTER / 4)
        return timeout
