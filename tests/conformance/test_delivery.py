"""Publish, fetch, settle: what every broker promises about one message."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import closing, suppress
from pathlib import Path
from threading import Thread
from time import monotonic, time
from typing import Any

import amqp
import pytest

from kq import errors
from kq.backend import Delivery, QueueSpec, Settlement
from kq.backends.rabbitmq import RabbitBackend
from kq.backends.rabbitmq_feed import RabbitFeed
from kq.backends.redis import RedisStore
from kq.backends.redis_error import Refusal
from kq.backends.sqlite import SQLiteStore
from kq.backends.store import BrokerAway, Move
from kq.backends.stored import StoredBackend
from kq.backends.stored_feed import StoredFeed
from kq.config import Settings
from kq.envelope import Envelope, clean, unpack
from kq.outcome import DONE, RELEASE, Failure, Outcome
from kq.scheme import open_backend
from tests.broker import AMQP_URL, REDIS_URL, amqp_channel
from tests.conformance.conftest import LEASE, ON_RABBITMQ, ON_REDIS, ON_SQLITE, ON_STORES, Bench
from tests.proxy import Proxy


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


def test_large_bodies_travel(make_bench: Callable[..., Bench]) -> None:
    """Bodies of eight megabytes, the most there is, arrive whole."""
    # A call may take as long as its lease allows; a server in Python takes its time on a busy machine.
    bench = make_bench(lease=30.0)
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

    assert feed.settle([Settlement(delivery, DONE)]) == ([], [])
    feed.close()

    assert bench.backend.info(bench.queue).message_count == 0
    assert bench.take(bench.feed(), 1, within=0.3) == []


def test_release_returns_in_order_and_uncharged(bench: Bench) -> None:
    """Released messages are back at once, in their old order, before later ones, without a charge.

    But a quorum queue without a limit of deliveries puts behind all others what is given back.
    """
    ids = ["a", "b", "c"]
    bench.publish(*[bench.message(id) for id in ids])
    feed = bench.feed()
    deliveries = bench.take(feed, 3)
    bench.publish(bench.message("d"))

    assert feed.settle([Settlement(delivery, RELEASE) for delivery in deliveries]) == ([], [])
    feed.close()
    again = bench.take(bench.feed(), 4)

    found = [delivery.id for delivery in again]
    if bench.broker.name == "rabbitmq":
        found.sort(key="d".__eq__)
    assert found == [*ids, "d"]
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

    assert feed.settle([Settlement(delivery, Outcome("dead", 0.0, 5, 1, "max_attempts", failure))]) == ([], [])
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
    assert mine.settle([Settlement(delivery, DONE)]) == ([], [])


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
            assert [s.delivery.id for s in late.settle([Settlement(old, outcome)]).late] == ["a"]
    feed.renew()

    assert feed.settle([Settlement(new, DONE)]) == ([], [])
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


def test_who_gives_back_again_and_again_counts_as_nobody_dead(bench: Bench) -> None:
    """However often a worker gives a message back, neither it nor another one takes that for workers that died."""
    bench.publish(bench.message("a"))
    feed = bench.feed()
    counts = []
    for _ in range(5):
        (delivery,) = bench.take(feed, 1)
        counts.append(delivery.deliveries)
        assert feed.settle([Settlement(delivery, RELEASE)]) == ([], [])
    feed.close()
    (other,) = bench.take(bench.feed(), 1)

    assert counts == [0] * 5
    # RabbitMQ counts each return; who has seen one gives a message back as a copy, of which nothing is counted.
    assert other.deliveries <= 1


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


def test_a_deleted_dead_letter_queue_holds_up_nobody(bench: Bench) -> None:
    """A dead letter whose queue somebody deleted gets a new one, and the rest of its batch is settled."""
    bench.publish(*[bench.message(id) for id in "abc"])
    feed = bench.feed()
    first, second, third = bench.take(feed, 3)
    bench.delete(bench.dead.id)

    settled = feed.settle(
        [
            Settlement(first, Outcome("dead", 0.0, 1, 0, "not_retryable")),
            Settlement(second, Outcome("retry", 0.0, 1, 0)),
            Settlement(third, DONE),
        ]
    )

    assert settled == ([], [])
    assert [letter.id for letter in bench.backend.browse(bench.dead, 10, 0)] == ["a"]
    (again,) = bench.take(feed, 1)
    assert (again.id, again.attempts) == ("b", 1)
    assert feed.settle([Settlement(again, DONE)]) == ([], [])
    feed.close()
    assert bench.take(bench.feed(), 1, within=0.3) == []


def test_many_die_at_once(bench: Bench) -> None:
    """Hundreds of messages that die together are a letter each, in their order, also under an id that one has."""
    ids = [f"m{n:03}" for n in range(200)]
    bench.publish(bench.message("m007", queue=bench.dead))
    bench.publish(*[bench.message(id) for id in ids])
    feed = bench.feed(prefetch=500)
    deliveries = bench.take(feed, len(ids))

    dead = [Settlement(delivery, Outcome("dead", 0.0, 1, 0, "not_retryable")) for delivery in deliveries]
    assert feed.settle(dead) == ([], [])

    letters = [letter.id for letter in bench.backend.browse(bench.dead, 1000, 0)]
    assert sorted(letters) == sorted(["m007", *ids])
    assert [id for id in letters if id != "m007"] == [id for id in ids if id != "m007"]
    feed.close()
    assert bench.backend.info(bench.queue).message_count == 0


def test_what_cannot_be_settled_is_told_and_stays(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where dead letters find no room, theirs fail one by one, stay ours, and can be settled later."""
    full = errors.Internal("no room", details={"reason": "full"})
    letters = bench.dead.id
    if bench.broker.stores:

        def refuse(*_: Any, **__: Any) -> bool:
            raise full

        feed = bench.feed()
        assert isinstance(feed, StoredFeed)
        monkeypatch.setattr(feed._store, "move", refuse)
    else:
        bench.delete(letters)
        with amqp_channel() as channel:
            arguments = {"x-queue-type": "quorum", "x-max-length": 0, "x-overflow": "reject-publish"}
            channel.queue_declare(letters, durable=True, auto_delete=False, arguments=arguments)
        feed = bench.feed()
    bench.publish(bench.message("a"), bench.message("b"))
    first, second = bench.take(feed, 2)
    # A quorum queue of length 0 takes one message before it knows that it is full.
    if not bench.broker.stores:
        while bench.backend.publish([bench.message(queue=bench.dead)], 10.0) == [None]:
            pass
    dead = Settlement(first, Outcome("dead", 0.0, 1, 0, "not_retryable"))

    late, failed = feed.settle([dead, Settlement(second, DONE)])
    assert (late, [settlement for settlement, _ in failed]) == ([], [dead])
    assert failed[0][1].details["reason"] == "full"
    feed.renew()
    assert not first.lost

    monkeypatch.undo()
    bench.delete(letters)
    assert feed.settle([dead]) == ([], [])
    assert [letter.id for letter in bench.backend.browse(bench.dead, 10, 0)] == ["a"]
    feed.close()
    assert bench.backend.info(bench.queue).message_count == 0


@ON_STORES
@pytest.mark.parametrize("alone", [False, True])
def test_a_letter_without_room_holds_up_no_other(bench: Bench, monkeypatch: pytest.MonkeyPatch, alone: bool) -> None:
    """Of letters that are stored together those are that find room; another one stays ours until it does."""
    feed = bench.feed()
    assert isinstance(feed, StoredFeed)
    move = feed._store.move
    full = errors.Internal("no room", details={"reason": "full"})

    def narrow(source: str, target: str, moves: Sequence[Move]) -> list[bool | errors.Error]:
        # As a transaction fails, or one of several calls.
        if alone and any(move.id == "b" for move in moves):
            raise full
        good = iter(move(source, target, [move for move in moves if move.id != "b"]))
        return [full if move.id == "b" else next(good) for move in moves]

    bench.publish(*[bench.message(id) for id in "abc"])
    dead = [Settlement(delivery, Outcome("dead", 0.0, 1, 0, "not_retryable")) for delivery in bench.take(feed, 3)]
    with monkeypatch.context() as patched:
        patched.setattr(feed._store, "move", narrow)
        late, failed = feed.settle(dead)
    assert (late, failed) == ([], [(dead[1], full)])
    assert [letter.id for letter in bench.backend.browse(bench.dead, 10, 0)] == ["a", "c"]
    feed.renew()
    assert not dead[1].delivery.lost

    assert feed.settle([dead[1]]) == ([], [])
    assert [letter.id for letter in bench.backend.browse(bench.dead, 10, 0)] == ["a", "c", "b"]


def test_a_full_queue_takes_back_what_came_from_it(bench: Bench) -> None:
    """A retry into a full queue does not wait for room that only its own end would make."""
    queue = bench.declare("small", max_length=2)
    bench.publish(bench.message("a", queue=queue))
    feed = bench.feed(queue, prefetch=1)
    (delivery,) = bench.take(feed, 1)
    while bench.backend.publish([bench.message(queue=queue)], 10.0) == [None]:
        pass

    assert feed.settle([Settlement(delivery, Outcome("retry", 0.0, 1, 0))]) == ([], [])

    seen: list[Delivery] = []
    while not seen or seen[-1].id != "a":
        (found,) = bench.take(feed, 1)
        seen.append(found)
        assert feed.settle([Settlement(found, DONE)]) == ([], [])
    assert seen[-1].attempts == 1


def test_a_deleted_queue_starves_no_other(bench: Bench) -> None:
    """A consumer of two queues goes on with one when somebody deletes the other."""
    other = bench.declare("other")
    feed = bench.feed(bench.queue, other)
    assert feed.fetch(5, {}) == []
    bench.delete(other.id)
    bench.publish(bench.message("a"))

    found: list[Delivery] = []
    until = monotonic() + 15
    while not found and monotonic() < until:
        with suppress(errors.Error):
            found += bench.take(feed, 1)

    assert [delivery.id for delivery in found] == ["a"]


@ON_RABBITMQ
@pytest.mark.parametrize("place", ["message_id", "header", "key", "surrogate"])
def test_text_that_is_none_is_delivered(bench: Bench, place: str) -> None:
    """A stranger's message with text that is no UTF-8 arrives with that escaped, and can be dead-lettered."""
    properties: dict[str, Any] = {"message_id": "m"}
    if place == "surrogate":
        properties = {"message_id": "\ud800", "application_headers": {"\ud800": "\ud800", "list": ["\ud800"]}}
    elif place == "message_id":
        properties = {"message_id": b"\xff\xfe"}
    else:
        properties["application_headers"] = {b"\xff": "v"} if place == "key" else {"k": b"\xff"}
    with amqp_channel() as channel:
        channel.basic_publish(amqp.Message(b"1", **properties), routing_key=bench.queue.id)
    bench.publish(bench.message("after"))

    feed = bench.feed()
    hostile, after = bench.take(feed, 2)
    text = {"message_id": "\\xff\\xfe", "surrogate": "\\xed\\xa0\\x80"}.get(place, "m")
    assert (hostile.id, after.id) == (text, "after")
    assert unpack(hostile.raw).id == text
    assert feed.settle([Settlement(hostile, Outcome("dead", 0.0, 0, 0, "undecodable")), Settlement(after, DONE)]) == (
        [],
        [],
    )

    assert [letter.id for letter in bench.backend.browse(bench.dead, 10, 0)] == [text]
    assert bench.backend.replay(bench.dead, None, bench.queue, clean) == 1


@ON_RABBITMQ
def test_what_arrives_over_a_closing_link_is_nobodys(bench: Bench) -> None:
    """Deliveries that come in while a broken link is closed do not mix with those of the next one."""
    feed = bench.feed(prefetch=500)
    assert isinstance(feed, RabbitFeed)
    feed.fetch(500, {})
    bench.publish(*[bench.message(f"m-{i}") for i in range(300)])

    feed._drop_link()
    assert (len(feed._outstanding), len(feed._arrivals)) == (0, 0)

    assert len({d.id for d in bench.take(feed, 300)}) == 300
    assert all(feed._is_ours(delivery) for delivery in feed._outstanding.values())


def test_looking_at_dead_letters_charges_nothing(bench: Bench) -> None:
    """However often somebody looks at a dead letter, it has had no deliveries that went wrong."""
    bench.publish(bench.message("a"))
    feed = bench.feed()
    (delivery,) = bench.take(feed, 1)
    feed.settle([Settlement(delivery, Outcome("dead", 0.0, 1, 0, "not_retryable"))])
    for _ in range(3):
        assert len(bench.backend.browse(bench.dead, 10, 0)) == 1

    (letter,) = bench.take(bench.feed(bench.dead), 1)

    assert letter.deliveries == 0


@ON_STORES
def test_what_is_leased_is_delivered(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """A store that fails for the second queue does not keep back what the first one gave."""
    other = bench.declare("other")
    bench.publish(bench.message("a"))
    feed = bench.feed(other, bench.queue)
    assert isinstance(feed, StoredFeed)
    take = feed._store.take

    def fail(queue: str, limit: int, lease: int) -> Any:
        if queue == other.id:
            raise BrokerAway("gone", details={"reason": "unavailable"})
        return take(queue, limit, lease)

    monkeypatch.setattr(feed._store, "take", fail)

    assert [d.id for d in feed.fetch(5, {})] == ["a"]


@ON_REDIS
def test_dead_letters_whose_answer_is_lost_are_in_time(bench: Bench) -> None:
    """A connection that breaks after dead letters were stored, before that was answered, makes none of them late."""
    bench.publish(*[bench.message(f"m{n}") for n in range(50)])
    with closing(Proxy(REDIS_URL)) as proxy:
        backend = open_backend(Settings(broker=proxy.url), "test")
        with closing(backend), closing(backend.feed([bench.queue], 100)) as feed:
            deliveries = bench.take(feed, 50)
            proxy.cut_after(0)
            dead = [Settlement(delivery, Outcome("dead", 0.0, 1, 0, "not_retryable")) for delivery in deliveries]

            assert feed.settle(dead) == ([], [])

    assert bench.backend.info(bench.queue).message_count == 0
    letters = [letter.id for letter in bench.backend.browse(bench.dead, 100, 0)]
    assert letters == [f"m{n}" for n in range(50)]


@ON_RABBITMQ
def test_a_replay_outlives_a_broken_connection(bench: Bench) -> None:
    """A connection that breaks while letters are replayed has hardly any of them replayed twice, and none lost."""
    ids = [f"m{n}" for n in range(20)]
    bench.publish(*[bench.message(id, queue=bench.dead, headers={"x_original_queue": bench.queue.id}) for id in ids])
    with closing(Proxy(AMQP_URL)) as proxy:
        backend = open_backend(Settings(broker=proxy.url), "test")
        with closing(backend):
            revived = 0

            def revive(envelope: Envelope) -> Envelope:
                nonlocal revived
                revived += 1
                if revived == 10:
                    proxy.cut_after(0)
                return Envelope(envelope.id, {}, envelope.properties, envelope.body)

            assert backend.replay(bench.dead, None, bench.queue, revive) == 20

    assert bench.backend.info(bench.dead).message_count == 0
    replayed = Counter(envelope.id for envelope in bench.backend.browse(bench.queue, 100, 0))
    assert sorted(replayed) == sorted(ids)
    assert sum(replayed.values()) <= 21


@ON_RABBITMQ
@pytest.mark.parametrize("after", [0, 21, 42, 105])
def test_no_false_confirmation_when_the_connection_breaks(bench: Bench, after: int) -> None:
    """Of a batch in whose middle the connection breaks, whatever counts as stored is stored."""
    with closing(Proxy(AMQP_URL)) as proxy:
        backend = open_backend(Settings(broker=proxy.url), "test")
        with closing(backend):
            assert backend.publish([bench.message("first")], 10.0) == [None]
            proxy.cut_after(after)
            results = backend.publish([bench.message(f"m-{i}") for i in range(200)], 10.0)

    stored = {envelope.id for envelope in bench.backend.browse(bench.queue, 1000, 0)}
    assert {f"m-{i}" for i, result in enumerate(results) if result is None} <= stored
    assert results == [None] * 200


@ON_RABBITMQ
def test_a_broker_that_blocks_a_connection_is_asked_nothing_over_it(bench: Bench) -> None:
    """It reads nothing there: who delays a message is told so at once, who looks at a queue does so elsewhere."""
    backend = bench.backend
    assert isinstance(backend, RabbitBackend)
    bench.publish(bench.message())
    (lane,) = backend._lanes._idle
    lane.link.blocked = "low on memory"

    (error,) = backend.publish([bench.message(delay=3600.0)], 10.0)
    assert error is not None
    assert error.details["reason"] == "blocked"
    assert not lane.buckets

    assert backend.info(bench.queue).ready == 1
    assert lane not in backend._lanes._idle


@ON_RABBITMQ
def test_nothing_is_confirmed_that_was_not_sent(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """A connection that breaks when all that was sent is confirmed says nothing of the rest of the batch."""
    backend = bench.backend
    assert isinstance(backend, RabbitBackend)
    (lane,) = backend._lanes._idle
    looks: list[None] = []

    def break_off() -> None:
        looks.append(None)
        if len(looks) == 2:
            while lane.publisher._pending:
                lane.link.drain(1.0)
            raise OSError("gone")

    monkeypatch.setattr(lane.link, "drain_all", break_off)

    assert backend.publish([bench.message() for _ in range(200)], 10.0) == [None] * 200
    assert bench.backend.info(bench.queue).ready == 200


@pytest.mark.parametrize("size", [1, 8 * 2**20])
@pytest.mark.parametrize("silence", [Proxy.freeze, Proxy.clog])
@ON_RABBITMQ
def test_a_silent_connection_is_replaced(bench: Bench, silence: Callable[[Proxy], None], size: int) -> None:
    """A publish to a connection that went silent ends in time, and the next one has a new connection."""
    with closing(Proxy(AMQP_URL)) as proxy:
        backend = open_backend(Settings(broker=proxy.url), "test")
        with closing(backend):
            assert backend.publish([bench.message("a")], 10.0) == [None]
            silence(proxy)
            started = monotonic()
            (error,) = backend.publish([bench.message("b", body=b"1" * size)], 0.3)
            took = monotonic() - started

            assert error is not None
            assert error.details["reason"] == "timeout"
            assert took < 1.0
            proxy.heal()
            assert backend.publish([bench.message("c")], 10.0) == [None]


@ON_STORES
def test_a_store_that_is_away_is_tried_twice(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """A store that stays away is asked twice, not until the time is over."""
    assert isinstance(bench.backend, StoredBackend)
    store = bench.backend._store()
    calls: list[None] = []

    def put(*_: Any) -> int:
        calls.append(None)
        raise BrokerAway("gone", details={"reason": "unavailable"})

    monkeypatch.setattr(store, "put", put)
    (error,) = bench.backend.publish([bench.message()], 10.0)

    assert error is not None
    assert len(calls) == 2


@ON_STORES
def test_what_a_broken_settle_did_is_not_late(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """A settle that broke off is called again, and what it had carried out is not reported as lost."""
    bench.publish(bench.message("a"), bench.message("b"))
    feed = bench.feed()
    assert isinstance(feed, StoredFeed)
    first, second = bench.take(feed, 2)
    batch = [Settlement(first, DONE), Settlement(second, Outcome("dead", 0.0, 1, 0, "not_retryable"))]

    def fail(*_: Any, **__: Any) -> bool:
        raise BrokerAway("gone", details={"reason": "unavailable"})

    with monkeypatch.context() as patch:
        patch.setattr(feed._store, "move", fail)
        with pytest.raises(BrokerAway):
            feed.settle(batch)

    assert feed.settle(batch) == ([], [])
    assert [s.delivery.id for s in feed.settle(batch).late] == ["a", "b"]


@ON_RABBITMQ
def test_a_confirmed_copy_is_not_published_again(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """A settlement whose copy was stored, but not acknowledged, is not stored twice when it is tried again."""
    bench.publish(bench.message("a"))
    feed = bench.feed()
    assert isinstance(feed, RabbitFeed)
    (delivery,) = bench.take(feed, 1)
    retry = Settlement(delivery, Outcome("retry", 0.0, 1, 0))

    with monkeypatch.context() as patch:

        def interrupt(*_: Any) -> None:
            raise KeyboardInterrupt

        patch.setattr(feed, "_ack", interrupt)
        with pytest.raises(KeyboardInterrupt):
            feed.settle([retry])

    assert feed.settle([retry]) == ([], [])
    assert [(d.id, d.attempts) for d in bench.take(feed, 2, within=0.5)] == [("a", 1)]


@ON_REDIS
def test_a_full_server_fails_no_wait(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """A wake-up that cannot be passed on, because the server is full, is dropped without an error."""
    other = bench.declare("other")
    feed = bench.feed(bench.queue, other)
    assert isinstance(feed, StoredFeed)
    store = feed._store
    assert isinstance(store, RedisStore)
    store.wait([bench.queue.id, other.id], 0.0)

    def refuse(*_: Any) -> int:
        raise Refusal("OOM command not allowed")

    monkeypatch.setattr(store, "_answer", refuse)
    bench.publish(bench.message(queue=other))

    assert store.wait([bench.queue.id], 10.0) == []


@ON_SQLITE
def test_a_consumer_that_could_not_register_does_so_later(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """A consumer that found the file locked when it began to listen hears of arrivals all the same."""
    other = bench.declare("other")
    store = sqlite_store(bench, other)
    queues = [bench.queue.id, other.id]
    store.wait(queues[:1], 0.0)

    def fail() -> Any:
        raise BrokerAway("locked", details={"reason": "timeout"})

    with monkeypatch.context() as patch:
        patch.setattr(store, "_transaction", fail)
        with pytest.raises(BrokerAway):
            store.wait(queues, 0.0)
    store.wait(queues, 0.0)
    bench.publish(bench.message(queue=other))

    assert store.wait(queues, 10.0) == queues


@ON_SQLITE
def test_a_consumer_struck_off_by_mistake_comes_back(bench: Bench) -> None:
    """Whoever could not see a consumer's socket for a moment keeps it from hearing only until it renews."""
    store = sqlite_store(bench)
    queues = [bench.queue.id]
    store.wait(queues, 0.0)
    assert store._listener is not None
    path = Path(store._listener.path)
    hidden = path.rename(path.with_suffix(".hidden"))
    bench.publish(bench.message())
    hidden.rename(path)
    assert store.wait(queues, 0.0) == []

    bench.feeds[-1].renew()
    bench.publish(bench.message())

    assert store.wait(queues, 10.0) == queues


@ON_SQLITE
def test_an_interrupted_transaction_hinders_nobody(bench: Bench) -> None:
    """A caller that was interrupted inside a transaction leaves nothing behind that the next one trips over."""
    assert isinstance(bench.backend, StoredBackend)
    store = bench.backend._store()
    assert isinstance(store, SQLiteStore)
    for begin in ("BEGIN IMMEDIATE", "BEGIN"):
        assert store._connection is not None
        store._connection.execute(begin)
        bench.publish(bench.message())
        store._connection.execute(begin)
        bench.backend.info(bench.queue)

    assert bench.backend.info(bench.queue).ready == 2


def sqlite_store(bench: Bench, *more: QueueSpec) -> SQLiteStore:
    """Return the store of a new feed."""
    feed = bench.feed(bench.queue, *more)
    assert isinstance(feed, StoredFeed)
    assert isinstance(feed._store, SQLiteStore)
    return feed._store


@ON_RABBITMQ
def test_a_window_that_changed_just_now_is_widened_soon(bench: Bench) -> None:
    """Who wants more right after a change gets it without waiting for anything else to happen."""
    bench.publish(*(bench.message() for _ in range(8)))
    feed = bench.feed(prefetch=8)
    got = bench.take(feed, 1)
    # Twice at once: the second change comes too soon after the first.
    got += feed.fetch(2, {})
    got += feed.fetch(7, {})
    started = monotonic()
    while len(got) < 8 and monotonic() - started < 20:
        feed.wait(20)
        got += feed.fetch(8 - len(got), {})
    assert len(got) == 8
    assert monotonic() - started < 5
