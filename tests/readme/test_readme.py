"""The README's blocks work as they stand."""

from __future__ import annotations

import inspect
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import click
import pytest

import kq
from kq.cli import main

ROOT = Path(__file__).parents[2]
BLOCKS: list[tuple[str, str]] = re.findall(
    r"^```(\w*)\n(.*?)^```", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL
)


def block(containing: str) -> str:
    """Return the one block that contains a text."""
    (found,) = [text for _, text in BLOCKS if containing in text]
    return found


@pytest.fixture
def shop(tmp_path: Path) -> Path:
    """A folder with the README's shop.py."""
    (tmp_path / "shop.py").write_text(block("# shop.py"))
    return tmp_path


def test_commands_work_as_shown(shop: Path) -> None:
    """Every command of the README runs, on the default broker."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("KQ_")}
    shown = [line.split("  #")[0].strip() for line in block("kq publish shop:emails").splitlines()]
    commands = {line.split()[1]: line for line in shown if line.startswith("kq ")}

    def run(command: str) -> str:
        line = command.replace("kq ", f"{sys.executable} -m kq ", 1)
        done = subprocess.run(
            line, shell=True, cwd=shop, env=environment, capture_output=True, text=True, timeout=60, check=False
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert len(run(commands["publish"]).strip()) == 32
    assert "to a@example.com" in run(commands["worker"] + " --burst -p 1")
    assert "shop:emails" in run(commands["info"])
    assert "no dead letters" in run(commands["dead"])


def test_publishing_works_as_shown(shop: Path) -> None:
    """The README's publishing script runs."""
    script = block("queue.publish_many") + "\nprint(app.info('shop:emails').message_count)\n"
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=shop, capture_output=True, text=True, timeout=60, check=False
    )

    assert (done.stdout, done.returncode) == ("1002\n", 0), done.stderr


def test_the_test_works_as_shown() -> None:
    """The README's test passes."""
    space: dict[str, object] = {"kq": kq}
    exec(block("def test_emails"), space)
    test = space["test_emails"]
    assert callable(test)
    test()


def test_the_file_works_as_shown(tmp_path: Path) -> None:
    """The README's kq.yaml runs a worker, with the handler of docs/configuration.md."""
    (tmp_path / "kq.yaml").write_text(block("id: email_worker"))
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "configuration.md").read_text(), re.DOTALL)
    (tmp_path / "handlers.py").write_text(blocks[0])
    environment = {key: value for key, value in os.environ.items() if not key.startswith("KQ_")}
    for arguments in (["check", "--offline"], ["publish", "app:emails", '{"to": "ann"}'], ["worker", "--burst"]):
        done = subprocess.run(
            [sys.executable, "-m", "kq", *arguments], cwd=tmp_path, env=environment, capture_output=True, text=True,
            timeout=60, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
    assert " to ann" in done.stdout


def test_policies_work_as_shown() -> None:
    """The policies of docs/security.md allow what the text says, and nothing else."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "security.md").read_text(), re.DOTALL)
    source = blocks[0].replace('kq.App("shop"', 'kq.App("shop", broker="memory://docs"')
    space: dict[str, object] = {"kq": kq}
    exec(source, space)
    app = space["app"]
    assert isinstance(app, kq.App)
    ann = kq.security.Actor("user:ann", {"role": "clerk"})
    with app.acting(ann, groups=["clerks"]), pytest.raises(kq.errors.PermissionDenied):
        app.publish("app:other", 1)
    with pytest.raises(kq.errors.PermissionDenied):
        app.publish("app:orders", 1)


def test_the_guarded_example_works_as_shown(tmp_path: Path) -> None:
    """The README's commands under policies do what their remarks say."""
    shutil.copytree(ROOT / "examples", tmp_path / "examples")
    environment = {key: value for key, value in os.environ.items() if not key.startswith("KQ_")}
    script = block("cd examples/guarded").replace("kq p", f"{sys.executable} -m kq p")
    done = subprocess.run(
        ["bash", "-c", script.replace("$(python ", f"$({sys.executable} ")],
        cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    published, denied, *explained = done.stdout.splitlines()
    assert (len(published), denied, done.returncode) == (32, "denied: no policy allows it", 77), done.stderr
    assert "actor.meta.role" in "\n".join(explained)


def test_several_brokers_work_as_shown() -> None:
    """The README's app has its queue where it says."""
    space: dict[str, object] = {"kq": kq}
    exec(block("drivers={"), space)
    events = space["events"]
    assert isinstance(events, kq.App)
    assert events.registry.spec("shop:invoices").driver == "ledger"
    assert events.registry.spec("shop:emails").driver == ""


def test_demo_ends_with_a_summary() -> None:
    """scripts/demo's program, on a few files: all accounted for, one retried, dead letters listed with reasons."""
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples/index/demo.py"), "--files", "40"],
        capture_output=True, text=True, timeout=100, check=False,
    )  # fmt: skip

    assert done.returncode == 0, done.stderr
    assert "lost: 0   run twice: 0" in done.stdout
    assert "this.py failed twice and succeeded on attempt 3" in done.stdout
    assert "does not parse" in done.stdout


def test_the_commands_are_all_there() -> None:
    """docs/commands.md has every command, the worker's own options, and each exit code."""
    text = (ROOT / "docs" / "commands.md").read_text()
    context = click.Context(main)
    for name in main.list_commands(context):
        assert f"`kq {name}" in text
    (worker, info) = (main.get_command(context, name) for name in ("worker", "info"))
    assert worker is not None
    assert info is not None
    common = {parameter.name for parameter in info.params}
    for parameter in worker.params:
        if isinstance(parameter, click.Option) and parameter.name not in common:
            assert any(f"`{option}" in text for option in parameter.opts), parameter.opts
    assert main.epilog is not None
    for code in re.findall(r"(\d+) \w", main.epilog.partition("Exit codes: ")[2]):
        assert f"\n| {code} | " in text


def test_the_python_reference_works_as_shown() -> None:
    """The blocks of docs/python.md run, and its signatures are the code's."""
    text = (ROOT / "docs" / "python.md").read_text()
    for source in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        exec(source, {"kq": kq})
    flat = " ".join(text.split())
    for shown, function in (
        ("@app.consumer", kq.App.consumer),
        ("app.queue", kq.App.queue),
        ("kq.App", kq.App.__init__),
        ("queue.publish", kq.queue.publish),
        ("queue.publish_many", kq.queue.publish_many),
        ("app.drain", kq.App.drain),
        ("kq.Consumer", kq.Consumer.__init__),
        ("kq.Backoff", kq.Backoff.__init__),
        ("kq.Driver", kq.Driver.__init__),
        ("kq.Tls", kq.Tls.__init__),
        ("kq.Signing", kq.Signing.__init__),
        ("kq.Retry", kq.Retry.__init__),
    ):
        (names, *_) = re.findall(re.escape(f"`{shown}(") + r"([^`]*)\)`", flat)
        parameters = [name for name in inspect.signature(function).parameters if name != "self"]
        assert re.findall(r"(\w+)(?:=[^,]+)?(?:, |$)", names.replace("*, ", "")) == parameters
    fields = re.search(r"A `kq.DeadLetter` has (.*?) in bytes", flat)
    assert fields is not None
    assert sorted(re.findall(r"`(\w+)`", fields[1])) == sorted(kq.DeadLetter.__dataclass_fields__)
