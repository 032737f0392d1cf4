from __future__ import annotations

from collections.abc import Iterator
from dataclasses import FrozenInstanceError
from pathlib import Path
from typing import Any

import click
import pytest
from hypothesis import given
from hypothesis import strategies as st

import kq
from kq import config, config_file, errors
from kq.cli import main
from kq.config import Settings, hide_password, resolve, scheme, unknown_variables, variable_of


def test_defaults() -> None:
    """Without arguments and environment the documented defaults hold."""
    assert resolve({}, {}) == Settings(
        broker="sqlite:///kq.db",
        publish_timeout=10.0,
        lease=30.0,
        heartbeat=30.0,
        create_queues=True,
        max_body=2**20,
        max_deliveries=20,
        durability="warned",
    )


def test_environment_wins_over_defaults() -> None:
    """Every setting can be given as ``KQ_<NAME>``."""
    environment = {
        "KQ_BROKER_URL": "redis://localhost",
        "KQ_PUBLISH_TIMEOUT": "2.5",
        "KQ_LEASE": "3",
        "KQ_HEARTBEAT": "5",
        "KQ_CREATE_QUEUES": "no",
        "KQ_MAX_BODY": "1024",
        "KQ_MAX_DELIVERIES": "7",
        "KQ_DURABILITY": "required",
        "KQ_STRICT_MODE": "1",
        "KQ_ACTOR": "service:a",
        "KQ_GROUPS": "x, y",
    }
    assert set(environment) == {variable_of(setting) for setting in config.DEFAULTS}
    assert resolve({}, environment) == Settings(
        "redis://localhost", 2.5, 3.0, 5.0, False, 1024, 7, "required", True, "service:a", ("x", "y")
    )


def test_durations_have_units() -> None:
    """A variable takes what a file takes."""
    assert resolve({}, {"KQ_LEASE": "500ms", "KQ_HEARTBEAT": "1m"}).lease == 0.5
    assert resolve({}, {"KQ_HEARTBEAT": "1m"}).heartbeat == 60.0


def test_arguments_win_over_the_environment() -> None:
    """An argument wins, and None means that there is none."""
    environment = {"KQ_LEASE": "3", "KQ_BROKER_URL": "redis://localhost"}
    found = resolve({"lease": 4, "broker": None}, environment)
    assert (found.lease, found.broker) == (4.0, "redis://localhost")


def test_the_url_can_be_in_a_file(tmp_path: Path) -> None:
    """KQ_BROKER_URL_FILE names a file with the URL in it; space around it does not count."""
    file = tmp_path / "url"
    file.write_text("\n  redis://:secret@localhost/3 \n")
    environment = {"KQ_BROKER_URL_FILE": str(file)}
    assert resolve({}, environment).broker == "redis://:secret@localhost/3"
    assert resolve({"broker": "memory://x"}, environment).broker == "memory://x"
    assert resolve({}, {**environment, "KQ_BROKER_URL": ""}).broker == "redis://:secret@localhost/3"
    assert unknown_variables(environment) == []


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (None, "cannot read '{}': No such file or directory"),
        (b" \n", "'{}' is empty; expected the broker's URL"),
        (b"redis://:secret@h\nsecret", "'{}': expected the broker's URL and nothing else"),
        (b"secret\xff", "'{}' is not UTF-8"),
        (b"x" * 65_537, "'{}' is larger than 65,536 bytes"),
    ],
)
def test_a_bad_url_file_is_named(tmp_path: Path, data: bytes | None, expected: str) -> None:
    """A file that holds no URL is named, with what is wrong and nothing of what is in it."""
    file = tmp_path / "url"
    if data is not None:
        file.write_bytes(data)
    with pytest.raises(errors.Invalid) as caught:
        resolve({}, {"KQ_BROKER_URL_FILE": str(file)})
    assert caught.value.message == "KQ_BROKER_URL_FILE: " + expected.format(file)
    assert caught.value.__cause__ is None


def test_a_url_and_a_file_of_it_are_one_too_many(tmp_path: Path) -> None:
    """Both variables set is a mistake that names both, unless an argument wins over them."""
    environment = {"KQ_BROKER_URL_FILE": str(tmp_path / "url"), "KQ_BROKER_URL": "redis://localhost"}
    with pytest.raises(errors.Invalid, match="KQ_BROKER_URL and KQ_BROKER_URL_FILE are both set"):
        resolve({}, environment)
    assert resolve({"broker": "memory://x"}, environment).broker == "memory://x"


def test_a_false_argument_is_given() -> None:
    """False is an argument, and wins over a true variable."""
    assert resolve({"create_queues": False}, {"KQ_CREATE_QUEUES": "1"}).create_queues is False


def test_the_process_environment_is_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without an environment given, the process's own is read."""
    monkeypatch.setenv("KQ_LEASE", "12")
    monkeypatch.setenv("KQ_LAESE", "12")
    assert resolve({}).lease == 12.0
    assert any("KQ_LAESE" in warning for warning in unknown_variables())


def test_empty_variables_are_not_set() -> None:
    """An empty variable counts as none."""
    assert resolve({}, {"KQ_LEASE": "", "KQ_BROKER_URL": ""}) == Settings()


@pytest.mark.parametrize(
    ("text", "value"),
    [*((t, True) for t in ("1", "true", "YES", " on ")), *((t, False) for t in ("0", "False", "no", "OFF"))],
)
def test_booleans_in_the_environment(text: str, value: bool) -> None:
    """The usual words for true and false are read in any case."""
    assert resolve({}, {"KQ_CREATE_QUEUES": text}).create_queues is value


@pytest.mark.parametrize(
    ("variable", "text", "expected"),
    [
        ("KQ_LEASE", "soon", "expected a duration such as 30s, 500ms or 2h, got 'soon'"),
        ("KQ_LEASE", "nan", "expected a number from 0.1 to 86,400, got nan"),
        ("KQ_LEASE", "0", "expected a number from 0.1 to 86,400, got 0.0"),
        ("KQ_PUBLISH_TIMEOUT", "inf", "expected a number from 0.001 to 3,600, got inf"),
        ("KQ_MAX_BODY", "1.5", "expected an integer, got '1.5'"),
        ("KQ_MAX_BODY", "8388609", "expected a number from 1 to 8,388,608, got 8388609"),
        ("KQ_CREATE_QUEUES", "maybe", "expected true or false, got 'maybe'"),
    ],
)
def test_bad_variables_are_named(variable: str, text: str, expected: str) -> None:
    """An error says which variable, what was expected and what it holds."""
    with pytest.raises(errors.Invalid) as caught:
        resolve({}, {variable: text})
    assert caught.value.message == f"{variable}: {expected}"


@pytest.mark.parametrize(
    ("setting", "value", "expected"),
    [
        ("lease", "30", "lease: expected a number, got '30'"),
        ("lease", True, "lease: expected a number, got True"),
        ("lease", 86401, "lease: expected a number from 0.1 to 86,400, got 86401.0"),
        ("lease", float("nan"), "lease: expected a number from 0.1 to 86,400, got nan"),
        ("lease", 10**400, "lease: expected a number, got an integer beyond all floats"),
        ("heartbeat", 0.5, "heartbeat: expected a number from 1 to 3,600, got 0.5"),
        ("max_body", 1.5, "max_body: expected an integer, got 1.5"),
        ("max_body", True, "max_body: expected an integer, got True"),
        ("max_body", 0, "max_body: expected a number from 1 to 8,388,608, got 0"),
        ("max_deliveries", 0, "max_deliveries: expected a number from 1 to 1,000,000, got 0"),
        ("create_queues", 1, "create_queues: expected true or false, got 1"),
        ("broker", 5, "broker: expected a string, got int"),
    ],
)
def test_bad_arguments_are_named(setting: str, value: Any, expected: str) -> None:
    """An error says which argument, what was expected and what was got."""
    with pytest.raises(errors.Invalid) as caught:
        resolve({setting: value}, {})
    assert caught.value.message == expected


@pytest.mark.parametrize("value", [1, 2**23])
def test_max_body_can_be_raised_to_8_mib(value: int) -> None:
    """Both ends of the range are in it."""
    assert resolve({"max_body": value}, {}).max_body == value


def test_a_broker_of_another_type_is_not_shown() -> None:
    """There may be a password in it; and what derives from text is text."""

    class Dsn(str):
        def __repr__(self) -> str:
            return "Dsn"

    with pytest.raises(errors.Invalid, match=r"^broker: expected a string, got bytes$"):
        resolve({"broker": b"redis://:secret@host"}, {})
    found = resolve({"broker": Dsn("redis://:secret@host")}, {}).broker
    assert (type(found), found) == (str, "redis://:secret@host")


def test_settings_cannot_be_changed() -> None:
    """Settings are a value."""
    with pytest.raises(FrozenInstanceError):
        Settings().lease = 5.0  # type: ignore[misc]


def test_an_app_warns_of_unknown_variables_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Whoever starts no command would not hear of them otherwise."""
    monkeypatch.setenv("KQ_LEESE", "3")
    for name in ("one", "two"):
        kq.App(name, broker="memory://unknown").close()
    assert [record.getMessage() for record in caplog.records if record.name == "kq.config"] == [
        "the environment variable KQ_LEESE is not one that kq, or the app's file, reads; did you mean KQ_LEASE?"
    ]
    # Nor of a worker within the same program.
    assert config.untold_variables(()) == []
    monkeypatch.setattr(config, "_shows_unknown", True)
    monkeypatch.setenv("KQ_LEESE2", "3")
    kq.App("three", broker="memory://unknown").close()
    assert "LEESE2" not in caplog.text


def test_unknown_variables_are_warned_of() -> None:
    """Each unknown ``KQ_`` variable gets a line with the nearest known name; others are not ours."""
    found = unknown_variables({"KQ_LEESE": "3", "KQ_ZZZZZZ": "", "HOME": "/", "KQ_LEASE": "3", "KQ_PROCESSES": "2"})
    assert found == [
        "the environment variable KQ_LEESE is not one that kq, or the app's file, reads; did you mean KQ_LEASE?",
        "the environment variable KQ_ZZZZZZ is not one that kq, or the app's file, reads",
    ]


def test_every_option_has_its_variable() -> None:
    """Every option of every command can be given as ``KQ_<NAME>``, and no other variable is known."""
    settings = {variable_of(setting) for setting in config.DEFAULTS}
    found = set()
    for command in walk(main):
        for option in command.params:
            if isinstance(option, click.Option) and option.name not in ("help", "version"):
                # The broker's is read where apps are made.
                assert option.envvar or option.name == "broker", f"{command.name}: {option.name}"
                found.add(option.envvar)
    assert found - {None} - settings == config.COMMAND_VARIABLES


def walk(command: click.Command) -> Iterator[click.Command]:
    """Yield every command in a group of commands."""
    if isinstance(command, click.Group):
        context = click.Context(command)
        for name in command.list_commands(context):
            inner = command.get_command(context, name)
            assert inner is not None
            yield from walk(inner)
    else:
        yield command


def test_variables_that_a_file_names_are_known() -> None:
    """A file may keep its own settings in variables of the prefix."""
    assert unknown_variables({"KQ_SIGNING_KEY": "x"})
    assert unknown_variables({"KQ_SIGNING_KEY": "x"}, named={"KQ_SIGNING_KEY"}) == []


def test_known_variables_are_not_warned_of() -> None:
    """Variables of settings and of command-line options are known."""
    known = {variable_of(setting) for setting in config.DEFAULTS} | config.COMMAND_VARIABLES
    assert {"KQ_BROKER_URL", "KQ_APP", "KQ_CONFIG", "KQ_GRACE", "KQ_CONNECT_TIMEOUT"} <= known
    assert unknown_variables(dict.fromkeys(known, "1")) == []


@pytest.mark.parametrize(
    ("url", "expected"),
    [("redis://localhost", "redis"), ("AMQPS://h", "amqps"), ("sqlite:///kq.db", "sqlite"), ("memory://", "memory")],
)
def test_scheme(url: str, expected: str) -> None:
    """The scheme chooses the backend, in any case."""
    assert scheme(url) == expected


@pytest.mark.parametrize("url", ["", "localhost", "://x", "redis:/localhost", "redis"])
def test_no_scheme(url: str) -> None:
    """What is no URL is refused, with examples and what was got."""
    with pytest.raises(errors.Invalid, match=r"broker: expected a URL such as sqlite:///kq.db.*; got") as caught:
        scheme(url)
    assert repr(url) in caught.value.message


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("redis://localhost:6379/0", "redis://localhost:6379/0"),
        ("sqlite:////var/a@b.db", "sqlite:////var/a@b.db"),
        ("memory://", "memory://"),
        ("redis://:secret@localhost/0", "redis://:**@localhost/0"),
        ("amqp://user:secret@host:5672/vhost?a=b", "amqp://user:**@host:5672/vhost?a=b"),
        ("amqp://user@host/", "amqp://user@host/"),
        ("amqp://user:se:cr@et@host/", "amqp://user:**@host/"),
        ("amqp://user:@host/", "amqp://user:**@host/"),
        ("redis://h:1/0?password=secret", "redis://h:1/0?**"),
        ("redis://:secret@h?db=1&Password=a", "redis://:**@h?**"),
        ("localhost:6379", "localhost:6379"),
    ],
)
def test_hide_password(url: str, shown: str) -> None:
    """All of a URL is shown but its password."""
    assert hide_password(url) == shown


@pytest.mark.parametrize(
    "url",
    [
        "user:secret@localhost",
        "redis://:sec/secret@localhost",
        "redis://:secret/x@localhost",
        "redis://:secret?x@localhost",
        "redis://:secret#x@localhost",
        "redis://user:secret@[localhost",
        "amqp://a:b@one;amqp://a:secret@two",
        "redis://:secret",
        "redis://user:secret/0",
        "redis:secret",
        "user:secret@host://x",
        "redis://h?password=a&secret#secret",
    ],
)
def test_a_url_that_cannot_be_taken_apart_is_hidden(url: str) -> None:
    """Where nobody can tell which part is the password, none is shown."""
    assert "secret" not in hide_password(url)
    with pytest.raises(errors.Invalid) as caught:
        scheme(url.replace("://", ":"))
    assert "secret" not in caught.value.message


@given(
    st.text(), st.sampled_from(["redis://user:{}@host/0", "amqp://:{}@host", "user:{}@host", "redis://h?password={}"])
)
def test_no_password_is_ever_shown(salt: str, pattern: str) -> None:
    """Whatever characters a password has, it is in no repr."""
    password = f"SeCrEt{salt}SeCrEt"
    assert "SeCrEt" not in repr(Settings(broker=pattern.format(password)))


@pytest.mark.parametrize(
    ("setting", "argument", "variable", "file"),
    [
        ("broker", "memory://argument", "memory://environment", "memory://file"),
        ("publish_timeout", 1.0, "2", "3s"),
        ("lease", 1.0, "2", "3s"),
        ("heartbeat", 1.0, "2", "3s"),
        ("create_queues", True, "false", "false"),
        ("max_body", 1, "2", "3"),
        ("max_deliveries", 1, "2", "3"),
        ("durability", "required", "warned", "required"),
    ],
)
def test_argument_over_environment_over_file_over_default(
    tmp_path: Path, setting: str, argument: Any, variable: str, file: str
) -> None:
    """Each says what a setting is where the ones before it do not, and is named as its origin."""
    path = tmp_path / "kq.yaml"
    if setting == "broker":
        path.write_text(f"entries: [{{kind: queue.driver.memory, url: {file}}}]\n")
    else:
        path.write_text(f"settings: {{{setting}: {file}}}\n")
    document = config_file.load(str(path), {})
    environment = {variable_of(setting): variable}

    def found(arguments: dict[str, Any], environment: dict[str, str], document: Any) -> tuple[Any, str]:
        settings = resolve(arguments, environment, document)
        return getattr(settings, setting), settings.origins.get(setting, "default")

    kind = type(argument)
    parsed = variable == "true" if kind is bool else kind(variable)
    in_file = file == "true" if kind is bool else kind(file.removesuffix("s")) if kind is float else kind(file)
    assert found({setting: argument}, environment, document) == (argument, "argument")
    assert found({}, environment, document) == (parsed, variable_of(setting))
    assert found({}, {}, document) == (in_file, f"{path}:1")
    assert found({}, {}, None) == (getattr(Settings(), setting), "default")


def test_the_groups_of_a_file_are_its_actors(tmp_path: Path) -> None:
    """Also where the same one is named elsewhere once more; where another one is they are not his."""
    path = tmp_path / "kq.yaml"
    path.write_text("security: {actor: 'service:worker', groups: [workers]}\n")
    document = config_file.load(str(path), {})
    assert resolve({}, {"KQ_ACTOR": "service:worker"}, document).groups == ("workers",)
    assert resolve({"actor": "service:worker"}, {}, document).groups == ("workers",)
    assert resolve({}, {"KQ_ACTOR": "user:ann"}, document).groups == ()
