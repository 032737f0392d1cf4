r"""Regular expressions that take time linear in the text, for ``matches`` and ``nmatches``.

``re`` backtracks: ``(a+)+$`` takes years on 1,000 letters. Here a pattern is parsed by Python's own
parser and turned into a nondeterministic automaton (Thompson's construction); all its states walk
over the text at once, so that the time is bounded by states times characters, whatever the two are.

It finds what ``re.search`` finds, with: literals, ``.``, classes (``[a-z]``, ``\\d``, ``\\w``, ``\\s``),
groups, ``|``, ``* + ? {m,n}`` (lazy ones too), ``^ $ \\A \\Z \\b \\B``. Everything else is refused by
name: backreferences, lookaround, flags, atomic groups and possessive repeats.
"""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Callable
from typing import Any, Final

from kq.errors import Invalid

#: Characters of a pattern.
MAX_PATTERN: Final = 256
#: Characters of a text that is searched.
MAX_TEXT: Final = 1024
#: States of an automaton; a repeat takes its body's once for each time.
MAX_STATES: Final = 512

# The parser of `re` moved in Python 3.11, and its old name warns there.
_parser: Any = importlib.import_module("re._parser" if sys.version_info >= (3, 11) else "sre_parse")

_REFUSED: Final = {
    "GROUPREF": "a backreference",
    "GROUPREF_EXISTS": "a conditional group",
    "ASSERT": "a lookahead or lookbehind",
    "ASSERT_NOT": "a negative lookahead or lookbehind",
    "ATOMIC_GROUP": "an atomic group",
    "POSSESSIVE_REPEAT": "a possessive repeat",
    "FAILURE": "a group that never matches",
}


def _is_word(char: str) -> bool:
    return char.isalnum() or char == "_"


_CATEGORIES: Final[dict[str, Callable[[str], bool]]] = {
    "CATEGORY_DIGIT": str.isdecimal,
    "CATEGORY_NOT_DIGIT": lambda char: not char.isdecimal(),
    "CATEGORY_SPACE": str.isspace,
    "CATEGORY_NOT_SPACE": lambda char: not char.isspace(),
    "CATEGORY_WORD": _is_word,
    "CATEGORY_NOT_WORD": lambda char: not _is_word(char),
}


class Regex:
    """A compiled pattern; immutable, and safe to use from several threads.

    Args:
        pattern: The pattern, in the part of Python's syntax that the module's text names.

    Raises:
        Invalid: If it does not compile, is not in that part, or is too large.
    """

    __slots__ = ("_accept", "_next", "_start", "_tests", "pattern")

    def __init__(self, pattern: str) -> None:
        if not isinstance(pattern, str) or len(pattern) > MAX_PATTERN:
            raise Invalid(f"regular expression: expected a string of at most {MAX_PATTERN} characters")
        self.pattern = pattern
        # One entry a state: the states that follow it, and the test that must hold to go on.
        self._next: list[tuple[int, ...]] = []
        self._tests: list[Callable[[str], bool] | str | None] = []
        self._accept = self._state(None)
        try:
            tree = _parser.parse(pattern)
            if tree.state.flags & ~re.UNICODE.value:
                raise self._refusal("a flag")
            self._start = self._sequence(tree, self._accept)
        except (re.error, OverflowError, RecursionError, Warning) as error:
            raise Invalid(f"regular expression {pattern!r} does not compile: {error}") from None

    def search(self, text: str) -> bool:
        """Say whether the pattern matches anywhere in ``text``.

        Raises:
            Invalid: If the text is longer than ``MAX_TEXT`` characters.
        """
        if len(text) > MAX_TEXT:
            raise Invalid(f"regular expression: expected a text of at most {MAX_TEXT} characters")
        # A set of states is an integer, one bit a state. What was found out about a set is kept for
        # this search only, so that texts from outside cannot fill a memory.
        reached: dict[tuple[int, frozenset[str]], int] = {}
        moved: dict[tuple[int, str], int] = {}
        states, accept, start = 0, 1 << self._accept, 1 << self._start
        for position in range(len(text) + 1):
            states |= start
            place = (states, _assertions(text, position))
            closed = reached.get(place)
            if closed is None:
                closed = reached[place] = self._closure(*place)
            if closed & accept:
                return True
            if position < len(text):
                step = (closed, text[position])
                after = moved.get(step)
                if after is None:
                    after = moved[step] = self._move(*step)
                states = after
        return False

    def _closure(self, states: int, holding: frozenset[str]) -> int:
        """Return the states that can be reached without taking a character."""
        seen = states
        open_states = _members(states)
        while open_states:
            state = open_states.pop()
            test = self._tests[state]
            if test is None or (isinstance(test, str) and test in holding):
                for follower in self._next[state]:
                    if not seen >> follower & 1:
                        seen |= 1 << follower
                        open_states.append(follower)
        return seen

    def _move(self, states: int, char: str) -> int:
        """Return the states after taking ``char``."""
        after = 0
        for state in _members(states):
            test = self._tests[state]
            if test is not None and not isinstance(test, str) and test(char):
                after |= 1 << self._next[state][0]
        return after

    def _state(self, test: Callable[[str], bool] | str | None, *followers: int) -> int:
        if len(self._next) >= MAX_STATES:
            raise Invalid(
                f"regular expression {self.pattern!r} is too large: its repeats need more than {MAX_STATES} states"
            )
        self._next.append(followers)
        self._tests.append(test)
        return len(self._next) - 1

    def _sequence(self, items: Any, after: int) -> int:
        """Return the first state of a sequence that goes on to ``after``."""
        for op, argument in reversed(list(items)):
            after = self._item(str(op), argument, after)
        return after

    def _item(self, op: str, argument: Any, after: int) -> int:
        if op in _REFUSED:
            raise self._refusal(_REFUSED[op])
        if op == "AT":
            return self._state(str(argument), after)
        if op == "BRANCH":
            return self._state(None, *(self._sequence(one, after) for one in argument[1]))
        if op == "SUBPATTERN":
            _, added, removed, body = argument
            if added or removed:
                raise self._refusal("a flag")
            return self._sequence(body, after)
        if op in ("MAX_REPEAT", "MIN_REPEAT"):
            least, most, body = argument
            return self._repeat(least, most, body, after)
        return self._state(self._char_test(op, argument), after)

    def _repeat(self, least: Any, most: Any, body: Any, after: int) -> int:
        if most is _parser.MAXREPEAT:
            loop = self._state(None)
            self._next[loop] = (self._sequence(body, loop), after)
            after = loop
        else:
            end = after
            for _ in range(int(most) - int(least)):
                after = self._state(None, self._sequence(body, after), end)
        for _ in range(int(least)):
            first = self._sequence(body, after)
            if first == after:
                # The body is empty: repeating it a million times makes no state, and no difference.
                break
            after = first
        return after

    def _char_test(self, op: str, argument: Any) -> Callable[[str], bool]:
        if op == "LITERAL":
            return chr(argument).__eq__
        if op == "NOT_LITERAL":
            return chr(argument).__ne__
        if op == "ANY":
            return "\n".__ne__
        if op == "CATEGORY":
            return _CATEGORIES[str(argument)]
        if op == "RANGE":
            low, high = map(chr, argument)
            return lambda char: low <= char <= high
        if op != "IN":
            raise self._refusal(op.lower())
        members = [(str(kind), value) for kind, value in argument]
        negated = members[0][0] == "NEGATE"
        tests = [self._char_test(*one) for one in members[negated:]]
        return lambda char: any(test(char) for test in tests) is not negated

    def _refusal(self, what: str) -> Invalid:
        return Invalid(
            f"regular expression {self.pattern!r}: {what} is not supported; expected literals, classes, groups, "
            "'|', repeats and anchors, which take linear time"
        )

    def __repr__(self) -> str:
        return f"Regex({self.pattern!r})"


def _members(states: int) -> list[int]:
    found = []
    while states:
        lowest = states & -states
        found.append(lowest.bit_length() - 1)
        states ^= lowest
    return found


def _assertions(text: str, position: int) -> frozenset[str]:
    """Return the names of the anchors that hold at a position."""
    last = len(text)
    return _HOLDING[
        position == 0,
        position == last,
        position == last or (position == last - 1 and text[position] == "\n"),
        # As in `re`, an empty text has neither a boundary nor a place without one.
        None
        if not text
        else (position > 0 and _is_word(text[position - 1])) != (position < last and _is_word(text[position])),
    ]


_HOLDING: Final = {
    (first, last, end, boundary): frozenset(
        name
        for name, holds in (
            ("AT_BEGINNING", first),
            ("AT_BEGINNING_STRING", first),
            ("AT_END_STRING", last),
            ("AT_END", end),
            ("AT_BOUNDARY", boundary is True),
            ("AT_NON_BOUNDARY", boundary is False),
        )
        if holds
    )
    for first in (False, True)
    for last in (False, True)
    for end in (False, True)
    for boundary in (False, True, None)
}
