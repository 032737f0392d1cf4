"""Policies written as an expression, e.g. ``actor.meta.role == "clerk" and meta.amount < 1000``.

Evaluated by ``simpleeval`` (one small file of pure Python, maintained since 2013, on every Python that
kq runs on). CEL's Python bindings put no limit on nested macros, and one needs Python 3.11, the other
six more packages; ``rule-engine`` has powers and backtracking regular expressions without bounds.

What it is given is bounded before it runs: the syntax below and nothing else, 1,024 characters, 32
levels. There are no loops, comprehensions, powers, shifts, attributes of Python objects or methods:
``a.b`` is rewritten to ``a["b"]``. Each node is evaluated at most once, on bounded values.
"""

from __future__ import annotations

import ast
import warnings
from contextvars import ContextVar
from typing import Any, Final

from kq.errors import Invalid
from kq.security.field import Field, Request
from kq.security.frozen import Frozen
from kq.security.near_miss import did_you_mean
from kq.security.operation import FUNCTIONS, OPERATORS
from kq.security.regex import Regex
from kq.security.value import Truth

#: Characters of an expression.
MAX_LENGTH: Final = 1024
#: Levels of an expression.
MAX_DEPTH: Final = 32

NAMES: Final = ("actor", "action", "resource", "meta")

_request: ContextVar[Request] = ContextVar("kq_security_expression_request")


class _Names:
    """What the evaluator looks names up in: the request that is being decided in this context."""

    def __getitem__(self, name: str) -> Any:
        request = _request.get()
        if name == "actor":
            return {"id": request.actor.id, "meta": request.actor.meta}
        return {"action": request.action, "resource": request.resource, "meta": request.meta}[name]


_NODES: Final = (ast.BoolOp, ast.UnaryOp, ast.BinOp, ast.Compare, ast.List, ast.Name, ast.Subscript, ast.Constant)


class Expression(Frozen):
    """A checked expression over ``actor`` (``id``, ``meta``), ``action``, ``resource`` and ``meta``.

    Python's ``== != < > <= >= in, not in, and, or, not, + - *``, lists, strings, numbers, ``True``,
    ``False`` and ``None``; ``startswith``, ``endswith``, ``matches``, ``lower`` and ``len``. Types
    are as strict as in conditions, and ``and``, ``or`` and ``not`` take bools only.

    Immutable and safe to use from several threads.

    Args:
        source: The expression's text.

    Raises:
        Invalid: If it does not parse, uses anything else, is too large, or the extra is not installed.
    """

    __slots__ = ("_evaluator", "_tree", "fields", "source")

    source: str
    #: The fields that the result depends on.
    fields: frozenset[Field]
    _tree: ast.expr
    _evaluator: Any

    def __init__(self, source: str) -> None:
        if not isinstance(source, str) or not 1 <= len(source) <= MAX_LENGTH:
            raise Invalid(f"expression: expected a string of 1 to {MAX_LENGTH:,} characters")
        try:
            # Only policies with expressions need it.
            import simpleeval
        except ImportError:
            raise Invalid(
                "a policy with an expression needs an extra that is not installed: pip install 'kq-tasks[policy]'"
            ) from None
        evaluator = simpleeval.EvalWithCompoundTypes(
            operators=dict(OPERATORS), functions=dict(FUNCTIONS), names=_Names()
        )
        self._put(source=source, fields=frozenset(), _evaluator=evaluator)
        self._put(_tree=self._checked(_parse(source), 0))

    def decide(self, request: Request) -> Truth:
        """Return what the expression says, or None for an error or no bool; raise nothing."""
        token = _request.set(request)
        try:
            found = self._evaluator.eval(self.source, self._tree)
        except Exception:
            return None
        finally:
            _request.reset(token)
        return found if isinstance(found, bool) else None

    def _checked(self, node: Any, depth: int) -> ast.expr:
        """Return a node whose every part is allowed, rewritten to the strict forms."""
        if depth > MAX_DEPTH:
            raise self._refusal(f"more than {MAX_DEPTH} levels")
        field = _field_of(node)
        if field is not None:
            self._put(fields=self.fields | {field})
            return _subscripts(node)
        if isinstance(node, ast.Attribute):
            node = ast.Subscript(node.value, ast.Constant(node.attr), ast.Load())
        if isinstance(node, ast.Call):
            return self._checked_call(node, depth)
        self._check_node(node)
        for name, child in ast.iter_fields(node):
            if isinstance(child, ast.expr):
                setattr(node, name, self._checked(child, depth + 1))
            elif isinstance(child, list) and child and isinstance(child[0], ast.expr):
                setattr(node, name, [self._checked(one, depth + 1) for one in child])
        if isinstance(node, ast.BoolOp):
            # The evaluator takes any value for true or false; `not` is ours, and takes bools only.
            node.values = [ast.UnaryOp(ast.Not(), ast.UnaryOp(ast.Not(), one)) for one in node.values]
        return node  # type: ignore[no-any-return]

    def _checked_call(self, node: ast.Call, depth: int) -> ast.expr:
        name = node.func.id if isinstance(node.func, ast.Name) else None
        if name not in FUNCTIONS or node.keywords:
            known = ", ".join(FUNCTIONS)
            raise self._refusal(f"a call of other functions than {known}{did_you_mean(name, FUNCTIONS)}")
        node.args = [self._checked(one, depth + 1) for one in node.args]
        if name == "matches" and len(node.args) == 2 and isinstance(node.args[1], ast.Constant):
            pattern: Any = node.args[1].value
            Regex(pattern)
        return node

    def _check_node(self, node: Any) -> None:
        if not isinstance(node, _NODES):
            raise self._refusal(type(node).__name__)
        if isinstance(node, ast.Name):
            if node.id == "actor":
                raise Invalid(f"expression {self.source!r}: expected actor.id or actor.meta; got actor by itself")
            raise Invalid(
                f"expression {self.source!r}: expected one of {', '.join(NAMES)}; "
                f"got {node.id!r}{did_you_mean(node.id, NAMES)}"
            )
        if isinstance(node, ast.Constant) and not isinstance(node.value, (str, bool, int, float, type(None))):
            raise self._refusal(f"a constant of type {type(node.value).__name__}")
        operators = [node.op] if isinstance(node, (ast.UnaryOp, ast.BinOp)) else getattr(node, "ops", [])
        for one in operators:
            if type(one) not in OPERATORS:
                raise self._refusal(f"the operator {type(one).__name__}")

    def _refusal(self, what: str) -> Invalid:
        return Invalid(
            f"expression {self.source!r}: {what} is not supported; expected comparisons, 'and', 'or', 'not', 'in', "
            f"'+', '-', '*', lists, constants and the functions {', '.join(FUNCTIONS)}"
        )

    def __eq__(self, other: object) -> bool:
        return self.source == other.source if isinstance(other, Expression) else NotImplemented

    def __hash__(self) -> int:
        return hash(self.source)

    def __str__(self) -> str:
        return self.source

    def __repr__(self) -> str:
        return f"Expression({self.source!r})"


def _parse(source: str) -> ast.expr:
    try:
        with warnings.catch_warnings():
            # What Python only warns of in programs, e.g. "\d" in a plain string, is a mistake here.
            warnings.simplefilter("error")
            return ast.parse(source.strip(), mode="eval").body
    except (SyntaxError, ValueError, MemoryError, RecursionError, Warning) as error:
        reason = error.msg if isinstance(error, SyntaxError) else str(error) or type(error).__name__
        raise Invalid(f"expression {source!r} does not parse: {reason}") from None


def _field_of(node: ast.AST) -> Field | None:
    """Return the field that a chain such as ``actor.meta.role`` reads, or None for no such chain."""
    keys: list[str] = []
    # A longer chain is left to the check of the levels.
    while len(keys) <= MAX_DEPTH:
        if isinstance(node, ast.Attribute):
            keys.append(node.attr)
        elif isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Constant) and type(node.slice.value) is str:
            keys.append(node.slice.value)
        else:
            break
        node = node.value
    if not isinstance(node, ast.Name):
        return None
    keys.reverse()
    if node.id in ("action", "resource"):
        return Field(node.id)
    if node.id == "meta":
        return Field("meta", keys[0] if keys else "")
    if node.id == "actor" and keys[:1] == ["id"]:
        return Field("actor.id")
    if node.id == "actor" and keys[:1] == ["meta"]:
        return Field("actor.meta", keys[1] if keys[1:] else "")
    return None


def _subscripts(node: Any) -> ast.expr:
    """Return a chain with each attribute as a key, so that no attribute of an object is ever read."""
    if isinstance(node, ast.Name):
        return node
    key = ast.Constant(node.attr) if isinstance(node, ast.Attribute) else node.slice
    return ast.Subscript(_subscripts(node.value), key, ast.Load())
