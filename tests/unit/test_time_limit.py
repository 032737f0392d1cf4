"""Time limits of async handlers beside each other on one event loop."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Coroutine
from time import monotonic, sleep
from typing import Any

import pytest

from kq.worker.event_loop import _stack
from kq.worker.time_limit import TimeLimit


def hold(seconds: float) -> None:
    """Block the loop, as one does by mistake."""
    sleep(seconds)


class Ran:
    """How a coroutine fared under a limit."""

    def __init__(self, coroutine: Coroutine[Any, Any, Any], seconds: float) -> None:
        self.coroutine = coroutine
        self.seconds = seconds
        self.result: Any = None
        self.moved: list[float] = []
        self.strikes = 0
        self.limit: TimeLimit[Any]

    def strike(self) -> None:
        self.strikes += 1

    async def run(self) -> Ran:
        self.limit = TimeLimit(self.coroutine, self.seconds, on_strike=self.strike, on_moved=self.moved.append)
        try:
            self.result = await self.limit
        except asyncio.CancelledError as error:
            self.result = error
        return self


async def block(seconds: float) -> str:
    hold(seconds)
    return "blocked"


async def rest(seconds: float) -> str:
    await asyncio.sleep(seconds)
    return "rested"


def together(*limited: tuple[Coroutine[Any, Any, Any], float]) -> list[Ran]:
    """Run coroutines at the same time, each with its limit."""

    async def main() -> list[Ran]:
        return list(await asyncio.gather(*(Ran(*one).run() for one in limited)))

    return asyncio.run(main())


def test_what_ends_in_time_is_left_alone() -> None:
    """With its result, and without a timer that strikes afterwards."""

    async def main() -> None:
        ran = await Ran(rest(0.01), 0.05).run()
        await asyncio.sleep(0.1)
        assert (ran.result, ran.strikes, ran.moved) == ("rested", 0, [])
        assert (ran.limit.has_struck, ran.limit.has_overrun) == (False, False)

    asyncio.run(main())


def test_what_takes_longer_is_cancelled() -> None:
    """On time, whatever it makes of it."""

    async def stubborn() -> str:
        try:
            await asyncio.sleep(10)
        except asyncio.CancelledError:
            return "went on"
        return "rested"

    began = monotonic()
    late, deaf = together((rest(10), 0.05), (stubborn(), 0.05))
    assert monotonic() - began < 5
    assert isinstance(late.result, asyncio.CancelledError)
    assert deaf.result == "went on"
    for ran in (late, deaf):
        assert ran.limit.has_struck
        assert (ran.strikes, ran.moved) == (1, [])


def test_who_blocks_the_loop_is_late_and_nobody_else() -> None:
    """The limits of all pass meanwhile; the others are given the time that they have lost."""
    innocent, waiting, guilty = together((rest(0.2), 0.3), (rest(0.4), 0.3), (block(0.6), 0.3))
    assert (guilty.result, guilty.limit.has_overrun, guilty.limit.has_struck) == ("blocked", True, False)
    for ran in (innocent, waiting):
        assert ran.result == "rested"
        assert (ran.limit.has_struck, ran.limit.has_overrun) == (False, False)
    # By as much as the loop was late, and as much again.
    assert sum(waiting.moved) == pytest.approx(0.6, abs=0.3)


def test_who_blocks_the_loop_and_goes_on_is_struck() -> None:
    """Its limit fell into a step of its own: it has lost nothing."""

    async def block_and_rest() -> str:
        await asyncio.sleep(0)
        hold(0.2)
        return await rest(10)

    (guilty,) = together((block_and_rest(), 0.1))
    assert isinstance(guilty.result, asyncio.CancelledError)
    assert guilty.limit.has_struck
    assert guilty.moved == []


def test_a_step_in_between_hides_nothing() -> None:
    """Whoever blocks the loop and takes another step before anybody looks has overrun all the same."""

    async def work() -> None:
        while True:
            hold(0.15)
            await asyncio.sleep(0)

    async def block_in_a_task() -> None:
        await asyncio.create_task(block(0.3))

    busy, indirect = (together((coroutine, 0.1))[0] for coroutine in (work(), block_in_a_task()))
    assert busy.limit.has_struck
    assert busy.moved == []
    assert indirect.limit.has_overrun or indirect.limit.has_struck


def test_nobody_is_given_more_than_its_limit_again() -> None:
    """However often the loop is blocked by what no limit is known of: such as tasks that a handler has started."""

    async def main() -> Ran:
        async def hog() -> None:
            while True:
                hold(0.1)
                await asyncio.sleep(0)

        hogging = asyncio.create_task(hog())
        try:
            return await Ran(rest(20), 0.2).run()
        finally:
            hogging.cancel()

    began = monotonic()
    ran = asyncio.run(main())
    took = monotonic() - began
    assert ran.limit.has_struck
    # What its worker goes by is what it goes by itself: it is struck when that is over, and the loop has a moment.
    assert sum(ran.moved) > 0
    assert 0.2 + sum(ran.moved) <= took + 0.01
    assert took < 0.2 + sum(ran.moved) + 1.0
    assert took < 3


def test_exceptions_pass_both_ways() -> None:
    """What the coroutine raises, what is thrown into it, and what it awaits."""

    async def fail() -> None:
        await asyncio.sleep(0)
        raise LookupError("gone")

    async def main() -> None:
        with pytest.raises(LookupError, match="gone"):
            await Ran(fail(), 1.0).run()
        ended: list[str] = []

        async def long() -> None:
            try:
                await asyncio.sleep(10)
            finally:
                ended.append("cleaned up")

        task = asyncio.create_task(Ran(long(), 10.0).run())
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        task.cancel()
        ran = await task
        assert isinstance(ran.result, asyncio.CancelledError)
        assert (ended, ran.limit.has_struck) == (["cleaned up"], False)

        async def fail_inside() -> str:
            try:
                await fail()
            except LookupError:
                return "caught"
            return "not"

        assert (await Ran(fail_inside(), 1.0).run()).result == "caught"

    asyncio.run(main())


def test_the_stack_of_what_is_limited_is_shown() -> None:
    """Also behind the limit, whose frame knows nothing of what it drives."""

    async def main() -> None:
        task = asyncio.create_task(Ran(rest(10), 10.0).run())
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        names = [frame.name for frame in _stack(task)]
        assert names[:3] == ["run", "__await__", "rest"]
        task.cancel()
        await task

    asyncio.run(main())


def test_one_that_is_dropped_is_closed() -> None:
    """As where a loop ends before it does."""
    closed: list[str] = []

    async def wait() -> None:
        try:
            await asyncio.Future()
        finally:
            closed.append("closed")

    async def main() -> None:
        ran = Ran(wait(), 10.0).run()
        ran.send(None)
        ran.close()
        gc.collect()

    asyncio.run(main())
    assert closed == ["closed"]
