from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from msgspec import structs

import kq
from kq import errors
from kq.backend import BackendOptions, Publication, QueueSpec
from kq.config import Settings
from kq.driver import MAIN, Driver, Tls
from kq.envelope import Envelope
from kq.queue_spec import default_spec, difference, queue_spec
from kq.registry import Registry
from kq.retry import Backoff, RetryPolicy
from kq.scheme import open_backend

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

EVENTS = Driver("memory://unit-registry-events", "events")


def make(**settings: Any) -> Registry:
    """A registry that is not connected to anything."""
    return Registry("test", Settings(broker="memory://unit-registry", **settings))


def declared(queue_id: str = "app:a", **values: Any) -> QueueSpec:
    """A queue as ``app.queue`` declares it."""
    return queue_spec(queue_id, **{**DEFAULTS, **values})


def test_queue_defaults() -> None:
    """A queue declared with nothing but its id is the queue nobody described."""
    assert declared() == default_spec("app:a") == QueueSpec("app:a", dead_letter="app:a.dead")


def test_a_dead_letter_queue_has_none_of_its_own() -> None:
    """Whatever it is called and whoever is declared first; unless it names another one."""
    registry = make()
    for id in ("app:first", "app:implied"):
        registry.imply(id)
    registry.declare(declared("app:plain"))
    registry.declare(declared("app:chained", dead_letter="app:chain"))
    for id in ("first", "plain", "late", "chained"):
        registry.declare(declared(f"app:of-{id}", dead_letter=f"app:{id}"))
    registry.imply("app:late")
    assert {id: registry.spec(f"app:{id}").dead_letter for id in ("first", "plain", "late", "chained", "implied")} == {
        "first": None, "plain": None, "late": None, "chained": "app:chain", "implied": "app:implied.dead",
    }  # fmt: skip
    # The same once more, and no queue is left that nobody means.
    assert registry.declare(declared("app:plain")).dead_letter is None
    assert not registry.is_declared("app:plain.dead")
    assert registry.is_declared("app:implied.dead")


def test_a_relative_path_is_one_from_where_the_app_was_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A handler that goes elsewhere takes nothing along: what it publishes is where the worker looks for it."""
    for name in ("here ünd", "there"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / "here ünd")
    with kq.App("test", broker="sqlite:///kq.db") as app:
        monkeypatch.chdir(tmp_path / "there")
        app.publish("app:a", 1)
    assert [path.parent.name for path in tmp_path.rglob("kq.db")] == ["here ünd"]


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
        driver="events",
    )
    assert spec == QueueSpec(
        "app:a", "application/msgpack", "app:d", RetryPolicy(1, 2, Backoff(3)), 10, 9, False,
        {"amqp": {"queue_type": "classic"}}, driver="events",
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
        ({"require_signature": 1}, "require_signature: expected true or false, got 1"),
        ({"options": []}, "options: expected a mapping .*, got list"),
        ({"options": {"kafka": {}}}, "options: unknown backend 'kafka'; expected one of .*amqp.*sqlite"),
        ({"options": {"amqp": 5}}, "options: amqp: expected a mapping, got int"),
        ({"driver": "a b"}, "ill-formed driver name 'a b'"),
        ({"driver": 5}, "ill-formed driver name 5"),
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
        ({"driver": "events"}, "driver"),
    ],
)
def test_another_declaration_is_a_conflict(values: dict[str, Any], name: str) -> None:
    """Other values for the same id are a conflict that names queue and argument; the first one stays."""
    registry = make()
    registry.add_driver(EVENTS)
    registry.declare(declared())
    with pytest.raises(errors.Conflict, match=f"queue app:a is declared already, with {name}=.*; got {name}="):
        registry.declare(declared(**values))
    assert registry.spec("app:a") == declared()


def test_difference_sees_signatures() -> None:
    """The one argument that cannot be declared yet is compared all the same."""
    assert "require_signature=False; got require_signature=True" in difference(
        declared(), structs.replace(declared(), require_signature=True)
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
    registry.after_fork_in_child()
    mine = registry.backend()
    assert mine is not parents
    registry.close()
    parents.close()


def test_unknown_scheme_is_refused() -> None:
    """A scheme without a backend is Invalid, with those that exist."""
    with pytest.raises(errors.Invalid, match=r"no backend for kafka://; expected one of amqp://, .*sqlite://"):
        open_backend(Settings(broker="kafka://localhost"), "test")


# Drivers.


def with_events() -> Registry:
    """A registry with a second driver."""
    registry = make()
    registry.add_driver(EVENTS)
    return registry


def test_the_apps_own_driver_is_always_there() -> None:
    """Without a word about drivers there is one: the app's own broker, spoken to as by default."""
    registry = make()
    assert registry.drivers == {MAIN: Driver("memory://unit-registry")}
    assert registry.driver(MAIN) is registry.drivers[MAIN]


def test_adding_a_driver_is_idempotent() -> None:
    """The same driver twice is one, and it is found by its name."""
    registry = with_events()
    registry.add_driver(EVENTS)
    assert registry.driver("events") == EVENTS
    assert list(registry.drivers) == [MAIN, "events"]


def test_another_driver_of_one_name_is_a_conflict() -> None:
    """Other values for the same name are a conflict that names driver and argument, without a password."""
    registry = with_events()
    with pytest.raises(errors.Conflict, match="driver events is declared already, with timeout=None; got timeout=5"):
        registry.add_driver(replace(EVENTS, timeout=5))
    registry.add_driver(Driver("amqp://a:canary@host", "rabbit"))
    with pytest.raises(errors.Conflict, match="driver rabbit is declared already, with url=") as caught:
        registry.add_driver(Driver("amqp://a:canary2@host", "rabbit"))
    assert "canary" not in str(caught.value)
    assert registry.driver("events") == EVENTS


def test_an_unknown_driver_is_named_with_those_there_are() -> None:
    """A queue on a driver that nobody declared is Invalid, and the message names those that were."""
    registry = with_events()
    with pytest.raises(errors.Invalid, match=r"driver: expected one that the app declares \('events'\), got 'other'"):
        registry.declare(declared(driver="other"))
    assert registry.queues() == []
    with pytest.raises(errors.Invalid, match=r"the app declares \(none\), got 'other'"):
        make().driver("other")


@pytest.mark.parametrize(
    ("driver", "expected"),
    [
        (Driver("memory://", "a b"), "ill-formed driver name 'a b'"),
        (Driver("memory://", "-a"), "ill-formed driver name '-a'"),
        (Driver("memory://", "a" * 101), "ill-formed driver name"),
        (Driver("kafka://host", "a"), "driver a: broker: no backend for kafka://"),
        (Driver("nowhere", "a"), "driver a: broker: expected a URL such as"),
        (Driver(5, "a"), "driver a: url: expected a broker's URL, got int"),  # type: ignore[arg-type]
        (Driver("memory://", "a", virtual_host="v"), "driver a: virtual_host: memory:// has none"),
        (Driver("memory://", "a", timeout=0), "driver a: timeout: expected seconds from 0.001 to 3,600, got 0"),
        (Driver("memory://", "a", heartbeat=True), "driver a: heartbeat: expected seconds .*, got True"),
        (Driver("memory://", "a", connect_timeout=-1), "driver a: connect_timeout: expected seconds .*, got -1"),
        (Driver("memory://", "a", reconnect_max=0.05), "driver a: reconnect_max: expected at least reconnect_initial"),
    ],
)
def test_bad_drivers_are_refused(driver: Driver, expected: str) -> None:
    """A bad value of a driver is Invalid where it is declared; the message names driver and value."""
    registry = make()
    with pytest.raises(errors.Invalid, match=expected):
        registry.add_driver(driver)
    assert list(registry.drivers) == [MAIN]


def test_the_apps_own_broker_can_be_described() -> None:
    """A driver of the app's own name says how its own broker is spoken to, if it is that broker."""
    registry = make()
    described = Driver("memory://unit-registry", timeout=3)
    assert registry.add_driver(described) == described
    assert registry.driver(MAIN) == described
    with pytest.raises(errors.Conflict, match="the app's own driver is declared already, with url="):
        registry.add_driver(Driver("memory://other"))
    with pytest.raises(errors.Conflict, match="own driver is declared already, with timeout=3; got timeout=4"):
        registry.add_driver(replace(described, timeout=4))


def test_a_connected_driver_stays_as_it_is() -> None:
    """How the app's own broker is spoken to cannot change once it is connected."""
    registry = make()
    registry.backend()
    try:
        with pytest.raises(errors.Conflict, match="connected already"):
            registry.add_driver(Driver("memory://unit-registry", timeout=3))
    finally:
        registry.close()


def test_another_broker_is_spoken_to_as_by_default() -> None:
    """Overriding the broker drops all that was said of it, also where the URL is the same."""
    registry = make()
    described = Driver("memory://unit-registry", timeout=3)
    registry.add_driver(described)
    registry.override(broker="memory://unit-registry", lease=5.0)
    assert registry.driver(MAIN) == Driver("memory://unit-registry")
    registry.override(broker="memory://other")
    assert registry.driver(MAIN) == Driver("memory://other")


def test_each_driver_has_a_backend() -> None:
    """Backends are opened by driver, each once, and closed and left behind together."""
    registry = with_events()
    main, events = registry.backend(), registry.backend("events")
    assert main is not events
    assert registry.backend("events") is events
    with pytest.raises(errors.Conflict, match="connected already"):
        registry.override(lease=6.0)
    registry.close()
    assert registry.backend("events") is not events
    parents = registry.backend(), registry.backend("events")
    registry.after_fork_in_child()
    assert registry.backend("events") is not parents[1]
    registry.close()
    for backend in parents:
        backend.close()


def test_queues_are_declared_where_they_live() -> None:
    """A queue is made on its driver's broker, and on no other."""
    registry = with_events()
    spec = registry.declare(declared("app:declared", driver="events"))
    registry.ensure(spec)
    try:
        assert registry.backend("events").info(spec).message_count == 0
        with pytest.raises(errors.NotFound):
            registry.backend().info(spec)
    finally:
        registry.close()


def test_a_driver_without_words_takes_the_apps_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a driver does not say is the app's setting, or the default; what it says wins."""
    monkeypatch.setitem(sys.modules, "recording", SimpleNamespace(connect=lambda url, options: (url, options)))
    monkeypatch.setattr("kq.scheme.BUILT_IN", {"recording": "recording:connect"})
    settings = Settings(broker="recording://a", lease=5.0, heartbeat=7.0, publish_timeout=9.0)
    silent = Driver("recording://b", "b")
    wordy = Driver(
        "recording://c", "c", heartbeat=2, timeout=3, connect_timeout=4, connection_name="me", tls=Tls(verify=False)
    )
    seen: list[Any] = [open_backend(settings, "test", driver) for driver in (None, silent, wordy)]
    plain = BackendOptions(5.0, 7.0, 9.0, "test")
    said = BackendOptions(5.0, 2, 3, "me", 4, Tls(verify=False))
    assert seen == [("recording://a", plain), ("recording://b", plain), ("recording://c", said)]


@pytest.mark.parametrize("dead_letter", [None, "app:d"])
def test_dead_letters_live_with_their_queue(dead_letter: str | None) -> None:
    """A dead-letter queue that nobody declared, or that is only consumed, is on the driver of its queue."""
    name = dead_letter or "app:a.dead"
    for consumed in ("", "before", "after"):
        registry = with_events()
        if consumed == "before":
            registry.imply(name)
        registry.declare(declared(driver="events", dead_letter=dead_letter))
        if consumed == "after":
            registry.imply(name)
        assert registry.spec(name).driver == "events"
        assert registry.dead_letters_of("app:a") == QueueSpec(name, driver="events")


@pytest.mark.parametrize("order", [1, -1])
def test_dead_letters_on_another_driver_are_a_conflict(order: int) -> None:
    """A queue and its dead-letter queue on different drivers are a conflict that names both, whichever came first."""
    registry = with_events()
    first, second = [declared(driver="events", dead_letter="app:d"), declared("app:d")][::order]
    registry.declare(first)
    with pytest.raises(errors.Conflict, match=r"queue app:d holds the dead letters of app:a, .* driver='events'.*''"):
        registry.declare(second)
    assert registry.queues() == [first]


def test_queues_of_two_drivers_share_no_dead_letters() -> None:
    """Queues on different drivers cannot name one dead-letter queue: it would be two."""
    registry = with_events()
    registry.declare(declared(dead_letter="app:d"))
    with pytest.raises(errors.Conflict, match=r"app:d holds the dead letters of app:a .* another queue .* of app:b"):
        registry.declare(declared("app:b", driver="events", dead_letter="app:d"))


def test_all_queues_of_a_batch_are_to_be_declared() -> None:
    """A batch may be of several tasks, each with its own queue."""
    registry = make()
    try:
        known, new = registry.spec("app:known"), registry.spec("app:new")
        registry.ensure(known)
        first, second = (Publication(spec, Envelope("a", {}, {}, b""), 0.0) for spec in (known, new))
        assert registry.are_ensured(MAIN, [first])
        assert registry.are_ensured(MAIN, [first, first])
        assert not registry.are_ensured(MAIN, [second])
        assert not registry.are_ensured(MAIN, [first, second])
    finally:
        registry.close()
