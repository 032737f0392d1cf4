"""Maps of which each key is a text, told from others."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kq import plain_keys
from kq.plain_keys import has_plain_keys

SCALARS = (
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats(allow_nan=False) | st.text() | st.binary()
)
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=20) | st.dictionaries(st.text(), inner, max_size=20), max_leaves=40
)


@given(VALUES, st.binary(max_size=20))
def test_what_has_only_texts_is_plain(value: Any, behind: bytes) -> None:
    """Whatever else is in it, and whatever follows."""
    assert plain_keys._walk(msgspec.msgpack.encode(value) + behind)


@given(VALUES, VALUES, VALUES.filter(lambda key: not isinstance(key, str)))
def test_another_key_is_found(before: Any, after: Any, key: Any) -> None:
    """Wherever it stands."""
    one, two, three = map(msgspec.msgpack.encode, (before, key, after))
    assert not plain_keys._walk(b"\x93" + one + b"\x82" + b"\xa1k" + three + two + one + three)


@given(st.binary())
def test_any_bytes_are_looked_at(data: bytes) -> None:
    """What is no msgpack may be either."""
    assert plain_keys._walk(data) in (True, False)


@pytest.mark.parametrize("extension", [-1, 5])
@pytest.mark.parametrize("size", [0, 1, 2, 4, 8, 16, 17, 300, 70_000])
def test_extensions_are_passed_over(extension: int, size: int) -> None:
    """Of any length."""
    ext = msgspec.msgpack.encode(msgspec.msgpack.Ext(extension, b"\x81\x90\xc0" * (size // 3) + b"x" * (size % 3)))
    assert plain_keys._walk(b"\x92" + ext + b"\x81\xa1k\xc0")
    assert not plain_keys._walk(b"\x92" + ext + b"\x81\x90\xc0")


def test_only_what_may_take_long_is_walked_through(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not a list of small maps, not a list of numbers, not what is short."""

    def walk(data: bytes) -> bool:
        raise AssertionError

    monkeypatch.setattr(plain_keys, "_walk", walk)
    values: list[Any] = [[{"a": [1], "b": "text"}] * 20_000, list(range(100)) * 1000, {str(n): n for n in range(100)}]
    assert all(has_plain_keys(msgspec.msgpack.encode(value)) for value in values)
