"""What files and Python declare on an app, made one."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import astuple, replace
from pathlib import Path
from typing import Any

from kq.backend import QueueSpec
from kq.config_file import Document, Entry
from kq.driver import MAIN, Tls, naming
from kq.entry import CONSUMER_OPTIONS, consumer_of, driver_of, plain, queue_of
from kq.handler import find_handler
from kq.queue_spec import queue_spec
from kq.registry import Registry
from kq.router import Consumer
from kq.said import Mistakes, Said, caller, merge


def _contents(tls: Tls) -> list[str]:
    """Return what stands in the files that TLS is made of; of those that cannot be read nothing."""
    found = []
    for text in (tls.ca, tls.certificate, tls.key):
        if text is not None and "-----BEGIN" not in text:
            with suppress(OSError):
                found.append(hashlib.sha256(Path(text).read_bytes()).hexdigest())
    return found


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
        origins = registry.settings.origins
        # What the program or the environment says of all connections wins over what a file says of one.
        own_heartbeat = origins.get("heartbeat") in (None, str(document.settings.places.get("heartbeat")))
        in_file = origins.get("broker")
        mistakes = Mistakes()
        for id, entry in document.drivers.items():
            with mistakes.at(entry.place, f"driver {id}"):
                is_main = id == document.main
                if is_main and in_file != str(entry.given.places["url"]):
                    # Somebody has named another broker, to which nothing else in this entry applies.
                    continue
                described = driver_of(entry, MAIN if is_main else id)
                registry.add_driver(described if own_heartbeat else replace(described, heartbeat=None))
        for id, entry in document.queues.items():
            with mistakes.at(entry.place, f"queue {id}"):
                said = self._queues[id] = queue_of(entry, document)
                registry.declare(queue_spec(id, **said.values))
        for entry in self._pending:
            with mistakes.at(entry.place, f"consumer {entry.id}"):
                consumer_of(entry)
                registry.imply(entry.given.values["queue"])
        mistakes.check()

    def queue(self, queue_id: str, values: Mapping[str, Any]) -> QueueSpec:
        """Declare a queue in Python, and return it with what a file says of it.

        Args:
            queue_id: The queue.
            values: Arguments of `kq.queue_spec.queue_spec` that were given.

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
        mistakes = Mistakes()
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
        mistakes = Mistakes()
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
            plain(value)
            for value in (
                document.worker,
                document.security,
                document.signing,
                *document.policies.values(),
            )
        ]
        # Read once by whoever connects: a certificate that has been renewed takes a new supervisor.
        read = [_contents(driver.tls) for driver in registry.drivers.values() if driver.tls is not None]
        whole = repr([astuple(registry.settings)[:-1], specs, drivers, consumers, said, sorted(map(repr, read))])
        return hashlib.sha256(whole.encode()).hexdigest()

    def _add(self, entry: Entry, handler: Any) -> None:
        router = self._registry.router
        said = consumer_of(entry)
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
