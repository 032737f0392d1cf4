"""The values that conditions compare: what may be compared with what, and when two are equal.

A comparison has three results: true, false, and None for one that cannot be decided. Strings and
numbers never compare with each other, and a bool is not a number: a deny rule that expects a
number must not be slipped past with the same digits as a string.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any, Final, TypeAlias

from kq.errors import Invalid

#: True, false, or None: cannot be decided.
Truth: TypeAlias = bool | None


class Missing:
    """Stands for a field that is not there; None is a value that JSON has."""

    def __repr__(self) -> str:
        return "MISSING"


MISSING: Final = Missing()

#: Levels of lists and mappings in an actor's meta, and in what a cache remembers.
MAX_NESTING: Final = 8
#: Characters of a string that a cache remembers a decision for.
MAX_CACHED_TEXT: Final = 256
#: Members of a list or mapping that a cache remembers a decision for.
MAX_CACHED_MEMBERS: Final = 64


class Uncacheable(Exception):
    """A value is too large, too deep or of a type that is no key of a cache."""


def immutable(value: Any, what: str, depth: int = 0) -> Any:
    """Return a deep copy of a JSON value that nobody can change.

    Mappings become read-only views and lists become tuples.

    Args:
        value: The value to copy.
        what: What it is, for the error; the error never holds the value.
        depth: How deep the value already is.

    Raises:
        Invalid: If it is no JSON value, not finite, beyond 64 bits, or nested too deep.
    """
    if depth > MAX_NESTING:
        raise Invalid(f"{what}: expected at most {MAX_NESTING} levels of lists and mappings")
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return text(value, what)
    if isinstance(value, int):
        if not -(2**63) <= value < 2**63:
            raise Invalid(f"{what}: expected integers of at most 64 bits")
        return int(value)
    if isinstance(value, float):
        if not math.isfinite(value):
            raise Invalid(f"{what}: expected finite numbers")
        return float(value)
    if isinstance(value, Mapping):
        copied: dict[str, Any] = {}
        for key, member in value.items():
            if not isinstance(key, str):
                raise Invalid(f"{what}: expected string keys, got one of type {type(key).__name__}")
            copied[text(key, what)] = immutable(member, what, depth + 1)
        return MappingProxyType(copied)
    if isinstance(value, (list, tuple)):
        return tuple(immutable(member, what, depth + 1) for member in value)
    raise Invalid(
        f"{what}: expected JSON values (string, number, bool, null, list, mapping), got {type(value).__name__}"
    )


def text(value: str, what: str) -> str:
    """Return ``value`` as a plain string.

    Raises:
        Invalid: If it holds a lone surrogate, which no encoding can carry.
    """
    try:
        value.encode()
    except UnicodeEncodeError:
        raise Invalid(f"{what}: expected text, got a string with a lone surrogate") from None
    # Not `str(value)`, for which an enum has another text.
    return str.__str__(value)


def mutable(value: Any) -> Any:
    """Return a plain copy, of dicts and lists, of what ``immutable`` returned."""
    if isinstance(value, Mapping):
        return {key: mutable(member) for key, member in value.items()}
    return [mutable(member) for member in value] if isinstance(value, tuple) else value


def kind(value: Any) -> str | None:
    """Return the JSON name of a value's type, or None for what compares with nothing, such as NaN."""
    if isinstance(value, str):
        return "string"
    if isinstance(value, bool):
        return "bool"
    if isinstance(value, (int, float)):
        # NaN is neither equal nor unequal to anything.
        return "number" if value == value else None
    if value is None:
        return "null"
    if isinstance(value, (list, tuple)):
        return "list"
    return "mapping" if isinstance(value, Mapping) else None


def equal(left: Any, right: Any) -> Truth:
    """Say whether two values of one type are equal; None where the types differ, at any depth."""
    what = kind(left)
    if what is None or what != kind(right):
        return None
    if what == "list":
        return len(left) == len(right) and every(equal(a, b) for a, b in zip(left, right, strict=True))
    if what == "mapping":
        return left.keys() == right.keys() and every(equal(left[key], right[key]) for key in left)
    return bool(left == right)


def member(value: Any, members: Any) -> Truth:
    """Say whether ``value`` is in a list; None where it is not, but a member is of another type."""
    if kind(members) != "list":
        return None
    return some(equal(value, one) for one in members)


def order(left: Any, right: Any) -> int | None:
    """Return -1, 0 or 1 for two strings or two numbers, and None for anything else."""
    what = kind(left)
    if what not in ("string", "number") or what != kind(right):
        return None
    return int(left > right) - int(left < right)


def every(truths: Iterable[Truth]) -> Truth:
    """Join with AND: false if one is false, else undecided if one is, else true."""
    result: Truth = True
    for truth in truths:
        if truth is False:
            return False
        if truth is None:
            result = None
    return result


def some(truths: Iterable[Truth]) -> Truth:
    """Join with OR: true if one is true, else undecided if one is, else false."""
    result: Truth = False
    for truth in truths:
        if truth:
            return True
        if truth is None:
            result = None
    return result


def cache_key(value: Any, depth: int = 0) -> Any:
    """Return a hashable key that two values share only if every comparison treats them alike.

    A type is part of the key, because 1, 1.0 and True are equal for Python and not for policies.

    Raises:
        Uncacheable: If the value is large, nested deep, or of no JSON type.
    """
    exact = type(value)
    if exact is str:
        if len(value) > MAX_CACHED_TEXT:
            raise Uncacheable
        return value
    # A subclass may compare in its own way; such a value is judged anew each time.
    if exact is int or exact is float or exact is bool or value is None or value is MISSING:
        return (exact, value)
    if depth >= MAX_NESTING:
        raise Uncacheable
    if exact is list or exact is tuple:
        if len(value) > MAX_CACHED_MEMBERS:
            raise Uncacheable
        return (list, tuple(cache_key(one, depth + 1) for one in value))
    if exact is dict or exact is MappingProxyType:
        if len(value) > MAX_CACHED_MEMBERS:
            raise Uncacheable
        return (dict, tuple((cache_key(key, depth + 1), cache_key(one, depth + 1)) for key, one in value.items()))
    raise Uncacheable
