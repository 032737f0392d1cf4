from __future__ import annotations

import os
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace

import pytest

from kq.backends import sqlite_file
from kq.backends.sqlite import SQLiteStore
from kq.backends.sqlite_file import Disk, check_place, journal_size, path_of
from kq.backends.store import BrokerAway, Entry
from kq.errors import Internal, Invalid


@pytest.mark.parametrize(
    ("url", "path"),
    [("sqlite:///kq.db", "kq.db"), ("sqlite:////var/a%20b.db", "/var/a b.db")],
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
        ("sqlite:///a.db?timeout=1", "no options"),
    ],
)
def test_what_names_no_file_is_refused(url: str, words: str) -> None:
    """A host is no file, and a database in memory would be another one for each connection."""
    with pytest.raises(Invalid, match=words):
        path_of(url)


def nothing() -> int:
    """Return what a file without room has."""
    return 0


class Looks:
    """Stands in for what the system says of a disk, and counts how often it is asked."""

    def __init__(self, free: int) -> None:
        self.free = free
        self.count = 0

    def __call__(self, path: str) -> SimpleNamespace:
        self.count += 1
        return SimpleNamespace(f_bavail=self.free, f_frsize=1, f_blocks=2**30)


def test_a_disk_is_looked_at_after_each_megabyte(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """And not for each message."""
    looks = Looks(2**29)
    monkeypatch.setattr(os, "statvfs", looks)
    monkeypatch.setattr(sqlite_file, "monotonic", lambda: 5.0)
    disk = Disk(str(tmp_path / "kq.db"))
    for _ in range(1000):
        disk.reserve([100], nothing)
    # Each takes a few pages.
    assert 8 <= looks.count <= 16
    before = looks.count
    for _ in range(5):
        disk.reserve([2**20], nothing)
    assert looks.count == before + 5


def test_what_a_batch_takes_is_kept_free_as_well(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Once in the journal, and once where it belongs: what has been stored must still be taken."""
    monkeypatch.setattr(os, "statvfs", Looks(100 * 2**20))
    disk = Disk(str(tmp_path / "kq.db"))
    disk.reserve([2**20] * 40, nothing)
    with pytest.raises(Internal, match="bytes are free") as caught:
        disk.reserve([2**20] * 45, nothing)
    assert caught.value.details == {"reason": "full"}


def test_a_link_to_another_file_system_is_followed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Where the file really is decides."""
    (tmp_path / "far").mkdir()
    (tmp_path / "near").symlink_to(tmp_path / "far")
    real = os.path.realpath(tmp_path / "far")
    monkeypatch.setattr(sqlite_file, "_file_system", lambda path: ("/", "nfs4" if path.startswith(real) else "ext4"))
    with pytest.raises(BrokerAway, match="is on a network file system"):
        check_place(str(tmp_path / "near" / "kq.db"))
    check_place(str(tmp_path / "kq.db"))


def test_a_disk_is_looked_at_after_each_second(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Others fill it as well; and where it is nearly full it is looked at each time, until there is room again."""
    looks, now = Looks(2**29), [0.0]
    monkeypatch.setattr(os, "statvfs", looks)
    monkeypatch.setattr(sqlite_file, "monotonic", lambda: now[0])
    disk = Disk(str(tmp_path / "kq.db"))
    disk.reserve([100], nothing)
    looks.free = 2**20
    disk.reserve([100], nothing)
    now[0] = 1.0
    for _ in range(3):
        with pytest.raises(Internal, match="only 1,048,576 bytes are free") as caught:
            disk.reserve([100], nothing)
        assert caught.value.details == {"reason": "full"}
    assert looks.count == 4
    looks.free = 2**29
    disk.reserve([100], nothing)
    disk.reserve([100], nothing)
    assert looks.count == 5


def test_room_in_the_file_is_room(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What has been handled leaves some there, and a file never becomes smaller; but a journal needs the disk's."""
    monkeypatch.setattr(os, "statvfs", Looks(8 * 2**20))
    disk = Disk(str(tmp_path / "kq.db"))
    with pytest.raises(Internal, match="only 8,388,608 bytes are free"):
        disk.reserve([100], lambda: 2**20)
    disk.reserve([100], lambda: 2**30)
    monkeypatch.setattr(os, "statvfs", Looks(2 * 2**20))
    disk = Disk(str(tmp_path / "kq.db"))
    with pytest.raises(Internal, match="only 2,097,152 bytes are free"):
        disk.reserve([100], lambda: 2**30)


def test_a_file_that_is_mounted_by_itself_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What SQLite keeps beside it would stay in a container, and be lost with it."""
    file = tmp_path / "kq.db"
    file.touch()
    monkeypatch.setattr(sqlite_file, "_file_system", lambda path: (path, "ext4"))
    with pytest.raises(BrokerAway, match=r"is mounted by itself.*kq\.db-wal.*mount a folder") as caught:
        check_place(str(file))
    assert not caught.value.retryable


@pytest.mark.parametrize(
    ("size", "journal"), [(2 * 2**20, 128 * 2**10), (2**19, 64 * 2**10), (2**30, 4 * 2**20)], ids=str
)
def test_a_small_disk_has_a_small_journal(
    size: int, journal: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Else it would take all of it before anything is moved to the file, whose room can be used again."""
    monkeypatch.setattr(os, "statvfs", lambda path: SimpleNamespace(f_bavail=size, f_frsize=1, f_blocks=size))
    path = tmp_path / "kq.db"
    assert journal_size(str(path)) == journal
    with closing(SQLiteStore(str(path), 10.0)) as store:
        store.declare("q", {})
        for n in range(60):
            store.put("q", [Entry(f"{n}", b"x" * 3000, 4)], None)
        log = path.with_name("kq.db-wal").stat().st_size
        assert log <= 2 * journal
        # Nor is more taken at once than that has room for.
        taken = store.take("q", 60, 1000).leases
        assert len(taken) == min(60, -(-2 * journal // 3000))
