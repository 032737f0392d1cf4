"""What one place says of a thing, where that place is, and what two of them say made one.

Each field is taken from where it is said. Where two places say it they must say the same: which of them won
would be anybody's guess.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import msgspec

from kq.config_file import Place
from kq.errors import Conflict, Invalid
from kq.handler import HERE


class Said(msgspec.Struct, frozen=True):
    """What one place says of a queue or consumer.

    Attributes:
        place: The place, for people: ``shop.py:12`` or ``kq.yaml:9``.
        values: Its fields by name; what is not said is not there.
        places: Where single fields are said, if not at ``place``.
    """

    place: str
    values: Mapping[str, Any]
    places: Mapping[str, str] = msgspec.field(default_factory=dict)

    def place_of(self, name: str) -> str:
        """Return where a field is said."""
        return self.places.get(name, self.place)


class Caller(msgspec.Struct, frozen=True):
    """Who called kq.

    Attributes:
        module: The name of the module.
        place: File and line, for people.
    """

    module: str | None
    place: str


class Mistakes:
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


def caller() -> Caller:
    """Return the nearest caller that is not kq itself."""
    frame = sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(HERE):
        frame = frame.f_back
    if frame.f_code.co_filename.startswith(HERE):
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


def _short(path: str) -> str:
    relative = os.path.relpath(path)
    return path if relative.startswith("..") else relative
