from __future__ import annotations

import sys
import threading
import time
from typing import Any

import pytest

from kq.errors import Invalid
from kq.security import Actor, Policy, Scope
from kq.security.expression import Expression
from kq.security.field import Request

ACTOR = Actor("user:1", {"role": "clerk", "level": 3, "org": {"unit": "x"}, "ok": True})


def decide(source: str, **meta: Any) -> bool | None:
    return Expression(source).decide(Request(ACTOR, "queue.publish.queue", "app:orders", meta))


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ('actor.id == "user:1"', True),
        ('actor.meta.role in ["clerk", "admin"] and resource == "app:" + "orders"', True),
        ('actor.meta.org.unit == "x" and actor["meta"]["level"] == 3', True),
        ('startswith(action, "queue.") and endswith(resource, "orders") and len(resource) == 10', True),
        ('matches(resource, "^app:[a-z]+$") and lower("ABC") == "abc"', True),
        ("1 < actor.meta.level <= 3 and -actor.meta.level + 2 * 2 - 1 == 0", True),
        ('not ("x" in meta) or meta.x > 3', True),
        ('"x" not in meta', True),
        ('meta["content-type"] == "x"', None),
        ("actor.meta.ok", True),
        ("actor.meta.level", None),
        ("actor.meta.role and True", None),
        ("not actor.meta.role", None),
        ("actor.meta.gone == 1", None),
        ('actor.meta.level == "3"', None),
        ('actor.meta.level < "3"', None),
        ("True == 1", None),
        ("1 == 1.0", True),
        ("False and actor.meta.gone", False),
        ("True or actor.meta.gone", True),
        ('"a" + 1 == "a1"', None),
        ("True + 1 == 2", None),
        ("len(1) == 1 or True", None),
        ("1 in actor.meta", None),
        ("9223372036854775807 * 9223372036854775807 > 0", None),
        ("1e308 * 10 > 0", None),
        ('startswith("a")', None),
    ],
)
def test_expressions_are_as_strict_as_conditions(source: str, expected: bool | None) -> None:
    """A result is a bool; what is missing, does not compare or is no bool is undecided."""
    assert decide(source) is expected


@pytest.mark.parametrize(
    "source",
    [
        "",
        "1 +",
        "a b",
        "x == 1",
        "actr.id == 'x'",
        "actor == 1",
        "actor.role == 'x'",
        "actor.__class__",
        "meta = 1",
        "meta; meta",
        "import os",
        "__import__('os')",
        "(lambda: 1)()",
        "(lambda: True)",
        "actor.id.upper() == 'X'",
        "''.join(['a'])",
        "open('/etc/passwd')",
        "list(meta)",
        "len(x=meta)",
        "len(*[meta])",
        "9 ** 9 ** 9 ** 9 == 1",
        "1 << 999999 == 1",
        "1 / 0 == 1",
        "'%999999999d' % 1 == ''",
        "f'{actor}' == ''",
        "[x for x in [1]] == []",
        "[[y for y in meta] for x in meta] == []",
        "{x: x for x in meta} == {}",
        "all(x for x in meta)",
        "{} == {}",
        "{1} == {1}",
        "(1, 2) == meta",
        "resource[0:1] == 'a'",
        "b'x' == b'x'",
        "... == 1",
        "1j == 1",
        "(x := 1) == 1",
        "True if True else False",
        "~1 == 1",
        "actor.meta.ok is True",
        "+1 == 1",
        "await meta",
        "matches(resource, '(?=x)')",
        "matches(resource, '(')",
        r"resource == '\d'",
        "(" * 500 + "1" + ")" * 500,
        "-" * 1000 + "1 == 1",
        "not " * 100 + "True",
        "[" * 50 + "]" * 50,
        "meta" + ".a" * 400,
        "1 == 1" + " " * 1100 + "or True",
        "1 == 1\x00",
        None,
        7,
    ],
)
def test_anything_else_is_refused_at_load(source: Any) -> None:
    """No syntax beyond comparisons, logic and a few functions is accepted, and no Python object can be reached."""
    started = time.thread_time()
    with pytest.raises(Invalid):
        Expression(source)
    assert time.thread_time() - started < 0.5


@pytest.mark.parametrize(
    "source",
    [
        "'a' * 999999999 == 'a'",
        "[1] * 999999999 == [1]",
        "999999999 * '" + "a" * 500 + "' == ''",
        "1" + "*99999999999999999999" * 25 + " == 1",
        "'" + "a" * 400 + "'" + "+ meta.long" * 25 + " == ''",
        "matches(meta.long, '(a+)+$')",
        "matches(meta.letters, '(a+)+$')",
        "actor.meta.__class__ == 1",
        "meta['__class__']['__mro__'] == 1",
        "resource['__len__'] == 1",
        "actor.id.__class__ == 1",
    ],
)
def test_hostile_expressions_end_quickly_and_undecided(source: str) -> None:
    """Huge products, long strings, slow patterns and special names decide nothing, at once."""
    started = time.thread_time()
    found = decide(source, long="a" * 4000, letters="a" * 1000 + "!")
    assert found is (False if "letters" in source else None)
    assert time.thread_time() - started < 0.5


def test_a_policy_with_an_expression() -> None:
    """An expression is one more condition; where it cannot be decided a deny policy applies."""
    allow = Policy("a", actions="*", resources="*", expression='actor.meta.role == "clerk"')
    deny = Policy("d", actions="*", resources="*", effect="deny", expression="meta.size > 10")
    scope = Scope([allow, deny])
    assert scope.evaluate(ACTOR, "x", "y", {"size": 9}) == "allow"
    assert scope.evaluate(ACTOR, "x", "y", {"size": 11}) == "deny"
    assert scope.evaluate(ACTOR, "x", "y", {"size": "9"}) == "deny"
    assert scope.evaluate(ACTOR, "x", "y") == "deny"
    assert scope.evaluate(Actor("user:2", {"role": "guest"}), "x", "y", {"size": 9}) == "undefined"


def test_errors_name_the_policy_and_the_mistake() -> None:
    """A refused expression says what is wrong, with the nearest known name."""
    with pytest.raises(Invalid, match=r"policy 'p': expression 'acton == 1': expected one of .* did you mean 'action'"):
        Policy("p", actions="*", resources="*", expression="acton == 1")
    with pytest.raises(Invalid, match="does not parse"):
        Policy("p", actions="*", resources="*", expression="1 +")
    with pytest.raises(Invalid, match="did you mean 'startswith'"):
        Policy("p", actions="*", resources="*", expression="startwith(action, 'x')")


def test_without_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    """A policy with an expression is refused with the command that installs what it needs; others work."""
    monkeypatch.setitem(sys.modules, "simpleeval", None)
    with pytest.raises(Invalid, match=r"pip install 'kq-tasks\[policy\]'"):
        Policy("p", actions="*", resources="*", expression="True")
    assert Policy("p", actions="*", resources="*").covers("a", "b")


def test_threads_do_not_see_each_others_requests() -> None:
    """One expression decides several requests at once, each by its own values."""
    expression = Expression("meta.n == meta.m" + " and meta.n == meta.m" * 20)
    wrong: list[int] = []
    barrier = threading.Barrier(4)

    def work(number: int) -> None:
        barrier.wait()
        for index in range(300):
            same = (index + number) % 2 == 0
            meta = {"n": number, "m": number if same else -1}
            if expression.decide(Request(ACTOR, "a", "r", meta)) is not same:
                wrong.append(index)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
