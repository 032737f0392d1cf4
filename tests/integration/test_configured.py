"""Workers that run from kq.yaml alone, with no application object."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

import pytest

from tests.broker import Broker, find
from tests.integration.conftest import PATIENCE, children_of, wait_for
from tests.integration.project import Project

_TWO_DRIVERS = (
    "  - {id: other, kind: queue.driver.redis, url: 'redis://h:port'}\n"
    "  - {id: broker, kind: queue.driver.memory, url: 'memory://'}\n"
)
EXAMPLE = Path(__file__).parents[2] / "examples" / "configured"


@pytest.fixture
def project(shared_broker: Broker, tmp_path: Path) -> Iterator[Project]:
    """An empty project on every broker that processes can share, in turn."""
    made = Project(shared_broker, tmp_path)
    yield made
    made.close()


@pytest.fixture
def local(tmp_path: Path) -> Iterator[Project]:
    """An empty project on SQLite, for what does not depend on the broker."""
    made = Project(Broker("sqlite", f"sqlite:///{tmp_path / 'kq.db'}"), tmp_path)
    yield made
    made.close()


def test_the_example_runs(project: Project) -> None:
    """The entry as it stands: payload directly, id and headers by queue.message(), a bad one dead-lettered."""
    queue = project.broker.queue_id("emails")
    entry = (EXAMPLE / "kq.yaml").read_text()
    assert "queue: app:emails" in entry
    project.write("kq.yaml", entry.replace("app:emails", queue))
    shutil.copy(EXAMPLE / "handlers.py", project.folder)
    good = project.run("publish", queue, '{"to": "ann@example.com"}', "-H", "priority=high").stdout.strip()
    bad = project.run("publish", queue, '{"to": "nobody"}').stdout.strip()

    done = project.run("worker", "--burst")

    assert done.returncode == 0, done.stderr
    assert f"to ann@example.com, id {good}, priority high" in done.stderr
    (dead,) = json.loads(project.run("dead", "list", queue, "--json").stdout)
    assert (dead["id"], dead["reason"], dead["error_message"]) == (bad, "not_retryable", "'nobody' is no address")


def test_options_of_a_worker_come_from_the_file(local: Project) -> None:
    """Command line over environment over file: processes and concurrency, as the start says them."""
    local.write("handlers.py", "def f(payload): pass\n")
    local.write(
        "kq.yaml",
        "namespace: shop\nworker: {processes: 3, concurrency: 5, log_format: text}\n"
        "entries: [{id: w, kind: queue.consumer, queue: q, method: f}]\n",
    )
    assert "3 processes x 5 handlers" in local.run("worker", "--burst").stderr
    assert "1 processes x 5 handlers" in local.run("worker", "--burst", KQ_PROCESSES="1").stderr
    assert "2 processes x 5 handlers" in local.run("worker", "--burst", "-p", "2", KQ_PROCESSES="1").stderr


def test_options_of_a_worker_come_from_the_app_s_own_file(local: Project) -> None:
    """An app that names its file has its worker's options from there, in the worker and for ``kq check``."""
    local.write("kq.yaml", "worker: {processes: 1}\n")
    local.write("other.yaml", "worker: {processes: 3, concurrency: 5, log_format: json, queues: [shop:q]}\n")
    local.write(
        "shop.py",
        "import kq\napp = kq.App('shop', config='other.yaml')\n@app.consumer('shop:q')\ndef f(payload): pass\n"
        "@app.consumer('shop:r')\ndef g(payload): pass\n",
    )
    lines = [json.loads(line) for line in local.run("worker", "shop:app", "--burst").stderr.splitlines()]
    assert "3 processes x 5 handlers" in lines[0]["message"]
    assert "shop:r" not in lines[0]["message"]
    done = local.run("check", "--offline", "-A", "shop:app", KQ_CONCURRENCY="7")
    rows = [line.split() for line in done.stdout.splitlines()]
    assert ["worker.processes", "3", "other.yaml:1"] in rows
    assert ["worker.concurrency", "7", "KQ_CONCURRENCY"] in rows
    assert ["worker.grace", "30s", "default"] in rows


@pytest.mark.parametrize("variable", ["KQ_PROCESSES", "KQ_GRACE", "KQ_POOL", "KQ_LOG_LEVEL"])
def test_a_variable_that_a_worker_cannot_read_is_found_by_check(local: Project, variable: str) -> None:
    """``kq check`` says of it what the worker would say."""
    local.write("handlers.py", "def f(payload): pass\n")
    local.write("kq.yaml", "entries: [{id: w, kind: queue.consumer, queue: 'a:q', method: f}]\n")
    said = [local.run(*command, **{variable: "nope"}) for command in (("worker",), ("check",), ("check", "--offline"))]
    assert [done.returncode for done in said] == [2, 2, 2]
    assert variable in said[0].stderr
    assert [done.stderr for done in said] == [said[0].stderr] * 3


@pytest.mark.parametrize(
    ("file", "variables"), [("worker: {queues: ['a:q', 'a:r']}\n", {}), ("", {"KQ_QUEUES": "a:q,a:r"})]
)
def test_a_queue_without_a_handler_is_found_by_check(local: Project, file: str, variables: dict[str, str]) -> None:
    """What a worker is told to consume and nothing handles is a warning, wherever it is said."""
    local.write("handlers.py", "def f(payload): pass\n")
    local.write("kq.yaml", file + "entries: [{id: w, kind: queue.consumer, queue: 'a:q', method: f}]\n")
    for command in (("check",), ("check", "--offline")):
        done = local.run(*command, **variables)
        assert done.returncode == 0
        assert "warning: worker: queue a:r has no handler" in done.stderr
        assert "a:q has no handler" not in done.stderr


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (
            "entries: [{id: w, kind: queue.consumer, queue: 'a:q', method: nope}]\n",
            "handlers.py has no function 'nope'",
        ),
        ("entries: [{id: w, kind: queue.consumr}]\n", "did you mean queue.consumer?"),
        ("worker: {processes: 0}\n", "processes: expected an integer from 1 to 512, got '0'"),
        ("entries: []\n", "nothing to consume"),
        (
            "entries: [{id: broker, kind: queue.driver.redis, url: 'redis://h', tls: {}},"
            " {id: w, kind: queue.consumer, queue: 'a:q', method: f}]\n",
            "kq.yaml:1: broker: tls: redis://h is not encrypted",
        ),
    ],
)
def test_a_wrong_file_ends_with_78(local: Project, text: str, why: str) -> None:
    """A worker does not start from a file that is wrong; the error is on stderr, with its place, and no traceback."""
    local.write("handlers.py", "def f(payload): pass\n")
    local.write("kq.yaml", text)
    for command in (("worker",), ("check", "--offline")):
        done = local.run(*command, KQ_BROKER_URL="")
        if command[0] == "check" and "nothing to consume" in why:
            continue
        assert done.returncode == 78
        assert why in done.stderr
        assert "Traceback" not in done.stderr


def test_without_app_and_file_the_usage_is_told(local: Project) -> None:
    """A worker that has nothing to go by says what it expects."""
    done = local.run("worker")
    assert done.returncode == 2
    assert "--config kq.yaml" in done.stderr


def test_a_file_that_is_named_wins_over_the_variable(local: Project) -> None:
    """``KQ_APP`` is for a worker that is given neither an app nor a file."""
    local.write("handlers.py", "def f(payload): pass\n")
    local.write("kq.yaml", "entries: [{id: w, kind: queue.consumer, queue: 'app:q', method: f}]\n")
    assert local.run("worker", "--burst", "--config", "kq.yaml", KQ_APP="nosuch:app").returncode == 0
    done = local.run("worker", "--burst", KQ_APP="nosuch:app")
    assert done.returncode == 78
    assert "nosuch" in done.stderr


_ARRANGED = {
    "basic": "logging.basicConfig(format='MINE %(message)s', level=logging.DEBUG)",
    # Which silences all loggers that there are, by default.
    "dict": "logging.config.dictConfig({'version': 1, 'formatters': {'f': {'format': 'MINE %(message)s'}}, 'root': "
    "{'handlers': ['h'], 'level': 'INFO'}, 'handlers': {'h': {'class': 'logging.StreamHandler', 'formatter': 'f'}}})",
}


@pytest.mark.parametrize("pool", ["processes", "threads"])
@pytest.mark.parametrize("how", ["basic", "dict", "not"])
def test_the_programs_own_logging_is_used(local: Project, how: str, pool: str) -> None:
    """What a program has arranged for its logs holds for kq's as well; else all of them look like kq's."""
    local.write(
        "app.py",
        f"""import logging, logging.config, kq

{_ARRANGED.get(how, "")}
app = kq.App("test")


@app.consumer("app:q", max_attempts=1)
def handle(payload):
    logging.getLogger("shop").info("handling %s", payload)
    raise ValueError("broken")
""",
    )
    assert local.run("publish", "-A", "app:app", "app:q", "17").returncode == 0
    done = local.run("worker", "app:app", "--burst", "-p", "1", "--pool", pool)
    begin = " INFO    " if how == "not" else "MINE "
    shown = [line for line in done.stderr.splitlines() if "handling 17" in line or "kq worker of test" in line]
    assert len(shown) == 2, done.stderr
    assert all(begin in line for line in shown)
    assert "dead-lettered, max_attempts: ValueError: broken\n" in done.stderr
    assert 'raise ValueError("broken")' in done.stderr


def test_check_prints_what_is_in_force(local: Project) -> None:
    """Every value with its origin, without connecting anywhere."""
    local.write("handlers.py", "def f(payload): pass\n")
    local.write(
        "kq.yaml",
        "namespace: shop\nsettings: {lease: 7s}\nentries:\n  - {name: q, kind: queue.queue, max_length: 10}\n"
        "  - {id: w, kind: queue.consumer, queue: q, method: f, timeout: 9s}\n"
        "  - {id: other, kind: queue.driver.redis, url: 'redis://user:c4nary@127.0.0.1:1',\n"
        "     connection_name: other, reconnect: {initial: 1s}}\n"
        "  - {id: broker, kind: queue.driver.sqlite, url: 'sqlite:///kq.db'}\n",
    )
    done = local.run("check", "--offline", KQ_BROKER_URL="redis://user:c4nary@127.0.0.1:1", KQ_LEASE="")
    assert done.returncode == 0, done.stderr
    rows = [line.split() for line in done.stdout.splitlines()]
    assert ["lease", "7s", "kq.yaml:2"] in rows
    assert ["broker", "redis://user:**@127.0.0.1:1", "KQ_BROKER_URL"] in rows
    assert ["max_length", "10", "kq.yaml:4"] in rows
    assert ["max_attempts", "5", "default"] in rows
    assert ["queue", "shop:q"] in rows
    assert ["timeout", "9s", "kq.yaml:5"] in rows
    assert ["connection_name", "other", "kq.yaml:7"] in rows
    assert ["url", "redis://user:**@127.0.0.1:1", "kq.yaml:6"] in rows
    assert ["reconnect.initial", "1s", "kq.yaml:7"] in rows
    assert ["reconnect.max", "2s", "default"] in rows
    assert "c4nary" not in done.stdout + done.stderr
    schema = json.loads(local.run("check", "--schema").stdout)
    assert schema["properties"]["entries"]


def test_reload_is_all_or_nothing(local: Project) -> None:
    """HUP: new code and configuration take effect; a file that is wrong leaves the old in force and says so."""
    local.write("handlers.py", "import logging\ndef f(payload): logging.getLogger().info('first %s', payload)\n")
    file = "namespace: shop\nentries:\n  - {id: w, kind: queue.consumer, queue: q, method: f, concurrency: 1}\n"
    local.write("kq.yaml", file)
    worker = local.worker("-p", "1", "--connect-timeout", "0.5")
    local.run("publish", "shop:q", "1")
    local.until("first 1")
    children = children_of(worker.pid)

    local.write("kq.yaml", file + "  - {id: v, kind: queue.consumr}\n")
    worker.send_signal(signal.SIGHUP)
    local.until("nothing is reloaded")
    assert "did you mean queue.consumer?" in local.log()
    local.write("kq.yaml", file + "  - {id: v, kind: queue.consumer, queue: other, method: missing}\n")
    worker.send_signal(signal.SIGHUP)
    local.until("nothing is reloaded", 2)
    local.write("kq.yaml", "namespace: shop\nentries: []\n")
    worker.send_signal(signal.SIGHUP)
    local.until("nothing is reloaded", 3)
    assert "nothing to consume" in local.log()
    local.write("kq.yaml", file + _TWO_DRIVERS)
    worker.send_signal(signal.SIGHUP)
    local.until("nothing is reloaded", 4)
    assert "kq.yaml:4: driver other: broker: expected a URL such as redis://" in local.log()
    local.write("kq.yaml", file)
    local.run("publish", "shop:q", "2")
    local.until("first 2")
    assert children_of(worker.pid) == children

    unreachable = "  - {id: broker, kind: queue.driver.redis, url: 'redis://127.0.0.1:1'}\n"
    elsewhere = "  - {name: q, kind: queue.queue, driver: redis}\n"
    local.write("kq.yaml", file + unreachable.replace("id: broker", "name: redis") + elsewhere + local.main())
    worker.send_signal(signal.SIGHUP)
    local.until("nothing is reloaded", 5)
    assert "127.0.0.1:1" in local.log().rpartition("nothing is reloaded")[2]
    assert children_of(worker.pid) == children
    local.write("kq.yaml", file)

    # New code, the same configuration: children are replaced, one by one.
    local.write("handlers.py", "import logging\ndef f(payload): logging.getLogger().info('second %s', payload)\n")
    worker.send_signal(signal.SIGHUP)
    wait_for(lambda: children_of(worker.pid) and not set(children_of(worker.pid)) & set(children), "new children")
    local.run("publish", "shop:q", "3")
    local.until("second 3")
    assert local.log().count("kq worker of") == 1

    # A new configuration: the worker starts anew, under the same process id.
    local.write("kq.yaml", file + "  - {id: v, kind: queue.consumer, queue: other, method: f, timeout: 5s}\n")
    worker.send_signal(signal.SIGHUP)
    local.until("kq worker of", 2)
    local.run("publish", "shop:other", "4")
    local.until("second 4")
    worker.send_signal(signal.SIGTERM)
    assert worker.wait(PATIENCE) == 0


def test_a_file_that_is_gone_is_missed(local: Project) -> None:
    """By reloads, also where nobody has named it: without it the app would be another one, with other rules."""
    local.write("handlers.py", "import logging\nimport kq\napp = kq.App('shop')\n@app.consumer('shop:q')\n"
                "def f(payload): logging.getLogger().info('got %s', payload)\n")  # fmt: skip
    local.write("kq.yaml", "settings: {lease: 7s}\n")
    worker = local.worker("handlers:app", "-p", "1")
    (local.folder / "kq.yaml").rename(local.folder / "kq.old")
    worker.send_signal(signal.SIGHUP)
    local.until("nothing is reloaded")
    assert "kq.yaml: cannot be read" in local.log()
    (local.folder / "kq.yaml").write_text("")
    worker.send_signal(signal.SIGHUP)
    local.until("nothing is reloaded", 2)
    assert "kq.yaml: is empty" in local.log()
    (local.folder / "kq.old").rename(local.folder / "kq.yaml")
    local.write("handlers.py", (local.folder / "handlers.py").read_text().replace("got", "has got"))
    worker.send_signal(signal.SIGHUP)
    local.until("replacing the children")
    worker.send_signal(signal.SIGTERM)
    assert worker.wait(PATIENCE) == 0


def test_check_says_why_a_worker_would_not_start(local: Project) -> None:
    """As far as that can be told without a broker: its options, its pool, its policies."""
    local.write("handlers.py", "def f(payload): pass\n")
    file = "namespace: shop\n{}\nentries: [{{id: w, kind: queue.consumer, queue: q, method: f}}]\n"
    local.write("kq.yaml", file.format("security: {strict_mode: true}"))
    assert "worker: it may not consume shop:q: " in local.run("check", "--offline").stderr
    local.write("kq.yaml", file.format("worker: {pool: processes}"))
    found = local.run("check", "--offline", "-b", "memory://")
    assert "worker: pool: memory:// lives in one process; handlers run in threads of it" in found.stderr
    assert found.returncode == 0
    done = local.run("worker", "--burst", "--connect-timeout", "5", KQ_POOL="processes", KQ_BROKER_URL="memory://")
    assert "pool: memory:// lives in one process; handlers run in threads of it" in done.stderr
    assert (done.returncode, "threads in this process" in done.stderr) == (0, True)
    found = local.run("check", "--offline", "--strict", "-b", "memory://")
    assert found.stderr.endswith("kq: 1 warning, and --strict lets none pass\n")
    assert found.returncode == 78
    found = local.run("check", "--offline", "--strict")
    assert (found.stderr, found.returncode) == ("", 0)
    near = "  - {name: near, kind: queue.driver.memory, url: 'memory://near'}\n"
    queue = "  - {name: other, kind: queue.queue, driver: near}\n"
    consumer = "  - {id: x, kind: queue.consumer, queue: other, method: f}\n"
    entries = near + local.main() + queue + consumer
    local.write("kq.yaml", "namespace: shop\nworker: {pool: processes}\nentries:\n" + entries)
    assert "worker: it would not start: pool: memory://" in local.run("check", "--offline").stderr


def test_a_reload_tries_what_the_file_says_of_the_worker_now(local: Project) -> None:
    """Not what it said when the worker started: that may be wrong by now, or right no more."""
    local.write("handlers.py", "import logging\ndef f(payload): logging.getLogger().info('got %s', payload)\n")
    file = (
        "namespace: shop\nworker: {{queues: ['shop:{0}']}}\n"
        "entries: [{{id: w, kind: queue.consumer, queue: {1}, method: f}}]\n"
    )
    local.write("kq.yaml", file.format("q", "q").replace("worker:", "settings: {}\n#"))
    worker = local.worker("-p", "1")
    local.write("kq.yaml", file.format("tpyo", "q"))
    worker.send_signal(signal.SIGHUP)
    local.until("nothing is reloaded")
    assert "nothing to consume" in local.log()

    local.write("kq.yaml", file.format("r", "r"))
    worker.send_signal(signal.SIGHUP)
    local.until("kq worker of", 2)
    local.run("publish", "shop:r", "1")
    local.until("got 1")
    worker.send_signal(signal.SIGTERM)
    assert worker.wait(PATIENCE) == 0


def test_term_wins_over_a_reload(local: Project) -> None:
    """TERM ends a worker that is finishing what runs in order to start anew, and lets that finish."""
    os.mkfifo(local.folder / "gate")
    local.write(
        "handlers.py",
        "import logging\ndef f(payload):\n    logging.getLogger().info('begun')\n    open('gate').read()\n",
    )
    file = "namespace: shop\nentries:\n  - {id: w, kind: queue.consumer, queue: q, method: f}\n"
    local.write("kq.yaml", file)
    worker = local.worker("-p", "1")
    local.run("publish", "shop:q", "1")
    local.until("begun")
    local.write("kq.yaml", file + "settings: {max_body: 1000}\n")
    worker.send_signal(signal.SIGHUP)
    local.until("finishing what runs, then starting anew")

    worker.send_signal(signal.SIGTERM)
    (local.folder / "gate").write_text("open")

    assert worker.wait(PATIENCE) == 0
    assert local.log().count("kq worker of") == 1
    assert "1 done" in local.log()


def test_a_worker_without_handlers_says_what_is_missing(local: Project) -> None:
    """Whoever forgot handlers.py, or has a name in it that a library has too, hears of their own files alone."""
    local.write("kq.yaml", "entries: [{id: w, kind: queue.consumer, queue: 'a:q', method: echo}]\n")
    for command in (("worker",), ("check", "--offline")):
        done = local.run(*command)
        assert (done.returncode, "click" in done.stderr) == (78, False)
        assert "kq.yaml:1: consumer w: method: there is no handlers.py to find 'echo' in" in done.stderr


def test_an_idle_worker_starts_anew_at_once(local: Project) -> None:
    """Once it is known that it has to start anew, a worker with nothing in hand does not wait for anything."""
    local.write("handlers.py", "def f(payload): pass\n")
    file = "entries:\n  - {id: w, kind: queue.consumer, queue: 'a:q', method: f}\n"
    local.write("kq.yaml", file)
    worker = local.worker("-p", "1", "--log-format", "json")
    local.write("kq.yaml", file + "settings: {max_body: 1000}\n")
    worker.send_signal(signal.SIGHUP)
    local.until("kq worker of", 2)
    lines = [json.loads(line) for line in local.log().splitlines()]
    times = {line["action"]: datetime.fromisoformat(line["time"]) for line in lines if "action" in line}
    assert (times["stopped"] - times["reload"]).total_seconds() < 4


def test_several_drivers_in_one_file(local: Project) -> None:
    """One worker, from the file alone, serves queues on SQLite, Redis and RabbitMQ; -b moves only the app's own."""
    found = [find(name, local.folder) for name in ("redis", "rabbitmq")]
    queues = [broker.queue_id("q") for broker in found]
    drivers = "".join(
        f"  - {{name: {broker.name}, kind: queue.driver.{kind}, url: '{broker.url}'}}\n"
        f"  - {{id: '{queue}', kind: queue.queue, driver: {broker.name}}}\n"
        f"  - {{name: on_{broker.name}, kind: queue.consumer, queue: '{queue}', method: handle}}\n"
        for broker, queue, kind in zip(found, queues, ("redis", "amqp"), strict=True)
    )
    consumer = "  - {name: own, kind: queue.consumer, queue: q, method: handle}\n"
    local.write("kq.yaml", f"namespace: shop\nentries:\n{local.main()}{consumer}{drivers}")
    local.write("handlers.py", "import logging\ndef handle(payload): logging.getLogger().info('got %s', payload)\n")
    local.environment.pop("KQ_BROKER_URL")
    try:
        for number, queue in enumerate(("shop:q", *queues)):
            assert local.run("publish", queue, str(number + 1)).returncode == 0
        done = local.run("worker", "--burst")
        assert done.returncode == 0, done.stderr
        assert all(f"got {number}" in done.stderr for number in (1, 2, 3))
        moved = f"sqlite:///{local.folder / 'other.db'}"
        assert local.run("publish", "shop:q", "4", "-b", moved).returncode == 0
        assert "got 4" in local.run("worker", "--burst", "-b", moved).stderr
    finally:
        for broker in found:
            broker.forget()
