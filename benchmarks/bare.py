"""The limit of the machine and the broker: loops of a bare client that move the same bytes and do nothing else."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import closing
from typing import Any, Final
from urllib.parse import urlsplit
from uuid import uuid4

import amqp
import redis

_LOT: Final = 500

#: Pops up to so many messages and puts them into a hash with a deadline, as a lease does.
_TAKE: Final = """
local found = redis.call('LPOP', KEYS[1], ARGV[1])
if not found then return {} end
for i, body in ipairs(found) do redis.call('HSET', KEYS[2], ARGV[2] .. i, body) end
return found
"""


def body(pad: int) -> bytes:
    """Return a message of a size that an envelope of kq has: headers, an id and the text."""
    return b"x" * (pad + 150)


def _per_second(count: int, work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return count / (time.perf_counter() - began)


def redis_limits(url: str, messages: int, pad: int) -> dict[str, float]:
    """Return what redis-py does: ``one`` LPUSH at a time, ``many`` in pipelines, ``drain`` by a script and a delete."""
    key, held = f"bench:{uuid4().hex}", f"bench:{uuid4().hex}"
    text = body(pad)
    with closing(redis.Redis.from_url(url)) as client:
        take = client.register_script(_TAKE)

        def one() -> None:
            for _ in range(messages // 4):
                client.lpush(key, text)

        def many() -> None:
            for _ in range(messages // _LOT):
                with client.pipeline(transaction=False) as pipeline:
                    for _ in range(_LOT):
                        pipeline.lpush(key, text)
                    pipeline.execute()

        def drain() -> None:
            n = 0
            while found := take(keys=[key, held], args=[_LOT, f"{n}:"]):
                client.hdel(held, *[f"{n}:{i + 1}" for i in range(len(found))])
                n += 1

        try:
            found = {"publish": _per_second(messages // 4, one)}
            client.delete(key)
            found["bulk"] = _per_second(messages // _LOT * _LOT, many)
            found["drain"] = _per_second(messages // _LOT * _LOT, drain)
            return found
        finally:
            client.delete(key, held)


def rabbitmq_limits(url: str, messages: int, pad: int) -> dict[str, float]:
    """Return what py-amqp does on a quorum queue: confirmed one by one, ``many``, consumed with multiple acks."""
    parts = urlsplit(url)
    queue = f"bench-{uuid4().hex}"
    connection = amqp.Connection(
        host=f"{parts.hostname}:{parts.port or 5672}", userid=parts.username or "guest",
        password=parts.password or "guest", confirm_publish=False,
    )  # fmt: skip
    connection.connect()
    try:
        channel = connection.channel()
        channel.queue_declare(queue, durable=True, auto_delete=False, arguments={"x-queue-type": "quorum"})
        channel.confirm_select()
        confirmed = [0]

        def count(delivery_tag: int, multiple: bool) -> None:
            confirmed[0] = delivery_tag if multiple else confirmed[0] + 1

        channel.events["basic_ack"].add(count)
        message = amqp.Message(body(pad), delivery_mode=2)
        sent = 0

        def publish(number: int, lot: int) -> None:
            nonlocal sent
            for _ in range(number // lot):
                for _ in range(lot):
                    channel.basic_publish(message, routing_key=queue)
                sent += lot
                while confirmed[0] < sent:
                    connection.drain_events(timeout=30)

        got = 0

        def consume() -> None:
            nonlocal got

            def take(delivered: Any) -> None:
                nonlocal got
                got += 1
                if got % 100 == 0 or got == sent:
                    channel.basic_ack(delivered.delivery_tag, multiple=True)

            channel.basic_qos(0, 1000, False)
            channel.basic_consume(queue, callback=take)
            while got < sent:
                connection.drain_events(timeout=30)

        singles = messages // 10
        found = {"publish": _per_second(singles, lambda: publish(singles, 1))}
        found["bulk"] = _per_second(messages // _LOT * _LOT, lambda: publish(messages, _LOT))
        found["drain"] = _per_second(sent, consume)
        channel.queue_delete(queue)
        return found
    finally:
        try:
            connection.close()
        except (OSError, amqp.AMQPError):
            connection.collect()


LIMITS: Final[dict[str, Callable[[str, int, int], dict[str, float]]]] = {
    "redis": redis_limits, "rabbitmq": rabbitmq_limits,
}  # fmt: skip
