"""Which handler a message goes to: by queue id, and by task type where it names one. Pure."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from kq.errors import Conflict
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

    def policy(self, queue: RetryPolicy) -> RetryPolicy:
        """Return when a message has had enough: the queue's word, with the consumer's own on top."""
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
    """The consumers of an app, by queue id."""

    def __init__(self) -> None:
        self._consumers: dict[str, Consumer] = {}

    def add(self, consumer: Consumer) -> None:
        """Register a consumer.

        Raises:
            Conflict: If the queue has one already.
        """
        other = self._consumers.get(consumer.queue)
        if other is not None:
            raise Conflict(
                f"queue {consumer.queue} has the consumer {other.name!r} already; "
                f"expected one consumer a queue, got {consumer.name!r} as well"
            )
        self._consumers[consumer.queue] = consumer

    def resolve(self, queue: str, task: object = None) -> Consumer | None:
        """Return the consumer for a message, or None if nobody can handle it.

        Args:
            queue: The queue that delivered it.
            task: Its ``task`` header; a message that names a task type is no plain message, so a plain
                consumer does not get it.
        """
        return None if task is not None else self._consumers.get(queue)

    def __iter__(self) -> Iterator[Consumer]:
        return iter(self._consumers.values())

    def __len__(self) -> int:
        return len(self._consumers)
