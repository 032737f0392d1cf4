"""The least that an account needs on RabbitMQ: its patterns of what to configure, to write and to read."""

from __future__ import annotations

import re
from collections.abc import Sequence
from shlex import quote
from typing import Final, NamedTuple
from urllib.parse import unquote, urlsplit

from kq.backend import Role

_DELAY: Final = r"kq\.delay\.[0-9]+"
#: Every queue id, and so the name of every queue and dead-letter exchange of kq.
_ANY: Final = r"[A-Za-z0-9][A-Za-z0-9._-]*:[A-Za-z0-9][A-Za-z0-9._-]*"
#: What RabbitMQ calls the exchange without a name.
_DEFAULT: Final = r"amq\.default"

_PUBLISHER_TEXT: Final = """\
# For whoever publishes. It can neither consume, look into nor declare queues: a worker has to have started once, or
# a publish is refused. What RabbitMQ cannot deny it: to publish to every queue of the virtual host, for all of
# them are reached through the default exchange; and to read and to drop messages while they are delayed, for who
# declares a queue whose messages return needs the rights to both. Counting messages is denied to nobody."""
_WORKER_TEXT: Final = """\
# For workers, kq info, kq dead and kq purge: declares and consumes queues, and publishes retries and dead letters."""


class Patterns(NamedTuple):
    """RabbitMQ's three patterns, as ``set_permissions`` takes them."""

    configure: str
    write: str
    read: str


def acl(role: Role, queues: Sequence[str], url: str) -> str:
    """Return the command that grants an account its rights, with comments; see `kq.backend.Granting`."""
    words = " ".join(quote(pattern) for pattern in patterns(role, queues))
    vhost = quote(unquote(urlsplit(url.partition(";")[0]).path[1:]) or "/")
    text = _WORKER_TEXT if role == "worker" else _PUBLISHER_TEXT
    return f"{text}\nrabbitmqctl set_permissions -p {vhost} kq-{role} {words}"


def patterns(role: Role, queues: Sequence[str]) -> Patterns:
    """Return what an account may configure, write and read.

    Args:
        role: Whose.
        queues: Ids, those of dead-letter queues too; none for all queues.
    """
    if role == "publisher":
        return Patterns(_all(_DELAY), _all(_DEFAULT, _DELAY), _all(_DELAY))
    names = [re.escape(queue) for queue in sorted(set(queues))] or [_ANY]
    return Patterns(_all(_DELAY, *names), _all(_DEFAULT, _DELAY, *names), _all(_DELAY, *names))


def _all(*names: str) -> str:
    return f"^({'|'.join(names)})$"
