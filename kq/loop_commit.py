"""Group commit on an event loop: what its tasks publish is sent from the loop, which says when there is an answer.

While nothing is on its way, a message is sent at once; those that tasks hand in meanwhile form the next group, as with
`kq.group_commit`. Nobody pays for a change of threads, and the loop is never blocked. It takes a broker that can be
sent something without waiting (`Backend.send`); whatever else comes in between is passed on, to threads.
"""

from __future__ import annotations

from asyncio import AbstractEventLoop, Future, TimerHandle
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from threading import Event
from time import monotonic
from typing import Final

from kq.backend import Publication, Unconfirmed
from kq.errors import Error
from kq.group_commit import GroupCommit
from kq.waker import Lookout

#: Publications that one group carries at most.
_MOST: Final = 500

Results = list[Error | None]
Stored = Sequence[bool]
Send = Callable[[Sequence[Publication]], Unconfirmed | None]
Sender = Callable[[], Send | None]


class Request:
    """What a task has handed in, and waits for."""

    __slots__ = ("batch", "deadline", "future", "is_over", "is_taken", "loop")

    def __init__(self, batch: Sequence[Publication], deadline: float, loop: AbstractEventLoop) -> None:
        self.batch = batch
        self.deadline = deadline
        self.loop = loop
        self.future: Future[Results] = loop.create_future()
        #: Whether somebody has begun with it; then it may be published.
        self.is_taken = False
        #: Whether nobody waits for it any more.
        self.is_over = False

    def tell(self, outcome: Results | BaseException) -> None:
        """Wake the task up, unless it has been told already; on its loop."""
        if self.future.done():
            return
        if isinstance(outcome, BaseException):
            self.future.set_exception(outcome)
        else:
            self.future.set_result(outcome)


class LoopCommit:
    """Publishes for the tasks of one event loop, in its thread; but for what says otherwise.

    Args:
        commit: Whose rules it goes by.
        sender: Returns what sends publications, as `Backend.send` does; None where nothing does.
        pass_on: Has a request published in another way.
        guard: Runs a step here which nothing must interrupt that calls anything here, or raises. All of them but
            `hand_in` and `finish` go through it by themselves.
    """

    def __init__(
        self, commit: GroupCommit, sender: Sender, pass_on: Callable[[Request], None],
        guard: Callable[[Callable[[], None]], None],
    ) -> None:  # fmt: skip
        self._commit = commit
        self._sender = sender
        self._pass_on = pass_on
        self._guard = guard
        self._waiting: deque[Request] = deque()
        self._groups: set[_Group] = set()
        #: When the last of them was sent.
        self._sent_at = 0.0
        #: Whether those whose messages have been confirmed are about to go on, and may have more.
        self._is_gathering = False
        #: Ends the time that what waits gives to what is on its way.
        self._pause: TimerHandle | None = None
        #: Set once nothing is on its way.
        self._watchers: list[Event] = []

    def hand_in(self, request: Request) -> None:
        """Publish what a task has: at once, or behind what is on its way."""
        self._waiting.append(request)
        if not self._is_gathering:
            self._go_on()

    def take_back(self) -> list[Request]:
        """Return the requests that nobody has begun with: they are the caller's now. Thread-safe."""
        requests = list[Request]()
        while (request := self._next()) is not None:
            requests.append(request)
        return requests

    def runs_elsewhere(self, mine: LoopCommit | None) -> bool:
        """Tell whether there is something on its way which another thread's loop looks after. Thread-safe."""
        return self is not mine and any(group.loop.is_running() for group in list(self._groups))

    def wait(self, until: float) -> None:
        """Wait for what is on its way until then, at most, while the loop runs in another thread. Thread-safe."""
        ended = Event()
        self._watchers.append(ended)
        if self._groups:
            ended.wait(max(0.0, until - monotonic()))

    def finish(self, until: float) -> None:
        """Wait for what is on its way until then, at most, while the loop stands still.

        What has not been sent to its end is passed on.
        """
        for group in list(self._groups):
            # What has arrived may have been read already, if somebody was interrupted then. Where the loop is closed
            # nobody waits there.
            with suppress(RuntimeError):
                if group.is_writing:
                    group.refuse()
                else:
                    group.read()
        while self._groups and (left := until - monotonic()) > 0:
            for group in Lookout(*self._groups).ready(left):
                with suppress(RuntimeError):
                    group.read()

    def _go_on(self) -> None:
        self._is_gathering = False
        while self._waiting:
            pause = self._commit.pause(len(self._groups), monotonic() - self._sent_at)
            if pause != 0.0:
                if pause is not None and self._pause is None:
                    loop = next(iter(self._groups)).loop
                    self._pause = loop.call_later(pause, self._guard, self._end_pause)
                return
            requests = self._gather()
            if requests and not self._leave(requests):
                for request in requests:
                    self._pass_on(request)

    def _end_pause(self) -> None:
        self._pause = None
        self._go_on()

    def _gather(self) -> list[Request]:
        requests = list[Request]()
        size = 0
        queues = set[str]()
        while (request := self._next()) is not None:
            # Else nobody waits for it any more, or the loop has been held up and says so when it goes on.
            if not request.is_over and monotonic() < request.deadline:
                size += len(request.batch)
                if size > _MOST and requests:
                    self._waiting.appendleft(request)
                    break
                requests.append(request)
                queues.add(request.batch[0].queue.id)
        if len(queues) > 1:
            # Those of each together, which is less to do for a broker.
            requests.sort(key=lambda request: request.batch[0].queue.id)
        return requests

    def _next(self) -> Request | None:
        try:
            return self._waiting.popleft()
        except IndexError:
            return None

    def _leave(self, requests: list[Request]) -> bool:
        """Send a group; False where that cannot be, and nothing has been sent."""
        batch = [publication for request in requests for publication in request.batch]
        send = self._sender()
        if send is None or not self._commit.is_ready(batch):
            return False
        try:
            unconfirmed = send(batch)
            if unconfirmed is None:
                return False
            group = _Group(requests, unconfirmed, self._guard, self._end)
        except NotImplementedError:
            # Such a loop does not tell of descriptors. It never will.
            self._sender = no_sender
            return False
        except Exception:
            # Whatever it is, whoever publishes it otherwise finds out, or does not meet it.
            return False
        self._groups.add(group)
        self._sent_at = group.sent_at
        for request in requests:
            request.is_taken = True
        group.write()
        return True

    def _end(self, group: _Group, stored: Stored | None) -> None:
        """Tell the tasks of a group what is stored of it, unless it is given up, and go on."""
        self._groups.discard(group)
        if stored is None:
            self._commit.doubt()
            if group.is_late:
                late = group.unconfirmed.late()
                for request in group.requests:
                    request.tell([late] * len(request.batch))
        else:
            self._tell(group, stored)
        if not self._groups:
            while self._watchers:
                self._watchers.pop().set()
            if self._pause is not None:
                self._pause.cancel()
                self._pause = None
        if self._waiting or len(group.requests) > 1:
            # Behind them, so that what they publish next goes together.
            self._is_gathering = True
            group.loop.call_soon(self._guard, self._go_on)

    def _tell(self, group: _Group, stored: Stored) -> None:
        if all(stored):
            self._commit.learn(monotonic() - group.sent_at, len(stored))
        start = 0
        for request in group.requests:
            end = start + len(request.batch)
            if all(stored[start:end]):
                request.tell([None] * len(request.batch))
            elif not request.is_over:
                self._pass_on(request)
            start = end


class _Group:
    """Requests that go together, until they have been answered.

    Raises:
        NotImplementedError: If the loop cannot say when there is an answer.
    """

    __slots__ = (
        "_ended", "_fd", "_guard", "_is_over", "_timer", "is_late", "is_writing", "loop", "requests", "sent_at",
        "unconfirmed",
    )  # fmt: skip

    def __init__(
        self, requests: list[Request], unconfirmed: Unconfirmed, guard: Callable[[Callable[[], None]], None],
        ended: Callable[[_Group, Stored | None], None],
    ) -> None:  # fmt: skip
        self.requests = requests
        self.unconfirmed = unconfirmed
        self.loop = requests[0].loop
        self.is_writing = False
        self.sent_at = monotonic()
        self._guard = guard
        self._ended = ended
        self._is_over = False
        self._fd = unconfirmed.fileno()
        try:
            self.loop.add_reader(self._fd, guard, self.read)
            left = max(request.deadline for request in requests) - self.sent_at
            # Else each is told when its own time is over.
            self.is_late = unconfirmed.timeout <= left
            self._timer = self.loop.call_later(min(left, unconfirmed.timeout), guard, self._give_up)
        except NotImplementedError:
            unconfirmed.close()
            raise
        except BaseException:
            self.loop.remove_reader(self._fd)
            unconfirmed.close()
            raise

    def fileno(self) -> int:
        return self._fd

    def write(self) -> None:
        """Send what there is room for, and the rest when there is."""
        is_writing = not self.unconfirmed.write()
        if is_writing and not self.is_writing:
            self.loop.add_writer(self._fd, self._guard, self.write)
        elif self.is_writing and not is_writing:
            self.loop.remove_writer(self._fd)
        self.is_writing = is_writing

    def read(self) -> None:
        """End it, if it has been answered."""
        stored = self.unconfirmed.confirm()
        if stored is not None:
            self._end(stored)

    def refuse(self) -> None:
        """End it as if nothing were stored."""
        self._end([False] * sum(len(request.batch) for request in self.requests))

    def _give_up(self) -> None:
        self._end(None)

    def _end(self, stored: Stored | None) -> None:
        # Somebody may have been interrupted in the middle of this, and meets it again.
        if self._is_over:
            return
        self._is_over = True
        self._timer.cancel()
        self.loop.remove_reader(self._fd)
        if self.is_writing:
            self.loop.remove_writer(self._fd)
        self.unconfirmed.close()
        self._ended(self, stored)


def no_sender() -> None:
    """Be a `Sender` where nothing sends."""
