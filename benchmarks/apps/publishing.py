"""What every contender can do to publish."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import TYPE_CHECKING, Any, Final, NamedTuple

if TYPE_CHECKING:
    from asyncio import AbstractEventLoop

Payload = dict[str, Any]

#: Publishes that one event loop has under way at most, and threads that publish at once.
TOGETHER: Final = 50
THREADS: Final = 16


class Publisher(NamedTuple):
    """How a contender publishes.

    Attributes:
        one: Publishes one message, and returns when the contender says that it is published.
        many: Publishes several in the fastest way that the contender offers.
        later: Publishes several to be run after so many seconds, where the contender can.
        tasks: Publishes several from so many tasks of an event loop, each one at a time, where the contender can.
    """

    one: Callable[[Payload], object]
    many: Callable[[Sequence[Payload]], object]
    later: Callable[[Sequence[Payload], float], object] | None = None
    tasks: Callable[[Sequence[Payload], int], object] | None = None

    def threads(self, payloads: Sequence[Payload], number: int) -> None:
        """Publish several from so many threads, each one at a time."""
        # Only here, as below.
        from concurrent.futures import ThreadPoolExecutor

        with ThreadPoolExecutor(number) as threads:
            # Each takes the next one as soon as it is done with one.
            for result in [threads.submit(self.one, payload) for payload in payloads]:
                result.result()


def one_by_one(one: Callable[[Payload], object], later: Callable[[Payload, float], object] | None = None) -> Publisher:
    """Return a publisher for who knows no other way."""

    def many(payloads: Sequence[Payload]) -> None:
        for payload in payloads:
            one(payload)

    def delayed(payloads: Sequence[Payload], delay: float) -> None:
        assert later is not None
        for payload in payloads:
            later(payload, delay)

    return Publisher(one, many, None if later is None else delayed)


def concurrently(loop: AbstractEventLoop, publish: Callable[[Payload], Awaitable[object]]) -> Publisher:
    """Return a publisher that has many calls under way on one event loop."""
    # Only here: who publishes otherwise is not to pay for it.
    from asyncio import gather

    async def all_of(payloads: Sequence[Payload]) -> None:
        for start in range(0, len(payloads), TOGETHER):
            await gather(*(publish(payload) for payload in payloads[start : start + TOGETHER]))

    async def single(payload: Payload) -> None:
        await publish(payload)

    return Publisher(
        lambda payload: loop.run_until_complete(single(payload)),
        lambda payloads: loop.run_until_complete(all_of(payloads)),
        tasks=lambda payloads, number: loop.run_until_complete(from_tasks(publish, payloads, number)),
    )


async def from_tasks(publish: Callable[[Payload], Awaitable[object]], payloads: Sequence[Payload], number: int) -> None:
    """Publish from so many tasks, each of which takes the next one as soon as it is done with one."""
    from asyncio import gather

    left = iter(payloads)

    async def some() -> None:
        for payload in left:
            await publish(payload)

    await gather(*(some() for _ in range(number)))
