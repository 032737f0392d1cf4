"""What files say, as kq's own values, and what files and Python say of one thing made one.

Each field of a queue or consumer is taken from where it is said. Where both say it they must say the same:
which of two places won would be anybody's guess.
"""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import astuple, dataclass, field
from typing import Any, Final

from kq.backend import QueueSpec
from kq.config_file import Document, Entry, Given, Place, policy
from kq.driver import MAIN, Driver, Tls, naming
from kq.errors import Conflict, Invalid
from kq.handler import find_handler
from kq.registry import Registry, queue_spec
from kq.retry import Backoff
from kq.router import Consumer
from kq.security import Policy
from kq.signing import Signing

_HERE: Final = os.path.dirname(os.path.abspath(__file__)) + os.sep


@dataclass(frozen=True, slots=True)
class Said:
    """What one place says of a queue or consumer.

    Attributes:
        place: The place, for people: ``shop.py:12`` or ``kq.yaml:9``.
        values: Its fields by name; what is not said is not there.
        places: Where single fields are said, if not at ``place``.
    """

    place: str
    values: Mapping[str, Any]
    places: Mapping[str, str] = field(default_factory=dict)

    def place_of(self, name: str) -> str:
        """Return where a field is said."""
        return self.places.get(name, self.place)


@dataclass(frozen=True, slots=True)
class Caller:
    """Who called kq.

    Attributes:
        module: The name of the module.
        place: File and line, for people.
    """

    module: str | None
    place: str


class Declarations:
    """What files and Python have said of an app's drivers, queues and consumers. Not thread-safe.

    Args:
        document: What the configuration files say.
        registry: Where the result goes.
        module: See the attribute.

    Attributes:
        module: The module that made the app, in which bare method names are looked up; None for none.

    Raises:
        Invalid: If an entry says what cannot be; the message names its place.
    """

    def __init__(self, document: Document, registry: Registry, module: str | None) -> None:
        self._registry = registry
        self._document = document
        self.module = module
        self._queues: dict[str, Said] = {}
        self._in_python: dict[str, Said] = {}
        self._pending = list(document.consumers.values())
        #: Those that an entry describes: two entries are two consumers, whatever function they name.
        self._of_entries: list[Consumer] = []
        #: What was said of each consumer of an entry, by queue and name.
        self._consumers: dict[tuple[str, str], tuple[Said, ...]] = {}
        in_file = registry.settings.origins.get("broker")
        mistakes = _Mistakes()
        for id, entry in document.drivers.items():
            with mistakes.at(entry.place, f"driver {id}"):
                if id != document.main:
                    registry.add_driver(driver(entry, id))
                elif in_file == str(entry.given.places["url"]):
                    # Somebody may have named another broker, to which nothing else in this entry applies.
                    registry.add_driver(driver(entry, MAIN))
        for id, entry in document.queues.items():
            with mistakes.at(entry.place, f"queue {id}"):
                said = self._queues[id] = queue(entry, document)
                registry.declare(queue_spec(id, **said.values))
        for entry in self._pending:
            with mistakes.at(entry.place, f"consumer {entry.id}"):
                consumer(entry)
                registry.imply(entry.given.values["queue"])
        mistakes.check()

    def queue(self, queue_id: str, values: Mapping[str, Any]) -> QueueSpec:
        """Declare a queue in Python, and return it with what a file says of it.

        Args:
            queue_id: The queue.
            values: Arguments of `kq.registry.queue_spec` that were given.

        Raises:
            Invalid: If a value is not what it must be.
            Conflict: If it was declared with other values.
        """
        spec = queue_spec(queue_id, **values)
        in_file = self._queues.get(queue_id)
        in_python = Said(caller().place, values)
        if in_file is None:
            declared = self._registry.declare(spec)
        else:
            merged = queue_spec(queue_id, **merge(f"queue {queue_id}", in_file, in_python))
            declared = self._registry.declare(merged, instead_of=queue_spec(queue_id, **in_file.values))
        self._in_python.setdefault(queue_id, in_python)
        return declared

    def origin(self, queue_id: str, name: str) -> str:
        """Return where a field of a queue was said; ``default`` where nobody said it."""
        for said in (self._queues.get(queue_id), self._in_python.get(queue_id)):
            if said is not None and name in said.values:
                return said.place_of(name)
        return "default"

    def check_drivers(self) -> None:
        """See to it that every driver can be used, short of connecting.

        Raises:
            Invalid: If a URL is ill-formed, or a file that it takes cannot be read; with the place.
        """
        mistakes = _Mistakes()
        for name in self._registry.drivers:
            with mistakes.at(self.driver_origin(name), ""), naming(name):
                self._registry.backend(name)
        mistakes.check()

    def driver_origin(self, name: str, field: str = "url") -> str:
        """Return where a field of a driver was said; ``default`` where nobody said it."""
        drivers, main = self._document.drivers, self._document.main
        entry = drivers.get(name if name != MAIN else main or "")
        if name == MAIN:
            origin = self._registry.settings.origins.get("broker", "default")
            if field == "url" or entry is None or origin != str(entry.given.places["url"]):
                return origin if field == "url" else "default"
        if entry is None:
            return "argument"
        places = entry.given.places
        if field.startswith("reconnect_") and "reconnect" in places:
            field = field.removeprefix("reconnect_")
            places = entry.given.values["reconnect"].places
        return str(places[field]) if field in places else "default"

    def consumer_origin(self, consumer: Consumer, name: str) -> str:
        """Return where a field of a consumer was said; ``default`` where nobody said it."""
        for said in self._consumers.get((consumer.queue, consumer.name), ()):
            if name in said.values:
                return said.place_of(name)
        in_python = (consumer.queue, consumer.name) not in self._consumers and bool(getattr(consumer, name))
        return consumer.place if in_python else "default"

    def load_handlers(self) -> None:
        """Import the handlers that files name, and register their consumers. Idempotent.

        Raises:
            Invalid: If one cannot be found, with its place.
            Conflict: If a consumer is declared otherwise in Python; the message names both places.
        """
        mistakes = _Mistakes()
        for entry in list(self._pending):
            with mistakes.at(entry.given.places["method"], f"consumer {entry.id}"):
                method = entry.given.values["method"]
                handler = find_handler(method, folder=entry.folder, source=entry.source, module=self.module)
                self._add(entry, handler)
                self._pending.remove(entry)
        mistakes.check()

    def fingerprint(self) -> str:
        """Return a text that is another one whenever a worker's supervisor would have to work otherwise."""
        registry, document = self._registry, self._document
        consumers = [
            [getattr(consumer, name) for name in ("queue", "name", *CONSUMER_OPTIONS)] for consumer in registry.router
        ]
        specs = sorted(registry.queues(), key=lambda spec: spec.id)
        drivers = sorted((astuple(driver) for driver in registry.drivers.values()), key=lambda values: str(values[1]))
        said = [
            _plain(value)
            for value in (
                document.worker,
                document.security,
                document.signing,
                *document.policies.values(),
            )
        ]
        whole = repr([astuple(registry.settings)[:-1], specs, drivers, consumers, said])
        return hashlib.sha256(whole.encode()).hexdigest()

    def _add(self, entry: Entry, handler: Any) -> None:
        router = self._registry.router
        said = consumer(entry)
        queue_id = entry.given.values["queue"]
        twin = next(
            (other for other in router.of(queue_id) if other.handler is handler and other not in self._of_entries), None
        )
        if twin is None:
            made = Consumer(queue=queue_id, name=entry.id, handler=handler, place=said.place, **said.values)
            router.add(made)
            self._of_entries.append(made)
            self._consumers[queue_id, entry.id] = (said,)
            return
        given: dict[str, Any] = {name: value for name in CONSUMER_OPTIONS if (value := getattr(twin, name))}
        in_python = Said(twin.place, given)
        values = merge(f"consumer {entry.id} of queue {queue_id}", said, in_python)
        made = Consumer(queue=queue_id, name=entry.id, handler=handler, place=said.place, **values)
        router.replace(twin, made)
        self._of_entries.append(made)
        self._consumers[queue_id, entry.id] = (said, in_python)


class _Mistakes:
    """What is wrong with the entries of a file; all of it is told at once, each with its place."""

    def __init__(self) -> None:
        self._found: list[Invalid | Conflict] = []

    @contextmanager
    def at(self, place: Place | str, what: str) -> Iterator[None]:
        """Note what is wrong with one entry, and go on."""
        try:
            yield
        except (Invalid, Conflict) as error:
            # Some say themselves which thing of the two they are about.
            name = "" if error.message.startswith(what) else f"{what}: "
            found = type(error)(f"{place}: {name}{error.message}")
            found.__cause__ = error
            self._found.append(found)

    def check(self) -> None:
        """Raise all that was noted, as what the first one is."""
        if self._found:
            first = self._found[0]
            raise type(first)("\n".join(error.message for error in self._found)) from first


#: What both a file and Python may say of a consumer.
CONSUMER_OPTIONS: Final = ("concurrency", "prefetch", "timeout", "auto_ack", "max_attempts", "backoff")


def caller() -> Caller:
    """Return the nearest caller that is not kq itself."""
    frame = sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_HERE):
        frame = frame.f_back
    if frame.f_code.co_filename.startswith(_HERE):
        return Caller(None, "kq")
    name = frame.f_globals.get("__name__")
    return Caller(name if isinstance(name, str) else None, f"{_short(frame.f_code.co_filename)}:{frame.f_lineno}")


def merge(what: str, first: Said, second: Said) -> dict[str, Any]:
    """Return the fields of a thing that two places speak of.

    Args:
        what: The thing, for people, e.g. ``queue app:emails``.
        first: What one place says.
        second: What the other one says.

    Raises:
        Conflict: If both say something else of one field; the message names both places.
    """
    for name in first.values.keys() & second.values.keys():
        one, other = first.values[name], second.values[name]
        if one != other:
            raise Conflict(
                f"{what}: {name}={one!r} at {first.place_of(name)}, but {name}={other!r} at {second.place_of(name)}; "
                "say it in one of the two places, or alike in both"
            )
    return {**first.values, **second.values}


def queue(entry: Entry, document: Document) -> Said:
    """Return what an entry says of a queue, as arguments of `kq.registry.queue_spec`."""
    values: dict[str, Any] = {}
    places: dict[str, str] = {}

    def take(given: Given, **names: str) -> None:
        for name, argument in names.items():
            if name in given.values:
                values[argument], places[argument] = given.values[name], str(given.places[name])

    given = entry.given
    take(given, codec="codec", max_length="max_length", max_priority="max_priority", options="options", retry="retry",
         require_signature="require_signature", driver="driver")  # fmt: skip
    if "dead_letter" in given.values:
        take(given.values["dead_letter"], queue="dead_letter", max_attempts="max_attempts", max_crashes="max_crashes")
    if "retry" in values:
        values["retry"] = backoff(values["retry"])
    if values.get("driver") is not None and values["driver"] == document.main:
        values["driver"] = MAIN
    return Said(str(entry.place), values, places)


def declared_policies(document: Document) -> list[Policy]:
    """Return the policies that the files declare."""
    return [policy(entry.id, entry.given) for entry in document.policies.values()]


def declared_signing(document: Document) -> Signing | None:
    """Return the keys and rules of the files' section ``signing``, if there is one.

    Raises:
        Invalid: If a key is too short; the message names the place.
    """
    given = document.signing
    if not given.values:
        return None
    try:
        return Signing(**given.values)
    except Invalid as error:
        raise Invalid(f"{given.place}: {error.message}") from None


def consumer(entry: Entry) -> Said:
    """Return what an entry says of a consumer, as fields of `kq.router.Consumer`."""
    values: dict[str, Any] = {name: entry.given.values[name] for name in CONSUMER_OPTIONS if name in entry.given.values}
    if "retry" in entry.given.values:
        values["backoff"] = backoff(entry.given.values["retry"])
    places = {name: str(place) for name, place in entry.given.places.items()}
    if "retry" in places:
        places["backoff"] = places["retry"]
    return Said(str(entry.place), values, places)


def backoff(given: Given) -> Backoff:
    """Return a backoff of the fields that a file gives."""
    return Backoff(**given.values)


def driver(entry: Entry, name: str) -> Driver:
    """Return the driver that an entry describes, under a name."""
    values: dict[str, Any] = {}
    for field_name, value in entry.given.values.items():
        if field_name == "reconnect":
            values.update(reconnect_initial=value.get("initial", 0.1), reconnect_max=value.get("max", 2.0))
        elif field_name == "tls":
            values["tls"] = _tls(value, entry.folder)
        elif field_name not in ("kind", "name", "id"):
            values[field_name] = value
    return Driver(name=name, **values)


def _tls(given: Given, folder: str) -> Tls:
    values: dict[str, Any] = dict(given.values)
    for name in ("ca", "certificate", "key"):
        if name in values:
            values[name] = _beside(values[name], folder)
    return Tls(**values)


def _plain(value: Any) -> Any:
    """Return what a file gives without its places, for comparison."""
    if isinstance(value, Entry):
        return [value.kind, value.id, _plain(value.given)]
    if isinstance(value, Given):
        return sorted((name, _plain(item)) for name, item in value.values.items())
    return [_plain(item) for item in value] if isinstance(value, list) else repr(value)


def _beside(value: str, folder: str) -> str:
    """Return PEM text as it is, and a path as one from the folder of the file that names it."""
    return value if "-----BEGIN" in value else os.path.join(folder, value)


def _short(path: str) -> str:
    relative = os.path.relpath(path)
    return path if relative.startswith("..") else relative
