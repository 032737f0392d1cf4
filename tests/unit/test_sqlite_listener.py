"""Where the sockets are on which stores in SQLite files hear of arrivals."""

from __future__ import annotations

import sqlite3
import tempfile
from contextlib import closing
from pathlib import Path
from threading import Event
from time import monotonic

import pytest

import kq
from kq.backends import sqlite, sqlite_listener
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


def test_without_a_place_for_a_socket_it_is_looked_now_and_then(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A container may have none that can be written to; a worker says so once, and works."""

    def nowhere() -> str:
        raise FileNotFoundError("No usable temporary directory found")

    monkeypatch.setattr(sqlite_listener, "_folder", nowhere)
    monkeypatch.setattr(sqlite, "_DEAF_FOR", 0.5)
    url = f"sqlite:///{tmp_path}/kq.db"
    handled = Event()
    with kq.App("deaf", broker=url) as app:
        app.consumer("app:q")(lambda payload: handled.set())
        app.publish("app:q", 0)
        with app.worker(concurrency=1):
            assert handled.wait(20)
            handled.clear()
            app.publish("app:q", 1)
            assert handled.wait(20)
            # Until there is one.
            monkeypatch.setattr(sqlite_listener, "_folder", lambda: str(tmp_path))
            with closing(sqlite3.connect(tmp_path / "kq.db")) as db:
                until = monotonic() + 20
                while monotonic() < until and not db.execute("SELECT count(*) FROM listener").fetchone()[0]:
                    handled.clear()
                    app.publish("app:q", 2)
                    assert handled.wait(20)
            assert monotonic() < until
    told = [record.getMessage() for record in caplog.records if "nobody can wake this process" in record.getMessage()]
    assert len(told) == 1
