"""Whether to trust what arrives."""

from __future__ import annotations

import json
import logging
from time import time
from typing import Any

import pytest

from kq.envelope import Envelope
from kq.guard import Guard
from kq.keyring import Keyring
from kq.security import Policy
from kq.signature import Signed, sign
from kq.signing import Signing

KEYS = {"k": "a secret of at least 32 bytes, long"}
ALLOWING = Guard([Policy("all", actions="*", resources="*")])


def signed(**claims: Any) -> Envelope:
    """Return a message that somebody with a key has signed, with a program of their own."""
    envelope = Envelope("m", {"x_kq": 1, "card": "c4nary"}, {"content_type": "application/json"}, b'"c4nary"')
    what = Signed("a:b", envelope.id, envelope.headers, envelope.properties, envelope.body)
    envelope.headers["x_sig"] = sign(Keyring(KEYS, "k"), what, issued_at=time(), expires_at=time() + 60, **claims)
    return envelope


@pytest.mark.parametrize(
    "claims",
    [
        {"actor_id": ""},
        {"actor_id": "line\nbreak"},
        {"actor_id": "x", "actor_meta": {"n": 2**70}},
        {"actor_id": "x", "groups": [""]},
        {"actor_id": "x", "groups": ["line\nbreak"]},
    ],
)
def test_claims_that_cannot_be_are_reasons_and_no_errors(claims: dict[str, Any]) -> None:
    """A right signature of actors and groups that kq would not make says so, and stops no puller and no worker."""
    assert "that cannot be" in Signing(KEYS).distrust("a:b", signed(**claims), ALLOWING)


def test_what_a_signer_may_not_do_is_audited(caplog: pytest.LogCaptureFixture) -> None:
    """A denial at the worker is a line as one at the publisher, without payload and headers."""
    with caplog.at_level(logging.INFO, "kq.audit"):
        assert Signing(KEYS).distrust("a:b", signed(actor_id="user:ann"), ALLOWING) == ""
        assert "user:bob" in Signing(KEYS).distrust("a:b", signed(actor_id="user:bob"), Guard(strict=True, policies=[
            Policy("ann", actions="*", resources="*", conditions=[
                {"field": "actor.id", "operator": "eq", "value": "user:ann"}])]))  # fmt: skip
    (record,) = caplog.records
    found = json.loads(record.getMessage())
    assert (found["actor"], found["action"], found["event"]) == ("user:bob", "queue.publish", "denied")
    assert "c4nary" not in record.getMessage()
