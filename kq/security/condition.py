"""Conditions: one field compared with a value, or with another field.

A condition is true, false, or cannot be decided: the field is missing, the types do not compare,
the other field is no good, or something failed. What that means is the policy's business: an allow
policy does not apply then, a deny policy does.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any, Final

from kq.errors import Invalid
from kq.security.field import Field, Request
from kq.security.frozen import Frozen
from kq.security.near_miss import did_you_mean
from kq.security.regex import Regex
from kq.security.value import MISSING, Missing, Truth, equal, immutable, kind, member, mutable, order

_KEYS: Final = ("field", "operator", "value", "value_from")


def _ordered(test: Callable[[int], bool]) -> Callable[[Any, Any], Truth]:
    def compare(left: Any, right: Any) -> Truth:
        found = order(left, right)
        return None if found is None else test(found)

    return compare


def _contains(left: Any, right: Any) -> Truth:
    if kind(left) == "list":
        return member(right, left)
    return right in left if kind(left) == kind(right) == "string" else None


@lru_cache(maxsize=256)
def _compiled(pattern: str) -> Regex:
    return Regex(pattern)


def _matches(left: Any, right: Any) -> Truth:
    if kind(left) != "string" or kind(right) != "string":
        return None
    return _compiled(right).search(left)


def _not(test: Callable[[Any, Any], Truth]) -> Callable[[Any, Any], Truth]:
    def negated(left: Any, right: Any) -> Truth:
        found = test(left, right)
        return None if found is None else not found

    return negated


_COMPARISONS: Final[Mapping[str, Callable[[Any, Any], Truth]]] = {
    "eq": equal,
    "ne": _not(equal),
    "lt": _ordered(lambda found: found < 0),
    "gt": _ordered(lambda found: found > 0),
    "lte": _ordered(lambda found: found <= 0),
    "gte": _ordered(lambda found: found >= 0),
    "in": member,
    "nin": _not(member),
    "contains": _contains,
    "ncontains": _not(_contains),
    "matches": _matches,
    "nmatches": _not(_matches),
}
#: The operators that only ask whether the field is there; they are always decided.
_PRESENCE: Final = ("exists", "nexists")
#: Every operator.
OPERATORS: Final = (*tuple(_COMPARISONS)[:8], *_PRESENCE, *tuple(_COMPARISONS)[8:])


class Condition(Frozen):
    """A field, an operator, and what to compare with.

    Immutable and safe to use from several threads.

    Args:
        field: ``actor.id``, ``actor.meta.<key>``, ``action``, ``resource`` or ``meta.<key>``; a dot in
            ``<key>`` leads into a nested mapping.
        operator: One of ``OPERATORS``. ``in`` and ``nin`` ask whether the field is in a list, ``contains``
            and ``ncontains`` whether the field, a list or a string, holds the value.
        value: What to compare with: a JSON value.
        value_from: The field to compare with, in place of ``value``.

    Raises:
        Invalid: If a field or the operator is unknown, both or neither of ``value`` and ``value_from``
            are given, or the value is of a type that the operator can never decide.
    """

    __slots__ = ("_compare", "field", "fields", "operator", "value", "value_from")

    field: Field
    operator: str
    #: What to compare with, or ``MISSING``.
    value: Any
    value_from: Field | None
    #: The fields that the result depends on.
    fields: frozenset[Field]
    _compare: Callable[[Any, Any], Truth] | None

    def __init__(
        self, field: str, operator: str, value: Any = MISSING, value_from: str | Missing | None = MISSING
    ) -> None:
        parsed = Field.parse(field)
        if operator not in OPERATORS:
            shown = ascii(operator) if isinstance(operator, str) else f"a value of type {type(operator).__name__}"
            raise Invalid(
                f"operator: expected one of {', '.join(OPERATORS)}; got {shown}{did_you_mean(operator, OPERATORS)}"
            )
        given = [name for name, one in (("value", value), ("value_from", value_from)) if one is not MISSING]
        if operator in _PRESENCE:
            if given:
                raise Invalid(
                    f"{operator} on {field}: expected neither value nor value_from, got {' and '.join(given)}"
                )
        elif len(given) != 1:
            raise Invalid(
                f"{operator} on {field}: expected one of value and value_from, got {'both' if given else 'neither'}"
            )
        other = None if value_from is MISSING else Field.parse(value_from, "value_from")
        self._put(
            field=parsed,
            operator=operator,
            value=value if value is MISSING else immutable(value, f"value of {operator} on {field}"),
            value_from=other,
            fields=frozenset({parsed} if other is None else {parsed, other}),
            _compare=_COMPARISONS.get(operator),
        )
        if self.value is not MISSING:
            self._check_value()

    @classmethod
    def parse(cls, source: Any) -> Condition:
        """Return the condition that a mapping with ``field``, ``operator`` and the like describes.

        Raises:
            Invalid: If a key is unknown or missing, or as for ``Condition``.
        """
        if isinstance(source, Condition):
            return source
        if not isinstance(source, Mapping):
            raise Invalid(f"condition: expected a mapping with {', '.join(_KEYS)}; got {type(source).__name__}")
        for key in source:
            if key not in _KEYS:
                raise Invalid(f"condition: expected the keys {', '.join(_KEYS)}; got {key!r}{did_you_mean(key, _KEYS)}")
        for key in ("field", "operator"):
            if key not in source:
                raise Invalid(f"condition: {key} is missing; expected the keys {', '.join(_KEYS)}")
        return cls(**source)

    def _check_value(self) -> None:
        """Refuse a value that could never be decided: a deny policy with it would deny everything."""
        what, expected = kind(self.value), None
        if self.operator in ("in", "nin") and what != "list":
            expected = "a list"
        elif self.operator in ("lt", "gt", "lte", "gte") and what not in ("string", "number"):
            expected = "a string or a number"
        elif self.operator in ("matches", "nmatches"):
            if what == "string":
                _compiled(self.value)
            else:
                expected = "a regular expression, a string"
        if expected:
            raise Invalid(f"value of {self.operator} on {self.field}: expected {expected}, got a {what}")

    def decide(self, request: Request) -> Truth:
        """Return whether the condition holds, or None if that cannot be decided; raise nothing."""
        try:
            left = self.field.read(request)
            if self._compare is None:
                return (left is not MISSING) is (self.operator == "exists")
            right = self.value if self.value_from is None else self.value_from.read(request)
            if left is MISSING or right is MISSING:
                return None
            return self._compare(left, right)
        except Exception:
            return None

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Condition):
            return NotImplemented
        return (self.field, self.operator, self.value_from) == (other.field, other.operator, other.value_from) and (
            self.value is other.value or equal(self.value, other.value) is True
        )

    def __hash__(self) -> int:
        return hash((self.field, self.operator, self.value_from))

    def __str__(self) -> str:
        if self.value_from is not None:
            return f"{self.field} {self.operator} {self.value_from}"
        return f"{self.field} {self.operator}" + ("" if self.value is MISSING else f" {mutable(self.value)!r}")

    def __repr__(self) -> str:
        return f"Condition({str(self)!r})"
