from __future__ import annotations

from typing import Any

import pytest

from kq.errors import Invalid
from kq.security import Actor, Condition, Policy
from kq.security.field import Request


def request(meta: dict[str, Any] | None = None, actor: Actor | None = None) -> Request:
    return Request(actor or Actor("user:1", {"role": "clerk"}), "queue.publish.queue", "app:orders", meta or {})


def test_the_documented_entry_makes_a_policy() -> None:
    """A policy takes one pattern or several, and conditions as a configuration file has them."""
    policy = Policy(
        "orders_only",
        actions=["queue.publish.queue"],
        resources="app:orders*",
        effect="allow",
        conditions=[{"field": "actor.meta.role", "operator": "in", "value": ["clerk", "admin"]}],
        groups=["clerks"],
    )
    assert policy.covers("queue.publish.queue", "app:orders.eu")
    assert not policy.covers("queue.publish", "app:orders")
    assert not policy.covers("queue.publish.queue", "app:emails")
    assert policy.applies(request())
    assert not policy.applies(request(actor=Actor("user:2", {"role": "guest"})))
    assert policy.is_for(frozenset({"clerks", "x"}))
    assert not policy.is_for(frozenset())


def test_all_conditions_must_hold() -> None:
    """Conditions are joined with AND."""
    conditions = [Condition("meta.a", "eq", 1), Condition("meta.b", "eq", 2)]
    policy = Policy("p", actions="*", resources="*", conditions=conditions)
    assert policy.applies(request({"a": 1, "b": 2}))
    assert not policy.applies(request({"a": 1, "b": 3}))


@pytest.mark.parametrize("meta", [{}, {"size": "11"}, {"size": True}, {"size": float("nan")}])
def test_what_cannot_be_decided_denies(meta: dict[str, Any]) -> None:
    """A condition that cannot be decided makes an allow policy not apply and a deny policy apply."""
    conditions = [{"field": "meta.size", "operator": "gt", "value": 10}]
    allow = Policy("p", actions="*", resources="*", conditions=conditions)
    deny = Policy("p", actions="*", resources="*", effect="deny", conditions=conditions)
    assert not allow.applies(request(meta))
    assert deny.applies(request(meta))


def test_a_false_condition_settles_what_another_cannot_decide() -> None:
    """``exists`` guards a comparison in a deny policy, whichever comes first."""
    conditions: list[dict[str, Any]] = [
        {"field": "meta.size", "operator": "exists"},
        {"field": "meta.size", "operator": "gt", "value": 10},
    ]
    for ordered in (conditions, conditions[::-1]):
        deny = Policy("p", actions="*", resources="*", effect="deny", conditions=ordered)
        assert not deny.applies(request())
        assert deny.applies(request({"size": 11}))
        assert not deny.applies(request({"size": 9}))
        assert deny.applies(request({"size": "9"}))


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"name": ""}, "policy: expected a name of 1 to 256"),
        ({"name": "a\nb"}, "policy: expected a name of 1 to 256"),
        ({"effect": "alow"}, "policy 'p': effect: expected allow or deny; got 'alow'; did you mean 'allow'"),
        ({"effect": None}, "effect: expected allow or deny"),
        ({"actions": []}, "policy 'p': actions: expected at least one pattern"),
        ({"actions": "a*b"}, "policy 'p': actions: expected '*'"),
        ({"actions": {"a": 1}}, "actions: expected one or a list"),
        ({"resources": None}, "resources: expected one or a list"),
        ({"resources": ["app:*", "*a*"]}, "policy 'p': resources: expected '*'"),
        ({"groups": [1]}, "groups: expected a name"),
        ({"conditions": {"field": "action"}}, "conditions: expected a list"),
        (
            {"conditions": [{"field": "action", "operator": "exists"}, {"field": "action", "operater": "eq"}]},
            "policy 'p': condition 2: condition: expected the keys field, operator, value, value_from; got 'operater'; "
            "did you mean 'operator'",
        ),
    ],
)
def test_ill_formed_policies_are_refused(given: dict[str, Any], expected: str) -> None:
    """An error names the policy, the part and what was expected."""
    with pytest.raises(Invalid) as caught:
        Policy(**{"name": "p", "actions": "*", "resources": "*", **given})
    assert expected in str(caught.value)


def test_policies_cannot_be_changed() -> None:
    """What a scope has indexed stays as it was."""
    policy = Policy("p", actions="*", resources="*")
    with pytest.raises(AttributeError, match="cannot be changed"):
        policy.effect = "deny"
    assert repr(policy) == "Policy('p', allow [*] on [*], 0 conditions)"
