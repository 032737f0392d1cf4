"""Finding the policies that cover an action and a resource without asking each of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from kq.security.pattern import Pattern
from kq.security.policy import Policy


class Index:
    """Policies by their patterns; immutable.

    Args:
        policies: The policies.
    """

    __slots__ = ("_actions", "_resources")

    def __init__(self, policies: Iterable[Policy]) -> None:
        self._actions = _Patterns()
        self._resources = _Patterns()
        for policy in policies:
            for pattern in set(policy.actions):
                self._actions.add(pattern, policy)
            for pattern in set(policy.resources):
                self._resources.add(pattern, policy)

    def find(self, action: str, resource: str) -> list[Policy]:
        """Return the policies whose patterns match, in no order, each once."""
        by_action = list(self._actions.find(action))
        by_resource = list(self._resources.find(resource))
        # The shorter list is asked one by one: 10,000 policies for one queue each share their action.
        found = by_action if len(by_action) < len(by_resource) else by_resource
        return [policy for policy in dict.fromkeys(found) if policy.covers(action, resource)]


class _Patterns:
    """Policies by one kind of pattern; every prefix and suffix of the subject is looked up."""

    def __init__(self) -> None:
        self._any: list[Policy] = []
        self._tables: dict[str, dict[str, list[Policy]]] = {"exact": {}, "prefix": {}, "suffix": {}}
        self._lengths: dict[str, set[int]] = {"prefix": set(), "suffix": set()}

    def add(self, pattern: Pattern, policy: Policy) -> None:
        if pattern.kind == "any":
            self._any.append(policy)
            return
        self._tables[pattern.kind].setdefault(pattern.text, []).append(policy)
        if pattern.kind in self._lengths:
            self._lengths[pattern.kind].add(len(pattern.text))

    def find(self, subject: str) -> Iterator[Policy]:
        yield from self._any
        yield from self._tables["exact"].get(subject, ())
        size = len(subject)
        for length in self._lengths["prefix"]:
            if length <= size:
                yield from self._tables["prefix"].get(subject[:length], ())
        for length in self._lengths["suffix"]:
            if length <= size:
                yield from self._tables["suffix"].get(subject[size - length :], ())
