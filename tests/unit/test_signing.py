"""Signing what is published, and distrusting what arrives."""

from __future__ import annotations

from time import time
from typing import Any

import pytest

from kq import errors
from kq.envelope import Envelope, bury, clean
from kq.guard import Guard
from kq.outcome import Failure, Outcome
from kq.security import Actor, Policy
from kq.signature import HEADER
from kq.signing import Signing

KEY = "c4nary secret of at least 32 bytes!"
NOBODY = Guard()


def make(**options: Any) -> Signing:
    """Signing with one key."""
    return Signing({"k1": KEY}, "k1", **options)


def signed(signing: Signing, delay: float = 0.0, **headers: Any) -> Envelope:
    """A message that is signed for app:q."""
    envelope = Envelope("m-1", {"x_kq": 1, **headers}, {"content_type": "application/json"}, b"1")
    envelope.headers[HEADER] = signing.sign("app:q", envelope, delay)
    return envelope


def dead(envelope: Envelope, reason: str = "max_attempts") -> Envelope:
    """The dead letter of a message."""
    outcome = Outcome("dead", 0.0, 5, 0, reason, Failure(errors.INTERNAL, "no", False))
    return bury(envelope, "app:q", outcome, time())


def test_what_was_signed_is_trusted() -> None:
    """A message as it was published is trusted on its queue, and nowhere else."""
    signing = make()
    envelope = signed(signing, tenant="t")
    assert signing.distrust("app:q", envelope, NOBODY) == ""
    assert "signed for queue app:q, arrived on app:other" in signing.distrust("app:other", envelope, NOBODY)
    assert "unknown key" in Signing({"k2": KEY}).distrust("app:q", envelope, NOBODY)


def test_a_signature_ends() -> None:
    """``max_age`` counts from when the message is due."""
    signing = make(max_age=1)
    envelope, delayed = signed(signing), signed(signing, delay=100.0)
    assert signing.distrust("app:q", envelope, NOBODY) == ""
    assert "expired" in signing.distrust("app:q", envelope, NOBODY, now=time() + 1.1)
    assert signing.distrust("app:q", delayed, NOBODY, now=time() + 100) == ""
    assert "expired" in signing.distrust("app:q", delayed, NOBODY, now=time() + 102)


def test_copies_are_told() -> None:
    """A message of an id that has been completed is not trusted, however well it is signed."""
    signing = make()
    assert "replayed" in signing.distrust("app:q", signed(signing), NOBODY, replayed=True)


def test_the_signer_is_asked_for_anew() -> None:
    """Whoever signed must be allowed to publish there, by the policies as they are here."""
    signing = make()
    guard = Guard(
        [
            Policy("clerks", actions="queue.publish*", resources="*", groups=["clerks"],
                   conditions=[{"field": "meta.tenant", "operator": "eq", "value": "t"}]),
        ]
    )  # fmt: skip
    with guard.acting(Actor("user:ann"), ["clerks"]):
        mine, foreign = signed(signing, tenant="t"), signed(signing, tenant="other")
    with guard.acting(Actor("user:bob")):
        other = signed(signing, tenant="t")
    assert signing.distrust("app:q", mine, guard) == ""
    assert "'user:ann', who may not do queue.publish" in signing.distrust("app:q", foreign, guard)
    assert "'user:bob', who may not do queue.publish" in signing.distrust("app:q", other, guard)
    # Nobody in particular: strict mode decides.
    assert signing.distrust("app:q", signed(signing), guard) == ""
    assert "nobody" in signing.distrust("app:q", signed(signing), Guard(guard.policies, strict=True))


def test_a_revived_letter_is_trusted_again() -> None:
    """Signed anew in the name of its publisher, without its expiry, whatever has happened to it since."""
    signing, guard = make(), Guard([Policy("all", actions="*", resources="*")])
    with guard.acting(Actor("user:ann", {"role": "clerk"})):
        envelope = signed(signing, x_expires_at=time() + 60, tenant="t")
    revived = signing.revive("app:q", dead(envelope))
    assert signing.distrust("app:q", revived, guard) == ""
    assert set(revived.headers) == {"x_kq", "x_sig", "tenant"}
    clerk = {"field": "actor.meta.role", "operator": "eq", "value": "clerk"}
    denying = Guard([Policy("no clerk", actions="*", resources="*", effect="deny", conditions=[clerk])])
    assert "user:ann" in signing.distrust("app:q", revived, denying)


@pytest.mark.parametrize("forge", ["body", "header", "expiry", "queue"])
def test_a_forged_letter_stays_forged(forge: str) -> None:
    """Replaying launders nothing: what was not signed as it is does not get a signature."""
    signing = make()
    envelope = signed(signing, x_expires_at=time() + 60)
    letter = dead(envelope, "unverified")
    if forge == "body":
        letter.body = b"2"
    elif forge == "header":
        letter.headers["extra"] = 1
    elif forge == "expiry":
        letter.headers["x_dead_expires_at"] += 1000
    revived = signing.revive("app:other" if forge == "queue" else "app:q", letter)
    assert revived == clean(letter)
    assert signing.distrust("app:q", revived, NOBODY) != ""


def test_who_cannot_sign_leaves_letters_as_they_are() -> None:
    """Without a key that signs, and without a signature, a letter is only cleaned."""
    letter = dead(signed(make()))
    assert Signing({"k1": KEY}).revive("app:q", letter) == clean(letter)
    unsigned = dead(Envelope("m", {"a": 1}, {}, b"1"))
    assert make().revive("app:q", unsigned).headers == {"a": 1}


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"max_age": 0}, "max_age: expected at least 1 second"),
        ({"max_age": "soon"}, "max_age"),
        ({"require": 1}, "require: expected true or false"),
        ({"replay_window": -1}, "replay_window"),
    ],
)
def test_bad_rules_are_refused(options: dict[str, Any], why: str) -> None:
    """Each is named, and no secret is shown."""
    with pytest.raises(errors.Invalid, match=why) as caught:
        make(**options)
    assert "c4nary" not in caught.value.message


def test_no_secret_is_shown() -> None:
    """Neither by repr nor by str."""
    assert "c4nary" not in repr(make()) + str(make())
