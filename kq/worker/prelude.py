"""Signals to a worker that does not listen to any yet: its app is being loaded, which may take a while."""

from __future__ import annotations

import logging
import os
import signal
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import current_thread, main_thread
from types import FrameType

from kq.worker.process import FOR_SUPERVISOR

logger = logging.getLogger("kq.worker")


class Stopped(BaseException):
    """Raised where TERM or INT finds the main thread: nothing runs yet, so the end is all there is to do.

    No ``except Exception`` of a module that is being imported swallows it.
    """


class Prelude:
    """What signals have asked for until somebody does it."""

    def __init__(self) -> None:
        self._pid = os.getpid()
        self._is_over = False
        self._is_outdated = False
        self._reload: Callable[[], None] | None = None
        #: What is done about signals after this, where it is not what was done before.
        self.after: dict[int, signal.Handlers] = {}

    def close_ears(self, *, restart: bool) -> None:
        """Have signals passed over from the end of this on, for there is nothing left to be done.

        Args:
            restart: Whether the program is to be changed, which being ignored outlives: TERM and INT then end it.
        """
        still = {signal.SIGTERM, signal.SIGINT} if restart else set()
        self.after = dict.fromkeys(FOR_SUPERVISOR - still, signal.SIG_IGN)

    def hand_over(self, reload: Callable[[], None]) -> None:
        """Have HUP done by ``reload`` from now on; at once, where there was one.

        Raises:
            Stopped: Where it was raised before, and something has swallowed it.
        """
        if self._is_over:
            raise Stopped
        self._reload = reload
        if self._is_outdated:
            reload()

    def hear(self, number: int, frame: FrameType | None) -> None:
        """Handle a signal."""
        if os.getpid() != self._pid:
            # What the app has forked while it was loaded is on its own.
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        elif number in (signal.SIGTERM, signal.SIGINT):
            self._is_over = True
            raise Stopped
        elif number == signal.SIGHUP:
            # What has been read by now may be old.
            self._is_outdated = True
            if self._reload is not None:
                self._reload()
        else:
            self._dump(frame)

    @staticmethod
    def _dump(frame: FrameType | None) -> None:
        where = "".join(traceback.format_stack(frame))
        logger.warning("nothing runs yet; the worker is at\n%s", where, extra={"action": "dump"})


@contextmanager
def prelude() -> Iterator[Prelude]:
    """Listen to signals until the block ends, in the main thread; whoever listens meanwhile gives them back.

    Raises:
        Stopped: In the block, at any place, on TERM and INT.
    """
    made = Prelude()
    before = {}
    if current_thread() is main_thread():
        before = {number: signal.signal(number, made.hear) for number in FOR_SUPERVISOR}
    try:
        yield made
    finally:
        for number, handler in before.items():
            signal.signal(number, made.after.get(number, signal.SIG_DFL if handler is None else handler))
