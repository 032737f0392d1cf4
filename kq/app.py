"""The app: what people declare queues and handlers on. It puts the other parts together."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from contextvars import ContextVar, Token
from dataclasses import fields, replace
from datetime import datetime
from hashlib import sha256
from time import monotonic
from typing import TYPE_CHECKING, Any, TypeVar

from kq import config_file, limit
from kq.backend import QueueInfo, QueueSpec
from kq.config import hide_password, resolve, warn_of_unknown
from kq.dead_letter import DeadLetters
from kq.declaration import Declarations
from kq.driver import Driver
from kq.entry import policies_of, signing_of
from kq.errors import Conflict, Invalid
from kq.executor import Executor, HandleMiddleware
from kq.guard import Guard
from kq.limit import count
from kq.message import Message
from kq.message import current as current_message
from kq.producer import Producer, PublishMiddleware
from kq.registry import Registry
from kq.retry import Backoff
from kq.router import Consumer
from kq.said import caller
from kq.scheme import find_backend
from kq.security import Actor, Policy, current_actor
from kq.security.policy import group_names
from kq.shield import shielded
from kq.signing import Signing
from kq.version import __version__

if TYPE_CHECKING:
    from kq.worker.worker import Worker

_Handler = TypeVar("_Handler", bound=Callable[..., Any])


class App:
    """Queues, handlers and a broker, under one name.

    Creating an app connects to nothing. Thread-safe; a forked child opens connections of its own.

    Args:
        name: For logs and for the broker's list of connections.
        broker: The URL of the app's own broker; else ``KQ_BROKER_URL``, else the configuration file's, else
            ``sqlite:///kq.db``.
        config: The configuration file; else ``KQ_CONFIG``, else ``kq.yaml`` if there is one.
        publish_timeout: Seconds that one publish may take; default 10.
        lease: Seconds that a delivery stays with a worker that has died; default 30.
        heartbeat: Seconds between probes of a silent connection; default 30.
        create_queues: Whether publishing to an undeclared queue makes it; default true.
        max_body: Bytes of the largest body, at most 8 MiB; default 1 MiB.
        max_deliveries: Deliveries in a row that nobody settles before a message is dead-lettered; default 20.
        durability: ``warned`` (default): a worker warns of broker settings under which acknowledged messages may be
            lost; ``required``: it refuses to start.
        drivers: More brokers, by the name that `queue` knows them by: URLs, or `kq.Driver` for all that can be
            said of one.
        signing: Keys to sign and verify messages with; else the configuration file's.
        policies: Who may do what, beside the policies of the configuration file.
        strict_mode: Whether whoever acts outside of any `kq.security.context` is denied; default false.
        actor: Under whom workers of this app consume and handlers run: an id or a `kq.security.Actor`.
        groups: The groups of that actor.
        on_publish: Middleware around publishing, outermost first: ``(draft, call_next) -> ids``.
        on_handle: Middleware around handlers, outermost first: ``(message, payload, call_next) -> result``.

    Raises:
        Invalid: If a setting, here or in the environment, is not what it must be, or no backend serves a URL.
    """

    def __init__(
        self,
        name: str,
        *,
        broker: str | None = None,
        config: str | config_file.Document | None = None,
        publish_timeout: float | None = None,
        lease: float | None = None,
        heartbeat: float | None = None,
        create_queues: bool | None = None,
        max_body: int | None = None,
        max_deliveries: int | None = None,
        durability: str | None = None,
        drivers: Mapping[str, str | Driver] | None = None,
        signing: Signing | None = None,
        policies: Iterable[Policy] = (),
        strict_mode: bool | None = None,
        actor: Actor | str | None = None,
        groups: str | Sequence[str] | None = None,
        on_publish: Sequence[PublishMiddleware] = (),
        on_handle: Sequence[HandleMiddleware] = (),
    ) -> None:
        if not isinstance(name, str) or not name:
            raise Invalid(f"name: expected a name for the app, got {name!r}")
        named_drivers = {} if drivers is None else drivers
        if not isinstance(named_drivers, Mapping):
            expected = "expected a mapping, each driver or URL under its name"
            raise Invalid(f"drivers: {expected}, got {type(drivers).__name__}")
        if signing is not None and not isinstance(signing, Signing):
            raise Invalid(f"signing: expected a kq.Signing, got {type(signing).__name__}")
        document = config if isinstance(config, config_file.Document) else config_file.load(config)
        settings = resolve(
            {
                "broker": broker,
                "publish_timeout": publish_timeout,
                "lease": lease,
                "heartbeat": heartbeat,
                "create_queues": create_queues,
                "max_body": max_body,
                "max_deliveries": max_deliveries,
                "durability": durability,
                "strict_mode": strict_mode,
                "actor": actor.id if isinstance(actor, Actor) else actor,
                "groups": None if groups is None else tuple(sorted(group_names(groups))),
            },
            document=document,
        )
        if settings.strict_mode and document.risks:
            raise Invalid("\n".join(f"{risk}; refused, for strict_mode is on" for risk in document.risks))
        find_backend(settings.broker)
        self.registry = Registry(name, settings)
        self.document = document
        self.registry.variables, self.registry.risks = document.variables, document.risks
        self.registry.guard = Guard(
            [*policies_of(document), *_policies(policies)],
            strict=settings.strict_mode,
            actor=actor if isinstance(actor, Actor) else Actor(settings.actor) if settings.actor else None,
            groups=settings.groups,
        )
        in_file = signing_of(document)
        if signing is not None and in_file is not None:
            raise Conflict(
                f"signing: said here and at {document.signing.place}; expected one of them, keys and rules together"
            )
        self.registry.signing = signing or in_file
        for driver_name, driver in named_drivers.items():
            self.registry.add_driver(
                replace(driver, name=driver_name) if isinstance(driver, Driver) else Driver(driver, driver_name)
            )
        self.declarations = Declarations(document, self.registry, caller().module)
        # An app that is not strict loosens nothing that another one, or the program, has set.
        self.registry.be_strict()
        self._on_handle = list(limit.functions("on_handle", on_handle))
        self.registry.on_publish = limit.functions("on_publish", on_publish)
        self._producer = Producer(self)
        warn_of_unknown(document.variables)
        _remember(self)

    @classmethod
    def from_file(cls, config: str | None = None, *, broker: str | None = None) -> App:
        """Return the app that a configuration file describes, named after the file's namespace.

        It has no module of its own: bare method names are found in ``source``, else in ``handlers.py``.

        Args:
            config: The file; else ``KQ_CONFIG``, else ``kq.yaml`` if there is one.
            broker: The broker's URL; wins over the file's.

        Raises:
            Invalid: If the file, or a setting in the environment, is not what it must be.
        """
        document = config_file.load(config)
        app = cls(document.namespace or "kq", broker=broker, config=document)
        # Whoever calls this, be it a library for command lines, is not where the handlers are.
        app.declarations.module = None
        return app

    @property
    def name(self) -> str:
        """The app's name."""
        return self.registry.name

    def __repr__(self) -> str:
        return f"<App {self.name!r} on {hide_password(self.registry.settings.broker)}>"

    # Declaring.

    def queue(
        self,
        queue_id: str,
        *,
        codec: str | None = None,
        dead_letter: str | None = None,
        max_attempts: int | None = None,
        max_crashes: int | None = None,
        retry: Backoff | None = None,
        max_length: int | None = None,
        max_priority: int | None = None,
        require_signature: bool | None = None,
        options: Mapping[str, Mapping[str, Any]] | None = None,
        driver: str | None = None,
    ) -> QueueSpec:
        """Declare a queue; the broker hears of it at its first use. Idempotent.

        What a configuration file says of the queue holds as well; both must agree where both speak.

        Args:
            queue_id: ``namespace:name``.
            codec: ``json/plain`` (the default) or ``application/msgpack``.
            dead_letter: The queue for messages that cannot be handled; default ``<queue id>.dead``.
            max_attempts: Runs of a message before it is dead-lettered, the first included; default 5.
            max_crashes: Runs under which its process may die; default 3.
            retry: The wait between attempts; default ``kq.Backoff()``: from 1 s, doubled, at most 10 minutes.
            max_length: Messages that may wait before publishing is refused with reason ``full``; default no limit.
            max_priority: Levels of priority; only RabbitMQ needs to know.
            require_signature: Whether messages that are not signed, or not as they must be, are dead-lettered;
                default what ``signing`` says.
            options: What one kind of broker understands, e.g. ``{"amqp": {"queue_type": "classic"}}``.
            driver: The name of the driver whose broker it lives on, with its dead letters; default the app's own.

        Raises:
            Invalid: If a value is not what it must be.
            Conflict: If the queue was declared with other values, here or in a file, or its dead
                letters live on another driver.
        """
        said = {
            "codec": codec,
            "dead_letter": dead_letter,
            "max_attempts": max_attempts,
            "max_crashes": max_crashes,
            "retry": retry,
            "max_length": max_length,
            "max_priority": max_priority,
            "require_signature": require_signature,
            "options": options,
            "driver": driver,
        }
        return self.declarations.queue(queue_id, {name: value for name, value in said.items() if value is not None})

    def consumer(
        self,
        queue_id: str,
        *,
        name: str | None = None,
        concurrency: int | None = None,
        prefetch: int | None = None,
        timeout: Any = None,
        auto_ack: bool = False,
        max_attempts: int | None = None,
        retry: Backoff | None = None,
    ) -> Callable[[_Handler], _Handler]:
        """Make a function, sync or async, a handler of a queue. It stays a plain function.

        Several consumers of one queue compete for its messages: each message goes to one of them, in turn, that
        has room. A retry may go to another one.

        Args:
            queue_id: The queue; declared with default values unless `queue` says otherwise.
            name: For logs, and to tell the consumers of one queue apart; default the function's own.
            concurrency: Runs at once in one worker; default no limit of its own.
            prefetch: Messages that one worker holds for it; default as many as fit.
            timeout: Seconds or ``timedelta`` that one run may take; default no limit.
            auto_ack: Settle before the handler runs: at most once. The same for all consumers of a queue.
            max_attempts: Wins over the queue's.
            retry: Wins over the queue's.

        Raises:
            Invalid: If a value is not what it must be.
            Conflict: If the queue has a consumer of that name already, or one with another ``auto_ack``.
        """
        limit.queue_id(queue_id)
        seconds = None if timeout is None else limit.seconds("timeout", timeout)
        if seconds == 0:
            raise Invalid("timeout: expected more than 0 seconds")
        if retry is not None and not isinstance(retry, Backoff):
            raise Invalid(f"retry: expected a kq.Backoff, got {type(retry).__name__}")
        if not isinstance(auto_ack, bool):
            raise Invalid(f"auto_ack: expected True or False, got {auto_ack!r}")
        if name is not None and (not isinstance(name, str) or not name):
            raise Invalid(f"name: expected a name for the consumer, got {name!r}")

        place = caller().place

        def register(handler: _Handler) -> _Handler:
            if not callable(handler):
                raise Invalid(f"expected a function to handle {queue_id}, got {type(handler).__name__}")
            self.registry.router.add(
                Consumer(
                    queue=queue_id,
                    name=name or str(getattr(handler, "__name__", type(handler).__name__)),
                    handler=handler,
                    max_attempts=None if max_attempts is None else count("max_attempts", max_attempts, 1, 1_000_000),
                    backoff=retry,
                    concurrency=None if concurrency is None else count("concurrency", concurrency, 1, 100_000),
                    prefetch=None if prefetch is None else count("prefetch", prefetch, 1, 100_000),
                    timeout=seconds,
                    auto_ack=auto_ack,
                    place=place,
                )
            )
            self.registry.imply(queue_id)
            return handler

        return register

    # Publishing.

    def publish(
        self,
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
        return self._producer.publish(
            queue_id, data, headers, delay=delay, at=at, expires=expires, message_id=message_id
        )

    def publish_many(
        self,
        queue_id: str,
        payloads: Iterable[Any],
        headers: Any = None,
        *,
        delay: Any = None,
        at: datetime | None = None,
        expires: Any = None,
    ) -> list[str]:
        """Publish messages, pipelined, and return their ids; see `kq.Producer.publish_many`."""
        return self._producer.publish_many(queue_id, payloads, headers, delay=delay, at=at, expires=expires)

    async def apublish(
        self,
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
        return await self._producer.apublish(
            queue_id, data, headers, delay=delay, at=at, expires=expires, message_id=message_id
        )

    async def apublish_many(
        self,
        queue_id: str,
        payloads: Iterable[Any],
        headers: Any = None,
        *,
        delay: Any = None,
        at: datetime | None = None,
        expires: Any = None,
    ) -> list[str]:
        """Publish messages without blocking the event loop; see `kq.Producer.publish_many`."""
        return await self._producer.apublish_many(queue_id, payloads, headers, delay=delay, at=at, expires=expires)

    def message(self) -> Message:
        """Return the message being handled.

        Raises:
            Invalid: If no delivery is in context.
        """
        return current_message()

    # Looking after queues.

    def info(self, queue_id: str) -> QueueInfo:
        """Return what the broker knows of a queue.

        Raises:
            Invalid: If the queue id is ill-formed.
            PermissionDenied: If a policy does not allow ``queue.admin.queue`` on it.
            NotFound: If there is no such queue; one that the app declares is made.
            Internal: If the broker cannot be reached.
        """
        spec = self.registry.spec(limit.queue_id(queue_id))
        self.registry.guard.administer(spec.id)
        # A time limit that strikes between two frames would leave a broken connection behind, for everybody.
        with shielded():
            self.registry.ensure_declared(spec)
            return self.registry.backend(spec.driver).info(spec)

    def purge(self, queue_id: str) -> int:
        """Drop what waits in a queue, and return how many messages that were; raises as `info`.

        Messages that a worker holds are not touched; delayed ones are, where the broker can.
        """
        spec = self.registry.spec(limit.queue_id(queue_id))
        self.registry.guard.administer(spec.id)
        with shielded():
            self.registry.ensure_declared(spec)
            backend = self.registry.backend(spec.driver)
            backend.info(spec)
            return backend.purge(spec)

    def dead(self, queue_id: str) -> DeadLetters:
        """Return the dead letters of a queue; raises as `info`."""
        limit.queue_id(queue_id)
        return DeadLetters(self.registry, queue_id)

    def acting(self, actor: Actor | None, groups: str | Iterable[str] = ()) -> AbstractContextManager[None]:
        """Return a context in which ``actor`` acts under the app's policies; None for nobody.

        It goes along into tasks, coroutines and threads that are started with a copied context.

        Args:
            actor: Who acts.
            groups: The groups they act in.
        """
        return self.registry.guard.acting(actor, groups)

    # Working.

    def worker(self, **options: Any) -> Worker:
        """Return a worker that runs in this process: ``run()``, ``start()``, ``stop()``, or a context manager.

        Args:
            options: As in `kq.worker.option.WorkerOptions`, e.g. ``concurrency=4``. With ``app_path``, the
                app's ``package.module:attribute``, handlers run in processes; without, in threads.
        """
        from kq.worker.option import WorkerOptions
        from kq.worker.worker import Worker

        self.declarations.load_handlers()
        app_path = options.pop("app_path", None)
        if isinstance(options.get("queues"), str):
            options["queues"] = [options["queues"]]
        known = [field.name for field in fields(WorkerOptions)]
        for name in options:
            if name not in known:
                raise Invalid(f"worker: expected options of {', '.join(known)}, app_path, got {name!r}")
        return Worker(self, app_path=app_path, options=WorkerOptions(**options))

    def drain(self, timeout: Any = 60.0, *, concurrency: int = 1) -> int:
        """Handle messages in this process until none is ready, running or due; for tests and scripts.

        Blocks. Works in any thread.

        Args:
            timeout: Seconds or ``timedelta`` after which to stop; what runs then is finished.
            concurrency: Handlers at once.

        Returns:
            How many messages were handled to their end: done or dead-lettered.
        """
        from kq.worker.option import CONNECT_TIMEOUT, WorkerOptions
        from kq.worker.worker import Worker

        self.declarations.load_handlers()
        if not len(self.registry.router):
            return 0
        patience = limit.seconds("timeout", timeout)
        deadline = monotonic() + patience
        options = WorkerOptions(
            pool="threads", concurrency=concurrency, prefetch=max(10, 2 * concurrency),
            connect_timeout=min(CONNECT_TIMEOUT, patience),
        )  # fmt: skip
        worker = Worker(self, options=options, idle_until=deadline, quiet=True)
        worker.run()
        return worker.tally.handled + worker.tally.dead

    def executor(self) -> Executor:
        """Return what runs this app's handlers. For workers."""
        return Executor(
            self.registry.router,
            self.registry.spec,
            max_body=self.registry.settings.max_body,
            distrust=self.registry.distrust,
            middleware=self._on_handle,
            activate=self._activate,
        )

    def fingerprint(self) -> str:
        """Return a text that is another one whenever a worker would have to work otherwise. For workers."""
        signing = self.registry.signing
        whole = [
            # Its children would not speak as it does.
            __version__,
            self.declarations.fingerprint(),
            self.registry.guard.fingerprint(),
            "" if signing is None else signing.fingerprint(),
        ]
        return sha256(repr(whole).encode()).hexdigest()

    def close(self) -> None:
        """Give up connections; the next use opens new ones. Idempotent. Thread-safe, also in a signal's handler.

        Whoever is in the middle of a publish is done with it, or told that the connection is closed (`Internal`,
        retryable, ``details["reason"]`` is ``unavailable``).
        """
        self._producer.close()
        self.registry.close()

    def __enter__(self) -> App:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _activate(self) -> _Active:
        return _Active(self)


class _Active:
    """Makes an app the one that `kq.queue` acts on, and its own actor the one who acts, for a while."""

    __slots__ = ("_app", "_serving", "_token")

    def __init__(self, app: App) -> None:
        self._app = app
        self._serving: AbstractContextManager[None] | None = None
        self._token: Token[App | None]

    def __enter__(self) -> None:
        self._token = _active.set(self._app)
        guard = self._app.registry.guard
        # Async handlers inherit the context of whoever calls `drain`, who is not the one that acts in them.
        if guard.in_force or current_actor() is not None:
            self._serving = guard.serving()
            self._serving.__enter__()

    def __exit__(self, *exc: object) -> None:
        if self._serving is not None:
            self._serving.__exit__(None, None, None)
        _active.reset(self._token)


_active: ContextVar[App | None] = ContextVar("kq_app", default=None)
#: Kept alive: what comes after it acts on it, also where nobody else holds it.
_last: App | None = None
_default: App | None = None


def _policies(given: Any) -> list[Policy]:
    if not isinstance(given, Iterable) or isinstance(given, (str, bytes)):
        raise Invalid(f"policies: expected a list of kq.security.Policy, got {type(given).__name__}")
    policies = list(given)
    for policy in policies:
        if not isinstance(policy, Policy):
            raise Invalid(f"policies: expected kq.security.Policy, got {type(policy).__name__}")
    return policies


def _remember(app: App) -> None:
    global _last
    _last = app


def current() -> App:
    """Return the app that `kq.queue` acts on.

    That of the running handler, else the one created last in this process, else one made from the
    environment.
    """
    global _default
    app = _active.get() or _last
    if app is not None:
        return app
    if _default is None:
        _default = App("kq")
    return _default
