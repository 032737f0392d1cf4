"""What configuration files say, as kq's own values."""

from __future__ import annotations

import os
from typing import Any, Final

from kq.config_file import Document, Entry, Given
from kq.driver import MAIN, Driver, Tls
from kq.errors import Invalid
from kq.retry import Backoff
from kq.said import Said
from kq.security import Policy
from kq.signing import Signing

#: What both a file and Python may say of a consumer.
CONSUMER_OPTIONS: Final = ("concurrency", "prefetch", "timeout", "auto_ack", "max_attempts", "backoff")


def queue_of(entry: Entry, document: Document) -> Said:
    """Return what an entry says of a queue, as arguments of `kq.queue_spec.queue_spec`."""
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
        values["retry"] = _backoff(values["retry"])
    if values.get("driver") is not None and values["driver"] == document.main:
        values["driver"] = MAIN
    return Said(str(entry.place), values, places)


def policies_of(document: Document) -> list[Policy]:
    """Return the policies that the files declare."""
    if not document.policies:
        return []
    from kq.config_file.policy import policy

    return [policy(entry.id, entry.given) for entry in document.policies.values()]


def signing_of(document: Document) -> Signing | None:
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


def consumer_of(entry: Entry) -> Said:
    """Return what an entry says of a consumer, as fields of `kq.router.Consumer`."""
    values: dict[str, Any] = {name: entry.given.values[name] for name in CONSUMER_OPTIONS if name in entry.given.values}
    if "retry" in entry.given.values:
        values["backoff"] = _backoff(entry.given.values["retry"])
    places = {name: str(place) for name, place in entry.given.places.items()}
    if "retry" in places:
        places["backoff"] = places["retry"]
    return Said(str(entry.place), values, places)


def _backoff(given: Given) -> Backoff:
    """Return a backoff of the fields that a file gives."""
    return Backoff(**given.values)


def driver_of(entry: Entry, name: str) -> Driver:
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


def plain(value: Any) -> Any:
    """Return what a file gives without its places, for comparison."""
    if isinstance(value, Entry):
        return [value.kind, value.id, plain(value.given)]
    if isinstance(value, Given):
        return sorted((name, plain(item)) for name, item in value.values.items())
    return [plain(item) for item in value] if isinstance(value, list) else repr(value)


def _beside(value: str, folder: str) -> str:
    """Return PEM text as it is, and a path as one from the folder of the file that names it."""
    return value if "-----BEGIN" in value else os.path.join(folder, value)
