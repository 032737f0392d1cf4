"""Publishing and the current message, as functions: ``from kq import queue``.

They act on the app whose handler is running, else on the app created last in this process, else on one
made from the environment. Where several apps live in one process, use the app's own methods.
"""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime
from typing import Any

from kq.app import current
from kq.backend import QueueInfo
from kq.message import Message
from kq.message import current as _current_message

__all__ = ["publish", "publish_many", "apublish", "apublish_many", "message", "info"]


def publish(
    queue_id: str,
    data: Any,
    headers: Any = None,
    *,
    delay: Any = None,
    at: datetime | None = None,
    expires: Any = None,
    message_id: str | None = None,
) -> str:
    """Publish one message and return its id; see `kq.Producer.publish`."""
    return current().publish(queue_id, data, headers, delay=delay, at=at, expires=expires, message_id=message_id)


def publish_many(
    queue_id: str,
    payloads: Iterable[Any],
    headers: Any = None,
    *,
    delay: Any = None,
    at: datetime | None = None,
    expires: Any = None,
) -> list[str]:
    """Publish messages, pipelined, and return their ids; see `kq.Producer.publish_many`."""
    return current().publish_many(queue_id, payloads, headers, delay=delay, at=at, expires=expires)


async def apublish(
    queue_id: str,
    data: Any,
    headers: Any = None,
    *,
    delay: Any = None,
    at: datetime | None = None,
    expires: Any = None,
    message_id: str | None = None,
) -> str:
    """Publish one message without blocking the event loop; see `kq.Producer.publish`."""
    return await current().apublish(queue_id, data, headers, delay=delay, at=at, expires=expires, message_id=message_id)


async def apublish_many(
    queue_id: str,
    payloads: Iterable[Any],
    headers: Any = None,
    *,
    delay: Any = None,
    at: datetime | None = None,
    expires: Any = None,
) -> list[str]:
    """Publish messages without blocking the event loop; see `kq.Producer.publish_many`."""
    return await current().apublish_many(queue_id, payloads, headers, delay=delay, at=at, expires=expires)


def message() -> Message:
    """Return the message being handled.

    Raises:
        Invalid: If no delivery is in context.
    """
    return _current_message()


def info(queue_id: str) -> QueueInfo:
    """Return what the broker knows of a queue; see `kq.App.info`."""
    return current().info(queue_id)
