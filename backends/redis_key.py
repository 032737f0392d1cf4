"""What Redis keeps things under: a queue's keys, and a message's id in them."""

from __future__ import annotations

from typing import Final

from kq import limit

#: What an id starts with that is no UTF-8, before its bytes in hexadecimal. No publisher's id has such a thing.
_FOREIGN: Final = "\x01"


def prefix(queue: str) -> str:
    """Return what the keys of a queue start with.

    A dead-letter queue's stand under the tag of the queue beside it, so that both share a hash slot.
    Two queues never share a prefix: a queue id holds neither braces nor a slash.
    """
    if queue.endswith(limit.DEAD_SUFFIX):
        return f"{{kq:{queue.removesuffix(limit.DEAD_SUFFIX)}}}.dead:"
    return f"{{kq:{queue}}}:"


def bell_key(queue: str) -> str:
    """Return the key on which it is rung for a queue."""
    return prefix(queue) + "w"


def to_id(key: bytes) -> str:
    """Return the id under which Redis keeps a message; a stranger's may be any bytes."""
    try:
        id = key.decode()
    except UnicodeDecodeError:
        return _FOREIGN + key.hex()
    return _FOREIGN + key.hex() if id.startswith(_FOREIGN) else id


def to_key(id: str) -> bytes:
    """Return what `to_id` has made an id of; or the key for an id that a stranger's envelope has."""
    if id.startswith(_FOREIGN):
        try:
            return bytes.fromhex(id[len(_FOREIGN) :])
        except ValueError:
            pass
    return id.encode()
