"""Permissions and signatures, with a whole app, on every broker."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Callable
from contextvars import copy_context
from threading import Thread
from time import monotonic, time
from typing import Any

import pytest

import kq
from kq import errors, queue
from kq.envelope import Envelope, pack
from kq.security import Actor, Policy, Scope, context
from tests.broker import Broker, amqp_channel

MakeApp = Callable[..., kq.App]

KEY = "an old secret of at least 32 bytes!"
NEW_KEY = "a new secret of at least 32 bytes!!"

CLERKS = [
    Policy("publish", actions="queue.publish", resources="*", groups=["clerks"]),
    Policy(
        "own queues",
        actions="queue.publish.queue",
        resources="test*",
        conditions=[{"field": "actor.meta.role", "operator": "eq", "value": "clerk"}],
    ),
]


@pytest.fixture
def handled() -> list[Any]:
    """What handlers have got."""
    return []


def clerk(app: kq.App, **meta: Any) -> Any:
    """Act as a clerk."""
    return app.registry.guard.acting(Actor("user:ann", {"role": "clerk", **meta}), ["clerks"])


# Permissions.


def test_publishing_asks_twice(make_app: MakeApp, queue_id: str) -> None:
    """First whether at all, then whether here; each denial says which, is final, and nothing is published."""
    app = make_app(policies=CLERKS)
    with clerk(app):
        assert app.publish(queue_id, 1)
        with pytest.raises(errors.PermissionDenied) as caught:
            app.publish("other:queue", 1)
    assert caught.value.details == {"action": "queue.publish.queue", "resource": "other:queue", "actor": "user:ann"}
    assert not caught.value.retryable
    with (
        app.registry.guard.acting(Actor("user:bob", {"role": "clerk"})),
        pytest.raises(errors.PermissionDenied) as caught,
    ):
        app.publish(queue_id, 1)
    assert caught.value.details == {"action": "queue.publish", "resource": "", "actor": "user:bob"}
    assert app.info(queue_id).ready == 1


def test_invalid_messages_are_told_before_permissions(make_app: MakeApp, queue_id: str) -> None:
    """What is wrong with a message is said to everybody; whether a queue is declared only to who may know."""
    app = make_app(policies=CLERKS, create_queues=False)
    with app.registry.guard.acting(Actor("user:bob")):
        with pytest.raises(errors.Invalid, match="empty"):
            app.publish(queue_id, "")
        with pytest.raises(errors.PermissionDenied):
            app.publish(queue_id, 1)
    with clerk(app), pytest.raises(errors.NotFound):
        app.publish(queue_id, 1)


def test_strict_mode_decides_about_nobody(make_app: MakeApp, queue_id: str) -> None:
    """Outside of any context strict mode denies, and else everything is allowed."""
    assert make_app(policies=CLERKS).publish(queue_id, 1)
    app = make_app(policies=CLERKS, strict_mode=True)
    for call in (lambda: app.publish(queue_id, 1), lambda: app.info(queue_id), lambda: app.dead(queue_id).list()):
        with pytest.raises(errors.PermissionDenied, match="strict mode"):
            call()


def test_the_context_goes_along(make_app: MakeApp, queue_id: str) -> None:
    """Threads with a copied context, tasks and async publishing act as whoever started them."""
    app = make_app(policies=CLERKS, strict_mode=True)
    sent: list[str] = []
    with clerk(app):
        thread = Thread(target=copy_context().run, args=(lambda: sent.append(app.publish(queue_id, 1)),))
        thread.start()
        thread.join()

        async def work() -> None:
            sent.append(await app.apublish(queue_id, 2))
            sent.extend(await asyncio.create_task(app.apublish_many(queue_id, [3, 4])))

        asyncio.run(work())
    assert len(sent) == 4
    with pytest.raises(errors.PermissionDenied):
        asyncio.run(app.apublish(queue_id, 5))


def test_headers_are_seen_by_policies(make_app: MakeApp, queue_id: str) -> None:
    """``meta.*`` is the message's headers."""
    app = make_app(
        policies=[
            Policy("any", actions="queue.publish*", resources="*"),
            Policy("not urgent", actions="queue.publish.queue", resources="*", effect="deny",
                   conditions=[{"field": "meta.priority", "operator": "exists"},
                               {"field": "meta.priority", "operator": "eq", "value": "critical"}]),
        ]
    )  # fmt: skip
    with app.registry.guard.acting(Actor("user:ann")):
        assert app.publish(queue_id, 1)
        assert app.publish(queue_id, 1, {"priority": "low"})
        with pytest.raises(errors.PermissionDenied, match="not urgent"):
            app.publish(queue_id, 1, {"priority": "critical"})


def test_handlers_run_as_the_worker(make_app: MakeApp, broker: Broker, queue_id: str, handled: list[Any]) -> None:
    """A handler acts under the worker's own actor, whoever published; what it may not publish is final."""
    other = broker.queue_id("other")
    app = make_app(
        policies=[
            Policy("consume", actions="queue.consume.queue", resources="*", groups=["workers"]),
            Policy("all", actions="queue.publish*", resources=queue_id),
            Policy("first", actions="queue.publish", resources="*"),
        ],
        actor="service:worker", groups=["workers"], strict_mode=True,
    )  # fmt: skip

    @app.consumer(queue_id)
    def handle(payload: Any) -> None:
        actor = kq.security.current_actor()
        handled.append(actor.id if actor else None)
        queue.publish(other, payload)

    with app.registry.guard.acting(Actor("user:ann")):
        app.publish(queue_id, 1)
    assert app.drain(20) == 1
    assert handled == ["service:worker"]
    with context(Actor("root"), Scope([Policy("root", actions="*", resources="*")])):
        (dead,) = app.dead(queue_id).list()
    assert (dead.reason, dead.error_kind) == ("not_retryable", "PERMISSION_DENIED")
    assert "service:worker" in str(dead.error_message)


def test_consuming_and_administration_ask(make_app: MakeApp, queue_id: str) -> None:
    """A worker, a puller and each look into a queue need permissions of their own."""
    app = make_app(policies=CLERKS, actor="service:worker")
    app.consumer(queue_id)(print)
    with clerk(app):
        app.publish(queue_id, 1)
        for call in (
            lambda: app.info(queue_id), lambda: app.purge(queue_id), lambda: app.dead(queue_id).list(),
            lambda: app.dead(queue_id).get("x"), lambda: app.dead(queue_id).replay(),
            lambda: app.dead(queue_id).purge(),
        ):  # fmt: skip
            with pytest.raises(errors.PermissionDenied) as caught:
                call()
            assert caught.value.details["action"] == "queue.admin.queue"
        with pytest.raises(errors.PermissionDenied) as caught:
            kq.Consumer(app, queue_id)
        assert caught.value.details["action"] == "queue.consume.queue"
    with pytest.raises(errors.PermissionDenied) as caught:
        app.drain(1)
    assert caught.value.details == {
        "action": "queue.consume.queue", "resource": queue_id, "actor": "service:worker",
    }  # fmt: skip
    assert app.info(queue_id).ready == 1


def test_denials_are_audited(make_app: MakeApp, caplog: pytest.LogCaptureFixture) -> None:
    """One JSON line on ``kq.audit``, which no name can break, without the payload."""
    app = make_app(policies=CLERKS)
    with (
        caplog.at_level(logging.INFO, "kq.audit"),
        app.registry.guard.acting(Actor("user:x y")),
        pytest.raises(errors.PermissionDenied),
    ):
        app.publish("a:b", {"card": "c4nary"}, {"trace": "c4nary"})
    (record,) = [record for record in caplog.records if record.name == "kq.audit"]
    line = record.getMessage()
    found = json.loads(line)
    assert (found["actor"], found["action"], found["event"]) == ("user:x y", "queue.publish", "denied")
    assert "\n" not in line
    assert "c4nary" not in line


# Signatures.


def put(broker: Broker, queue_id: str, envelope: Envelope) -> None:
    """Put a message on a queue with a client that is not ours."""
    if broker.name == "rabbitmq":
        import amqp

        properties = {k: v for k, v in envelope.properties.items() if k != "timestamp"}
        message = amqp.Message(
            envelope.body, application_headers=envelope.headers, message_id=envelope.id, **properties
        )  # fmt: skip
        with amqp_channel() as channel:
            channel.basic_publish(message, routing_key=queue_id)
    else:
        put_packed(broker, queue_id, envelope)


def put_packed(broker: Broker, queue_id: str, envelope: Envelope) -> None:
    """Put an envelope into a store, as a stranger with the broker's password could."""
    broker.put_raw(queue_id, pack(envelope))


def caught(app: kq.App, queue_id: str, **changes: Any) -> Envelope:
    """Publish a message, take it off the queue, and return it, changed."""
    app.publish(queue_id, {"n": 1}, {"tenant": "t"}, **changes)
    backend = app.registry.backend()
    (envelope,) = backend.browse(app.registry.spec(queue_id), 10, 0)
    backend.remove(app.registry.spec(queue_id), [envelope.id])
    return envelope


def signing_app(make_app: MakeApp, queue_id: str, handled: list[Any], **settings: Any) -> kq.App:
    """An app whose queue asks for signatures."""
    app = make_app(**{"signing": kq.Signing({"k1": KEY}, "k1"), **settings})
    app.queue(queue_id, require_signature=True, max_attempts=1)
    app.consumer(queue_id)(handled.append)
    return app


def test_signed_messages_are_handled(make_app: MakeApp, queue_id: str, handled: list[Any]) -> None:
    """Also delayed, retried, of any payload and header."""
    app = signing_app(
        make_app, queue_id, handled, policies=[*CLERKS, Policy("consume", actions="queue.consume*", resources="*")]
    )
    with clerk(app, level=3):
        app.publish(queue_id, {"n": 1}, {"priority": 7, "f": 1.0, "b": True, "i": 2**40, "s": "ü"})
    app.publish(queue_id, [2], delay=0.1, expires=30)
    app.publish_many(queue_id, [3, 4])
    until = monotonic() + 20
    while len(handled) < 4 and monotonic() < until:
        # RabbitMQ does not count what is delayed.
        app.drain(1)
    assert sorted(map(str, handled)) == ["3", "4", "[2]", "{'n': 1}"]


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda e: e.headers.pop("x_sig"), "unsigned"),
        (lambda e: e.headers.update(tenant="other"), "altered"),
        (lambda e: e.headers.update(extra=1), "altered"),
        (lambda e: setattr(e, "body", b'{"n":2}'), "altered"),
        (lambda e: setattr(e, "id", "another"), "altered"),
        (lambda e: e.properties.update(type="x"), "altered"),
        (lambda e: e.headers.update(x_expires_at=time() + 1000), "altered"),
        (lambda e: e.headers.update(x_sig="1.a.b"), "malformed signature"),
        (lambda e: e.headers.update(x_sig=5), "malformed signature"),
    ],
)
def test_what_is_not_signed_is_not_handled(
    make_app: MakeApp, broker: Broker, queue_id: str, handled: list[Any], change: Any, why: str
) -> None:
    """Unsigned and altered messages are dead-lettered as unverified with the reason, and never reach a handler."""
    app = signing_app(make_app, queue_id, handled)
    forged = caught(app, queue_id)
    change(forged)
    put(broker, queue_id, forged)
    # What a stranger puts into a store shows up at the next look.
    app.publish(queue_id, "genuine")
    assert app.drain(20) == 2
    assert handled == ["genuine"]
    (dead,) = app.dead(queue_id).list()
    assert dead.reason == "unverified"
    assert why in str(dead.error_message)


def test_what_is_settled_beforehand_is_verified_before_that(
    make_app: MakeApp, broker: Broker, queue_id: str, handled: list[Any]
) -> None:
    """On a queue that runs messages at most once, too, what is not trusted is dead-lettered and not just dropped."""
    app = make_app(signing=kq.Signing({"k1": KEY}, "k1"))
    app.queue(queue_id, require_signature=True)
    app.consumer(queue_id, auto_ack=True)(handled.append)
    forged = caught(app, queue_id)
    forged.body = b'"forged"'
    put(broker, queue_id, forged)
    app.publish(queue_id, "genuine")
    app.publish(queue_id, "too late", expires=0)
    assert app.drain(20) == 3
    assert handled == ["genuine"]
    found = {(dead.reason, dead.error_message, dead.body) for dead in app.dead(queue_id).list()}
    assert ("unverified", "altered", b'"forged"') in found
    assert {reason for reason, _, _ in found} == {"unverified", "expired"}


def test_moved_messages_and_unknown_keys_are_told(
    make_app: MakeApp, broker: Broker, queue_id: str, handled: list[Any]
) -> None:
    """A message for another queue, and one signed with another key."""
    app = signing_app(make_app, queue_id, handled)
    moved = caught(make_app(signing=kq.Signing({"k1": KEY}, "k1")), broker.queue_id("elsewhere"))
    foreign = caught(make_app(signing=kq.Signing({"k9": NEW_KEY}, "k9")), queue_id)
    for envelope in (moved, foreign):
        put(broker, queue_id, envelope)
    app.publish(queue_id, "genuine")
    assert app.drain(20) == 3
    assert handled == ["genuine"]
    reasons = {str(dead.error_message).partition(",")[0] for dead in app.dead(queue_id).list()}
    assert any("signed for queue" in reason for reason in reasons)
    assert any("unknown key 'k9'" in reason for reason in reasons)


def test_keys_rotate_without_a_pause(make_app: MakeApp, queue_id: str, handled: list[Any]) -> None:
    """Old and new keys verify side by side; the old one is taken away in the end."""
    before = make_app(signing=kq.Signing({"k1": KEY}, "k1"))
    after = make_app(signing=kq.Signing({"k2": NEW_KEY}, "k2"))
    before.publish(queue_id, 1)
    after.publish(queue_id, 2)
    app = signing_app(make_app, queue_id, handled, signing=kq.Signing({"k1": KEY, "k2": NEW_KEY}, "k2"))
    assert app.drain(20) == 2
    assert sorted(handled) == [1, 2]


def test_the_signer_s_permission_is_asked_anew(make_app: MakeApp, queue_id: str, handled: list[Any]) -> None:
    """Who may not publish by the worker's policies has published in vain, also where their own let them."""
    allowing = make_app(
        signing=kq.Signing({"k1": KEY}, "k1"), policies=[Policy("all", actions="*", resources="*")]
    )  # fmt: skip
    with allowing.registry.guard.acting(Actor("user:bob", {"role": "guest"}), ["clerks"]):
        allowing.publish(queue_id, "by bob")
    with allowing.registry.guard.acting(Actor("user:ann", {"role": "clerk"}), ["clerks"]):
        allowing.publish(queue_id, "by ann")
    app = signing_app(
        make_app, queue_id, handled, actor="service:worker",
        policies=[*CLERKS, Policy("consume", actions="queue.consume.queue", resources="*")],
    )  # fmt: skip
    assert app.drain(20) == 2
    assert handled == ["by ann"]
    (dead,) = app.dead(queue_id).list()
    assert dead.reason == "unverified"
    assert "user:bob" in str(dead.error_message)
    assert "queue.publish.queue" in str(dead.error_message)


def test_signatures_can_be_asked_for_everywhere(make_app: MakeApp, queue_id: str, handled: list[Any]) -> None:
    """``require`` binds queues that nobody declared as well, and pullers as workers."""
    make_app().publish(queue_id, "unsigned")
    app = make_app(signing=kq.Signing({"k1": KEY}, "k1", require=True))
    app.publish(queue_id, "signed")
    with kq.Consumer(app, queue_id) as consumer:
        message = consumer.receive(timeout=20)
        assert message is not None
        assert message.payload() == "signed"
        message.ack()
    (dead,) = app.dead(queue_id).list()
    assert (dead.reason, dead.payload) == ("unverified", "unsigned")


def test_dead_letters_keep_their_signature(
    make_app: MakeApp, broker: Broker, queue_id: str, handled: list[Any]
) -> None:
    """A replayed letter is signed anew and runs, also one that had an expiry; a forged one stays forged."""
    app = signing_app(make_app, queue_id, handled)
    failing = make_app(signing=kq.Signing({"k1": KEY}, "k1"))
    failing.queue(queue_id, require_signature=True, max_attempts=1)

    @failing.consumer(queue_id)
    def fail(payload: Any) -> None:
        raise errors.Invalid("no")

    forged = caught(failing, queue_id)
    failing.publish(queue_id, "kept", expires=3600)
    forged.body = b'"forged"'
    put(broker, queue_id, forged)
    failing.publish(queue_id, "kept as well")
    assert failing.drain(20) == 3
    assert app.dead(queue_id).replay() == 3
    assert app.drain(20) == 3
    assert sorted(handled) == ["kept", "kept as well"]
    (dead,) = app.dead(queue_id).list()
    assert (dead.reason, dead.body) == ("unverified", b'"forged"')


def test_dead_letters_can_be_consumed(make_app: MakeApp, queue_id: str, handled: list[Any]) -> None:
    """A dead letter is signed for the queue it came from, and trusted where it is that queue's; also with an expiry."""
    app = make_app(signing=kq.Signing({"k1": KEY}, "k1", require=True))

    @app.consumer(queue_id, max_attempts=1)
    def fail(payload: Any) -> None:
        raise errors.Invalid("no")

    app.consumer(queue_id + ".dead")(handled.append)
    app.publish(queue_id, "a letter")
    app.publish(queue_id, "with an expiry", expires=3600)
    assert app.drain(20) == 4
    assert sorted(handled) == ["a letter", "with an expiry"]


def test_a_queue_cannot_ask_for_what_nobody_can_check(make_app: MakeApp, queue_id: str) -> None:
    """Without keys require_signature is refused, in words that tell what to do."""
    with pytest.raises(errors.Invalid, match=r"there are no signing keys; give App\(signing="):
        make_app().queue(queue_id, require_signature=True)
