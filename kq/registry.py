"""What an app has declared, and the backends it shares between its threads, one for each driver.

Producer, consumer, worker and app all start from a `Registry`. A backend is opened at its first
use and never crosses a fork: a forked child finds none and opens its own.
"""

from __future__ import annotations

import os
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import fields, replace
from threading import RLock
from typing import Any, Final, Protocol

from msgspec import structs

from kq import config, forking, limit
from kq.backend import Backend, Publication, QueueSpec
from kq.driver import MAIN, Driver, check, naming
from kq.envelope import Envelope, clean
from kq.errors import Conflict, Invalid
from kq.guard import Guard
from kq.queue_spec import default_spec, difference
from kq.router import Router
from kq.scheme import find_backend, open_backend
from kq.security import Actor
from kq.security.context import leave_strict, make_strict
from kq.shield import shielded
from kq.signing import Signing

#: The origin of settings that have been overridden.
COMMAND_LINE: Final = "command line"
#: Queues that nobody declared and that are remembered at most.
_ASSUMED_MOST: Final = 10_000


class Registry:
    """Settings, drivers, queues, consumers and the backends of one app. Thread-safe.

    Attributes:
        name: The app's name.
        settings: What it runs with.
        router: Its consumers.
        drivers: Its brokers by name; `MAIN` is always there, and speaks to ``settings.broker``.
    """

    def __init__(self, name: str, settings: config.Settings) -> None:
        self.name = name
        self.settings = settings
        #: Variables of the environment that the app's configuration file names.
        self.variables: frozenset[str] = frozenset()
        #: Which of its configuration files others may change.
        self.risks: tuple[str, ...] = ()
        #: Around every publish, outermost first.
        self.on_publish: tuple[Callable[..., list[str]], ...] = ()
        #: What asks the app's policies. Where there is no app, strict mode is as everywhere in the process.
        self.guard = Guard(strict=settings.strict_mode or None)
        self._signing: Signing | None = None
        #: What has been changed by `override`, by name.
        self.overrides: dict[str, Any] = {}
        self.router = Router()
        self.drivers: dict[str, Driver] = {MAIN: Driver(settings.broker)}
        self._declared: dict[str, QueueSpec] = {}
        self._implied: dict[str, QueueSpec] = {}
        #: Queues that hold the dead letters of others, and the driver of the first of those.
        self._dead: dict[str, str] = {}
        #: What `spec` has said of queues that nobody declared.
        self._assumed: dict[str, QueueSpec] = {}
        self._lock = RLock()
        self._backends: dict[str, Backend] = {}
        #: Whether it is to make the process strict, and `close` has taken that back, until the next use.
        self._makes_strict = self._has_left = False
        #: By driver, the queues that its shared backend has declared.
        self._confirmed: defaultdict[str, set[str]] = defaultdict(set)
        self._on_reset: list[weakref.WeakMethod[Callable[[], None]]] = []
        #: Where relative paths of brokers start, wherever a handler goes later.
        self._folder = _current_folder()
        forking.enrol(self, forking.Stage.OPENS)

    @property
    def signing(self) -> Signing | None:
        """What signs and verifies messages, if there are keys."""
        return self._signing

    @signing.setter
    def signing(self, signing: Signing | None) -> None:
        self._signing = signing
        self._assumed.clear()

    @property
    def create_queues(self) -> bool:
        """Whether publishing to an undeclared queue makes it."""
        return self.settings.create_queues

    def override(self, *, actor_meta: Mapping[str, Any] | None = None, **settings: Any) -> None:
        """Change settings before the first connection; what the command line says wins over code.

        Another broker is spoken to as by default: what was said of the app's own was said of the other one. So
        another actor has the meta that is given with it, and no other.

        Args:
            actor_meta: What is known of the setting ``actor``.
            settings: By name.

        Raises:
            Invalid: If the actor is none.
            Conflict: If the app is connected already.
        """
        with self._lock:
            if self._backends:
                raise Conflict("the app is connected already; settings can only be changed before its first use")
            if "groups" in settings:
                # From another process it comes as a list.
                settings["groups"] = tuple(settings["groups"])
            changed = replace(self.settings, **settings)
            find_backend(changed.broker)
            if "broker" in settings:
                # In the place of the whole entry, also where the URL is the same.
                self.drivers[MAIN] = Driver(changed.broker)
            self.settings = replace(changed, origins={**changed.origins, **dict.fromkeys(settings, COMMAND_LINE)})
            self.overrides.update(settings)
            if "actor" in settings:
                self.overrides["actor_meta"] = dict(actor_meta or {})
                self.guard = self.guard.serving_as(Actor(changed.actor, actor_meta), changed.groups)

    def add_driver(self, driver: Driver) -> Driver:
        """Register one more broker, for queues to name; the same again is fine.

        One of the name `MAIN` says how the app's own broker is spoken to; its URL must be that broker's.

        Raises:
            Invalid: If its name or a value is not what it must be, or no backend serves its URL.
            Conflict: If there is another one of that name, or the app is connected already to the one it replaces.
        """
        _check_driver(driver)
        with self._lock:
            known = self.drivers.get(driver.name)
            if known == driver:
                return driver
            if driver.name == MAIN and known == Driver(driver.url):
                if MAIN in self._backends:
                    raise Conflict("the app is connected already; its driver can only be changed before its first use")
            elif known is not None:
                raise Conflict(_driver_difference(known, driver))
            self.drivers[driver.name] = driver
            return driver

    def driver(self, name: str) -> Driver:
        """Return a driver by name.

        Raises:
            Invalid: If there is none of that name; the message names those that there are.
        """
        found = self.drivers.get(name)
        if found is None:
            known = ", ".join(repr(other) for other in self.drivers if other) or "none"
            raise Invalid(f"driver: expected one that the app declares ({known}), got {name!r}")
        return found

    def declare(self, spec: QueueSpec, *, instead_of: QueueSpec | None = None) -> QueueSpec:
        """Register a queue; the same declaration again is fine.

        Args:
            spec: The queue.
            instead_of: An earlier declaration, whose place it takes.

        Raises:
            Invalid: If its driver is unknown.
            Conflict: If it was declared with other values, or its dead letters are on another driver; the message
                names the argument.
        """
        with self._lock:
            spec = self._under_rules(spec)
            self.driver(spec.driver)
            known = self._declared.get(spec.id)
            if known is None or (instead_of is not None and known == self._under_rules(instead_of)):
                for other in self._declared.values():
                    if other.id != spec.id:
                        _check_together(other, spec)
                self._declared[spec.id] = spec
                self._assumed.clear()
                is_another = self._implied.pop(spec.id, known) is not None
                if spec.dead_letter is not None:
                    is_another |= self._is_dead_letters(spec.dead_letter, spec.driver)
                self._note_dead(None if is_another else spec)
                self.forget(spec.id)
            elif known != spec:
                raise Conflict(difference(known, spec))
            return spec

    def revive(self, origin: QueueSpec, letter: Envelope) -> Envelope:
        """Return a dead letter as it is sent back to its queue: without kq's own headers, and signed anew."""
        return clean(letter) if self.signing is None else self.signing.revive(origin.id, letter)

    def distrust(self, spec: QueueSpec, envelope: Envelope, replayed: bool) -> str:
        """Say why a message of a queue that asks for signatures is not to be trusted, or nothing.

        A dead letter is signed for the queue that it came from.
        """
        if self.signing is None:
            return "there are no keys to verify it with"
        origin = envelope.headers.get("x_original_queue")
        # Anybody may have written it: what is no queue id is not to be remembered as one.
        is_queue = isinstance(origin, str) and origin != spec.id and limit.is_queue_id(origin)
        from_origin = is_queue and self.spec(str(origin)).dead_letter == spec.id
        queue_id = str(origin) if from_origin else spec.id
        return self.signing.distrust(queue_id, envelope, self.guard, replayed=replayed, dead=from_origin)

    def _under_rules(self, spec: QueueSpec) -> QueueSpec:
        """Return a queue as it is under what holds for all queues. Under the lock."""
        if spec.id in self._dead:
            spec = _without_own_letters(spec)
        if self.signing is None:
            if spec.require_signature:
                raise Invalid(
                    f"queue {spec.id}: require_signature: there are no signing keys; "
                    "give App(signing=kq.Signing(...)), or the section signing of the configuration file"
                )
            return spec
        required = spec.require_signature or self.signing.require
        return structs.replace(
            spec, require_signature=required, replay_window=self.signing.replay_window if required else 0.0
        )  # fmt: skip

    def imply(self, queue_id: str) -> None:
        """Note that a queue is wanted, by a consumer, without saying how it is declared."""
        with self._lock:
            if queue_id not in self._declared:
                spec = structs.replace(default_spec(queue_id), driver=self._dead.get(queue_id, MAIN))
                self._implied[queue_id] = spec = self._under_rules(spec)
                self._note_dead(spec)
                self._assumed.clear()

    def is_declared(self, queue_id: str) -> bool:
        """Tell whether the app declared this queue, or a queue that this one holds the dead letters of."""
        with self._lock:
            if queue_id in self._declared or queue_id in self._implied:
                return True
            return queue_id in self._dead

    def is_exact(self, queue_id: str) -> bool:
        """Tell whether the app said how this queue is declared."""
        return queue_id in self._declared

    def spec(self, queue_id: str) -> QueueSpec:
        """Return a queue as declared, or with default values; dead letters live where their queue does."""
        found = self._declared.get(queue_id) or self._implied.get(queue_id) or self._assumed.get(queue_id)
        if found is not None:
            return found
        with self._lock:
            spec = structs.replace(default_spec(queue_id), driver=self._dead.get(queue_id, MAIN))
            if len(self._assumed) >= _ASSUMED_MOST:
                self._assumed.clear()
            spec = self._assumed[queue_id] = self._under_rules(spec)
            return spec

    def dead_letters_of(self, queue_id: str) -> QueueSpec:
        """Return the dead-letter queue of a queue.

        Raises:
            Invalid: If it has none, being one itself.
        """
        spec = self.spec(queue_id)
        if spec.dead_letter is None:
            raise Invalid(f"queue {queue_id} is a dead-letter queue; it has none of its own. Name the queue itself")
        return structs.replace(self.spec(spec.dead_letter), dead_letter=None, driver=spec.driver)

    def queues(self) -> list[QueueSpec]:
        """Return every queue that the app declared or consumes, in that order."""
        with self._lock:
            return list(self._queues())

    def _queues(self) -> Iterator[QueueSpec]:
        yield from self._declared.values()
        yield from self._implied.values()

    def _is_dead_letters(self, queue_id: str, driver: str) -> bool:
        """Have a queue hold the dead letters of another one, which lives on that driver; False if nobody knows it."""
        implied = self._implied.get(queue_id)
        if implied is not None:
            self._implied[queue_id] = _without_own_letters(structs.replace(implied, driver=driver))
        declared = self._declared.get(queue_id)
        if declared is not None:
            self._declared[queue_id] = _without_own_letters(declared)
        self.forget(queue_id)
        return implied is not None or declared is not None

    def _note_dead(self, new: QueueSpec | None) -> None:
        """Note whose dead letters go where: those of a new queue, or, where one has changed, of all."""
        if new is None:
            self._dead.clear()
        for spec in self._queues() if new is None else (new,):
            if spec.dead_letter is not None:
                self._dead.setdefault(spec.dead_letter, spec.driver)

    def backend(self, driver: str = MAIN) -> Backend:
        """Return the backend of a driver, opened at the first call; connecting is left to its first use.

        Raises:
            Invalid: If the driver is unknown, or its URL has an unknown scheme or is ill-formed.
        """
        forking.notice()
        with self._lock:
            found = self._backends.get(driver)
            if found is None:
                found = self._backends[driver] = self.open(driver)
                self._confirmed[driver].clear()
            return found

    def opened(self, driver: str) -> Backend | None:
        """Return the backend of a driver, as `backend` does, if it is open already; waits for nobody."""
        return self._backends.get(driver)

    def open(self, driver: str = MAIN) -> Backend:
        """Return a backend of the caller's own, which the caller closes; raises as `backend`."""
        forking.notice()
        if self._makes_strict and self._has_left:
            self.be_strict()
        with self.importing():
            return open_backend(self.settings, self.name, self.driver(driver), self._folder)

    @contextmanager
    def importing(self) -> Iterator[None]:
        """Keep a time limit, and forks, from striking in the middle of an import: half a module is of no use."""
        with shielded(), self._lock:
            yield

    def are_ensured(self, driver: str, batch: Sequence[Publication]) -> bool:
        """Tell whether `ensure` has nothing to do for the queues of some publications, all of a driver."""
        confirmed = self._confirmed[driver]
        if len(batch) == 1:
            return batch[0].queue.id in confirmed
        return confirmed.issuperset({publication.queue.id for publication in batch})

    def ensure(self, spec: QueueSpec) -> None:
        """Have the shared backend of its driver declare a queue, once."""
        if spec.id in self._confirmed[spec.driver]:
            return
        self.backend(spec.driver).declare(
            spec, create=self.create_queues or self.is_declared(spec.id), exact=self.is_exact(spec.id)
        )
        confirmed = self._confirmed[spec.driver]
        if len(confirmed) >= _ASSUMED_MOST:
            # Some publishers have a new queue for each client: declared once more is no matter.
            confirmed.clear()
        confirmed.add(spec.id)

    def ensure_declared(self, spec: QueueSpec) -> None:
        """Have a queue declared, as `ensure` does, if the app says that there is such a queue."""
        if self.is_declared(spec.id):
            self.ensure(spec)

    def forget(self, queue_id: str) -> None:
        """Declare a queue anew at its next use: somebody may have deleted it."""
        for confirmed in list(self._confirmed.values()):
            confirmed.discard(queue_id)

    def on_reset(self, callback: Callable[[], None]) -> None:
        """Have a method called when the backends are gone: closed, or left behind by a fork.

        Its object is not kept alive for it.
        """
        self._on_reset = [reference for reference in self._on_reset if reference() is not None]
        self._on_reset.append(weakref.WeakMethod(callback))

    def _reset(self) -> None:
        for reference in list(self._on_reset):
            callback = reference()
            if callback is not None:
                callback()

    def be_strict(self) -> None:
        """In strict mode, make the process strict until `close`, or as long as anybody has this."""
        self._makes_strict, self._has_left = self.settings.strict_mode, False
        if self._makes_strict:
            make_strict(self)

    def close(self) -> None:
        """Close the backends, and make the process no longer strict; the next use does the opposite. Idempotent."""
        forking.notice()
        with self._lock:
            backends, self._backends = self._backends, {}
            self._has_left = True
            leave_strict(self)
            self._reset()
        with ExitStack() as stack:
            # Each is closed, whatever becomes of the others.
            for backend in backends.values():
                stack.callback(backend.close)

    def before_fork(self, timeout: float) -> None:
        """Wait for whoever opens a backend, and have others wait."""
        self._lock.acquire(timeout=timeout)

    def after_fork_in_parent(self) -> None:
        """Let others go on."""
        self._lock.release()

    def after_fork_in_child(self) -> None:
        """Leave the parent's connections to the parent: drop them unclosed, with locks that may be held."""
        self._lock = RLock()
        # Kept from the garbage collector, whose clean-up would speak on the parent's sockets.
        _left_behind.extend(self._backends.values())
        self._backends = {}
        self._reset()


class HasRegistry(Protocol):
    """An app, as far as producers, consumers and workers are concerned."""

    @property
    def registry(self) -> Registry:
        """What the app has declared."""
        ...


def registry_of(app_or_url: HasRegistry | str) -> tuple[Registry, bool]:
    """Return an app's registry, or a new one for a broker's URL, and whether it is the caller's own.

    Raises:
        Invalid: If it is neither.
    """
    if isinstance(app_or_url, str):
        return Registry("kq", config.resolve({"broker": app_or_url})), True
    found = getattr(app_or_url, "registry", None)
    if not isinstance(found, Registry):
        raise Invalid(f"app_or_url: expected an app or a broker's URL, got {type(app_or_url).__name__}")
    return found, False


def _current_folder() -> str:
    try:
        return os.getcwd()
    except OSError:
        # Somebody has deleted it.
        return ""


def _check_driver(driver: Driver) -> None:
    if driver.name != MAIN:
        limit.driver_name(driver.name)
    check(driver)
    with naming(driver.name):
        find_backend(driver.url)


def _driver_difference(known: Driver, other: Driver) -> str:
    """Say what two drivers of one name disagree on, but no secret."""
    field = next(f.name for f in fields(Driver) if getattr(known, f.name) != getattr(other, f.name))
    old, new = getattr(known, field), getattr(other, field)
    if field == "url":
        old, new = config.hide_password(old), config.hide_password(new)
    which = f"driver {known.name}" if known.name else "the app's own driver"
    return f"{which} is declared already, with {field}={old!r}; got {field}={new!r}"


def _check_together(first: QueueSpec, second: QueueSpec) -> None:
    """See to it that a queue and its dead letters live on one driver.

    Raises:
        Conflict: If they do not; the message names both queues.
    """
    if first.driver == second.driver:
        return
    for queue, other in ((first, second), (second, first)):
        if queue.dead_letter == other.id:
            raise Conflict(
                f"queue {other.id} holds the dead letters of {queue.id}, which lives on another driver; "
                f"expected driver={queue.driver!r} for both, got driver={other.driver!r}"
            )
    if first.dead_letter is not None and first.dead_letter == second.dead_letter:
        raise Conflict(
            f"dead_letter: {first.dead_letter} holds the dead letters of {first.id} on driver {first.driver!r}; "
            f"expected another queue for those of {second.id} on driver {second.driver!r}"
        )


def _without_own_letters(spec: QueueSpec) -> QueueSpec:
    """Return a queue of dead letters as it is: with none of its own, unless it names another place for them."""
    is_default = spec.dead_letter == spec.id + limit.DEAD_SUFFIX
    return structs.replace(spec, dead_letter=None) if is_default else spec


_left_behind: list[Backend] = []
