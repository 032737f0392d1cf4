"""What an expression can compute: operators and functions on JSON values, all of them bounded.

Types are as strict as in conditions; what does not compare raises, and the expression is undecided.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Mapping
from typing import Any, Final

from kq.security.regex import MAX_TEXT, Regex
from kq.security.value import Truth, equal, kind, member, order

#: Characters of a string that an expression makes.
MAX_STRING: Final = 16 * 1024
#: The largest number that an expression makes.
MAX_NUMBER: Final = 2**63


class Undecided(Exception):
    """The values of an expression do not compare."""


def _decided(truth: Truth) -> bool:
    if truth is None:
        raise Undecided
    return truth


def _ordered(left: Any, right: Any) -> int:
    found = order(left, right)
    if found is None:
        raise Undecided
    return found


def _in(left: Any, right: Any) -> bool:
    what = kind(right)
    if what == "mapping" or what == "string":
        if not isinstance(left, str):
            raise Undecided
        return left in right
    return _decided(member(left, right))


def _not(operand: Any) -> bool:
    if not isinstance(operand, bool):
        raise Undecided
    return not operand


def _number(value: Any) -> Any:
    if kind(value) != "number" or not -MAX_NUMBER <= value <= MAX_NUMBER:
        raise Undecided
    return value


def _add(left: Any, right: Any) -> Any:
    if isinstance(left, str) and isinstance(right, str):
        return _text(left + right)
    return _number(_number(left) + _number(right))


def _text(value: Any, limit: int = MAX_STRING) -> str:
    if not isinstance(value, str) or len(value) > limit:
        raise Undecided
    return value


def _length(value: Any) -> int:
    if kind(value) not in ("string", "list", "mapping"):
        raise Undecided
    return len(value)


#: By the node of the syntax tree.
OPERATORS: Final[Mapping[type[ast.AST], Callable[..., Any]]] = {
    ast.Eq: lambda left, right: _decided(equal(left, right)),
    ast.NotEq: lambda left, right: not _decided(equal(left, right)),
    ast.Lt: lambda left, right: _ordered(left, right) < 0,
    ast.Gt: lambda left, right: _ordered(left, right) > 0,
    ast.LtE: lambda left, right: _ordered(left, right) <= 0,
    ast.GtE: lambda left, right: _ordered(left, right) >= 0,
    ast.In: _in,
    ast.NotIn: lambda left, right: not _in(left, right),
    ast.Not: _not,
    ast.USub: lambda operand: -_number(operand),
    ast.Add: _add,
    ast.Sub: lambda left, right: _number(_number(left) - _number(right)),
    ast.Mult: lambda left, right: _number(_number(left) * _number(right)),
}
#: By name.
FUNCTIONS: Final[Mapping[str, Callable[..., Any]]] = {
    "startswith": lambda text, prefix: _text(text).startswith(_text(prefix)),
    "endswith": lambda text, suffix: _text(text).endswith(_text(suffix)),
    "matches": lambda text, pattern: Regex(_text(pattern)).search(_text(text, MAX_TEXT)),
    "lower": lambda text: _text(text).lower(),
    "len": _length,
}
