"""kq: a task queue for work you must not lose.

Publish a message to a queue id such as ``app:emails``; a worker runs your handler on it at least once,
retries what is worth retrying, and puts the rest where a person can look at it.
"""

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
