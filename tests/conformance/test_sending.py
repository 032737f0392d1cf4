"""Messages that are sent without waiting, and those that tasks publish so."""

from __future__ import annotations

import asyncio
import os
import select
import socket
import ssl
import struct
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from time import monotonic
from typing import Any

import pytest
import trustme

import kq
from kq import errors
from kq.backend import SEND_BYTES, SEND_LONG, SEND_MOST, Publication, Unconfirmed
from kq.backends.rabbitmq import RabbitBackend
from kq.backends.redis_call import SCRIPTS, Script
from kq.config import Settings
from kq.scheme import open_backend
from kq.waker import Lookout
from tests.broker import Broker
from tests.conformance.conftest import ON_RABBITMQ, ON_REDIS, ON_SENDERS, Bench
from tests.conformance.tls_proxy import TlsProxy
from tests.proxy import Proxy


def answer_of(sent: Unconfirmed) -> Sequence[bool | errors.Error]:
    """Send what has been prepared, return what the broker answers, and close it."""
    until = monotonic() + 10
    sent.write()
    while (stored := sent.confirm()) is None:
        assert Lookout(sent).ready(until - monotonic()), "no answer in 10 s"
        sent.write()
    sent.close()
    return stored


def send(bench: Bench, *batch: Publication) -> Sequence[bool | errors.Error]:
    """Send messages, and return what became of them."""
    sent = bench.backend.send(batch)
    assert sent is not None
    return answer_of(sent)


def test_what_is_sent_is_stored(bench: Bench) -> None:
    """Once, with delay and priority, as if it had been published; or the backend says that it cannot."""
    other = bench.declare("other")
    # RabbitMQ has a queue for each delay, which is not made on the way.
    bench.publish(bench.message(queue=bench.declare("delayed"), delay=3600.0))
    batch = [
        bench.message("plain"), bench.message("again"), bench.message("late", delay=3600.0),
        bench.message("other", queue=other),
    ]  # fmt: skip
    # A server knows only what it has run before.
    bench.publish(bench.message("again"), bench.message("later", delay=7200.0))
    bench.publish(bench.message("again"))
    sent = bench.backend.send(batch)
    assert (sent is not None) == bench.backend.capabilities.sends
    if sent is None:
        bench.publish(*batch)
    else:
        assert answer_of(sent) == [True] * 4
    if bench.backend.capabilities.deduplicates:
        found = [envelope.id for envelope in bench.backend.browse(bench.queue, 10, 0)]
        assert sorted(found) == ["again", "late", "later", "plain"]
    assert [envelope.id for envelope in bench.backend.browse(other, 10, 0)] == ["other"]
    deliveries = bench.take(bench.feed(), 2 if bench.backend.capabilities.deduplicates else 4)
    assert {delivery.id for delivery in deliveries} == {"plain", "again"}


@ON_SENDERS
def test_it_needs_a_connection_that_is_there(bench: Bench) -> None:
    """Each of those that are under way has one of its own; without one nothing is sent."""
    first = bench.backend.send([bench.message("first")])
    assert first is not None
    assert bench.backend.send([bench.message("second")]) is None
    assert answer_of(first) == [True]
    assert send(bench, bench.message("third")) == [True]
    assert {envelope.id for envelope in bench.backend.browse(bench.queue, 10, 0)} == {"first", "third"}


@ON_SENDERS
def test_as_much_as_may_be_is_sent(bench: Bench) -> None:
    """As many messages, as large ones, as many bytes; but not several for a queue that may have room for some."""
    assert send(bench, *(bench.message() for _ in range(SEND_MOST))) == [True] * SEND_MOST
    large = [bench.message(body=b"1" * SEND_LONG) for _ in range(SEND_BYTES // SEND_LONG)]
    assert send(bench, *large) == [True] * len(large)
    short = bench.declare("short", max_length=3)
    sent = bench.backend.send([bench.message(queue=short) for _ in range(2)])
    if bench.backend.capabilities.deduplicates:
        assert sent is None
        assert bench.backend.info(short).ready == 0
    else:
        # What there is no room for is all that is published once more.
        assert sent is not None
        assert answer_of(sent) == [True] * 2


@ON_REDIS
def test_what_is_not_stored_is_told_of_each_queue(bench: Bench) -> None:
    """Of one that is gone or full; what stands before and behind it is stored. The next one has a connection."""
    gone, full = bench.declare("gone"), bench.declare("full", max_length=1)
    bench.delete(gone.id)
    bench.publish(bench.message(queue=full))
    batch = [bench.message("a"), bench.message(queue=gone), bench.message(queue=full), bench.message("b")]
    assert send(bench, *batch) == [True, False, False, True]
    assert {envelope.id for envelope in bench.backend.browse(bench.queue, 10, 0)} == {"a", "b"}
    bench.publish(bench.message("c"))
    assert send(bench, bench.message("d")) == [True]


@ON_RABBITMQ
def test_what_no_queue_takes_is_told_of_each_message(bench: Bench) -> None:
    """Of one that is gone, or full: that keeps what had been sent when it found that it was."""
    gone, full = bench.declare("gone"), bench.declare("full", max_length=1)
    bench.delete(gone.id)
    bench.publish(bench.message(queue=full), bench.message(queue=full))
    # Which has a queue for that delay made, and known.
    bench.publish(bench.message(queue=bench.declare("delayed"), delay=3600.0))
    batch = [bench.message("a"), bench.message(queue=gone), bench.message(queue=full), bench.message("b")]
    assert send(bench, *batch) == [True, False, False, True]
    assert {envelope.id for envelope in bench.backend.browse(bench.queue, 10, 0)} == {"a", "b"}
    # The queue of a delay may be gone likewise: it is not taken for one that is there any more.
    backend = bench.backend
    assert isinstance(backend, RabbitBackend)
    (lane,) = backend._lanes._idle
    assert not lane.buckets
    assert send(bench, bench.message("c")) == [True]


@ON_RABBITMQ
def test_a_connection_that_cannot_be_written_to_is_used_no_more(bench: Bench) -> None:
    """What was to go over it is for somebody else to publish."""
    backend = bench.backend
    assert isinstance(backend, RabbitBackend)
    bench.publish(bench.message("first"))
    sent = backend.send([bench.message("second")])
    assert sent is not None
    with socket.socket(fileno=os.dup(sent.fileno())) as ours:
        ours.shutdown(socket.SHUT_RDWR)
        assert sent.write()
        assert sent.confirm() == [False]
    sent.close()
    assert backend._lanes._idle == []


@ON_RABBITMQ
def test_what_is_sent_so_needs_nothing_else(bench: Bench) -> None:
    """No queue for a delay that is not there, no headers that RabbitMQ does not take: others see to that."""
    assert bench.backend.send([bench.message(delay=3600.0)]) is None
    assert bench.backend.send([bench.message(headers={"n": "x" * 200_000})]) is None
    # Who goes back on it leaves nothing behind.
    sent = bench.backend.send([bench.message("never")])
    assert sent is not None
    sent.close()
    assert send(bench, bench.message("a")) == [True]
    assert [envelope.id for envelope in bench.backend.browse(bench.queue, 10, 0)] == ["a"]


@ON_SENDERS
def test_what_there_is_no_room_for_is_sent_later(bench: Bench) -> None:
    """A broker that reads slowly holds up nobody: so much goes at once as there is room for."""
    with (
        closing(Proxy(bench.broker.url)) as proxy,
        closing(open_backend(Settings(broker=proxy.url), "test")) as backend,
    ):
        backend.publish([bench.message("first")], 10.0)
        batch = [bench.message(body=b"1" * SEND_LONG) for _ in range(SEND_BYTES // SEND_LONG)]
        sent = backend.send(batch)
        assert sent is not None
        with socket.socket(fileno=os.dup(sent.fileno())) as ours:
            ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 65536)
            proxy.pause()
            began = monotonic()
            assert not sent.write()
            assert sent.confirm() is None
            assert monotonic() - began < 1.0
            proxy.resume()
            until, is_whole = monotonic() + 20.0, False
            while (stored := sent.confirm()) is None and monotonic() < until:
                is_whole = is_whole or sent.write()
                select.select([ours], [] if is_whole else [ours], [], 1.0)
        sent.close()
    assert stored == [True] * len(batch)
    assert bench.backend.info(bench.queue).ready == len(batch) + 1


@ON_RABBITMQ
def test_some_of_what_a_task_publishes_is_refused(bench: Bench) -> None:
    """What is stored of it is not stored once more when the rest is looked into."""
    gone = bench.declare("gone")
    with closing(kq.App("test", broker=bench.broker.url)) as app:

        async def main() -> Any:
            for queue in (bench.queue, gone):
                await app.apublish(queue.id, "first")
            await asyncio.to_thread(bench.delete, gone.id)
            one, other = [app.registry.spec(queue.id) for queue in (bench.queue, gone)]
            batch = [
                Publication(queue, bench.message(id).envelope) for queue, id in ((one, "a"), (other, "b"), (one, "c"))
            ]
            return await app._producer._async_commit("").publish(batch, 10.0)

        stored, refused, too = asyncio.run(main())
    assert (stored, too) == (None, None)
    assert refused.details["reason"] == "unroutable"
    ids = [envelope.id for envelope in bench.backend.browse(bench.queue, 10, 0)]
    assert sorted(ids)[1:] == ["a", "c"]


@ON_RABBITMQ
@pytest.mark.parametrize("method", [(0, 10, 50), (1, 20, 40)], ids=["connection", "channel"])
def test_rabbitmq_closes_what_a_task_writes_to(bench: Bench, method: tuple[int, int, int]) -> None:
    """Connection and channel: the loop neither waits nor finds a descriptor that is not there; all is stored."""
    channel, *numbers = method
    payload = struct.pack(">HHH", *numbers, 320) + b"\x04stop" + bytes(4)
    close = struct.pack(">BHI", 1, channel, len(payload)) + payload + b"\xce"
    odd: list[Any] = []
    with closing(Proxy(bench.broker.url)) as proxy, closing(kq.App("test", broker=proxy.url)) as app:

        async def main() -> list[str]:
            asyncio.get_running_loop().set_exception_handler(lambda loop, context: odd.append(context))
            ids = [await app.apublish(bench.queue.id, "first")]
            backend = app.registry.backend()
            assert isinstance(backend, RabbitBackend)
            (lane,) = backend._lanes._idle
            lane.link.connection.sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 65536)
            proxy.pause()
            # Too much for the wire.
            batch = [bench.message(body=b"1" * 60_000) for _ in range(16)]
            task = asyncio.create_task(app._producer._async_commit("").publish(batch, 10.0))
            for _ in range(5):
                await asyncio.sleep(0)
            assert not backend._lanes._idle
            began = monotonic()
            proxy.say(close)
            ticks = 0
            while monotonic() - began < 0.3:
                await asyncio.sleep(0.01)
                ticks += 1
            proxy.resume()
            assert ticks > 10
            assert await task == [None] * 16
            return ids + [publication.envelope.id for publication in batch]

        ids = asyncio.run(main())
    assert odd == []
    assert {envelope.id for envelope in bench.backend.browse(bench.queue, 100, 0)} == set(ids)


@ON_RABBITMQ
def test_an_alarm_is_told_to_tasks_at_once(bench: Bench) -> None:
    """It is not sent once more, for it may still be stored, and over another connection the same would happen."""
    with closing(Proxy(bench.broker.url)) as proxy, closing(kq.App("test", broker=proxy.url)) as app:

        async def main() -> list[Any]:
            await app.apublish(bench.queue.id, "first")
            proxy.raise_alarm()
            met = await asyncio.gather(*(app.apublish(bench.queue.id, n) for n in range(3)), return_exceptions=True)
            proxy.end_alarm()
            until = monotonic() + 15.0
            while True:
                try:
                    return [*met, await app.apublish(bench.queue.id, "last")]
                except errors.Internal as error:
                    # What tells it has not been read yet.
                    if error.details["reason"] != "blocked" or monotonic() > until:
                        raise

        *met, last = asyncio.run(main())
    assert [error.details["reason"] for error in met] == ["blocked"] * 3
    ids = [envelope.id for envelope in bench.backend.browse(bench.queue, 10, 0)]
    assert last in ids
    assert len(ids) == len(set(ids))


@ON_REDIS
def test_a_server_that_does_not_know_the_script(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is told by whoever publishes the message then."""
    unknown = Script("return 1 -- nobody has run this")
    with monkeypatch.context() as patched:
        patched.setitem(SCRIPTS, "PUT_PLAIN", unknown)
        assert send(bench, bench.message()) == [False]
    assert bench.backend.info(bench.queue).ready == 0
    bench.publish(bench.message())


@ON_SENDERS
def test_tasks_publish_over_a_wire_that_breaks(bench: Bench) -> None:
    """Each message is stored once and confirmed: a connection that broke, or is cut in the middle, is replaced."""
    with closing(Proxy(bench.broker.url)) as proxy, closing(kq.App("test", broker=proxy.url)) as app:

        async def main() -> list[str]:
            ids = [await app.apublish(bench.queue.id, "first")]
            for after in (0, 1, 2, 3):
                ids.append(await app.apublish(bench.queue.id, "before"))
                proxy.cut_after(after) if after else proxy.reset_all()
                ids += await asyncio.gather(*(app.apublish(bench.queue.id, n + 1) for n in range(20)))
            return ids

        ids = asyncio.run(main())
    assert len(set(ids)) == len(ids) == 85
    stored = [envelope.id for envelope in bench.backend.browse(bench.queue, 200, 0)]
    # What was on its way when it broke may be stored already.
    assert sorted(stored if bench.backend.capabilities.deduplicates else set(stored)) == sorted(ids)


@ON_SENDERS
@pytest.mark.parametrize("silence", [Proxy.freeze, Proxy.stall])
def test_a_wire_that_is_silent_holds_up_no_loop(bench: Bench, silence: Callable[[Proxy], None]) -> None:
    """Each task has its answer in its time, and when the wire is whole again the next one is served.

    Where only the connection is silent on which the first one went, the others have another one.
    """

    async def main() -> list[Any]:
        await app.apublish(bench.queue.id, "first")
        silence(proxy)
        began = monotonic()
        tasks = [app.apublish(bench.queue.id, n + 1) for n in range(5)]
        found = await asyncio.gather(*tasks, return_exceptions=True)
        assert 0.4 < monotonic() - began < 5
        proxy.heal()
        await app.apublish(bench.queue.id, "last")
        return found

    with closing(Proxy(bench.broker.url)) as proxy:
        app = kq.App("test", broker=proxy.url, publish_timeout=0.5)
        with closing(app):
            found = asyncio.run(main())
    late = [error for error in found if isinstance(error, errors.Internal) and error.details["reason"] == "timeout"]
    assert late[0] is found[0]
    assert ("no answer within 0.45 s" if bench.broker.stores else "RabbitMQ did not confirm in time") in str(found[0])
    assert len(late) == (5 if silence is Proxy.stall else 1)
    assert len([id for id in found if isinstance(id, str)]) == 5 - len(late)


def test_tasks_publish_to_what_is_full(broker: Broker, app: kq.App, queue_id: str) -> None:
    """As many are stored as there is room for, and the others are told so, whether they come alone or together."""
    app.queue(queue_id, max_length=3)

    async def main() -> list[Any]:
        found: list[Any] = [await app.apublish(queue_id, "first")]
        found += await asyncio.gather(*(app.apublish(queue_id, n + 1) for n in range(5)), return_exceptions=True)
        for _ in range(2):
            with pytest.raises(errors.Internal) as caught:
                await app.apublish(queue_id, "more")
            found.append(caught.value)
        return found

    found = asyncio.run(main())
    refused = [error for error in found if not isinstance(error, str)]
    assert {error.details["reason"] for error in refused} == {"full"}
    if broker.stores:
        assert len(refused) == 5
        assert app.info(queue_id).ready == 3


def test_tasks_publish_to_a_queue_that_somebody_deletes(bench: Bench, app: kq.App) -> None:
    """The message that meets it is refused, or stored in a new one; the next one is stored."""

    async def main() -> list[Any]:
        for _ in range(2):
            await app.apublish(bench.queue.id, "before")
        await asyncio.to_thread(bench.delete, bench.queue.id)
        (met,) = await asyncio.gather(app.apublish(bench.queue.id, "meets it"), return_exceptions=True)
        return [met, await app.apublish(bench.queue.id, "after")]

    met, id = asyncio.run(main())
    assert isinstance(met, str) or met.details["reason"] == "unroutable"
    assert id in [envelope.id for envelope in bench.backend.browse(bench.queue, 10, 0)]


@ON_SENDERS
def test_tasks_publish_over_tls(broker: Broker, queue_id: str, tmp_path: Path) -> None:
    """One after the other and together, short and long ones, in records of any size."""
    authority = trustme.CA()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("localhost").configure_cert(context)
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")

    async def main() -> list[str]:
        ids = [await app.apublish(queue_id, "first")]
        for size in (10, 30_000):
            ids += [await app.apublish(queue_id, "x" * size) for _ in range(3)]
            ids += await asyncio.gather(*(app.apublish(queue_id, "x" * size) for _ in range(30)))
        return ids

    with closing(TlsProxy(broker.url, context, "localhost")) as proxy:
        app = kq.App("test", broker=f"{proxy.url}?tls_ca={tmp_path / 'ca.pem'}")
        with closing(app), pytest.MonkeyPatch.context() as patched:
            backend = app.registry.backend()
            send, sent = backend.send, list[Unconfirmed | None]()

            def noting(batch: Sequence[Publication]) -> Unconfirmed | None:
                sent.append(send(batch))
                return sent[-1]

            patched.setattr(backend, "send", noting)
            ids = asyncio.run(main())
            assert app.info(queue_id).ready == len(set(ids)) == 67
    # Where it took long, others needed a connection that was not there yet.
    assert len([one for one in sent if one is not None]) >= 8
