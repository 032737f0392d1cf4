"""kq: a task queue for work you must not lose.

Publish a message to a queue id such as ``app:emails``; a worker runs your handler on it at least once,
retries what is worth retrying, and puts the rest where a person can look at it.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kq import errors, queue, security
    from kq.app import App
    from kq.backend import Capabilities, QueueInfo
    from kq.consumer import Consumer
    from kq.dead_letter import DeadLetter, DeadLetters
    from kq.driver import Driver, Tls
    from kq.message import Message
    from kq.producer import Producer
    from kq.retry import Backoff, Retry
    from kq.signing import Signing
    from kq.version import __version__

__all__ = [
    "App",
    "Backoff",
    "Capabilities",
    "Consumer",
    "DeadLetter",
    "DeadLetters",
    "Driver",
    "Message",
    "Producer",
    "QueueInfo",
    "Retry",
    "Signing",
    "Tls",
    "__version__",
    "errors",
    "queue",
    "security",
]

#: Where each name lives. Imported at its first use, so that ``kq --help`` need not load everything.
_HOMES = {
    "App": "app",
    "Backoff": "retry",
    "Capabilities": "backend",
    "Consumer": "consumer",
    "DeadLetter": "dead_letter",
    "DeadLetters": "dead_letter",
    "Driver": "driver",
    "Message": "message",
    "Producer": "producer",
    "QueueInfo": "backend",
    "Retry": "retry",
    "Signing": "signing",
    "Tls": "driver",
    "__version__": "version",
}
_MODULES = frozenset({"errors", "queue", "security"})


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return import_module(f"kq.{name}")
    if name not in _HOMES:
        raise AttributeError(f"module 'kq' has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f"kq.{_HOMES[name]}"), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
