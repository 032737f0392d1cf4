from __future__ import annotations

import struct
from datetime import datetime, timezone
from decimal import Decimal
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kq.canonical import Uncoverable, encode
from kq.limit import MAX_NESTING

TEXT = st.text(st.characters(codec="utf-8"), max_size=8)
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63 - 1)
    | st.floats()
    | TEXT
    | st.binary(max_size=8)
    # Values that a careless encoding would mix up.
    | st.sampled_from(
        [0, 0.0, -0.0, False, 1, 1.0, True, "1", b"1", "", b"", "n", "None", "s\0\0\0\1a", 2**53, 2.0**53]
    )
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT | st.sampled_from("ab"), inner, max_size=3),
    max_leaves=8,
)


def decode(raw: bytes) -> list[Any]:
    """Read values back; each is (type, value), floats as their bytes, mappings as sorted pairs."""
    values, at = [], 0
    while at < len(raw):
        value, at = _decode_one(raw, at)
        values.append(value)
    return values


def _decode_one(raw: bytes, at: int) -> tuple[Any, int]:
    tag, at = raw[at : at + 1], at + 1
    if tag in b"ntf":
        return (tag, None), at
    if tag == b"i":
        return (tag, struct.unpack_from(">q", raw, at)[0]), at + 8
    if tag == b"d":
        return (tag, raw[at : at + 8]), at + 8
    (count,) = struct.unpack_from(">I", raw, at)
    at += 4
    if tag in b"sb":
        assert at + count <= len(raw)
        return (tag, raw[at : at + count]), at + count
    items = []
    for _ in range(count * (2 if tag == b"m" else 1)):
        item, at = _decode_one(raw, at)
        items.append(item)
    return (tag, items), at


def described(value: Any) -> Any:
    """Return a value as `decode` would, without encoding it."""
    if value is None or isinstance(value, bool):
        return ({None: b"n", True: b"t", False: b"f"}[value], None)
    if isinstance(value, int):
        return (b"i", value)
    if isinstance(value, float):
        return (b"d", struct.pack(">d", value))
    if isinstance(value, (str, bytes)):
        return (b"s", value.encode()) if isinstance(value, str) else (b"b", value)
    if isinstance(value, list):
        return (b"l", [described(item) for item in value])
    pairs = sorted(value.items(), key=lambda pair: pair[0].encode())
    return (b"m", [described(part) for pair in pairs for part in pair])


@given(st.lists(VALUES, max_size=4))
def test_what_is_encoded_can_be_read_back(values: list[Any]) -> None:
    """The bytes say all there is to say, types included; so no two inputs have the same bytes."""
    assert decode(encode(values)) == [described(value) for value in values]


@given(st.lists(VALUES, max_size=3), st.lists(VALUES, max_size=3))
def test_different_values_have_different_bytes(left: list[Any], right: list[Any]) -> None:
    """Two inputs have the same bytes only if they are the same in value and type."""
    same = [described(value) for value in left] == [described(value) for value in right]
    assert (encode(left) == encode(right)) is same


@given(VALUES, VALUES)
def test_no_value_begins_another(left: Any, right: Any) -> None:
    """The bytes of a value are never the beginning of another value's."""
    one, other = encode([left]), encode([right])
    assert one == other or not (one.startswith(other) or other.startswith(one))


def test_look_alikes_differ() -> None:
    """What Python, JSON or a careless encoding takes for equal is not."""
    alike: list[Any] = [
        1, 1.0, True, "1", b"1", [1], {"1": 1}, 0, 0.0, -0.0, False, None, "", b"", [], {}, [[]], [{}], {"": ""},
        ["a", "b"], ["ab"], ["ab", ""], {"a": "b"}, {"a": "b", "c": "d"}, {"a": {"c": "d"}}, [None], "null", "true",
    ]  # fmt: skip
    assert len({encode([value]) for value in alike}) == len(alike)
    assert len({encode(values) for values in (["a", "b"], ["ab"], ["", "ab"], [["a", "b"]], ["a", ["b"]])}) == 5


@given(st.dictionaries(TEXT, SCALARS, max_size=6), st.randoms())
def test_order_does_not_count(mapping: dict[str, Any], random: Any) -> None:
    """A mapping has the same bytes in whatever order its keys came."""
    keys = list(mapping)
    random.shuffle(keys)
    assert encode([{key: mapping[key] for key in keys}]) == encode([mapping])


def test_bytes() -> None:
    """The bytes are those that the documentation promises to other languages."""
    assert encode([None, True, False]) == b"ntf"
    assert encode([-2]) == b"i\xff\xff\xff\xff\xff\xff\xff\xfe"
    assert encode([0.5]) == b"d\x3f\xe0\0\0\0\0\0\0"
    assert encode(["é", b"\0"]) == b"s\0\0\0\2\xc3\xa9b\0\0\0\1\0"
    assert encode([(1,)]) == encode([[1]]) == b"l\0\0\0\1i\0\0\0\0\0\0\0\1"
    # U+FFFD comes before U+10000 in UTF-8, and after it in UTF-16.
    assert (
        encode([{"\U00010000": None, "\ufffd": None}]) == b"m\0\0\0\2s\0\0\0\3\xef\xbf\xbdns\0\0\0\4\xf0\x90\x80\x80n"
    )


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (2**63, "an integer of more than 64 bits"),
        (-(2**63) - 1, "an integer of more than 64 bits"),
        ("\ud800", "text with a lone surrogate"),
        ({"\udfff": 1}, "text with a lone surrogate"),
        ({1: 1}, "a mapping with keys that are no text"),
        ({"a": 1, b"b": 1}, "a mapping with keys that are no text"),
        (datetime(2026, 1, 1, tzinfo=timezone.utc), "a value of type datetime"),
        (Decimal(1), "a value of type Decimal"),
        ({1}, "a value of type set"),
        (object(), "a value of type object"),
    ],
)
def test_what_has_no_bytes(value: Any, reason: str) -> None:
    """A value of another type is refused by its type, wherever it is."""
    for place in ([value], [[value]], [{"a": value}]):
        with pytest.raises(Uncoverable, match=f"^{reason}$"):
            encode(place)


@pytest.mark.parametrize("wrap", [lambda value: [value], lambda value: {"a": value}])
def test_nesting(wrap: Any) -> None:
    """64 levels have bytes; more are refused, however many."""
    value: Any = wrap(1)
    for _ in range(MAX_NESTING - 1):
        value = wrap(value)
    assert encode([value])
    for more in (1, 10_000):
        deep = value
        for _ in range(more):
            deep = wrap(deep)
        with pytest.raises(Uncoverable, match="a value nested deeper than 64 levels"):
            encode([deep])
