"""What a set of configuration files says, as values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import msgspec


class Place(msgspec.Struct, frozen=True):
    """Where something stands.

    Attributes:
        path: The file, as it was named.
        line: From 1.
    """

    path: str
    line: int

    def __str__(self) -> str:
        return f"{self.path}:{self.line}"


@dataclass(frozen=True, slots=True)
class Given:
    """The fields of a section that a file gives.

    Attributes:
        place: Where the section stands.
        values: By field name; what is left out is not there. Never shown: there are passwords and keys in it.
        places: Where each stands.
        written: As written, what variables stand in, by field name: what these held is not to be shown.
    """

    place: Place
    values: dict[str, Any] = field(default_factory=dict, repr=False)
    places: dict[str, Place] = field(default_factory=dict)
    written: dict[str, str] = field(default_factory=dict)

    def get(self, name: str, default: Any = None) -> Any:
        """Return a field's value, or ``default`` if it is not given."""
        return self.values.get(name, default)


class Entry(msgspec.Struct, frozen=True):
    """A driver, queue, consumer or policy.

    Attributes:
        kind: Which of them.
        id: Its whole name.
        given: Its fields.
        folder: The folder of its file, from which paths in it count.
        source: Where bare method names of its file are found, or None.
    """

    kind: str
    id: str
    given: Given
    folder: str
    source: str | None

    @property
    def place(self) -> Place:
        """Where it stands."""
        return self.given.place

    def __str__(self) -> str:
        return f"{self.place} ({self.id})"


class Document(msgspec.Struct, frozen=True):
    """What a file and those it includes say.

    Attributes:
        paths: The files, the first one first.
        namespace: The first file's.
        drivers: By id.
        main: The id of the driver that is the app's own, or None.
        queues: By queue id; a queue's ``driver`` is a driver's id.
        consumers: By id; a consumer's ``queue`` is a queue id.
        policies: By id.
        settings: What the app runs with.
        worker: What ``kq worker`` runs with.
        security: Actor, groups, strict mode.
        signing: Keys.
        variables: The variables of the environment that the files name.
        risks: Which of the files others may change.
    """

    paths: tuple[str, ...]
    namespace: str | None
    drivers: Mapping[str, Entry]
    main: str | None
    queues: Mapping[str, Entry]
    consumers: Mapping[str, Entry]
    policies: Mapping[str, Entry]
    settings: Given
    worker: Given
    security: Given
    signing: Given
    variables: frozenset[str] = frozenset()
    risks: tuple[str, ...] = ()


def empty() -> Document:
    """Return what no file at all says."""
    nowhere = Given(Place("", 0))
    return Document((), None, {}, None, {}, {}, {}, nowhere, nowhere, nowhere, nowhere)


class Draft(msgspec.Struct):
    """A document in the making."""

    paths: list[str] = msgspec.field(default_factory=list)
    entries: dict[str, dict[str, Entry]] = msgspec.field(default_factory=dict)
    sections: dict[str, Given] = msgspec.field(default_factory=dict)
