"""``kq.yaml``: what is read from it, and what is refused."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from time import process_time
from typing import Any

import jsonschema
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

import kq
from kq import config_file, errors
from kq.config_file import kind, reference
from kq.config_file.schema import json_schema

Write = Callable[..., str]

#: One of everything.
EVERYTHING = """\
version: "1.0"
namespace: app
source: work.py
settings: {lease: 10s, create_queues: false, max_body: 1000}
worker: {processes: 2, grace: 5, queues: emails}
security: {strict_mode: true, actor: "service:worker", groups: [clerks]}
signing: {keys: {k1: "${env:KEY}"}, sign_with: k1, max_age: 7d, require: false}
entries:
  - name: broker
    kind: queue.driver.amqp
    url: ${env:URL:-amqp://localhost}
    virtual_host: shop
    heartbeat: 10s
    reconnect: {initial: 200ms, max: 5s}
    tls: {ca: /ca.pem, verify: true}
  - id: second
    kind: queue.driver.redis
    url: redis://localhost/3
  - name: emails
    kind: queue.queue
    driver: app:broker
    codec: json/plain
    dead_letter: {queue: app:emails_dlq, max_attempts: 5}
    retry: {initial: 1s, factor: 2, max: 10m, jitter: 0.2}
    max_length: 100000
    max_priority: 9
    options: {amqp: {queue_type: classic}}
  - kind: queue.consumer
    id: email_worker
    queue: emails
    method: handle_email
    concurrency: 4
    prefetch: 20
    timeout: 30s
    auto_ack: false
  - name: orders_only
    kind: security.policy
    policy: {actions: [queue.publish.queue], resources: "app:orders*", effect: allow,
             conditions: [{field: actor.meta.role, operator: in, value: [clerk, admin]}]}
    groups: [clerks]
"""


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Writes a file and returns its path."""

    def write(text: str, name: str = "kq.yaml") -> str:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return str(path)

    return write


def refused(path: str, **environment: str) -> str:
    """Return why a file is refused."""
    with pytest.raises(errors.Invalid) as caught:
        config_file.load(path, environment)
    return str(caught.value)


def test_everything_is_read(write: Write) -> None:
    """Every kind of entry and every section arrives, typed, named within the namespace, with its place."""
    path = write(EVERYTHING)
    found = config_file.load(path, {"KEY": "secret"})
    assert found.paths == (path,)
    assert found.main == "app:broker"
    assert set(found.drivers) == {"app:broker", "second"}
    broker = found.drivers["app:broker"].given
    assert broker.values["url"] == "amqp://localhost"
    assert broker.values["heartbeat"] == 10.0
    assert broker.values["reconnect"].values == {"initial": 0.2, "max": 5.0}
    queue = found.queues["app:emails"]
    assert queue.given.values["driver"] == "app:broker"
    assert queue.given.values["dead_letter"].values == {"queue": "app:emails_dlq", "max_attempts": 5}
    assert queue.given.values["retry"].values == {"initial": 1.0, "factor": 2.0, "max": 600.0, "jitter": 0.2}
    assert queue.given.values["options"] == {"amqp": {"queue_type": "classic"}}
    consumer = found.consumers["email_worker"]
    assert consumer.given.values["queue"] == "app:emails"
    assert consumer.given.values["timeout"] == 30.0
    assert consumer.source == "work.py"
    assert str(consumer.given.places["method"]) == f"{path}:31"
    policy = found.policies["app:orders_only"].given
    assert policy.values["groups"] == ["clerks"]
    assert policy.values["policy"].values["conditions"][0].values["value"] == ["clerk", "admin"]
    assert found.settings.values == {"lease": 10.0, "create_queues": False, "max_body": 1000}
    assert found.worker.values == {"processes": 2, "grace": 5.0, "queues": ["app:emails"]}
    assert found.signing.values["keys"] == {"k1": "secret"}
    assert found.security.values["strict_mode"] is True


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has other rules")
@pytest.mark.parametrize("by", ["mode", "owner"])
def test_a_file_that_others_may_change_is_warned_of(
    write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, by: str
) -> None:
    """It says what code is run: where strict mode is on it is refused, be it an included one."""
    path = write("include: [more.yaml]\n")
    more = write("settings: {lease: 10s}\n", "more.yaml")
    assert config_file.load(path, {}).risks == ()
    assert kq.App("fine", broker="memory://risks", config=path, strict_mode=True).document.risks == ()
    if by == "mode":
        Path(more).chmod(0o646)
    elif os.geteuid() == 0:
        os.chown(more, 4711, -1)
    else:
        monkeypatch.setattr(os, "geteuid", lambda: 4711)
    (*_, risk) = kq.App("fine", broker="memory://risks", config=path).registry.risks
    assert risk.startswith(f"{more}: {'everybody may write to it' if by == 'mode' else 'it belongs to another user'}")
    with pytest.raises(errors.Invalid, match="refused, for strict_mode is on"):
        kq.App("strict", broker="memory://risks", config=path, strict_mode=True)


def test_no_file_says_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where no file is named and there is no kq.yaml, there is an empty document; a named one must be there."""
    monkeypatch.chdir(tmp_path)
    assert config_file.load(None, {}) == config_file.empty()
    assert "cannot be read: No such file" in refused(str(tmp_path / "none.yaml"))


def test_the_file_is_found(write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The argument wins over KQ_CONFIG, and that over kq.yaml here."""
    monkeypatch.chdir(tmp_path)
    write("namespace: here\n")
    other, third = write("namespace: other\n", "other.yaml"), write("namespace: third\n", "third.yaml")
    assert config_file.load(None, {}).namespace == "here"
    assert config_file.load(None, {"KQ_CONFIG": other}).namespace == "other"
    assert config_file.load(third, {"KQ_CONFIG": other}).namespace == "third"


def test_one_of_several_drivers_is_named_broker(write: Write) -> None:
    """Of several drivers the one named broker is the app's; without it the file is refused."""
    text = (
        "entries:\n"
        "  - {name: a, kind: queue.driver.memory, url: memory://a}\n"
        "  - {id: %s, kind: queue.driver.amqp, url: amqp://h}\n"
    )
    assert config_file.load(write(text % "broker"), {}).main == "broker"
    assert "several drivers (a, b)" in refused(write(text % "b"))


def test_variables_are_looked_up(write: Write) -> None:
    """``${env:NAME}`` is the environment's, in any value, with a default after ``:-``; a missing one is named."""
    path = write(
        "entries: [{kind: queue.driver.redis, url: 'redis://${env:HOST:-localhost}/${env:DB}', heartbeat: '${env:B}'}]"
    )
    values = config_file.load(path, {"DB": "3", "B": "5s"}).drivers["redis"].given.values
    assert (values["url"], values["heartbeat"]) == ("redis://localhost/3", 5.0)
    why = refused(path, B="5s")
    assert "the environment has no DB; set it" in why
    assert why.count("\n") == 0


def test_a_variable_s_value_is_not_shown(write: Write) -> None:
    """What a variable held may be a secret: errors show the variable's name."""
    for text in ("${env: B}", "${env:B", "${env:}", "${ENV:B}", "${ env:B}", "${env:A B}", "${env:X:-${env:B}}"):
        why = refused(write(f"entries: [{{kind: queue.queue, id: 'a:q', codec: '{text}'}}]\n"), B="json/plain")
        assert "codec: ill-formed variable; expected ${env:NAME}" in why
    why = refused(write("settings: {lease: '${env:SECRET}', max_body: '${env:SECRET}'}\n"), SECRET="c4nary")
    assert "c4nary" not in why
    assert "got '${env:SECRET}'" in why
    why = refused(
        write(
            "signing: {keys: {k1: abc}, sign_with: '${env:SECRET}'}\n"
            "entries:\n  - {kind: queue.queue, id: '${env:SECRET}'}\n"
            "  - {kind: queue.queue, id: 'a:q', driver: '${env:SECRET}'}\n"
            "  - {kind: queue.consumer, id: w, queue: '${env:SECRET} x', method: f}\n"
        ),
        SECRET="c4nary",
    )
    assert "c4nary" not in why
    assert len(why.splitlines()) == 4
    # What stands beside it, too.
    why = refused(write("entries: [{kind: queue.driver.amqp, url: 'redis://:c4nary@${env:HOST}/0'}]\n"), HOST="h")
    assert "c4nary" not in why
    assert "got '...${env:HOST}...'" in why


def test_what_is_not_read_twice_is_refused(tmp_path: Path) -> None:
    """A pipe: children and reloads would find nothing in it. So would they in a file that is empty by mistake."""
    pipe, file = tmp_path / "pipe", tmp_path / "empty.yaml"
    os.mkfifo(pipe)
    file.write_text("# nothing\n")
    assert "is a pipe; expected a file" in refused(str(pipe))
    assert "is empty; expected fields" in refused(str(file))


def test_of_many_mistakes_the_first_are_told(write: Write) -> None:
    """Each once, and in no time."""
    why = refused(write("".join(f"a{n}: 1\n" for n in range(2000)))).splitlines()
    assert (len(why), why[-1]) == (101, "and 1900 more")


def test_every_mistake_is_named_with_its_line(write: Write) -> None:
    """All mistakes are told at once, each with file, line, entry and a suggestion."""
    path = write(
        'version: "2.0"\nnamespce: shop\nentries:\n  - kind: queue.driver.reds\n'
        "  - kind: queue.driver.amqp\n    ulr: amqp://h\n  - kind: queue.driver.redis\n    url: amqp://user:c4nary@h\n"
        "  - id: app:q\n    kind: queue.queue\n    codec: json\n    driver: nobody\n    max_length: many\n"
        "  - id: w\n    kind: queue.consumer\n    queue: nope\n    timeout: soon\n"
    )
    why = refused(path)
    found = {line.removeprefix(path).split(":")[1] for line in why.splitlines()}
    assert found == {"1", "2", "4", "5", "6", "8", "11", "12", "13", "14", "16", "17"}
    for words in (
        "expected '1.0', got '2.0'",
        "unknown field 'namespce'",
        "did you mean namespace?",
        "did you mean queue.driver.redis?",
        "entry 2: unknown field 'ulr'",
        "url is missing",
        "expected a URL with redis:// or rediss://",
        "entry 4 (app:q): codec: expected json/plain or application/msgpack, got 'json'",
        "max_length: expected an integer from 1 to 2,147,483,647, got 'many'",
        "entry 5 (w): queue: ill-formed queue id 'nope'",
        "method is missing",
        "timeout: expected a duration",
    ):
        assert words in why
    assert "c4nary" not in why


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("a: &x [1]\nb: *x\n", "anchors and aliases"),
        ("a: !!python/object/apply:os.system [echo]\n", "tags are not allowed"),
        ("a: !!str b\n", "tags are not allowed"),
        ("entries: []\nentries: []\n", "given twice"),
        ("entries: [{kind: queue.driver.memory, kind: queue.driver.redis}]\n", "entry 1: 'kind' is given twice"),
        ("<<: {a: 1}\n", "merge keys are not allowed"),
        ("? [a]\n: b\n", "expected a name as key"),
        ("[" * 2000 + "]" * 2000, "nested deeper than 32"),
        ("a: " + "x" * 2**20, "larger than 1,048,576 bytes"),
        ("a: [", "not YAML"),
        ("a: b\n---\nc: d\n", "not YAML"),
        ("- 1\n", "expected a mapping"),
        ("entries: 5\n", "expected a list"),
        ("entries: [5]\n", "entry 1: expected a mapping"),
        ("include: kq.yaml\n", "includes itself"),
        ("include: missing.yaml\n", "there is no file"),
        ("include: [[a]]\n", "include[0]: expected a single value"),
        ("signing:\n", "keys is missing"),
        ("entries: [{kind: security.policy, id: p, policy: }]\n", "actions is missing"),
        ("namespace: a b\n", "namespace: expected a name of letters"),
    ],
)
def test_hostile_files_are_refused_at_once(write: Write, text: str, why: str) -> None:
    """What could grow, build objects or say two things is refused, quickly."""
    path = write(text)
    started = process_time()
    assert why in refused(path)
    assert process_time() - started < 1.0


@given(st.text(max_size=200))
def test_any_text_is_read_or_refused(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    """No text whatever breaks the loader: it is a document or a named mistake."""
    path = tmp_path_factory.mktemp("any") / "kq.yaml"
    path.write_text(text, encoding="utf-8", errors="surrogatepass")
    why = str(path)
    try:
        config_file.load(str(path), {})
    except errors.Invalid as error:
        why = error.message
    assert why.startswith(str(path))


def test_long_values_are_not_shown_whole(write: Write) -> None:
    """An error stays readable whatever is wrong."""
    assert len(refused(write(f"settings: {{lease: {'x' * 100_000}}}\n"))) < 500


# Names, includes and references.


def test_names_stand_in_their_file_s_namespace(write: Write) -> None:
    """A name is within the namespace of its own file, an id is whole; a bare reference is to the own namespace."""
    write("namespace: b\nentries: [{name: q, kind: queue.queue}, {id: 'c:q', kind: queue.queue}]\n", "sub/b.yaml")
    path = write("namespace: a\ninclude: sub/b.yaml\nentries: [{name: q, kind: queue.queue}]\n")
    found = config_file.load(path, {})
    assert set(found.queues) == {"a:q", "b:q", "c:q"}
    assert found.namespace == "a"
    assert found.queues["b:q"].folder.endswith("sub")


def test_two_entries_of_one_id_are_refused(write: Write) -> None:
    """Both places are named, also across files."""
    other = write("entries: [{id: 'a:q', kind: queue.queue}]\n", "other.yaml")
    path = write("namespace: a\ninclude: [other.yaml]\nentries:\n\n  - {name: q, kind: queue.queue}\n")
    why = refused(path)
    assert f"{other}:1: a second queue 'a:q'; the first is in {path}:5" in why


def test_a_section_is_in_one_file_only(write: Write) -> None:
    """Two files that both set settings would depend on their order."""
    write("settings: {lease: 5}\n", "other.yaml")
    assert "settings is in" in refused(write("include: other.yaml\nsettings: {lease: 6}\n"))


def test_files_that_include_each_other_are_refused(write: Write) -> None:
    """A circle is told as such; the same file by two ways is read once."""
    write("include: kq.yaml\n", "b.yaml")
    assert "includes itself" in refused(write("include: b.yaml\n"))
    write("entries: [{id: 'a:q', kind: queue.queue}]\n", "c.yaml")
    write("include: c.yaml\n", "b.yaml")
    assert set(config_file.load(write("include: [b.yaml, c.yaml]\n"), {}).queues) == {"a:q"}


@pytest.mark.parametrize(
    ("entry", "why"),
    [
        ("{kind: queue.queue}", "name or id is missing"),
        ("{kind: queue.queue, name: a, id: 'b:c'}", "give either name or id"),
        ("{kind: queue.queue, name: 'a:b'}", "'a:b' is a whole id"),
        ("{kind: queue.queue, name: 'a b'}", "ill-formed queue id"),
        ("{kind: queue.queue, name: a, driver: brokr}", "there is no driver 'n:brokr'"),
        ("{kind: queue.consumer, id: a, queue: b}", "method is missing"),
        ("{kind: queue.consumer, id: a, queue: b, method: c, func: d}", "give either method or func"),
        ("{kind: queue.consumer, id: a, queue: b, method: c, auto_ack: maybe}", "expected true or false"),
        ("{kind: queue.consumer, id: a, queue: b, method: ~}", "got ~, which is no value: leave it out, or quote it"),
        ("{kind: queue.queue, name: null}", "got null, which is no value"),
        ("{kind: queue.queue, name: a, retry: {initial: -1}}", "expected a duration"),
        ("{kind: queue.queue, name: a, retry: {jitter: 2}}", "expected full, none or a fraction"),
        ("{kind: queue.queue, name: a, retry: fast}", "expected a mapping of initial"),
        ("{name: q}", "kind is missing"),
    ],
)
def test_wrong_entries_are_refused(write: Write, entry: str, why: str) -> None:
    """Each mistake gives the file, the line and what was expected."""
    text = f"namespace: n\nentries:\n  - {{name: broker, kind: queue.driver.memory, url: 'memory://'}}\n  - {entry}\n"
    path = write(text)
    found = refused(path)
    assert why in found
    assert found.startswith(f"{path}:4: ")


def test_a_key_that_is_not_there_cannot_sign(write: Write) -> None:
    """``sign_with`` names one of the keys."""
    assert "expected the name of one of the 1 keys" in refused(write("signing: {keys: {k1: abc}, sign_with: k2}\n"))


def test_keys_the_wrong_way_round_show_no_secret(write: Write) -> None:
    """Whoever writes the secret where the name belongs does not find it in a log."""
    assert "c4nary" not in refused(write("signing: {keys: {c4nary: k1}, sign_with: k1}\n"))
    assert "c4nary" not in refused(write("signing: {keys: {k1: k1}, sign_with: c4nary}\n"))


# What values mean.


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("5", 5), ("-5", -5), ("1.5", 1.5), ("true", True), ("False", False), ("~", None), ("'5'", "5"), ("abc", "abc"),
        ("12:30", "12:30"), ("2026-01-01", "2026-01-01"), ("[1, a]", [1, "a"]), ("{a: 1}", {"a": 1}), ("0x1F", "0x1F"),
        ("'yes'", "yes"),
    ],
)  # fmt: skip
def test_what_a_condition_compares_with_is_what_is_written(write: Write, text: str, value: Any) -> None:
    """Numbers are numbers, quoted ones are texts; nothing is guessed."""
    path = write(
        "entries: [{id: p, kind: security.policy, policy: {actions: a, resources: b, "
        f"conditions: [{{field: meta.x, operator: eq, value: {text}}}]}}}}]\n"
    )
    policy = config_file.load(path, {}).policies["p"].given.values["policy"]
    assert policy.values["conditions"][0].values.get("value") == value


def test_words_that_may_be_booleans_are_refused(write: Write) -> None:
    """``yes`` and ``off`` are booleans to some and texts to others: the writer is to say which."""
    path = write(
        "entries: [{id: p, kind: security.policy, policy: {actions: a, resources: b, "
        "conditions: [{field: meta.x, operator: eq, value: yes}]}}]\n"
    )
    assert "quote it, or write true" in refused(path)


# What describes it.


def test_the_schema_accepts_what_the_loader_accepts() -> None:
    """The JSON Schema for editors is well-formed, accepts one of everything, and refuses what is not known."""
    schema = json_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    validator = jsonschema.Draft202012Validator(schema)
    document = yaml.safe_load(EVERYTHING)
    assert list(validator.iter_errors(document)) == []
    document["entries"][2]["max_lenght"] = 5
    assert not validator.is_valid(document)
    assert not validator.is_valid({"settings": {"lease": "soon"}})
    assert validator.is_valid({"settings": {"lease": "${env:LEASE}"}})
    assert validator.is_valid({"settings": None})
    for example in ("configured", "guarded"):
        path = Path(__file__).parents[2] / "examples" / example / "kq.yaml"
        assert list(validator.iter_errors(yaml.safe_load(path.read_text()))) == []


def test_every_field_is_documented() -> None:
    """docs/configuration.md has the tables that the code makes, word for word."""
    text = (Path(__file__).parents[2] / "docs" / "configuration.md").read_text()
    for heading, table in reference.tables().items():
        assert f"### {heading}\n\n{table}\n" in text, f"docs/configuration.md: the table of {heading} is not the code's"


def test_every_field_says_what_it_means() -> None:
    """Every field has a sentence and a default for people."""
    for table in reference.tables().values():
        for line in table.splitlines()[2:]:
            cells = [cell.strip() for cell in line.replace("\\|", "/").strip("|").split("|")]
            assert len(cells) == 4
            assert all(cells)
            assert cells[3].endswith(".")


def test_kinds_of_drivers_know_their_schemes() -> None:
    """Every kind of driver takes URLs of its own schemes only."""
    assert {scheme for schemes in kind.DRIVERS.values() for scheme in schemes} == {
        "amqp", "amqps", "redis", "rediss", "sqlite", "memory",
    }  # fmt: skip
