"""Declaring, counting and looking after queues, on every broker."""

from __future__ import annotations

from typing import Any

import pytest
from msgspec.structs import replace

from kq import errors
from kq.backend import Capabilities, QueueSpec, Settlement
from kq.backends import rabbitmq
from kq.backends.rabbitmq import RabbitBackend
from kq.backends.rabbitmq_topology import queue_arguments
from kq.envelope import clean
from kq.outcome import Failure, Outcome
from kq.queue_spec import default_spec
from tests.broker import amqp_channel
from tests.conformance.conftest import ON_RABBITMQ, Bench

#: What each broker claims; changing it is changing a promise.
CLAIMS: dict[str, dict[str, Any]] = {
    "memory": {
        "shared": False,
        "deduplicates": True,
        "priorities": "always",
        "tells_age": True,
        "remembers_completed": True,
        "sends": False,
    },
    "sqlite": {
        "shared": True,
        "deduplicates": True,
        "priorities": "always",
        "tells_age": True,
        "remembers_completed": True,
        "sends": False,
    },
    "redis": {
        "shared": True,
        "deduplicates": True,
        "priorities": "always",
        "tells_age": True,
        "remembers_completed": True,
        "sends": True,
    },
    "fakeredis": {
        "shared": True,
        "deduplicates": True,
        "priorities": "always",
        "tells_age": True,
        "remembers_completed": True,
        "sends": True,
    },
    "rabbitmq": {
        "shared": True,
        "deduplicates": False,
        "priorities": "declared",
        "tells_age": False,
        "remembers_completed": False,
        "sends": True,
    },
}


def bury(bench: Bench, *ids: str, reason: str = "not_retryable") -> None:
    """Dead-letter messages with these ids."""
    bench.publish(*[bench.message(id, headers={"n": id}) for id in ids])
    feed = bench.feed()
    outcome = Outcome("dead", 0.0, 1, 0, reason, Failure("INVALID", "no", False))
    for delivery in bench.take(feed, len(ids)):
        feed.settle([Settlement(delivery, outcome)])
    feed.close()


def test_capabilities_tell_the_truth(bench: Bench) -> None:
    """A broker claims what the tests hold it to, and nothing else."""
    capabilities = bench.backend.capabilities
    assert isinstance(capabilities, Capabilities)
    for name, value in CLAIMS[bench.broker.name].items():
        assert getattr(capabilities, name) == value


def test_declaring_is_idempotent(bench: Bench) -> None:
    """The same declaration again changes nothing, and keeps what the queue holds."""
    bench.publish(bench.message())
    bench.backend.declare(bench.queue, create=True, exact=True)

    assert bench.backend.info(bench.queue).ready == 1


def test_other_values_conflict_by_name(bench: Bench) -> None:
    """A queue that exists with other values is a conflict that names the argument, and stays as it is."""
    other = replace(bench.queue, max_length=7)
    with pytest.raises(errors.Conflict, match="max_length") as caught:
        bench.backend.declare(other, create=True, exact=True)
    assert bench.queue.id in str(caught.value)

    bench.backend.declare(other, create=True, exact=False)
    bench.publish(*[bench.message() for _ in range(9)])
    assert bench.backend.info(bench.queue).ready == 9


@ON_RABBITMQ
@pytest.mark.parametrize("limit", [{}, {"x-delivery-limit": 7}])
def test_a_queue_may_have_any_limit_of_deliveries(bench: Bench, limit: dict[str, Any]) -> None:
    """One that was made before kq named a limit is taken as it is; what differs otherwise is told all the same."""
    queue = default_spec(bench.broker.queue_id("made"))
    arguments = {name: value for name, value in queue_arguments(queue).items() if name != "x-delivery-limit"}
    with amqp_channel() as channel:
        channel.queue_declare(queue.id, durable=True, auto_delete=False, arguments={**arguments, **limit})

    bench.backend.declare(queue, create=True, exact=True)

    named = replace(queue, options={"amqp": {"arguments": {"x-delivery-limit": 9}}})
    with pytest.raises(errors.Conflict, match="x-delivery-limit"):
        bench.backend.declare(named, create=True, exact=True)
    if not limit:
        with pytest.raises(errors.Conflict, match="max_length"):
            bench.backend.declare(replace(queue, max_length=7), create=True, exact=True)


def test_missing_queue_is_not_found(bench: Bench) -> None:
    """A queue that does not exist is not made unless asked for, and cannot be counted."""
    missing = default_spec(bench.broker.queue_id("missing"))
    with pytest.raises(errors.NotFound, match="does not exist"):
        bench.backend.info(missing)
    with pytest.raises(errors.NotFound, match="does not exist"):
        bench.backend.declare(missing, create=False, exact=False)


@ON_RABBITMQ
def test_looks_are_as_wide_as_the_queue(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """More messages than a subscription may have unsettled are looked at with several, and all go back."""
    monkeypatch.setattr(rabbitmq, "_LOOK_WINDOW", 10)
    bench.publish(*[bench.message(f"m{n:02}", headers={"x_dead_letter_time": 1e9 + n}) for n in range(35)])
    for _ in range(2):
        assert [letter.id for letter in bench.backend.browse(bench.queue, 100, 0)] == [f"m{n:02}" for n in range(35)]
    found = bench.backend.find(bench.queue, "m17")
    assert found is not None
    assert found.id == "m17"
    assert bench.backend.find(bench.queue, "m99") is None
    assert bench.backend.remove(bench.queue, ["m01", "m34", "m99"]) == 2
    assert bench.backend.info(bench.queue).ready == 33


@ON_RABBITMQ
def test_looks_leave_no_channels_open(bench: Bench) -> None:
    """Whoever watches a queue for days keeps the one channel that it publishes over."""
    assert isinstance(bench.backend, RabbitBackend)
    open_channels = []
    for _ in range(3):
        bench.backend.info(bench.queue)
        bench.backend.purge(bench.queue)
        bench.backend.declare(bench.queue, create=True, exact=True)
        (lane,) = bench.backend._lanes._idle
        open_channels.append(sum(channel is not None for channel in lane.link.connection.channels.values()))
    assert open_channels == [open_channels[0]] * 3


def test_unknown_options_are_refused(bench: Bench) -> None:
    """An option that the broker does not know is refused by name, not ignored."""
    scheme = "amqp" if bench.broker.name == "rabbitmq" else bench.broker.url.partition("://")[0]
    spec = QueueSpec(bench.broker.queue_id(), options={scheme: {"colour": "red"}})
    with pytest.raises(errors.Invalid, match="colour"):
        bench.backend.declare(spec, create=True, exact=True)


def test_publish_to_a_deleted_queue_fails(bench: Bench) -> None:
    """A message for a queue that somebody deleted is never confirmed."""
    missing = default_spec(bench.broker.queue_id("missing"))
    (error,) = bench.backend.publish([bench.message(queue=missing)], 10.0)

    assert error is not None
    assert (error.kind, error.details["reason"]) == ("INTERNAL", "unroutable")


def test_info_counts(bench: Bench) -> None:
    """info() counts what is ready, delayed and in flight as far as the broker can, and consumers."""
    bench.publish(*[bench.message() for _ in range(3)], bench.message(delay=3600.0))
    feed = bench.feed(prefetch=1)
    assert len(bench.take(feed, 1)) == 1

    info = bench.backend.info(bench.queue)
    capabilities = bench.backend.capabilities

    assert info.consumer_count == 1
    assert info.ready == 2
    assert info.delayed == (1 if capabilities.counts_delayed else None)
    assert info.in_flight == (1 if capabilities.counts_in_flight else None)
    assert info.message_count == 2 + (info.delayed or 0) + (info.in_flight or 0)
    assert (info.oldest_age is not None) == capabilities.tells_age
    feed.close()
    if bench.broker.stores:
        assert bench.backend.info(bench.queue).consumer_count == 0


def test_purge_drops_what_waits(bench: Bench) -> None:
    """purge() drops what waits, tells how much, and leaves alone what a worker holds."""
    bench.publish(bench.message("held"))
    feed = bench.feed(prefetch=1)
    (held,) = bench.take(feed, 1)
    bench.publish(*[bench.message() for _ in range(4)])

    assert bench.backend.purge(bench.queue) == 4
    assert bench.backend.info(bench.queue).ready == 0
    assert feed.settle([Settlement(held, Outcome("retry", 0.0, 1, 0))]) == ([], [])
    assert [d.id for d in bench.take(feed, 1)] == ["held"]


def test_browsing_leaves_everything(bench: Bench) -> None:
    """Dead letters are listed in the order of their deaths, page by page, and stay."""
    ids = [f"d-{i}" for i in range(5)]
    bury(bench, *ids)

    assert [letter.id for letter in bench.backend.browse(bench.dead, 100, 0)] == ids
    assert [letter.id for letter in bench.backend.browse(bench.dead, 2, 1)] == ids[1:3]
    assert bench.backend.browse(bench.dead, 10, 5) == []
    assert bench.backend.info(bench.queue).dead == 5


def test_removing_by_id(bench: Bench) -> None:
    """Dead letters can be dropped one by one or all together."""
    bury(bench, "a", "b", "c")

    assert bench.backend.remove(bench.dead, ["b", "nobody"]) == 1
    assert [letter.id for letter in bench.backend.browse(bench.dead, 10, 0)] == ["a", "c"]
    assert bench.backend.remove(bench.dead, None) == 2
    assert bench.backend.browse(bench.dead, 10, 0) == []


def test_replay_starts_anew(bench: Bench) -> None:
    """A replayed message is back in its queue under its old id, at attempt 1, without kq's headers."""
    bury(bench, "a", "b", "c")

    assert bench.backend.replay(bench.dead, ["b"], bench.queue, clean) == 1
    feed = bench.feed()
    (delivery,) = bench.take(feed, 1)
    from kq.envelope import unpack

    assert (delivery.id, delivery.attempts, delivery.crashes) == ("b", 0, 0)
    assert unpack(delivery.raw).headers == {"x_kq": 1, "n": "b"}
    assert bench.backend.replay(bench.dead, None, bench.queue, clean) == 2
    assert [d.id for d in bench.take(feed, 2)] == ["a", "c"]
    assert bench.backend.info(bench.queue).dead == 0


def test_replay_takes_only_its_own(bench: Bench) -> None:
    """From a dead-letter queue that several queues share, only the queue's own messages are replayed."""
    bury(bench, "mine")
    other = bench.declare("other", dead_letter=bench.queue.dead_letter)
    bench.publish(bench.message("theirs", queue=other))
    feed = bench.feed(other)
    (delivery,) = bench.take(feed, 1)
    feed.settle([Settlement(delivery, Outcome("dead", 0.0, 1, 0, "not_retryable"))])

    assert bench.backend.replay(bench.dead, None, bench.queue, clean) == 1
    assert [letter.id for letter in bench.backend.browse(bench.dead, 10, 0)] == ["theirs"]


def test_check_reaches_the_broker(bench: Bench) -> None:
    """check() answers with warnings, if any, as sentences."""
    assert all(isinstance(warning, str) for warning in bench.backend.check())
