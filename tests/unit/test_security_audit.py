from __future__ import annotations

import json
import logging
from datetime import datetime, timedelta, timezone
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kq import errors
from kq.security import Actor, Policy, Scope, context, require

SCOPE = Scope(
    [
        Policy("publish", actions="queue.publish", resources="*"),
        Policy("orders", actions="queue.publish.queue", resources="app:orders*"),
        Policy(
            "no-big",
            actions="queue.publish.queue",
            resources="*",
            effect="deny",
            conditions=[
                {"field": "meta.note", "operator": "exists"},
                {"field": "meta.note", "operator": "contains", "value": "big"},
            ],
        ),
    ]
)
ACTOR = Actor("user:1", {"email": "canary-meta"})


def lines(caplog: pytest.LogCaptureFixture) -> list[dict[str, Any]]:
    return [json.loads(record.getMessage()) for record in caplog.records if record.name == "kq.audit"]


def test_what_is_allowed_is_not_logged(caplog: pytest.LogCaptureFixture) -> None:
    """An allowed request returns its decision and leaves no line."""
    with context(ACTOR, SCOPE):
        assert require("queue.publish", "").policy == "publish"
        assert require("queue.publish.queue", "app:orders").policy == "orders"
    assert lines(caplog) == []


def test_a_denial_by_a_policy(caplog: pytest.LogCaptureFixture) -> None:
    """A denial names the check, the actor and the policy, in the error and in one line; never a header's value."""
    with context(ACTOR, SCOPE), pytest.raises(errors.PermissionDenied) as caught:
        require("queue.publish.queue", "app:orders", {"note": "canary-big"})
    error = caught.value
    assert str(error) == "queue.publish.queue on 'app:orders' is denied to actor 'user:1': policy 'no-big' denies it"
    assert error.details == {"action": "queue.publish.queue", "resource": "app:orders", "actor": "user:1"}
    assert (error.kind, error.retryable) == (errors.PERMISSION_DENIED, False)
    (line,) = lines(caplog)
    moment = datetime.fromisoformat(line.pop("time"))
    assert abs(datetime.now(timezone.utc) - moment) < timedelta(minutes=1)
    assert line == {
        "event": "denied",
        "actor": "user:1",
        "action": "queue.publish.queue",
        "resource": "app:orders",
        "policy": "no-big",
        "reason": "policy 'no-big' denies it",
    }
    assert "canary" not in caplog.text + repr(error) + repr(error.details)
    assert [record.levelno for record in caplog.records] == [logging.WARNING]


def test_a_denial_because_nothing_allows_it(caplog: pytest.LogCaptureFixture) -> None:
    """Where no policy allows, the error and the line say so and name none."""
    with context(ACTOR, SCOPE), pytest.raises(errors.PermissionDenied, match="no policy allows it"):
        require("queue.publish.queue", "app:emails")
    (line,) = lines(caplog)
    assert (line["policy"], line["reason"]) == (None, "no policy allows it")


def test_a_denial_of_nobody(caplog: pytest.LogCaptureFixture) -> None:
    """In strict mode a caller without an actor is denied, and details and line say so."""
    with pytest.raises(errors.PermissionDenied) as caught:
        require("queue.publish", "", strict=True)
    assert str(caught.value) == (
        "queue.publish is denied to a caller without an actor: there is no actor, which strict mode denies"
    )
    assert caught.value.details == {"action": "queue.publish", "resource": "", "actor": None}
    assert lines(caplog)[0]["actor"] is None
    assert require("queue.publish", "", strict=False).allowed


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.text(max_size=20) | st.characters() | st.sampled_from(["a\nb", "\x7f", "\x85", "\u2028", "\ud800", "x" * 9999])
)
def test_a_line_is_one_line(caplog: pytest.LogCaptureFixture, resource: str) -> None:
    """Whatever a resource is called, the line is one line of printable ASCII that parses."""
    caplog.clear()
    with context(ACTOR, Scope()), pytest.raises(errors.PermissionDenied) as caught:
        require("queue.admin.queue", resource)
    (record,) = caplog.records
    message = record.getMessage()
    assert all(" " <= char <= "~" for char in message)
    assert len(message) < 8192
    assert json.loads(message)["resource"] in (resource, resource[:509] + "...")
    assert "\n" not in str(caught.value)
