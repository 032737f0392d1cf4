"""The fields of a request that conditions read: ``actor.meta.role``, ``resource``, ``meta.priority``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import msgspec

from kq.errors import Invalid
from kq.security.actor import Actor
from kq.security.near_miss import did_you_mean
from kq.security.value import MISSING

#: What a condition can read; ``*`` stands for a key, or for keys joined by dots.
FIELDS: Final = ("actor.id", "actor.meta.*", "action", "resource", "meta.*")
#: Characters of a field's name.
MAX_NAME: Final = 256


class Request(msgspec.Struct, frozen=True):
    """What is asked: may ``actor`` do ``action`` to ``resource``?

    Attributes:
        actor: Who asks.
        action: e.g. ``queue.publish.queue``.
        resource: e.g. a queue id; may be empty.
        meta: The message's headers, or other facts about the request.
    """

    actor: Actor
    action: str
    resource: str
    meta: Mapping[str, Any]


class Field(msgspec.Struct, frozen=True):
    """One field; ``Field.parse`` makes it from its name.

    Attributes:
        source: ``actor.id``, ``actor.meta``, ``action``, ``resource`` or ``meta``.
        rest: The key within ``actor.meta`` or ``meta``; empty stands for the whole mapping.
    """

    source: str
    rest: str = ""

    @classmethod
    def parse(cls, name: Any, what: str = "field") -> Field:
        """Return the field of that name.

        Args:
            name: e.g. ``actor.meta.role``.
            what: What the name is of, for the error.

        Raises:
            Invalid: If there is no such field.
        """
        if isinstance(name, str) and len(name) <= MAX_NAME:
            if name in ("actor.id", "action", "resource"):
                return cls(name)
            for source in ("actor.meta", "meta"):
                rest = name.removeprefix(f"{source}.")
                if rest != name and all(rest.split(".")):
                    return cls(source, rest)
        shown = ascii(name[:MAX_NAME]) if isinstance(name, str) else f"a value of type {type(name).__name__}"
        raise Invalid(f"{what}: expected one of {', '.join(FIELDS)}; got {shown}{did_you_mean(name, FIELDS)}")

    def read(self, request: Request) -> Any:
        """Return the field's value, or ``MISSING``.

        In a mapping, a key that is the whole rest of the name comes first (headers may have dots),
        then the name is a path into nested mappings.
        """
        if self.source == "meta":
            return _lookup(request.meta, self.rest)
        if self.source == "actor.meta":
            return _lookup(request.actor.meta, self.rest)
        if self.source == "actor.id":
            return request.actor.id
        return request.action if self.source == "action" else request.resource

    @property
    def roots(self) -> tuple[str, ...]:
        """The keys of the mapping that the value depends on."""
        return (self.rest, self.rest.partition(".")[0]) if "." in self.rest else (self.rest,)

    def __str__(self) -> str:
        return f"{self.source}.{self.rest}" if self.rest else self.source


def _lookup(mapping: Mapping[str, Any], rest: str) -> Any:
    if rest in mapping:
        return mapping[rest]
    if "." not in rest:
        return MISSING
    found: Any = mapping
    for key in rest.split("."):
        if not isinstance(found, Mapping) or key not in found:
            return MISSING
        found = found[key]
    return found
