"""Every backend and store keeps its contract. Never run: mypy checks it."""

from __future__ import annotations

from kq.backend import Backend, Feed
from kq.backends.memory import MemoryStore
from kq.backends.rabbitmq import RabbitBackend
from kq.backends.rabbitmq_feed import RabbitFeed
from kq.backends.redis import RedisStore
from kq.backends.sqlite import SQLiteStore
from kq.backends.store import Store
from kq.backends.stored import StoredBackend
from kq.backends.stored_feed import StoredFeed


def stores(memory: MemoryStore, sqlite: SQLiteStore, redis: RedisStore) -> list[Store]:
    """A store has every primitive."""
    return [memory, sqlite, redis]


def backends(stored: StoredBackend, rabbit: RabbitBackend) -> list[Backend]:
    """A backend has every method."""
    return [stored, rabbit]


def feeds(stored: StoredFeed, rabbit: RabbitFeed) -> list[Feed]:
    """A feed has every method."""
    return [stored, rabbit]
