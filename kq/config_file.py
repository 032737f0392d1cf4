"""``kq.yaml``: which broker to use, in a file.

::

    version: "1.0"
    namespace: shop
    entries:
      - name: broker
        kind: queue.driver.redis          # .amqp .redis .sqlite .memory
        url: ${env:REDIS_URL:-redis://localhost}

Read with PyYAML's safe loader and less: no aliases, anchors, merge keys or tags, no duplicate keys, at
most 32 levels and 1 MiB. Each of these lets a small file become a large one, or say two things at once.
A wrong file is refused as a whole, with everything that is wrong in it.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, NoReturn

from kq.errors import Invalid

#: What is read where nobody names a file.
DEFAULT: Final = "kq.yaml"
#: Bytes of a file.
MAX_SIZE: Final = 2**20
#: Levels of lists and mappings.
MAX_DEPTH: Final = 32

_VERSIONS: Final = ("1.0",)
_TOP: Final = ("version", "namespace", "entries")
_DRIVER: Final = "queue.driver."
#: Kinds of drivers, and the schemes that each one's URL may have.
_DRIVERS: Final[Mapping[str, tuple[str, ...]]] = {
    "queue.driver.amqp": ("amqp", "amqps"),
    "queue.driver.redis": ("redis", "rediss"),
    "queue.driver.sqlite": ("sqlite",),
    "queue.driver.memory": ("memory",),
}
_DRIVER_FIELDS: Final = ("name", "id", "kind", "url")
#: The driver that is the app's own where a file has several.
_MAIN: Final = "broker"
_VARIABLE: Final = re.compile(r"\$\{env:([A-Za-z_][A-Za-z0-9_]*)(?::-([^}]*))?\}")


def broker(path: str | None, environment: Mapping[str, str] | None = None) -> str | None:
    """Return the broker's URL that a file names, or None where there is no file or no driver in it.

    Args:
        path: The file; None takes ``KQ_CONFIG``, else ``kq.yaml`` here if there is one.
        environment: Where ``${env:NAME}`` is looked up.

    Raises:
        Invalid: If the file cannot be read or is wrong; each line of the text is one mistake, with its place.
    """
    environment = os.environ if environment is None else environment
    path = path or environment.get("KQ_CONFIG") or None
    if path is None:
        if not os.path.isfile(DEFAULT):
            return None
        path = DEFAULT
    return _File(path, environment).broker()


class _File:
    """One file, and what is wrong with it."""

    def __init__(self, path: str, environment: Mapping[str, str]) -> None:
        self._path = path
        self._environment = environment
        self._problems: list[str] = []

    def broker(self) -> str | None:
        top = self._mapping(self._compose(self._read()), "the file")
        self._only(top, _TOP, "the file")
        version = self._text(top.get("version"), "version")
        if version is not None and version not in _VERSIONS:
            self._wrong(top["version"], f"version: expected {_VERSIONS[0]!r}, got {version!r}")
        self._text(top.get("namespace"), "namespace")
        drivers: dict[str, str | None] = {}
        for number, node in enumerate(self._sequence(top.get("entries"), "entries"), 1):
            self._entry(number, node, drivers)
        if len(drivers) > 1 and _MAIN not in drivers:
            self._problems.append(f"{self._path}: several drivers ({', '.join(drivers)}): name the app's own {_MAIN!r}")
        if self._problems:
            raise Invalid("\n".join(self._problems))
        return drivers.get(_MAIN) or next(iter(drivers.values()), None)

    def _entry(self, number: int, node: Any, drivers: dict[str, str | None]) -> None:
        place = f"entry {number}"
        fields = self._mapping(node, place)
        if not fields:
            return
        kind = self._text(fields.get("kind"), f"{place}: kind")
        if kind is None or kind not in _DRIVERS:
            expected = f"expected one of {', '.join(_DRIVERS)}{_near(kind, _DRIVERS)}"
            self._wrong(fields.get("kind", node), f"{place}: unknown kind {kind!r}; {expected}")
            return
        self._only(fields, _DRIVER_FIELDS, place)
        name = self._text(fields.get("name", fields.get("id")), f"{place}: name") or kind.removeprefix(_DRIVER)
        if name in drivers:
            self._wrong(node, f"{place}: a second driver {name!r}")
        if "url" not in fields:
            self._wrong(node, f"{place}: url is missing")
            return
        url = self._text(fields["url"], f"{place}: url")
        if url is not None and url.partition("://")[0].lower() not in _DRIVERS[kind]:
            # The URL itself is not shown: it may hold a password.
            schemes = " or ".join(f"{scheme}://" for scheme in _DRIVERS[kind])
            self._wrong(fields["url"], f"{place}: url: expected {schemes} for {kind}")
        drivers[name] = url

    # Reading.

    def _read(self) -> str:
        try:
            with Path(self._path).open("rb") as file:
                data = file.read(MAX_SIZE + 1)
        except OSError as error:
            raise Invalid(f"{self._path}: cannot be read: {error.strerror or error}") from None
        if len(data) > MAX_SIZE:
            raise Invalid(f"{self._path}: larger than {MAX_SIZE:,} bytes")
        try:
            return data.decode()
        except UnicodeDecodeError as error:
            raise Invalid(f"{self._path}: not UTF-8 at byte {error.start}") from None

    def _compose(self, text: str) -> Any:
        """Return the tree of nodes, after a look at the events that refuses what could blow up in it."""
        import yaml

        depth = 0
        try:
            for event in yaml.parse(text, Loader=yaml.SafeLoader):
                if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None):
                    self._refuse(event, "anchors and aliases are not allowed; write the value out")
                tag = getattr(event, "tag", None)
                if tag:
                    self._refuse(event, f"tags are not allowed, got {tag!r}")
                if isinstance(event, yaml.CollectionStartEvent):
                    depth += 1
                    if depth > MAX_DEPTH:
                        self._refuse(event, f"nested deeper than {MAX_DEPTH} levels")
                elif isinstance(event, yaml.CollectionEndEvent):
                    depth -= 1
            return yaml.compose(text, Loader=yaml.SafeLoader)
        except yaml.MarkedYAMLError as error:
            line = f":{error.problem_mark.line + 1}" if error.problem_mark else ""
            raise Invalid(f"{self._path}{line}: not YAML: {error.problem or error}") from None
        except yaml.YAMLError as error:
            raise Invalid(f"{self._path}: not YAML: {error}") from None

    def _mapping(self, node: Any, place: str) -> dict[str, Any]:
        import yaml

        if node is None:
            return {}
        if not isinstance(node, yaml.MappingNode):
            self._wrong(node, f"{place}: expected a mapping of fields")
            return {}
        found: dict[str, Any] = {}
        for key, value in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.value == "<<":
                self._wrong(key, f"{place}: expected a name as key, got {getattr(key, 'value', key)!r}")
            elif key.value in found:
                self._wrong(key, f"{place}: {key.value!r} is given twice")
            else:
                found[key.value] = value
        return found

    def _sequence(self, node: Any, place: str) -> list[Any]:
        import yaml

        if node is None:
            return []
        if not isinstance(node, yaml.SequenceNode):
            self._wrong(node, f"{place}: expected a list")
            return []
        return list(node.value)

    def _text(self, node: Any, place: str) -> str | None:
        import yaml

        if node is None:
            return None
        if not isinstance(node, yaml.ScalarNode) or not node.value:
            self._wrong(node, f"{place}: expected text")
            return None

        def look_up(found: re.Match[str]) -> str:
            value = self._environment.get(found[1], found[2])
            if value is None:
                hint = f"set it, or write ${{env:{found[1]}:-default}}"
                self._wrong(node, f"{place}: the environment has no {found[1]}; {hint}")
                return ""
            return value

        return _VARIABLE.sub(look_up, str(node.value))

    def _only(self, fields: Mapping[str, Any], known: tuple[str, ...], place: str) -> None:
        for name, node in fields.items():
            if name not in known:
                self._wrong(node, f"{place}: unknown field {name!r}; expected {', '.join(known)}{_near(name, known)}")

    def _wrong(self, node: Any, what: str) -> None:
        self._problems.append(f"{self._path}:{node.start_mark.line + 1}: {what}")

    def _refuse(self, event: Any, what: str) -> NoReturn:
        raise Invalid(f"{self._path}:{event.start_mark.line + 1}: {what}")


def _near(name: str | None, known: Any) -> str:
    near = difflib.get_close_matches(name or "", list(known), 1)
    return f" (did you mean {near[0]}?)" if near else ""
