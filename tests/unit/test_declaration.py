"""What files and Python say of one thing is one, or refused with both places."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import kq
from kq import errors
from kq.retry import Backoff

MakeApp = Callable[..., kq.App]


def on_email(payload: Any) -> None:
    """Handle nothing."""


def on_order(payload: Any) -> None:
    """Handle nothing else."""


@pytest.fixture
def configured(tmp_path: Path) -> MakeApp:
    """Makes an app on the entries of a file."""

    def configured(entries: str, head: str = "namespace: app") -> kq.App:
        path = tmp_path / "kq.yaml"
        path.write_text(f"{head}\nentries:\n{entries}")
        return kq.App("test", broker="memory://", config=str(path))

    return configured


def test_a_queue_of_a_file_is_declared(configured: MakeApp) -> None:
    """Every field arrives; what is not said is as the default."""
    app = configured(
        "  - {name: q, kind: queue.queue, codec: application/msgpack, dead_letter: {queue: d, max_attempts: 7},"
        " retry: {initial: 5s, jitter: none}, max_length: 10, max_priority: 3}\n"
    )
    spec = app.registry.spec("app:q")
    assert (spec.codec, spec.dead_letter, spec.max_length, spec.max_priority) == ("application/msgpack", "app:d", 10, 3)
    assert (spec.policy.max_attempts, spec.policy.max_crashes) == (7, 3)
    assert spec.policy.backoff == Backoff(5.0, jitter="none")
    assert app.registry.is_exact("app:q")


def test_fields_said_in_one_place_are_merged(configured: MakeApp) -> None:
    """Python adds to the file, and the same said twice is fine; once more in Python is idempotent."""
    app = configured("  - {name: q, kind: queue.queue, max_length: 10, dead_letter: {max_attempts: 7}}\n")
    for _ in range(2):
        spec = app.queue("app:q", max_attempts=7, max_crashes=2)
        assert (spec.max_length, spec.policy.max_attempts, spec.policy.max_crashes) == (10, 7, 2)
    assert app.registry.spec("app:q") == spec
    with pytest.raises(errors.Conflict, match="with max_crashes=2; got max_crashes=1"):
        app.queue("app:q", max_crashes=1)


def test_fields_that_differ_are_refused_with_both_places(configured: MakeApp) -> None:
    """Neither place wins: the error names file and line of both, also where Python says the default."""
    app = configured("  - {name: q, kind: queue.queue, dead_letter: {max_attempts: 7}}\n")
    with pytest.raises(errors.Conflict) as caught:
        app.queue("app:q", max_attempts=5)
    found = re.findall(r"at (\S+):(\d+)", caught.value.message)
    assert [Path(path).name for path, _ in found] == ["kq.yaml", "test_declaration.py"]
    assert found[0][1] == "3"
    assert app.registry.spec("app:q").policy.max_attempts == 7


def test_what_is_wrong_with_a_value_names_the_place(configured: MakeApp) -> None:
    """What only the declaration itself can find is told with the entry's place."""
    with pytest.raises(errors.Invalid, match=r"kq\.yaml:3.*dead_letter: expected another queue"):
        configured("  - {name: q, kind: queue.queue, dead_letter: {queue: q}}\n")


def test_consumers_of_a_file_wait_for_their_handlers(configured: MakeApp) -> None:
    """Making the app imports no handler; whoever publishes needs none. The queue is declared all the same."""
    app = configured("  - {id: w, kind: queue.consumer, queue: q, method: 'kq_nowhere:f'}\n")
    assert app.publish("app:q", 1)
    assert app.registry.is_declared("app:q")
    with pytest.raises(errors.Invalid, match=r"kq\.yaml:3: consumer w: method: there is no module 'kq_nowhere'"):
        app.drain(0.0)


def test_consumers_of_a_file_run(configured: MakeApp) -> None:
    """Bare names are looked up in the module that made the app, and options arrive."""
    app = configured(
        "  - {id: w, kind: queue.consumer, queue: q, method: on_email, concurrency: 4, prefetch: 20, timeout: 30s,"
        " max_attempts: 2, retry: {initial: 0}}\n"
    )
    app.declarations.load_handlers()
    app.declarations.load_handlers()
    (consumer,) = app.registry.router.of("app:q")
    assert consumer.handler is on_email
    assert (consumer.name, consumer.concurrency, consumer.prefetch, consumer.timeout) == ("w", 4, 20, 30.0)
    assert (consumer.max_attempts, consumer.backoff, consumer.auto_ack) == (2, Backoff(0.0), False)
    assert consumer.place.endswith("kq.yaml:3")


def test_the_same_consumer_in_both_places_is_one(configured: MakeApp) -> None:
    """Queue and function make a consumer; what the two places say is merged, or refused with both."""
    entry = "  - {id: w, kind: queue.consumer, queue: q, method: on_email, timeout: 30s}\n"
    app = configured(entry)
    app.consumer("app:q", concurrency=3)(on_email)
    app.declarations.load_handlers()
    (consumer,) = app.registry.router.of("app:q")
    assert (consumer.timeout, consumer.concurrency) == (30.0, 3)
    app = configured(entry)
    app.consumer("app:q", timeout=5)(on_email)
    with pytest.raises(
        errors.Conflict, match=r"timeout=30.0 at .*kq\.yaml:3, but timeout=5.0 at .*test_declaration\.py"
    ):
        app.declarations.load_handlers()


def test_other_functions_are_consumers_of_their_own(configured: MakeApp) -> None:
    """A queue may have one consumer from a file and one from Python; two of one name are refused."""
    app = configured("  - {id: w, kind: queue.consumer, queue: q, method: on_email}\n")
    app.consumer("app:q")(on_order)
    app.declarations.load_handlers()
    assert [consumer.name for consumer in app.registry.router.of("app:q")] == ["on_order", "w"]
    app = configured("  - {id: w, kind: queue.consumer, queue: q, method: on_email}\n")
    app.consumer("app:q", name="w")(on_order)
    with pytest.raises(errors.Conflict, match=r"consumer 'w' already \(.*test_declaration\.py:\d+\).*kq\.yaml:3"):
        app.declarations.load_handlers()


def test_origins_are_known(configured: MakeApp) -> None:
    """Every value of a queue knows where it was said."""
    app = configured("  - {name: q, kind: queue.queue, max_length: 10}\n")
    app.queue("app:q", max_attempts=7)
    assert app.declarations.origin("app:q", "max_length").endswith("kq.yaml:3")
    assert "test_declaration.py:" in app.declarations.origin("app:q", "max_attempts")
    assert app.declarations.origin("app:q", "codec") == "default"


def test_an_app_is_named_after_its_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``App.from_file`` takes the namespace for its name, and the file's driver for its broker."""
    path = tmp_path / "kq.yaml"
    path.write_text("namespace: shop\nentries: [{name: broker, kind: queue.driver.memory, url: 'memory://x'}]\n")
    app = kq.App.from_file(str(path))
    assert (app.name, app.registry.settings.broker) == ("shop", "memory://x")
    assert kq.App.from_file(str(path), broker="memory://y").registry.settings.broker == "memory://y"
    monkeypatch.chdir(tmp_path)
    assert kq.App.from_file().name == "shop"


def test_an_app_of_a_file_has_no_module(tmp_path: Path) -> None:
    """Bare method names are never looked up in whatever called kq, such as the library for command lines."""
    (tmp_path / "kq.yaml").write_text("entries: [{kind: queue.consumer, id: w, queue: a:b, method: on_email}]\n")
    app = kq.App.from_file(str(tmp_path / "kq.yaml"))
    with pytest.raises(errors.Invalid, match=r"there is no .*handlers\.py to find 'on_email' in; name a source"):
        app.declarations.load_handlers()


def test_all_that_is_wrong_with_values_is_told_at_once(configured: MakeApp) -> None:
    """Drivers, queues and consumers that cannot be are named together, each with its place."""
    with pytest.raises(errors.Invalid) as caught:
        configured(
            "  - {name: slow, kind: queue.driver.redis, url: 'redis://h', reconnect: {initial: 10s, max: 1s}}\n"
            "  - {id: broker, kind: queue.driver.memory, url: 'memory://'}\n"
            "  - {name: q, kind: queue.queue, dead_letter: {queue: q}}\n"
            "  - {name: w, kind: queue.consumer, queue: q, method: f, retry: {max: 99999d}}\n"
        )
    lines = [line.partition("kq.yaml:")[2] for line in caught.value.message.splitlines()]
    assert [line.partition(": ")[0] for line in lines] == ["3", "5", "6"]
    assert lines[0].startswith("3: driver app:slow: reconnect_max")


def test_all_missing_handlers_are_told_at_once(configured: MakeApp) -> None:
    """Each consumer whose function is not found is named; those that are found are registered."""
    app = configured(
        "".join(
            f"  - {{id: {name}, kind: queue.consumer, queue: q, method: '{__name__}:{name}'}}\n"
            for name in ("nope", "on_email", "nada")
        )
    )
    with pytest.raises(errors.Invalid, match=r"has no function 'nope'(.*)\n(.*)has no function 'nada'"):
        app.declarations.load_handlers()
    assert [consumer.name for consumer in app.registry.router] == ["on_email"]


def test_two_entries_of_one_function_are_two_consumers(configured: MakeApp) -> None:
    """An entry stands for a consumer of its own; only one of them is the one that Python declares."""
    entries = "".join(
        f"  - {{id: {name}, kind: queue.consumer, queue: q, method: '{__name__}:on_email', concurrency: {n}}}\n"
        for n, name in enumerate(("a", "b"), 1)
    )
    app = configured(entries)
    app.declarations.load_handlers()
    assert [(made.name, made.concurrency) for made in app.registry.router] == [("a", 1), ("b", 2)]
    app = configured(entries)
    app.consumer("app:q", timeout=3)(on_email)
    app.declarations.load_handlers()
    assert [(made.name, made.timeout) for made in app.registry.router] == [("a", 3.0), ("b", None)]


def test_what_both_say_fits_beside_the_others(configured: MakeApp) -> None:
    """An entry cannot give one of a queue's consumers another ``auto_ack`` than the others have."""
    app = configured(f"  - {{id: a, kind: queue.consumer, queue: q, method: '{__name__}:on_email', auto_ack: true}}\n")
    app.consumer("app:q")(on_email)
    app.consumer("app:q")(on_order)
    with pytest.raises(errors.Conflict, match="expected the same for all consumers of a queue"):
        app.declarations.load_handlers()


def test_the_fingerprint_knows_what_stands_in_certificates(tmp_path: Path) -> None:
    """They are read when somebody connects: a renewed one is news to whoever is connected."""
    certificate = tmp_path / "tls.crt"
    tls = kq.Tls(certificate=str(certificate))
    found = []
    for text in ("first", "first", "renewed"):
        certificate.write_text(text)
        driver = kq.Driver("rediss://localhost", tls=tls)
        found.append(kq.App("test", broker="memory://", drivers={"o": driver}).fingerprint())
    assert found[0] == found[1] != found[2]


def test_keys_in_a_file_and_in_python_are_a_conflict(tmp_path: Path) -> None:
    """They are not merged, and neither is dropped."""
    file = tmp_path / "kq.yaml"
    file.write_text("namespace: a\nsigning: {keys: {k1: '" + "a" * 64 + "'}}\n")
    with pytest.raises(errors.Conflict, match=r"signing: said here and at .*kq\.yaml"):
        kq.App("test", broker="memory://", config=str(file), signing=kq.Signing({"k1": "k" * 64}, "k1"))


def test_the_fingerprint_knows_drivers_of_python() -> None:
    """A worker has to start anew when a driver changes, wherever it was said."""
    prints = {kq.App("test", broker="memory://", drivers={"o": f"memory://{n}"}).fingerprint() for n in (1, 1, 2)}
    assert len(prints) == 2


def test_the_environment_wins_over_a_driver_s_heartbeat(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the environment or the program says of all connections wins over what a file says of one."""
    path = tmp_path / "kq.yaml"
    entry = "{name: broker, kind: queue.driver.redis, url: 'redis://localhost', heartbeat: 7s}"
    path.write_text(f"settings: {{heartbeat: 9s}}\nentries: [{entry}]\n")
    assert kq.App("test", config=str(path)).registry.driver("").heartbeat == 7.0
    assert kq.App("test", config=str(path), heartbeat=5).registry.driver("").heartbeat is None
    monkeypatch.setenv("KQ_HEARTBEAT", "3")
    app = kq.App("test", config=str(path))
    assert (app.registry.driver("").heartbeat, app.registry.settings.heartbeat) == (None, 3.0)


def test_the_fingerprint_knows_another_kq(monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker that is told to reload after an upgrade starts anew: its children would not speak as it does."""
    app = kq.App("test", broker="memory://")
    before = app.fingerprint()
    monkeypatch.setattr("kq.app.__version__", "another")
    assert app.fingerprint() != before
