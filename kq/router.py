"""Which handler a message goes to: by queue id, and by task type where it names one. Pure."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from kq.errors import Conflict, Invalid
from kq.retry import Backoff, RetryPolicy


@dataclass(frozen=True, slots=True)
class Consumer:
    """A handler and the rules it runs under.

    Attributes:
        queue: The queue id it consumes.
        name: For logs; the function's name unless given.
        handler: The function, sync or async, called with the payload.
        max_attempts: Wins over the queue's, unless None.
        backoff: Wins over the queue's, unless None.
        concurrency: Handlers of this consumer that one worker runs at once; None for no cap of its own.
        prefetch: Messages that one worker holds for it; None for the worker's.
        timeout: Seconds that one run may take, or None.
        auto_ack: Whether messages are settled before the handler runs (at most once).
        place: Where it was declared, for people.

    Raises:
        Invalid: If the handler could never run: it cannot be called with a payload, or runs nothing when it is called.
    """

    queue: str
    name: str
    handler: Callable[[Any], Any]
    max_attempts: int | None = None
    backoff: Backoff | None = None
    concurrency: int | None = None
    prefetch: int | None = None
    timeout: float | None = None
    auto_ack: bool = False
    place: str = field(default="", compare=False)

    def __post_init__(self) -> None:
        _check_handler(self.handler, f"handler {self.name} of {self.queue}")

    def policy(self, queue: RetryPolicy) -> RetryPolicy:
        """Return when a message has had enough: the queue's word, with the consumer's own on top."""
        if self.max_attempts is None and self.backoff is None:
            return queue
        return RetryPolicy(
            max_attempts=queue.max_attempts if self.max_attempts is None else self.max_attempts,
            max_crashes=queue.max_crashes,
            backoff=self.backoff or queue.backoff,
        )

    @property
    def is_async(self) -> bool:
        """Whether the handler is a coroutine function, or an object whose call is one."""
        call = getattr(self.handler, "__call__", None)  # noqa: B004 - asking for its kind, not whether
        return inspect.iscoroutinefunction(self.handler) or inspect.iscoroutinefunction(call)


class Router:
    """The consumers of an app, by queue id. Those of one queue compete for its messages."""

    def __init__(self) -> None:
        self._consumers: list[Consumer] = []
        self._by_queue: dict[str, tuple[Consumer, ...]] = {}

    def add(self, consumer: Consumer) -> None:
        """Register a consumer.

        Raises:
            Conflict: If the queue has one of that name already, or one with another ``auto_ack``; the message
                names both.
        """
        others = self.of(consumer.queue)
        _check_beside(others, consumer)
        self._consumers.append(consumer)
        self._by_queue[consumer.queue] = (*others, consumer)

    def replace(self, old: Consumer, new: Consumer) -> None:
        """Put a consumer in the place of another one of the same queue; raises as `add`."""
        _check_beside([other for other in self.of(old.queue) if other is not old], new)
        self._consumers[self._consumers.index(old)] = new
        self._by_queue[old.queue] = tuple(new if other is old else other for other in self.of(old.queue))

    def of(self, queue: str) -> tuple[Consumer, ...]:
        """Return the consumers of a queue, in the order of their registration."""
        return self._by_queue.get(queue, ())

    def resolve(self, queue: str, task: object = None, index: int = 0) -> Consumer | None:
        """Return the consumer for a message, or None if nobody can handle it.

        Args:
            queue: The queue that delivered it.
            task: Its ``task`` header; a message that names a task type is no plain message, so a plain
                consumer does not get it.
            index: Which of the queue's consumers it was given to. Whoever gave it may know more of them than
                there are here, where the code is another: then one of these gets it.
        """
        consumers = self._by_queue.get(queue)
        if consumers is None or task is not None:
            return None
        return consumers[index % len(consumers)]

    def __iter__(self) -> Iterator[Consumer]:
        return iter(self._consumers)

    def __len__(self) -> int:
        return len(self._consumers)


def _check_beside(others: Iterable[Consumer], consumer: Consumer) -> None:
    """See to it that a consumer can be one of a queue's, beside the others; raises as `Router.add`."""
    for other in others:
        if other.name == consumer.name:
            raise Conflict(
                f"queue {consumer.queue} has the consumer {other.name!r} already{_at(other)}; expected another "
                f"name for each consumer of a queue, got {consumer.name!r} as well{_at(consumer)}"
            )
        if other.auto_ack != consumer.auto_ack:
            raise Conflict(
                f"queue {consumer.queue} has the consumer {other.name!r}{_at(other)} with "
                f"auto_ack={other.auto_ack}; expected the same for all consumers of a queue, got "
                f"{consumer.name!r}{_at(consumer)} with auto_ack={consumer.auto_ack}"
            )


def _check_handler(handler: Callable[[Any], Any], what: str) -> None:
    call = getattr(handler, "__call__", None)  # noqa: B004 - asking for its kind, not whether
    for kind in (inspect.isgeneratorfunction, inspect.isasyncgenfunction):
        if kind(handler) or kind(call):
            raise Invalid(
                f"{what}: expected a function, got a generator function, of which no line runs when it is called"
            )
    try:
        # Its own, not that of what it wraps: a decorator may add arguments.
        signature = inspect.signature(handler, follow_wrapped=False)
    except Exception:
        # Not everything that can be called has one; what a proxy answers here is its own.
        return
    try:
        signature.bind(None)
    except TypeError as error:
        raise Invalid(
            f"{what}: expected a function that can be called with a payload and nothing else, got one with the "
            f"parameters {signature}: {error}"
        ) from None


def limits(consumers: Mapping[str, Sequence[Consumer]]) -> dict[str, int]:
    """Return how many messages of single queues to hold: no more than may run, unless asked for."""
    found = {}
    for queue, competing in consumers.items():
        needs = [_need(consumer) for consumer in competing]
        bounded = [need for need in needs if need is not None]
        # One consumer without bounds takes whatever comes.
        if len(bounded) == len(needs):
            found[queue] = sum(bounded)
    return found


def _need(consumer: Consumer) -> int | None:
    return max((n for n in (consumer.concurrency, consumer.prefetch) if n is not None), default=None)


def _at(consumer: Consumer) -> str:
    return f" ({consumer.place})" if consumer.place else ""
