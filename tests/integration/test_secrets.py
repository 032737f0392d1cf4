"""A password is seen by its broker and by nobody else: not in output, logs, errors, reprs or argv."""

from __future__ import annotations

import json
import logging
import socket
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

import kq
from kq import errors
from kq.backend import BackendOptions
from kq.driver import Driver, Tls
from kq.worker.log import JsonFormatter, TextFormatter
from tests.account import account
from tests.broker import AMQP_URL, REDIS_URL, Broker, find
from tests.integration.conftest import PATIENCE, Shop, children_of

#: The password; no part of it is anywhere by chance.
CANARY = "Zq7Kan4rienvogelZq7"


def _closed_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def _place(url: str) -> str:
    return url.partition("://")[2].rpartition("@")[2]


#: Ways to go wrong, each with the canary in the URL; what is in braces is filled in by the test.
WRONG = {
    "redis: wrong password": "redis://nobody:{canary}@{redis}",
    "redis: wrong password as parameter": "redis://{redis}?username=nobody&password={canary}",
    "rabbitmq: wrong password": "amqp://nobody:{canary}@{amqp}",
    "redis: unreachable": "redis://:{canary}@127.0.0.1:{closed}/0",
    "redis: unreachable, encrypted": "rediss://:{canary}@127.0.0.1:{closed}/0?tls_verify=false",
    "rabbitmq: unreachable": "amqp://user:{canary}@127.0.0.1:{closed}//",
    "rabbitmq: two, unreachable": "amqp://user:{canary}@127.0.0.1:{closed};amqp://user:{canary}@127.0.0.1:{closed}",
    "no TLS server": "rediss://user:{canary}@{redis}",
    "client's own switch": "amqps://user:{canary}@{amqp}?ssl_cert_reqs=none",
    "ill-formed: no //": "redis:user:{canary}@localhost",
    "ill-formed: no @": "amqp://user:{canary}",
    "ill-formed: port": "redis://user:{canary}@localhost:x{canary}/0",
    "ill-formed: amqp port": "amqp://user:{canary}@localhost:x{canary}/0",
    "ill-formed: brackets": "redis://user:{canary}@[localhost/0",
    "ill-formed: slash": "redis://user:{canary}/{canary}@localhost/0",
    "ill-formed: database": "redis://user:{canary}@localhost/zero",
    "ill-formed: amqp slash": "amqp://user:1/{canary}@localhost/0",
    "unknown scheme": "bogus://user:{canary}@localhost",
    "scheme after password": "user:{canary}@localhost://",
}


@pytest.fixture(params=WRONG)
def wrong_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Each URL that goes wrong in its own way."""
    for name in ("redis", "rabbitmq"):
        find(name, tmp_path)
    return WRONG[request.param].format(
        canary=CANARY, redis=_place(REDIS_URL), amqp=_place(AMQP_URL), closed=_closed_port()
    )


def assert_clean(text: str, where: str) -> None:
    """See to it that a text does not hold the canary, however it may be written."""
    assert CANARY not in text, f"the password is in {where}:\n{text}"
    assert CANARY.lower() not in text.lower(), f"the password is in {where}:\n{text}"


def test_commands_show_no_password(local_shop: Shop, wrong_url: str) -> None:
    """No command shows it, with tracebacks or without, in text or JSON, wherever the URL comes from."""
    queue = local_shop.queue
    # By variable and with tracebacks, or by a file of its own and as JSON.
    variable = {"KQ_BROKER_URL": wrong_url, "KQ_PUBLISH_TIMEOUT": "1"}
    in_file = {"KQ_BROKER_URL_FILE": str(local_shop.folder / "url"), "KQ_LOG_FORMAT": "json", "KQ_PUBLISH_TIMEOUT": "1"}
    worker = ["worker", "shop:app", "-l", "debug", "--connect-timeout", "0.1"]
    commands = [(["check", "--debug"], variable), (worker, in_file)]
    if "nobody" in wrong_url:
        # These reach a broker, each in its own way.
        commands += [
            (["info", queue], in_file), (["publish", queue, "1", "--debug"], variable),
            (["dead", "list", queue, "--debug"], in_file), ([*worker, "--debug"], variable),
        ]  # fmt: skip
    (local_shop.folder / "url").write_text(wrong_url + "\n")
    environment = {key: value for key, value in local_shop.environment.items() if key != "KQ_BROKER_URL"}
    running = [
        subprocess.Popen(
            [sys.executable, "-m", "kq", *command],
            cwd=local_shop.folder, env={**environment, **more}, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )
        for command, more in commands
    ]  # fmt: skip
    for process in running:
        output, _ = process.communicate(timeout=2 * PATIENCE)
        assert process.returncode not in (0, None), output
        assert output.strip()
        assert_clean(output, " ".join(process.args))  # type: ignore[arg-type]


@pytest.fixture
def records() -> Iterator[list[logging.LogRecord]]:
    """Everything that anybody logs, down to debug."""
    found: list[logging.LogRecord] = []

    class Collector(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            found.append(record)

    handler = Collector()
    loggers = [logging.getLogger(name) for name in ("", "amqp", "kombu", "redis", "kq")]
    levels = [logger.level for logger in loggers]
    loggers[0].addHandler(handler)
    for logger in loggers:
        logger.setLevel(logging.DEBUG)
    yield found
    loggers[0].removeHandler(handler)
    for logger, level in zip(loggers, levels, strict=True):
        logger.setLevel(level)


def chain(error: BaseException) -> Iterator[BaseException]:
    """Yield an error and all that it came of, shown by tracebacks or not."""
    seen: list[BaseException] = []
    todo: list[BaseException | None] = [error]
    while todo:
        one = todo.pop()
        if one is not None and one not in seen:
            seen.append(one)
            yield one
            todo += [one.__cause__, one.__context__]


def assert_clean_error(error: BaseException) -> None:
    """See to it that nothing that can be printed of an error holds the canary."""
    assert_clean("".join(traceback.format_exception(error)), "a traceback")
    for one in chain(error):
        assert_clean(f"{one} {one!r} {one.args!r} {getattr(one, 'details', '')!r}", f"an error: {type(one)}")


def objects(root: object) -> Iterator[object]:
    """Yield an object and the objects of ours and of the clients that hang off it."""
    seen: set[int] = set()
    todo = [root]
    while todo:
        one = todo.pop()
        if id(one) in seen:
            continue
        seen.add(id(one))
        yield one
        names = [*getattr(one, "__dict__", {}), *getattr(type(one), "__slots__", ())]
        for name in names:
            with suppress(AttributeError):
                value = getattr(one, name)
                if type(value).__module__.partition(".")[0] in ("kq", "kombu", "redis", "amqp"):
                    todo.append(value)


def assert_clean_objects(root: object) -> int:
    """See to it that no repr holds the canary, and return how many there were."""
    count = 0
    for one in objects(root):
        assert_clean(f"{one!r} {one!s}", f"the repr of a {type(one)}")
        count += 1
    return count


def assert_clean_records(records: list[logging.LogRecord]) -> None:
    """See to it that no log line holds the canary, in any of our formats."""
    for record in records:
        for formatter in (TextFormatter(), JsonFormatter()):
            assert_clean(formatter.format(record), f"the log of {record.name}")


def test_errors_logs_and_reprs_show_no_password(wrong_url: str, records: list[logging.LogRecord]) -> None:
    """No error, none that it came of, no log record and no repr shows it."""
    queue = "secret:q"
    calls: list[Callable[[kq.App], Any]] = [
        lambda app: app.publish(queue, 1),
        lambda app: app.registry.backend().check(),
        lambda app: kq.Consumer(app, queue).receive(timeout=0.1),
    ]
    caught: list[BaseException] = []
    try:
        app = kq.App("secrets", broker=wrong_url, publish_timeout=1.0)
    except errors.Invalid as error:
        caught.append(error)
    else:
        with app:
            assert_clean_objects(app)
            for call in calls:
                with pytest.raises(errors.Error) as raised:
                    call(app)
                caught.append(raised.value)
            assert_clean_objects(app)
    for one in caught:
        assert_clean_error(one)
    assert_clean_records(records)


def test_values_show_no_password() -> None:
    """Settings, drivers and what backends are opened with can be printed."""
    url = f"redis://user:{CANARY}@localhost/0"
    pem = f"-----BEGIN PRIVATE KEY-----\n{CANARY}\n-----END PRIVATE KEY-----"
    tls = Tls(key=pem, key_password=CANARY)
    for value in (
        tls,
        Driver(url, tls=tls),
        BackendOptions(30, 30, 10, "test", tls=tls),
        kq.config.Settings(url),
        {"nested": [Driver(url), tls]},
    ):
        assert_clean(f"{value!r} {value!s}", f"the repr of a {type(value)}")


@pytest.fixture(params=["redis", "rabbitmq"])
def guarded(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Broker]:
    """A broker that lets us in by a password that is the test's own."""
    found = find(request.param, tmp_path)
    with account(found) as url:
        yield Broker(found.name, url, found.used)
    found.forget()


def test_a_connected_app_shows_no_password(guarded: Broker, records: list[logging.LogRecord]) -> None:
    """Of an app that is connected, and whose messages flow, neither reprs nor logs show it."""
    global CANARY
    before, CANARY = CANARY, guarded.url.rpartition("@")[0].rpartition(":")[2]
    try:
        queue = guarded.queue_id()
        with kq.App("secrets", broker=guarded.url) as app:
            seen: list[Any] = []
            app.consumer(queue)(seen.append)
            app.publish(queue, 1)
            with kq.Consumer(app, queue) as consumer:
                assert assert_clean_objects(app) > 5
                assert assert_clean_objects(consumer) > 5
            assert app.drain() == 1
            assert_clean_objects(app.registry.backend())
        assert_clean_records(records)
    finally:
        CANARY = before


@pytest.mark.parametrize("by", ["-b", "KQ_BROKER_URL", "KQ_BROKER_URL_FILE"])
def test_processes_show_no_password(guarded: Broker, tmp_path: Path, by: str) -> None:
    """No child of a worker has it among its arguments; the worker itself only where somebody typed it there."""
    password = guarded.url.rpartition("@")[0].rpartition(":")[2]
    shop = Shop(guarded, tmp_path)
    try:
        del shop.environment["KQ_BROKER_URL"]
        file = tmp_path / "broker-url"
        file.write_text(guarded.url)
        if by != "-b":
            shop.environment[by] = guarded.url if by == "KQ_BROKER_URL" else str(file)
        worker = shop.worker("-p", "2", *(["-b", guarded.url] if by == "-b" else []))
        shop.app.publish(shop.queue, {"n": 1})
        shop.until("done", 1)

        assert (password in Path(f"/proc/{worker.pid}/cmdline").read_text()) == (by == "-b")
        children = children_of(worker.pid)
        assert len(children) == 2
        for child in children:
            assert password not in Path(f"/proc/{child}/cmdline").read_text()
        assert shop.stop(worker) == 0
        assert password not in shop.log()
    finally:
        shop.close()


def test_the_canary_would_be_seen() -> None:
    """The searches above find what they look for."""
    record = logging.LogRecord("x", logging.INFO, "", 0, "%s", (CANARY,), None)
    with pytest.raises(AssertionError):
        assert_clean_records([record])
    hidden = errors.Invalid("fine")
    hidden.__context__ = ValueError(CANARY)
    with pytest.raises(AssertionError):
        assert_clean_error(hidden)
    with pytest.raises(AssertionError):
        assert_clean(json.dumps({"a": CANARY.upper()}), "a text")
