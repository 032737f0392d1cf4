"""The guarded example with real commands, workers, and forgers with the broker's password."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pika
import pytest
import redis

from kq.envelope import Envelope, pack
from tests.broker import AMQP_URL, Broker
from tests.integration.project import Project

EXAMPLE = Path(__file__).parents[2] / "examples" / "guarded"
ANN = ("--actor", "user:ann", "--groups", "clerks", "--actor-meta", "role=clerk")
OPERATOR = ("--actor", "user:op", "--groups", "operators")


class Guarded(Project):
    """The example, under queue ids of its own."""

    def __init__(self, broker: Broker, folder: Path) -> None:
        super().__init__(broker, folder)
        self.queue = broker.queue_id("orders")
        self.namespace = self.queue.partition(":")[0]
        text = (EXAMPLE / "kq.yaml").read_text().replace("namespace: app", f"namespace: {self.namespace}")
        self.write("kq.yaml", text.replace("app:orders", self.queue))
        shutil.copy(EXAMPLE / "handlers.py", folder)
        self.environment["KQ_SIGNING_KEY"] = "c4nary-c4nary-c4nary-c4nary-c4nary"

    def forge(self, body: bytes) -> None:
        """Put a message on the queue without kq, as whoever has the broker's password can."""
        properties = {"content_type": "application/json", "content_encoding": "utf-8"}
        if self.broker.name == "rabbitmq":
            parts = urlsplit(AMQP_URL)
            login = pika.PlainCredentials(parts.username or "guest", parts.password or "guest")
            where = pika.ConnectionParameters(parts.hostname, parts.port or 5672, credentials=login)
            with pika.BlockingConnection(where) as connection:
                connection.channel().basic_publish(
                    "", self.queue, body, pika.BasicProperties(message_id="forged", delivery_mode=2, **properties)
                )
        elif self.broker.name == "redis":
            client = redis.Redis.from_url(self.broker.url)
            key = f"{{kq:{self.queue}}}:"
            client.rpush(key + "r:4", pack(Envelope("forged", {}, properties, body)))
            client.rpush(key + "w", "1")
            client.close()
        else:
            self.broker.put_raw(self.queue, pack(Envelope("forged", {}, properties, body)))


@pytest.fixture
def guarded(shared_broker: Broker, tmp_path: Path) -> Iterator[Guarded]:
    """The example on every broker that processes can share, in turn."""
    made = Guarded(shared_broker, tmp_path)
    yield made
    made.close()


@pytest.fixture
def local(tmp_path: Path) -> Iterator[Guarded]:
    """The example on SQLite, for what does not depend on the broker."""
    made = Guarded(Broker("sqlite", f"sqlite:///{tmp_path / 'kq.db'}"), tmp_path)
    yield made
    made.close()


def refusal(done: subprocess.CompletedProcess[str]) -> str:
    """Return what a refused command said, after a look at how it ended."""
    assert done.returncode == 77
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    return done.stderr


def test_who_may_publish_and_who_may_not(guarded: Guarded) -> None:
    """One policy file: ann may; eve fails the first question, ann elsewhere the second; a forger is found out."""
    assert guarded.run("publish", guarded.queue, '{"order": 17}', *ANN).returncode == 0
    eve = refusal(guarded.run("publish", guarded.queue, '{"order": 18}', "--actor", "user:eve"))
    assert "queue.publish is denied to actor 'user:eve'" in eve
    other = f"{guarded.namespace}:invoices"
    assert f"queue.publish.queue on '{other}' is denied to actor 'user:ann'" in refusal(
        guarded.run("publish", other, '{"order": 17}', *ANN)
    )
    assert "strict mode" in refusal(guarded.run("publish", guarded.queue, '{"order": 19}'))
    guarded.forge(b'{"order": 666}')

    done = guarded.run("worker", "--burst")

    assert done.returncode == 0, done.stderr
    assert "order 17" in done.stderr
    assert "order 666" not in done.stderr
    (dead,) = json.loads(guarded.run("dead", "list", guarded.queue, "--json", *OPERATOR).stdout)
    assert (dead["reason"], dead["error_message"]) == ("unverified", "unsigned")
    assert dead["payload"] == {"order": 666}
    assert "c4nary" not in done.stderr + done.stdout


def test_administration_asks(local: Guarded) -> None:
    """Info, purge and dead letters are for operators."""
    local.run("publish", local.queue, '{"order": 17}', *ANN)
    for command in (
        ("info", local.queue), ("purge", local.queue, "--yes"), ("dead", "list", local.queue),
        ("dead", "replay", local.queue, "--all"), ("dead", "purge", local.queue, "--all", "--yes"),
    ):  # fmt: skip
        assert "queue.admin.queue" in refusal(local.run(*command, *ANN)), command
    assert local.run("info", local.queue, *OPERATOR).returncode == 0


def test_a_worker_without_permission_does_not_start(local: Guarded) -> None:
    """Exit code 77, and the queue is named; the groups can be given on the command line."""
    assert f"queue.consume.queue on '{local.queue}'" in refusal(local.run("worker", "--burst", "--groups", "none",
                                                                          "--actor", "service:x"))  # fmt: skip
    assert local.run("worker", "--burst", "--actor", "service:x", "--groups", "workers").returncode == 0
    # The groups of the file are those of the file's actor, whoever names another one.
    assert f"queue.consume.queue on '{local.queue}'" in refusal(local.run("worker", "--burst", KQ_ACTOR="service:x"))
    assert local.run("worker", "--burst", KQ_ACTOR="service:x", KQ_GROUPS="workers").returncode == 0
    done = local.run("worker", "--burst", "--groups", "none")
    assert (done.returncode, "give --actor as well" in done.stderr) == (2, True)
    refusal(local.run("worker", "--burst", "--actor", "service:x"))


def test_policies_explain_themselves(local: Guarded) -> None:
    """``kq policy test`` says what is decided, and which policy and condition make it so."""
    action = ("--action", "queue.publish.queue", "--resource", local.queue)
    allowed = local.run("policy", "test", *ANN, *action)
    assert allowed.returncode == 0
    assert allowed.stdout.startswith(f"allowed: policy '{local.namespace}:orders_only' allows it")
    denied = local.run("policy", "test", *ANN[:4], *action)
    assert denied.returncode == 77
    assert denied.stdout.startswith("denied: no policy allows it")
    assert "actor.meta.role" in denied.stdout
    nobody = local.run("policy", "test", *action)
    assert nobody.returncode == 77
    assert "strict mode is on" in nobody.stdout


def test_secrets_are_not_shown(local: Guarded) -> None:
    """Neither checks nor errors show the signing key, also one that is too short."""
    for key in ("c4nary-c4nary-c4nary-c4nary-c4nary", "c4nary"):
        for command in (("check", "--offline"), ("check", "--debug"), ("worker", "--burst", "-l", "debug"),
                        ("info", local.queue, "--debug")):  # fmt: skip
            done = local.run(*command, KQ_SIGNING_KEY=key)
            assert "c4nary" not in done.stdout + done.stderr
    assert "at least 32 bytes" in done.stderr


@pytest.mark.parametrize("pool", ["threads", "processes"])
def test_a_worker_serves_as_the_command_line_says(local: Guarded, pool: str) -> None:
    """Actor, groups and meta of the command line win over the app's own, in children too; the environment does not."""
    local.write(
        "own.py",
        f"""\
import kq
from kq.security import Actor, Policy, current_actor, current_scope

app = kq.App(
    "own", config="empty.yaml", strict_mode=True, actor=Actor("service:own", {{"role": "own"}}), groups=["owners"],
    policies=[Policy("roles", actions="*", resources="*",
                     conditions=[{{"field": "actor.meta.role", "operator": "exists"}}])],
)


@app.consumer("{local.queue}")
def show(payload):
    print("served by", current_actor().id, current_actor().meta["role"], *sorted(current_scope().groups))
""",
    )
    local.write("empty.yaml", 'version: "1.0"\nnamespace: own\n')
    command = ("worker", "own:app", "--burst", "--pool", pool)
    given = ("--actor", "service:given", "--groups", "night,day", "--actor-meta", "role=given")
    for options, environment, served in (
        (given, {}, "service:given given day night"),
        ((), {"KQ_ACTOR": "service:env", "KQ_ACTOR_META": "role=env"}, "service:own own owners"),
    ):
        assert local.run("publish", "-A", "own:app", local.queue, "1", *given).returncode == 0
        done = local.run(*command, *options, **environment)
        assert done.returncode == 0, done.stderr
        assert f"served by {served}\n" in done.stdout + done.stderr
    # Another actor has nothing of what is known of the first one.
    assert "queue.consume.queue" in refusal(local.run(*command, "--actor", "service:other"))
