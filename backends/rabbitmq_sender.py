"""Publishing to RabbitMQ, where queues are not ready yet, and connections break or are blocked."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import suppress
from math import inf
from time import monotonic
from typing import Final

from amqp.exceptions import AccessRefused, PreconditionFailed

from kq.backend import Publication
from kq.backends.rabbitmq_due import due
from kq.backends.rabbitmq_error import RabbitErrors, away
from kq.backends.rabbitmq_lane import Lane, Lanes
from kq.backends.rabbitmq_publication import TooLarge
from kq.backends.rabbitmq_publisher import Outgoing
from kq.backends.rabbitmq_sent import Sent
from kq.backends.rabbitmq_topology import DELAY_LEFT, bucket_arguments, bucket_for, bucket_name
from kq.envelope import Envelope
from kq.errors import Error, Internal, NotFound, PermissionDenied

#: Seconds before messages that were refused are sent again, each time: a queue that another process has just declared
#: is told of before it takes messages.
_PAUSES: Final = (0.0, 0.01, 0.05, 0.1, 0.2, 0.4, 0.8)
#: Queues that have been waited for so and are remembered, at most.
_REMEMBERED: Final = 1000


class Sender:
    """Publishes over whatever link is free. Thread-safe.

    Args:
        url: The broker's.
        lanes: The links.
        errors: What turns the clients' errors into ours.
    """

    def __init__(self, url: str, lanes: Lanes, errors: RabbitErrors) -> None:
        self._url = url
        self._lanes = lanes
        self._errors = errors
        #: Queues that refused messages for as long as `_PAUSES`, or as there was time.
        self._waited_for: set[str] = set()

    def publish(
        self, batch: Sequence[Publication], timeout: float, courier: Courier | None = None
    ) -> list[Error | None]:
        """Store messages, each for itself; see `kq.backend.Backend.publish`.

        Args:
            batch: What.
            timeout: Seconds.
            courier: On whose behalf, if it waits on for what a blocked connection holds.
        """
        results = self._publish(batch, timeout, courier)
        for publication, error in zip(batch, results, strict=True):
            if error is None:
                self._note_due(publication)
        return results

    def send(self, batch: Sequence[Publication], timeout: float) -> Sent | None:
        """Prepare messages to be sent over a link that is free, as `Backend.send`; None where that takes more.

        Args:
            batch: What.
            timeout: Seconds within which they are to be confirmed.
        """
        lane = self._lanes.idle()
        if lane is None:
            return None
        try:
            lane.link.drain_all()
        except Exception:
            # Whoever publishes them finds out why.
            lane.drop()
            return None
        frames = b""
        try:
            outgoing = [_outgoing(publication, awaited=False) for publication in batch]
            buckets = {_bucket_of(publication) for publication in batch} - {0}
            if not lane.link.blocked and buckets <= lane.buckets:
                frames = lane.publisher.frames(outgoing)
        except TooLarge:
            pass
        finally:
            if not frames:
                self._lanes.put_back(lane, wait=False)
        if not frames:
            return None

        def on_stored(place: int) -> None:
            self._note_due(batch[place])

        return Sent(lane, outgoing, frames, self._lanes, timeout, on_stored)

    def _note_due(self, publication: Publication) -> None:
        if publication.delay > 0:
            due.note(self._url, publication.queue.id, publication.delay)

    def _publish(self, batch: Sequence[Publication], timeout: float, courier: Courier | None) -> list[Error | None]:
        deadline = monotonic() + timeout
        results: list[Error | None] = [None] * len(batch)
        left = list(range(len(batch)))
        lane = self._lanes.idle() if courier is None else courier.take() or self._lanes.idle()
        #: By milliseconds, why a bucket cannot be had, which is no matter of what does not need it.
        refused: dict[int, Error] = {}
        pauses = iter(_PAUSES)
        pause = 0.0
        reconnected = False
        while True:
            # What is being sent; until then there is nothing that could have been answered.
            outgoing: list[Outgoing] = []
            try:
                with self._errors:
                    if lane is None:
                        lane = self._lanes.fresh(deadline - monotonic())
                    if pause:
                        lane.link.drain(pause)
                    lane.link.drain_all()
                    if not lane.link.blocked:
                        # Else nothing is sent, and nothing that is asked is answered.
                        self._make_buckets(lane, [batch[index].delay for index in left], refused, deadline)
                    for index in left:
                        results[index] = refused.get(_bucket_of(batch[index]))
                    left = [index for index in left if results[index] is None]
                    outgoing = [_outgoing(batch[index], courier is not None) for index in left]
                    answers = lane.publisher.send(outgoing, deadline)
            except Error as error:
                # After any error the connection's state is unknown: never used again. What it has
                # answered stands; the rest may or may not be stored.
                answered = lane.publisher.answered() if lane is not None and outgoing else {}
                if lane is not None:
                    lane.drop()
                    lane = None
                for place, result in answered.items():
                    results[left[place]] = result
                left = [index for place, index in enumerate(left) if place not in answered]
                failed = _as_publish_error(error)
                for index in left:
                    results[index] = failed
                if reconnected or isinstance(error, PermissionDenied) or not left or monotonic() >= deadline:
                    return results
                reconnected = True
                pause = 0.0
                continue
            except BaseException:
                # Interrupted, perhaps in the middle of a frame.
                if lane is not None:
                    lane.drop()
                raise
            for index, answer in zip(left, answers, strict=True):
                results[index] = answer
            again = [index for index in left if _is_to_be_sent_again(batch[index], results[index])]
            pause = next(pauses, inf) if again else inf
            if pause and pause < inf:
                # Others may wait for this one: once for each queue, which may be full after all.
                again = [index for index in again if _name_of(batch[index]) not in self._waited_for]
            if again and monotonic() + pause < deadline:
                # The queue of a bucket is made again.
                lane.buckets.clear()
                left = again
                continue
            if again:
                self._have_waited_for(batch[index] for index in again)
            if any(answer is not None and answer.details["reason"] == "timeout" for answer in answers):
                # Silence may mean that the connection is dead: the next publish is to have a new one.
                lane.drop()
            elif courier is not None and lane.publisher.awaits:
                courier.keep(lane)
            else:
                self._lanes.put_back(lane)
            return results

    def _have_waited_for(self, refused: Iterable[Publication]) -> None:
        names = {_name_of(publication) for publication in refused}
        if len(self._waited_for) + len(names) > _REMEMBERED:
            self._waited_for.clear()
        self._waited_for |= names

    def _make_buckets(self, lane: Lane, delays: Sequence[float], refused: dict[int, Error], deadline: float) -> None:
        """Have the queues of all buckets that these delays need; where one cannot be had, ``refused`` says why."""
        for milliseconds in {bucket_for(delay) for delay in delays if delay > 0} - lane.buckets - refused.keys():
            name = bucket_name(milliseconds)
            try:
                with lane.link.within(deadline - monotonic()), lane.link.brief_channel() as channel:
                    channel.exchange_declare(name, "fanout", durable=True, auto_delete=False)
                    channel.queue_declare(
                        name, durable=True, auto_delete=False, arguments=bucket_arguments(milliseconds)
                    )
                    channel.queue_bind(name, name)
            except (AccessRefused, PreconditionFailed) as error:
                found = self._errors.ours(error)
                assert found is not None
                refused[milliseconds] = _as_publish_error(found)
            else:
                lane.buckets.add(milliseconds)


class Courier:
    """Publishes on a worker's behalf, and keeps a connection over which something is on its way. One thread at a time.

    A broker that raises an alarm reads nothing more of whoever publishes, but what is written already it stores when
    the alarm is over. So that is not sent anew by then: it is waited for, by whoever publishes the same object again.

    Args:
        sender: By which.
        timeout: Seconds that one publish may take.
    """

    def __init__(self, sender: Sender, timeout: float) -> None:
        self._sender = sender
        self._timeout = timeout
        self._lane: Lane | None = None

    def publish(self, batch: Sequence[Publication]) -> list[Error | None]:
        """Store messages, each for itself; those that a blocked connection holds are not sent again."""
        return self._sender.publish(batch, self._timeout, self)

    def holds(self, publication: Publication) -> bool:
        """Tell whether a message that was not confirmed is waited for, if this very object is published again."""
        return self._lane is not None and self._lane.publisher.awaits_one(publication)

    def forget(self, publication: Publication) -> None:
        """Wait no more for a message, which nobody will publish again."""
        if self._lane is not None:
            self._lane.publisher.forget(publication)

    def wait(self, timeout: float) -> None:
        """Read what the broker says of what is waited for, or wait so many seconds for it to say something."""
        if self._lane is not None:
            # Whoever publishes next finds out what is the matter.
            with suppress(Exception):
                self._lane.link.drain(timeout)

    def take(self) -> Lane | None:
        """Return the connection that was kept, if there is one."""
        lane, self._lane = self._lane, None
        return lane

    def keep(self, lane: Lane) -> None:
        """Keep a connection for the next `publish`."""
        self._lane = lane

    def close(self) -> None:
        """Give up the connection that was kept."""
        lane = self.take()
        if lane is not None:
            lane.drop()


def _bucket_of(publication: Publication) -> int:
    """Return the bucket that a message waits in first; 0 for none."""
    return bucket_for(publication.delay) if publication.delay > 0 else 0


def _outgoing(publication: Publication, awaited: bool) -> Outgoing:
    """Return a message as it is sent: to its queue, or to a bucket."""
    envelope, milliseconds = publication.envelope, _bucket_of(publication)
    stands_for = publication if awaited else None
    if not milliseconds:
        return Outgoing("", publication.queue.id, envelope, stands_for)
    headers = {**envelope.headers, DELAY_LEFT: max(0.0, round(publication.delay - milliseconds / 1000, 3))}
    delayed = Envelope(envelope.id, headers, envelope.properties, envelope.body)
    return Outgoing(bucket_name(milliseconds), publication.queue.id, delayed, stands_for)


def _is_to_be_sent_again(publication: Publication, error: Error | None) -> bool:
    """Tell whether a message was refused for what the next moment may have mended."""
    if error is None:
        return False
    reason = error.details["reason"]
    # Somebody has deleted the queue of a bucket; or a quorum queue, which a bucket has as well, has no leader yet, and
    # says so as if it were full.
    if publication.delay > 0:
        return reason in ("unroutable", "full")
    return reason == "full" and publication.queue.max_length is None


def _name_of(publication: Publication) -> str:
    """Return the name of the queue that a message goes to first."""
    milliseconds = _bucket_of(publication)
    return bucket_name(milliseconds) if milliseconds else publication.queue.id


def _as_publish_error(error: Error) -> Error:
    if isinstance(error, NotFound):
        return away(f"the message cannot be routed: {error.message}", "unroutable")
    if isinstance(error, (Internal, PermissionDenied)):
        return error
    return away(error.message, "refused")
