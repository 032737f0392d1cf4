from __future__ import annotations

import asyncio
import contextvars
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from kq import security
from kq.errors import Invalid
from kq.security import Actor, Condition, Policy, Scope, can, context, current_actor, current_scope, decide

ONE, TWO = Actor("user:1"), Actor("user:2")
SCOPE = Scope(
    [
        Policy("one", actions="*", resources="app:*", conditions=[Condition("actor.id", "eq", "user:1")]),
        Policy("never", actions="*", resources="app:secret", effect="deny"),
    ]
)


@pytest.fixture(autouse=True)
def _default() -> Iterator[None]:
    yield
    security.set_strict(False)


def test_contexts_nest() -> None:
    """A context sets actor and scope, an inner one replaces them, and the end of each restores, also after an error."""

    def inner() -> None:
        with context(TWO, Scope()):
            assert current_actor() == TWO
            assert current_scope() is not SCOPE
            raise RuntimeError("TWO")

    assert (current_actor(), current_scope()) == (None, None)
    with context(ONE, SCOPE):
        assert (current_actor(), current_scope()) == (ONE, SCOPE)
        with pytest.raises(RuntimeError, match="TWO"):
            inner()
        assert (current_actor(), current_scope()) == (ONE, SCOPE)
    assert (current_actor(), current_scope()) == (None, None)


def test_acting_as_another_keeps_the_policies() -> None:
    """A context without a scope stays under the policies of the outer one."""
    with context(ONE, SCOPE), context(TWO):
        assert current_scope() is SCOPE
        assert not can("x", "app:orders")


def test_undefined_is_denied() -> None:
    """With actor and scope, only what a policy allows is allowed, in strict mode and without it."""
    with context(ONE, SCOPE):
        for strict in (False, True, None):
            assert can("x", "app:orders", strict=strict)
            assert not can("x", "app:secret", strict=strict)
            assert not can("x", "other:orders", strict=strict)
    with context(ONE, Scope()):
        assert not can("x", "app:orders", strict=False)
        assert decide("x", "app:orders").result == "undefined"


@pytest.mark.parametrize(("actor", "scope"), [(None, None), (ONE, None), (None, SCOPE)])
def test_strict_mode_decides_where_actor_or_scope_is_missing(actor: Any, scope: Any) -> None:
    """A missing actor or scope is denied in strict mode, allowed otherwise, and the reason says which is missing."""
    with context(actor, scope):
        assert can("x", "app:secret", strict=False)
        decision = decide("x", "app:orders", strict=True)
        assert (decision.result, decision.policy) == ("deny", None)
        assert f"no {'scope' if actor else 'actor'}" in decision.reason


def test_strict_comes_from_the_context_else_from_the_process() -> None:
    """The argument wins over the context, which wins over what the process has set."""
    assert can("x", "app:orders")
    security.set_strict(True)
    assert not can("x", "app:orders")
    assert can("x", "app:orders", strict=False)
    with context(None, strict=False):
        assert can("x", "app:orders")
        assert not can("x", "app:orders", strict=True)
        with context(None):
            assert not security.current_strict()
    assert security.current_strict()


def test_threads_with_a_copied_context() -> None:
    """A thread started with a copied context acts as its starter; one without acts as nobody."""
    seen: list[Actor | None] = []
    with context(ONE, SCOPE):
        copied = contextvars.copy_context()
        for target in (lambda: copied.run(lambda: seen.append(current_actor())), lambda: seen.append(current_actor())):
            # Python 3.14 can let threads inherit; an empty context says what is meant.
            empty = contextvars.Context()
            thread = threading.Thread(target=empty.run, args=(target,))
            thread.start()
            thread.join()
    assert seen == [ONE, None]


def test_tasks_keep_apart() -> None:
    """Concurrent tasks each have their own actor, over awaits and in threads they start."""

    async def act(actor: Actor) -> tuple[Any, ...]:
        with context(actor, SCOPE):
            before = current_actor()
            await asyncio.sleep(0)
            inner = await asyncio.create_task(inherited())
            return before, current_actor(), inner, await asyncio.to_thread(can, "x", "app:orders")

    async def inherited() -> Actor | None:
        return current_actor()

    async def both() -> Any:
        return await asyncio.gather(act(ONE), act(TWO))

    assert asyncio.run(both()) == [(ONE, ONE, ONE, True), (TWO, TWO, TWO, False)]


@pytest.mark.parametrize("given", [("user:1", SCOPE), (ONE, [SCOPE]), (1, None)])
def test_other_types_are_refused(given: Any) -> None:
    """A context takes an Actor and a Scope."""
    with pytest.raises(Invalid, match="context: expected"), context(*given):
        pytest.fail("entered")
