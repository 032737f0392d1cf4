"""Queues as people declare them, checked and with default values."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from kq import codec as codecs
from kq import limit, plugin
from kq.backend import QueueSpec
from kq.driver import MAIN
from kq.errors import Invalid
from kq.limit import count
from kq.retry import Backoff, RetryPolicy

#: Backend names that queue options are grouped by, beside those of third parties.
_OPTION_GROUPS: Final = frozenset({"memory", "sqlite", "redis", "amqp"})


def default_spec(queue_id: str) -> QueueSpec:
    """Return a queue nobody described: default values, dead letters beside it."""
    dead = None if queue_id.endswith(limit.DEAD_SUFFIX) else queue_id + limit.DEAD_SUFFIX
    return QueueSpec(queue_id, dead_letter=dead)


def queue_spec(
    queue_id: str,
    *,
    codec: Any = "json/plain",
    dead_letter: Any = None,
    max_attempts: Any = 5,
    max_crashes: Any = 3,
    retry: Any = Backoff(),  # noqa: B008 - a frozen value
    max_length: Any = None,
    max_priority: Any = None,
    require_signature: Any = False,
    options: Any = None,
    driver: Any = None,
) -> QueueSpec:
    """Return a checked queue declaration.

    Raises:
        Invalid: If a value is not what it must be; the message names it.
    """
    limit.queue_id(queue_id)
    codecs.named(codec)
    if dead_letter is None:
        dead_letter = default_spec(queue_id).dead_letter
    else:
        limit.queue_id(dead_letter)
        if dead_letter == queue_id:
            raise Invalid(f"dead_letter: expected another queue than {queue_id} itself")
    if not isinstance(retry, Backoff):
        raise Invalid(f"retry: expected a kq.Backoff, got {type(retry).__name__}")
    if not isinstance(require_signature, bool):
        raise Invalid(f"require_signature: expected true or false, got {require_signature!r}")
    if driver is not None and driver != MAIN:
        limit.driver_name(driver)
    return QueueSpec(
        queue_id,
        codec=codec,
        dead_letter=dead_letter,
        policy=RetryPolicy(
            count("max_attempts", max_attempts, 1, 1_000_000), count("max_crashes", max_crashes, 1, 1_000_000), retry
        ),
        max_length=None if max_length is None else count("max_length", max_length, 1, 2**31 - 1),
        max_priority=None if max_priority is None else count("max_priority", max_priority, 1, 255),
        require_signature=require_signature,
        options=_options(options),
        driver=driver or MAIN,
    )


def difference(known: QueueSpec, other: QueueSpec) -> str:
    """Say which argument two declarations of a queue disagree on."""
    pairs = [
        ("codec", known.codec, other.codec),
        ("dead_letter", known.dead_letter, other.dead_letter),
        ("max_attempts", known.policy.max_attempts, other.policy.max_attempts),
        ("max_crashes", known.policy.max_crashes, other.policy.max_crashes),
        ("retry", known.policy.backoff, other.policy.backoff),
        ("max_length", known.max_length, other.max_length),
        ("max_priority", known.max_priority, other.max_priority),
        ("require_signature", known.require_signature, other.require_signature),
        ("options", known.options, other.options),
        ("driver", known.driver, other.driver),
    ]
    name, old, new = next(pair for pair in pairs if pair[1] != pair[2])
    return f"queue {known.id} is declared already, with {name}={old!r}; got {name}={new!r}"


def _options(options: Any) -> dict[str, dict[str, Any]]:
    if options is None:
        return {}
    if not isinstance(options, Mapping):
        raise Invalid(f'options: expected a mapping such as {{"amqp": {{...}}}}, got {type(options).__name__}')
    known = _OPTION_GROUPS if _OPTION_GROUPS.issuperset(options) else _OPTION_GROUPS | frozenset(plugin.backends())
    for group, values in options.items():
        if group not in known:
            raise Invalid(f"options: unknown backend {group!r}; expected one of {', '.join(sorted(known))}")
        if not isinstance(values, Mapping):
            raise Invalid(f"options: {group}: expected a mapping, got {type(values).__name__}")
    return {group: dict(values) for group, values in options.items()}
