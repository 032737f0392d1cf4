from __future__ import annotations

import functools
from typing import Any

import pytest

from kq import errors
from kq.retry import Backoff, RetryPolicy
from kq.router import Consumer, Router


def handle(payload: Any) -> None:
    """Does nothing."""


async def handle_async(payload: Any) -> None:
    """Does nothing, later."""


class AsyncCall:
    async def __call__(self, payload: Any) -> None: ...


def test_messages_are_routed_by_queue() -> None:
    """A queue's consumer gets its messages, and nobody those of another queue."""
    router = Router()
    consumer = Consumer("app:a", "handle", handle)
    router.add(consumer)
    assert router.resolve("app:a") is consumer
    assert router.resolve("app:b") is None


@pytest.mark.parametrize("task", ["shop.build", "", 0, False])
def test_a_task_header_is_not_for_plain_consumers(task: object) -> None:
    """A message that names a task no one registered has no handler, also where there is a plain consumer."""
    router = Router()
    router.add(Consumer("app:a", "handle", handle))
    assert router.resolve("app:a", task) is None


def test_one_consumer_a_queue() -> None:
    """A second consumer of a queue is a conflict that names the queue and both."""
    router = Router()
    router.add(Consumer("app:a", "first", handle))
    with pytest.raises(errors.Conflict, match=r"queue app:a has the consumer 'first' already; .*got 'second'"):
        router.add(Consumer("app:a", "second", handle))
    assert [consumer.name for consumer in router] == ["first"]


def test_router_can_be_counted_and_walked() -> None:
    """A router is a collection of its consumers, in the order of their registration."""
    router = Router()
    assert len(router) == 0
    for queue in ("app:b", "app:a"):
        router.add(Consumer(queue, "handle", handle))
    assert [consumer.queue for consumer in router] == ["app:b", "app:a"]
    assert len(router) == 2


def test_consumer_without_a_policy_takes_the_queues() -> None:
    """What a consumer does not say, the queue decides."""
    policy = RetryPolicy(7, 2, Backoff(initial=9))
    assert Consumer("app:a", "handle", handle).policy(policy) == policy


def test_consumer_wins_over_the_queue() -> None:
    """``max_attempts`` and ``retry`` given to the consumer win; crashes are the queue's."""
    mine = Backoff(initial=3)
    consumer = Consumer("app:a", "handle", handle, max_attempts=1, backoff=mine)
    assert consumer.policy(RetryPolicy(7, 2, Backoff(initial=9))) == RetryPolicy(1, 2, mine)


@pytest.mark.parametrize(
    ("handler", "expected"),
    [
        (handle, False),
        (handle_async, True),
        (functools.partial(handle), False),
        (functools.partial(handle_async), True),
        (AsyncCall(), True),
        (lambda payload: None, False),
    ],
)
def test_async_handlers_are_known(handler: Any, expected: bool) -> None:
    """Coroutine functions, partials of them and objects with an async call are async."""
    assert Consumer("app:a", "handle", handler).is_async is expected
