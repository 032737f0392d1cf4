from __future__ import annotations

import pytest

from kq.backends.sqlite_file import path_of
from kq.errors import Invalid


@pytest.mark.parametrize(
    ("url", "path"),
    [("sqlite:///kq.db", "kq.db"), ("sqlite:////var/a%20b.db", "/var/a b.db"), ("sqlite:///a.db?x=1", "a.db")],
)
def test_a_url_names_a_file(url: str, path: str) -> None:
    """Three slashes for a relative path, four for an absolute one."""
    assert path_of(url) == path


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("sqlite://", "expected sqlite:///relative.db"),
        ("sqlite:///", "expected sqlite:///relative.db"),
        ("sqlite://kq.db", "a third slash is missing"),
        ("sqlite:///:memory:", "use memory://"),
    ],
)
def test_what_names_no_file_is_refused(url: str, words: str) -> None:
    """A host is no file, and a database in memory would be another one for each connection."""
    with pytest.raises(Invalid, match=words):
        path_of(url)
