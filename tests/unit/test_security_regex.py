from __future__ import annotations

import re
import time

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from kq.errors import Invalid
from kq.security.regex import MAX_TEXT, Regex

ATOM = st.one_of(
    st.sampled_from(["a", "b", "1", " ", "é", ".", "[ab]", "[^a]", "[a-c1]", r"[^\d\s]", r"[\w-]", "^", "$", "(?:)"]),
    st.sampled_from([rf"\{char}" for char in "dDwWsSn.AZbB"]),
)
REPEAT = st.sampled_from(["*", "+", "?", "*?", "+?", "??", "{2}", "{0,2}", "{1,}", "{,2}", "{2,3}?"])
PATTERN = st.recursive(
    ATOM,
    lambda inner: st.one_of(
        st.lists(inner, min_size=1, max_size=4).map("".join),
        st.tuples(inner, inner).map(lambda pair: f"({pair[0]}|{pair[1]})"),
        st.tuples(inner, REPEAT).map(lambda pair: f"(?:{pair[0]}){pair[1]}"),
        inner.map(lambda one: f"({one})"),
    ),
    max_leaves=8,
)
TEXT = st.text("aab1 é_.\nc-", max_size=8)


@settings(max_examples=600)
@given(PATTERN, st.lists(TEXT, min_size=1, max_size=5))
def test_it_finds_what_re_finds(pattern: str, texts: list[str]) -> None:
    """On the part of the syntax that is supported, the result is that of ``re.search``."""
    try:
        regex = Regex(pattern)
    except Invalid as error:
        assert "states" in str(error) or len(pattern) > 256  # noqa: PT017
        assume(False)
    for text in texts:
        # Python 3.14 lets \B match in an empty text, earlier ones do not.
        if text or "\\B" not in pattern:
            assert regex.search(text) == bool(re.search(pattern, text)), text


@pytest.mark.parametrize(
    ("pattern", "text"),
    [
        ("a$", "a\n"),
        ("a$", "a\n\n"),
        (r"a\Z", "a\n"),
        ("a\n$", "a\n"),
        ("^a", "ba"),
        (r"\Aa", "a"),
        ("a$b", "ab"),
        (r"\bé\b", "é"),
        (r"a\Bb", "ab"),
        (r"\B-", "-"),
        (r"\B", "a"),
        ("^$", ""),
        ("^$", "\n"),
        (r"\b", ""),
        (".", "\n"),
        (r"\d", "٣"),
        (r"\d", "²"),
        (r"\w", "²"),
        (r"\s", "\x1c"),
        ("[^a]", "\n"),
        ("x{2,3}y", "xxxxy"),
        ("^x{2,3}y", "xxxxy"),
        ("(?:^a|b$)+", "ab"),
        ("(|a)+b", "aab"),
        ("", ""),
        ("a||b", "c"),
        ("(a*)*b", "aab"),
        ("[]a]", "]"),
        (r"[\w-]", "-"),
    ],
)
def test_anchors_and_classes_mean_what_they_mean_in_re(pattern: str, text: str) -> None:
    """Ends of lines and words, digits of other alphabets and empty alternatives are as in ``re``."""
    assert Regex(pattern).search(text) == bool(re.search(pattern, text))


@pytest.mark.parametrize("pattern", ["(a+)+$", "^(a|a)*$", "(a|aa)+$", "(.*a){20}$", "^(([a-z])+.)+[A-Z]([a-z])+$"])
def test_what_takes_re_years_takes_no_time(pattern: str) -> None:
    """Patterns on which backtracking explodes are decided in less than 50 ms of processor time."""
    regex = Regex(pattern)
    started = time.thread_time()
    assert not regex.search("a" * 1000 + "!")
    assert time.thread_time() - started < 0.05


def test_the_hardest_pattern_and_text_are_bounded() -> None:
    """Where the automaton is as large and as busy as allowed, a search still ends within two seconds."""
    regex = Regex("(.*a.{0,120}){2}z")
    text = "".join("ab"[(index * index // 7) % 2] for index in range(MAX_TEXT))
    started = time.thread_time()
    assert not regex.search(text)
    assert time.thread_time() - started < 2


@pytest.mark.parametrize(
    ("pattern", "reason"),
    [
        (r"(a)\1", "a backreference"),
        (r"(?P<x>a)(?P=x)", "a backreference"),
        ("(a)?(?(1)b|c)", "a conditional group"),
        ("(?=a)", "a lookahead"),
        ("(?<=a)b", "a lookahead or lookbehind"),
        ("(?!a)", "not supported"),
        ("(?<!a)b", "a negative look"),
        ("(?i)a", "a flag"),
        ("(?s:a.)", "a flag"),
        ("(a{100}){100}", "too large"),
        ("a{65536}", "too large"),
        ("a" * 257, "at most 256"),
        ("(a", "does not compile"),
        ("[a", "does not compile"),
        ("*a", "does not compile"),
        ("a{99999999999999999999}", "does not compile"),
        ("(" * 120, "does not compile"),
    ],
)
def test_other_patterns_are_refused_by_name(pattern: str, reason: str) -> None:
    """A pattern that linear time cannot do, or that does not compile, is refused and the error says why."""
    with pytest.raises(Invalid, match=reason):
        Regex(pattern)


def test_repeating_nothing_many_times_is_quick() -> None:
    """Nested repeats of an empty group make no states and take no time to build."""
    started = time.thread_time()
    assert Regex("((){65000}){65000}a").search("ba")
    assert time.thread_time() - started < 0.5


def test_long_texts_are_refused() -> None:
    """A search is bounded by the length of its text."""
    assert Regex("b$").search("a" * (MAX_TEXT - 1) + "b")
    with pytest.raises(Invalid, match="at most 1024 characters"):
        Regex("b$").search("a" * MAX_TEXT + "b")
