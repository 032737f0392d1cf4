from __future__ import annotations

import signal
import sys
from time import monotonic
from types import FrameType
from typing import Any

import pytest

from kq.worker.order import Order
from kq.worker.prelude import prelude


def test_an_order_ends_the_wait_for_it() -> None:
    """Also if a signal's handler gives it, in the thread that waits, or has just given it."""
    order = Order()

    def give(number: int, frame: object) -> None:
        order.set()

    before = signal.signal(signal.SIGALRM, give)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.01)
        began = monotonic()
        order.wait(60.0)
        order.wait(60.0)
        assert monotonic() - began < 30
        assert order.is_set()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def test_an_order_may_be_given_in_the_middle_of_giving_it() -> None:
    """By a signal's handler, which strikes at any line: what has a lock that is not its thread's own stands still."""
    order = Order()
    struck = 0

    def strike(frame: FrameType, event: str, argument: object) -> Any:
        nonlocal struck
        if event == "line" and frame.f_code.co_name == "set":
            struck += 1
            order.set()
        return strike

    before = sys.gettrace()
    sys.settrace(strike)
    try:
        order.set()
    finally:
        sys.settrace(before)
    assert struck >= 2
    assert order.is_set()


def test_an_order_that_is_taken_back_is_waited_for() -> None:
    """A worker may be started again."""
    order = Order()
    order.set()
    order.clear()
    assert not order.is_set()
    began = monotonic()
    order.wait(0.05)
    assert monotonic() - began >= 0.05


@pytest.mark.parametrize("restart", [None, False, True])
def test_a_worker_that_is_done_hears_nothing_more(restart: bool | None) -> None:
    """A HUP would end the program that comes next before it listens, a second TERM or INT the one that has stopped."""
    numbers = (signal.SIGHUP, signal.SIGUSR1, signal.SIGTERM, signal.SIGINT)
    before = {number: signal.getsignal(number) for number in numbers}
    try:
        for number in numbers:
            # Whoever runs this may have it ignore some of them.
            signal.signal(number, signal.SIG_DFL)
        with prelude() as signals:
            if restart is not None:
                signals.close_ears(restart=restart)
        ignored = [number for number in numbers if signal.getsignal(number) == signal.SIG_IGN]
        assert ignored == list(numbers[: {None: 0, False: 4, True: 2}[restart]])
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
