"""What values a configuration file may hold: each kind of value reads a node and describes itself.

A value that is wrong is noted among the problems, and reading goes on, so that a person sees all mistakes
of a file at once.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Callable, Iterable
from collections.abc import Mapping as MappingOf
from dataclasses import dataclass
from typing import Any, Final, Protocol

from kq import limit
from kq.config_file.document import Given
from kq.config_file.reader import VARIABLE, Mapping, Node, Problems, Scalar, Sequence, Text, look_up
from kq.errors import Invalid

_INTEGER: Final = re.compile(r"[-+]?[0-9]+", re.ASCII)
_NUMBER: Final = re.compile(r"[-+]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][-+]?[0-9]+)?", re.ASCII)
#: Plain words that YAML 1.1 takes for booleans and YAML 1.2 for texts: nobody can know what was meant.
_AMBIGUOUS: Final = frozenset({"yes", "no", "on", "off", "y", "n"})
#: Characters of a wrong value that an error shows.
_SHOWN: Final = 100
_ANY_TEXT: Final = {"type": "string", "minLength": 1}


@dataclass(frozen=True, slots=True)
class Reading:
    """What reading a value needs beside its node."""

    environment: MappingOf[str, str]
    problems: Problems

    def text(self, node: Node, label: str) -> Text | None:
        """Return a scalar's text with its variables looked up; None, noted, where there is no scalar."""
        if not isinstance(node, Scalar):
            self.problems.add(node.place, f"{label}: expected a single value, got {_shape(node)}")
            return None
        return look_up(node, self.environment, self.problems, label)


class Value(Protocol):
    """A kind of value."""

    @property
    def expected(self) -> str:
        """What a person is to write, e.g. ``a duration such as 30s``."""
        ...

    def read(self, node: Node, label: str, reading: Reading) -> Any:
        """Return the value of a node; None, with a problem noted, if it is none of this kind."""
        ...

    def schema(self) -> dict[str, Any]:
        """Return its JSON Schema."""
        ...


#: How YAML writes that there is no value.
_NOTHING: Final = frozenset({"~", "null", "Null", "NULL"})


@dataclass(frozen=True, slots=True)
class One:
    """A single value that a function makes of its text.

    Attributes:
        expected: See `Value.expected`.
        make: Returns the value of a text, or raises ``ValueError``, or `Invalid` with better words.
        json: Its JSON Schema.
    """

    expected: str
    make: Callable[[str], Any]
    json: MappingOf[str, Any]

    def read(self, node: Node, label: str, reading: Reading) -> Any:
        """See `Value.read`."""
        if isinstance(node, Scalar) and node.plain and node.text in _NOTHING:
            # YAML's word for no value is none of a name or a text, whatever else would read it as one.
            why = f"expected {self.expected}, got {node.text}, which is no value: leave it out, or quote it"
            reading.problems.add(node.place, f"{label}: {why}")
            return None
        known = len(reading.problems.found)
        text = reading.text(node, label)
        if text is None:
            return None
        if len(reading.problems.found) > known:
            # A variable is missing: that is said already.
            return None
        try:
            return self.make(text.value)
        except Invalid as error:
            why = error.message if not text.looked_up else f"expected {self.expected}, got {_as_written(text)}"
            reading.problems.add(node.place, f"{label}: {why}")
        except ValueError:
            reading.problems.add(node.place, f"{label}: expected {self.expected}, got {_as_written(text)}")
        return None

    def schema(self) -> dict[str, Any]:
        """See `Value.schema`; a variable may stand for every value."""
        json = dict(self.json)
        return json if json == _ANY_TEXT else {"anyOf": [json, {"type": "string", "pattern": VARIABLE.pattern}]}


def _as_written(text: Text) -> str:
    """Return what may be shown of a text, if it is long only its start."""
    shown = text.shown
    if text.looked_up:
        # What stands beside a variable, or in its place where it is not set, may be the secret.
        names = [f"${{env:{found[1]}}}" for found in VARIABLE.finditer(shown)]
        shown = names[0] if VARIABLE.fullmatch(shown) else "...".join(["", *names, ""])
    return repr(shown) if len(shown) <= _SHOWN else repr(shown[:_SHOWN]) + "..."


def _text(text: str) -> str:
    if not text:
        raise ValueError
    return text


def _boolean(text: str) -> bool:
    try:
        return {"true": True, "false": False}[text.lower()]
    except KeyError:
        raise ValueError from None


def _duration(text: str) -> float:
    seconds = limit.duration(text)
    if seconds is None:
        raise ValueError
    return seconds


#: Any text but the empty one.
TEXT: Final = One("text", _text, _ANY_TEXT)
BOOLEAN: Final = One("true or false", _boolean, {"type": "boolean"})
DURATION: Final = One(
    "a duration such as 30s, 500ms, 10m, 2h or 7d",
    _duration,
    {"type": ["number", "string"], "minimum": 0, "pattern": limit.DURATION.pattern},
)


def integer(low: int, high: int) -> One:
    """Return the kind of integers from ``low`` to ``high``."""

    def make(text: str) -> int:
        if not _INTEGER.fullmatch(text) or len(text) > 20 or not low <= int(text) <= high:
            raise ValueError
        return int(text)

    return One(
        f"an integer from {low:,} to {high:,}", make, {"type": "integer", "minimum": low, "maximum": high}
    )  # fmt: skip


def number(low: float, high: float) -> One:
    """Return the kind of numbers from ``low`` to ``high``."""

    def make(text: str) -> float:
        if not _NUMBER.fullmatch(text) or not low <= float(text) <= high:
            raise ValueError
        return float(text)

    return One(f"a number from {low:g} to {high:g}", make, {"type": "number", "minimum": low, "maximum": high})


def duration(low: float, high: float) -> One:
    """Return the kind of durations from ``low`` to ``high`` seconds."""

    def make(text: str) -> float:
        seconds = _duration(text)
        if not low <= seconds <= high:
            raise ValueError
        return seconds

    return One(f"a duration from {_shown(low)} to {_shown(high)}", make, DURATION.json)


def _shown(seconds: float) -> str:
    """Return a duration in the largest unit in which it is a whole number."""
    for unit, size in (("d", 86400), ("h", 3600), ("m", 60), ("s", 1)):
        if seconds and seconds % size == 0:
            return f"{seconds / size:g}{unit}"
    return f"{seconds * 1000:g}ms" if seconds else "0"


def choice(*words: str) -> One:
    """Return the kind of values that are one of a few words."""

    def make(text: str) -> str:
        if text not in words:
            raise Invalid(f"expected {' or '.join(words)}, got {text!r}{near(text, words)}")
        return text

    return One(" or ".join(words), make, {"enum": list(words)})


def checked(expected: str, make: Callable[[str], Any], pattern: str | None = None) -> One:
    """Return the kind of texts that a function lets pass."""
    json: dict[str, Any] = {"type": "string", "minLength": 1}
    return One(expected, make, json if pattern is None else {**json, "pattern": pattern})


@dataclass(frozen=True, slots=True)
class Anything:
    """Whatever YAML's core schema makes of a node: for what a condition compares with."""

    expected: str = "a value"

    def read(self, node: Node, label: str, reading: Reading) -> Any:
        """See `Value.read`."""
        if isinstance(node, Sequence):
            return [self.read(item, label, reading) for item in node.items]
        if isinstance(node, Mapping):
            return {name: self.read(item, f"{label}.{name}", reading) for name, (_, item) in node.items.items()}
        text = reading.text(node, label)
        if text is None or text.looked_up or not node.plain:
            return None if text is None else text.value
        return self._plain(text.value, node, label, reading)

    def _plain(self, text: str, node: Scalar, label: str, reading: Reading) -> Any:
        if text.lower() in ("", "~", "null"):
            return None
        if text.lower() in ("true", "false"):
            return text.lower() == "true"
        if text.lower() in _AMBIGUOUS:
            reading.problems.add(node.place, f"{label}: {text} may mean a text or a boolean: quote it, or write true")
        if _INTEGER.fullmatch(text):
            if len(text) > 20:
                reading.problems.add(node.place, f"{label}: expected an integer of 64 bits")
                return None
            return int(text)
        if _NUMBER.fullmatch(text) and math.isfinite(float(text)):
            return float(text)
        return text

    def schema(self) -> dict[str, Any]:
        """See `Value.schema`."""
        return {}


@dataclass(frozen=True, slots=True)
class Many:
    """A list of values of one kind; a single one may stand for a list of one.

    Attributes:
        item: The kind.
        alone: Whether a single one will do.
    """

    item: Value
    alone: bool = True

    @property
    def expected(self) -> str:
        """See `Value.expected`."""
        return f"{self.item.expected}, or a list of such" if self.alone else f"a list, each {self.item.expected}"

    def read(self, node: Node, label: str, reading: Reading) -> Any:
        """See `Value.read`."""
        if isinstance(node, Sequence):
            return [self.item.read(item, f"{label}[{i}]", reading) for i, item in enumerate(node.items)]
        if self.alone:
            found = self.item.read(node, label, reading)
            return None if found is None else [found]
        reading.problems.add(node.place, f"{label}: expected {self.expected}, got {_shape(node)}")
        return None

    def schema(self) -> dict[str, Any]:
        """See `Value.schema`."""
        many = {"type": "array", "items": self.item.schema()}
        return {"anyOf": [self.item.schema(), many]} if self.alone else many


@dataclass(frozen=True, slots=True)
class ByName:
    """A mapping of names of the writer's own to values of one kind."""

    item: Value

    @property
    def expected(self) -> str:
        """See `Value.expected`."""
        return f"a mapping of names, each to {self.item.expected}"

    def read(self, node: Node, label: str, reading: Reading) -> Any:
        """See `Value.read`."""
        if not isinstance(node, Mapping):
            reading.problems.add(node.place, f"{label}: expected {self.expected}, got {_shape(node)}")
            return None
        return {name: self.item.read(item, f"{label}.{name}", reading) for name, (_, item) in node.items.items()}

    def schema(self) -> dict[str, Any]:
        """See `Value.schema`."""
        return {"type": "object", "additionalProperties": self.item.schema()}


@dataclass(frozen=True, slots=True)
class Field:
    """A named value of a section.

    Attributes:
        name: As it is written.
        value: What it may hold.
        doc: What it means, for people; a sentence.
        default: What holds where it is left out, for people.
        required: Whether it may not be left out.
        alias: Another name that is accepted.
    """

    name: str
    value: Value
    doc: str
    default: str = "none"
    required: bool = False
    alias: str | None = None


@dataclass(frozen=True, slots=True)
class Section:
    """A mapping with known fields.

    Attributes:
        fields: What it may have.
        expected: See `Value.expected`.
    """

    fields: tuple[Field, ...]
    expected: str = "a mapping of fields"

    def read(self, node: Node, label: str, reading: Reading) -> Given | None:
        """See `Value.read`."""
        if isinstance(node, Scalar) and node.plain and node.text in ("", "~", "null"):
            node = Mapping(node.place, {})
        if not isinstance(node, Mapping):
            reading.problems.add(node.place, f"{label}: expected {self.expected}, got {_shape(node)}")
            return None
        given = Given(node.place)
        names = {name: known for known in self.fields for name in (known.name, known.alias) if name is not None}
        for name, (place, item) in node.items.items():
            known = names.get(name)
            if known is None:
                expected = ", ".join(known.name for known in self.fields)
                reading.problems.add(
                    place, f"{label}: unknown field {name!r}; expected {expected}{near(name, names)}"
                )  # fmt: skip
                continue
            if known.name in given.places:
                reading.problems.add(place, f"{label}: give either {known.name} or {known.alias}, not both")
                continue
            given.places[known.name] = place
            found = known.value.read(item, f"{label}: {name}", reading)
            if found is not None or isinstance(known.value, Anything):
                given.values[known.name] = found
            if isinstance(item, Scalar) and VARIABLE.search(item.text):
                given.written[known.name] = item.text
        for known in self.fields:
            if known.required and known.name not in given.places:
                reading.problems.add(node.place, f"{label}: {known.name} is missing; expected {known.value.expected}")
        return given

    def schema(self) -> dict[str, Any]:
        """See `Value.schema`."""
        properties = {}
        for known in self.fields:
            described = {"description": f"{known.doc} Default: {known.default}.", **known.value.schema()}
            for name in (known.name, known.alias):
                if name is not None:
                    properties[name] = described
        required = [known.name for known in self.fields if known.required and known.alias is None]
        # A section that requires nothing may be left empty.
        kind: Any = "object" if required else ["object", "null"]
        schema: dict[str, Any] = {"type": kind, "properties": properties, "additionalProperties": False}
        return {**schema, "required": required} if required else schema


def near(name: str | None, known: Iterable[str]) -> str:
    """Return a question after the nearest known name, or nothing."""
    found = difflib.get_close_matches(name or "", list(known), 1)
    return f" (did you mean {found[0]}?)" if found else ""


def _shape(node: Node) -> str:
    return {Scalar: "a single value", Sequence: "a list", Mapping: "a mapping"}[type(node)]
