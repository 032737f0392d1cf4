"""Policies: who may do what, or may not."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Final

from kq.errors import Invalid
from kq.security.condition import Condition
from kq.security.expression import Expression
from kq.security.field import Field, Request
from kq.security.frozen import Frozen
from kq.security.near_miss import did_you_mean
from kq.security.pattern import Pattern
from kq.security.value import Truth, every

EFFECTS: Final = ("allow", "deny")
#: Characters of a policy's or a group's name.
MAX_NAME: Final = 256


class Policy(Frozen):
    """Allows or denies actions on resources, under conditions.

    All conditions must hold, and the expression. One that cannot be decided, while none is false,
    makes an allow policy not apply and a deny policy apply. A condition that is false settles it, so
    that ``exists`` can guard another condition on the same field.

    Immutable and safe to use from several threads.

    Args:
        name: What decisions, denials and errors call it; 1 to 256 printable characters.
        actions: A pattern or several: ``*``, exact, or one ``*`` at the start or the end.
        resources: The same; the empty one matches the empty resource.
        effect: ``allow`` or ``deny``.
        conditions: ``Condition`` objects, or mappings with ``field``, ``operator`` and ``value`` or
            ``value_from``.
        groups: Groups that the policy is for; with none it is for everybody.
        expression: A condition that is an expression; needs the extra ``policy``.

    Raises:
        Invalid: If anything is ill-formed; the error names the policy.
    """

    __slots__ = ("actions", "conditions", "effect", "expression", "groups", "name", "resources")

    name: str
    actions: tuple[Pattern, ...]
    resources: tuple[Pattern, ...]
    effect: str
    conditions: tuple[Condition, ...]
    groups: frozenset[str]
    expression: Expression | None

    def __init__(
        self,
        name: str,
        *,
        actions: str | Iterable[str],
        resources: str | Iterable[str],
        effect: str = "allow",
        conditions: Iterable[Condition | Mapping[str, Any]] = (),
        groups: str | Iterable[str] = (),
        expression: str | None = None,
    ) -> None:
        checked_name("policy", name)
        if effect not in EFFECTS:
            raise Invalid(
                f"policy {name!r}: effect: expected allow or deny; got {effect!r}{did_you_mean(effect, EFFECTS)}"
            )
        try:
            self._put(name=name)
            self._put(actions=_patterns("actions", actions))
            self._put(resources=_patterns("resources", resources))
            self._put(effect=effect)
            self._put(conditions=_conditions(conditions))
            self._put(groups=group_names(groups))
            self._put(expression=None if expression is None else Expression(expression))
        except Invalid as error:
            raise Invalid(f"policy {name!r}: {error}") from None

    @property
    def fields(self) -> frozenset[Field]:
        """The fields that conditions and expression read."""
        read = [test.fields for test in self.tests]
        return frozenset().union(*read)

    @property
    def tests(self) -> tuple[Condition | Expression, ...]:
        """The conditions, and the expression if there is one."""
        return self.conditions if self.expression is None else (*self.conditions, self.expression)

    def covers(self, action: str, resource: str) -> bool:
        """Say whether the patterns match an action and a resource."""
        return any(one.matches(action) for one in self.actions) and any(one.matches(resource) for one in self.resources)

    def applies(self, request: Request) -> bool:
        """Say whether the conditions make the policy apply to a request that it covers."""
        return self.concludes(every(test.decide(request) for test in self.tests))

    def concludes(self, truth: Truth) -> bool:
        """Say whether the policy applies where its conditions together are ``truth``."""
        return self.effect == "deny" if truth is None else truth

    def is_for(self, groups: frozenset[str]) -> bool:
        """Say whether the policy is in force where these groups are."""
        return not self.groups or not self.groups.isdisjoint(groups)

    def __repr__(self) -> str:
        actions = ", ".join(str(one) for one in self.actions)
        resources = ", ".join(str(one) for one in self.resources)
        return f"Policy({self.name!r}, {self.effect} [{actions}] on [{resources}], {len(self.tests)} conditions)"


def checked_name(what: str, name: Any) -> str:
    """Return the name of a policy or a group.

    Raises:
        Invalid: If it is empty, too long or not printable.
    """
    if isinstance(name, str) and 1 <= len(name) <= MAX_NAME and name.isprintable():
        return name
    shown = ascii(name[:60]) if isinstance(name, str) else f"a value of type {type(name).__name__}"
    raise Invalid(f"{what}: expected a name of 1 to {MAX_NAME} printable characters, got {shown}")


def group_names(groups: Any) -> frozenset[str]:
    """Return one group's name, or several, as a set.

    Raises:
        Invalid: If one is no name.
    """
    return frozenset(checked_name("groups", one) for one in _several("groups", groups))


def _several(what: str, given: Any) -> list[Any]:
    if isinstance(given, str):
        return [given]
    if isinstance(given, Mapping) or not isinstance(given, Iterable):
        raise Invalid(f"{what}: expected one or a list, got {type(given).__name__}")
    return list(given)


def _patterns(what: str, given: Any) -> tuple[Pattern, ...]:
    patterns = tuple(Pattern.parse(one, what) for one in _several(what, given))
    if not patterns:
        raise Invalid(f"{what}: expected at least one pattern, got none; '*' covers all")
    return patterns


def _conditions(given: Any) -> tuple[Condition, ...]:
    if isinstance(given, (str, Mapping)) or not isinstance(given, Iterable):
        raise Invalid(f"conditions: expected a list of conditions, got {type(given).__name__}")
    parsed = []
    for number, one in enumerate(given, 1):
        try:
            parsed.append(Condition.parse(one))
        except Invalid as error:
            raise Invalid(f"condition {number}: {error}") from None
    return tuple(parsed)
