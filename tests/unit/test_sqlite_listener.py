"""Where the sockets are on which stores in SQLite files hear of arrivals."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest

from kq.backends.sqlite_listener import Listener


def test_a_folder_with_a_long_name_is_passed_over(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A socket's path has room for about a hundred bytes; another folder than that of temporary files may do."""
    long = tmp_path / ("x" * 100)
    long.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(long))
    listener = Listener()
    assert Path(listener.path).is_socket()
    assert not listener.path.startswith(str(long))
    listener.close()


def test_temporary_files_folder_is_preferred(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there is room it is where all temporary files are."""
    with tempfile.TemporaryDirectory(dir="/tmp", prefix="kq") as short:
        monkeypatch.setattr(tempfile, "tempdir", short)
        listener = Listener()
        assert listener.path.startswith(short)
        listener.close()
