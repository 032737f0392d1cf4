from __future__ import annotations

import functools
from collections.abc import AsyncIterator, Callable, Iterator
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


def test_consumers_of_one_queue_are_told_apart_by_number() -> None:
    """A queue may have several consumers, numbered in the order of their registration."""
    router = Router()
    first, second = Consumer("app:a", "first", handle), Consumer("app:a", "second", handle_async)
    router.add(first)
    router.add(Consumer("app:b", "first", handle))
    router.add(second)
    assert router.of("app:a") == (first, second)
    assert router.of("app:z") == ()
    assert [router.resolve("app:a", None, index) for index in (0, 1)] == [first, second]
    assert [(consumer.queue, consumer.name) for consumer in router] == [
        ("app:a", "first"), ("app:b", "first"), ("app:a", "second"),
    ]  # fmt: skip
    assert len(router) == 3


def test_a_number_from_other_code_finds_a_consumer_too() -> None:
    """A child that has loaded code with fewer consumers gives the message to one that it has."""
    router = Router()
    router.add(Consumer("app:a", "first", handle))
    router.add(Consumer("app:a", "second", handle))
    found = router.resolve("app:a", None, 5)
    assert found is not None
    assert found.name == "second"


def test_consumers_of_one_queue_have_different_names() -> None:
    """A second consumer of the same name on a queue is a conflict that names the queue and both."""
    router = Router()
    router.add(Consumer("app:a", "first", handle))
    with pytest.raises(errors.Conflict, match=r"queue app:a has the consumer 'first' already; .*got 'first' as well"):
        router.add(Consumer("app:a", "first", handle_async))
    assert [consumer.handler for consumer in router.of("app:a")] == [handle]


def test_consumers_of_one_queue_acknowledge_alike() -> None:
    """Consumers of one queue that disagree on auto_ack are a conflict that names both and what each said."""
    router = Router()
    router.add(Consumer("app:a", "first", handle))
    with pytest.raises(
        errors.Conflict, match=r"consumer 'first' with auto_ack=False; .*got 'second' with auto_ack=True"
    ):
        router.add(Consumer("app:a", "second", handle, auto_ack=True))
    assert len(router) == 1


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


def generate(payload: Any) -> Iterator[None]:
    yield


async def generate_later(payload: Any) -> AsyncIterator[None]:
    yield


class GeneratingCall:
    def __call__(self, payload: Any) -> Iterator[None]:
        yield


@pytest.mark.parametrize("handler", [generate, generate_later, functools.partial(generate), GeneratingCall()])
def test_generator_functions_are_no_handlers(handler: Any) -> None:
    """Of a generator function no line would run, and its messages would be done."""
    with pytest.raises(errors.Invalid, match="handler handle of app:a: expected a function, got a generator function"):
        Consumer("app:a", "handle", handler)


def injected(handler: Callable[..., None]) -> Callable[[Any], None]:
    @functools.wraps(handler)
    def call(payload: Any) -> None:
        handler(payload, "database")

    return call


class Proxy:
    @property
    def __signature__(self) -> None:
        raise RuntimeError

    def __call__(self, payload: Any) -> None: ...


@pytest.mark.parametrize(
    "handler",
    [
        lambda: None,
        lambda payload, database: None,
        lambda payload, *, database: None,
        lambda *, payload: None,
        functools.partial(handle, {}),
    ],
)
def test_handlers_take_the_payload_alone(handler: Any) -> None:
    """A function that cannot be called with a payload is refused where it is declared, not at each message."""
    with pytest.raises(errors.Invalid, match="can be called with a payload and nothing else, got one with the param"):
        Consumer("app:a", "handle", handler)


@pytest.mark.parametrize(
    "handler",
    [
        [].append,
        print,
        dict,
        injected(lambda payload, database: None),
        lambda payload, database=None: None,
        lambda *arguments, **options: None,
        functools.partial(lambda database, payload: None, "database"),
        Proxy(),
    ],
)
def test_whatever_can_be_called_with_a_payload_is_a_handler(handler: Any) -> None:
    """Builtins, classes, decorated functions, and functions whose other parameters have defaults or are given."""
    assert Consumer("app:a", "handle", handler).handler is handler
