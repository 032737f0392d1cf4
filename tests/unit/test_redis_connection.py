"""What is said first on a connection to Redis, and what comes of the answers."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from threading import Thread
from typing import Any

import pytest

from kq.backends.redis_address import Address, address_of
from kq.backends.redis_answer import Answers
from kq.backends.redis_connection import Connector
from kq.backends.redis_error import Broken, Late, RedisErrors, Refusal
from kq.backends.tls import context
from kq.driver import Tls
from kq.errors import Internal, PermissionDenied
from kq.version import __version__

#: What every connection says of itself.
INTRODUCTION = [[b"CLIENT", b"SETINFO", b"LIB-NAME", b"kq"], [b"CLIENT", b"SETINFO", b"LIB-VER", __version__.encode()]]


class Server:
    """Takes one connection, reads what is said on it, and answers each command with the next of some lines."""

    def __init__(self, *lines: bytes) -> None:
        self._lines = lines
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.said: list[Any] = []
        self.ended = False
        self._thread = Thread(target=self._run, daemon=True)
        self._thread.start()

    def connector(self, place: str = "{}", timeout: float = 5.0, name: str = "") -> Connector:
        """Return what connects to it."""
        address = address_of("redis://" + place.format(f"127.0.0.1:{self._listener.getsockname()[1]}"))
        return Connector(address, timeout=timeout, connect_timeout=5.0, heartbeat=30.0, name=name)

    def _run(self) -> None:
        connection, _ = self._listener.accept()
        with connection:
            commands = Answers(connection)
            try:
                for line in self._lines:
                    self.said.append(commands.read())
                    connection.sendall(line + b"\r\n")
                while True:
                    self.said.append(commands.read())
            except (Broken, OSError):
                # The other end has closed it.
                self.ended = True

    def close(self) -> None:
        """Wait until it has read all that was said."""
        self._thread.join(10.0)
        assert not self._thread.is_alive()
        self._listener.close()


@pytest.fixture
def serve() -> Iterator[Any]:
    made: list[Server] = []

    def make(*lines: bytes) -> Server:
        made.append(Server(*lines))
        return made[-1]

    yield make
    for server in made:
        server.close()


def test_all_that_is_needed_is_said_at_once(serve: Any) -> None:
    """Who we are, what the server's list shows, and which database; in the order in which it works."""
    server = serve(*[b"+OK"] * 5)
    connection = server.connector("us%20er:pass@{}/3", name="app one").connect()
    connection.close()
    connection.close()
    server.close()
    setup = [[b"AUTH", b"us er", b"pass"], [b"CLIENT", b"SETNAME", b"app-one"], [b"SELECT", b"3"]]
    assert server.said == [*setup, *INTRODUCTION]
    assert server.ended


def test_what_is_not_needed_is_not_said(serve: Any) -> None:
    """The first database is there by itself; and an introduction that the server does not know harms nothing."""
    server = serve(b"-ERR unknown subcommand", b"-NOPERM this user has no permissions")
    connection = server.connector().connect()
    connection.socket.sendall(b"*1\r\n$4\r\nPING\r\n")
    connection.close()
    server.close()
    assert server.said == [*INTRODUCTION, [b"PING"]]


def test_a_password_alone_is_the_default_accounts(serve: Any) -> None:
    server = serve(*[b"+OK"] * 3)
    server.connector(":pass@{}").connect().close()
    assert server.said[0] == [b"AUTH", b"pass"]


def test_an_account_without_a_password_is_signed_in_to(serve: Any) -> None:
    """Else its owner would be somebody else: the default account."""
    server = serve(*[b"+OK"] * 3)
    server.connector("us@{}").connect().close()
    assert server.said[0] == [b"AUTH", b"us", b""]


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (b"-WRONGPASS invalid username-password pair", Refusal),
        (b"-ERR AUTH <password> called without any password configured for the default user", Refusal),
        (b"-DENIED Redis is running in protected mode", Refusal),
        (b"-ERR max number of clients reached", Broken),
        (b"-LOADING Redis is loading the dataset in memory", Broken),
        (b"HTTP/1.1 400 Bad Request", Broken),
    ],
)
def test_who_is_not_let_in_is_told_why(serve: Any, answer: bytes, expected: type[Exception]) -> None:
    """With what the server says first; and the connection is closed."""
    server = serve(answer, *[b"-NOAUTH Authentication required."] * 2)
    with pytest.raises(expected) as caught:
        server.connector(":pass@{}").connect()
    assert answer[1:8].decode() in str(caught.value)
    server.close()
    assert server.ended


def test_a_server_that_hangs_up_on_encryption_is_gone() -> None:
    """It is not taken for one whose certificate is not to be trusted: later it may go well."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def hang_up() -> None:
            connection, _ = listener.accept()
            with connection:
                # What has not been read would make it a reset.
                connection.recv(1 << 16)

        address = address_of(f"rediss://127.0.0.1:{listener.getsockname()[1]}")
        connector = Connector(
            address, timeout=5.0, connect_timeout=5.0, heartbeat=30.0, name="", tls=context(Tls(verify=False))
        )
        server = Thread(target=hang_up, daemon=True)
        server.start()
        with pytest.raises(Broken, match="closed the connection while it was being encrypted"):
            connector.connect()
        server.join(10.0)


def test_a_server_that_says_nothing_is_late(serve: Any) -> None:
    server = serve()
    with pytest.raises(Late, match=r"no answer within 0\.05 s"):
        server.connector(timeout=0.05).connect()


def test_where_nobody_listens_there_is_no_connection() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    connector = Connector(
        address_of(f"redis://127.0.0.1:{port}"), timeout=5.0, connect_timeout=5.0, heartbeat=30.0, name=""
    )
    with pytest.raises(Broken, match="refused"):
        connector.connect()


def test_what_is_no_host_is_no_host() -> None:
    """Python cannot even ask for it."""
    address = Address(host="\u0430" * 70, port=1, database=0, username=None, password=None)
    connector = Connector(address, timeout=5.0, connect_timeout=5.0, heartbeat=30.0, name="")
    with pytest.raises(Broken, match="is no name of a host"):
        connector.connect()


@pytest.mark.parametrize(
    ("text", "is_denied", "reason"),
    [
        ("WRONGPASS invalid username-password pair", True, "refused"),
        (
            "ERR AUTH <password> called without any password configured for the default user",
            True,
            "refused",
        ),
        ("DENIED Redis is running in protected mode", True, "refused"),
        ("NOPERM User u has no permissions to access the '{kq:app:ROOM}:m' key", True, "refused"),
        (
            "ERR The user executing the script can't run this command or subcommand script: x",
            True,
            "refused",
        ),
        ("OOM command not allowed when used memory > 'maxmemory'.", False, "full"),
        ("ERR Error running script (call to f_1): @user_script:3: OOM command not allowed when", False, "full"),
        ("READONLY You can't write against a read only replica.", False, "refused"),
        ("WRONGTYPE Operation against a key holding the wrong kind of value", False, "refused"),
        ("ERR the key {kq:app:DENIED}:m holds what is not ours; NOPERM", False, "refused"),
    ],
)
def test_refusals_become_errors_of_ours(text: str, is_denied: bool, reason: str) -> None:
    error = RedisErrors("redis://h").ours(Refusal(text))
    assert isinstance(error, PermissionDenied if is_denied else Internal)
    assert error.details["reason"] == reason
