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


@pytest.mark.parametrize("close", [False, True])
def test_a_worker_that_starts_anew_hears_nothing_in_between(close: bool) -> None:
    """A HUP before the new program listens would end it."""
    before = signal.getsignal(signal.SIGHUP)
    try:
        with prelude() as signals:
            if close:
                signals.close_ears()
        assert signal.getsignal(signal.SIGHUP) == (signal.SIG_IGN if close else before)
        assert signal.getsignal(signal.SIGTERM) not in (signal.SIG_IGN, None)
    finally:
        for number in (signal.SIGHUP, signal.SIGUSR1):
            signal.signal(number, signal.SIG_DFL if before is None else before)
