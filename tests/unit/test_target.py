from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import kq
from kq import errors
from kq.target import load_app

Write = Callable[..., str]
APP = "import kq\napp = kq.App('found', broker='memory://unit-target')\n"


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Write]:
    """Writes modules into the current directory, and forgets them afterwards."""
    before = set(sys.modules)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    monkeypatch.chdir(tmp_path)

    def module(source: str, name: str = "unit_target_shop.py") -> str:
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(source)
        return path.stem

    yield module
    for name in set(sys.modules) - before:
        if name.startswith("unit_target_"):
            del sys.modules[name]


def test_an_app_is_found_by_its_path(write: Write) -> None:
    """``module:attribute`` names an app, in a module of the current directory."""
    name = write(APP + "other = kq.App('other', broker='memory://unit-target')\n")
    assert load_app(f"{name}:app").name == "found"
    assert load_app(f"{name}:other").name == "other"


def test_an_app_in_a_package(write: Write) -> None:
    """A dotted path reaches into packages."""
    write("", "unit_target_pkg/__init__.py")
    write(APP, "unit_target_pkg/inner.py")
    assert load_app("unit_target_pkg.inner:app").name == "found"


@pytest.mark.parametrize("attribute", ["app", "kq_app", "anything"])
def test_without_an_attribute_the_usual_one_is_taken(write: Write, attribute: str) -> None:
    """A module alone means its ``app``, its ``kq_app``, or its only app."""
    name = write(APP.replace("app =", f"{attribute} ="))
    assert load_app(name).name == "found"
    assert load_app(f"{name}:").name == "found"


def test_another_app_called_app_is_passed_over(write: Write) -> None:
    """An ``app`` that is of some other framework is not taken."""
    name = write(APP.replace("app =", "kq_app =") + "app = object()\n")
    assert load_app(name).name == "found"


@pytest.mark.parametrize("path", ["", ":app", "shop.py", "shop.py:app", "dir/shop:app"])
def test_paths_that_are_none(path: str) -> None:
    """A file name or nothing is refused, with an example."""
    with pytest.raises(errors.Invalid, match=r"expected package\.module:attribute, e\.g\. shop:app, got") as caught:
        load_app(path)
    assert repr(path) in caught.value.message


@pytest.mark.parametrize("path", ["unit_target_none:app", "unit_target_none.sub:app"])
@pytest.mark.usefixtures("write")
def test_missing_module(path: str) -> None:
    """A module that does not exist is named, with where it was looked for."""
    with pytest.raises(errors.Invalid, match="there is no module 'unit_target_none'") as caught:
        load_app(path)
    assert os.getcwd() in caught.value.message


@pytest.mark.usefixtures("write")
def test_relative_paths_are_refused() -> None:
    """A path that starts with a dot is an error of ours, not of the import system."""
    with pytest.raises(errors.Invalid, match=r"importing '\.shop' failed"):
        load_app(".shop:app")


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("1 / 0", "ZeroDivisionError: division by zero"),
        ("import unit_target_missing", "ModuleNotFoundError: No module named 'unit_target_missing'"),
        ("from kq import nothing_of_the_kind", "ImportError: cannot import name"),
        ("raise SystemExit(3)", "SystemExit: 3"),
        ("def", "SyntaxError: "),
        ("kq.App('')", "Invalid: name: expected"),
    ],
)
@pytest.mark.parametrize("directory", ["", "kq/"])
def test_an_app_that_does_not_import(write: Write, line: str, expected: str, directory: str, tmp_path: Path) -> None:
    """A module that fails to import is Invalid, with the error and the line in the user's own file."""
    name = write(f"import kq\n\n{line}\n", f"{directory}unit_target_shop.py")
    sys.path.insert(0, str(tmp_path / directory))
    with pytest.raises(errors.Invalid, match=f"importing '{name}' failed: {expected}") as caught:
        load_app(f"{name}:app")
    assert f"{directory}{name}.py, line 3)" in caught.value.message


def test_missing_attribute_is_named_with_what_there_is(write: Write) -> None:
    """A wrong attribute is named, with the apps that the module has."""
    name = write(APP)
    with pytest.raises(errors.Invalid, match=f"module '{name}' has no 'nope'; it has app$"):
        load_app(f"{name}:nope")


def test_missing_attribute_is_named_with_its_nearest(write: Write) -> None:
    """Without any app the nearest name is offered."""
    name = write("application = 5\n")
    with pytest.raises(errors.Invalid, match="has no 'applicatio'; did you mean 'application'"):
        load_app(f"{name}:applicatio")


def test_no_app_at_all(write: Write) -> None:
    """A module without an app says which names were tried."""
    with pytest.raises(errors.Invalid, match="has no 'app' or 'kq_app'"):
        load_app(write("x = 1\n"))


def test_several_apps_are_not_guessed_between(write: Write) -> None:
    """Of two apps under unusual names none is taken; both are named."""
    name = write(APP.replace("app =", "one =") + "two = kq.App('two', broker='memory://unit-target')\n")
    with pytest.raises(errors.Invalid, match="it has one, two"):
        load_app(name)


def test_an_attribute_of_another_type(write: Write) -> None:
    """An attribute that is no app is refused with its type."""
    name = write("app = 5\n")
    with pytest.raises(errors.Invalid, match=r"is of type int; expected a kq\.App"):
        load_app(f"{name}:app")


def test_the_current_directory_comes_first(write: Write, tmp_path: Path) -> None:
    """A module beside the user wins over one elsewhere on the path."""
    write(APP.replace("found", "elsewhere"), "lib/unit_target_shop.py")
    sys.path.append(str(tmp_path / "lib"))
    name = write(APP)
    app = load_app(f"{name}:app")
    assert isinstance(app, kq.App)
    assert app.name == "found"
