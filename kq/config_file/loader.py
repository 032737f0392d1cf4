"""From files to a document: read, check every field, name entries, follow includes and references.

A set of files is refused as a whole, with everything that is wrong in it.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from kq import limit
from kq.config_file import kind as kinds
from kq.config_file.document import Document, Draft, Entry, Given, empty
from kq.config_file.policy import policy
from kq.config_file.reader import Mapping as MappingNode
from kq.config_file.reader import Node, Problems, Scalar, Sequence, read
from kq.config_file.value import Reading, near
from kq.errors import Invalid

#: The driver that is the app's own where a file has several.
MAIN: Final = "broker"
#: Files that one may include, those that they include counted in.
MAX_FILES: Final = 64

#: Sections that only one of the files may have.
_ONCE: Final = ("settings", "worker", "security", "signing")


class Loader:
    """Reads one set of files.

    Args:
        environment: Where ``${env:NAME}`` is looked up.
    """

    def __init__(self, environment: Mapping[str, str]) -> None:
        self._problems = Problems()
        self._reading = Reading(environment, self._problems)
        self._draft = Draft()
        self._seen: dict[str, None] = {}

    def load(self, path: str) -> Document:
        """Return what a file and those it includes say; see `kq.config_file.search.load`."""
        namespace = self._file(path, ())
        draft = self._draft
        found = {name: draft.entries.get(name, {}) for name in ("driver", "queue", "consumer", "policy")}
        main = self._main(found["driver"], namespace)
        self._refer(found["queue"], found["driver"])
        self._check_signing(draft.sections.get("signing"))
        self._problems.check()
        nothing = empty().settings
        return Document(
            tuple(draft.paths), namespace, found["driver"], main, found["queue"], found["consumer"], found["policy"],
            **{name: draft.sections.get(name, nothing) for name in _ONCE},
            variables=frozenset(self._problems.variables),
            risks=tuple(self._problems.risks),
        )  # fmt: skip

    def _file(self, path: str, including: tuple[str, ...]) -> str | None:
        """Read a file and those it includes; return its namespace."""
        real = os.path.realpath(path)
        self._seen[real] = None
        self._draft.paths.append(path)
        root = read(path, self._problems)
        if root is None:
            return None
        given = kinds.FILE.read(root, "the file", self._reading)
        if given is None:
            return None
        folder = os.path.dirname(path)
        namespace = given.get("namespace")
        for name in _ONCE:
            section = given.get(name)
            if section is None:
                continue
            if isinstance(queues := section.get("queues"), (list, tuple)):
                names = [_within(queue, namespace) if isinstance(queue, str) else queue for queue in queues]
                section.values["queues"] = type(queues)(names)
            other = self._draft.sections.setdefault(name, section)
            if other is not section:
                self._problems.add(section.place, f"{name} is in {other.place} already; expected it in one file only")
        self._entries(given.get("entries"), namespace, folder, given.get("source"))
        # What is no text is noted already.
        for name in filter(None, given.get("include", ())):
            self._include(given, os.path.join(folder, name), (*including, real))
        return namespace if isinstance(namespace, str) else None

    def _include(self, given: Given, path: str, including: tuple[str, ...]) -> None:
        place = given.places["include"]
        real = os.path.realpath(path)
        if real in including:
            self._problems.add(place, f"include: {path} includes itself, by way of {os.path.basename(including[-1])}")
        elif len(self._seen) >= MAX_FILES:
            self._problems.add(place, f"include: more than {MAX_FILES} files")
        elif not Path(path).is_file():
            self._problems.add(place, f"include: there is no file {path}")
        elif real not in self._seen:
            self._file(path, including)

    # Entries.

    def _entries(self, node: Node | None, namespace: str | None, folder: str, source: str | None) -> None:
        if node is None or (isinstance(node, Scalar) and node.plain and node.text in ("", "~", "null")):
            return
        if not isinstance(node, Sequence):
            self._problems.add(node.place, "entries: expected a list of entries")
            return
        for number, item in enumerate(node.items, 1):
            entry = self._entry(item, number, namespace, folder, source)
            if entry is None:
                continue
            role = _role(entry.kind)
            others = self._draft.entries.setdefault(role, {})
            other = others.setdefault(entry.id, entry)
            if other is not entry:
                self._problems.add(entry.place, f"a second {role} {entry.id!r}; the first is in {other.place}")

    def _entry(
        self, node: Node, number: int, namespace: str | None, folder: str, source: str | None
    ) -> Entry | None:  # fmt: skip
        if not isinstance(node, MappingNode):
            self._problems.add(node.place, f"entry {number}: expected a mapping of fields")
            return None
        place = f"entry {number}{self._shown_name(node)}"
        kind = self._kind(node, place)
        if kind is None:
            return None
        before = len(self._problems.found)
        given = kinds.ENTRIES[kind].read(node, place, self._reading)
        if given is None:
            return None
        id = self._id(given, place, kind, namespace)
        if id is None:
            return None
        if kind == kinds.QUEUE:
            self._queue_id(id, given, place, "id" if "id" in given.places else "name")
        for name, holder in (("queue", given), ("queue", given.get("dead_letter"))):
            if isinstance(holder, Given) and isinstance(holder.get(name), str):
                holder.values[name] = _within(holder.values[name], namespace)
                self._queue_id(holder.values[name], holder, place, name)
        if isinstance(given.get("driver"), str):
            given.values["driver"] = _within(given.values["driver"], namespace)
        if kind in (kinds.POLICY, kinds.EXPRESSION) and len(self._problems.found) == before:
            self._check_policy(id, given, place)
        return Entry(kind, id, given, folder, source)

    def _kind(self, node: MappingNode, place: str) -> str | None:
        expected = f"expected one of {', '.join(kinds.ENTRIES)}"
        if "kind" not in node.items:
            self._problems.add(node.place, f"{place}: kind is missing; {expected}")
            return None
        text = self._reading.text(node.items["kind"][1], f"{place}: kind")
        if text is None:
            return None
        if text.value not in kinds.ENTRIES:
            hint = near(text.value, kinds.ENTRIES)
            self._problems.add(node.items["kind"][0], f"{place}: unknown kind {text.shown!r}; {expected}{hint}")
            return None
        return text.value

    def _shown_name(self, node: MappingNode) -> str:
        """Return an entry's name for messages, where it has one that can be shown."""
        for name in ("id", "name"):
            item = node.items.get(name, (None, None))[1]
            if isinstance(item, Scalar):
                return f" ({item.text[:100]})"
        return ""

    def _id(self, given: Given, place: str, kind: str, namespace: str | None) -> str | None:
        name, id = given.get("name"), given.get("id")
        if name is not None and id is not None:
            self._problems.add(given.place, f"{place}: give either name or id, not both")
            return None
        if isinstance(id, str):
            return id
        if isinstance(name, str):
            if ":" in name:
                self._problems.add(given.places["name"], f"{place}: name: {name!r} is a whole id: write id: {name}")
                return None
            if namespace is None and kind == kinds.QUEUE:
                self._problems.add(given.places["name"], f"{place}: a name needs the file's namespace; or write an id")
                return None
            return name if namespace is None else f"{namespace}:{name}"
        if kind in kinds.DRIVERS:
            return _within(kind.rpartition(".")[2], namespace)
        if "name" not in given.places and "id" not in given.places:
            self._problems.add(given.place, f"{place}: name or id is missing")
        return None

    def _queue_id(self, id: str, given: Given, place: str, field: str) -> None:
        try:
            limit.queue_id(id)
        except Invalid as error:
            written = given.written.get(field)
            why = error.message if written is None else f"expected a queue id such as app:emails, got {written!r}"
            self._problems.add(given.places[field], f"{place}: {field}: {why}")

    def _check_policy(self, id: str, given: Given, place: str) -> None:
        """Have the policy itself say what is wrong with it."""
        try:
            policy(id, given)
        except Invalid as error:
            self._problems.add(given.places["policy"], f"{place}: {error.message}")

    # References.

    def _main(self, drivers: Mapping[str, Entry], namespace: str | None) -> str | None:
        for id in (f"{namespace}:{MAIN}", MAIN):
            if id in drivers:
                return id
        if len(drivers) > 1:
            place = next(iter(drivers.values())).place
            self._problems.add(
                place, f"several drivers ({', '.join(drivers)}): name the app's own {MAIN!r}"
            )  # fmt: skip
        return next(iter(drivers), None)

    def _refer(self, queues: Mapping[str, Entry], drivers: Mapping[str, Entry]) -> None:
        for entry in queues.values():
            name = entry.given.get("driver")
            if name is not None and name not in drivers:
                written = entry.given.written.get("driver")
                known = f"{', '.join(drivers) or 'no driver'}{'' if written else near(name, drivers)}"
                why = f"queue {entry.id}: driver: there is no driver {written or name!r}; the files have {known}"
                self._problems.add(entry.given.places["driver"], why)

    def _check_signing(self, signing: Given | None) -> None:
        if signing is None:
            return
        keys, key = signing.get("keys", {}), signing.get("sign_with")
        if key is not None and key not in keys:
            # Neither is shown: names and secrets may be the wrong way round.
            self._problems.add(
                signing.places["sign_with"], f"signing: sign_with: expected the name of one of the {len(keys)} keys"
            )


def _role(kind: str) -> str:
    if kind in kinds.DRIVERS:
        return "driver"
    return {kinds.QUEUE: "queue", kinds.CONSUMER: "consumer"}.get(kind, "policy")


def _within(name: str, namespace: str | None) -> str:
    """Return a whole id: one without a colon is a name in the file's namespace."""
    return name if ":" in name or namespace is None else f"{namespace}:{name}"
