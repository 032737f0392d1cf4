from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kq.errors import Invalid
from kq.security import OPERATORS, Actor, Condition
from kq.security.field import Request

ACTOR = Actor(
    "user:1", {"role": "clerk", "level": 3, "teams": ["a", "b"], "org": {"unit": {"name": "x"}}, "none": None}
)
META = {"n": 5, "f": 5.0, "s": "5", "t": True, "word": "hello", "a.b": "dotted", "x": {"y": 1}, "list": [1, "a"]}


def decide(field: str, operator: str, **given: Any) -> bool | None:
    return Condition(field, operator, **given).decide(Request(ACTOR, "queue.publish.queue", "app:emails", META))


@pytest.mark.parametrize(
    ("field", "operator", "value", "expected"),
    [
        ("actor.id", "eq", "user:1", True),
        ("actor.id", "ne", "user:1", False),
        ("action", "eq", "queue.publish.queue", True),
        ("resource", "ne", "app:emails", False),
        ("actor.meta.org.unit.name", "eq", "x", True),
        ("meta.a.b", "eq", "dotted", True),
        ("meta.x.y", "eq", 1, True),
        ("meta.x", "eq", {"y": 1}, True),
        ("meta.x", "eq", {"y": 2}, False),
        ("meta.x", "eq", {"z": 1}, False),
        ("meta.x", "eq", {"y": "1"}, None),
        ("actor.meta.teams", "eq", ["a", "b"], True),
        ("actor.meta.teams", "eq", ["a"], False),
        ("actor.meta.none", "eq", None, True),
        ("actor.meta.none", "eq", "x", None),
        ("meta.n", "eq", 5, True),
        ("meta.n", "eq", 5.0, True),
        ("meta.f", "eq", 5, True),
        ("meta.n", "eq", "5", None),
        ("meta.s", "eq", 5, None),
        ("meta.s", "ne", 5, None),
        ("meta.t", "eq", 1, None),
        ("meta.t", "eq", True, True),
        ("meta.t", "ne", False, True),
        ("meta.n", "lt", 6, True),
        ("meta.n", "lt", 5, False),
        ("meta.n", "lte", 5.0, True),
        ("meta.n", "gt", 4.5, True),
        ("meta.n", "gte", 6, False),
        ("meta.word", "lt", "world", True),
        ("meta.word", "gt", 3, None),
        ("meta.s", "lt", 6, None),
        ("meta.t", "lt", 6, None),
        ("meta.list", "lt", 6, None),
        ("actor.meta.role", "in", ["clerk", "admin"], True),
        ("actor.meta.role", "in", ["admin"], False),
        ("actor.meta.role", "in", [], False),
        ("actor.meta.role", "in", ["admin", 1], None),
        ("actor.meta.role", "in", [1, "clerk"], True),
        ("actor.meta.role", "nin", ["admin"], True),
        ("actor.meta.role", "nin", ["clerk"], False),
        ("meta.n", "in", ["5"], None),
        ("meta.n", "nin", ["5"], None),
        ("actor.meta.teams", "contains", "a", True),
        ("actor.meta.teams", "contains", "c", False),
        ("actor.meta.teams", "ncontains", "c", True),
        ("actor.meta.teams", "contains", 1, None),
        ("meta.word", "contains", "ell", True),
        ("meta.word", "ncontains", "ell", False),
        ("meta.word", "contains", 1, None),
        ("meta.n", "contains", 5, None),
        ("meta.x", "contains", "y", None),
        ("meta.word", "matches", "^h.*o$", True),
        ("meta.word", "matches", "l{3}", False),
        ("meta.word", "nmatches", "l{3}", True),
        ("meta.n", "matches", "5", None),
    ],
)
def test_operators(field: str, operator: str, value: Any, expected: bool | None) -> None:
    """Each operator is true, false, or undecided where types do not compare; nothing is coerced."""
    assert decide(field, operator, value=value) is expected


@pytest.mark.parametrize("field", ["meta.gone", "actor.meta.gone", "actor.meta.org.gone", "actor.meta.role.gone"])
def test_a_missing_field_decides_nothing_but_presence(field: str) -> None:
    """On a missing field every operator is undecided, negated ones too; exists is false, nexists true."""
    values: dict[str, Any] = {"in": ["x"], "nin": ["x"]}
    for operator in OPERATORS:
        if operator in ("exists", "nexists"):
            assert decide(field, operator) is (operator == "nexists")
        else:
            assert decide(field, operator, value=values.get(operator, "x")) is None
            assert decide("action", operator, value_from=field) is None


def test_null_is_there() -> None:
    """A field that is null exists."""
    assert decide("actor.meta.none", "exists") is True
    assert decide("actor.meta.none", "nexists") is False


def test_value_from_reads_another_field() -> None:
    """A condition compares two fields of one request."""
    assert decide("meta.n", "eq", value_from="meta.f") is True
    assert decide("meta.n", "gt", value_from="actor.meta.level") is True
    assert decide("meta.word", "in", value_from="actor.meta.teams") is False
    assert decide("meta.s", "eq", value_from="meta.n") is None
    assert decide("meta.word", "in", value_from="meta.n") is None
    assert decide("meta.word", "matches", value_from="meta.word") is True


def test_a_pattern_from_a_field_that_does_not_compile_is_undecided() -> None:
    """A regular expression that comes with the request fails without an error."""
    condition = Condition("meta.text", "matches", value_from="meta.pattern")
    for pattern in ("(", "(?=x)", "a{600}"):
        assert condition.decide(Request(ACTOR, "a", "r", {"text": "x", "pattern": pattern})) is None


@given(
    st.sampled_from(sorted({"eq": "ne", "in": "nin", "contains": "ncontains", "matches": "nmatches"}.items())),
    st.one_of(st.text(max_size=3), st.integers(), st.booleans(), st.none(), st.floats(), st.lists(st.text(max_size=2))),
    st.one_of(st.text("ab", max_size=3), st.integers(-3, 3), st.booleans(), st.lists(st.text(max_size=2))),
)
def test_a_negated_operator_is_the_opposite_or_undecided_too(pair: tuple[str, str], left: Any, right: Any) -> None:
    """``ne`` is true exactly where ``eq`` is false, and undecided where that is; so are the other pairs."""
    request = Request(ACTOR, "a", "r", {"left": left, "right": right})
    plain, negated = (Condition("meta.left", one, value_from="meta.right").decide(request) for one in pair)
    assert negated is (None if plain is None else not plain)


def test_exotic_values_are_undecided() -> None:
    """NaN, bytes, long texts and mappings that fail decide nothing, and raise nothing."""

    class Broken(Mapping[str, Any]):
        def __getitem__(self, key: str) -> Any:
            raise RuntimeError("broken")

        def __iter__(self) -> Iterator[str]:
            raise RuntimeError("broken")

        def __len__(self) -> int:
            raise RuntimeError("broken")

    def one(operator: str, value: Any, meta: Any) -> bool | None:
        return Condition("meta.x", operator, value).decide(Request(ACTOR, "a", "r", meta))

    loop: list[Any] = []
    loop.append(loop)
    assert one("eq", 1, {"x": float("nan")}) is None
    assert one("lt", 1, {"x": float("nan")}) is None
    assert one("eq", "x", {"x": b"x"}) is None
    assert one("matches", "x", {"x": "x" * 2000}) is None
    assert one("eq", 1, Broken()) is None
    assert Condition("meta.x", "eq", value_from="meta.x").decide(Request(ACTOR, "a", "r", {"x": loop})) is None


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"field": "actor.name", "operator": "exists"}, "field: expected one of actor.id"),
        ({"field": "actor.meta", "operator": "exists"}, "field: expected one of"),
        ({"field": "meta.", "operator": "exists"}, "field: expected one of"),
        ({"field": "meta.a..b", "operator": "exists"}, "field: expected one of"),
        ({"field": "acton", "operator": "exists"}, "did you mean 'action'"),
        ({"field": 1, "operator": "exists"}, "field: expected one of"),
        ({"field": "action", "operator": "equals", "value": 1}, "operator: expected one of eq, ne"),
        ({"field": "action", "operator": "matchs", "value": "x"}, "did you mean 'matches'"),
        ({"field": "action", "operator": ["eq"], "value": "x"}, "operator: expected one of"),
        ({"field": "action", "operator": "eq"}, "one of value and value_from, got neither"),
        ({"field": "action", "operator": "eq", "value": 1, "value_from": "resource"}, "got both"),
        ({"field": "action", "operator": "exists", "value": 1}, "neither value nor value_from, got value"),
        ({"field": "action", "operator": "eq", "value_from": "meta"}, "value_from: expected one of"),
        ({"field": "action", "operator": "in", "value": "abc"}, "expected a list, got a string"),
        ({"field": "action", "operator": "nin", "value": {"a": 1}}, "expected a list, got a mapping"),
        ({"field": "action", "operator": "lt", "value": True}, "expected a string or a number, got a bool"),
        ({"field": "action", "operator": "matches", "value": 1}, "expected a regular expression"),
        ({"field": "action", "operator": "matches", "value": "("}, "does not compile"),
        ({"field": "action", "operator": "eq", "value": object()}, "expected JSON values"),
        ({"field": "action", "operator": "eq", "valeu": 1}, "got 'valeu'; did you mean 'value'"),
        ({"operator": "eq", "value": 1}, "field is missing"),
        ({"field": "action", "value": 1}, "operator is missing"),
        (["field"], "expected a mapping"),
    ],
)
def test_ill_formed_conditions_are_refused_at_load(given: Any, expected: str) -> None:
    """A condition that can never work is refused when it is made, with what was expected."""
    with pytest.raises(Invalid) as caught:
        Condition.parse(given)
    assert expected in str(caught.value)


def test_conditions_are_values() -> None:
    """Equal conditions are equal, and nobody can change one."""
    one = Condition("meta.x", "in", ["a"])
    assert one == Condition.parse({"field": "meta.x", "operator": "in", "value": ["a"]})
    assert len({one, Condition("meta.x", "in", ["a"]), Condition("meta.x", "in", ["b"])}) == 2
    assert str(one) == "meta.x in ['a']"
    with pytest.raises(AttributeError, match="cannot be changed"):
        one.operator = "nin"
