"""The wheel: built, installed in a clean environment, and used there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

from tests.broker import SHARED, find

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of this checkout."""
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--wheel", "--outdir", str(folder), str(ROOT)]
    subprocess.run(command, check=True, capture_output=True, timeout=300)
    return next(folder.glob("kq_tasks-*.whl"))


def test_wheel_holds_the_package_and_nothing_else(wheel: Path) -> None:
    """The wheel has kq with its backends as kq.backends, the type marker, and no tests."""
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names}

    parts = ("__init__.py", "py.typed", "backends/redis.py", "worker/child.py", "cli/worker.py")
    assert {f"kq/{part}" for part in parts} <= set(names)
    assert {top for top in tops if not top.endswith(".dist-info")} == {"kq"}


@pytest.mark.timeout(300)
def test_wheel_works_where_it_is_installed(wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a clean environment the command runs, and a message goes through a worker process, on each broker."""
    home = tmp_path / "venv"
    venv.create(home, with_pip=True)
    python = home / "bin" / "python"
    subprocess.run([python, "-m", "pip", "install", "-q", str(wheel)], check=True, capture_output=True, timeout=240)
    (tmp_path / "shop.py").write_text(
        "import os, kq\n"
        "app = kq.App('shop')\n"
        "@app.consumer(os.environ['QUEUE'])\n"
        "def handle(payload):\n"
        "    open('handled', 'a').write(payload['to'] + '\\n')\n"
    )

    def kq(*arguments: str) -> str:
        done = subprocess.run(
            [home / "bin" / "kq", *arguments], cwd=tmp_path, check=True, capture_output=True, text=True, timeout=60
        )
        return done.stdout

    assert kq("--version").startswith("kq, version ")
    for name in SHARED:
        broker = find(name, tmp_path)
        monkeypatch.setenv("KQ_BROKER_URL", broker.url)
        monkeypatch.setenv("QUEUE", broker.queue_id())
        try:
            assert len(kq("publish", os.environ["QUEUE"], json.dumps({"to": name}), "-A", "shop:app").strip()) == 32
            kq("worker", "shop:app", "--burst", "-p", "1")
        finally:
            broker.forget()

    assert (tmp_path / "handled").read_text().split() == list(SHARED)
