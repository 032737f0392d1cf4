"""Brokers of our own, to be killed, filled, blocked and restarted; and what they hold, by other clients than ours."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import sqlite3
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from time import monotonic, sleep
from typing import Any, Final, NamedTuple

import amqp
import redis

#: Seconds that a server may take to start, and to end.
_START_PATIENCE = 60.0
_STOP_PATIENCE = 20.0
#: Seconds between two looks.
_LOOK = 0.02
#: Seconds until our RabbitMQ sends again what it could not bring from a delay to its queue.
RETURN_RETRY: Final = 10.0
#: Seconds that rabbitmqctl may take.
_CONTROL_PATIENCE = 60.0


class Rest(NamedTuple):
    """What a broker holds of a queue: messages that wait, for a time to come, and with workers."""

    ready: int
    delayed: int
    leased: int

    @property
    def total(self) -> int:
        """All of them."""
        return sum(self)


class Site:
    """A broker of our own.

    Attributes:
        kind: ``sqlite``, ``redis`` or ``rabbitmq``.
        folder: Where it keeps its files.
        url: Where it is; always the same.
    """

    kind = ""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.url = ""

    def start(self) -> None:
        """Start it, and wait until it answers."""

    def kill(self) -> None:
        """End it as a power cut ends a process: at once."""

    def stop(self) -> None:
        """End it in order."""

    def close(self) -> None:
        """End it for good, and delete its files."""
        self.kill()
        shutil.rmtree(self.folder, ignore_errors=True)

    def rest(self, queue: str) -> Rest:
        """Count what a queue holds."""
        raise NotImplementedError

    def ready(self, queue: str) -> int:
        """Count what waits in a queue; cheaper than `rest` on some."""
        return self.rest(queue).ready

    def dead(self, queue: str) -> Counter[str]:
        """Return the ids of a queue's dead letters."""
        raise NotImplementedError

    def forget(self, queue: str) -> None:
        """Delete a queue and its dead-letter queue."""
        raise NotImplementedError

    def empty_buckets(self) -> None:
        """Drop what is delayed outside of the queues, where there is such a place."""


class SQLiteSite(Site):
    """A file. Nothing runs, so nothing can be killed.

    Args:
        folder: For the file.
        size: The size of a file system of its own, e.g. ``4m``; only root can make one.
    """

    kind = "sqlite"

    def __init__(self, folder: Path, size: str = "") -> None:
        super().__init__(folder)
        self._size = size
        if size:
            subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], check=True)
        self.path = folder / "kq.db"
        self.url = f"sqlite:///{self.path}"

    def close(self) -> None:
        """See `Site.close`."""
        if self._size:
            subprocess.run(["umount", "-l", str(self.folder)], check=False)
        super().close()

    @contextmanager
    def _reading(self) -> Iterator[sqlite3.Connection]:
        with closing(sqlite3.connect(self.path, timeout=20)) as db:
            yield db

    def rest(self, queue: str) -> Rest:
        """See `Site.rest`."""
        with self._reading() as db:
            rows = db.execute("SELECT state, count(*) FROM message WHERE queue = ? GROUP BY state", (queue,)).fetchall()
        counts = dict(rows)
        return Rest(counts.get(0, 0), counts.get(1, 0), counts.get(2, 0))

    def dead(self, queue: str) -> Counter[str]:
        """See `Site.dead`."""
        with self._reading() as db:
            return Counter(row[0] for row in db.execute("SELECT id FROM message WHERE queue = ?", (queue + ".dead",)))

    def forget(self, queue: str) -> None:
        """See `Site.forget`."""
        with closing(sqlite3.connect(self.path, timeout=20)) as db:
            db.execute("DELETE FROM message WHERE queue IN (?, ?)", (queue, queue + ".dead"))
            db.execute("DELETE FROM queue WHERE name IN (?, ?)", (queue, queue + ".dead"))
            db.commit()


class RedisSite(Site):
    """A Redis server.

    Args:
        folder: For its files.
        arguments: More of its command line, e.g. ``--maxmemory 8mb``.
        persistent: Whether it keeps an append-only file, synchronised at every write.
    """

    kind = "redis"

    def __init__(self, folder: Path, *arguments: str, persistent: bool = True) -> None:
        super().__init__(folder)
        self.port = free_port()
        self.url = f"redis://127.0.0.1:{self.port}/0"
        keep = ("--appendonly", "yes", "--appendfsync", "always") if persistent else ("--appendonly", "no")
        self._command = [
            "redis-server", "--port", str(self.port), "--bind", "127.0.0.1", "--dir", str(folder), "--save", "",
            "--daemonize", "no", *keep, *arguments,
        ]  # fmt: skip
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """See `Site.start`."""
        if self._process is not None and self._process.poll() is None:
            return
        with (self.folder / "redis.log").open("ab") as log:
            self._process = subprocess.Popen(self._command, stdout=log, stderr=log)
        wait_until(self._answers, f"Redis at port {self.port}", _START_PATIENCE)

    def _answers(self) -> bool:
        with closing(self.client()) as client, suppress(redis.RedisError):
            return bool(client.ping())
        return False

    def client(self) -> redis.Redis:
        """Return a client that is not ours."""
        return redis.Redis.from_url(self.url, socket_timeout=10, protocol=2)

    @property
    def pid(self) -> int:
        """The server's process id."""
        assert self._process is not None
        return self._process.pid

    def kill(self) -> None:
        """See `Site.kill`."""
        if self._process is not None:
            self._process.kill()
            self._process.wait(_STOP_PATIENCE)

    def stop(self) -> None:
        """See `Site.stop`."""
        if self._process is not None:
            self._process.terminate()
            self._process.wait(_STOP_PATIENCE)

    def rest(self, queue: str) -> Rest:
        """See `Site.rest`."""
        p = f"{{kq:{queue}}}:"
        with closing(self.client()) as client:
            counts: Any = client
            total, delayed, leased = counts.hlen(p + "m"), counts.zcard(p + "d"), counts.zcard(p + "l")
            listed = sum(counts.llen(f"{p}r:{n}") + counts.zcard(f"{p}b:{n}") for n in range(10))
        # What is on no list would never be seen again: as good as lost, and here it is counted as ready.
        return Rest(max(int(total) - int(delayed) - int(leased), int(listed)), int(delayed), int(leased))

    def dead(self, queue: str) -> Counter[str]:
        """See `Site.dead`."""
        with closing(self.client()) as client:
            keys: Any = client.hkeys(f"{{kq:{queue}}}.dead:m")
        return Counter(key.decode() for key in keys)

    def keys(self, queue: str) -> list[str]:
        """Return the names of a queue's keys, without what is common to them."""
        prefix = f"{{kq:{queue}}}"
        with closing(self.client()) as client:
            return sorted(key.decode().removeprefix(prefix) for key in client.scan_iter(prefix + "*", count=1000))

    def forget(self, queue: str) -> None:
        """See `Site.forget`."""
        with closing(self.client()) as client:
            for key in list(client.scan_iter(f"{{kq:{queue}*", count=1000)):
                client.unlink(key)


class RabbitSite(Site):
    """A RabbitMQ node with a name, a port and a data folder of its own; starts in about ten seconds.

    Args:
        folder: For its files.
        configuration: More lines of ``rabbitmq.conf``.
    """

    kind = "rabbitmq"

    def __init__(self, folder: Path, *configuration: str) -> None:
        super().__init__(folder)
        self.port = free_port()
        self.url = f"amqp://guest:guest@127.0.0.1:{self.port}"
        self.node = f"kqchaos{self.port}@localhost"
        # The server gives up root's rights, and must still reach its files.
        folder.chmod(0o755)
        for name in ("mnesia", "log"):
            (folder / name).mkdir(exist_ok=True)
        (folder / "rabbit.conf").write_text("\n".join(["loopback_users = none", *configuration]) + "\n")
        (folder / "plugins").write_text("[].\n")
        # Counts of quorum queues are as old as the one, late consumers are looked for as often as the other.
        # The last is what docs/guarantees.md advises.
        (folder / "advanced.config").write_text(
            "[{rabbit, [{quorum_tick_interval, 500}, {channel_tick_interval, 1000}, "
            f"{{dead_letter_worker_publisher_confirm_timeout, {int(RETURN_RETRY * 1000)}}}]}}].\n"
        )
        if os.getuid() == 0:
            for path in (folder, *folder.rglob("*")):
                shutil.chown(path, "rabbitmq")
        self._environment = {
            **os.environ,
            "RABBITMQ_NODENAME": self.node,
            "RABBITMQ_NODE_PORT": str(self.port),
            "RABBITMQ_DIST_PORT": str(free_port()),
            "RABBITMQ_NODE_IP_ADDRESS": "127.0.0.1",
            "RABBITMQ_MNESIA_BASE": str(folder / "mnesia"),
            "RABBITMQ_LOG_BASE": str(folder / "log"),
            "RABBITMQ_PID_FILE": str(folder / "pid"),
            "RABBITMQ_CONFIG_FILE": str(folder / "rabbit"),
            "RABBITMQ_ADVANCED_CONFIG_FILE": str(folder / "advanced.config"),
            "RABBITMQ_ENABLED_PLUGINS_FILE": str(folder / "plugins"),
            "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": "+S 1:1",
        }

    def start(self) -> None:
        """See `Site.start`."""
        if self._answers():
            return
        subprocess.run(
            ["rabbitmq-server", "-detached"], env=self._environment, check=True, capture_output=True, timeout=30
        )
        wait_until(self._answers, f"RabbitMQ {self.node}", _START_PATIENCE)

    def _answers(self) -> bool:
        with suppress(OSError, amqp.AMQPError), self.channel():
            return True
        return False

    @contextmanager
    def channel(self) -> Iterator[Any]:
        """Yield a channel of a client that is not ours."""
        connection = amqp.Connection(host=f"127.0.0.1:{self.port}", connect_timeout=5, read_timeout=20)
        connection.connect()
        try:
            channel = connection.channel()
            channel.auto_decode = False
            yield channel
        finally:
            with suppress(OSError, amqp.AMQPError):
                connection.close()

    def control(self, *arguments: str) -> str:
        """Run ``rabbitmqctl`` on this node, and return what it prints."""
        done = subprocess.run(
            ["rabbitmqctl", "-q", "-n", self.node, *arguments], capture_output=True, text=True, check=False,
            timeout=_CONTROL_PATIENCE,
        )  # fmt: skip
        assert done.returncode == 0, f"rabbitmqctl {' '.join(arguments)}: {done.stderr or done.stdout}"
        return done.stdout

    def _pid(self) -> int | None:
        with suppress(OSError, ValueError):
            pid = int((self.folder / "pid").read_text())
            # The number may be somebody else's by now.
            if self.node.encode() in Path(f"/proc/{pid}/environ").read_bytes():
                return pid
        return None

    def kill(self) -> None:
        """See `Site.kill`."""
        self._end(signal.SIGKILL)

    def stop(self) -> None:
        """See `Site.stop`."""
        self._end(signal.SIGTERM)

    def _end(self, number: int) -> None:
        pid = self._pid()
        if pid is not None:
            os.kill(pid, number)
            wait_until(lambda: self._pid() is None, f"the end of RabbitMQ {self.node}", _STOP_PATIENCE)

    def rest(self, queue: str) -> Rest:
        """See `Site.rest`; what is delayed, of all queues, for RabbitMQ keeps it in buckets that all share."""
        ready = delayed = leased = 0
        listed = self.control(
            "list_queues", "--no-table-headers", "name", "messages", "messages_ready", "messages_unacknowledged"
        )
        for line in listed.splitlines():
            name, total, waiting, held = line.split("\t")
            if name == queue:
                ready, leased = int(waiting), int(held)
            elif name.startswith("kq.delay."):
                # What has expired and is on its way is in the total alone.
                delayed += int(total)
        return Rest(ready, delayed, leased)

    def ready(self, queue: str) -> int:
        """See `Site.ready`."""
        with self.channel() as channel:
            return int(channel.queue_declare(queue, passive=True).message_count)

    def dead(self, queue: str) -> Counter[str]:
        """See `Site.dead`."""
        found: Counter[str] = Counter()
        with self.channel() as channel, suppress(amqp.AMQPError):
            while (message := channel.basic_get(queue + ".dead")) is not None:
                found[str(message.properties.get("message_id"))] += 1
        return found

    def forget(self, queue: str) -> None:
        """See `Site.forget`."""
        for name in (queue, queue + ".dead"):
            with suppress(OSError, amqp.AMQPError), self.channel() as channel:
                channel.queue_delete(name)
                channel.exchange_delete(name)

    def empty_buckets(self) -> None:
        """Drop what is delayed, of all queues: the node is one run's at a time."""
        with self.channel() as channel:
            for name in self.control("list_queues", "--no-table-headers", "name").splitlines():
                if name.startswith("kq.delay."):
                    channel.queue_purge(name)


def make(kind: str, *arguments: str) -> Site:
    """Make a broker of a kind in a new folder; start it yourself."""
    folder = Path(tempfile.mkdtemp(prefix=f"kq-chaos-{kind}-"))
    if kind == "sqlite":
        return SQLiteSite(folder, *arguments)
    if kind == "redis":
        return RedisSite(folder, *arguments)
    return RabbitSite(folder, *arguments)


def free_port() -> int:
    """Return a port that nobody listens on."""
    with closing(socket.create_server(("127.0.0.1", 0))) as server:
        return int(server.getsockname()[1])


def wait_until(what: Any, text: str, within: float) -> None:
    """Look until ``what()`` is true."""
    until = monotonic() + within
    while not what():
        if monotonic() > until:
            raise AssertionError(f"waited {within:g} s in vain for {text}")
        sleep(_LOOK)
