"""Group commit on an event loop: what its tasks publish is sent from the loop, which says when there is an answer.

While nothing is on its way, a message is sent at once; those that tasks hand in meanwhile form the next group, as with
`kq.group_commit`. Nobody pays for a change of threads, and the loop is never blocked. It takes a broker that can be
sent something without waiting (`Backend.send`); whatever else comes in between is passed on, to threads.
"""

from __future__ import annotations

from asyncio import AbstractEventLoop, Future
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from time import monotonic
from typing import Final

from kq.backend import Publication, Unconfirmed
from kq.errors import Error
from kq.group_commit import GroupCommit
from kq.shield import deferring
from kq.waker import Lookout

#: Publications that one group carries at most, as long as the next request does not go beyond it by itself.
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
    """Publishes for the tasks of one event loop, in its thread; but for `take_back`, which anybody may call.

    Args:
        commit: Whose rules it goes by.
        sender: Returns what sends publications, as `Backend.send` does; None where nothing does.
        pass_on: Has a request published in another way.
    """

    def __init__(self, commit: GroupCommit, sender: Sender, pass_on: Callable[[Request], None]) -> None:
        self._commit = commit
        self._sender = sender
        self._pass_on = pass_on
        self._waiting: deque[Request] = deque()
        self._groups: set[_Group] = set()
        #: When the last of them was sent.
        self._sent_at = 0.0
        #: Whether those whose messages have been confirmed are about to go on, and may have more.
        self._is_gathering = False

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

    def finish(self, until: float) -> None:
        """Wait for what is on its way until then, at most, while the loop stands still.

        What has not been sent to its end is passed on.
        """
        with suppress(RuntimeError):
            for group in [group for group in self._groups if group.is_writing]:
                group.refuse()
        while self._groups and (left := until - monotonic()) > 0:
            ready = Lookout(*self._groups).ready(left)
            # Closed: nobody waits there.
            with suppress(RuntimeError):
                for group in ready:
                    group.read()

    def _go_on(self) -> None:
        self._is_gathering = False
        while self._waiting:
            if self._groups and len(self._groups) >= self._commit.ways(monotonic() - self._sent_at):
                return
            requests = self._gather()
            if requests and not self._leave(requests):
                for request in requests:
                    self._pass_on(request)

    def _gather(self) -> list[Request]:
        requests = list[Request]()
        size = 0
        queues = set[str]()
        while size < _MOST and (request := self._next()) is not None:
            # Else nobody waits for it any more, or the loop has been held up and says so when it goes on.
            if not request.is_over and monotonic() < request.deadline:
                requests.append(request)
                size += len(request.batch)
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
        """Send a group; False where that cannot be."""
        batch = [publication for request in requests for publication in request.batch]
        # A time limit in the middle would have the loop read from a connection that is somebody else's by then.
        with deferring():
            send = self._sender()
            if send is None or not self._commit.is_ready(batch):
                return False
            try:
                unconfirmed = send(batch)
            except Error:
                return False
            if unconfirmed is None:
                return False
            for request in requests:
                request.is_taken = True
            try:
                self._groups.add(_Group(requests, unconfirmed, self._end))
            except NotImplementedError:
                # Such a loop does not tell of descriptors. It never will.
                self._sender = no_sender
                unconfirmed.close()
                return False
            self._sent_at = monotonic()
        return True

    def _end(self, group: _Group, stored: Stored | None) -> None:
        """Tell the tasks of a group what is stored of it, unless it is given up, and go on."""
        self._groups.discard(group)
        if stored is not None:
            self._tell(group, stored)
        if self._waiting or len(group.requests) > 1:
            # Behind them, so that what they publish next goes together.
            self._is_gathering = True
            group.loop.call_soon(self._go_on)

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
    """Requests that have been sent, and not been answered."""

    __slots__ = ("_ended", "_fd", "_timer", "_unconfirmed", "is_writing", "loop", "requests", "sent_at")

    def __init__(self, requests: list[Request], unconfirmed: Unconfirmed, ended: Ended) -> None:
        self._ended = ended
        self._unconfirmed = unconfirmed
        self._fd = unconfirmed.fileno()
        self.requests = requests
        self.loop = requests[0].loop
        self.loop.add_reader(self._fd, self.read)
        self.is_writing = not unconfirmed.write()
        if self.is_writing:
            self.loop.add_writer(self._fd, self._write)
        self.sent_at = monotonic()
        # Each is told when its own time is over.
        last = max(request.deadline for request in requests)
        self._timer = self.loop.call_later(last - self.sent_at, self._give_up)

    def fileno(self) -> int:
        return self._fd

    def read(self) -> None:
        with deferring():
            stored = self._unconfirmed.confirm()
            if stored is not None:
                self._end(stored)

    def refuse(self) -> None:
        self._end([False] * sum(len(request.batch) for request in self.requests))

    def _write(self) -> None:
        with deferring():
            if self._unconfirmed.write():
                self._stop_writing()

    def _stop_writing(self) -> None:
        self.is_writing = False
        self.loop.remove_writer(self._fd)

    def _give_up(self) -> None:
        with deferring():
            self._end(None)

    def _end(self, stored: Stored | None) -> None:
        self._timer.cancel()
        self.loop.remove_reader(self._fd)
        if self.is_writing:
            self._stop_writing()
        self._unconfirmed.close()
        self._ended(self, stored)


Ended = Callable[[_Group, "Stored | None"], None]


def no_sender() -> None:
    """Be a `Sender` where nothing sends."""
