"""Patterns of actions and resources: ``*``, exact, or one ``*`` at the start or the end."""

from __future__ import annotations

from typing import Any, Final

import msgspec

from kq.errors import Invalid

#: Characters of a pattern.
MAX_LENGTH: Final = 256


class Pattern(msgspec.Struct, frozen=True):
    """One pattern; ``Pattern.parse`` makes it from its text.

    Attributes:
        kind: ``any``, ``exact``, ``prefix`` (``app:*``) or ``suffix`` (``*:emails``).
        text: What is compared: the pattern without its ``*``.
    """

    kind: str
    text: str

    @classmethod
    def parse(cls, source: Any, what: str = "pattern") -> Pattern:
        """Return the pattern that ``source`` is the text of.

        The empty pattern matches the empty resource only, which is what ``queue.publish`` asks for.

        Args:
            source: The text.
            what: What the pattern is of, for the error.

        Raises:
            Invalid: If it has a ``*`` elsewhere, more than one, or is no printable text.
        """
        if not isinstance(source, str):
            raise Invalid(f"{what}: expected {_EXPECTED}; got {type(source).__name__}")
        if len(source) > MAX_LENGTH or not source.isprintable():
            raise Invalid(f"{what}: expected at most {MAX_LENGTH} printable characters, got {source[:60]!a}")
        if source == "*":
            return cls("any", "")
        stars = source.count("*")
        if stars == 0:
            return cls("exact", source)
        if stars == 1 and source.endswith("*"):
            return cls("prefix", source[:-1])
        if stars == 1 and source.startswith("*"):
            return cls("suffix", source[1:])
        raise Invalid(f"{what}: expected {_EXPECTED}; got {source!r}")

    def matches(self, subject: str) -> bool:
        """Say whether the pattern covers an action or a resource."""
        if self.kind == "prefix":
            return subject.startswith(self.text)
        if self.kind == "suffix":
            return subject.endswith(self.text)
        return self.kind == "any" or subject == self.text

    def __str__(self) -> str:
        return {"any": "*", "exact": self.text, "prefix": f"{self.text}*", "suffix": f"*{self.text}"}[self.kind]


_EXPECTED = "'*', an exact name, or a name with one '*' at its start or its end"
