"""What an app asks its policies."""

from __future__ import annotations

import pytest

from kq.errors import PermissionDenied
from kq.guard import Guard
from kq.security import Actor, Policy, Scope, context

ANN = Actor("user:ann")
CLERKS = Policy("clerks", actions="queue.publish*", resources="*", groups=["clerks"])


def test_an_actor_without_a_scope_is_under_the_app_s_policies() -> None:
    """Naming an actor alone does not leave the policies behind, though strict mode is off; another scope does."""
    guard = Guard([CLERKS, Policy("look", actions="queue.admin.queue", resources="a:b")])
    with context(ANN):
        with pytest.raises(PermissionDenied, match=r"queue\.publish is denied"):
            guard.publish("a:b", {})
        with pytest.raises(PermissionDenied, match=r"queue\.consume\.queue"):
            guard.consume("a:b")
        guard.administer("a:b")
        # An app that has no policies has nothing to ask.
        Guard().publish("a:b", {})
    with context(ANN, Scope([CLERKS], groups=["clerks"])):
        guard.publish("a:b", {})


def test_one_group_is_a_name_and_not_its_letters() -> None:
    """A single group may be given as text, as for policies and scopes."""
    guard = Guard([CLERKS], actor=ANN, groups="clerks")
    assert guard.groups == {"clerks"}
    for serving in (guard.acting(ANN, "clerks"), guard.serving()):
        with serving:
            guard.publish("a:b", {})
