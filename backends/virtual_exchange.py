"""Which bindings of a topic exchange a routing key matches, as AMQP has it."""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import lru_cache
from typing import Any, Final

from kombu.transport.virtual import exchange as kombu_exchange

#: Compiled patterns of bindings that are remembered.
_REMEMBERED: Final = 1000


class TopicExchange(kombu_exchange.TopicExchange):  # type: ignore[misc]
    """Kombu's own but for ``#``, which is no word as well, together with its dot."""

    def lookup(self, table: Iterable[tuple[str, Any, str]], exchange: str, routing_key: str, default: Any) -> set[str]:
        words = _dotted(routing_key)
        return {queue for key, _, queue in table if _pattern(key).fullmatch(words)}


@lru_cache(_REMEMBERED)
def _pattern(key: str) -> re.Pattern[str]:
    wildcards = {"*": r"\.[^.]*", "#": r"(?:\.[^.]*)*"}
    words = _dotted(key).split(".")[1:]
    return re.compile("".join(wildcards.get(word, r"\." + re.escape(word)) for word in words))


def _dotted(key: str) -> str:
    """Return a key with a dot before each word; an empty one has none."""
    return f".{key}" if key else ""
