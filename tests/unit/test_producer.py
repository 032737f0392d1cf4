"""What a producer makes by itself."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from dataclasses import replace
from threading import Event, Thread
from time import monotonic, time
from typing import Any, cast
from uuid import RFC_4122, UUID

import pytest

import kq
from kq import errors, queue
from kq.driver import MAIN
from kq.producer import Draft


def test_an_id_is_a_uuid_that_begins_with_the_time() -> None:
    """Ids of one lot sort together, whoever publishes beside."""
    before = int(time() * 1000)
    with kq.App("ids", broker="memory://ids") as app:
        app.queue("test:ids")
        ids = app.publish_many("test:ids", [{"n": n} for n in range(1000)])
    after = int(time() * 1000)

    assert len(set(ids)) == 1000
    for id in ids:
        uuid = UUID(hex=id)
        assert uuid.hex == id
        assert (uuid.version, uuid.variant) == (7, RFC_4122)
        assert before <= int(id[:12], 16) <= after


@pytest.mark.parametrize("url", ["redis://127.0.0.1:1", "amqp://127.0.0.1:1", "sqlite:////there/is/no/such.db"])
def test_a_broker_that_is_not_there_is_unavailable(url: str) -> None:
    """A broker that refuses connections is said to do so, also where there is little time; it is no timeout."""
    with kq.App("away", broker=url, publish_timeout=2) as app:
        began = monotonic()
        with pytest.raises(errors.Internal) as caught:
            app.publish("test:away", 1)
    assert caught.value.details["reason"] == "unavailable"
    assert monotonic() - began < 2


def test_the_last_app_is_the_one_that_publishes() -> None:
    """The functions of kq.queue act on the app that was made last, also where nobody else holds it."""
    kq.App("last", broker="memory://the-last-app")
    queue.publish("test:last", {"n": 1})
    with kq.App("other", broker="memory://the-last-app") as app:
        assert app.info("test:last").ready == 1


@pytest.mark.parametrize("payloads", ["abc", b"abc", {"n": 1}, 5, None])
def test_several_messages_are_a_list(payloads: Any) -> None:
    """A text or a mapping in place of several payloads would become many messages that nobody meant."""
    with kq.App("several", broker="memory://several") as app:
        with pytest.raises(errors.Invalid, match="payloads: expected several, as in a list, got one"):
            app.publish_many("test:several", payloads)
        with pytest.raises(errors.Invalid, match="payloads: expected several"):
            asyncio.run(app.apublish_many("test:several", payloads))


@pytest.mark.parametrize(
    ("wrong", "said"),
    [({}, "the data is empty"), ({"n": {1}}, "set"), ({"n": "x" * 2000}, "2,?0")],
)
def test_of_several_messages_the_wrong_one_is_named(wrong: Any, said: str) -> None:
    """Nothing is sent, and the error says which one it was; of a single message there is nothing to say."""
    with kq.App("wrong", broker="memory://wrong", max_body=1024) as app:
        with pytest.raises(errors.Invalid, match=rf"^payloads\[2\]: .*{said}") as caught:
            app.publish_many("test:wrong", [{"n": 1}, {"n": 2}, wrong, {"n": 4}])
        assert caught.value.details["index"] == 2
        for single in (lambda: app.publish("test:wrong", wrong), lambda: app.publish_many("test:wrong", [wrong])):
            with pytest.raises(errors.Invalid, match=rf"^(?!payloads).*{said}") as caught:
                single()
            assert "index" not in caught.value.details
        with pytest.raises(errors.NotFound):
            app.info("test:wrong")


@pytest.mark.parametrize(("name", "value"), [("auto_ack", 1), ("auto_ack", "false"), ("name", 5), ("name", "")])
def test_what_a_consumer_is_given_is_checked(name: str, value: Any) -> None:
    """A word where a bool is meant would be true."""
    app = kq.App("checked", broker="memory://checked")
    with pytest.raises(errors.Invalid, match=f"{name}: expected"):
        app.consumer("test:checked", **{name: value})


@pytest.mark.parametrize("scheme", ["amqp", "redis"])
def test_many_new_queues_are_declared_within_the_time_of_a_publish(scheme: str) -> None:
    """A broker that does not answer is not asked for each of them."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"{scheme}://127.0.0.1:{silent.getsockname()[1]}"
        driver = kq.Driver(url, timeout=0.4, connect_timeout=0.4)
        with kq.App("silent", broker=url, drivers={MAIN: driver}, publish_timeout=0.5) as app:
            producer = kq.Producer(app)
            batch = [producer._prepare(Draft(f"app:q{n}", (n,)))[0] for n in range(20)]
            began = monotonic()

            results = producer._declare_and_publish(MAIN, batch, 0.5)

            assert monotonic() - began < 3.0
            assert [error.details["reason"] for error in results if error is not None] == ["timeout"] * 20


def test_an_id_is_for_a_single_message() -> None:
    """Also where middleware gives it: all but the first of them would be taken for duplicates."""

    def named(draft: Any, call_next: Any) -> Any:
        return call_next(replace(draft, message_id="one"))

    with kq.App("test", broker="memory://test-producer-named", on_publish=[named]) as app:
        assert app.publish("app:q", 1) == "one"
        with pytest.raises(errors.Invalid, match="message_id: expected none for several messages, got 'one' for 2"):
            app.publish_many("app:q", [2, 3])
        assert app.info("app:q").ready == 1


def test_an_apps_middleware_is_around_each_of_its_producers() -> None:
    """A program that publishes with one of its own leaves out nothing that the app insists on."""

    def mark(by: str) -> Any:
        def marked(draft: Draft, call_next: Any) -> Any:
            before = (draft.headers or {}).get("by", "")
            return call_next(replace(draft, headers={"by": before + by}))

        return marked

    with (
        kq.App("test", broker="memory://test-producer-onion", on_publish=[mark("a")]) as app,
        kq.Producer(app, middleware=[mark("b")]) as producer,
        kq.Consumer(app, "app:q") as consumer,
    ):
        producer.publish("app:q", 1)
        message = consumer.receive(20)
        assert message is not None
        assert message.header("by") == "ab"
        message.ack()


def test_middleware_may_give_what_can_be_gone_through_once() -> None:
    """Each of it is checked and published."""

    def mapped(draft: Any, call_next: Any) -> Any:
        return call_next(replace(draft, payloads=(payload + 1 for payload in draft.payloads)))

    with kq.App("test", broker="memory://test-producer-mapped", on_publish=[mapped]) as app:
        assert len(app.publish_many("app:q", [1, 2, 3])) == 3
        assert app.info("app:q").ready == 3


def test_what_there_is_no_thread_for_is_not_published_later(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pool keeps what it has refused, and would run it in its next thread."""

    def refuse(thread: Thread) -> None:
        raise RuntimeError("can't start new thread")

    async def publish() -> None:
        await app.apublish_many("app:q", range(100))

    with kq.App("test", broker="memory://test-producer-threads") as app:
        app.publish("app:q", 0)
        with monkeypatch.context() as patched:
            patched.setattr(Thread, "start", refuse)
            with pytest.raises(errors.Internal, match="no thread to publish with") as caught:
                asyncio.run(publish())
        assert caught.value.details["reason"] == "unavailable"
        asyncio.run(publish())
        assert app.info("app:q").ready == 101


def test_a_task_waits_for_a_thread_no_longer_than_for_a_broker() -> None:
    """All of them may be in middleware that never ends; nothing of it is sent later."""
    go_on = Event()
    begun: list[Draft] = []

    def hang(draft: Draft, call_next: Callable[[Draft], list[str]]) -> list[str]:
        begun.append(draft)
        assert go_on.wait(20)
        return call_next(draft)

    async def publish() -> list[Any]:
        hanging = [asyncio.ensure_future(app.apublish("a:b", n)) for n in range(16)]
        late = await asyncio.gather(app.apublish("a:b", 16), return_exceptions=True)
        go_on.set()
        return [*late, *await asyncio.gather(*hanging, return_exceptions=True)]

    with kq.App("test", broker="memory://test-producer-hanging", on_publish=[hang], publish_timeout=0.2) as app:
        late, *_ = asyncio.run(publish())
    assert isinstance(late, errors.Internal)
    assert (late.details["reason"], "it was not sent" in late.message) == ("timeout", True)
    assert len(begun) == 16


@pytest.mark.parametrize("result", [None, "id", []])
def test_middleware_that_returns_no_ids_is_named(result: Any) -> None:
    """What forgets to return what it was given is told from a publish that has failed."""

    def forgetful(draft: Any, call_next: Any) -> Any:
        call_next(draft)
        return result

    with (
        kq.App("test", broker="memory://test-producer-forgetful", on_publish=[forgetful]) as app,
        pytest.raises(errors.Invalid, match=r"on_publish: expected .*forgetful to return what call_next returned"),
    ):
        app.publish("app:q", 1)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: app_of(on_publish=print), "on_publish: expected a list of functions"),
        (lambda: kq.Producer("memory://", middleware=cast(Any, print)), "middleware: expected a list of functions"),
        (lambda: app_of(on_handle=[5]), "on_handle: expected functions, got 5"),
        (lambda: app_of().consumer(lambda payload: None), r"write @app.consumer\("),
        (lambda: app_of().worker(concurency=4), "expected options of .*got 'concurency'"),
        (lambda: app_of(drivers=["redis://h"]), "drivers: expected a mapping, .*, got list"),
        (lambda: app_of(signing={"k": "s"}), "signing: expected a kq.Signing, got dict"),
        (lambda: app_of(policies=5), "policies: expected a list of kq.security.Policy, got int"),
        (lambda: app_of(policies=["p"]), "policies: expected kq.security.Policy, got str"),
        (lambda: app_of(groups=5), "groups: expected one or a list, got int"),
        (lambda: app_of(config=5), "config: expected the path of a configuration file, got int"),
        (lambda: kq.Producer(cast(Any, None)), "app_or_url: expected an app or a broker's URL, got NoneType"),
        (lambda: kq.Consumer(cast(Any, kq), "app:q"), "app_or_url: expected an app or a broker's URL, got module"),
        (lambda: kq.Consumer(app_of(), cast(Any, 5)), "queue_ids: expected a queue id or a list of them, got int"),
    ],
)
def test_what_is_easily_mistaken_is_told(make: Callable[[], Any], words: str) -> None:
    """The error says what was expected, where the interpreter's own would not."""
    with pytest.raises(errors.Invalid, match=words):
        make()


def app_of(**values: Any) -> Any:
    """An app, of what no type checker would let through."""
    return kq.App("test", broker="memory://test-producer-mistaken", **values)
