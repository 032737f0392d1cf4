from __future__ import annotations

import contextlib
from time import process_time
from typing import Any

import msgspec
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from kq.envelope import Envelope, bury, clean, identify, pack, pack_pieces, unpack, unpack_or_wrap
from kq.outcome import Failure, Outcome

TEXT = st.text(st.characters(codec="utf-8"), max_size=20)
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63 - 1)
    | st.floats(allow_nan=False)
    | TEXT
    | st.binary(max_size=20)
)
TABLES = st.dictionaries(
    TEXT, SCALARS | st.lists(SCALARS, max_size=3) | st.dictionaries(TEXT, SCALARS, max_size=3), max_size=5
)
HEADERS = {
    "priority": "high",
    "x_kq": 1,
    "x_attempts": 4,
    "x_due_at": 5.0,
    "x_expires_at": 9.0,
    "x_error_kind": "TIMEOUT",
}


@given(TEXT, TABLES, TABLES, st.binary())
def test_pack_round_trip(id: str, headers: dict[str, Any], properties: dict[str, Any], body: bytes) -> None:
    """An envelope comes back from its bytes as it was."""
    envelope = Envelope(id, headers, properties, body)
    assert unpack(pack(envelope)) == envelope


@given(st.lists(st.binary(max_size=10) | st.sampled_from([bytes(255), bytes(256), bytes(65_536)]), max_size=5))
def test_pieces_are_packed_like_the_whole(pieces: list[bytes]) -> None:
    """However long they are together, and however many."""
    envelope = Envelope("m-1", dict(HEADERS), {"priority": 7}, b"")
    whole = Envelope("m-1", dict(HEADERS), {"priority": 7}, b"".join(pieces))
    assert pack_pieces(envelope, pieces) == pack(whole) == msgspec.msgpack.encode(whole)


@given(st.binary())
@example(b"\xdd\xff\xff\xff\xff")
@example(b"\x94\xa1a\x80\x80\xc6\xff\xff\xff\xff")
@example(b"\x94\xa1\xff\x80\x80\xc4\x00")
@example(b"\x94\xa1a\x81\xa1k\x81\x80\x01\x80\xc4\x00")
@example(b"\x94\xa1a\x81\xa1k" + b"\x91" * 100_000)
@example(b"\x94\xa1a\x80\x80\xa1a")
@example(b"\x93\xa1a\x80\x80")
def test_random_bytes_raise_only_value_error(raw: bytes) -> None:
    """Whatever lies in a broker, unpacking gives an envelope or a ValueError."""
    known_as = identify(raw, "other")
    try:
        envelope = unpack(raw)
    except ValueError:
        return
    assert isinstance(envelope.id, str)
    assert isinstance(envelope.body, bytes)
    assert known_as == envelope.id


@given(TEXT, TABLES, TABLES, st.binary())
def test_an_envelope_is_identified(id: str, headers: dict[str, Any], properties: dict[str, Any], body: bytes) -> None:
    """An envelope's id is read without the rest of it."""
    assert identify(pack(Envelope(id, headers, properties, body)), "other") == id


@pytest.mark.parametrize(
    "raw", [b"", b"\x90", b"\x91\x01", b"\x00not", b"\x94\xa1\xff\x80\x80\xc4\x00", b"\x94\xa1a\x81"]
)
def test_what_is_no_envelope_has_the_id_it_came_under(raw: bytes) -> None:
    """Bytes in which no id can be read are known by the id that they came under."""
    assert identify(raw, "other") == "other"


@given(st.binary(max_size=10), st.integers(0, 40))
def test_damaged_envelopes_raise_only_value_error(damage: bytes, at: int) -> None:
    """An envelope with bytes overwritten is an envelope or a ValueError."""
    raw = bytearray(pack(Envelope("m-1", dict(HEADERS), {"priority": 7}, b'{"a": 1}')))
    raw[at : at + len(damage)] = damage
    with contextlib.suppress(ValueError):
        unpack(bytes(raw))


@pytest.mark.parametrize("value", [1, "text", [], ["m", {}, {}], ["m", [], {}, b""], {"id": "m"}, None])
def test_other_msgpack_is_no_envelope(value: Any) -> None:
    """Well-formed msgpack of another shape is refused."""
    with pytest.raises(ValueError, match="not an envelope: "):
        unpack(msgspec.msgpack.encode(value))


def test_what_is_no_envelope_is_wrapped() -> None:
    """A stranger's bytes are kept whole, as the body of an envelope of unknown type."""
    assert unpack_or_wrap(b"\xc1 stranger", "m-9") == Envelope(
        "m-9", {}, {"content_type": "application/octet-stream"}, b"\xc1 stranger"
    )
    envelope = Envelope("m-1", {}, {}, b"1")
    assert unpack_or_wrap(pack(envelope), "m-9") == envelope


@pytest.mark.parametrize(
    ("properties", "level"),
    [
        ({}, 4),
        ({"priority": 0}, 0),
        ({"priority": 9}, 9),
        *(({"priority": v}, 4) for v in (10, -1, "9", None, 5.0, True)),
    ],
)
def test_priority_is_a_level_or_normal(properties: dict[str, Any], level: int) -> None:
    """A level from 0 to 9 counts; anything a stranger put there instead is normal."""
    assert Envelope("m", {}, properties, b"").priority == level


def test_clean_starts_anew() -> None:
    """A replayed message has the user's headers, the format version, its old id, and nothing else."""
    envelope = Envelope("m-1", dict(HEADERS), {"priority": 7}, b"1")
    assert clean(envelope) == Envelope("m-1", {"priority": "high", "x_kq": 1}, {"priority": 7}, b"1")
    assert envelope.headers == HEADERS


def test_clean_makes_nobody_ours() -> None:
    """A foreign message, without a format version, stays one."""
    assert clean(Envelope("m", {"a": 1, "x_attempts": 2}, {}, b"")).headers == {"a": 1}


def test_bury_says_why() -> None:
    """A dead letter keeps the message and adds queue, reason, time, counts and the last error."""
    envelope = Envelope("m-1", {"a": 1, "x_kq": 1, "x_due_at": 5.0}, {"priority": 7}, b"\xff")
    failure = Failure("INVALID", "bad", False, "Traceback ...")
    dead = bury(envelope, "app:a", Outcome("dead", 0.0, 5, 2, "max_attempts", failure), 123.5)
    assert (dead.id, dead.properties, dead.body) == ("m-1", {"priority": 7}, b"\xff")
    assert dead.headers == {
        "a": 1,
        "x_kq": 1,
        "x_attempts": 5,
        "x_crashes": 2,
        "x_original_queue": "app:a",
        "x_dead_letter_reason": "max_attempts",
        "x_dead_letter_time": 123.5,
        "x_error_kind": "INVALID",
        "x_error_message": "bad",
        "x_error_traceback": "Traceback ...",
    }
    assert envelope.headers == {"a": 1, "x_kq": 1, "x_due_at": 5.0}


@pytest.mark.parametrize(
    ("failure", "expected"),
    [(None, {}), (Failure("INVALID", "bad", False), {"x_error_kind": "INVALID", "x_error_message": "bad"})],
)
def test_bury_invents_no_error(failure: Failure | None, expected: dict[str, str]) -> None:
    """Without an error or a traceback there are no headers for them."""
    dead = bury(Envelope("m", {}, {}, b""), "app:a", Outcome("dead", reason="expired", failure=failure), 1.0)
    assert {key: value for key, value in dead.headers.items() if key.startswith("x_error")} == expected


@given(TABLES)
def test_a_buried_message_can_be_cleaned(headers: dict[str, Any]) -> None:
    """Dead-lettering and replaying leaves the user's headers as they were."""
    envelope = Envelope("m", {k: v for k, v in headers.items() if not k.startswith("x_")}, {}, b"1")
    outcome = Outcome("dead", 0.0, 5, 0, "max_attempts", Failure("INTERNAL", "no", True, "t"))
    assert clean(bury(envelope, "app:a", outcome, 1.0)) == envelope


def test_headers_with_lists_as_keys_are_none() -> None:
    """All of these have one hash as tuples: they are found before they are decoded, behind any body."""
    keys = [b"\xdc\x00\x10" + bytes(0xFF - (n >> bit & 1) for bit in range(16)) for n in range(50_000)]
    headers = b"\x81\xa1h\xdf" + len(keys).to_bytes(4, "big") + b"".join(key + b"\xc0" for key in keys)
    began = process_time()
    for parts in ((headers, b"\x80"), (b"\x80", headers)):
        raw = b"\x94\xa1a" + b"".join(parts) + b"\xc4\x01x"
        assert unpack_or_wrap(raw, "id") == Envelope("id", {}, {"content_type": "application/octet-stream"}, raw)
    assert process_time() - began < 5.0
