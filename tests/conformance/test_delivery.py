"""Publish, fetch, settle: what every broker promises about one message."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from threading import Thread
from time import monotonic, time

import pytest

from kq import errors
from kq.backend import Delivery, Settlement, unpack
from kq.outcome import DONE, RELEASE, Failure, Outcome
from tests.conformance.conftest import LEASE, Bench


def test_arrives_as_published(bench: Bench) -> None:
    """A message arrives with the id, headers, properties and body it was published with."""
    headers = {"text": "ä", "int": 2**40, "negative": -5, "float": 0.5, "yes": True, "priority": "high"}
    sent = bench.message("id-1", headers=headers, body=b'{"a":[1,2]}', priority=7)
    sent.envelope.properties.update(correlation_id="c-1", reply_to="app:replies", type="greeting")
    bench.publish(sent)

    (delivery,) = bench.take(bench.feed(), 1)
    envelope = unpack(delivery.raw)

    assert (delivery.id, envelope.id) == ("id-1", "id-1")
    assert envelope.body == b'{"a":[1,2]}'
    assert envelope.headers == {"x_kq": 1, **headers}
    assert envelope.properties == sent.envelope.properties
    assert (delivery.attempts, delivery.crashes, delivery.deliveries) == (0, 0, 0)


def test_batch_keeps_its_order(bench: Bench) -> None:
    """A batch is confirmed as a whole and arrives in its order."""
    ids = [f"m-{i}" for i in range(300)]
    bench.publish(*[bench.message(id) for id in ids])

    assert [delivery.id for delivery in bench.take(bench.feed(prefetch=400), 300)] == ids


def test_large_bodies_travel(bench: Bench) -> None:
    """Bodies of eight megabytes, the most there is, arrive whole."""
    body = b'"' + b"x" * (8 * 2**20 - 2) + b'"'
    bench.publish(bench.message(body=body), bench.message(body=body))

    assert [unpack(d.raw).body == body for d in bench.take(bench.feed(), 2)] == [True, True]


def test_credit_and_caps_bind(bench: Bench) -> None:
    """A fetch returns no more than its credit, and no more of a queue than its cap."""
    other = bench.declare("other")
    bench.publish(*[bench.message(queue=queue) for queue in (bench.queue, other) for _ in range(5)])
    feed = bench.feed(bench.queue, other)

    found: list[Delivery] = []
    until = monotonic() + 15
    while len(found) < 3 and monotonic() < until:
        found += feed.fetch(3 - len(found), {bench.queue.id: 0})
        feed.wait(0.05)

    assert [delivery.queue for delivery in found] == [other.id] * 3
    assert feed.fetch(0, {}) == []


def test_done_removes(bench: Bench) -> None:
    """A message that is done is gone for good."""
    bench.publish(bench.message())
    feed = bench.feed()
    (delivery,) = bench.take(feed, 1)

    assert feed.settle([Settlement(delivery, DONE)]) == []
    feed.close()

    assert bench.backend.info(bench.queue).message_count == 0
    assert bench.take(bench.feed(), 1, within=0.3) == []


def test_release_returns_in_order_and_uncharged(bench: Bench) -> None:
    """Released messages are back at once, in their old order, before later ones, without a charge."""
    ids = ["a", "b", "c"]
    bench.publish(*[bench.message(id) for id in ids])
    feed = bench.feed()
    deliveries = bench.take(feed, 3)
    bench.publish(bench.message("d"))

    assert feed.settle([Settlement(delivery, RELEASE) for delivery in deliveries]) == []
    feed.close()
    again = bench.take(bench.feed(), 4)

    assert [delivery.id for delivery in again] == [*ids, "d"]
    assert {(delivery.attempts, delivery.crashes) for delivery in again} == {(0, 0)}


def test_retry_counts_and_waits(bench: Bench) -> None:
    """A retried message returns after its delay, with the attempts and crashes that were charged."""
    bench.publish(bench.message("a"))
    feed = bench.feed()
    (delivery,) = bench.take(feed, 1)
    started = monotonic()

    feed.settle([Settlement(delivery, Outcome("retry", 0.3, 2, 1))])
    (again,) = bench.take(feed, 1)

    assert monotonic() - started >= 0.299
    assert (again.id, again.attempts, again.crashes, again.deliveries) == ("a", 2, 1, 0)
    assert unpack(again.raw).body == unpack(delivery.raw).body


def test_retry_without_delay_is_immediate(bench: Bench) -> None:
    """A retry without delay is ready at once, behind what was there before."""
    bench.publish(bench.message("a"), bench.message("b"))
    feed = bench.feed()
    first = bench.take(feed, 1)[0]

    feed.settle([Settlement(first, Outcome("retry", 0.0, 1, 0))])

    assert [(d.id, d.attempts) for d in bench.take(feed, 2)] == [("b", 0), ("a", 1)]


def test_dead_letter_says_why(bench: Bench) -> None:
    """A dead letter is in the dead-letter queue with its body, its headers and the reason."""
    bench.publish(bench.message("a", headers={"tenant": "t1"}, body=b'"payload"'))
    feed = bench.feed()
    (delivery,) = bench.take(feed, 1)
    failure = Failure("INTERNAL", "it broke", True, "Traceback ...")

    assert feed.settle([Settlement(delivery, Outcome("dead", 0.0, 5, 1, "max_attempts", failure))]) == []
    (letter,) = bench.backend.browse(bench.dead, 10, 0)

    assert (letter.id, letter.body) == ("a", b'"payload"')
    assert letter.headers["tenant"] == "t1"
    assert letter.headers["x_original_queue"] == bench.queue.id
    assert letter.headers["x_dead_letter_reason"] == "max_attempts"
    assert abs(letter.headers["x_dead_letter_time"] - time()) < 60
    assert (letter.headers["x_attempts"], letter.headers["x_crashes"]) == (5, 1)
    assert letter.headers["x_error_kind"] == "INTERNAL"
    assert letter.headers["x_error_message"] == "it broke"
    assert letter.headers["x_error_traceback"] == "Traceback ..."
    assert bench.backend.info(bench.queue).dead == 1


@pytest.mark.parametrize("delay", [0.01, 0.25, 1.1])
def test_delayed_is_never_early(bench: Bench, delay: float) -> None:
    """A delayed message arrives when it is due, not before, and not much later."""
    bench.publish(bench.message("warm-up", delay=delay))
    feed = bench.feed()
    bench.take(feed, 1)
    sent = bench.message("a", delay=delay)
    started = time()
    bench.publish(sent)

    (delivery,) = bench.take(feed, 1)
    waited = time() - started

    assert delivery.id == "a"
    assert waited >= delay - 0.002
    assert waited < delay + 1.0


def test_long_delay_blocks_no_shorter_one(bench: Bench) -> None:
    """A message due in an hour holds up neither one due soon nor one due now."""
    bench.publish(bench.message("hour", delay=3600.0))
    bench.publish(bench.message("soon", delay=0.2))
    bench.publish(bench.message("now"))

    assert [d.id for d in bench.take(bench.feed(), 2)] == ["now", "soon"]


def test_priorities_run_first(bench: Bench) -> None:
    """Higher priorities come first, equal ones in order; where a broker must know, it is told."""
    queue = bench.declare("prio", max_priority=9)
    for id, priority in [("low", 1), ("n1", 4), ("critical", 9), ("n2", 4), ("high", 7), ("zero", 0)]:
        bench.publish(bench.message(id, queue=queue, priority=priority))

    found = [delivery.id for delivery in bench.take(bench.feed(queue), 6)]

    assert found == ["critical", "high", "n1", "n2", "low", "zero"]


def test_full_queue_refuses(bench: Bench) -> None:
    """Beyond max_length publishing is refused with reason full, and says which messages are safe."""
    queue = bench.declare("small", max_length=3)
    results = [bench.backend.publish([bench.message(queue=queue)], 10.0)[0] for _ in range(3)]
    refused = []
    # RabbitMQ lets a few more pass: its queues learn of their length a moment late.
    for _ in range(20):
        refused += bench.backend.publish([bench.message(queue=queue)], 10.0)

    assert results == [None] * 3
    assert refused[-1] is not None
    assert (refused[-1].kind, refused[-1].retryable, refused[-1].details["reason"]) == ("INTERNAL", True, "full")
    assert bench.backend.info(queue).ready == 3 + refused.count(None)
    if bench.broker.stores:
        assert None not in refused


def test_same_id_is_stored_once_where_promised(bench: Bench) -> None:
    """A second publish of an id that is still queued has no effect, where the broker can tell."""
    bench.publish(bench.message("a"))
    bench.publish(bench.message("a"))

    expected = 1 if bench.backend.capabilities.deduplicates else 2
    assert len(bench.take(bench.feed(), 2, within=1.0)) == expected


def test_closing_a_feed_releases(bench: Bench) -> None:
    """What a closed feed held is ready for others at once, not after a lease."""
    bench.publish(*[bench.message() for _ in range(5)])
    feed = bench.feed()
    assert len(bench.take(feed, 5)) == 5
    started = monotonic()

    feed.close()
    again = bench.take(bench.feed(), 5)

    assert len(again) == 5
    assert monotonic() - started < LEASE
    assert {delivery.attempts for delivery in again} == {0}


def test_two_feeds_share_without_overlap(bench: Bench) -> None:
    """Two consumers of a queue get each message once between them."""
    first, second = bench.feed(prefetch=10), bench.feed(prefetch=10)
    ids = {f"m-{i}" for i in range(40)}
    bench.publish(*[bench.message(id) for id in sorted(ids)])

    seen: list[str] = []
    until = monotonic() + 20
    while len(seen) < 40 and monotonic() < until:
        for feed in (first, second):
            deliveries = feed.fetch(10, {})
            seen += [delivery.id for delivery in deliveries]
            feed.settle([Settlement(delivery, DONE) for delivery in deliveries])
        first.wait(0.02)

    assert sorted(seen) == sorted(ids)


def test_held_as_long_as_the_worker_lives(bench: Bench) -> None:
    """A delivery is given to nobody else while its feed renews, however long it takes."""
    bench.publish(bench.message("a"))
    mine = bench.feed()
    (delivery,) = bench.take(mine, 1)
    other = bench.feed()

    until = monotonic() + 3 * LEASE
    stolen = []
    while monotonic() < until:
        mine.renew()
        stolen += bench.take(other, 1, within=LEASE / 4)

    assert stolen == []
    assert mine.settle([Settlement(delivery, DONE)]) == []


def test_a_dead_feed_loses_nothing(bench: Bench) -> None:
    """What a consumer held that died is delivered again, and the broker counts that."""
    bench.publish(bench.message("a"))
    dead = bench.feed()
    assert [d.id for d in bench.take(dead, 1)] == ["a"]
    bench.abandon(dead)

    (again,) = bench.take(bench.feed(), 1)

    assert (again.id, again.attempts, again.crashes, again.deliveries) == ("a", 0, 0, 1)


def test_too_late_a_settlement_changes_nothing(bench: Bench) -> None:
    """Once a delivery is another consumer's, its first owner can neither settle nor lose it."""
    bench.publish(bench.message("a"))
    late = bench.feed()
    (old,) = bench.take(late, 1)
    bench.abandon(late)
    feed = bench.feed()
    (new,) = bench.take(feed, 1)

    for outcome in (DONE, RELEASE, Outcome("retry", 0.0, 1, 0)):
        # A feed whose connection is gone may say so first; it must not settle.
        with suppress(errors.Internal):
            assert [s.delivery.id for s in late.settle([Settlement(old, outcome)])] == ["a"]
    feed.renew()

    assert feed.settle([Settlement(new, DONE)]) == []
    assert bench.take(bench.feed(), 1, within=0.3) == []


def test_releasing_resets_the_count_of_dead_workers(bench: Bench) -> None:
    """A message given back in good order starts again at nought unsettled deliveries, or stays where it was."""
    bench.publish(bench.message("a"))
    dead = bench.feed()
    bench.take(dead, 1)
    bench.abandon(dead)
    feed = bench.feed()
    (again,) = bench.take(feed, 1)
    assert again.deliveries == 1

    feed.settle([Settlement(again, RELEASE)])

    (fresh,) = bench.take(feed, 1)
    assert fresh.deliveries == 0


def test_waiting_ends_when_something_arrives(bench: Bench) -> None:
    """A consumer that waits learns of a new message at once."""
    feed = bench.feed()
    while feed.fetch(1, {}):
        pytest.fail("the queue is new and must be empty")
    feed.wait(0.1)
    started = monotonic()
    thread = Thread(target=lambda: bench.publish(bench.message()))
    thread.start()

    assert len(bench.take(feed, 1)) == 1
    thread.join()
    assert monotonic() - started < 2.0


def test_wake_ends_a_wait(bench: Bench) -> None:
    """wake() ends a wait from another thread, also one that comes later."""
    feed = bench.feed()
    feed.fetch(1, {})
    feed.wait(0.01)
    feed.wake()
    started = monotonic()
    feed.wait(30.0)
    feed.wait(0.0)
    Thread(target=feed.wake).start()
    feed.wait(30.0)

    assert monotonic() - started < 20.0


def test_foreign_bytes_are_delivered_raw(bench: Bench) -> None:
    """What a stranger put on a queue arrives as the bytes it is, and can be dead-lettered."""
    bench.broker.put_raw(bench.queue.id, b"\x00not an envelope\xff")
    feed = bench.feed()
    (delivery,) = bench.take(feed, 1)

    feed.settle([Settlement(delivery, Outcome("dead", 0.0, 0, 0, "undecodable"))])

    (letter,) = bench.backend.browse(bench.dead, 1, 0)
    assert letter.body == b"\x00not an envelope\xff"


def test_due_in_tells_what_is_to_come(bench: Bench) -> None:
    """due_in() is 0 with work ready, and None when nothing is left."""
    feed = bench.feed()
    assert feed.due_in() is None
    bench.publish(bench.message())
    assert feed.due_in() == 0.0
    (delivery,) = bench.take(feed, 1)
    feed.settle([Settlement(delivery, Outcome("retry", 5.0, 1, 0))])
    due = feed.due_in()

    assert due is not None
    assert 3.0 < due <= 5.01


def test_many_threads_publish_at_once(make_bench: Callable[..., Bench]) -> None:
    """A producer shared by sixteen threads confirms and stores every message."""
    import kq

    bench = make_bench()
    with kq.App("test", broker=bench.broker.url) as app:
        errors: list[BaseException] = []

        def publish(worker: int) -> None:
            try:
                for i in range(25):
                    app.publish(bench.queue.id, {"n": i}, message_id=f"{worker}-{i}")
            except BaseException as error:
                errors.append(error)

        threads = [Thread(target=publish, args=(i,)) for i in range(16)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    assert errors == []
    assert len({d.id for d in bench.take(bench.feed(prefetch=500), 400)}) == 400
