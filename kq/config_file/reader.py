"""The text of a configuration file as a tree of nodes that know their place.

PyYAML's parser under rules of our own: no aliases, anchors, merge keys or tags, no duplicate keys, at most
32 levels and 1 MiB. Each of these lets a small file become a large one, or say two things at once. What a
plain word means is YAML 1.2's core schema: ``true`` and ``false`` are booleans, and ``no``, ``on`` or
``12:30`` are texts and stay so.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Mapping as MappingOf
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Final, NoReturn

from kq.config_file.document import Place
from kq.errors import Invalid

#: Bytes of a file.
MAX_SIZE: Final = 2**20
#: Levels of lists and mappings.
MAX_DEPTH: Final = 32

#: Mistakes that are told.
_SHOWN: Final = 100

#: What stands for a variable of the environment in a text.
VARIABLE: Final = re.compile(r"\$\{env:([A-Za-z_][A-Za-z0-9_]*)(?::-([^}]*))?\}")

#: What looks like the beginning of that; where it is none, nothing else stands for itself either.
_MEANT: Final = re.compile(r"\$\{\s*env\b", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Scalar:
    """A single value.

    Attributes:
        place: Where it stands.
        text: As written.
        plain: Whether it stands without quotes.
    """

    place: Place
    text: str
    plain: bool


@dataclass(frozen=True, slots=True)
class Sequence:
    """A list of nodes."""

    place: Place
    items: tuple[Node, ...]


@dataclass(frozen=True, slots=True)
class Mapping:
    """Nodes by name, each with the place of its name."""

    place: Place
    items: dict[str, tuple[Place, Node]]


Node = Scalar | Sequence | Mapping


@dataclass
class Problems:
    """What is wrong in a set of files; all of it is told at once.

    Attributes:
        found: The mistakes, each with its place.
        variables: The variables of the environment that the files name.
        risks: Who else may change what is read.
    """

    found: dict[str, None] = field(default_factory=dict)
    variables: set[str] = field(default_factory=set)
    risks: list[str] = field(default_factory=list)

    def add(self, place: Place | str, what: str) -> None:
        """Note a mistake and its place."""
        self.found.setdefault(f"{place}: {what}")

    def check(self) -> None:
        """Raise `Invalid` with every mistake, a line each, if there is one."""
        if self.found:
            more = len(self.found) - _SHOWN
            raise Invalid("\n".join([*islice(self.found, _SHOWN), *([f"and {more} more"] if more > 0 else [])]))


@dataclass(frozen=True, slots=True)
class Text:
    """A scalar with its variables looked up.

    Attributes:
        value: The text.
        shown: What may be shown of it: as written, for a variable may hold a secret.
        looked_up: Whether a variable stood in it.
    """

    value: str
    shown: str
    looked_up: bool


def read(path: str, problems: Problems) -> Node | None:
    """Return the tree of a file; None, noted, for an empty one.

    Raises:
        Invalid: If it cannot be read, is no YAML, or holds what is refused.
    """
    import yaml

    text = _contents(path, problems)
    depth = 0
    try:
        for event in yaml.parse(text, Loader=yaml.SafeLoader):
            if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None):
                _refuse(path, event, "anchors and aliases are not allowed; write the value out")
            tag = getattr(event, "tag", None)
            if tag:
                _refuse(path, event, f"tags are not allowed, got {tag!r}")
            if isinstance(event, yaml.CollectionStartEvent):
                depth += 1
                if depth > MAX_DEPTH:
                    _refuse(path, event, f"nested deeper than {MAX_DEPTH} levels")
            elif isinstance(event, yaml.CollectionEndEvent):
                depth -= 1
        root: Any = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        line = f":{error.problem_mark.line + 1}" if error.problem_mark else ""
        raise Invalid(f"{path}{line}: not YAML: {error.problem or error}") from None
    except yaml.YAMLError as error:
        raise Invalid(f"{path}: not YAML: {error}") from None
    if root is None:
        # By /dev/null people say that there is no file.
        if os.path.isfile(path):
            problems.add(path, "is empty; expected fields such as entries or settings")
        return None
    return _node(path, root, problems, is_root=True)


def look_up(scalar: Scalar, environment: MappingOf[str, str], problems: Problems, label: str) -> Text:
    """Return a scalar's text with each ``${env:NAME}`` and ``${env:NAME:-default}`` replaced."""

    def value_of(found: re.Match[str]) -> str:
        problems.variables.add(found[1])
        value = environment.get(found[1], found[2])
        if value is None:
            hint = f"set it, or write ${{env:{found[1]}:-default}}"
            problems.add(scalar.place, f"{label}: the environment has no {found[1]}; {hint}")
            return ""
        return value

    rest = VARIABLE.sub(lambda found: found[2] or "", scalar.text)
    if _MEANT.search(rest):
        # Taken as it stands it might be a key that everybody knows. Not shown: a default may be a secret.
        expected = (
            "expected ${env:NAME} or ${env:NAME:-default}, without blanks before NAME, and without variables in default"
        )
        problems.add(scalar.place, f"{label}: ill-formed variable; {expected}")
    value = VARIABLE.sub(value_of, scalar.text)
    return Text(value, scalar.text, VARIABLE.search(scalar.text) is not None)


def _contents(path: str, problems: Problems) -> str:
    try:
        # Before it is opened, for which a pipe may have us wait.
        if stat.S_ISFIFO(os.stat(path).st_mode):
            raise Invalid(f"{path}: is a pipe; expected a file, which children and reloads read once more")
        with Path(path).open("rb") as file:
            status = os.fstat(file.fileno())
            data = file.read(MAX_SIZE + 1)
    except OSError as error:
        raise Invalid(f"{path}: cannot be read: {os.strerror(error.errno) if error.errno else error}") from None
    if len(data) > MAX_SIZE:
        raise Invalid(f"{path}: larger than {MAX_SIZE:,} bytes")
    if (risk := _risk(status)) is not None:
        problems.risks.append(f"{path}: {risk}")
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise Invalid(f"{path}: not UTF-8 at byte {error.start}") from None


def _risk(status: os.stat_result) -> str | None:
    """Return who else may change a file, which names the code that is run; None where nobody may."""
    # Windows has other rules, and what is no file has other contents.
    if not hasattr(os, "geteuid") or not stat.S_ISREG(status.st_mode):
        return None
    if status.st_mode & stat.S_IWOTH:
        return "everybody may write to it, and it says what code is run; take that away with chmod o-w"
    if status.st_uid not in (0, os.geteuid()):
        return f"it belongs to another user ({status.st_uid}), and says what code is run; have it with chown"
    return None


def _refuse(path: str, event: Any, what: str) -> NoReturn:
    raise Invalid(f"{path}:{event.start_mark.line + 1}: {what}")


def _node(path: str, node: Any, problems: Problems, label: str = "", *, is_root: bool = False) -> Node:
    """Return a node of a tree.

    Args:
        path: The file.
        node: As YAML's own tree has it.
        problems: Where to note what is wrong.
        label: What problems begin with: the entry that it is in.
        is_root: Whether it is the whole file.
    """
    import yaml

    place = Place(path, node.start_mark.line + 1)
    if isinstance(node, yaml.SequenceNode):
        return Sequence(place, tuple(_node(path, item, problems, label) for item in node.value))
    if not isinstance(node, yaml.MappingNode):
        return Scalar(place, node.value, node.style is None)
    items: dict[str, tuple[Place, Node]] = {}
    for key, value in node.value:
        key_place = Place(path, key.start_mark.line + 1)
        if not isinstance(key, yaml.ScalarNode):
            problems.add(key_place, f"{label}expected a name as key, got a list or mapping")
        elif key.value == "<<" and key.style is None:
            problems.add(key_place, f"{label}merge keys are not allowed; write the fields out")
        elif key.value in items:
            problems.add(key_place, f"{label}{key.value!r} is given twice, first in line {items[key.value][0].line}")
        elif is_root and key.value == "entries" and isinstance(value, yaml.SequenceNode):
            place_of_all = Place(path, value.start_mark.line + 1)
            entries = [_node(path, item, problems, f"entry {n}: ") for n, item in enumerate(value.value, 1)]
            items[key.value] = (key_place, Sequence(place_of_all, tuple(entries)))
        else:
            items[key.value] = (key_place, _node(path, value, problems, label))
    return Mapping(place, items)
