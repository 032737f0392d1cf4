"""Messages that others put on the broker: none stops a worker, each is served or dead, with its bytes and a reason."""

from __future__ import annotations

import gzip
import json
import pickle
import struct
from contextlib import closing
from functools import partial
from pathlib import Path
from time import time
from typing import Any, NamedTuple

import amqp

from kq.backend import BackendOptions
from kq.backends.store import Entry
from kq.backends.store_url import open_store
from kq.envelope import Envelope, pack
from tests.chaos.process import memory
from tests.chaos.scenario import scenario
from tests.chaos.site import RabbitSite, RedisSite
from tests.chaos.stage import Stage

#: Bytes by which a supervisor may grow for it.
_GROWTH = 32 * 2**20


class Hostile(NamedTuple):
    """A message that is not what it should be.

    Attributes:
        name: Its id, where it has one.
        body: Its bytes.
        reason: Why it must be dead; empty where it must be served.
        properties: AMQP's properties.
        headers: Its headers.
    """

    name: str
    body: bytes
    reason: str = "undecodable"
    properties: dict[str, Any] = {"content_type": "application/json", "content_encoding": "utf-8"}  # noqa: RUF012
    headers: dict[str, Any] = {}  # noqa: RUF012


class _Canary:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (open, (str(self.path), "w"))


def _messages(stage: Stage) -> list[Hostile]:
    json_type = {"content_type": "application/json"}
    good = json.dumps({"id": "forged", "ms": 0}).encode()
    bomb = gzip.compress(b"[" + b"0," * 2**23 + b"0]")
    msgpack = {"content_type": "application/msgpack", "content_encoding": "binary"}
    return [
        Hostile("not-json", b"{oops"),
        Hostile("truncated", b'{"id": "x'),
        Hostile("nan", b'{"id": NaN}'),
        Hostile("infinite", b'{"id": -Infinity}'),
        Hostile("long-number", b'{"id": ' + b"9" * 5000 + b"}"),
        Hostile("deep", b"[" * 50_000 + b"]" * 50_000),
        Hostile("empty", b""),
        Hostile("zeros", b"\0" * 1000),
        Hostile("pickle", pickle.dumps(_Canary(stage.folder / "canary")), properties={
            "content_type": "application/x-python-serialize", "content_encoding": "binary"}),
        Hostile("pickle-as-json", pickle.dumps(_Canary(stage.folder / "canary"))),
        Hostile("yaml", b'!!python/object/apply:os.system ["true"]', properties={"content_type": "application/x-yaml"}),
        Hostile("text", b"hello", properties={"content_type": "text/plain", "content_encoding": "utf-8"}),
        Hostile("data", b"hello", properties={"content_type": "application/data", "content_encoding": "binary"}),
        Hostile("gzip-bomb", bomb, headers={"compression": "application/x-gzip"}),
        Hostile("gzip-encoding", bomb, properties={**json_type, "content_encoding": "gzip"}),
        Hostile("rot13", b'{"id": 1}', properties={**json_type, "content_encoding": "rot13"}),
        Hostile("utf-16", '{"id": 1}'.encode("utf-16"), properties={**json_type, "content_encoding": "utf-16"}),
        Hostile("latin", b'{"id": "\xe9"}'),
        Hostile("surrogate", b'"\xed\xa0\x80"'),
        Hostile("msgpack-claim", b"\xdd\xff\xff\xff\xff", properties=msgpack),
        Hostile("msgpack-ext", b"\xc7\x0c\xff" + struct.pack(">Iq", 0xFFFFFFFF, -(2**62)), properties=msgpack),
        Hostile("msgpack-deep", b"\x91" * 100_000, properties=msgpack),
        Hostile("large", b'"' + b"x" * (10 * 2**20) + b'"'),
        Hostile("no-task", b'[[], {}, {}]', "no_handler", headers={"task": "builtins.eval"}),
        Hostile("expired", good, "expired", headers={"x_kq": 1, "x_expires_at": time() - 60}),
        Hostile("forged", good, "", headers={
            "x_kq": 1, "x_attempts": 99, "x_crashes": 99, "x_dead_letter_reason": "none", "x_actor": "root",
            "x-death": "often", "x_sig": "none", "compression": "none", "lang": "py"}),
    ]  # fmt: skip


@scenario("hostile", quick=("sqlite", "redis", "rabbitmq"))
def hostile_messages(stage: Stage) -> None:
    """Bytes that are no message, bombs, pickles, giants, forgeries: each is served or dead, no other is held up."""
    worker = stage.worker("-p", "1", "-c", "4")
    stage.publish("warm", ms=0)
    stage.until_count("done", 1)
    before = memory(worker.pid)
    hostile = _messages(stage)
    stage.rng.shuffle(hostile)
    stage.note.write("attempted", "forged")
    for number, message in enumerate(hostile):
        _put(stage, message)
        stage.publish(f"innocent-{number}", ms=0)
    raw = _put_raw(stage)
    stage.publish("last", ms=0)
    stage.until(lambda: stage.history.lines("done", "last"), "the last innocent one", 20.0)
    expected = {message.name: message.reason for message in hostile if message.reason}
    stage.until(lambda: sum(stage.site.dead(stage.queue).values()) >= len(expected) + raw, "the dead letters", 30.0)
    letters = stage.app.dead(stage.queue).list(1000)
    found = {letter.id: letter for letter in letters}
    for message in hostile:
        if message.reason:
            letter = found.get(message.name)
            stage.expect(letter is not None, f"{message.name} is not dead")
            if letter is not None:
                stage.expect(letter.reason == message.reason, f"{message.name}: {letter.reason}, not {message.reason}")
                stage.expect(letter.body == message.body, f"{message.name}: its bytes are not what they were")
    others = [letter for letter in letters if letter.id not in expected]
    stage.expect(len(others) == raw, f"{len(others)} dead letters of {raw} that are no envelopes")
    stage.expect({letter.reason for letter in others} <= {"undecodable"}, "their reasons are others")
    done = set(stage.history.ids("done"))
    stage.expect(done == {"warm", "last", "forged", *(f"innocent-{n}" for n in range(len(hostile)))}, f"done: {done}")
    stage.expect(stage.history.count("started") == len(done), "something was run twice")
    stage.expect(not (stage.folder / "canary").exists(), "a pickle was loaded")
    stage.expect(worker.alive, "the worker ended")
    growth = memory(worker.pid) - before
    stage.figures.update(
        attempted=len(hostile) + raw + len(done) - 1, dead=len(letters), growth_mib=round(growth / 2**20)
    )
    stage.expect(growth < _GROWTH, f"the supervisor has grown by {growth / 2**20:.0f} MiB")
    stage.drain()
    stage.stop_workers()


def _put(stage: Stage, message: Hostile) -> None:
    if isinstance(stage.site, RabbitSite):
        with stage.site.channel() as channel:
            body = amqp.Message(
                message.body, application_headers=message.headers, message_id=message.name, **message.properties
            )
            channel.basic_publish(body, routing_key=stage.queue)
        return
    envelope = Envelope(message.name, message.headers, message.properties, message.body)
    _store_raw(stage, message.name, pack(envelope))


def _store_raw(stage: Stage, id: str, raw: bytes) -> None:
    with closing(open_store(stage.site.url, BackendOptions(30, 30, 10, "stranger"))) as store:
        store.put(stage.queue, [Entry(id, raw, 4)], None)


def _put_raw(stage: Stage) -> int:
    """Put what is not even an envelope, where the broker can hold such a thing; return how many that are."""
    if isinstance(stage.site, RedisSite):
        p = f"{{kq:{stage.queue}}}:"
        with closing(stage.site.client()) as client:
            # A list element that is no id; one that is no text; and an id whose other keys make no sense.
            # The list last: from then on a worker may take them.
            client.hset(p + "m", "odd", b"\xc1 no envelope")
            client.hset(p + "p", "odd", "99")
            client.hset(p + "s", "odd", "many:many")
            client.rpush(p + "r:4", b"just bytes", b"\xff\xfe\x00", b"odd")
            client.rpush(p + "w", "1")
        return 3
    if isinstance(stage.site, RabbitSite):
        with stage.site.channel() as channel:
            table: dict[str, Any] = {"nested": {"deep": [1, {"x": b"\xff"}]}, "n": 2**62, "f": 1e300, "none": None}
            channel.basic_publish(amqp.Message(b"{", application_headers=table), routing_key=stage.queue)
            channel.basic_publish(amqp.Message(b"\xff" * 10), routing_key=stage.queue)
        return 2
    _store_raw(stage, "raw", b"\xc1 no envelope")
    return 1


hostile_family = partial(scenario, "hostile")


@hostile_family(long=True)
def giant_messages(stage: Stage) -> None:
    """Bodies of 40 MB among small messages: dead without being decoded, the small ones are served."""
    worker = stage.worker("-p", "1", "-c", "4")
    stage.publish("warm", ms=0)
    stage.until_count("done", 1)
    for n in range(4):
        _put(stage, Hostile(f"giant-{n}", b'"' + b"x" * (40 * 2**20) + b'"'))
        stage.publish(f"small-{n}", ms=0)
    stage.until_count("done", 5, within=90.0)
    stage.until(lambda: sum(stage.site.dead(stage.queue).values()) == 4, "the dead letters", 90.0)
    stage.expect(worker.alive, "the worker ended")
    stage.expect({line.attempt for line in stage.history.lines("started")} == {1}, "somebody was charged")
    stage.figures["rss_mib"] = round(memory(worker.pid) / 2**20)
    stage.stop_workers()
