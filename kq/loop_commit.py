"""Group commit on an event loop: what its tasks publish is sent from the loop, which says when there is an answer.

While nothing is on its way, a message is sent at once; those that tasks hand in meanwhile form the next group, as with
`kq.group_commit`. Nobody pays for a change of threads, and the loop is never blocked. It takes a broker that can be
sent something without waiting (`Backend.send`); whatever else comes in between is passed on, to threads.
"""

from __future__ import annotations

from asyncio import AbstractEventLoop, TimerHandle
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from selectors import EVENT_READ, EVENT_WRITE, DefaultSelector
from threading import Event
from time import monotonic
from typing import Final, TypeVar

from kq.async_request import Request
from kq.backend import SEND_BYTES, SEND_MOST, Publication, Unconfirmed
from kq.errors import Error
from kq.group_commit import GroupCommit, late, length

#: Seconds after which whoever was to go on with what waits has been interrupted before it began.
_GATHERS: Final = 0.05
#: Seconds after which it is looked again whether another thread's loop still runs.
_LOOK_AGAIN: Final = 0.05

_T = TypeVar("_T")

Stored = Sequence[bool | Error]
Send = Callable[[Sequence[Publication]], Unconfirmed | None]
Sender = Callable[[], Send | None]


class LoopCommit:
    """Publishes for the tasks of one event loop, in its thread; but for what says otherwise.

    Args:
        commit: Whose rules it goes by.
        sender: Returns what sends publications, as `Backend.send` does; None where nothing does.
        pass_on: Has a request published in another way.
        guard: Runs a step here, which nothing must interrupt that calls anything here, or raises. Those that the loop
            calls go through it by themselves.
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
        #: Until when those whose messages have been confirmed may be about to go on, and have more.
        self._gathers_until = 0.0
        #: Ends the time that what waits gives to what is on its way.
        self._pause: TimerHandle | None = None
        #: Set once nothing is on its way.
        self._watchers: list[Event] = []
        #: One that has ended just now, whose way is kept for those who are told, until the loop's next round is over.
        #: Whoever takes it out has it: that may be another thread, where this loop stands still.
        self._kept: deque[_Group] = deque()

    def hand_in(self, request: Request) -> None:
        """Publish what a task has: at once, or behind what is on its way."""
        if not request.may_be_sent:
            self._pass_on(request)
        elif self._groups or self._waiting or self._gathers_until:
            self._waiting.append(request)
            if monotonic() >= self._gathers_until:
                self._go_on()
        elif not self._leave([request]):
            self._pass_on(request)

    def take_back(self) -> list[Request]:
        """Return the requests that nobody has begun with: they are the caller's now. Thread-safe."""
        requests = list[Request]()
        while (request := _pop(self._waiting)) is not None:
            requests.append(request)
        return requests

    def wait(self, here: AbstractEventLoop | None, until: float) -> None:
        """Wait for what is on its way until then, at most: others' loops, that run, look after it, or this does.

        Thread-safe.

        Args:
            here: The loop that runs in the calling thread, and stands still meanwhile.
            until: As of `monotonic`.
        """
        while (groups := list(self._groups)) and (left := until - monotonic()) > 0:
            if any(group.loop is not here and group.loop.is_running() for group in groups):
                ended = Event()
                self._watchers.append(ended)
                if self._groups:
                    ended.wait(min(left, _LOOK_AGAIN))
                continue
            for group in groups:
                # A loop that is closed takes nothing more, and nobody waits there.
                with suppress(RuntimeError):
                    group.proceed()
            groups = [group for group in groups if group in self._groups]
            if groups:
                left = max(0.0, min([until, *(group.until for group in groups)]) - monotonic())
                # Another thread may have its loop go on at any time.
                _look(groups, left if all(group.loop is here for group in groups) else min(left, _LOOK_AGAIN))
        if any(kept.loop is here or not kept.loop.is_running() for kept in list(self._kept)):
            self._let_go()

    def _go_on(self) -> None:
        self._gathers_until = 0.0
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
        number = size = 0
        queues = set[str]()
        while (request := _pop(self._waiting)) is not None:
            # Else nobody waits for it any more, or the loop has been held up and says so when it goes on.
            if not request.is_over and monotonic() < request.deadline:
                number += len(request.batch)
                size += request.size
                if requests and (number > SEND_MOST or size > SEND_BYTES):
                    self._waiting.appendleft(request)
                    break
                requests.append(request)
                queues.add(request.batch[0].queue.id)
        if len(queues) > 1:
            # Those of each together, which is less to do for a broker.
            requests.sort(key=lambda request: request.batch[0].queue.id)
        return requests

    def _leave(self, requests: list[Request]) -> bool:
        """Send a group; False where that cannot be, and nothing has been sent."""
        if len(requests) == 1:
            batch = requests[0].batch
        else:
            batch = [publication for request in requests for publication in request.batch]
        send = self._sender()
        if send is None or not self._commit.is_ready(batch):
            return False
        ear: _Ear | None = None
        try:
            kept = _pop(self._kept)
            if kept is not None:
                # What is sent now takes the way that has just become free, which the loop watches already.
                ear = kept.ear
                kept.unconfirmed.close()
            unconfirmed = send(batch)
            if unconfirmed is None:
                return False
            for request in requests:
                request.is_taken = True
            if ear is not None and unconfirmed.way is not ear.way:
                # Another thread was quicker, or that one is no good any more. First of all: the new one may have its
                # number.
                ear.close()
                ear = None
            mine, ear = ear or _Ear(requests[0].loop, unconfirmed, self._guard), None
            group = _Group(requests, unconfirmed, mine, self._guard, self._end)
        except NotImplementedError:
            # Such a loop does not tell of descriptors. It never will.
            self._sender = no_sender
            return False
        except Exception:
            # Whatever it is, whoever publishes it otherwise finds out, or does not meet it.
            return False
        finally:
            if ear is not None:
                ear.close()
        self._groups.add(group)
        self._sent_at = group.sent_at
        return True

    def _end(self, group: _Group, stored: Stored | None) -> None:
        """Tell the tasks of a group what is stored of it, or that it is given up, and go on."""
        is_all = stored is not None and stored.count(True) == len(stored)
        try:
            if stored is None:
                error = group.unconfirmed.late() if group.is_late else late(is_taken=True)
                stored = [error if answer is None else answer for answer in group.unconfirmed.known()]
            self._tell(group, stored, is_all=is_all)
        finally:
            self._groups.discard(group)
            is_kept = not self._kept and is_all and group.loop.is_running()
            if is_kept:
                self._kept.append(group)
            else:
                group.release()
            if not self._groups:
                while self._watchers:
                    self._watchers.pop().set()
                if self._pause is not None:
                    self._pause.cancel()
                    self._pause = None
            if self._waiting or len(group.requests) > 1:
                # Behind them, so that what they publish next goes together.
                group.loop.call_soon(self._guard, self._go_on)
                self._gathers_until = monotonic() + _GATHERS
            if is_kept:
                group.loop.call_soon(self._guard, self._let_go)

    def _let_go(self) -> None:
        """Give up a way that nobody has taken in the round that it was kept for."""
        kept = _pop(self._kept)
        if kept is not None:
            kept.release()

    def _tell(self, group: _Group, stored: Stored, *, is_all: bool) -> None:
        took = monotonic() - group.sent_at
        # A loop that is busy finds everything to take long.
        if is_all and length(took, len(stored)) <= 1:
            self._commit.learn(took, len(stored))
        if not is_all and any(isinstance(answer, Error) for answer in stored):
            # What the broker says is wrong with it is so for everybody.
            self._commit.doubt()
        start = 0
        for request in group.requests:
            end = start + len(request.batch)
            if not is_all and request.has_rest(stored[start:end]):
                if not request.is_over:
                    self._pass_on(request)
            else:
                # Closed: nobody waits there.
                with suppress(RuntimeError):
                    request.tell([None] * len(request.batch))
            start = end


class _Ear:
    """What a loop calls when there is an answer; for one group after another, for it costs as much as to send one.

    Raises:
        NotImplementedError: If the loop cannot say when there is an answer.
    """

    __slots__ = ("_loop", "fd", "group", "way")

    def __init__(
        self, loop: AbstractEventLoop, unconfirmed: Unconfirmed, guard: Callable[[Callable[[], None]], None]
    ) -> None:  # fmt: skip
        self._loop = loop
        self.way = unconfirmed.way
        self.fd = unconfirmed.fileno()
        self.group: _Group | None = None
        try:
            loop.add_reader(self.fd, guard, self._hear)
        except NotImplementedError:
            unconfirmed.close()
            raise
        except BaseException:
            loop.remove_reader(self.fd)
            unconfirmed.close()
            raise

    def close(self) -> None:
        # A loop that is closed watches nothing any more.
        with suppress(RuntimeError):
            self._loop.remove_reader(self.fd)

    def _hear(self) -> None:
        # Whoever has ended may have given its connection to somebody else by now.
        if self.group is not None:
            self.group.read()


class _Group:
    """Requests that go together, until they have been answered, and the way that they went is released."""

    __slots__ = (
        "_ended", "_guard", "_is_over", "_timer", "ear", "is_late", "is_writing", "loop", "requests", "sent_at",
        "unconfirmed", "until",
    )  # fmt: skip

    def __init__(
        self, requests: list[Request], unconfirmed: Unconfirmed, ear: _Ear,
        guard: Callable[[Callable[[], None]], None], ended: Callable[[_Group, Stored | None], None],
    ) -> None:  # fmt: skip
        self.requests = requests
        self.unconfirmed = unconfirmed
        self.ear = ear
        self.loop = requests[0].loop
        self.is_writing = False
        self.sent_at = monotonic()
        # Those that have had to wait have less time, and are told when that is over.
        last = max([request.deadline for request in requests])
        self.until = min(last, self.sent_at + unconfirmed.timeout)
        #: Whether it is given up because the broker has taken too long, and not because there is no time.
        self.is_late = self.until < last
        self._guard = guard
        self._ended = ended
        self._is_over = False
        ear.group = self
        try:
            # As early as may be: the broker works while the rest is done here.
            self._write()
            self._timer = self.loop.call_later(self.until - self.sent_at, guard, self._give_up)
        except BaseException:
            ear.group = None
            if self.is_writing:
                self.loop.remove_writer(ear.fd)
            self.release()
            raise

    def fileno(self) -> int:
        return self.ear.fd

    def release(self) -> None:
        """Give up the way that it went."""
        self.ear.close()
        self.unconfirmed.close()

    def proceed(self) -> None:
        """Do what the loop would do if it ran, as far as that can be done."""
        if self.is_writing:
            self._write()
        self.read()
        if self.until <= monotonic():
            self._give_up()

    def _write(self) -> None:
        if self._is_over:
            return
        is_writing = not self.unconfirmed.write()
        if is_writing and not self.is_writing:
            self.loop.add_writer(self.ear.fd, self._guard, self._write)
        elif self.is_writing and not is_writing:
            self.loop.remove_writer(self.ear.fd)
        self.is_writing = is_writing

    def read(self) -> None:
        """Read what has been answered."""
        if self._is_over:
            return
        stored = self.unconfirmed.confirm()
        if stored is not None:
            self._end(stored)

    def _give_up(self) -> None:
        try:
            # A loop that has been held up may come to this first.
            self.read()
        finally:
            self._end(None)

    def _end(self, stored: Stored | None) -> None:
        # Somebody may have been interrupted in the middle of this, and meets it again.
        if self._is_over:
            return
        self._is_over = True
        self.ear.group = None
        try:
            self._timer.cancel()
            if self.is_writing:
                # Whoever has broken the connection may have closed it.
                with suppress(OSError):
                    self.loop.remove_writer(self.ear.fd)
        finally:
            self._ended(self, stored)


def _look(groups: Sequence[_Group], timeout: float) -> None:
    """Wait until there is something to do for one of several groups."""
    with DefaultSelector() as selector:
        for group in groups:
            # Ended meanwhile.
            with suppress(OSError, KeyError, ValueError):
                selector.register(group, EVENT_READ | (EVENT_WRITE if group.is_writing else 0))
        selector.select(timeout)


def _pop(queue: deque[_T]) -> _T | None:
    """Return the first of a queue, if there is one: other threads may take it as well."""
    try:
        return queue.popleft()
    except IndexError:
        return None


def no_sender() -> None:
    """Be a `Sender` where nothing sends."""
