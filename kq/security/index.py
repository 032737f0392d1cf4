"""Finding the policies that cover an action and a resource without asking each of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from kq.security.partition import Partition
from kq.security.pattern import Pattern
from kq.security.policy import Policy


class Group:
    """The policies that have one pattern for the action and one for the resource; immutable.

    Args:
        policies: The policies.
    """

    __slots__ = ("allow", "allows", "denies", "deny")

    def __init__(self, policies: Iterable[Policy]) -> None:
        kept = list(policies)
        #: The name of a policy without conditions, the first by name, or None.
        self.deny = min((one.name for one in kept if one.effect == "deny" and not one.tests), default=None)
        self.allow = min((one.name for one in kept if one.effect == "allow" and not one.tests), default=None)
        #: The policies with conditions.
        self.denies = Partition((one for one in kept if one.effect == "deny" and one.tests), "deny")
        self.allows = Partition((one for one in kept if one.effect == "allow" and one.tests), "allow")


class Index:
    """Policies by their patterns; immutable.

    A subject matches few of the patterns that there can be (its own prefixes and suffixes), so that
    few groups cover it, however many policies are in them.

    Args:
        policies: The policies.
    """

    __slots__ = ("_actions", "_groups", "_resources")

    def __init__(self, policies: Iterable[Policy]) -> None:
        members: dict[tuple[Pattern, Pattern], list[Policy]] = {}
        for policy in policies:
            for action in set(policy.actions):
                for resource in set(policy.resources):
                    members.setdefault((action, resource), []).append(policy)
        self._groups = {patterns: Group(policies) for patterns, policies in members.items()}
        self._actions = _Patterns(action for action, _ in members)
        self._resources = _Patterns(resource for _, resource in members)

    def find(self, action: str, resource: str) -> list[Group]:
        """Return the groups whose patterns match; a policy can be in several."""
        resources = list(self._resources.matching(resource))
        found = [
            self._groups.get((by_action, by_resource))
            for by_action in self._actions.matching(action)
            for by_resource in resources
        ]
        return [group for group in found if group is not None]


class _Patterns:
    """A set of patterns; those that match a subject are found by its prefixes and suffixes."""

    def __init__(self, patterns: Iterable[Pattern]) -> None:
        self._known = frozenset(patterns)
        self._lengths = {
            kind: sorted({len(one.text) for one in self._known if one.kind == kind}) for kind in ("prefix", "suffix")
        }

    def matching(self, subject: str) -> Iterator[Pattern]:
        size = len(subject)
        candidates = [Pattern("any", ""), Pattern("exact", subject)]
        candidates += [Pattern("prefix", subject[:length]) for length in self._lengths["prefix"] if length <= size]
        candidates += [
            Pattern("suffix", subject[size - length :]) for length in self._lengths["suffix"] if length <= size
        ]
        return (one for one in candidates if one in self._known)
