"""Conditional policies of one effect, found by the string that one of their conditions asks for.

Ten thousand policies, one for each user, must not cost ten thousand conditions for each message: a
policy with ``actor.id eq user:17`` is looked up by ``user:17``.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from kq.security.condition import Condition
from kq.security.field import Field, Request
from kq.security.policy import Policy
from kq.security.value import MISSING


class Partition:
    """Policies, partitioned by a field and the strings that it must be equal to; immutable.

    Args:
        policies: Policies of one effect, each with a condition or an expression.
        effect: Their effect.
    """

    __slots__ = ("_all", "_deny", "_rest", "_tables", "fields")

    def __init__(self, policies: Iterable[Policy], effect: str) -> None:
        self._deny = effect == "deny"
        self._all: dict[Field, list[Policy]] = {}
        self._tables: dict[Field, dict[str, list[Policy]]] = {}
        self._rest: list[Policy] = []
        # In the order of names, so that the first that applies is the one that is named.
        policies = sorted(policies, key=lambda policy: policy.name)
        #: The fields that the policies read.
        self.fields: frozenset[Field] = frozenset().union(*(policy.fields for policy in policies))
        for policy in policies:
            for condition in policy.conditions:
                texts = _texts(condition)
                if texts is not None:
                    self._all.setdefault(condition.field, []).append(policy)
                    table = self._tables.setdefault(condition.field, {})
                    for text in texts:
                        table.setdefault(text, []).append(policy)
                    break
            else:
                self._rest.append(policy)

    def __bool__(self) -> bool:
        return bool(self._rest or self._all)

    def first(self, request: Request) -> str | None:
        """Return the name of the policy that applies, the first of several by name, or None."""
        names = [policy.name for found in self._candidates(request) for policy in _applying(found, request)]
        return min(names, default=None)

    def _candidates(self, request: Request) -> Iterator[list[Policy]]:
        """Return lists that hold every policy which could apply."""
        yield self._rest
        for field, table in self._tables.items():
            value = _read(field, request)
            if type(value) is str:
                # All others compare strings, and are false: they apply neither as allow nor as deny.
                yield table.get(value, [])
            elif self._deny or isinstance(value, str):
                # Missing or of another type: not decided, which makes a deny policy apply.
                yield self._all[field]


def _texts(condition: Condition) -> frozenset[str] | None:
    """Return the strings of which the field must be one, or None for another kind of condition."""
    if condition.value_from is not None:
        return None
    if condition.operator == "eq" and isinstance(condition.value, str):
        return frozenset({condition.value})
    if condition.operator == "in" and all(isinstance(one, str) for one in condition.value):
        return frozenset(condition.value)
    return None


def _applying(policies: list[Policy], request: Request) -> Iterator[Policy]:
    """Return the first policy that applies."""
    for policy in policies:
        if policy.applies(request):
            yield policy
            return


def _read(field: Field, request: Request) -> Any:
    try:
        return field.read(request)
    except Exception:
        return MISSING
