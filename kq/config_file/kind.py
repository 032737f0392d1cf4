"""What a configuration file may say: every section and kind of entry, field by field, as data.

The loader checks files against this, the JSON Schema and the tables of docs/configuration.md are made of
it, and `Settings` and the command line have the same names and ranges.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from kq import limit
from kq.config_file.value import (
    BOOLEAN,
    DURATION,
    TEXT,
    Anything,
    ByName,
    Field,
    Many,
    One,
    Section,
    checked,
    choice,
    duration,
    integer,
    number,
)
from kq.errors import Invalid

#: Kinds of drivers, and the schemes that each one's URL may have.
DRIVERS: Final[Mapping[str, tuple[str, ...]]] = {
    "queue.driver.amqp": ("amqp", "amqps"),
    "queue.driver.redis": ("redis", "rediss"),
    "queue.driver.sqlite": ("sqlite",),
    "queue.driver.memory": ("memory",),
}
QUEUE: Final = "queue.queue"
CONSUMER: Final = "queue.consumer"
POLICY: Final = "security.policy"
EXPRESSION: Final = "security.policy.expr"

VERSION: Final = "1.0"


def _jitter(text: str) -> str | float:
    if text in ("full", "none"):
        return text
    value = number(0, 1).make(text)
    assert isinstance(value, float)
    return value


def _version(text: str) -> str:
    if text != VERSION:
        raise Invalid(f"expected {VERSION!r}, got {text!r}")
    return text


def _url_of(schemes: tuple[str, ...]) -> One:
    expected = " or ".join(f"{scheme}://" for scheme in schemes)

    def make(text: str) -> str:
        if text.partition("://")[0].lower() not in schemes or "://" not in text:
            # The URL itself is not shown: it may hold a password.
            raise Invalid(f"expected a URL with {expected}")
        return text

    return checked(f"a URL with {expected}", make, "|".join(f"^{scheme}://" for scheme in schemes) + r"|^\$\{env:")


def _namespace(text: str) -> str:
    try:
        return limit.queue_id(f"{text}:x").removesuffix(":x")
    except Invalid:
        raise ValueError from None


_NAMESPACE: Final = checked(
    "a name of letters, digits, '.', '_' and '-'",
    _namespace,
    r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$",
)
_GROUPS: Final = Many(TEXT)

RETRY: Final = Section(
    (
        Field("initial", DURATION, "The wait after the first attempt.", "1s"),
        Field("factor", number(1, 1e9), "What each further wait grows by.", "2"),
        Field("max", DURATION, "What no wait exceeds before jitter.", "10m"),
        Field(
            "jitter",
            One("full, none or a fraction from 0 to 1", _jitter, {"anyOf": [{"enum": ["full", "none"]}, {
                "type": "number", "minimum": 0, "maximum": 1}]}),
            "How waits are spread: evenly from nothing (`full`), not at all, or plus or minus a fraction.",
            "full",
        ),
    ),
    "a mapping of initial, factor, max and jitter",
)  # fmt: skip

TLS: Final = Section(
    (
        Field("ca", TEXT, "Who signs the broker's certificate: PEM text, or a file.", "the system's authorities"),
        Field("certificate", TEXT, "Our own certificate: PEM text, or a file."),
        Field("key", TEXT, "The private key of our certificate: PEM text, or a file."),
        Field("key_password", TEXT, "What the private key is encrypted with."),
        Field("server_name", TEXT, "The name that the broker's certificate must bear.", "the URL's host"),
        Field(
            "verify",
            BOOLEAN,
            "Whether the broker's certificate and name are checked; `false` is warned of at each start.",
            "true",
        ),
    ),
    "a mapping such as {ca: /etc/ssl/broker.pem}",
)

RECONNECT: Final = Section(
    (
        Field("initial", duration(0.01, 3600), "The first wait before the broker is tried again.", "100ms"),
        Field("max", duration(0.01, 3600), "The longest wait.", "2s"),
    ),
    "a mapping of initial and max",
)

_NAMES: Final = (
    Field("kind", TEXT, "What the entry is.", "required", required=True),
    Field("name", TEXT, "Its name within the file's namespace: `emails` is `app:emails` in namespace `app`."),
    Field("id", TEXT, "Its whole name, instead of `name`."),
)


def _driver(kind: str) -> tuple[Field, ...]:
    schemes = DRIVERS[kind]
    url = Field("url", _url_of(schemes), "Where the broker is.", "required", required=True)
    if kind in ("queue.driver.sqlite", "queue.driver.memory"):
        return (url,)
    return (
        url,
        Field("virtual_host", TEXT, "RabbitMQ's virtual host or Redis' database number, instead of the URL's."),
        Field("connection_name", TEXT, "What the broker's list of connections shows.", "the app's name"),
        Field("heartbeat", duration(1, 3600), "How often a silent connection is probed.", "the setting `heartbeat`"),
        Field(
            "timeout", duration(0.001, 3600), "How long one call to the broker may take.",
            "the setting `publish_timeout`",
        ),
        Field("connect_timeout", duration(0.001, 3600), "How long connecting may take.", "5s"),
        Field("reconnect", RECONNECT, "How long a worker waits before it tries an absent broker again."),
        Field("tls", TLS, f"How connections are encrypted, with `{schemes[1]}`.", "verified"),
    )  # fmt: skip


DEAD_LETTER: Final = Section(
    (
        Field("queue", TEXT, "The queue for messages that cannot be handled.", "`<queue id>.dead`"),
        Field("max_attempts", integer(1, 1_000_000), "Runs of a message, the first included.", "5"),
        Field("max_crashes", integer(1, 1_000_000), "Runs under which its process may die.", "3"),
    ),
    "a mapping of queue, max_attempts and max_crashes",
)

_QUEUE: Final = (
    Field("driver", TEXT, "The driver whose broker it lives on.", "the app's own"),
    Field(
        "codec", choice("json/plain", "application/msgpack"), "How payloads are encoded.", "json/plain"
    ),
    Field("dead_letter", DEAD_LETTER, "When a message has had enough, and where it goes."),
    Field("retry", RETRY, "The wait between attempts."),
    Field(
        "max_length", integer(1, 2**31 - 1), "Messages that may wait before publishing is refused.", "no limit"
    ),
    Field("max_priority", integer(1, 255), "Levels of priority; only RabbitMQ needs to know."),
    Field(
        "require_signature", BOOLEAN,
        "Whether unsigned messages are dead-lettered, as they are on every queue where `signing.require` says so.",
        "false",
    ),
    Field("options", ByName(ByName(Anything())), "What one kind of broker understands, by its name."),
)  # fmt: skip

_CONSUMER: Final = (
    Field("queue", TEXT, "The queue it consumes.", "required", required=True),
    Field(
        "method", TEXT,
        "The handler: `package.module:function`, or a bare name that is looked up in `source`, else in the "
        "app's module, else in `handlers.py` beside the file.",
        "required", required=True, alias="func",
    ),
    Field("concurrency", integer(1, 100_000), "Handlers of this consumer at once in one worker.", "no cap"),
    Field("prefetch", integer(1, 100_000), "Messages that one worker holds for it.", "as many as fit"),
    Field("timeout", duration(0.001, limit.MAX_DELAY), "How long one run may take.", "no limit"),
    Field("auto_ack", BOOLEAN, "Settle before the handler runs: at most once.", "false"),
    Field("max_attempts", integer(1, 1_000_000), "Wins over the queue's."),
    Field("retry", RETRY, "Wins over the queue's."),
)  # fmt: skip

_PATTERNS: Final = Many(TEXT)
_RULE: Final = (
    Field("actions", _PATTERNS, "What it is about: `*`, exact, or one leading or trailing `*`.", "required",
          required=True),
    Field("resources", _PATTERNS, "Which queue ids it is about, likewise.", "required", required=True),
    Field("effect", choice("allow", "deny"), "What it says.", "allow"),
)  # fmt: skip
CONDITION: Final = Section(
    (
        Field("field", TEXT, "`actor.id`, `actor.meta.*`, `action`, `resource` or `meta.*`.", "required",
              required=True),
        Field(
            "operator",
            choice("eq", "ne", "lt", "gt", "lte", "gte", "in", "nin", "exists", "nexists", "contains", "ncontains",
                   "matches", "nmatches"),
            "How it is compared.", "required", required=True,
        ),
        Field("value", Anything(), "With what."),
        Field("value_from", TEXT, "With which other field's value, instead."),
    ),
    "a mapping of field, operator and value",
)  # fmt: skip

_POLICY: Final = (
    Field(
        "policy",
        Section((*_RULE, Field("conditions", Many(CONDITION, alone=False), "All must hold."))),
        "The rule.",
        "required",
        required=True,
    ),
    Field("groups", _GROUPS, "The groups whose members it binds.", "everybody"),
)
_EXPRESSION: Final = (
    Field(
        "policy",
        Section((*_RULE, Field("expression", TEXT, "Must be true.", "required", required=True))),
        "The rule.",
        "required",
        required=True,
    ),
    Field("groups", _GROUPS, "The groups whose members it binds.", "everybody"),
)

#: The fields of each kind of entry.
ENTRIES: Final[Mapping[str, Section]] = {
    **{kind: Section((*_NAMES, *_driver(kind))) for kind in DRIVERS},
    QUEUE: Section((*_NAMES, *_QUEUE)),
    CONSUMER: Section((*_NAMES, *_CONSUMER)),
    POLICY: Section((*_NAMES, *_POLICY)),
    EXPRESSION: Section((*_NAMES, *_EXPRESSION)),
}

SETTINGS: Final = Section(
    (
        Field("publish_timeout", duration(*limit.RANGES["publish_timeout"]), "How long one publish may take.", "10s"),
        Field(
            "lease", duration(*limit.RANGES["lease"]),
            "How long a delivery stays with a worker that has died.", "30s",
        ),
        Field("heartbeat", duration(*limit.RANGES["heartbeat"]), "How often a silent connection is probed.", "30s"),
        Field("create_queues", BOOLEAN, "Whether publishing to an undeclared queue makes it.", "true"),
        Field("max_body", integer(1, limit.MAX_BODY_CEILING), "Bytes of the largest body.", "1048576"),
        Field(
            "max_deliveries", integer(1, 1_000_000),
            "Deliveries in a row that nobody settles before a message is dead-lettered.", "20",
        ),
        Field(
            "durability", choice("warned", "required"),
            "Whether a worker warns of broker settings under which acknowledged messages may be lost, or refuses them.",
            "warned",
        ),
    )
)  # fmt: skip

WORKER: Final = Section(
    (
        Field("queues", Many(TEXT), "Queues to consume.", "all that have a handler"),
        Field("processes", integer(1, 512), "Child processes.", "one for each CPU"),
        Field("concurrency", integer(1, 10_000), "Handlers at once in each child.", "8"),
        Field("pool", choice("processes", "threads"), "Where handlers run.", "processes"),
        Field("prefetch", integer(1, 1_000_000), "Messages in hand at most.", "as the handlers' pace asks for"),
        Field("grace", DURATION, "How long handlers may go on after TERM.", "30s"),
        Field(
            "max_tasks_per_child",
            integer(1, 1_000_000_000),
            "Messages after which a child is replaced, once a fresh one is ready.",
            "never",
        ),
        Field("connect_timeout", DURATION, "How long to try to reach the broker at the start.", "10s"),
        Field("log_level", choice("debug", "info", "warning", "error"), "What to log.", "info"),
        Field("log_format", choice("text", "json"), "How to log.", "text"),
    )
)

SECURITY: Final = Section(
    (
        Field("strict_mode", BOOLEAN, "Whether whoever acts without an actor is denied.", "false"),
        Field("actor", TEXT, "Under whom workers consume and handlers run."),
        Field("groups", _GROUPS, "The groups of that actor."),
    )
)

SIGNING: Final = Section(
    (
        Field("keys", ByName(TEXT), "Secrets by key id, each of at least 32 bytes.", "required", required=True),
        Field("sign_with", TEXT, "The key that signs.", "none: verify only"),
        Field("max_age", duration(1, limit.MAX_DELAY), "How long a signature is good, delays not counted.", "7d"),
        Field("require", BOOLEAN, "Whether unsigned messages are dead-lettered, on every queue.", "false"),
        Field(
            "replay_window", duration(0, limit.MAX_DELAY),
            "How long the ids of completed messages are remembered, where the broker can.", "1h",
        ),
    )
)  # fmt: skip


class _Entries:
    """The list of entries; the loader reads each by its kind."""

    expected = "a list of entries"

    def read(self, node: Any, label: str, reading: Any) -> Any:
        """Return the node itself."""
        return node

    def schema(self) -> dict[str, Any]:
        """Return a schema that chooses by ``kind``."""
        either = []
        for kind, section in ENTRIES.items():
            schema = section.schema()
            schema["properties"]["kind"] = {"const": kind, "description": "What the entry is."}
            either.append(schema)
        return {"type": "array", "items": {"anyOf": either}}


FILE: Final = Section(
    (
        Field(
            "version", checked(repr(VERSION), _version, r"^1\.0$"), "The version of this format.", VERSION
        ),
        Field("namespace", _NAMESPACE, "What comes before the names of this file's entries."),
        Field("source", TEXT, "Where bare method names are found: a file or a module.",
              "the app's module, else `handlers.py` beside the file"),
        Field("include", Many(TEXT), "Other files, relative to this one."),
        Field("entries", _Entries(), "Drivers, queues, consumers and policies."),
        Field("settings", SETTINGS, "What the app runs with."),
        Field("worker", WORKER, "What `kq worker` runs with, unless the command line or a variable says otherwise."),
        Field("security", SECURITY, "Who acts where nobody says, and whether that is enough."),
        Field("signing", SIGNING, "Keys for signing messages."),
    )
)  # fmt: skip
