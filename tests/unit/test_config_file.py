"""``kq.yaml``: what is read from it, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from time import monotonic

import pytest

from kq import config_file, errors
from kq.config import resolve

Write = Callable[[str], str]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Writes a file and returns its path."""

    def write(text: str) -> str:
        path = tmp_path / "kq.yaml"
        path.write_text(text)
        return str(path)

    return write


def refused(path: str, **environment: str) -> str:
    """Return why a file is refused."""
    with pytest.raises(errors.Invalid) as caught:
        config_file.broker(path, environment)
    return str(caught.value)


def test_a_driver_names_the_broker(write: Write) -> None:
    """The file's driver is the app's broker."""
    path = write('version: "1.0"\nnamespace: shop\nentries:\n  - {kind: queue.driver.redis, url: "redis://h/1"}\n')
    assert config_file.broker(path, {}) == "redis://h/1"


def test_one_of_several_is_named_broker(write: Write) -> None:
    """Of several drivers the one named broker is the app's; without it the file is refused."""
    text = (
        "entries:\n"
        "  - {name: a, kind: queue.driver.memory, url: memory://a}\n"
        "  - {id: %s, kind: queue.driver.amqp, url: amqp://h}\n"
    )
    assert config_file.broker(write(text % "broker"), {}) == "amqp://h"
    assert "several drivers (a, b)" in refused(write(text % "b"))


def test_variables_are_looked_up(write: Write) -> None:
    """``${env:NAME}`` is the environment's, with a default after ``:-``; a missing one is named."""
    path = write("entries: [{kind: queue.driver.redis, url: 'redis://${env:HOST:-localhost}/${env:DB}'}]\n")
    assert config_file.broker(path, {"DB": "3"}) == "redis://localhost/3"
    assert config_file.broker(path, {"DB": "3", "HOST": "h"}) == "redis://h/3"
    assert "the environment has no DB" in refused(path)


def test_argument_over_environment_over_file_over_default(
    write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each names the broker where the ones before it do not."""
    path = write("entries: [{kind: queue.driver.memory, url: memory://file}]\n")
    environment = {"KQ_BROKER_URL": "memory://environment"}
    assert resolve({"broker": "memory://argument"}, environment, file=path).broker == "memory://argument"
    assert resolve({}, environment, file=path).broker == "memory://environment"
    assert resolve({}, {}, file=path).broker == "memory://file"
    assert resolve({}, {"KQ_CONFIG": path}).broker == "memory://file"
    monkeypatch.chdir(tmp_path)
    assert resolve({}, {}).broker == "memory://file"
    (tmp_path / "kq.yaml").unlink()
    assert resolve({}, {}).broker == "sqlite:///kq.db"


def test_every_mistake_is_named_with_its_line(write: Write) -> None:
    """All mistakes are told at once, each with file, line and a suggestion."""
    path = write(
        'version: "2.0"\nnamespce: shop\nentries:\n  - kind: queue.driver.reds\n'
        "  - kind: queue.driver.amqp\n    ulr: amqp://h\n  - kind: queue.driver.redis\n    url: amqp://user:c4nary@h\n"
    )
    why = refused(path)
    lines = why.splitlines()
    assert [line.removeprefix(path).split(":")[1] for line in lines[:5]] == ["2", "1", "4", "6", "5"]
    assert "unknown field 'namespce'" in why
    assert "did you mean namespace?" in why
    assert "did you mean queue.driver.redis?" in why
    assert "url is missing" in why
    assert "expected redis:// or rediss://" in why
    assert "c4nary" not in why


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("a: &x [1]\nb: *x\n", "anchors and aliases"),
        ("a: !!python/object/apply:os.system [echo]\n", "tags are not allowed"),
        ("entries: []\nentries: []\n", "given twice"),
        ("entries: [{kind: queue.driver.memory, kind: queue.driver.redis}]\n", "given twice"),
        ("<<: {a: 1}\n", "expected a name as key"),
        ("[" * 2000 + "]" * 2000, "nested deeper than 32"),
        ("a: " + "x" * 2**20, "larger than 1,048,576 bytes"),
        ("a: [", "not YAML"),
        ("- 1\n", "expected a mapping"),
        ("entries: 5\n", "expected a list"),
    ],
)
def test_hostile_files_are_refused_at_once(write: Write, text: str, why: str) -> None:
    """What could grow, build objects or say two things is refused, quickly."""
    path = write(text)
    started = monotonic()
    assert why in refused(path)
    assert monotonic() - started < 1.0


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    """A file that was named must be there; the usual one need not."""
    assert "cannot be read" in refused(str(tmp_path / "none.yaml"))
