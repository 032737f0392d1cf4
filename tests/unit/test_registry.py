from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from kq import errors
from kq.backend import QueueSpec
from kq.config import Settings
from kq.registry import Registry, default_spec, difference, open_backend, queue_spec
from kq.retry import Backoff, RetryPolicy

DEFAULTS: dict[str, Any] = {
    "codec": "json/plain",
    "dead_letter": None,
    "max_attempts": 5,
    "max_crashes": 3,
    "retry": Backoff(),
    "max_length": None,
    "max_priority": None,
    "require_signature": False,
    "options": None,
}


def make(**settings: Any) -> Registry:
    """A registry that is not connected to anything."""
    return Registry("test", Settings(broker="memory://unit-registry", **settings))


def declared(queue_id: str = "app:a", **values: Any) -> QueueSpec:
    """A queue as ``app.queue`` declares it."""
    return queue_spec(queue_id, **{**DEFAULTS, **values})


def test_queue_defaults() -> None:
    """A queue declared with nothing but its id is the queue nobody described."""
    assert declared() == default_spec("app:a") == QueueSpec("app:a", dead_letter="app:a.dead")


def test_queue_values_are_kept() -> None:
    """Every argument ends up where it belongs."""
    spec = declared(
        codec="application/msgpack",
        dead_letter="app:d",
        max_attempts=1,
        max_crashes=2,
        retry=Backoff(3),
        max_length=10,
        max_priority=9,
        options={"amqp": {"queue_type": "classic"}},
    )
    assert spec == QueueSpec(
        "app:a", "application/msgpack", "app:d", RetryPolicy(1, 2, Backoff(3)), 10, 9, False,
        {"amqp": {"queue_type": "classic"}},
    )  # fmt: skip


def test_dead_letter_queues_have_none_of_their_own() -> None:
    """What fails in a dead-letter queue stays there."""
    assert declared("app:a.dead").dead_letter is None


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"codec": "pickle"}, "codec: expected one of json/plain, application/msgpack; got 'pickle'"),
        ({"dead_letter": "nope"}, "ill-formed queue id 'nope'"),
        ({"dead_letter": ""}, "queue id is empty"),
        ({"dead_letter": "app:a"}, "dead_letter: expected another queue than app:a itself"),
        ({"max_attempts": 0}, "max_attempts: expected an integer from 1 to 1,000,000, got 0"),
        ({"max_attempts": True}, "max_attempts: expected an integer .*, got True"),
        ({"max_attempts": "5"}, "max_attempts: expected an integer .*, got '5'"),
        ({"max_attempts": None}, "max_attempts: expected an integer .*, got None"),
        ({"max_crashes": 0}, "max_crashes: expected an integer from 1 to 1,000,000, got 0"),
        ({"retry": 5}, r"retry: expected a kq\.Backoff, got int"),
        ({"max_length": 0}, "max_length: expected an integer from 1 to 2,147,483,647, got 0"),
        ({"max_length": 1.5}, "max_length: expected an integer .*, got 1.5"),
        ({"max_priority": 0}, "max_priority: expected an integer from 1 to 255, got 0"),
        ({"max_priority": 256}, "max_priority: expected an integer from 1 to 255, got 256"),
        ({"require_signature": True}, "require_signature: signing is not available"),
        ({"options": []}, "options: expected a mapping .*, got list"),
        ({"options": {"kafka": {}}}, "options: unknown backend 'kafka'; expected one of .*amqp.*sqlite"),
        ({"options": {"amqp": 5}}, "options: amqp: expected a mapping, got int"),
    ],
)
def test_bad_declarations_are_refused(values: dict[str, Any], expected: str) -> None:
    """A bad value is Invalid; the error names it, what was expected and what was got."""
    with pytest.raises(errors.Invalid, match=expected):
        declared(**values)


def test_ill_formed_queue_id_is_refused() -> None:
    """The queue id itself is checked."""
    with pytest.raises(errors.Invalid, match="ill-formed queue id 'nope'"):
        declared("nope")


def test_declaring_is_idempotent() -> None:
    """The same declaration twice is one queue."""
    registry = make()
    assert registry.declare(declared()) == registry.declare(declared())
    assert registry.queues() == [declared()]


@pytest.mark.parametrize(
    ("values", "name"),
    [
        ({"codec": "application/msgpack"}, "codec"),
        ({"dead_letter": "app:d"}, "dead_letter"),
        ({"max_attempts": 6}, "max_attempts"),
        ({"max_crashes": 4}, "max_crashes"),
        ({"retry": Backoff(2)}, "retry"),
        ({"max_length": 5}, "max_length"),
        ({"max_priority": 5}, "max_priority"),
        ({"options": {"amqp": {}}}, "options"),
    ],
)
def test_another_declaration_is_a_conflict(values: dict[str, Any], name: str) -> None:
    """Other values for the same id are a conflict that names queue and argument; the first one stays."""
    registry = make()
    registry.declare(declared())
    with pytest.raises(errors.Conflict, match=f"queue app:a is declared already, with {name}=.*; got {name}="):
        registry.declare(declared(**values))
    assert registry.spec("app:a") == declared()


def test_difference_sees_signatures() -> None:
    """The one argument that cannot be declared yet is compared all the same."""
    assert "require_signature=False; got require_signature=True" in difference(
        declared(), replace(declared(), require_signature=True)
    )


def test_a_consumer_implies_its_queue() -> None:
    """A queue that is only consumed has default values, until somebody declares it."""
    registry = make()
    registry.imply("app:a")
    assert registry.is_declared("app:a")
    assert not registry.is_exact("app:a")
    assert registry.spec("app:a") == default_spec("app:a")
    registry.declare(declared(max_attempts=9))
    assert registry.is_exact("app:a")
    assert registry.queues() == [declared(max_attempts=9)]


def test_implying_a_declared_queue_changes_nothing() -> None:
    """A declaration wins over a consumer, whichever came first."""
    registry = make()
    registry.declare(declared(max_attempts=9))
    registry.imply("app:a")
    assert registry.spec("app:a").policy.max_attempts == 9
    assert registry.queues() == [declared(max_attempts=9)]


def test_dead_letter_queues_come_with_their_queue() -> None:
    """The dead-letter queue of a declared queue counts as declared and has none of its own."""
    registry = make()
    registry.declare(declared(dead_letter="app:d"))
    assert registry.is_declared("app:d")
    assert registry.spec("app:d") == QueueSpec("app:d", dead_letter=None)
    assert registry.dead_letters_of("app:a") == QueueSpec("app:d", dead_letter=None)


def test_unknown_queues_have_default_values() -> None:
    """A queue nobody declared is not declared, and has defaults."""
    registry = make()
    assert not registry.is_declared("app:z")
    assert registry.spec("app:z") == default_spec("app:z")
    assert registry.dead_letters_of("app:z").id == "app:z.dead"


def test_a_dead_letter_queue_has_no_dead_letters() -> None:
    """Asking for the dead letters of dead letters is Invalid, by name."""
    with pytest.raises(errors.Invalid, match=r"queue app:a\.dead is a dead-letter queue"):
        make().dead_letters_of("app:a.dead")


def test_backend_is_shared_and_opened_late() -> None:
    """One backend for all, opened at the first call, and a new one after close."""
    registry = make()
    resets: list[int] = []

    class Listener:
        def reset(self) -> None:
            resets.append(1)

    listener = Listener()
    registry.on_reset(listener.reset)
    registry.override(lease=5.0)
    first = registry.backend()
    assert registry.backend() is first
    own = registry.open()
    assert own is not first
    own.close()
    registry.close()
    registry.close()
    assert resets
    assert registry.backend() is not first
    registry.close()


def test_settings_are_fixed_by_the_first_use() -> None:
    """Changing settings of a connected app is a conflict, and a bad value is Invalid."""
    registry = make()
    registry.override(lease=5.0)
    assert registry.settings.lease == 5.0
    with pytest.raises(errors.Invalid, match="lease: expected a number from"):
        registry.override(lease=0.0)
    registry.backend()
    try:
        with pytest.raises(errors.Conflict, match="connected already"):
            registry.override(lease=6.0)
    finally:
        registry.close()


def test_a_fork_leaves_the_backend_behind() -> None:
    """A forked child neither uses nor closes its parent's backend."""
    registry = make()
    parents = registry.backend()
    registry.after_fork()
    mine = registry.backend()
    assert mine is not parents
    registry.close()
    parents.close()


def test_unknown_scheme_is_refused() -> None:
    """A scheme without a backend is Invalid, with those that exist."""
    with pytest.raises(errors.Invalid, match=r"no backend for kafka://; expected one of amqp://, .*sqlite://"):
        open_backend(Settings(broker="kafka://localhost"), "test")
