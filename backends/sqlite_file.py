"""Where an SQLite file may be: what a URL names, and what the place must be like."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from time import monotonic
from typing import Final
from urllib.parse import unquote

from kq.backends.store import BrokerAway
from kq.config import hide_password
from kq.errors import Internal, Invalid

#: Types of file systems that other machines share, so that WAL's shared memory is not shared by all.
_NETWORK_FILE_SYSTEMS: Final = frozenset(
    {
        "nfs", "nfs4", "cifs", "smb3", "smbfs", "afs", "ceph", "lustre", "beegfs", "gpfs", "vboxsf", "vmhgfs", "prl_fs",
        "fuse.sshfs", "fuse.glusterfs", "fuse.ceph-fuse", "fuse.s3fs", "fuse.gcsfuse", "fuse.rclone", "fuse.juicefs",
        "fuse.vmhgfs-fuse",
    }
)  # fmt: skip

#: Bytes of a journal that SQLite tidies up by itself, and of the smallest that it is to keep; which part of a small
#: disk one has at most.
_JOURNAL: Final = 4 * 2**20
_LEAST_JOURNAL: Final = 64 * 1024
_JOURNAL_OF: Final = 16
#: Bytes of a disk that are kept free for taking and settling; of a small one, a quarter.
_RESERVE: Final = 16 * 2**20
#: Which part of that is to be the disk's own, and not the file's, for the journal.
_JOURNAL_SHARE: Final = 4
#: Bytes that are stored, and seconds, before the disk is looked at again.
_LOOK_AFTER: Final = 2**20
#: How often, at least, before what is kept of a small disk is stored.
_LOOKS: Final = 8
_LOOK_EVERY: Final = 1.0
#: Bytes that a message of none takes on the disk until SQLite has tidied up: a page of the table and of two indexes.
_OVERHEAD: Final = 3 * 4096
#: What it takes of that where many are stored together, at most.
_PAGE: Final = 4096


def path_of(url: str) -> str:
    """Return the file that a URL names: three slashes for a relative path, four for an absolute one.

    Raises:
        Invalid: If it names a host, or no file, as the database in memory; or has a query.
    """
    _, _, rest = url.partition("://")
    host, slash, path = rest.partition("/")
    path, _, query = path.partition("?")
    path = unquote(path)
    if query:
        raise Invalid(f"broker: expected no options behind the file's name, got {hide_password(url)!r}; there are none")
    if host or not slash or not path:
        raise Invalid(
            f"broker: expected sqlite:///relative.db or sqlite:////absolute.db, got {hide_password(url)!r}"
            + ("; a third slash is missing" if host else "")
        )
    if path == ":memory:":
        raise Invalid(
            "broker: sqlite:///:memory: would be another database for each connection; use memory:// for messages that "
            "live as long as this process, as in tests"
        )
    return path


def check_place(path: str) -> None:
    """Refuse a file whose directory is missing, cannot be written to, or is on a network file system.

    Raises:
        BrokerAway: Saying which, and what to do.
    """
    # Where it really is, whatever it is called.
    file = os.path.realpath(path)
    folder = os.path.dirname(file)
    if not os.path.isdir(folder):
        raise BrokerAway(
            f"the directory {folder} does not exist; make it, or choose another file in the broker's URL",
            details={"reason": "unavailable"},
        )
    target = path if os.path.exists(path) else folder
    if not os.access(target, os.W_OK) or not os.access(folder, os.W_OK):
        raise BrokerAway(
            f"{target} cannot be written to; give this user write permission on the file and its directory",
            details={"reason": "refused"},
        )
    point, kind = _file_system(file)
    if kind in _NETWORK_FILE_SYSTEMS:
        raise BrokerAway(
            f"{folder} is on a network file system ({kind}), where SQLite cannot keep messages safe; "
            "use a local disk, or Redis or RabbitMQ",
            details={"reason": "refused"},
            retryable=False,
        )
    if point == file:
        raise BrokerAway(
            f"{file} is mounted by itself, as a container's single file; SQLite keeps what is stored last in a second "
            f"file beside it ({os.path.basename(file)}-wal), which would stay in {folder} here and be lost with it: "
            "mount a folder, and have the file in there",
            details={"reason": "refused"},
            retryable=False,
        )


def _file_system(path: str) -> tuple[str, str]:
    """Return where the file system that holds ``path`` is mounted, and its type; empty where nobody can tell."""
    best, kind = "", ""
    try:
        with open("/proc/self/mounts", encoding="utf-8", errors="replace") as mounts:
            for line in mounts:
                _, point, name, *_ = line.split(" ")
                point = point.replace("\\040", " ")
                inside = path == point or path.startswith(point.rstrip("/") + "/")
                if inside and len(point) >= len(best):
                    best, kind = point, name
    except OSError:
        return "", ""
    return best, kind


def journal_size(path: str) -> int:
    """Return how many bytes a file's journal should have at most before it is tidied up: of a small disk a little part.

    Else it takes all that there is, and nothing in it is moved to the file, where its room could be used again.
    """
    try:
        found = os.statvfs(os.path.dirname(os.path.realpath(path)))
    except OSError:
        return _JOURNAL
    return max(_LEAST_JOURNAL, min(_JOURNAL, found.f_blocks * found.f_frsize // _JOURNAL_OF))


class Disk:
    """The disk that a file is on. Several threads may ask at once.

    Args:
        path: The file.
    """

    def __init__(self, path: str) -> None:
        self._path = path
        self._folder = os.path.dirname(os.path.realpath(path))
        #: Bytes that have been stored since the last look, and when to look again anyway.
        self._stored = 0
        self._look_after = _LOOK_AFTER
        self._look_at = 0.0

    def reserve(self, sizes: Sequence[int], unused: Callable[[], int]) -> None:
        """Refuse to store more where it is nearly full: what is stored must still be taken, and that takes room.

        It is looked at after each megabyte, of a small disk less, or second.

        Args:
            sizes: How many bytes each of the messages has that are to be stored.
            unused: Returns how many bytes of the file itself are free; asked only where the disk is nearly full.

        Raises:
            Internal: With reason ``full``.
        """
        size_of_all = sum(sizes)
        self._stored += size_of_all + _OVERHEAD * len(sizes)
        now = monotonic()
        if self._stored < self._look_after and now < self._look_at:
            return
        self._look_at = 0.0
        try:
            found = os.statvfs(self._folder)
        except OSError:
            return
        free, size = found.f_bavail * found.f_frsize, found.f_blocks * found.f_frsize
        # It is written to the journal first, and from there to where it belongs.
        needed = size_of_all + _PAGE * len(sizes) if size_of_all > _LOOK_AFTER else 0
        kept = min(_RESERVE, size // 4)
        self._look_after = min(_LOOK_AFTER, kept // _LOOKS)
        # A file never becomes smaller: what has been handled leaves room in it. The journal has to grow all the same.
        if free < kept + 2 * needed and (
            free < kept // _JOURNAL_SHARE + needed or free + unused() < kept + 2 * needed
        ):  # fmt: skip
            raise Internal(
                f"{self._path}: only {free:,} bytes are free; the rest is kept for handling what is stored",
                details={"reason": "full"},
            )
        self._stored, self._look_at = 0, now + _LOOK_EVERY
