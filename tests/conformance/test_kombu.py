"""Plain Kombu programs on kq's own transports: what AMQP promises them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import kombu
import pytest
from kombu import Exchange, Producer, Queue

import kq
import kq.backends
from kq.backends import virtual_channel
from kq.backends.store import BrokerAway
from kq.errors import Internal
from tests.broker import Broker
from tests.conformance.conftest import ON_STORES

pytestmark = ON_STORES


class Program:
    """A Kombu program with one channel; its queues and exchanges have names of their own."""

    def __init__(self, broker: Broker) -> None:
        self.broker = broker
        self.connection = kombu.Connection(f"kq-{broker.url}")
        self.channel: Any = self.connection.channel()
        self.producer = Producer(self.channel)

    def queue(self, *, exchange: Exchange | None = None, key: str = "", **values: Any) -> Any:
        """Declare a queue, bound to an exchange if there is one."""
        name = self.broker.queue_id()
        queue = Queue(name, exchange or Exchange(""), routing_key=key or name, **values)(self.channel)
        queue.declare()
        return queue

    def beside_a_full_one(self) -> tuple[Any, Any]:
        """Declare a queue whose dead letters go to another one, which has no room for any; return both."""
        full = self.queue(max_length=1)
        self.producer.publish("first", routing_key=full.name)
        arguments = {"x-dead-letter-exchange": "", "x-dead-letter-routing-key": full.name}
        return self.queue(queue_arguments=arguments), full

    def drain(self, queue: Any) -> list[Any]:
        """Take and acknowledge all that is in a queue; return the payloads."""
        found = []
        while (message := queue.get()) is not None:
            found.append(message.payload)
            message.ack()
        return found


@pytest.fixture
def program(broker: Broker) -> Iterator[Program]:
    """A program."""
    assert kq.backends
    program = Program(broker)
    yield program
    program.connection.close()


@pytest.mark.parametrize(
    ("binding", "matching", "others"),
    [
        ("lazy.#", ["lazy", "lazy.a", "lazy.a.b"], ["lazya", "a.lazy", ""]),
        ("#.z", ["z", "a.z", "a.b.z"], ["az", "z.a"]),
        ("a.#.z", ["a.z", "a.b.z", "a.b.c.z"], ["a", "z", "az"]),
        ("#", ["", "a", "a.b"], []),
        ("*", ["a"], ["", "a.b"]),
        ("*.orange.*", ["quick.orange.rabbit"], ["orange", "quick.orange", "quick.orange.male.rabbit"]),
        ("a+b.(c)", ["a+b.(c)"], ["aab.c"]),
    ],
)
def test_topics(program: Program, binding: str, matching: list[str], others: list[str]) -> None:
    """A binding's ``*`` is one word, its ``#`` any number of them."""
    exchange = Exchange(program.broker.queue_id("topic"), type="topic")
    queue = program.queue(exchange=exchange, key=binding)
    for key in [*matching, *others]:
        program.producer.publish({"key": key}, exchange=exchange, routing_key=key)

    assert [payload["key"] for payload in program.drain(queue)] == matching
    queue.delete()
    exchange(program.channel).delete()


def test_fanout_reaches_every_queue(program: Program) -> None:
    """Each queue of a fanout exchange has a copy."""
    exchange = Exchange(program.broker.queue_id("fanout"), type="fanout")
    queues = [program.queue(exchange=exchange) for _ in range(3)]
    program.producer.publish("all", exchange=exchange)

    assert [program.drain(queue) for queue in queues] == [["all"]] * 3
    exchange(program.channel).delete()


@pytest.mark.parametrize("how", ["requeue", "close"])
def test_what_comes_back_says_so(program: Program, how: str) -> None:
    """A message that was given back, or was with a channel that was closed, is marked as delivered again."""
    queue = program.queue()
    program.producer.publish("a", routing_key=queue.name)
    other: Any = program.connection.channel()
    message = queue.bind(other).get()
    assert message.delivery_info["redelivered"] is False
    if how == "requeue":
        message.requeue()
    other.close()

    again = queue.get()
    assert again.delivery_info["redelivered"] is True
    again.requeue()
    assert queue.get().delivery_info["redelivered"] is True


def test_several_are_acknowledged_at_once(program: Program) -> None:
    """With ``multiple`` all that was delivered before is acknowledged as well, and nothing that came later."""
    queue = program.queue()
    for n in range(4):
        program.producer.publish(n, routing_key=queue.name)
    other: Any = program.connection.channel()
    messages = [queue.bind(other).get() for _ in range(4)]
    messages[0].ack()
    messages[2].ack(multiple=True)
    other.close()

    assert program.drain(queue) == [3]


def test_a_full_queue_is_a_channel_error(program: Program) -> None:
    """What a queue has no room for is refused by an error that Kombu programs know how to catch."""
    queue = program.queue(max_length=1)
    program.producer.publish("a", routing_key=queue.name)
    with pytest.raises(program.connection.channel_errors) as caught:
        program.producer.publish("b", routing_key=queue.name)
    assert isinstance(caught.value, Internal)
    assert program.drain(queue) == ["a"]


def test_a_reject_goes_by_the_messages_own_key(program: Program) -> None:
    """As AMQP has it: the dead-letter exchange sees the key that the message was published with."""
    events, graveyard = (Exchange(program.broker.queue_id(name), type="topic") for name in ("events", "graveyard"))
    work = program.queue(exchange=events, key="orders.*", queue_arguments={"x-dead-letter-exchange": graveyard.name})
    dead = program.queue(exchange=graveyard, key="orders.new")
    program.producer.publish("rejected", exchange=events, routing_key="orders.new")
    work.get().reject()
    assert program.drain(dead) == ["rejected"]


def test_what_is_rejected_on_a_queue_of_kqs_is_a_dead_letter(program: Program) -> None:
    """With its reason, and in its order, as on RabbitMQ."""
    queue_id = program.broker.queue_id()
    with kq.App("test", broker=program.broker.url) as app:
        ids = app.publish_many(queue_id, [1, 2])
        queue = Queue(queue_id, Exchange(""), routing_key=queue_id)(program.channel)
        for _ in ids:
            queue.get().reject()
        letters = app.dead(queue_id).list()
        assert [(letter.id, letter.payload, letter.reason) for letter in letters] == [
            (ids[0], 1, "rejected"), (ids[1], 2, "rejected"),
        ]  # fmt: skip


def test_what_must_be_routed_and_cannot_be_is_an_error(program: Program) -> None:
    """`mandatory` is a question whether anybody will ever see the message."""
    exchange = Exchange(program.broker.queue_id("exchange"), type="direct")
    queue = program.queue(exchange=exchange, key="somebody")
    program.producer.publish("a", exchange=exchange, routing_key="somebody", mandatory=True)
    with pytest.raises(Internal, match="no queue takes"):
        program.producer.publish("b", exchange=exchange, routing_key="nobody", mandatory=True)
    assert program.drain(queue) == ["a"]


def test_what_is_delayed_is_in_a_queue(program: Program) -> None:
    """It is not empty, and is not deleted as if it were."""
    queue_id = program.broker.queue_id()
    with kq.App("test", broker=program.broker.url) as app:
        app.publish(queue_id, 1, delay=600)
        program.channel.queue_delete(queue_id, if_empty=True)
        assert app.info(queue_id).delayed == 1


def test_a_consumed_queue_is_in_use(program: Program) -> None:
    """Also where nothing of it is held: who deletes only what nobody uses does not delete it."""
    queue = program.queue()
    program.producer.publish("a", routing_key=queue.name)
    with kombu.Connection(f"kq-{program.broker.url}") as connection:
        channel: Any = connection.channel()
        channel.basic_consume(queue.name, False, lambda message: None, "tag")
        program.channel.queue_delete(queue.name, if_unused=True)
        assert queue.queue_declare(passive=True).message_count == 1
        channel.basic_cancel("tag")
        program.channel.queue_delete(queue.name, if_empty=True)
        assert queue.queue_declare(passive=True).message_count == 1
        program.channel.queue_delete(queue.name, if_unused=True)
    assert program.channel.store.arguments(queue.name) is None


def test_an_acknowledgement_that_failed_can_be_made_again(program: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is not taken for done."""
    queue = program.queue()
    program.producer.publish("a", routing_key=queue.name)
    message = queue.get()

    def away(*_: Any) -> list[bool]:
        raise BrokerAway("away", details={"reason": "timeout"})

    with monkeypatch.context() as patched:
        patched.setattr(program.channel.store, "settle", away)
        with pytest.raises(program.connection.connection_errors):
            message.ack()
    message.ack()

    counts = program.channel.store.counts(queue.name)
    assert (counts.ready, counts.leased) == (0, 0)


def test_what_has_expired_and_finds_no_room_keeps_nobody_waiting(
    program: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is tried again later, and what is behind it is delivered."""
    monkeypatch.setattr(virtual_channel, "_FULL", 60_000)
    queue, full = program.beside_a_full_one()
    for n in range(3):
        program.producer.publish(n, routing_key=queue.name, expiration=0.001)
    program.producer.publish("good", routing_key=queue.name)
    # Until they have expired.
    with pytest.raises(TimeoutError):
        program.connection.drain_events(timeout=0.05)

    message = queue.get()
    assert message.payload == "good"
    message.ack()
    counts = program.channel.store.counts(queue.name)
    assert (counts.ready, counts.delayed, counts.leased) == (0, 3, 0)
    assert program.drain(full) == ["first"]


def test_what_has_expired_is_dead_lettered_once_there_is_room(
    program: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However often there was none before."""
    monkeypatch.setattr(virtual_channel, "_FULL", 200)
    queue, full = program.beside_a_full_one()
    program.producer.publish("late", routing_key=queue.name, expiration=0.001)
    for _ in range(3):
        with pytest.raises(TimeoutError):
            program.connection.drain_events(timeout=0.25)
        assert queue.get() is None
    assert program.drain(full) == ["first"]
    with pytest.raises(TimeoutError):
        program.connection.drain_events(timeout=0.25)

    assert queue.get() is None
    assert program.drain(full) == ["late"]


def test_many_that_find_no_room_hold_nobody_up(program: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the first of them are tried again before the last ones have been: whoever asks gets an answer."""
    monkeypatch.setattr(virtual_channel, "_FULL", 1)
    queue, _ = program.beside_a_full_one()
    for n in range(5):
        program.producer.publish(n, routing_key=queue.name, expiration=0.001)

    with pytest.raises(TimeoutError):
        program.connection.drain_events(timeout=0.05)
    assert queue.get() is None


def test_what_comes_without_need_of_acknowledgement_comes_back_if_that_fails(
    program: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody has seen it, and nobody holds it for ever."""
    queue = program.queue()
    program.producer.publish("a", routing_key=queue.name)

    def refuse(*_: Any) -> list[bool]:
        raise Internal("full", details={"reason": "full"})

    with monkeypatch.context() as patched:
        patched.setattr(program.channel.store, "settle", refuse)
        with pytest.raises(Internal):
            queue.get(no_ack=True)
    assert program.channel.held == {}


def test_a_child_leaves_to_its_parent_what_the_parent_holds(program: Program) -> None:
    """Kombu closes the connections of its pools in the children of `multiprocessing`."""
    queue = program.queue()
    for n in range(2):
        program.producer.publish(n, routing_key=queue.name)
    held = queue.get()
    if program.broker.name == "sqlite":
        assert program.channel.store.wait([queue.name], 0.0)
        assert os.path.exists(program.channel.store._listener.path)
    pid = os.fork()
    if not pid:
        try:
            program.connection.close()
        finally:
            os._exit(0)
    assert os.waitpid(pid, 0)[1] == 0

    assert program.channel.store.counts(queue.name).leased == 1
    if program.broker.name == "sqlite":
        assert os.path.exists(program.channel.store._listener.path)
    held.ack()
    assert program.drain(queue) == [1]
