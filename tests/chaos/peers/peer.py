"""The peers: how each is started, what it promises, and where in Redis it keeps what it has not finished."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Final

import redis

#: An id in a stored message, whatever quotes and escapes are around it.
_ID: Final = re.compile(rb"""['"]id\\*['"]: ?\\*['"]([a-z]+-\d+)""")

#: Returns the stored messages of a queue.
Look = Callable[[Any, str], Iterable[bytes]]


@dataclass(frozen=True)
class Peer:
    """A task queue.

    Attributes:
        name: Its name.
        packages: The distributions whose versions matter.
        command: Its worker, of two processes, as arguments of the interpreter.
        promise: What its documentation promises for these settings.
        settings: What is not its default.
        held: Where it keeps messages that have not ended.
        buried: Where it keeps messages that it gave up.
        queue: The name of its queue.
    """

    name: str
    packages: tuple[str, ...]
    command: tuple[str, ...]
    promise: str
    settings: str
    held: Look
    buried: Look
    queue: str = "chaos"

    def holds(self, client: redis.Redis, queue: str) -> frozenset[str]:
        """Return the ids of the messages that it still has."""
        return frozenset(_ids(self.held(client, queue)))

    def dead(self, client: redis.Redis, queue: str) -> list[str]:
        """Return the ids of its dead letters."""
        return _ids(self.buried(client, queue))


def _ids(messages: Iterable[bytes]) -> list[str]:
    return [found[1].decode() for raw in messages if (found := _ID.search(raw))]


def _nothing(_client: Any, _queue: str) -> list[bytes]:
    return []


def _kq(client: Any, queue: str) -> list[bytes]:
    return list(client.hvals(f"{{kq:{queue}}}:m"))


def _kq_dead(client: Any, queue: str) -> list[bytes]:
    return list(client.hvals(f"{{kq:{queue}}}.dead:m"))


def _celery(client: Any, queue: str) -> list[bytes]:
    return [*client.lrange(queue, 0, -1), *client.hvals("unacked")]


def _dramatiq(client: Any, queue: str) -> list[bytes]:
    return [*client.hvals(f"dramatiq:{queue}.msgs"), *client.hvals(f"dramatiq:{queue}.DQ.msgs")]


def _dramatiq_dead(client: Any, queue: str) -> list[bytes]:
    return list(client.hvals(f"dramatiq:{queue}.XQ.msgs"))


def _taskiq(client: Any, queue: str) -> list[bytes]:
    # What was acknowledged stays in a stream: only what is pending or was never delivered counts.
    found: list[bytes] = []
    if not client.exists(queue):
        return found
    for group in client.xinfo_groups(queue):
        last = group["last-delivered-id"].decode()
        pending = [one["message_id"] for one in client.xpending_range(queue, group["name"], "-", "+", 100_000)]
        held = set(pending)
        delivered = client.xrange(queue, pending[0], last) if pending else []
        found += [entry[b"data"] for key, entry in delivered if key in held]
        found += [entry[b"data"] for _, entry in client.xrange(queue, f"({last}", "+")]
    return found


PEERS: Final = {
    peer.name: peer
    for peer in (
        Peer(
            "kq",
            ("kq-tasks",),
            ("-m", "kq", "worker", "tests.chaos.app:app", "-p", "2"),
            "at least once",
            "lease 4 s, heartbeat 2 s",
            _kq,
            _kq_dead,
            "chaos:work",
        ),
        Peer(
            "celery",
            ("celery", "kombu"),
            ("-m", "celery", "-A", "tests.chaos.peers.celery_app", "worker", "-c", "2", "-l", "WARNING"),
            "late acknowledgement: may run more than once, also when its process is lost; no durability is promised",
            "task_acks_late, task_reject_on_worker_lost, worker_prefetch_multiplier=1, "
            "broker_connection_retry_on_startup, visibility_timeout=4 (default 3600)",
            _celery,
            _nothing,
        ),
        Peer(
            "dramatiq",
            ("dramatiq",),
            ("-m", "dramatiq", "tests.chaos.peers.dramatiq_app", "--processes", "2"),
            "at least once: acknowledged after it ran, requeued when its worker is gone",
            "heartbeat_timeout=5000 (default 60000)",
            _dramatiq,
            _dramatiq_dead,
        ),
        Peer(
            "taskiq",
            ("taskiq", "taskiq-redis"),
            (
                "-m",
                "taskiq",
                "worker",
                "tests.chaos.peers.taskiq_app:broker",
                "--workers",
                "2",
                "--ack-type",
                "when_executed",
            ),
            "supports acknowledgement: acknowledged after it ran, claimed by another when idle too long",
            "RedisStreamBroker, ack type when_executed, idle_timeout=4000 (default 600000), "
            "unacknowledged_lock_timeout=4",
            _taskiq,
            _nothing,
        ),
    )
}
