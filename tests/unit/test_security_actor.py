from __future__ import annotations

import copy
import pickle
from enum import Enum
from typing import Any

import pytest

from kq.errors import Invalid
from kq.security import Actor


def test_equal_actors_are_one_key() -> None:
    """Two actors with the same id and facts are equal and hash alike."""
    one, two = Actor("user:1", {"role": "clerk", "teams": ["a"]}), Actor("user:1", {"teams": ["a"], "role": "clerk"})
    assert one == two
    assert len({one, two}) == 1
    assert one != Actor("user:1")
    assert one != Actor("user:2", {"role": "clerk", "teams": ["a"]})
    assert Actor("u", {"n": 1}) != Actor("u", {"n": True})


def test_meta_is_a_copy_that_nobody_can_change() -> None:
    """What the caller does to the mapping later does not reach the actor, nor can the view be written to."""
    roles = ["clerk"]
    given: dict[str, Any] = {"roles": roles, "org": {"unit": "x"}}
    actor = Actor("user:1", given)
    roles.append("admin")
    given["org"]["unit"] = "y"
    assert actor.meta["roles"] == ("clerk",)
    assert actor.meta["org"]["unit"] == "x"
    with pytest.raises(TypeError):
        actor.meta["org"]["unit"] = "y"
    with pytest.raises(AttributeError, match="cannot be changed"):
        actor.id = "user:2"
    with pytest.raises(AttributeError, match="cannot be changed"):
        del actor.id


def test_repr_shows_the_id_only() -> None:
    """Personal data in meta does not reach logs by way of a repr."""
    assert repr(Actor("user:1", {"email": "canary@example.com"})) == "Actor('user:1')"


def test_actors_cross_processes() -> None:
    """An actor is the same after pickling and copying."""
    actor = Actor("user:1", {"teams": ["a", {"b": None}]})
    assert pickle.loads(pickle.dumps(actor)) == actor
    assert copy.deepcopy(actor) == actor


@pytest.mark.parametrize("id", ["", "x" * 257, "a\nb", "a\x00", "a\u2028b", "\ud800", None, 1, b"x"])
def test_ids_that_could_forge_a_log_line_are_refused(id: Any) -> None:
    """An id is 1 to 256 printable characters."""
    with pytest.raises(Invalid, match="1 to 256 printable characters"):
        Actor(id)


def test_longest_id() -> None:
    """256 characters are allowed, and other alphabets and spaces too."""
    assert Actor("ж" * 255 + " ").id == "ж" * 255 + " "


DEEP: Any = "x"
for _ in range(20):
    DEEP = [DEEP]


@pytest.mark.parametrize(
    "meta", [[], "x", {1: "x"}, {"x": {2: "y"}}, {"x": object()}, {"x": b"canary"}, {"x": float("nan")}, {"x": 2**64}]
)
def test_meta_that_is_no_json_is_refused(meta: Any) -> None:
    """Meta is a mapping of JSON values, and the error does not show them."""
    with pytest.raises(Invalid) as caught:
        Actor("user:1", meta)
    assert "canary" not in str(caught.value)


def test_meta_nested_too_deep_is_refused() -> None:
    """Meta has a bounded depth, also where it holds itself."""
    loop: list[Any] = []
    loop.append(loop)
    for value in (DEEP, loop):
        with pytest.raises(Invalid, match="levels"):
            Actor("user:1", {"x": value})


def test_an_enum_is_what_it_stands_for() -> None:
    """A policy compares with that, not with the enum's name."""

    class Role(str, Enum):
        SUSPENDED = "suspended"

    actor = Actor(Role.SUSPENDED, {"role": Role.SUSPENDED})
    assert (actor.id, actor.meta["role"]) == ("suspended", "suspended")
    assert (type(actor.id), type(actor.meta["role"])) == (str, str)
