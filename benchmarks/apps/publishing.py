"""What every contender can do to publish."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import TYPE_CHECKING, Any, Final, NamedTuple

if TYPE_CHECKING:
    from asyncio import AbstractEventLoop

Payload = dict[str, Any]

#: Publishes that one event loop has under way at most.
_TOGETHER: Final = 50


class Publisher(NamedTuple):
    """How a contender publishes.

    Attributes:
        one: Publishes one message, and returns when the contender says that it is published.
        many: Publishes several in the fastest way that the contender offers.
        later: Publishes several to be run after so many seconds, where the contender can.
    """

    one: Callable[[Payload], object]
    many: Callable[[Sequence[Payload]], object]
    later: Callable[[Sequence[Payload], float], object] | None = None


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
        for start in range(0, len(payloads), _TOGETHER):
            await gather(*(publish(payload) for payload in payloads[start : start + _TOGETHER]))

    async def single(payload: Payload) -> None:
        await publish(payload)

    return Publisher(
        lambda payload: loop.run_until_complete(single(payload)),
        lambda payloads: loop.run_until_complete(all_of(payloads)),
    )
