"""Settings: one frozen value per app, from arguments, environment and defaults, checked at the edge.

An argument wins over the environment, the environment over the file, the file over the default. Every setting is also
``KQ_<NAME>``; every command-line option likewise. The broker's URL, which may hold a password, can be in a file of its
own: ``KQ_BROKER_URL_FILE`` names it.
"""

from __future__ import annotations

import difflib
import logging
import os
import re
from collections.abc import Container, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Final
from urllib.parse import parse_qsl, quote, urlsplit, urlunsplit

from kq import config_file, limit
from kq.errors import Invalid

DEFAULT_BROKER: Final = "sqlite:///kq.db"
PREFIX: Final = "KQ_"
#: The variable that names a file with the broker's URL in it.
URL_FILE: Final = "KQ_BROKER_URL_FILE"
#: Bytes of such a file.
_MAX_URL_FILE: Final = 64 * 1024

_SCHEME: Final = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*", re.ASCII)
#: Parameters of a URL that hold a secret.
_SECRET: Final = re.compile(r"pass|pwd|secret|token|key|cred|auth", re.IGNORECASE)

#: What `Settings.durability` may be.
WARNED: Final = "warned"
REQUIRED: Final = "required"
#: The origin of what the program itself says.
ARGUMENT: Final = "argument"

#: Variables that options of commands read, beside those of the settings.
COMMAND_VARIABLES: Final = frozenset(
    "KQ_" + name
    for name in (
        "ACL", "ACTION", "ACTOR_META", "ALL", "APP", "BURST", "CONCURRENCY", "CONFIG", "CONNECT_TIMEOUT", "DEBUG",
        "DELAY", "EXPIRES", "GRACE", "HEADER", "JSON", "JSONL", "LIMIT", "LOG_FORMAT", "LOG_LEVEL",
        "MAX_TASKS_PER_CHILD", "MESSAGE_ID", "META", "OFFLINE", "OFFSET", "POOL", "PREFETCH", "PRIORITY", "PROCESSES",
        "QUEUES", "RESOURCE", "SCHEMA", "STRICT", "YES",
    )
)  # fmt: skip


#: What people most often get wrong in a broker's URL.
URL_HINT: Final = "a port is a number up to 65535; in a password @ is written %40, / %2F, # %23 and % %25"

logger = logging.getLogger("kq.config")

#: What `untold_variables` has returned, and whether `warn_of_unknown` is to say nothing.
_told: set[str] = set()
_shows_unknown = False


@dataclass(frozen=True, slots=True)
class Settings:
    """What an app runs with. Durations are seconds.

    Attributes:
        broker: The broker's URL; its scheme chooses the backend.
        publish_timeout: How long one publish may take.
        lease: For how long a delivery belongs to a worker that has stopped renewing it.
        heartbeat: How often a silent connection is probed.
        create_queues: Whether publishing to an undeclared queue makes it.
        max_body: Bytes of the largest body, at most 8 MiB.
        max_deliveries: Deliveries in a row that nobody settles before a message counts as the reason.
        durability: ``warned``: a worker warns of broker settings under which acknowledged messages may be lost;
            ``required``: it refuses them.
        strict_mode: Whether whoever acts without an actor is denied.
        actor: The id of the actor under whom workers consume and handlers run; empty for nobody.
        groups: The groups of that actor.
        origins: Where each of them was said, for people; what is not in it is a default.
    """

    broker: str = DEFAULT_BROKER
    publish_timeout: float = 10.0
    lease: float = 30.0
    heartbeat: float = 30.0
    create_queues: bool = True
    max_body: int = limit.MAX_BODY
    max_deliveries: int = 20
    durability: str = WARNED
    strict_mode: bool = False
    actor: str = ""
    groups: tuple[str, ...] = ()
    origins: Mapping[str, str] = field(default_factory=dict, compare=False, repr=False)

    def __post_init__(self) -> None:
        for name in limit.RANGES:
            _within(name, getattr(self, name), name)
        if self.durability not in (WARNED, REQUIRED):
            source = self.origins.get("durability", ARGUMENT)
            name = "durability" if source == ARGUMENT else source
            raise Invalid(f"{name}: expected {WARNED} or {REQUIRED}, got {self.durability!r}")

    def __repr__(self) -> str:
        rest = ", ".join(f"{f.name}={getattr(self, f.name)!r}" for f in fields(self) if f.repr and f.name != "broker")
        return f"Settings(broker={hide_password(self.broker)!r}, {rest})"


#: The settings, and what holds where nobody says anything.
DEFAULTS: Final[Mapping[str, Any]] = {field.name: field.default for field in fields(Settings) if field.repr}
#: Those that a file has in its section ``security``.
_SECURITY: Final = frozenset({"strict_mode", "actor", "groups"})


def resolve(
    arguments: Mapping[str, Any],
    environment: Mapping[str, str] | None = None,
    document: config_file.Document | None = None,
) -> Settings:
    """Return settings from arguments (None: not given), the environment and a configuration file.

    Args:
        arguments: By name.
        environment: Instead of the process's own.
        document: What the configuration file says.

    Raises:
        Invalid: If a value is not of its type or out of range; the message says where it came from.
    """
    environment = os.environ if environment is None else environment
    document = config_file.empty() if document is None else document
    values: dict[str, Any] = {}
    origins: dict[str, str] = {}
    for setting in DEFAULTS:
        given = arguments.get(setting)
        variable = variable_of(setting)
        kind = type(DEFAULTS[setting])
        if given is not None:
            values[setting], origins[setting] = _convert(setting, given, kind), ARGUMENT
        elif setting == "broker" and environment.get(URL_FILE, "") != "":
            if environment.get(variable, "") != "":
                raise Invalid(f"{variable} and {URL_FILE} are both set; expected one of them")
            values[setting], origins[setting] = _read_url(environment[URL_FILE]), URL_FILE
        elif environment.get(variable, "") != "":
            values[setting], origins[setting] = _parse(variable, environment[variable], kind), variable
            _within(variable, values[setting], setting)
        else:
            section = document.security if setting in _SECURITY else document.settings
            # The groups of a file are those of the file's actor; here somebody else has named another one.
            theirs = document.security.values.get("actor")
            is_anothers = setting == "groups" and theirs is not None and values.get("actor") != theirs
            if setting in section.values and not is_anothers:
                values[setting] = _convert(setting, section.values[setting], kind)
                origins[setting] = str(section.places[setting])
    if "broker" not in values and document.main is not None:
        driver = document.drivers[document.main].given
        values["broker"], origins["broker"] = driver.values["url"], str(driver.places["url"])
    return Settings(**values, origins=origins)


def variable_of(setting: str) -> str:
    """Return the environment variable of a setting: its name in capitals, and ``KQ_BROKER_URL``."""
    return PREFIX + ("BROKER_URL" if setting == "broker" else setting.upper())


def unknown_variables(environment: Mapping[str, str] | None = None, *, named: Container[str] = ()) -> list[str]:
    """Return a warning for each ``KQ_...`` variable that nothing reads, with the nearest known name.

    Args:
        environment: Instead of the process's own.
        named: Variables that the configuration file names.
    """
    environment = os.environ if environment is None else environment
    known = COMMAND_VARIABLES | {URL_FILE, config_file.FOUND} | {variable_of(setting) for setting in DEFAULTS}
    warnings = []
    for name in sorted(environment):
        if name.startswith(PREFIX) and name not in known and name not in named and not name.startswith("KQ_TEST_"):
            # Without what all of them begin with, which would make any two alike.
            near = difflib.get_close_matches(name[len(PREFIX) :], [other[len(PREFIX) :] for other in known], 1)
            hint = f"; did you mean {PREFIX}{near[0]}?" if near else ""
            warnings.append(f"the environment variable {name} is not one that kq, or the app's file, reads{hint}")
    return warnings


def untold_variables(named: Container[str]) -> list[str]:
    """Return those of `unknown_variables` that it has not returned before, in this process: each is told once."""
    warnings = [warning for warning in unknown_variables(named=named) if warning not in _told]
    _told.update(warnings)
    return warnings


def warn_of_unknown(named: Container[str]) -> None:
    """Log `untold_variables`, unless whoever runs this process shows them: see `unknown_is_shown`."""
    for warning in [] if _shows_unknown else untold_variables(named):
        logger.warning("%s", warning, extra={"action": "warning"})


def unknown_is_shown() -> None:
    """Say that this process, a command's or a worker's, shows variables that nothing reads by itself, or its parent."""
    global _shows_unknown
    _shows_unknown = True


def scheme(url: str) -> str:
    """Return the scheme of a broker URL.

    Raises:
        Invalid: If it has none.
    """
    name, found, _ = url.partition("://")
    if not found or not _SCHEME.fullmatch(name):
        raise Invalid(
            "broker: expected a URL such as sqlite:///kq.db, redis://localhost or amqp://localhost; "
            f"got {hide_password(url)!r}"
        )
    return name.lower()


def hide_password(url: str) -> str:
    """Return a broker URL that can be shown: its password, if any, replaced by ``**``.

    So are parameters that name a secret. A URL that cannot be taken apart is not shown at all, for nobody knows
    where its password is.
    """
    head, found, rest = url.partition("://")
    if not found or (head and not _SCHEME.fullmatch(head)):
        # A colon before anything but a path or a port may stand before a password.
        return "**" if "@" in url or re.search(r":(?!\d{1,5}$)[^/]", url) else url
    try:
        parts = urlsplit("//" + rest)
        if any(_SECRET.search(name) for name, _ in parse_qsl(parts.query, keep_blank_values=True)):
            # A secret with an unquoted & or # in it looks like more than one parameter.
            return hide_password(f"{head}://{rest.partition('?')[0]}") + "?**"
        # Without an @ a password stands where the port should: then this is an error.
        _ = parts.port
        if "@" not in rest or not parts.netloc:
            return url
        if rest.count("@") > parts.netloc.count("@"):
            # A password with an unquoted /, ? or #, or a list of brokers.
            return f"{head}://**"
        user = quote(parts.username or "", safe="")
        place = parts.netloc.rpartition("@")[2]
        secret = ":**" if parts.password is not None else ""
        return f"{head}:" + urlunsplit(("", f"{user}{secret}@{place}", parts.path, parts.query, ""))
    except ValueError:
        return f"{head}://**"


def _read_url(path: str) -> str:
    """Return the URL that a file holds; what else is in it is never shown."""
    try:
        with open(path, "rb") as file:
            data = file.read(_MAX_URL_FILE + 1)
    except (OSError, ValueError) as error:
        raise Invalid(f"{URL_FILE}: cannot read {path!r}: {getattr(error, 'strerror', None) or error}") from None
    if len(data) > _MAX_URL_FILE:
        raise Invalid(f"{URL_FILE}: {path!r} is larger than {_MAX_URL_FILE:,} bytes")
    try:
        url = data.decode().strip()
    except UnicodeDecodeError:
        raise Invalid(f"{URL_FILE}: {path!r} is not UTF-8") from None
    if not url:
        raise Invalid(f"{URL_FILE}: {path!r} is empty; expected the broker's URL")
    if len(url.split()) > 1:
        raise Invalid(f"{URL_FILE}: {path!r}: expected the broker's URL and nothing else")
    return url


def _within(source: str, value: Any, setting: str) -> None:
    low, high = limit.RANGES.get(setting, (None, None))
    if low is not None and high is not None and not low <= value <= high:
        raise Invalid(f"{source}: expected a number from {low:,} to {high:,}, got {value!r}")


def _convert(name: str, value: Any, kind: type) -> Any:
    if kind is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        try:
            return float(value)
        except OverflowError:
            raise Invalid(f"{name}: expected a number, got an integer beyond all floats") from None
    if type(value) is kind:
        return value
    if kind is tuple and isinstance(value, (list, set, frozenset)) and all(isinstance(item, str) for item in value):
        return tuple(value)
    if kind is str and isinstance(value, str):
        # Plain text: what derives from it may show itself otherwise.
        return str.__str__(value)
    # A broker's URL may hold a password.
    got = type(value).__name__ if name == "broker" else repr(value)
    raise Invalid(f"{name}: expected {_a(kind)}, got {got}")


def _parse(variable: str, text: str, kind: type) -> Any:
    try:
        if kind is bool:
            return {"1": True, "true": True, "yes": True, "on": True, "0": False, "false": False,
                    "no": False, "off": False}[text.strip().lower()]  # fmt: skip
        if kind is tuple:
            return tuple(name.strip() for name in text.split(",") if name.strip())
        if kind is float:
            # All of them are durations.
            seconds = limit.duration(text)
            return float(text) if seconds is None else seconds
        return kind(text)
    except (KeyError, ValueError):
        expected = "a duration such as 30s, 500ms or 2h" if kind is float else _a(kind)
        raise Invalid(f"{variable}: expected {expected}, got {text!r}") from None


def _a(kind: type) -> str:
    return {float: "a number", int: "an integer", bool: "true or false", str: "a string", tuple: "names"}[kind]
