"""Queues that we are not let consume: they are set aside for a while, so that they do not keep us from the others.

All subscriptions share one channel, and RabbitMQ closes it over any of them: because somebody else has the queue for
itself, this account may not read it, or the node that it is on is away.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Collection, Iterator
from math import inf
from typing import Any, Final

from amqp.exceptions import AccessRefused, ChannelError, ResourceLocked

from kq.backends.rabbitmq_link import Link

logger = logging.getLogger("kq.worker")

#: Seconds after which a queue is tried again.
AGAIN: Final = 10.0
#: How RabbitMQ names the queue that it speaks of.
_NAME: Final = re.compile("queue '([^']+)'")


class Aside:
    """The queues of one feed that are set aside. Moments are of the monotonic clock.

    Args:
        queues: All of the feed's.
    """

    def __init__(self, queues: Collection[str]) -> None:
        self._queues = frozenset(queues)
        self._until: dict[str, float] = {}

    def __bool__(self) -> bool:
        return bool(self._until)

    def __contains__(self, queue: str) -> bool:
        return queue in self._until

    @property
    def next_at(self) -> float:
        """When one is to be tried again; never, where there is none."""
        return min(self._until.values(), default=inf)

    def refused(self, error: ChannelError, now: float) -> bool:
        """Set the queue aside of which an error speaks, if it is one of ours, and tell whether the others can go on."""
        text = str(error.reply_text)
        named = _NAME.search(text)
        return named is not None and named[1] in self._queues and self.put(named[1], text, now)

    def put(self, queue: str, why: str, now: float) -> bool:
        """Set a queue aside. If none is left then, all are there again: there is nothing to go on with."""
        is_new = queue not in self._until
        self._until[queue] = now + AGAIN
        if len(self._until) == len(self._queues):
            self._until.clear()
        elif is_new:
            logger.error(
                "queue %s cannot be consumed: %s; it is tried again every %g s, and the others go on",
                queue, why, AGAIN, extra={"action": "queue_refused", "queue": queue},
            )  # fmt: skip
        return queue in self._until

    def due(self, now: float) -> Iterator[str]:
        """Yield the queues that are to be tried again, and not soon once more."""
        for queue in [queue for queue, until in self._until.items() if until <= now]:
            self._until[queue] = now + AGAIN
            yield queue

    def end(self, queue: str) -> None:
        """Note that a queue can be consumed."""
        del self._until[queue]
        logger.info("queue %s can be consumed again", queue, extra={"action": "queue_accepted", "queue": queue})


def probe(link: Link, queue: str) -> list[str] | None:
    """Return None where we are not let consume a queue; else the ids of messages that have come and gone back for that.

    Over a channel that may be closed for it. Waits for the answer.

    Raises:
        amqp.exceptions.NotFound: If there is no such queue, or its node is away.
    """
    seen: list[Any] = []
    try:
        with link.brief_channel() as channel:
            channel.basic_qos(0, 1, False)
            channel.basic_consume(queue, consumer_tag="kq-probe", callback=seen.append)
            # What has come goes back with the channel.
            channel.basic_cancel("kq-probe")
    except (AccessRefused, ResourceLocked):
        return None
    return [str(message.properties.get("message_id", "")) for message in seen]
