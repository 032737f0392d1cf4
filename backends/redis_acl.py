"""The least that an account needs on Redis, as rules of ``ACL SETUSER``.

A script runs with the rights of whoever calls it, so every command in it must be granted. On Redis 7 selectors
grant a command on some keys only; `kq.backends.redis_script` has the map of all keys.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from kq import limit
from kq.backend import Role

#: What every account needs, whatever it does.
_CONNECTION: Final = ("ping", "client|setname", "select", "evalsha", "eval", "time")

#: What a publisher does, by the last part of the key.
PUBLISHER: Final[dict[str, tuple[str, ...]]] = {
    "q": ("get", "setnx", "exists"),
    "m": ("hlen", "hexists", "hsetnx"),
    "l": ("zcard",),
    "p": ("hset",),
    "x": ("hset",),
    "d": ("zadd", "zrange"),
    "r:*": ("rpush",),
    "w": ("llen", "rpush"),
}
#: What a worker does, and whoever looks after queues.
WORKER: Final = (
    "blpop", "exists", "get", "hdel", "hexists", "hget", "hlen", "hmget", "hset", "hsetnx", "hstrlen", "incrby",
    "lindex", "llen", "lpop", "lrange", "lrem", "pexpire", "pttl", "rpush", "setnx", "unlink", "zadd", "zcard",
    "zcount", "zrange", "zrangebyscore", "zrem", "zremrangebyrank", "zremrangebyscore", "zscore",
)  # fmt: skip

_PUBLISHER_TEXT: Final = """\
# Redis 7.0 or newer, for whoever publishes. It can store messages and have queues declared. It can neither read,
# take, change nor delete a stored message. What Redis cannot deny it: to disturb the order, the delays and, for
# plain Kombu programs, the expiry of messages, for it may write the lists of ids itself; to have one run twice; and
# to read the ids of those that are delayed.
{rule}
# Redis 6.2 has no selectors. There the same commands must be granted on all keys of a queue, and whoever has them
# can also replace and damage stored messages; it still cannot read them:
# {flat}"""
_WORKER_TEXT: Final = """\
# For workers, kq info, kq dead and kq purge: everything that is done to a queue.
{rule}"""
_NOTES: Final = """
# Type it at redis-cli's prompt, or put it into the server's ACL file. Not needed, but of use: +client|setinfo (7.2)
# keeps the client's introduction out of ACL LOG, and +info +config|get let kq check judge the server's settings.
# With +multi +exec, and for a publisher +llen on its lists (r:*), a message of more than 64 KB is stored in half the
# time, not copied by a script.
# With +client|id +client|unblock a worker has a message one round trip earlier, and hears at once, not within 3 s, of
# one for a queue that it has room for again; it may end other clients' waits then.
# Plain Kombu programs on kq-redis:// declare exchanges as well, which takes +hmget +hget +hset on ~kq:topology."""


def acl(role: Role, queues: Sequence[str]) -> str:
    """Return the rule for an account, with comments; see `kq.backend.Granting`."""
    if role == "worker":
        return _WORKER_TEXT.format(rule=_line(role, rules(role, queues))) + _NOTES
    flat = _line(role, rules(role, queues, selectors=False))
    return _PUBLISHER_TEXT.format(rule=_line(role, rules(role, queues)), flat=flat) + _NOTES


def rules(role: Role, queues: Sequence[str], *, selectors: bool = True) -> list[str]:
    """Return the words of a rule, but for name and password.

    Args:
        role: Whose.
        queues: Ids; none for all queues.
        selectors: Whether a publisher's are used, as Redis 7 can.
    """
    tags = sorted({queue.removesuffix(limit.DEAD_SUFFIX) for queue in queues}) or ["*"]
    starts = [f"{{kq:{tag}}}" for tag in tags]
    # Channels are not used at all, and older servers grant all of them unless told.
    found = ["resetchannels", *(f"+{command}" for command in _CONNECTION)]
    if role == "worker" or not selectors:
        publisher = sorted({command for commands in PUBLISHER.values() for command in commands})
        granted = WORKER if role == "worker" else publisher
        return [*found, *(f"+{command}" for command in granted), *(f"~{start}*" for start in starts)]
    # What a script is called with: the start of the keys, at which there is nothing.
    found += [f"~{start}{part}" for start in starts for part in (":", f"{limit.DEAD_SUFFIX}:")]
    for key, commands in PUBLISHER.items():
        keys = [f"~{start}:{key}" for start in starts]
        if key == "q":
            keys += [f"~{start}{limit.DEAD_SUFFIX}:q" for start in starts]
        words = [*(f"+{command}" for command in commands), *keys]
        words[0], words[-1] = "(" + words[0], words[-1] + ")"
        found += words
    return found


def _line(role: Role, words: Sequence[str]) -> str:
    return f"ACL SETUSER kq-{role} reset on >PASSWORD " + " ".join(words)
