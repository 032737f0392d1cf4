"""The subscriptions of a feed on one link, and their windows: how many messages of a queue are out at most.

A window belongs to a subscription, so another window is another subscription.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import count
from typing import Any, Final

import amqp
from amqp import spec

from kq.backends.rabbitmq_delivery import Receive
from kq.backends.rabbitmq_link import Link

#: Queues whose subscriptions are changed in one round trip.
_AT_ONCE: Final = 8
#: Subscriptions of a queue that have ended and are still listened to.
_ENDED: Final = 4


class Subscriptions:
    """Changes windows. One thread's.

    Args:
        link: Where the subscriptions are.
        queues: The queues; none is subscribed to yet.
        receiver: Returns what takes the deliveries of a queue.
        on_cancel: Called with a subscription's tag when the broker ends it.

    Attributes:
        windows: By queue; 0 where there is no subscription.
    """

    def __init__(
        self, link: Link, queues: Iterable[str], receiver: Callable[[str], Receive], on_cancel: Callable[[str], None]
    ) -> None:
        self._link = link
        self._receiver = receiver
        self._on_cancel = on_cancel
        self.windows = dict.fromkeys(queues, 0)
        #: By queue.
        self._tags: dict[str, str] = {}
        #: A tag is never used twice: RabbitMQ 3.10 closes a channel whose quorum queue consumer comes back under an
        #: old one while messages of it are unsettled.
        self._numbers = count(1)
        #: Those of subscriptions that have ended, and of which something may still be on its way.
        self._ended: deque[str] = deque()

    def __bool__(self) -> bool:
        """Whether there are any."""
        return bool(self._tags)

    def change(self, windows: Mapping[str, int], is_enough: Callable[[], bool] | None = None) -> bool:
        """Give queues other windows, and take what arrives meanwhile.

        Args:
            windows: By queue.
            is_enough: Asked now and then; once it says yes no window is widened any more.

        Returns:
            Whether all is as it should be; False where it was enough before.
        """
        changes = [(queue, window) for queue, window in windows.items() if window != self.windows[queue]]
        complete = True
        for start in range(0, len(changes), _AT_ONCE):
            part = changes[start : start + _AT_ONCE]
            if is_enough is not None and is_enough():
                complete = False
                part = [(queue, window) for queue, window in part if not 0 < self.windows[queue] < window]
            self._change(part)
        return complete

    def _change(self, changes: Sequence[tuple[str, int]]) -> None:
        """Ask for everything, and then wait for the answers.

        A subscription ends once all that is on its way has come. Later it would be put back, by RabbitMQ or by
        py-amqp, out of order and counted as one more delivery that nobody settled. So the new one begins first: a
        queue does that after it has answered to all acknowledgements with what there was room for, and from then on
        the old one is full. And the end is said only when the channel, which does one thing at a time, has come to a
        question behind the beginning: what a queue had sent by then is on its way before the end.

        The end itself, and a beginning, are not answered: where the queue answers that, and not the channel, an
        answer may be overtaken by later ones. Were anything refused, the channel would be closed.
        """
        channel = self._link.channel
        answers: list[Any] = []
        over: list[str] = []
        ended: list[str] = []
        for queue, window in changes:
            tag = self._tags.pop(queue, None)
            if tag is not None:
                over.append(tag)
                if not window:
                    ended.append(queue)
            self.windows[queue] = window
            if window:
                tag = self._tags[queue] = f"kq-{next(self._numbers)}"
                self._link.receive(tag, self._receiver(queue))
                channel.send_method(spec.Basic.Qos, "lBb", (0, window, False))
                answers.append(spec.Basic.QosOk)
                channel.basic_consume(queue, consumer_tag=tag, nowait=True, callback=_refuse, on_cancel=self._on_cancel)
        if over:
            answers += [self._count(queue) for queue in ended or [changes[-1][0]]]
        self._wait(answers)
        for tag in over:
            channel.basic_cancel(tag, nowait=True)
            self._ended.append(tag)
        # Who unsubscribes wants to know that nothing more comes.
        self._wait([self._count(queue) for queue in ended])
        while len(self._ended) > _ENDED * len(self.windows):
            forgotten = self._ended.popleft()
            self._link.forget(forgotten)
            # py-amqp keeps them until an answer that nobody has asked for.
            channel.callbacks.pop(forgotten, None)
            channel.cancel_callbacks.pop(forgotten, None)

    def _wait(self, answers: Sequence[Any]) -> None:
        for answer in answers:
            self._link.channel.wait(answer)

    def _count(self, queue: str) -> Any:
        """Ask how many messages wait in a queue; return by what it is answered."""
        arguments = (0, queue, True, False, False, False, False, None)
        self._link.channel.send_method(spec.Queue.Declare, "BsbbbbbF", arguments)
        return spec.Queue.DeclareOk


def _refuse(message: Any) -> None:
    """Take what py-amqp delivers itself: nothing."""
    raise amqp.exceptions.UnexpectedFrame("a delivery did not reach its subscription")
