"""The limit of the machine and the broker: a bare client that moves the same bytes and does nothing else.

It publishes as every contender does, in a process of its own (`benchmarks.apps.bare_app`); how fast it empties a
queue is measured here.
"""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from typing import Any, Final
from urllib.parse import urlsplit
from uuid import uuid4

import amqp
import redis

from benchmarks.work import file_beside

#: Messages that it has under way at once.
LOT: Final = 500
#: Bytes that an envelope of kq has besides the text: headers, an id.
_ENVELOPE: Final = 150

#: Pops up to so many messages and puts them into a hash with a deadline, as a lease does.
_TAKE: Final = """
local found = redis.call('LPOP', KEYS[1], ARGV[1])
if not found then return {} end
for i, body in ipairs(found) do redis.call('HSET', KEYS[2], ARGV[2] .. i, body) end
return found
"""


def body(payload: dict[str, Any]) -> bytes:
    """Return a message of the size that an envelope of kq with this payload has."""
    return b"x" * (len(payload["pad"]) + _ENVELOPE)


class Confirmed:
    """py-amqp on a quorum queue, with publisher confirms.

    Args:
        url: The broker.
        queue: The queue, which it declares.
    """

    def __init__(self, url: str, queue: str) -> None:
        parts = urlsplit(url)
        self._queue = queue
        self.connection = amqp.Connection(
            host=f"{parts.hostname}:{parts.port or 5672}", userid=parts.username or "guest",
            password=parts.password or "guest", confirm_publish=False,
        )  # fmt: skip
        self.connection.connect()
        self.channel = self.connection.channel()
        self.channel.queue_declare(queue, durable=True, auto_delete=False, arguments={"x-queue-type": "quorum"})
        self.channel.confirm_select()
        self.channel.events["basic_ack"].add(self._count)
        self._confirmed = self._sent = 0

    def publish(self, bodies: list[bytes]) -> None:
        """Publish, and wait until all are confirmed."""
        for data in bodies:
            self.channel.basic_publish(amqp.Message(data, delivery_mode=2), routing_key=self._queue)
        self._sent += len(bodies)
        while self._confirmed < self._sent:
            self.connection.drain_events(timeout=30)

    def close(self) -> None:
        """Close the connection."""
        try:
            self.connection.close()
        except (OSError, amqp.AMQPError):
            self.connection.collect()

    def _count(self, delivery_tag: int, multiple: bool) -> None:
        self._confirmed = delivery_tag if multiple else self._confirmed + 1


class Inserted:
    """Python's sqlite3 on a table in a file, which is written to the disk at each commit.

    Args:
        url: A SQLite URL; the file is another one beside it.
        queue: The table, which it makes.
    """

    def __init__(self, url: str, queue: str) -> None:
        self._table = f'"{queue}"'
        # Transactions begin and end where that is said.
        self._db = sqlite3.connect(file_beside(url, f"{queue}.bare"), isolation_level=None)
        self._db.execute("PRAGMA journal_mode = WAL")
        self._db.execute("PRAGMA synchronous = FULL")
        self._db.execute(
            f"CREATE TABLE IF NOT EXISTS {self._table} (place INTEGER PRIMARY KEY, held INTEGER, body BLOB)"
        )
        self._db.execute(f'CREATE INDEX IF NOT EXISTS "{queue}-held" ON {self._table} (held, place)')

    def publish(self, bodies: Sequence[bytes]) -> None:
        """Insert in one transaction."""
        self._db.execute("BEGIN IMMEDIATE")
        self._db.executemany(f"INSERT INTO {self._table} (held, body) VALUES (0, ?)", [(data,) for data in bodies])
        self._db.execute("COMMIT")

    def take(self, limit: int) -> list[int]:
        """Read up to so many and mark them as taken, as a lease does; return where they are."""
        self._db.execute("BEGIN IMMEDIATE")
        rows = self._db.execute(f"SELECT place, body FROM {self._table} WHERE held = 0 LIMIT ?", (limit,)).fetchall()
        places = [place for place, _ in rows]
        self._db.executemany(f"UPDATE {self._table} SET held = 1 WHERE place = ?", [(place,) for place in places])
        self._db.execute("COMMIT")
        return places

    def delete(self, places: Sequence[int]) -> None:
        """Delete in one transaction."""
        self._db.execute("BEGIN IMMEDIATE")
        self._db.executemany(f"DELETE FROM {self._table} WHERE place = ?", [(place,) for place in places])
        self._db.execute("COMMIT")

    def close(self) -> None:
        """Close the file."""
        self._db.close()


def _per_second(count: int, work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return count / (time.perf_counter() - began)


def drain_redis(url: str, messages: int, pad: int) -> float:
    """Return how many messages a second redis-py takes by a script, 500 at a time, and deletes."""
    key, held = f"bench:{uuid4().hex}", f"bench:{uuid4().hex}"
    text = body({"pad": "x" * pad})
    with closing(redis.Redis.from_url(url)) as client:
        take = client.register_script(_TAKE)

        def drain() -> None:
            n = 0
            while found := take(keys=[key, held], args=[LOT, f"{n}:"]):
                client.hdel(held, *[f"{n}:{i + 1}" for i in range(len(found))])
                n += 1

        try:
            for start in range(0, messages, LOT):
                client.rpush(key, *[text] * min(LOT, messages - start))
            return _per_second(messages, drain)
        finally:
            client.delete(key, held)


def drain_rabbitmq(url: str, messages: int, pad: int) -> float:
    """Return how many messages a second py-amqp consumes from a quorum queue, one acknowledgement for 100."""
    queue = f"bench-{uuid4().hex}"
    confirmed = Confirmed(url, queue)
    connection, channel = confirmed.connection, confirmed.channel
    got = 0

    def take(delivered: Any) -> None:
        nonlocal got
        got += 1
        if got % 100 == 0 or got == messages:
            channel.basic_ack(delivered.delivery_tag, multiple=True)

    def consume() -> None:
        channel.basic_qos(0, 1000, False)
        channel.basic_consume(queue, callback=take)
        while got < messages:
            connection.drain_events(timeout=30)

    try:
        text = body({"pad": "x" * pad})
        for start in range(0, messages, LOT):
            confirmed.publish([text] * min(LOT, messages - start))
        rate = _per_second(messages, consume)
        channel.queue_delete(queue)
        return rate
    finally:
        confirmed.close()


def drain_sqlite(url: str, messages: int, pad: int) -> float:
    """Return how many messages a second sqlite3 takes, 500 in a transaction, and deletes."""
    inserted = Inserted(url, f"bench-{uuid4().hex}")

    def drain() -> None:
        while places := inserted.take(LOT):
            inserted.delete(places)

    with closing(inserted):
        text = body({"pad": "x" * pad})
        for start in range(0, messages, LOT):
            inserted.publish([text] * min(LOT, messages - start))
        return _per_second(messages, drain)


#: By broker, what draining is compared with.
DRAINS: Final[dict[str, Callable[[str, int, int], float]]] = {
    "redis": drain_redis, "rabbitmq": drain_rabbitmq, "sqlite": drain_sqlite,
}  # fmt: skip
