"""The command line: what it prints, where, and with which exit code."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from time import monotonic

import kombu
import pytest

import kq
import kq.backends
from tests.integration.conftest import PATIENCE, Shop


def test_publish_prints_the_id(shop: Shop) -> None:
    """Kq publish prints one id, and the message carries what the options say."""
    done = shop.run(
        "publish", shop.queue, '{"n": 1}', "-H", "tenant=t", "-H", "n:=5", "--priority", "high", "--message-id", "id-1"
    )

    assert (done.returncode, done.stdout, done.stderr) == (0, "id-1\n", "")
    with kq.Consumer(shop.app, shop.queue) as consumer:
        message = consumer.receive(timeout=10)
        assert message is not None
        assert (message.id(), message.payload()) == ("id-1", {"n": 1})
        assert message.headers() == {"tenant": "t", "n": 5, "priority": "high"}
        message.ack()


def test_publish_reads_stdin(local_shop: Shop) -> None:
    """- reads the value from stdin."""
    done = local_shop.run("publish", local_shop.queue, "-", stdin='["from stdin"]')

    assert done.returncode == 0
    assert local_shop.app.info(local_shop.queue).ready == 1


def test_publish_json_lines(shop: Shop) -> None:
    """--jsonl publishes one message a line, prints each one's id, and says how many there were."""
    lines = shop.folder / "lines.jsonl"
    lines.write_text("".join(json.dumps({"n": n}) + "\n" for n in range(1200)))

    done = shop.run("publish", shop.queue, "--jsonl", str(lines))

    assert done.returncode == 0
    assert len(set(done.stdout.split())) == 1200
    assert "1,200 published" in done.stderr
    assert shop.app.info(shop.queue).ready == 1200


def test_publishing_lines_is_not_done_when_nobody_reads_the_ids(local_shop: Shop) -> None:
    """It ends with an error and says how far it came: what is left is not published."""
    lines = local_shop.folder / "lines.jsonl"
    lines.write_text("1\n" * 1200)
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, "-m", "kq", "publish", local_shop.queue, "--jsonl", str(lines)],
        cwd=local_shop.folder, env=local_shop.environment, stdout=writer, stderr=subprocess.PIPE, text=True,
        timeout=PATIENCE, check=False,
    )  # fmt: skip
    os.close(writer)

    assert done.returncode == 1
    assert "nobody reads the ids any more; 500 messages were published" in done.stderr
    assert local_shop.app.info(local_shop.queue).ready == 500


@pytest.mark.parametrize("bad", [b"{broken", b'""', b'{"a": NaN}', b'"\xff"', b"[" * 100_000])
def test_publish_stops_at_the_first_bad_line(local_shop: Shop, bad: bytes) -> None:
    """A bad line ends it with its number; what came before is published, and said to be."""
    lines = local_shop.folder / "lines.jsonl"
    lines.write_bytes(b'{"n": 1}\n{"n": 2}\n' + bad + b'\n{"n": 4}\n')

    done = local_shop.run("publish", local_shop.queue, "--jsonl", str(lines))

    assert done.returncode == 2
    assert "line 3" in done.stderr
    assert "2 messages were published" in done.stderr
    assert len(done.stdout.split()) == 2
    assert local_shop.app.info(local_shop.queue).ready == 2


def test_a_bad_line_is_named_once(local_shop: Shop) -> None:
    """The decoder counts lines of its own, which would be taken for the file's; what marks the start is no data."""
    lines = local_shop.folder / "lines.jsonl"
    lines.write_bytes(b'\xef\xbb\xbf{"n": 1}\n{"n": 2\n')

    done = local_shop.run("publish", local_shop.queue, "--jsonl", str(lines))

    assert done.returncode == 2
    assert "kq: line 2 is not JSON: Expecting ',' delimiter, at column 8; 1 message was published" in done.stderr
    assert local_shop.app.info(local_shop.queue).ready == 1


def test_info_counts(shop: Shop) -> None:
    """Kq info shows a table for people and JSON for programs."""
    shop.app.publish_many(shop.queue, [{"n": 1}, {"n": 2}])

    table = shop.run("info", shop.queue)
    (entry,) = json.loads(shop.run("info", shop.queue, "--json").stdout)

    assert table.returncode == 0
    assert "MESSAGES" in table.stdout
    assert (entry["queue"], entry["message_count"], entry["ready"], entry["dead"]) == (shop.queue, 2, 2, 0)
    assert set(entry) == {
        "queue", "message_count", "ready", "delayed", "in_flight", "dead", "consumer_count", "oldest_age",
    }  # fmt: skip


def test_info_shows_what_there_is(local_shop: Shop) -> None:
    """A queue that does not exist hides no other; the exit code tells of it."""
    local_shop.app.publish(local_shop.queue, {"n": 1})
    done = local_shop.run("info", local_shop.queue, "no:where", "--json")
    assert done.returncode == 1
    assert [entry["queue"] for entry in json.loads(done.stdout)] == [local_shop.queue]
    assert "queue no:where does not exist" in done.stderr
    assert local_shop.run("info", "no:where").stdout == ""


def test_a_broker_that_is_away_is_asked_once(local_shop: Shop) -> None:
    """Not for each queue: that would take as long as there are queues."""
    began = monotonic()
    done = local_shop.run("info", *(f"app:q{n}" for n in range(20)), "-b", "redis://127.0.0.1:1")
    assert done.returncode == 69
    assert len(done.stderr.splitlines()) == 1
    assert monotonic() - began < 20


def test_variables_hold_a_header_on_each_line(local_shop: Shop) -> None:
    """A value may have blanks."""
    local_shop.environment["KQ_HEADER"] = "subject=a b=c\n\nn:=1\n"
    assert local_shop.run("publish", local_shop.queue, "1").returncode == 0
    with closing(kq.Consumer(local_shop.app, local_shop.queue)) as consumer:
        message = consumer.receive(20)
        assert message is not None
        assert message.headers() == {"subject": "a b=c", "n": 1}
        message.ack()


def test_dead_letters_of_a_queue_that_is_gone(shop: Shop) -> None:
    """They are where they were, and are shown."""
    (id,) = shop.app.publish_many(shop.queue, [{"n": 1, "do": "invalid"}])
    assert shop.worker("-p", "1", "--burst", ready=False).wait(30) == 0
    url = shop.broker.url if shop.broker.url.startswith("amqp") else f"kq-{shop.broker.url}"
    with kombu.Connection(url) as connection:
        connection.channel().queue_delete(shop.queue)

    (letter,) = json.loads(shop.run("dead", "list", shop.queue, "--json").stdout)
    table = shop.run("dead", "list", shop.queue)

    assert (letter["id"], letter["reason"]) == (id, "not_retryable")
    assert (table.returncode, table.stderr) == (0, "")
    assert id in table.stdout


def test_dead_letters(shop: Shop) -> None:
    """Dead letters are listed, shown, replayed and purged."""
    ids = shop.app.publish_many(shop.queue, [{"n": n, "do": "invalid"} for n in range(3)])
    assert shop.worker("-p", "1", "--burst", ready=False).wait(30) == 0

    listed = shop.run("dead", "list", shop.queue)
    letters = json.loads(shop.run("dead", "list", shop.queue, "--json").stdout)
    shown = shop.run("dead", "show", shop.queue, ids[0])

    assert sorted(letter["id"] for letter in letters) == sorted(ids)
    assert {letter["reason"] for letter in letters} == {"not_retryable"}
    assert letters[0]["payload"]["do"] == "invalid"
    assert "not_retryable" in listed.stdout
    assert "never" in shown.stdout
    assert 'raise errors.Invalid("never")' in shown.stdout
    assert 'raise errors.Invalid("never")' in letters[0]["error_traceback"]
    assert shop.run("dead", "replay", shop.queue, ids[0]).stdout == "1 replayed\n"
    gone = shop.run("dead", "replay", shop.queue, ids[0], "nobody")
    assert (gone.returncode, gone.stdout) == (1, "0 replayed\n")
    assert "2 of 2 ids are no dead letters" in gone.stderr
    assert shop.app.info(shop.queue).ready == 1
    assert shop.run("dead", "purge", shop.queue, ids[1], "--yes").stdout == "1 dropped\n"
    assert shop.run("dead", "replay", shop.queue, ids[2], "--all").returncode == 2
    assert shop.run("dead", "purge", shop.queue).returncode == 2
    assert shop.run("dead", "purge", shop.queue, "--yes").stdout == "1 dropped\n"
    assert shop.run("dead", "purge", shop.queue, "--all", "--yes").stdout == "0 dropped\n"
    assert shop.run("dead", "replay", shop.queue).stdout == "0 replayed\n"
    assert "no dead letters" in shop.run("dead", "list", shop.queue).stdout
    assert shop.run("dead", "show", shop.queue, "nobody").returncode == 1


def test_purge_needs_a_yes(shop: Shop) -> None:
    """What destroys asks; where nobody can be asked it wants --yes."""
    shop.app.publish(shop.queue, {"n": 1})

    refused = shop.run("purge", shop.queue)
    done = shop.run("purge", shop.queue, "--yes")

    assert refused.returncode == 2
    assert "--yes" in refused.stderr
    assert (done.returncode, done.stdout) == (0, "1 dropped\n")


def test_check_tells_what_the_broker_can(shop: Shop) -> None:
    """Kq check reaches the broker and prints its capabilities, without a password."""
    done = shop.run("check", "-A", "shop:app")

    assert done.returncode == 0, done.stderr
    assert "reached" in done.stdout
    assert "survives" in done.stdout
    assert "guest:guest" not in done.stdout + done.stderr
    if shop.broker.name == "rabbitmq":
        assert "carried, not acted on" in done.stdout


def test_options_win_over_environment_over_default(local_shop: Shop) -> None:
    """Command line, then environment, then default."""
    other = f"sqlite:///{local_shop.folder / 'other.db'}"
    local_shop.run("publish", local_shop.queue, "1", "-b", other)

    assert local_shop.run("info", local_shop.queue).returncode == 1
    assert local_shop.run("info", local_shop.queue, "-b", other).returncode == 0
    assert local_shop.run("info", local_shop.queue, KQ_BROKER_URL=other).returncode == 0
    assert (local_shop.folder / "other.db").exists()


def test_a_file_names_the_broker(local_shop: Shop) -> None:
    """--config names a file whose driver is the broker, for the worker and its children too."""
    shop = local_shop
    del shop.environment["KQ_BROKER_URL"]
    file = shop.folder / "other.yaml"
    file.write_text(f"entries:\n  - kind: queue.driver.sqlite\n    url: sqlite:///{shop.folder / 'kq.db'}\n")
    shop.app.publish(shop.queue, {"n": 1})

    done = shop.run("worker", "shop:app", "--burst", "-p", "1", "--config", str(file))
    wrong = shop.run("worker", "shop:app", "--config", str(shop.folder / "missing.yaml"))

    assert done.returncode == 0, done.stderr
    assert len(shop.history("done")) == 1
    assert (wrong.returncode, "cannot be read" in wrong.stderr) == (78, True)


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["publish", "no-namespace", "1"], 2, "namespace:name"),
        (["publish", "", "1"], 2, "empty"),
        (["publish", "a:b", '""'], 2, "empty"),
        (["publish", "a:b", "{broken"], 2, "not JSON"),
        (["publish", "a:b", "hello"], 2, "quotes of its own"),
        (["publish", "a:b", "1", "-H", "x_mine=1"], 2, "reserved"),
        (["publish", "a:b", "1", "-H", "novalue"], 2, "KEY=VALUE"),
        (["publish", "a:b", "1", "--delay", "soon"], 2, "expected a duration"),
        (["publish", "a:b", "1", "--delay", "366d"], 2, "at most"),
        (["publish", "a:b", "1", "--priority", "urgent"], 2, "priority"),
        (["publish", "a:b"], 2, "JSON"),
        (["publish", "a:b", "1", "-b", "kafka://x"], 78, "no backend for kafka"),
        (["publish", "a:b", "1", "-b", "nonsense"], 78, "expected a URL"),
        (["publish", "a:b", "1", "-b", "sqlite:////no/such/place/kq.db"], 69, "does not exist"),
        (["publish", "a:b", "1", "-b", "redis://127.0.0.1:1"], 69, "cannot be reached"),
        (["publish", "a:b", "1", "-b", "amqp://127.0.0.1:1"], 69, "cannot be reached"),
        (["info", "a:b", "-b", "redis://nohost.invalid"], 69, "cannot be reached"),
        (["info", "a:missing"], 1, "does not exist"),
        (["worker", "nomodule:app"], 78, "no module 'nomodule'"),
        (["worker", "shop:nothing"], 78, "'shop' has no 'nothing'"),
        (["worker", "shop:QUEUE"], 78, "expected a kq.App"),
        (["worker", "raises:app"], 78, "ZeroDivisionError"),
        (["worker", "shop.py"], 78, "package.module:attribute"),
        (["worker", "shop:app", "-b", "redis://127.0.0.1:1", "--connect-timeout", "0.5"], 69, "cannot be reached"),
        (["worker", "shop:app", "-Q", "shop:nobody"], 78, "nothing to consume"),
        (["worker"], 2, "name the app"),
    ],
)
def test_bad_input(local_shop: Shop, arguments: list[str], code: int, words: str) -> None:
    """Bad input gives its exit code and a line or two on stderr that say what to do, never a traceback."""
    (local_shop.folder / "raises.py").write_text("app = 1 / 0\n")
    done = local_shop.run(*arguments, KQ_PUBLISH_TIMEOUT="3")

    assert done.returncode == code, done.stderr
    assert words in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


def test_debug_shows_the_traceback(local_shop: Shop) -> None:
    """--debug shows where it went wrong."""
    done = local_shop.run("publish", "no-namespace", "1", "--debug")

    assert done.returncode == 2
    assert "Traceback" in done.stderr


@pytest.mark.parametrize(
    ("url", "granted"),
    [
        ("redis://:secret@127.0.0.1:1", ["ACL SETUSER kq-publisher", "ACL SETUSER kq-worker", "~{{kq:{queue}}}*"]),
        ("amqp://u:secret@127.0.0.1:1/v", ["set_permissions -p v kq-publisher", "-p v kq-worker", "|{escaped}|"]),
    ],
)
def test_check_prints_the_least_rights(local_shop: Shop, url: str, granted: list[str]) -> None:
    """--acl prints what accounts need for the app's own queues, or for all; it connects nothing."""
    mine = local_shop.run("check", "--acl", "-A", "shop:app", "-b", url)
    every = local_shop.run("check", "--acl", KQ_BROKER_URL=url)

    assert (mine.returncode, mine.stderr, every.returncode, every.stderr) == (0, "", 0, "")
    for text in granted:
        assert text.format(queue=local_shop.queue, escaped=re.escape(local_shop.queue)) in mine.stdout
    assert local_shop.queue not in every.stdout
    assert re.escape(local_shop.queue) not in every.stdout
    assert "secret" not in mine.stdout + every.stdout


def test_wrong_password_is_refused_and_hidden(shop: Shop) -> None:
    """Wrong credentials are refused at once (77; 78 where there are none), and the password appears nowhere."""
    scheme, _, rest = shop.broker.url.partition("://")
    url = f"{scheme}://nobody:c4nary@{rest.rpartition('@')[2]}"
    done = shop.run("worker", "shop:app", "-b", url, "--connect-timeout", "30")

    if shop.broker.name == "sqlite":
        assert done.returncode == 78, done.stderr
    else:
        assert done.returncode == 77, done.stderr
        assert "refuses us" in done.stderr
    assert "c4nary" not in done.stdout + done.stderr


def test_conflict_names_the_argument(shop: Shop) -> None:
    """A worker whose queue exists with other values ends with 78 and names the argument."""
    shop.app.publish(shop.queue, {"n": 1})
    source = (shop.folder / "shop.py").read_text()
    (shop.folder / "shop.py").write_text(source + "\napp.queue(QUEUE, max_length=3)\n")
    done = shop.run("worker", "shop:app", "-p", "1")

    assert done.returncode == 78, done.stderr
    assert "max_length" in done.stderr
    assert shop.app.info(shop.queue).ready == 1


def test_readonly_directory(tmp_path: Path, local_shop: Shop) -> None:
    """A file that cannot be written is refused with what to do, and nothing is half done."""
    import os

    if os.geteuid() == 0:
        place = "/proc/kq.db"
    else:
        folder = tmp_path / "readonly"
        folder.mkdir(mode=0o500)
        place = str(folder / "kq.db")
    done = local_shop.run("publish", "a:b", "1", "-b", f"sqlite:///{place}")

    assert done.returncode in (69, 77)
    assert place in done.stderr or os.path.dirname(place) in done.stderr


def test_unknown_variables_are_warned_of(local_shop: Shop) -> None:
    """A KQ_ variable that nothing reads is named, with the nearest one that is read."""
    for command in (["check"], ["publish", local_shop.queue, "1"], ["info"]):
        done = local_shop.run(*command, KQ_LEAS="3")

        assert done.stderr.count("KQ_LEAS is not one that kq, or the app's file, reads; did you mean KQ_LEASE?") == 1


def test_a_slip_in_a_queues_name_is_warned_of(local_shop: Shop) -> None:
    """A queue that the app nearly knows is published to, and said to be unknown."""
    done = local_shop.run("publish", local_shop.queue + "x", "1", "-A", "shop:app")
    known = local_shop.run("publish", local_shop.queue, "1", "-A", "shop:app")
    other = local_shop.run("publish", "another:queue", "1", "-A", "shop:app")

    assert (done.returncode, f"did you mean {local_shop.queue}?" in done.stderr) == (0, True)
    assert (known.stderr, other.stderr) == ("", "")


def test_publishing_to_memory_is_warned_of(local_shop: Shop) -> None:
    """The message is gone as soon as its id is printed."""
    done = local_shop.run("publish", local_shop.queue, "1", "-b", "memory://x")

    assert done.returncode == 0
    assert "gone when this command ends" in done.stderr


def test_a_publisher_loads_no_more_than_it_needs(shop: Shop) -> None:
    """Its first message is there soon: no event loop is loaded, and no client that loads one."""
    import subprocess
    import sys

    code = (
        "import sys, os, kq; kq.App('shop').publish(os.environ['KQ_TEST_QUEUE'], 1); "
        "print([m for m in ('asyncio', 'redis', 'sqlite3', 'kq.worker', 'kq.cli') if m in sys.modules])"
    )
    loaded = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=shop.environment, cwd=shop.folder
    )
    assert loaded.stdout.strip() == ("['sqlite3']" if shop.broker.name == "sqlite" else "[]")


def test_help_is_quick_and_complete(local_shop: Shop) -> None:
    """Kq --help names every command; one command imports no other, and no broker's client before it is needed."""
    import subprocess
    import sys

    done = local_shop.run("--help")
    assert [word for word in ("worker", "publish", "info", "dead", "purge", "check") if word not in done.stdout] == []
    code = (
        "import sys, kq.cli.worker; from kq.cli import main; "
        "print([m for m in ('kombu', 'amqp', 'sqlite3', 'kq.cli.check') if m in sys.modules])"
    )
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert loaded.stdout.strip() == "[]"


@pytest.mark.parametrize(("attribute", "code"), [("app", 0), ("nope", 78)])
def test_threads_of_an_app_hold_no_command_up(local_shop: Shop, attribute: str, code: int) -> None:
    """What it says is said, and it ends as it would have, a few seconds later."""
    source = local_shop.folder / "shop.py"
    source.write_text(
        source.read_text()
        + "\nimport threading\nthreading.Thread(target=threading.Event().wait, name='stubborn').start()\n"
    )
    done = local_shop.run("publish", local_shop.queue, "1", "-A", f"shop:{attribute}")
    assert done.returncode == code
    assert "not waiting any longer for threads that go on (stubborn)" in done.stderr
    assert len(done.stdout.split()) == (code == 0)
