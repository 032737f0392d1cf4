from __future__ import annotations

import base64
import json
import re
import struct
import traceback
from collections.abc import Callable, Mapping
from datetime import datetime, timezone
from hashlib import sha256
from hmac import digest
from pathlib import Path
from random import Random
from types import MappingProxyType
from typing import Any

import pytest
from amqp.serialization import dumps, loads
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from kq import errors, header
from kq.backends.rabbitmq_topology import to_envelope
from kq.envelope import Envelope, pack, unpack
from kq.keyring import Keyring
from kq.signature import CLOCK_SKEW, MAX_SIZE, PREFIX, Claims, Signed, Unverified, sign, verify
from tests.unit.amqp_frames import read, written

SECRET = "canary-5b1e0d9a7c3f4f0c8e2a6d4b1f7e9c35"
OTHER = "another-0b8f4e2d6c1a49b7a5e3d1f09c7b2a48"
NOW = 1_800_000_000.0
RING = Keyring({"k1": SECRET, "k2": OTHER}, sign_with="k1")
MESSAGE = Signed(
    "app:emails",
    "m-1",
    {"x_kq": 1, "priority": "high", "n": 1, "ratio": 1.0, "urgent": True, "text": "1", "x_expires_at": NOW + 600.5},
    {"content_type": "application/json", "content_encoding": "utf-8", "type": "welcome", "delivery_mode": 2},
    b'{"to":"b@example.com"}',
)
ALPHABET = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"
DOCUMENT = Path(__file__).parents[2] / "docs" / "wire-format.md"


def signed_now(message: Signed, ring: Keyring = RING, **claims: Any) -> str:
    """Sign a message for an hour from `NOW`."""
    return sign(ring, message, **{"issued_at": NOW, "expires_at": NOW + 3600, **claims})


def refusal(x_sig: Any, message: Signed = MESSAGE, *, ring: Keyring = RING, now: float = NOW) -> str:
    """Return the reason for which a message is not trusted; fails if it is."""
    with pytest.raises(Unverified) as caught:
        verify(ring, x_sig, message, now=now)
    reason = str(caught.value)
    assert len(reason) <= 250
    assert reason.isprintable()
    return reason


def b64(raw: bytes) -> str:
    return base64.urlsafe_b64encode(raw).rstrip(b"=").decode()


def claims_of(x_sig: str) -> Any:
    text = x_sig.split(".")[1]
    return json.loads(base64.urlsafe_b64decode(text + "=" * (-len(text) % 4)))


def by_the_book(message: Signed, claims: str) -> bytes:
    """Return what a MAC is over, written from the documentation alone."""

    def value(of: Any) -> bytes:
        if of is None or of is True or of is False:
            return {None: b"n", True: b"t", False: b"f"}[of]
        if isinstance(of, int):
            return b"i" + of.to_bytes(8, "big", signed=True)
        if isinstance(of, float):
            return b"d" + struct.pack(">d", of)
        if isinstance(of, (str, bytes)):
            raw = of.encode() if isinstance(of, str) else of
            return (b"s" if isinstance(of, str) else b"b") + len(raw).to_bytes(4, "big") + raw
        pairs = sorted((key.encode(), key, item) for key, item in of.items())
        return b"m" + len(pairs).to_bytes(4, "big") + b"".join(value(key) + value(item) for _, key, item in pairs)

    properties = [message.properties.get(name) for name in ("type", "content_type", "content_encoding")]
    headers = {key: item for key, item in message.headers.items() if not key.startswith("x_")}
    values = [
        message.message_id,
        *properties,
        message.headers.get("x_expires_at"),
        headers,
        sha256(message.body).digest(),
    ]
    return b"kq signature 1\n" + b"".join(map(value, [*values, claims]))


def forged(claims: str, secret: str = SECRET, message: Signed = MESSAGE) -> str:
    """Return a signature with a right MAC over any claims: what a holder of the key could make."""
    return f"1.{claims}.{b64(digest(secret.encode(), by_the_book(message, claims), 'sha256'))}"


# What holds ---------------------------------------------------------------------------------------


def test_a_signed_message_verifies() -> None:
    """The claims come back as they were signed."""
    x_sig = signed_now(
        MESSAGE, actor_id="user:17", actor_meta={"role": "clerk", "n": [1, 2.5, None]}, groups=["a", "b"]
    )
    assert verify(RING, x_sig, MESSAGE, now=NOW) == Claims(
        "k1", "app:emails", NOW, NOW + 3600, "user:17", {"role": "clerk", "n": [1, 2.5, None]}, ("a", "b")
    )
    assert re.fullmatch(r"1\.[A-Za-z0-9_-]+\.[A-Za-z0-9_-]{43}", x_sig)


def test_a_message_without_an_actor() -> None:
    """Nobody's message is signed as nobody's."""
    found = verify(RING, signed_now(MESSAGE), MESSAGE, now=NOW)
    assert (found.actor_id, found.actor_meta, found.groups) == (None, {}, ())


def test_an_actor_with_frozen_meta() -> None:
    """Read-only mappings and tuples travel as JSON's objects and lists, in any script."""
    meta = MappingProxyType({"roles": ("clerk", "Zoë"), "at": MappingProxyType({"s": "\U0001f600\n"})})
    found = verify(RING, signed_now(MESSAGE, actor_id="ü", actor_meta=meta), MESSAGE, now=NOW)
    assert (found.actor_id, found.actor_meta) == ("ü", {"roles": ["clerk", "Zoë"], "at": {"s": "\U0001f600\n"}})


@pytest.mark.parametrize("key", ["x_kq", "x_attempts", "x_crashes", "x_due_at", "x_sig", "x_error_message", "x_"])
@pytest.mark.parametrize("value", [None, 1, "text", {"deep": [1]}, object()], ids=type)
def test_what_a_retry_changes_is_not_covered(key: str, value: Any) -> None:
    """What kq itself writes comes and goes, and the signature holds; so it does when other properties change."""
    x_sig = signed_now(MESSAGE)
    headers = {**MESSAGE.headers, key: value}
    assert verify(RING, x_sig, replace(MESSAGE, headers=headers), now=NOW)
    properties = {**MESSAGE.properties, "priority": 9, "timestamp": 5}
    assert verify(RING, x_sig, replace(MESSAGE, properties=properties), now=NOW)


def test_rotation() -> None:
    """Old and new key both verify while they are there; a message signed with a key taken away does not."""
    old = Keyring({"k1": SECRET}, sign_with="k1")
    both = Keyring({"k1": SECRET, "k2": OTHER}, sign_with="k2")
    new = Keyring({"k2": OTHER}, sign_with="k2")
    before, after = signed_now(MESSAGE, old), signed_now(MESSAGE, both)
    assert verify(both, before, MESSAGE, now=NOW).key_id == "k1"
    assert verify(both, after, MESSAGE, now=NOW).key_id == "k2"
    assert verify(new, after, MESSAGE, now=NOW).key_id == "k2"
    assert refusal(before, ring=new) == "unknown key 'k1'"
    assert refusal(after, ring=old) == "unknown key 'k2'"


def test_the_same_id_with_another_secret() -> None:
    """A key is its secret, not its id."""
    assert refusal(signed_now(MESSAGE), ring=Keyring({"k1": OTHER})) == "altered"


VALID = st.one_of(
    st.text(st.characters(codec="utf-8"), max_size=30),
    st.integers(-(2**63), 2**63 - 1),
    st.sampled_from(
        [0, 1, -1, 2**31, -(2**31), 2**31 - 1, 2**63 - 1, -(2**63), 0.0, -0.0, 1.0, 1e308, 5e-324, 2.0**53]
    ),
    st.booleans(),
    st.floats(allow_nan=False, allow_infinity=False),
)
VALID_HEADERS = st.dictionaries(
    st.text(st.characters(codec="utf-8"), min_size=1, max_size=20).filter(
        lambda key: not key.startswith(("x_", "x-")) and key not in ("task", "CC", "BCC", "priority")
    ),
    VALID,
    max_size=8,
)


@given(VALID_HEADERS, st.binary(max_size=50), st.none() | st.floats(NOW, NOW * 2))
def test_a_signature_survives_the_brokers(headers: dict[str, Any], body: bytes, expires_at: float | None) -> None:
    """What publishing accepts arrives by AMQP and by msgpack with the same types, and verifies."""
    wire: dict[str, Any] = {"x_kq": 1, **header.check(headers)}
    if expires_at is not None:
        wire["x_expires_at"] = expires_at
    properties = {"content_type": "application/json", "content_encoding": "utf-8", **header.properties(headers)}
    sent = Signed("app:emails", "m-1", wire, properties, body)
    wire["x_sig"] = signed_now(sent, actor_id="user:17")

    (table,), _ = loads("F", dumps("F", [wire]), 0)
    assert verify(RING, table["x_sig"], replace(sent, headers=table), now=NOW).actor_id == "user:17"

    packed = unpack(pack(Envelope("m-1", wire, properties, body)))
    arrived = Signed("app:emails", packed.id, packed.headers, packed.properties, packed.body)
    assert verify(RING, packed.headers["x_sig"], arrived, now=NOW).actor_id == "user:17"


@given(VALID_HEADERS, st.sampled_from([None, "", "welcome", "é", 7, 1.5, True]))
def test_a_signature_survives_rabbitmq_whole(headers: dict[str, Any], message_type: Any) -> None:
    """Properties too arrive as they were signed, those that are missing or empty included."""
    if message_type is not None:
        headers = {**headers, "message_type": message_type}
    properties = {"content_type": "application/json", "content_encoding": "utf-8", **header.properties(headers)}
    sent = Signed("app:emails", "m-1", headers, properties, b"1")
    envelope = to_envelope(read(written(Envelope("m-1", {**headers, "x_sig": signed_now(sent)}, properties, b"1"))))
    arrived = Signed("app:emails", envelope.id, envelope.headers, envelope.properties, envelope.body)
    assert verify(RING, envelope.headers["x_sig"], arrived, now=NOW)


def test_foreign_headers_are_covered() -> None:
    """Nothing, bytes, lists and tables, which AMQP carries too, are signed like everything else."""
    message = replace(MESSAGE, headers={"none": None, "raw": b"\xff", "list": [1, [2.0]], "table": {"a": {"b": "c"}}})
    x_sig = signed_now(message)
    assert verify(RING, x_sig, message, now=NOW)
    for key, value in (
        ("none", False),
        ("raw", "\xff"),
        ("list", [1, [2]]),
        ("table", {"a": {"b": "d"}}),
        ("list", []),
    ):
        assert refusal(x_sig, replace(message, headers={**message.headers, key: value})) == "altered"


# What does not ------------------------------------------------------------------------------------


def test_unsigned() -> None:
    """A message without a signature says so."""
    assert refusal(None) == "unsigned"


@pytest.mark.parametrize("change", [
    lambda x: "", lambda x: x.encode(), lambda x: 1, lambda x: True, lambda x: [x], lambda x: {}, lambda x: "1..",
    lambda x: "2" + x[1:], lambda x: "01" + x[1:], lambda x: x[2:], lambda x: x + ".", lambda x: x + "=",
    lambda x: x + "\n",
    lambda x: " " + x, lambda x: x.rsplit(".", 1)[0], lambda x: x.replace(".", "", 1), lambda x: x[:-1],
    lambda x: x + "A",
    lambda x: x.replace(".", "=.", 1), lambda x: "\uff11" + x[1:], lambda x: x * 20,
    lambda x: "1." + "A" * 10**6 + "." + "A" * 43,
    lambda x: x[:40] + "é" + x[41:], lambda x: x[:40] + "\ud800" + x[41:], lambda x: x[:40] + "+" + x[41:],
    lambda x: x[:40] + "\0" + x[41:], lambda x: "1.A." + x[-43:], lambda x: "1.AAAAA." + x[-43:],
])  # fmt: skip
def test_malformed(change: Callable[[str], Any]) -> None:
    """What is no signature at all is told from one that is wrong."""
    assert refusal(change(signed_now(MESSAGE))) == "malformed signature"


CLAIMS: dict[str, Any] = {"key": "k1", "queue": "app:emails", "issued_at_ms": 1_800_000_000_000,
                          "expires_at_ms": 1_800_003_600_000, "actor": None, "groups": []}  # fmt: skip


OTHER_CLAIMS: list[dict[str, Any]] = [
    {"key": ""}, {"key": 1}, {"key": "k" * 65}, {"key": "k 1"}, {"key": None}, {"key": ["k1"]}, {"queue": None},
    {"queue": 1},
    {"issued_at_ms": 1.0}, {"issued_at_ms": "1"}, {"issued_at_ms": True}, {"issued_at_ms": -1}, {"issued_at_ms": None},
    {"expires_at_ms": 2**53 + 1}, {"expires_at_ms": 1e12}, {"expires_at_ms": float("inf")},
    {"expires_at_ms": float("nan")},
    {"actor": "user:17"}, {"actor": []}, {"actor": {}}, {"actor": {"id": "a"}}, {"actor": {"id": 1, "meta": {}}},
    {"actor": {"id": "a", "meta": []}}, {"actor": {"id": "a", "meta": None}}, {"actor": {"id": "a", "meta": {},
    "b": 1}},
    {"actor": {"id": "a", "meta": {"n": float("nan")}}}, {"actor": {"id": "\ud800", "meta": {}}},
    {"groups": ["\udfff"]},
    {"groups": None}, {"groups": "clerks"}, {"groups": {}}, {"groups": [1]}, {"groups": [None]}, {"more": 1},
]  # fmt: skip


def test_claims_of_another_language() -> None:
    """Claims spelt by another JSON writer, from the documentation alone, are as good."""
    spelt = json.dumps({**dict(reversed(CLAIMS.items())), "actor": {"id": "Zoë \U0001f600", "meta": {}}}, indent=1)
    assert "\\u" in spelt
    found = verify(RING, forged(b64(spelt.encode())), MESSAGE, now=NOW)
    assert found.actor_id == "Zoë \U0001f600"


@pytest.mark.parametrize("raw", [
    b"", b"1", b"[]", b"null", b"{}", b"\xff", b"\xef\xbb\xbf{}", b"[" * 2000, b'{"a":' * 500, b"9" * 2900,
    b"{" + b" " * 50,
    json.dumps(CLAIMS).encode("utf-16"), json.dumps(CLAIMS).encode() + b"x",
    *[json.dumps({**CLAIMS, **change}).encode() for change in OTHER_CLAIMS],
    *[json.dumps({key: CLAIMS[key] for key in CLAIMS if key != missing}).encode() for missing in CLAIMS],
    json.dumps({**CLAIMS, "actor": {"id": "a", "meta": {"n": 0}}}).replace("0}}", "1e999}}").encode(),
])  # fmt: skip
def test_claims_of_another_shape(raw: bytes) -> None:
    """Claims that make no sense are malformed, also where a key has signed them."""
    assert refusal(forged(b64(raw))) == "malformed signature"


@pytest.mark.parametrize("size", [1, 2])
def test_one_spelling(size: int) -> None:
    """Bits left over in the last character are refused, though a lenient decoder would drop them."""
    # Spaces at the end, so that the claims end in an incomplete group of four characters.
    raw = json.dumps(CLAIMS).encode()
    raw += b" " * ((size - len(raw)) % 3)
    text = b64(raw)
    assert verify(RING, forged(text), MESSAGE, now=NOW)
    last = ALPHABET.index(text[-1])
    for other in (ALPHABET[last + 1], text[-1] + "=" * (3 - size)):
        respelt = text[:-1] + other
        assert base64.urlsafe_b64decode(respelt + "==") == raw
        assert refusal(forged(respelt)) == "malformed signature"
    # The same of the MAC, whose 43rd character has two bits to spare.
    x_sig = forged(text)
    assert refusal(x_sig[:-1] + ALPHABET[ALPHABET.index(x_sig[-1]) + 1]) == "altered"


def test_every_character_counts() -> None:
    """No character of a signature can be replaced by any other."""
    x_sig = signed_now(MESSAGE, actor_id="user:17", groups=["clerks"])
    reasons = set()
    for at, char in enumerate(x_sig):
        for other in ALPHABET + ".=+/ ":
            if other != char:
                reasons.add(refusal(x_sig[:at] + other + x_sig[at + 1 :]))
    assert {"altered", "malformed signature"} <= reasons
    assert all(reason in ("altered", "malformed signature") or "unknown key" in reason for reason in reasons)


def test_another_queue() -> None:
    """A message moved to another queue as it is says where it was to go."""
    moved = replace(MESSAGE, queue_id="app:payments")
    assert refusal(signed_now(MESSAGE), moved) == "signed for queue app:emails, arrived on app:payments"
    # What cannot be trusted at all says no more than that.
    assert refusal(signed_now(MESSAGE), replace(moved, body=b"1")) == "altered"


def test_reasons_are_short_and_printable() -> None:
    """Foreign text in a reason is clipped, and cannot forge lines in a log."""
    far = replace(MESSAGE, queue_id="a\nb\x1b[31m\u202e" + "q" * 1000)
    reason = refusal(signed_now(far))
    assert reason == f"signed for queue a?b?[31m?{'q' * 91}, arrived on app:emails"
    assert refusal(signed_now(MESSAGE), far).endswith("q" * 91)


@pytest.mark.parametrize(
    ("now", "reason"),
    [
        (NOW + 3599.999, None),
        (NOW + 3600, "expired 0.0 s ago"),
        (NOW + 3612.34, "expired 12.3 s ago"),
        (NOW - CLOCK_SKEW, None),
        (NOW - CLOCK_SKEW - 0.001, "issued in the future"),
    ],
)
def test_times(now: float, reason: str | None) -> None:
    """A signature holds from a minute before it was issued, for clocks that differ, until it expires."""
    x_sig = signed_now(MESSAGE)
    if reason is None:
        assert verify(RING, x_sig, MESSAGE, now=now)
    else:
        assert refusal(x_sig, now=now) == reason


def test_the_order_of_reasons() -> None:
    """The first thing that is wrong is named: shape, key, MAC, queue, time."""
    late = NOW + 9999
    elsewhere = replace(MESSAGE, queue_id="app:other")
    altered = replace(elsewhere, body=b"1")
    stranger = signed_now(MESSAGE, Keyring({"k9": OTHER}, sign_with="k9"))
    assert refusal(stranger + "=", altered, now=late) == "malformed signature"
    assert refusal(stranger, altered, now=late) == "unknown key 'k9'"
    assert refusal(signed_now(MESSAGE), altered, now=late) == "altered"
    assert refusal(signed_now(MESSAGE), elsewhere, now=late).startswith("signed for queue")
    assert refusal(signed_now(MESSAGE), now=late).startswith("expired")


@pytest.mark.parametrize("value", [
    2**70, datetime(2026, 1, 1, tzinfo=timezone.utc), {1: 2}, {"a": {b"b": 1}}, "\ud800", {1}, object(),
])  # fmt: skip
def test_values_that_no_signature_covers(value: Any) -> None:
    """A value that no message of kq carries is a reason at a worker, and refused at a publisher."""
    message = replace(MESSAGE, headers={"k": value})
    assert refusal(signed_now(MESSAGE), message).startswith("altered: no signature covers")
    with pytest.raises(errors.Invalid, match="signature: expected a message of text, numbers and bools, got"):
        signed_now(message)


@pytest.mark.parametrize("key", [1, None, b"k", "\ud800"])
def test_keys_that_no_signature_covers(key: Any) -> None:
    """So is a header whose key is no text."""
    headers = {**MESSAGE.headers, key: 1}
    assert refusal(signed_now(MESSAGE), replace(MESSAGE, headers=headers)).startswith("altered: no signature covers")


# Ten thousand mutations ---------------------------------------------------------------------------

ODD: list[Any] = ["", "1", "x", 0, 1, -1, 2**40, 0.0, -0.0, 1.0, 1.5, True, False, None, b"", b"1", [], ["1"], {},
{"a": 1},
                  float("nan"), float("inf"), 2**70, "\ud800", datetime(2026, 1, 1, tzinfo=timezone.utc)]  # fmt: skip
Case = tuple[Any, Signed]


def _message(random: Random) -> Signed:
    headers = {
        f"h{i}": random.choice(["", "1", "text", 0, 1, 7, 0.0, 1.0, 2.5, True, False])
        for i in range(random.randrange(5))
    }
    if random.random() < 0.5:
        headers["x_expires_at"] = NOW + random.randrange(1000) + 0.5
    properties: dict[str, Any] = {"content_type": "application/json", "content_encoding": "utf-8"}
    if random.random() < 0.5:
        properties["type"] = "welcome"
    return Signed(
        random.choice(["app:a", "app:b"]),
        f"m-{random.randrange(10**6)}",
        headers,
        properties,
        random.randbytes(random.randrange(1, 200)),
    )


def _text(random: Random, text: str) -> str:
    at = random.randrange(len(text) + 1)
    end = min(len(text), at + random.randrange(3))
    return (
        text[:at]
        + "".join(random.choice(ALPHABET + ".=+/ \n\0é\ud800") for _ in range(random.randrange(3)))
        + text[end:]
    )


def _bytes(random: Random, raw: bytes) -> bytes:
    at = random.randrange(len(raw))
    flipped = raw[:at] + bytes([raw[at] ^ 1 << random.randrange(8)]) + raw[at + 1 :]
    return random.choice(
        [flipped, raw[:at], raw[at + 1 :], raw + b"\0", raw + raw, b"", raw[::-1], raw[:at] + b" " + raw[at:]]
    )


def _body(random: Random, case: Case, other: Case) -> Case:
    return case[0], replace(case[1], body=random.choice([_bytes(random, case[1].body), other[1].body]))


def _header_value(random: Random, case: Case, other: Case) -> Case:
    key = random.choice([*case[1].headers, "x_expires_at"])
    return case[0], replace(case[1], headers={**case[1].headers, key: random.choice(ODD)})


def _header_key(random: Random, case: Case, other: Case) -> Case:
    headers: dict[Any, Any] = dict(case[1].headers)
    moved = headers.pop(random.choice(list(headers))) if headers else 1
    if random.random() < 0.7:
        keys = ["h0", "h9", "", "H0", "h0 ", "é", "\ud800", "x-death", "X_a", "x_expires_at", 1, None, b"h0"]
        headers[random.choice(keys)] = moved
    return case[0], replace(case[1], headers=headers)


def _header_swap(random: Random, case: Case, other: Case) -> Case:
    keys = list(case[1].headers)
    values = list(case[1].headers.values())
    random.shuffle(values)
    return case[0], replace(case[1], headers=random.choice([dict(zip(keys, values, strict=True)), other[1].headers]))


def _identity(random: Random, case: Case, other: Case) -> Case:
    changed = random.choice([_text(random, case[1].message_id), other[1].message_id, case[1].queue_id])
    return case[0], replace(case[1], message_id=changed)


def _queue(random: Random, case: Case, other: Case) -> Case:
    changed = random.choice(
        [_text(random, case[1].queue_id), other[1].queue_id, case[1].queue_id + ".dead", case[1].message_id]
    )
    return case[0], replace(case[1], queue_id=changed)


def _property(random: Random, case: Case, other: Case) -> Case:
    properties = dict(case[1].properties)
    name = random.choice(["type", "content_type", "content_encoding"])
    value = random.choice([*ODD, "application/msgpack", "binary", "utf8", "welcome", *properties.values()])
    if random.random() < 0.3:
        properties.pop(name, None)
    else:
        properties[name] = value
    return case[0], replace(case[1], properties=properties)


def _signature(random: Random, case: Case, other: Case) -> Case:
    x_sig = case[0]
    at = random.randrange(len(x_sig))
    return random.choice([_text(random, x_sig), x_sig[:at], x_sig[at:], x_sig + x_sig[at:], x_sig.swapcase(),
    x_sig[::-1],
                          x_sig[:at] + random.choice(ALPHABET) + x_sig[at + 1 :], *ODD]), case[1]  # fmt: skip


def _respelling(random: Random, case: Case, other: Case) -> Case:
    version, claims, mac = case[0].split(".")
    raw = base64.urlsafe_b64decode(claims + "=" * (-len(claims) % 4))
    last = ALPHABET.index(mac[-1]) ^ random.randrange(1, 4)
    claims, mac = random.choice([
        (claims + "=" * random.randrange(1, 4), mac),
        (claims, mac + "="),
        (claims, mac[:-1] + ALPHABET[last]),
        (claims[:-1] + ALPHABET[ALPHABET.index(claims[-1]) ^ random.randrange(1, 16)], mac),
        (claims + "A", mac),
        (b64(raw + b" "), mac),
        (b64(json.dumps(json.loads(raw)).encode()), mac),
        (b64(json.dumps(json.loads(raw), sort_keys=True, separators=(",", ":")).encode()), mac),
        (raw.decode(), mac),
        (base64.b32encode(raw).decode(), mac),
        (claims, base64.b16encode(base64.urlsafe_b64decode(mac + "=")).decode()),
    ])  # fmt: skip
    return f"{version}.{claims}.{mac}", case[1]


def _swapped(random: Random, case: Case, other: Case) -> Case:
    mine, theirs = case[0].split("."), other[0].split(".")
    return random.choice([
        (other[0], case[1]), (case[0], other[1]), (f"1.{mine[1]}.{theirs[2]}", case[1]), (f"1.{theirs[1]}.{mine[2]}",
        case[1]),
        (f"1.{theirs[1]}.{mine[2]}", other[1]), (f"1.{mine[2]}.{mine[1]}", case[1]),
    ])  # fmt: skip


def _claims(random: Random, case: Case, other: Case) -> Case:
    claims = claims_of(case[0])
    claims.update(
        random.choice(
            [
                {"key": "k2" if claims["key"] == "k1" else "k1"},
                {"key": "k9"},
                {"queue": "app:c"},
                {"issued_at_ms": 0},
                {"expires_at_ms": claims["expires_at_ms"] + 1},
                {"actor": {"id": "admin", "meta": {}}},
                {"actor": None if claims["actor"] else {"id": "a", "meta": {}}},
                {"groups": ["admins"]},
            ]
        )
    )
    text = b64(json.dumps(claims, separators=(",", ":")).encode())
    guess = forged(text, "a guess that is long enough, but wrong", case[1])
    return random.choice([guess, f"1.{text}.{case[0].split('.')[2]}"]), case[1]


MUTATIONS = (
    _body,
    _header_value,
    _header_key,
    _header_swap,
    _identity,
    _queue,
    _property,
    _signature,
    _respelling,
    _swapped,
    _claims,
)


def _meaning(case: Case) -> str:
    """Return what a signature is about; repr tells 1 from 1.0 and True. No expiry is the same as none given."""
    x_sig, message = case
    headers = {key: value for key, value in message.headers.items() if (key, value) != ("x_expires_at", None)}
    pairs = sorted((repr(key), repr(value)) for key, value in headers.items())
    properties = [message.properties.get(name) for name in ("type", "content_type", "content_encoding")]
    return repr((x_sig, message.queue_id, message.message_id, pairs, properties, message.body))


def test_ten_thousand_mutations() -> None:
    """Of 10,000 random mutations of signed messages none is accepted, and each gives a reason."""
    random = Random(20261124)
    cases: list[Case] = []
    while len(cases) < 40:
        message = _message(random)
        ring = Keyring({"k1": SECRET, "k2": OTHER}, sign_with=random.choice(["k1", "k2"]))
        actor: dict[str, Any] = random.choice(
            [{}, {"actor_id": "user:17", "actor_meta": {"role": "clerk"}, "groups": ["clerks"]}]
        )
        cases.append((signed_now(message, ring, **actor), message))
    for x_sig, message in cases:
        assert verify(RING, x_sig, message, now=NOW)
    count = dict.fromkeys(MUTATIONS, 0)
    reasons = set()
    while sum(count.values()) < 10_000:
        mutation = random.choice(MUTATIONS)
        case = random.choice(cases)
        mutant = mutation(random, case, random.choice(cases))
        # Some draws change nothing, or make one signed message of another.
        if _meaning(mutant) in map(_meaning, (case, *cases)):
            continue
        reasons.add(refusal(mutant[0], mutant[1])[:12])
        count[mutation] += 1
    assert min(count.values()) > 500
    assert {"unsigned", "malformed si", "unknown key ", "altered", "signed for q"} <= reasons


@given(
    st.text(max_size=100)
    | st.binary(max_size=20)
    | st.from_regex(r"1\.[A-Za-z0-9_-]{1,80}\.[A-Za-z0-9_-]{43}", fullmatch=True)
)
def test_noise_is_refused(noise: Any) -> None:
    """Whatever stands in the header, the answer is a reason."""
    assert refusal(noise)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=5,
)


@given(st.fixed_dictionaries({key: JSON | st.just(value) for key, value in CLAIMS.items()}))
def test_claims_of_noise(claims: dict[str, Any]) -> None:
    """Whatever a holder of the key signed as claims, they make sense or give a reason."""
    try:
        found = verify(RING, forged(b64(json.dumps(claims).encode())), MESSAGE, now=NOW)
    except Unverified:
        return
    assert found.queue_id == MESSAGE.queue_id
    assert found.issued_at <= NOW + CLOCK_SKEW
    assert found.expires_at > NOW


# Signing ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("claims", "text"),
    [
        ({"issued_at": -1}, "issued_at: expected seconds since the epoch"),
        ({"issued_at": True}, "issued_at: expected seconds since the epoch"),
        ({"expires_at": float("nan")}, "expires_at: expected seconds since the epoch"),
        ({"expires_at": float("inf")}, "expires_at: expected seconds since the epoch"),
        ({"expires_at": None}, "expires_at: expected seconds since the epoch, got a value of type NoneType"),
        ({"expires_at": NOW}, "expected expires_at after issued_at"),
        ({"actor_id": 17}, "expected an actor's id as text and meta as a mapping, got a value of type int"),
        ({"actor_meta": {"a": 1}}, "expected an actor's id as text"),
        ({"actor_id": "a", "actor_meta": "role"}, "meta as a mapping, got a value of type str and a value of type str"),
        (
            {"actor_id": "a", "actor_meta": {"n": float("nan")}},
            "the actor's meta holds a value of type float; expected JSON",
        ),
        ({"actor_id": "a", "actor_meta": {"n": {1: 2}}}, "the actor's meta holds a value of type dict; expected JSON"),
        ({"actor_id": "a", "actor_meta": {"n": b"raw"}}, "the actor's meta holds a value of type bytes; expected JSON"),
        ({"actor_id": "a", "actor_meta": {"n": 10**5000}}, "signature: "),
        ({"actor_id": "\ud800"}, "lone surrogate"),
        ({"groups": ["\ud800"]}, "lone surrogate"),
        ({"groups": "clerks"}, "expected a sequence of group names, got a value of type str"),
        ({"groups": [1]}, "expected a sequence of group names"),
    ],
)
def test_claims_that_cannot_be_signed(claims: dict[str, Any], text: str) -> None:
    """Claims that a verifier would refuse are refused at once, with what was expected."""
    with pytest.raises(errors.Invalid, match=re.escape(text)):
        signed_now(MESSAGE, **claims)


def test_deep_meta_is_refused() -> None:
    """Meta that is nested without end does not exhaust the stack."""
    meta: dict[str, Any] = {}
    for _ in range(10_000):
        meta = {"a": meta}
    with pytest.raises(errors.Invalid, match="the actor's meta is nested deeper than 64 levels"):
        signed_now(MESSAGE, actor_id="a", actor_meta=meta)


def test_a_signature_has_a_limit() -> None:
    """4 KiB pass, and verify; one more character of meta does not."""
    size, message = 0, ""
    for length in range(2500, 4000):
        try:
            x_sig = signed_now(MESSAGE, actor_id="a", actor_meta={"m": "x" * length})
        except errors.Invalid as error:
            message = error.message
            break
        size = len(x_sig)
        assert verify(RING, x_sig, MESSAGE, now=NOW)
    assert MAX_SIZE - 2 <= size <= MAX_SIZE
    assert "expected at most 4,096 bytes" in message
    assert "the actor's meta is too large" in message


def test_a_keyring_that_only_verifies() -> None:
    """Without ``sign_with`` nothing is signed."""
    with pytest.raises(errors.Invalid, match="this keyring only verifies; name the key that signs in sign_with"):
        signed_now(MESSAGE, Keyring({"k1": SECRET}))


def test_no_error_shows_a_secret() -> None:
    """Neither an error nor its traceback holds a secret, not even with the values of local variables."""
    failures: list[Callable[[], object]] = [
        lambda: signed_now(MESSAGE, Keyring({"k1": SECRET})),
        lambda: signed_now(replace(MESSAGE, headers={"k": object()})),
        lambda: signed_now(MESSAGE, actor_id="a", actor_meta={"m": "x" * 4096}),
        lambda: verify(RING, signed_now(MESSAGE), replace(MESSAGE, body=b""), now=NOW),
        lambda: verify(RING, signed_now(MESSAGE), replace(MESSAGE, headers={"k": object()}), now=NOW),
        lambda: verify(RING, "1.e30.x", MESSAGE, now=NOW),
        lambda: verify(RING, signed_now(MESSAGE), MESSAGE, now=NOW * 2),
    ]
    for fail in failures:
        with pytest.raises((errors.Invalid, Unverified)) as caught:
            fail()
        shown = "".join(traceback.TracebackException.from_exception(caught.value, capture_locals=True).format())
        assert caught.value.__context__ is None or caught.value.__suppress_context__
        assert "kq/signature.py" in shown
        assert SECRET not in shown + repr(caught.value) + str(caught.value) + repr(vars(caught.value))


# The documentation --------------------------------------------------------------------------------


def _example() -> Mapping[str, Any]:
    section = " ".join(DOCUMENT.read_text(encoding="utf-8").split("## Signatures", 1)[1].split())
    found: Mapping[str, Any] = json.loads(section.split("```json", 1)[1].split("```", 1)[0])
    return found


def test_the_documented_example() -> None:
    """The document's example is what kq signs, byte for byte, and what the document's rules give."""
    example = _example()
    message = Signed(
        example["queue_id"], example["message_id"], example["headers"], example["properties"], example["body"].encode()
    )
    ring = Keyring({example["key"]: example["secret"]}, sign_with=example["key"])
    x_sig = sign(
        ring,
        message,
        **{name: example[name] for name in ("issued_at", "expires_at", "actor_id", "actor_meta", "groups")},
    )
    assert x_sig == example["x_sig"]
    claims = x_sig.split(".")[1]
    assert by_the_book(message, claims).hex() == example["signed_bytes"]
    assert forged(claims, example["secret"], message) == x_sig
    assert verify(ring, example["x_sig"], message, now=example["issued_at"]).actor_id == example["actor_id"]


def test_the_documented_numbers() -> None:
    """The document's limits are the code's."""
    section = " ".join(DOCUMENT.read_text(encoding="utf-8").split("## Signatures", 1)[1].split())
    assert f"at most {MAX_SIZE:,} characters" in section
    assert f"{len(PREFIX)} bytes `{PREFIX.decode().rstrip()}` and a line feed" in section
    assert f"at most {CLOCK_SKEW:g} s in the future" in section
