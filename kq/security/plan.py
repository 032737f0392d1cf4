"""What is left to decide once action and resource are known."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any, Final

from kq.security.decision import UNDEFINED, Decision, Verdict, by
from kq.security.field import Field, Request
from kq.security.index import Group
from kq.security.policy import Policy
from kq.security.value import MISSING, Uncacheable, cache_key

#: Up to so many keys are looked up one by one; with more, the request's own keys are gone through.
_FEW_KEYS: Final = 16

_Part = Callable[[Request], Hashable]


class Plan:
    """The groups of policies that cover one action and resource, without what cannot matter.

    Immutable and safe to use from several threads.

    Args:
        groups: The groups that cover them, in any order.
    """

    __slots__ = ("_allow", "_allows", "_denies", "_parts", "constant", "groups", "weight")

    def __init__(self, groups: Sequence[Group]) -> None:
        deny = min((group.deny for group in groups if group.deny is not None), default=None)
        allow = min((group.allow for group in groups if group.allow is not None), default=None)
        self._denies = [group.denies for group in groups if group.denies]
        # Where one always applies, no other allow policy can change anything.
        self._allows = [group.allows for group in groups if group.allows] if allow is None else []
        self._allow = UNDEFINED if allow is None else by("allow", allow)
        #: The decision, where it is the same for every actor and every message.
        self.constant: Decision | None = None
        if deny is not None:
            self.constant = by("deny", deny)
        elif not self._denies and not self._allows:
            self.constant = self._allow
        fields = frozenset().union(*(partition.fields for partition in (*self._denies, *self._allows)))
        self._parts = _parts(fields)
        #: What plans that decide alike have in common; an index keeps its groups, so that no id is used twice.
        self.groups = tuple(sorted(map(id, groups)))
        #: What the plan counts for in a cache.
        self.weight = 1 + len(groups) + len(fields)

    def key(self, request: Request) -> Hashable:
        """Return a key that two requests to one scope share only if it decides them alike, or None for no key.

        Action and resource are in it only where a condition reads them: two queues that the same
        policies cover share decisions.
        """
        try:
            return (self.groups, *[part(request) for part in self._parts])
        except Exception:
            # Too large, or a mapping that fails: such a request is decided anew each time.
            return None

    def decide(self, request: Request) -> Decision:
        """Return the decision: any deny denies; else any allow allows; else it is undefined."""
        if self.constant is not None:
            return self.constant
        for effect, partitions in (("deny", self._denies), ("allow", self._allows)):
            names = [name for partition in partitions if (name := partition.first(request)) is not None]
            if names:
                return by(effect, min(names))
        return self._allow


def explain(policies: Iterable[Policy], groups: frozenset[str], request: Request) -> Decision:
    """Return the decision with what each policy said that covers the request, whatever its groups."""
    verdicts = []
    for policy in sorted(policies, key=_rank):
        verdicts.append(_verdict(policy, groups, request))
    for effect in ("deny", "allow"):
        for verdict in verdicts:
            if verdict.applies and verdict.effect == effect:
                found = by(effect, verdict.policy)
                return Decision(found.result, found.policy, found.reason, tuple(verdicts))
    return Decision(UNDEFINED.result, None, UNDEFINED.reason, tuple(verdicts))


def _verdict(policy: Policy, groups: frozenset[str], request: Request) -> Verdict:
    if not policy.is_for(groups):
        expected = ", ".join(sorted(policy.groups))
        return Verdict(policy.name, policy.effect, False, f"it is for the groups {expected}, none of which is in force")
    false, undecided = [], []
    for test in policy.tests:
        truth = test.decide(request)
        if truth is False:
            false.append(str(test))
        elif truth is None:
            undecided.append(str(test))
    applies = policy.concludes(False if false else None if undecided else True)
    if false:
        reason = f"does not hold: {'; '.join(false)}"
    elif undecided:
        outcome = "a deny policy applies then" if applies else "an allow policy does not apply then"
        reason = f"cannot be decided: {'; '.join(undecided)}; {outcome}"
    else:
        reason = "all conditions hold" if policy.tests else "it has no conditions"
    return Verdict(policy.name, policy.effect, applies, reason)


def _rank(policy: Policy) -> tuple[bool, str]:
    # Which of several policies is named must not depend on their order; the unconditional come first.
    return bool(policy.tests), policy.name


def _parts(fields: frozenset[Field]) -> tuple[_Part, ...]:
    parts: list[_Part] = []
    if any(field.source == "actor.id" for field in fields):
        parts.append(lambda request: request.actor.id)
    if any(field.source == "action" for field in fields):
        parts.append(lambda request: request.action)
    if any(field.source == "resource" for field in fields):
        parts.append(lambda request: request.resource)
    for source, known in (("actor.meta", _actor_keys), ("meta", _meta_keys)):
        roots = {root for field in fields if field.source == source for root in field.roots}
        if roots:
            parts.append(known(roots))
    return tuple(parts)


def _actor_keys(roots: set[str]) -> _Part:
    def part(request: Request) -> Hashable:
        known = request.actor.meta_keys
        names = known if "" in roots else [name for name in known if name in roots]
        found = tuple([(name, known[name]) for name in names])
        if any(value is None for _, value in found):
            raise Uncacheable
        return found

    return part


def _meta_keys(roots: set[str]) -> _Part:
    ordered = tuple(sorted(roots))

    def few(request: Request) -> Hashable:
        meta: Mapping[str, Any] = request.meta
        return tuple([cache_key(meta[name]) if name in meta else MISSING for name in ordered])

    def many(request: Request) -> Hashable:
        return tuple([(name, cache_key(value)) for name, value in request.meta.items() if name in roots])

    def every(request: Request) -> Hashable:
        key: Hashable = cache_key(dict(request.meta))
        return key

    if "" in roots:
        return every
    return few if len(ordered) <= _FEW_KEYS else many
