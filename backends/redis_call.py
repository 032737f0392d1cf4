"""Runs the Lua of `kq.backends.redis_script` on a server."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any, Final

from kq.backends import redis_script
from kq.backends.redis_command import Head
from kq.backends.redis_error import Refusal
from kq.backends.redis_line import Lines

#: A call's keys, and its arguments.
Call = tuple[Sequence[str], Sequence[bytes | str | int]]

_NAMES: Final = (
    "DECLARE", "PUT", "PUT_PLAIN", "MAY_PUT", "PUT_LONG", "TAKE", "ACK", "RETURN", "COMPLETED", "MOVE", "RENEW",
    "NUDGE", "COUNTS", "BROWSE", "AGAIN", "LOOK", "DELETE", "REMOVE", "CLEAR", "TOPOLOGY",
)  # fmt: skip


class Script:
    """How a server is asked to run a script: by the name under which it knows what it has run once, or whole."""

    __slots__ = ("by_name", "whole")

    def __init__(self, source: str) -> None:
        name = hashlib.sha1(source.encode(), usedforsecurity=False).hexdigest()
        self.by_name = Head("EVALSHA", name)
        self.whole = Head("EVAL", source)


#: By their names.
SCRIPTS: Final = {name: Script(redis_script.source(getattr(redis_script, name))) for name in _NAMES}


class Caller:
    """Runs scripts over a store's connections. Thread-safe.

    Args:
        lines: The connections.
    """

    def __init__(self, lines: Lines) -> None:
        self.lines = lines

    def run(self, name: str, keys: Sequence[str], arguments: Sequence[bytes | str | int]) -> Any:
        """Run a script once, and return its answer.

        Raises:
            RedisError: What it answers, where that is an error; or as `Lines.ask`.
        """
        script, items = SCRIPTS[name], (len(keys), *keys, *arguments)
        (answer,) = self.lines.ask((script.by_name.pack(items),))
        if _is_unknown(answer):
            # Not loaded first and then run by name: it may be forgotten in between.
            (answer,) = self.lines.ask((script.whole.pack(items),))
        if isinstance(answer, Exception):
            raise answer
        return answer

    def run_all(self, name: str, calls: Sequence[Call]) -> list[Any]:
        """Run a script several times in one round trip; an answer may be an error."""
        script = SCRIPTS[name]
        items = [(len(keys), *keys, *rest) for keys, rest in calls]
        if not items:
            return []
        answers = self.lines.ask(script.by_name.pieces(items), len(items))
        unknown = [i for i, answer in enumerate(answers) if _is_unknown(answer)]
        if len(unknown) > 1:
            # By one of them the server learns the script, by whose name the others are run, in one more round trip.
            first, *rest = unknown
            (answers[first],) = self.lines.ask(script.whole.pieces([items[first]]))
            for i, answer in zip(
                rest, self.lines.ask(script.by_name.pieces(items[i] for i in rest), len(rest)), strict=True
            ):
                answers[i] = answer
            unknown = [i for i in rest if _is_unknown(answers[i])]
        for i in unknown:
            (answers[i],) = self.lines.ask(script.whole.pieces([items[i]]))
        return answers


def _is_unknown(answer: Any) -> bool:
    return isinstance(answer, Refusal) and answer.code == "NOSCRIPT"
