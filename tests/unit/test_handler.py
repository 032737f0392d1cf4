"""Handlers are found by what a file calls them."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from kq import errors
from kq.handler import find_handler


@pytest.fixture(autouse=True)
def _clean_modules(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Forget the modules and paths that a test has added."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        del sys.modules[name]


def refused(method: str, folder: Path, **where: str) -> str:
    """Return why there is no such handler."""
    with pytest.raises(errors.Invalid) as caught:
        find_handler(method, folder=str(folder), **where)
    return caught.value.message


def test_bare_names_are_beside_the_file(tmp_path: Path) -> None:
    """Without a source, handlers.py beside the file has them, and is loaded once; it may import its neighbours."""
    (tmp_path / "kq_neighbour.py").write_text("NAME = 'neighbour'\n")
    (tmp_path / "handlers.py").write_text(
        "from kq_neighbour import NAME\nLOADED = []\ndef one(payload): return NAME\ndef two(payload): return LOADED\n"
    )
    one = find_handler("one", folder=str(tmp_path))
    two = find_handler("two", folder=str(tmp_path))
    assert one(None) == "neighbour"
    two(None).append(1)
    assert find_handler("two", folder=str(tmp_path))(None) == [1]


def test_files_of_one_name_are_told_apart(tmp_path: Path) -> None:
    """Two folders may each have a handlers.py."""
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "handlers.py").write_text(f"def which(payload): return {name!r}\n")
    assert find_handler("which", folder=str(tmp_path / "a"))(None) == "a"
    assert find_handler("which", folder=str(tmp_path / "b"))(None) == "b"


def test_a_source_wins_over_the_app_s_module(tmp_path: Path) -> None:
    """A source may be a file or a module; without one the app's module comes before handlers.py."""
    (tmp_path / "work.py").write_text("def refused(payload): return 'source'\n")
    (tmp_path / "handlers.py").write_text(
        "def refused(payload): return 'beside'\ndef other(payload): return 'beside'\n"
    )
    assert find_handler("refused", folder=str(tmp_path), source="work.py", module=__name__)(None) == "source"
    assert find_handler("refused", folder=str(tmp_path), module=__name__) is refused
    assert find_handler("other", folder=str(tmp_path), module=__name__)(None) == "beside"
    assert find_handler("dumps", folder=str(tmp_path), source="json")(1) == "1"


def test_a_whole_name_is_imported(tmp_path: Path) -> None:
    """``package.module:function`` needs no source; the function may be an attribute of an attribute."""
    assert find_handler("os.path:join", folder=str(tmp_path))("a", "b") == "a/b"
    assert find_handler("collections:Counter.fromkeys", folder=str(tmp_path)) is not None


def test_what_cannot_be_found_says_which_part(tmp_path: Path) -> None:
    """A missing module, file or function, and code that fails, are told apart, with place and suggestion."""
    assert "there is no module 'kq_nowhere'" in refused("kq_nowhere:f", tmp_path)
    assert "shlex has no function 'quoet' (did you mean quote?)" in refused("shlex:quoet", tmp_path)
    assert "handlers.py to find 'f' in; name a source, or write package.module:f" in refused("f", tmp_path)
    assert "there is no file" in refused("f", tmp_path, source="none.py")
    (tmp_path / "broken.py").write_text("x = 1\nraise ValueError('no luck')\n")
    why = refused("f", tmp_path, source="broken.py")
    assert "ValueError: no luck" in why
    assert "broken.py, line 2" in why
    (tmp_path / "wrong.py").write_text("def f(:\n")
    assert "wrong.py, line 1" in refused("f", tmp_path, source="wrong.py")
    assert "is of type str; expected a function" in refused("string:digits", tmp_path)
