"""What a task has handed in to be published, and waits for: on its loop, or by a thread."""

from __future__ import annotations

from asyncio import AbstractEventLoop, Future, TimerHandle
from collections.abc import Sequence
from time import monotonic

from kq.backend import SEND_BYTES, SEND_LONG, SEND_MOST, Publication
from kq.errors import Error
from kq.group_commit import late
from kq.shield import deferring

Results = list[Error | None]


class Request:
    """What a task has handed in, and waits for."""

    __slots__ = ("_known", "_timer", "batch", "deadline", "future", "is_over", "is_taken", "loop", "size")

    def __init__(self, batch: Sequence[Publication], deadline: float, loop: AbstractEventLoop) -> None:
        self.batch = batch
        self.deadline = deadline
        self.loop = loop
        self.future: Future[Results] = loop.create_future()
        #: Bytes of all bodies.
        self.size = sum(len(publication.envelope.body) for publication in batch)
        #: Whether somebody has begun with it; then it may be published.
        self.is_taken = False
        #: Whether nobody waits for it any more.
        self.is_over = False
        #: What is known of the messages that were handed in; False for those of the batch, which are left.
        self._known: Sequence[bool | Error] | None = None
        self._timer: TimerHandle | None = None

    @property
    def may_be_sent(self) -> bool:
        """Whether `Backend.send` takes it."""
        if len(self.batch) > SEND_MOST or self.size > SEND_BYTES:
            return False
        return self.size <= SEND_LONG or all(len(one.envelope.body) <= SEND_LONG for one in self.batch)

    def has_rest(self, answers: Sequence[bool | Error]) -> bool:
        """Take note of what is known of the batch, and keep what is left of it: nothing is stored twice for the others.

        Args:
            answers: As `kq.backend.Unconfirmed.confirm` returns them, of a batch that is whole.
        """
        self._known = answers
        self.batch = [one for one, answer in zip(self.batch, answers, strict=True) if answer is False]
        return bool(self.batch)

    def arm(self) -> None:
        """Have the task told once its time is over, unless it is before; on its loop."""
        if self._timer is None and not self.future.done():
            self._timer = self.loop.call_later(self.deadline - monotonic(), self._expire)

    def leave(self) -> None:
        """Say that nobody waits for it any more; on its loop."""
        self.is_over = True
        if self._timer is not None:
            self._timer.cancel()

    def tell(self, outcome: Results | BaseException) -> None:
        """Wake the task up, unless it has been told already; on its loop.

        Args:
            outcome: A result for each message of the batch, or what to raise.
        """
        if self.future.done():
            return
        if self._known is None:
            if isinstance(outcome, BaseException):
                self.future.set_exception(outcome)
            else:
                self.future.set_result(outcome)
        elif isinstance(outcome, BaseException) and not isinstance(outcome, Error):
            self.future.set_exception(outcome)
        else:
            # What is stored of it stays so, whatever comes of the rest.
            rest = iter([outcome] * len(self.batch) if isinstance(outcome, Error) else outcome)
            results = [next(rest) if answer is False else answer for answer in self._known]
            self.future.set_result([None if answer is True else answer for answer in results])

    def _expire(self) -> None:
        if self.future.done():
            return
        with deferring():
            self.is_over = True
            self.tell([late(is_taken=self.is_taken)] * len(self.batch))
