from __future__ import annotations

import contextlib
import json
import math
from datetime import datetime, timezone
from decimal import Decimal
from enum import Enum
from time import process_time
from typing import Any
from uuid import UUID

import msgspec
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from kq import codec, errors

BOTH = pytest.mark.parametrize("one", [codec.JSON, codec.MSGPACK], ids=["json", "msgpack"])
TEXT = st.text(st.characters(codec="utf-8"))
LONG = "x" * 20_000
INTEGERS_64 = st.integers(-(2**63), 2**64 - 1)


def values(integers: st.SearchStrategy[int]) -> st.SearchStrategy[Any]:
    """JSON values with these integers."""
    leaves = st.none() | st.booleans() | integers | st.floats(allow_nan=False, allow_infinity=False) | TEXT
    return st.recursive(
        leaves, lambda inner: st.lists(inner, max_size=5) | st.dictionaries(TEXT, inner, max_size=5), max_leaves=15
    )


def nested(levels: int) -> Any:
    """A number inside this many lists."""
    value: Any = 1
    for _ in range(levels):
        value = [value]
    return value


def same(left: Any, right: Any) -> bool:
    """Equal, and of equal types throughout: 1, 1.0 and True are three values."""
    if type(left) is not type(right):
        return False
    if isinstance(left, list):
        return len(left) == len(right) and all(map(same, left, right))
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(same(left[key], right[key]) for key in left)
    if isinstance(left, float):
        return left == right and math.copysign(1, left) == math.copysign(1, right)
    return bool(left == right)


@given(values(st.integers()))
@example(10**4299)
@example(-0.0)
@example({"a": [1, 1.0, True]})
def test_json_round_trip(data: Any) -> None:
    """Every JSON value decodes to itself, types and integers of any size included."""
    assert same(codec.decode(codec.JSON.encode(data), "application/json", "utf-8", codec.MSGPACK), data)


@given(values(st.integers()))
@example(10**4299)
def test_json_round_trip_with_a_long_text(data: Any) -> None:
    """So does one that is long because of a text in it, which is written without being read back."""
    long = {"text": LONG, "data": data}
    assert same(codec.JSON.decode(codec.JSON.encode(long)), long)


@given(values(st.integers()))
def test_json_bodies_are_json_for_everybody(data: Any) -> None:
    """What is encoded here, Python's own json module reads as the same value."""
    assert same(json.loads(codec.JSON.encode(data)), data)


@given(values(INTEGERS_64))
def test_msgpack_round_trip(data: Any) -> None:
    """Every JSON value with integers of 64 bits decodes to itself through msgpack."""
    assert same(codec.decode(codec.MSGPACK.encode(data), "application/msgpack", "binary", codec.JSON), data)


def test_msgpack_carries_bytes() -> None:
    """Msgpack has bytes as well."""
    assert codec.MSGPACK.decode(codec.MSGPACK.encode({"raw": b"\x00\xff"})) == {"raw": b"\x00\xff"}


@BOTH
def test_tuples_become_lists(one: codec.Codec) -> None:
    """Tuples are written as lists, at any depth."""
    assert one.decode(one.encode({"a": (1, ("b",))})) == {"a": [1, ["b"]]}


@given(st.binary(), st.sampled_from([codec.JSON, codec.MSGPACK]))
@example(b"\xdd\xff\xff\xff\xff", codec.MSGPACK)
@example(b"\xdf\xff\xff\xff\xff", codec.MSGPACK)
@example(b"\x81\x80\x01", codec.MSGPACK)
@example(b"\x81\x01\x01", codec.MSGPACK)
@example(b"\xa1\xff", codec.MSGPACK)
@example(b"\x91" * 100_000, codec.MSGPACK)
@example(b"\xd6\xff\x00\x00\x00\x00", codec.MSGPACK)
@example(b"\xc7\x00\x05", codec.MSGPACK)
@example(b"[" * 100_000, codec.JSON)
@example(b'{"a":' * 100_000, codec.JSON)
@example(b'"\\ud800"', codec.JSON)
@example(b'"\xed\xa0\x80"', codec.JSON)
def test_random_bytes_never_raise_anything_else(body: bytes, one: codec.Codec) -> None:
    """Whatever a body holds, decoding gives a value or Undecodable."""
    try:
        value = codec.decode(body, None, None, one)
    except codec.Undecodable:
        return
    one.encode(value)


@given(st.text(), st.text())
def test_random_types_never_raise_anything_else(content_type: str, content_encoding: str) -> None:
    """Whatever type and encoding a message claims, decoding gives a value or Undecodable."""
    with contextlib.suppress(codec.Undecodable):
        assert codec.decode(b"1", content_type, content_encoding, codec.JSON) == 1


@pytest.mark.parametrize(
    "body", [b"NaN", b"[Infinity]", b"-Infinity", b"1e999", b"", b"{", b"[1] x", b"'a'", b"\xef\xbb\xbf1"]
)
def test_what_is_not_json(body: bytes) -> None:
    """NaN, infinities, floats out of range and broken bodies are undecodable, with a reason."""
    with pytest.raises(codec.Undecodable, match=r"the body is not JSON: ."):
        codec.decode(body, None, None, codec.JSON)


@pytest.mark.parametrize("value", [math.nan, math.inf, [{"a": -math.inf}]])
def test_msgpack_with_nan_is_undecodable(value: Any) -> None:
    """NaN and infinity are undecodable in msgpack, too, though it has words for them."""
    with pytest.raises(codec.Undecodable, match="expected a finite number"):
        codec.decode(msgspec.msgpack.encode(value), None, None, codec.MSGPACK)


def test_msgpack_with_other_keys_is_undecodable() -> None:
    """A mapping with keys that are no strings is undecodable."""
    with pytest.raises(codec.Undecodable, match="payload has the key 1; expected string keys"):
        codec.decode(msgspec.msgpack.encode({1: 2}), None, None, codec.MSGPACK)


def test_msgpack_with_keys_that_collide_costs_nothing() -> None:
    """All of these have one hash as tuples: a map of them would take a minute to be filled."""
    keys = [b"\xdc\x00\x10" + bytes(0xFF - (n >> bit & 1) for bit in range(16)) for n in range(50_000)]
    body = b"\xdf" + len(keys).to_bytes(4, "big") + b"".join(key + b"\xc0" for key in keys)
    began = process_time()
    with pytest.raises(codec.Undecodable, match="a map has a key that is no string"):
        codec.decode(body, None, None, codec.MSGPACK)
    assert process_time() - began < 5.0


def test_integers_have_a_limit_of_digits() -> None:
    """4,300 digits are a number, 4,301 are undecodable."""
    assert codec.decode(b"9" * 4300, None, None, codec.JSON) == 10**4300 - 1
    with pytest.raises(codec.Undecodable, match="not JSON: Integer value out of range"):
        codec.decode(b"9" * 4301, None, None, codec.JSON)


@BOTH
def test_nesting_limit_of_publishers(one: codec.Codec) -> None:
    """64 levels can be published, 65 cannot."""
    assert one.decode(one.encode(nested(64))) == nested(64)
    with pytest.raises(errors.Invalid, match="nested deeper than 64 levels"):
        one.encode(nested(65))


@pytest.mark.parametrize("pad", [0, 20_000])
def test_brackets_side_by_side_are_no_nesting(pad: int) -> None:
    """Many of them, or a few within a long text, are fine; too deep is too deep however long the rest is."""
    wide: list[Any] = [[[]] * 1000, {"a": "[{" * 100, "b": [{}] * 70}]
    for data in wide:
        assert codec.JSON.decode(codec.JSON.encode([data, "x" * pad])) == [data, "x" * pad]
    with pytest.raises(errors.Invalid, match="nested deeper than 64 levels"):
        codec.JSON.encode([nested(64), "x" * pad])
    with pytest.raises(codec.Undecodable, match="nested deeper than 64 levels"):
        codec.JSON.decode(msgspec.json.encode(["x" * pad, nested(64)]))


@BOTH
def test_nesting_limit_on_receipt(one: codec.Codec) -> None:
    """A body of 65 levels is undecodable, whoever wrote it."""
    body = (msgspec.json if one is codec.JSON else msgspec.msgpack).encode(nested(65))
    with pytest.raises(codec.Undecodable, match="nested deeper than 64 levels"):
        codec.decode(body, None, None, one)


@BOTH
def test_hopeless_nesting(one: codec.Codec) -> None:
    """Payloads deeper than the interpreter's stack, or that contain themselves, are Invalid."""
    circle: list[Any] = []
    circle.append(circle)
    for data in (nested(100_000), circle):
        with pytest.raises(errors.Invalid, match="nested deeper than 64 levels"):
            one.encode(data)


def test_brackets_in_text_are_no_nesting() -> None:
    """A text full of brackets is flat."""
    data = {"text": "[{" * 1000}
    assert codec.JSON.decode(codec.JSON.encode(data)) == data


class Colour(Enum):
    RED = "red"


@BOTH
@pytest.mark.parametrize("company", ["", LONG], ids=["short", "long"])
@pytest.mark.parametrize(
    "data",
    [
        {1: 2},
        {None: 1},
        {1, 2},
        object(),
        datetime.now(timezone.utc),
        Decimal("1.5"),
        UUID(int=1),
        Colour.RED,
        1j,
        lambda: 0,
    ],
    ids=lambda data: type(data).__name__,
)
def test_what_would_not_come_back_is_refused(one: codec.Codec, data: Any, company: str) -> None:
    """Types that would arrive as something else are refused, by their place in the payload."""
    with pytest.raises(errors.Invalid, match=r"not encodable: payload\.items\[1\] (is of type|has the key)"):
        one.encode({"items": [0, data], "text": company})


class Odd(int, Enum):
    """Its members are numbers, and their values, which msgspec writes, are texts."""

    def __new__(cls, text: str) -> Odd:
        """Return a number of this value."""
        member = int.__new__(cls, len(text))
        member._value_ = text
        return member

    FIVE = "fives"


@pytest.mark.parametrize("company", ["", LONG], ids=["short", "long"])
def test_what_is_a_number_and_a_text_is_the_number(company: str) -> None:
    """What a payload equals arrives, however long the rest of it is."""
    assert codec.JSON.decode(codec.JSON.encode([Odd.FIVE, company])) == [5, company]


@pytest.mark.parametrize("data", [b"raw", bytearray(b"raw")])
def test_json_has_no_bytes(data: Any) -> None:
    """Bytes are refused in JSON, with what is expected instead."""
    with pytest.raises(
        errors.Invalid, match=r"payload\.raw is of type byte.*; expected None, bool, int, float, str, list or dict$"
    ):
        codec.JSON.encode({"raw": data})


@BOTH
@pytest.mark.parametrize("data", [math.nan, math.inf, [-math.inf], {"text": LONG, "number": math.nan}])
def test_no_nan_is_published(one: codec.Codec, data: Any) -> None:
    """NaN and infinity are refused and never turned into null."""
    with pytest.raises(errors.Invalid, match="expected a finite number"):
        one.encode(data)


@BOTH
@pytest.mark.parametrize("data", ["\ud800", {"\udfff": 1}, ["a\ud800"], ["a\ud800", LONG]])
def test_lone_surrogates_are_refused(one: codec.Codec, data: Any) -> None:
    """A lone surrogate is no text."""
    with pytest.raises(errors.Invalid, match="lone surrogate"):
        one.encode(data)


@pytest.mark.parametrize("data", [10**4300, [-(10**5000)]], ids=["just", "far"])
def test_integers_that_nobody_could_read_are_not_published(data: Any) -> None:
    """An integer of more than 4,300 digits is refused."""
    with pytest.raises(errors.Invalid, match=r"not encodable as JSON: .*4300"):
        codec.JSON.encode(data)


@pytest.mark.parametrize("data", [2**64, -(2**63) - 1])
def test_msgpack_integers_have_64_bits(data: int) -> None:
    """Msgpack refuses larger integers."""
    with pytest.raises(errors.Invalid, match="not encodable as msgpack: "):
        codec.MSGPACK.encode(data)


@pytest.mark.parametrize("data", [None, "", b"", bytearray(), {}, [], ()])
def test_empty_data(data: Any) -> None:
    """None and empty strings, mappings and lists are nothing to publish."""
    assert codec.is_empty(data)


@pytest.mark.parametrize("data", [0, False, 0.0, " ", [None], {"a": None}, [[]]])
def test_data_that_is_not_empty(data: Any) -> None:
    """Zero and False are data."""
    assert not codec.is_empty(data)


@pytest.mark.parametrize(("name", "one"), [("json/plain", codec.JSON), ("application/msgpack", codec.MSGPACK)])
def test_codecs_have_names(name: str, one: codec.Codec) -> None:
    """A queue names its codec."""
    assert codec.named(name) is one


@pytest.mark.parametrize("name", ["pickle", "", None, [], "JSON/PLAIN"])
def test_unknown_codec(name: Any) -> None:
    """Another name is refused, with the ones that exist."""
    with pytest.raises(errors.Invalid, match="codec: expected one of json/plain, application/msgpack; got "):
        codec.named(name)


@pytest.mark.parametrize("content_type", ["application/json", "Application/JSON", "application/json; charset=utf-8"])
@pytest.mark.parametrize("content_encoding", ["utf-8", "UTF-8", "us-ascii", None, ""])
def test_content_types_that_are_read(content_type: str, content_encoding: str | None) -> None:
    """Type and encoding are compared as the standards say, and the encoding may be missing."""
    assert codec.decode(b"[1]", content_type, content_encoding, codec.MSGPACK) == [1]


@pytest.mark.parametrize("content_type", [None, ""])
def test_without_a_content_type_the_queue_decides(content_type: str | None) -> None:
    """A message without a content type is read by the queue's codec."""
    assert codec.decode(b"\x01", content_type, None, codec.MSGPACK) == 1
    assert codec.decode(b"1", content_type, None, codec.JSON) == 1


@pytest.mark.parametrize(
    "content_type", ["application/x-python-serialize", "application/x-yaml", "text/plain", ";", "json"]
)
def test_other_content_types_are_undecodable(content_type: str) -> None:
    """Pickle, YAML and all else are refused before a byte is parsed."""
    with pytest.raises(
        codec.Undecodable, match="is not accepted; expected application/json or application/msgpack"
    ) as caught:
        codec.decode(b"1", content_type, None, codec.JSON)
    assert repr(content_type) in str(caught.value)


@pytest.mark.parametrize(
    ("content_type", "content_encoding", "expected"),
    [
        ("application/json", "gzip", "utf-8"),
        ("application/json", "binary", "utf-8"),
        ("application/json", "utf-16", "utf-8"),
        ("application/msgpack", "utf-8", "binary"),
        ("application/msgpack", "zlib", "binary"),
    ],
)
def test_other_encodings_are_undecodable(content_type: str, content_encoding: str, expected: str) -> None:
    """Nothing is decompressed or transcoded; the error names the encoding and the one expected."""
    with pytest.raises(codec.Undecodable, match=f"content encoding '{content_encoding}' is not .*expected {expected}"):
        codec.decode(b"1", content_type, content_encoding, codec.JSON)


def test_long_keys_above_many_values_cost_nothing() -> None:
    """Where something is in a payload is put into words for an error only: a stranger chooses how long they are."""
    key, many = "k" * 200_000, 200_000
    payload: dict[str, list[Any]] = {key: [*([] for _ in range(65)), *[1] * many]}
    body = msgspec.json.encode(payload)
    assert codec.decode(body, "application/json", "utf-8", codec.JSON) == payload
    body = msgspec.msgpack.encode(payload)
    assert codec.decode(body, "application/msgpack", "binary", codec.MSGPACK) == payload
    with pytest.raises(errors.Invalid) as caught:
        codec.JSON.encode({key: [1] * many + [math.nan]})
    assert f"{key[:80]}[{many}] is nan" in str(caught.value)
    assert len(str(caught.value)) < 300
