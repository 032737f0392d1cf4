"""What an app has declared, and the one backend it shares between its threads.

Producer, consumer, worker and app all start from a `Registry`. The backend is opened at its first
use and never crosses a fork: a forked child finds none and opens its own.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from importlib import import_module
from importlib.metadata import entry_points
from threading import RLock
from typing import Any, Final, Protocol

from kq import codec as codecs
from kq import config, limit
from kq.backend import Backend, QueueSpec
from kq.driver import Tls
from kq.errors import Conflict, Internal, Invalid
from kq.retry import Backoff, RetryPolicy
from kq.router import Router

#: Built in, so that a checkout works as it is and nothing is scanned at start.
BUILT_IN: Final[Mapping[str, str]] = {
    "memory": "kq.backends.stored:StoredBackend",
    "sqlite": "kq.backends.stored:StoredBackend",
    "redis": "kq.backends.stored:StoredBackend",
    "rediss": "kq.backends.stored:StoredBackend",
    "amqp": "kq.backends.rabbitmq:RabbitBackend",
    "amqps": "kq.backends.rabbitmq:RabbitBackend",
}

#: Backend names that queue options are grouped by, beside those of third parties.
_OPTION_GROUPS: Final = frozenset({"memory", "sqlite", "redis", "amqp"})


@dataclass(frozen=True, slots=True)
class BackendOptions:
    """What a backend is opened with. Durations are seconds.

    Attributes:
        lease: For how long a delivery stays with a worker that does not renew it.
        heartbeat: How often a silent connection is probed.
        timeout: How long a single call to the broker may take.
        name: Who connects, for the broker's own list of connections.
        connect_timeout: How long connecting may take.
        tls: How connections are encrypted; None for the defaults, which verify.
    """

    lease: float
    heartbeat: float
    timeout: float
    name: str
    connect_timeout: float = 5.0
    tls: Tls | None = None


class Registry:
    """Settings, queues, consumers and the backend of one app. Thread-safe."""

    def __init__(self, name: str, settings: config.Settings) -> None:
        self.name = name
        self.settings = settings
        self.router = Router()
        self._declared: dict[str, QueueSpec] = {}
        self._implied: dict[str, QueueSpec] = {}
        self._lock = RLock()
        self._backend: Backend | None = None
        self._confirmed: set[str] = set()
        self._on_reset: list[weakref.WeakMethod[Callable[[], None]]] = []
        _registries.add(self)

    @property
    def create_queues(self) -> bool:
        """Whether publishing to an undeclared queue makes it."""
        return self.settings.create_queues

    def override(self, **settings: Any) -> None:
        """Change settings before the first connection; what the command line says wins over code.

        Raises:
            Conflict: If the app is connected already.
        """
        with self._lock:
            if self._backend is not None:
                raise Conflict("the app is connected already; settings can only be changed before its first use")
            changed = replace(self.settings, **settings)
            find_backend(changed.broker)
            self.settings = changed

    def declare(self, spec: QueueSpec, *, instead_of: QueueSpec | None = None) -> QueueSpec:
        """Register a queue; the same declaration again is fine.

        Args:
            spec: The queue.
            instead_of: An earlier declaration, whose place it takes.

        Raises:
            Conflict: If it was declared with other values; the message names the argument.
        """
        with self._lock:
            known = self._declared.get(spec.id)
            if known is None or known == instead_of:
                self._declared[spec.id] = spec
                self._implied.pop(spec.id, None)
                self._confirmed.discard(spec.id)
            elif known != spec:
                raise Conflict(difference(known, spec))
            return spec

    def imply(self, queue_id: str) -> None:
        """Note that a queue is wanted, by a consumer, without saying how it is declared."""
        with self._lock:
            if queue_id not in self._declared:
                self._implied[queue_id] = default_spec(queue_id)

    def is_declared(self, queue_id: str) -> bool:
        """Tell whether the app declared this queue, or a queue that this one holds the dead letters of."""
        with self._lock:
            if queue_id in self._declared or queue_id in self._implied:
                return True
            return any(spec.dead_letter == queue_id for spec in self._queues())

    def is_exact(self, queue_id: str) -> bool:
        """Tell whether the app said how this queue is declared."""
        return queue_id in self._declared

    def spec(self, queue_id: str) -> QueueSpec:
        """Return a queue as declared, or with default values."""
        found = self._declared.get(queue_id) or self._implied.get(queue_id)
        if found is not None:
            return found
        with self._lock:
            if any(spec.dead_letter == queue_id for spec in self._queues()):
                return replace(default_spec(queue_id), dead_letter=None)
        return default_spec(queue_id)

    def dead_letters_of(self, queue_id: str) -> QueueSpec:
        """Return the dead-letter queue of a queue.

        Raises:
            Invalid: If it has none, being one itself.
        """
        target = self.spec(queue_id).dead_letter
        if target is None:
            raise Invalid(f"queue {queue_id} is a dead-letter queue; it has none of its own. Name the queue itself")
        return replace(self.spec(target), dead_letter=None)

    def queues(self) -> list[QueueSpec]:
        """Return every queue that the app declared or consumes, in that order."""
        with self._lock:
            return list(self._queues())

    def _queues(self) -> Iterator[QueueSpec]:
        yield from self._declared.values()
        yield from self._implied.values()

    def backend(self) -> Backend:
        """Return the app's backend, opened at the first call; connecting is left to its first use.

        Raises:
            Invalid: If the broker's URL has an unknown scheme or is ill-formed.
        """
        with self._lock:
            if self._backend is None:
                self._backend = open_backend(self.settings, self.name)
                self._confirmed.clear()
            return self._backend

    def open(self) -> Backend:
        """Return a backend of the caller's own, which the caller closes."""
        return open_backend(self.settings, self.name)

    def ensure(self, spec: QueueSpec) -> None:
        """Have the shared backend declare a queue, once."""
        if spec.id in self._confirmed:
            return
        self.backend().declare(
            spec, create=self.create_queues or self.is_declared(spec.id), exact=self.is_exact(spec.id)
        )
        self._confirmed.add(spec.id)

    def forget(self, queue_id: str) -> None:
        """Declare a queue anew at its next use: somebody may have deleted it."""
        self._confirmed.discard(queue_id)

    def on_reset(self, callback: Callable[[], None]) -> None:
        """Have a method called when the backend is gone: closed, or left behind by a fork.

        Its object is not kept alive for it.
        """
        self._on_reset = [reference for reference in self._on_reset if reference() is not None]
        self._on_reset.append(weakref.WeakMethod(callback))

    def _reset(self) -> None:
        for reference in list(self._on_reset):
            callback = reference()
            if callback is not None:
                callback()

    def close(self) -> None:
        """Close the backend; the next use opens a new one. Idempotent."""
        with self._lock:
            backend, self._backend = self._backend, None
            self._reset()
        if backend is not None:
            backend.close()

    def after_fork(self) -> None:
        """Leave the parent's connection to the parent: drop it unclosed, with locks that may be held."""
        self._lock = RLock()
        if self._backend is not None:
            # Kept from the garbage collector, whose clean-up would speak on the parent's sockets.
            _left_behind.append(self._backend)
            self._backend = None
        self._reset()


class HasRegistry(Protocol):
    """An app, as far as producers, consumers and workers are concerned."""

    @property
    def registry(self) -> Registry:
        """What the app has declared."""
        ...


def default_spec(queue_id: str) -> QueueSpec:
    """Return a queue nobody described: default values, dead letters beside it."""
    dead = None if queue_id.endswith(limit.DEAD_SUFFIX) else queue_id + limit.DEAD_SUFFIX
    return QueueSpec(queue_id, dead_letter=dead)


def queue_spec(
    queue_id: str,
    *,
    codec: Any = "json/plain",
    dead_letter: Any = None,
    max_attempts: Any = 5,
    max_crashes: Any = 3,
    retry: Any = Backoff(),  # noqa: B008 - a frozen value
    max_length: Any = None,
    max_priority: Any = None,
    require_signature: Any = False,
    options: Any = None,
) -> QueueSpec:
    """Return a checked queue declaration.

    Raises:
        Invalid: If a value is not what it must be; the message names it.
    """
    limit.queue_id(queue_id)
    codecs.named(codec)
    if dead_letter is None:
        dead_letter = default_spec(queue_id).dead_letter
    else:
        limit.queue_id(dead_letter)
        if dead_letter == queue_id:
            raise Invalid(f"dead_letter: expected another queue than {queue_id} itself")
    if not isinstance(retry, Backoff):
        raise Invalid(f"retry: expected a kq.Backoff, got {type(retry).__name__}")
    if require_signature:
        raise Invalid("require_signature: signing is not available in this version; leave it out")
    return QueueSpec(
        queue_id,
        codec=codec,
        dead_letter=dead_letter,
        policy=RetryPolicy(
            count("max_attempts", max_attempts, 1, 1_000_000), count("max_crashes", max_crashes, 1, 1_000_000), retry
        ),
        max_length=None if max_length is None else count("max_length", max_length, 1, 2**31 - 1),
        max_priority=None if max_priority is None else count("max_priority", max_priority, 1, 255),
        require_signature=False,
        options=_options(options),
    )


def count(name: str, value: Any, low: int, high: int) -> int:
    """Return ``value`` if it is an integer from ``low`` to ``high``, else raise ``Invalid``."""
    if isinstance(value, int) and not isinstance(value, bool) and low <= value <= high:
        return value
    raise Invalid(f"{name}: expected an integer from {low} to {high:,}, got {value!r}")


def difference(known: QueueSpec, other: QueueSpec) -> str:
    """Say which argument two declarations of a queue disagree on."""
    pairs = [
        ("codec", known.codec, other.codec),
        ("dead_letter", known.dead_letter, other.dead_letter),
        ("max_attempts", known.policy.max_attempts, other.policy.max_attempts),
        ("max_crashes", known.policy.max_crashes, other.policy.max_crashes),
        ("retry", known.policy.backoff, other.policy.backoff),
        ("max_length", known.max_length, other.max_length),
        ("max_priority", known.max_priority, other.max_priority),
        ("require_signature", known.require_signature, other.require_signature),
        ("options", known.options, other.options),
    ]
    name, old, new = next(pair for pair in pairs if pair[1] != pair[2])
    return f"queue {known.id} is declared already, with {name}={old!r}; got {name}={new!r}"


def find_backend(broker: str) -> str:
    """Return the ``module:class`` that serves a broker URL, without importing it.

    Raises:
        Invalid: If the URL has no scheme, or nothing is registered for it.
    """
    scheme = config.scheme(broker)
    if scheme in BUILT_IN:
        return BUILT_IN[scheme]
    found = {point.name: point.value for point in entry_points(group="kq.backends")}
    if scheme in found:
        return found[scheme]
    known = ", ".join(f"{name}://" for name in sorted({*BUILT_IN, *found}))
    raise Invalid(f"broker: no backend for {scheme}://; expected one of {known}")


def open_backend(settings: config.Settings, name: str) -> Backend:
    """Return a new backend for a broker URL, unconnected.

    Raises:
        Invalid: If no backend is registered for its scheme, or the URL is ill-formed.
    """
    target = find_backend(settings.broker)
    scheme = config.scheme(settings.broker)
    module, _, attribute = target.partition(":")
    try:
        factory: Callable[[str, BackendOptions], Backend] = getattr(import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise Internal(f"broker: the backend for {scheme}:// does not load: {error}", retryable=False) from error
    options = BackendOptions(settings.lease, settings.heartbeat, settings.publish_timeout, name)
    return factory(settings.broker, options)


def _options(options: Any) -> dict[str, dict[str, Any]]:
    if options is None:
        return {}
    if not isinstance(options, Mapping):
        raise Invalid(f'options: expected a mapping such as {{"amqp": {{...}}}}, got {type(options).__name__}')
    known = _OPTION_GROUPS | {point.name for point in entry_points(group="kq.backends")}
    for group, values in options.items():
        if group not in known:
            raise Invalid(f"options: unknown backend {group!r}; expected one of {', '.join(sorted(known))}")
        if not isinstance(values, Mapping):
            raise Invalid(f"options: {group}: expected a mapping, got {type(values).__name__}")
    return {group: dict(values) for group, values in options.items()}


_registries: weakref.WeakSet[Registry] = weakref.WeakSet()
_left_behind: list[Backend] = []


def _after_fork() -> None:
    for registry in list(_registries):
        registry.after_fork()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
