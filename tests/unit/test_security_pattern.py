from __future__ import annotations

import fnmatch
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kq.errors import Invalid
from kq.security.pattern import Pattern

WORD = st.text("ab:.[]?-", max_size=6)


@given(WORD, st.sampled_from(["exact", "prefix", "suffix", "any"]), WORD)
def test_patterns_match_as_a_shell_would(text: str, kind: str, subject: str) -> None:
    """``*`` stands for any characters, or none, and every other character for itself."""
    source = {"exact": text, "prefix": text + "*", "suffix": "*" + text, "any": "*"}[kind]
    # In a class of its own, a character has no meaning for fnmatch.
    escaped = "".join(char if char == "*" else f"[{char}]" for char in source)
    pattern = Pattern.parse(source)
    assert pattern.matches(subject) == fnmatch.fnmatchcase(subject, escaped)
    assert str(pattern) == source


@pytest.mark.parametrize("source", ["a*b", "*a*", "**", "a**", "***", "*a*b", None, 1, ["a"], "a\n", "x" * 257])
def test_other_patterns_are_refused(source: Any) -> None:
    """A pattern that kq would not match as its author means is refused at load, with what is expected."""
    with pytest.raises(Invalid, match=r"resources: expected .*(one '\*' at its start or its end|printable)"):
        Pattern.parse(source, "resources")


def test_the_empty_pattern_matches_the_empty_resource_only() -> None:
    """``queue.publish`` is asked for on the empty resource, which a policy can name."""
    assert Pattern.parse("").matches("")
    assert not Pattern.parse("").matches("app:emails")
