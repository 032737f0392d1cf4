"""Scopes: the policies in force, and fast decisions by them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any, Final

from kq.errors import Invalid, NotFound
from kq.security.actor import Actor
from kq.security.cache import Cache
from kq.security.decision import Decision
from kq.security.field import Request
from kq.security.frozen import Frozen
from kq.security.index import Index
from kq.security.near_miss import did_you_mean
from kq.security.plan import Plan, explain
from kq.security.policy import Policy, group_names

#: What a scope's caches hold at most twice of: groups and fields in plans, and decisions.
MAX_PLAN_WEIGHT: Final = 200_000
MAX_DECISIONS: Final = 4_096
#: Characters of an action or a resource that a cache remembers.
MAX_CACHED_NAME: Final = 512

_NOTHING: Final[Mapping[str, Any]] = MappingProxyType({})


class Scope(Frozen):
    """A set of policies, and the groups in force.

    A policy with groups counts only where the scope has one of them; a policy without always does.
    Immutable and safe to use from several threads. The first request for an action and a resource
    looks through the policies; what it found, and decisions, are kept, within bounds. A decision is
    kept under the values of the fields that its policies read, and is never given for others.

    Args:
        policies: The policies; their order does not matter.
        groups: The groups in force: one name or several.

    Raises:
        Invalid: If two policies have one name.
    """

    __slots__ = ("_decisions", "_index", "_plans", "groups", "policies")

    #: The policies, in the order given.
    policies: tuple[Policy, ...]
    #: The groups in force.
    groups: frozenset[str]
    _index: Index
    _plans: Cache[Plan]
    _decisions: Cache[Decision]

    def __init__(self, policies: Iterable[Policy] = (), *, groups: str | Iterable[str] = ()) -> None:
        self._put(policies=tuple(policies))
        self._put(groups=group_names(groups))
        names: set[str] = set()
        for policy in self.policies:
            if not isinstance(policy, Policy):
                raise Invalid(f"scope: expected policies, got {type(policy).__name__}")
            if policy.name in names:
                raise Invalid(f"scope: two policies are called {policy.name!r}; rename one")
            names.add(policy.name)
        self._put(_index=Index(policy for policy in self.policies if policy.is_for(self.groups)))
        self._put(_plans=Cache(MAX_PLAN_WEIGHT))
        self._put(_decisions=Cache(MAX_DECISIONS))

    def with_(self, policy: Policy) -> Scope:
        """Return a scope that has one policy more.

        Raises:
            Invalid: If a policy of that name is there already.
        """
        return Scope((*self.policies, policy), groups=self.groups)

    def without(self, name: str) -> Scope:
        """Return a scope that lacks the policy of that name.

        Raises:
            NotFound: If there is no such policy.
        """
        rest = [policy for policy in self.policies if policy.name != name]
        if len(rest) == len(self.policies):
            known = [policy.name for policy in self.policies]
            raise NotFound(f"scope: there is no policy called {name!r}{did_you_mean(name, known)}")
        return Scope(rest, groups=self.groups)

    def evaluate(self, actor: Actor, action: str, resource: str, meta: Mapping[str, Any] | None = None) -> str:
        """Return ``allow``, ``deny``, or ``undefined`` where no policy says anything.

        Args:
            actor: Who asks.
            action: What for, e.g. ``queue.publish.queue``.
            resource: On what, e.g. a queue id; may be empty.
            meta: The message's headers, or other facts that conditions read.

        Raises:
            Invalid: If an argument is of another type.
        """
        return self.decide(actor, action, resource, meta).result

    def decide(self, actor: Actor, action: str, resource: str, meta: Mapping[str, Any] | None = None) -> Decision:
        """Return the decision with the policy that made it; arguments and errors as for ``evaluate``."""
        if not isinstance(actor, Actor) or not isinstance(action, str) or not isinstance(resource, str):
            _refuse(actor, action, resource)
        if meta is not None and not isinstance(meta, Mapping):
            raise Invalid(f"meta: expected a mapping, got {type(meta).__name__}")
        plan = self._plans.get((action, resource))
        if plan is None:
            plan = Plan(self._index.find(action, resource))
            if len(action) + len(resource) <= MAX_CACHED_NAME:
                self._plans.put((action, resource), plan, plan.weight)
        if plan.constant is not None:
            return plan.constant
        request = Request(actor, action, resource, _NOTHING if meta is None else meta)
        key = plan.key(request) if len(action) + len(resource) <= MAX_CACHED_NAME else None
        if key is None:
            return plan.decide(request)
        decision = self._decisions.get(key)
        if decision is None:
            decision = plan.decide(request)
            self._decisions.put(key, decision)
        return decision

    def explain(self, actor: Actor, action: str, resource: str, meta: Mapping[str, Any] | None = None) -> Decision:
        """Return the decision with a verdict of each policy that covers the request; keeps nothing.

        For people and not for each message: every condition of every policy is evaluated.
        Arguments and errors as for ``evaluate``.
        """
        if not isinstance(actor, Actor) or not isinstance(action, str) or not isinstance(resource, str):
            _refuse(actor, action, resource)
        if meta is not None and not isinstance(meta, Mapping):
            raise Invalid(f"meta: expected a mapping, got {type(meta).__name__}")
        request = Request(actor, action, resource, _NOTHING if meta is None else meta)
        covering = [policy for policy in self.policies if policy.covers(action, resource)]
        return explain(covering, self.groups, request)

    def __repr__(self) -> str:
        groups = f", groups: {', '.join(sorted(self.groups))}" if self.groups else ""
        return f"Scope({len(self.policies)} policies{groups})"


def _refuse(actor: Any, action: Any, resource: Any) -> None:
    for what, value, expected in (("actor", actor, Actor), ("action", action, str), ("resource", resource, str)):
        if not isinstance(value, expected):
            name = "an Actor" if expected is Actor else "a string"
            raise Invalid(f"{what}: expected {name}, got {type(value).__name__}")
