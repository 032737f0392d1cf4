"""Finding a handler by what a configuration file calls it, with errors that say which part failed."""

from __future__ import annotations

import difflib
import os
import sys
import traceback
from collections.abc import Callable
from importlib import import_module
from importlib.util import module_from_spec, spec_from_file_location
from types import ModuleType
from typing import Any, Final

from kq.errors import Invalid

#: Where handlers are found where nobody says so: beside the file.
BESIDE: Final = "handlers.py"
#: Where kq itself is, whose lines are of no interest to users.
HERE: Final = os.path.dirname(os.path.abspath(__file__)) + os.sep

#: Modules loaded from files, by real path.
_files: dict[str, ModuleType] = {}


def find_handler(
    method: str, *, folder: str, source: str | None = None, module: str | None = None
) -> Callable[..., Any]:
    """Return the function that ``method`` names, importing what it takes.

    Args:
        method: ``package.module:function``, or a bare name, which is looked up in ``source``, else in
            ``module``, else in ``handlers.py`` in ``folder``.
        folder: The folder of the configuration file.
        source: A file, relative to the folder, or a module.
        module: The name of the module that made the app, if one did.

    Raises:
        Invalid: If the module or the function does not exist, or importing fails; the message says which,
            and where in the user's code.
    """
    name, found, attribute = method.rpartition(":")
    if found:
        return _function(_import(name), attribute, name)
    if source is not None:
        return _function(_load(source, folder), method, source)
    if module is not None and callable(getattr(sys.modules.get(module), method, None)):
        return _function(sys.modules[module], method, module)
    beside = os.path.join(folder, BESIDE)
    if os.path.isfile(beside):
        return _function(_load(BESIDE, folder), method, beside)
    if module is not None and module in sys.modules:
        return _function(sys.modules[module], method, module)
    raise Invalid(
        f"method: there is no {beside} to find {method!r} in; name a source, or write package.module:{method}"
    )


def where(error: BaseException) -> str:
    """Say what went wrong in the user's own code, and in which line."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith("<")]
    mine = [f for f in frames if not f.filename.startswith(HERE) and "importlib" not in f.filename]
    place = f" ({mine[-1].filename}, line {mine[-1].lineno})" if mine else ""
    if isinstance(error, SyntaxError):
        place = f" ({error.filename}, line {error.lineno})"
    return f"{type(error).__name__}: {error}{place}"


def search_here() -> str:
    """Have imports look in the current directory first, and return it."""
    here = os.getcwd()
    if here not in sys.path:
        sys.path.insert(0, here)
    return here


def _import(name: str) -> ModuleType:
    here = search_here()
    try:
        return import_module(name)
    except ModuleNotFoundError as error:
        if error.name is not None and (name == error.name or name.startswith(error.name + ".")):
            raise Invalid(f"method: there is no module {error.name!r} in {here} or on the Python path") from None
        raise Invalid(f"method: importing {name!r} failed: {where(error)}") from error
    except (Exception, SystemExit) as error:
        raise Invalid(f"method: importing {name!r} failed: {where(error)}") from error


def _load(source: str, folder: str) -> ModuleType:
    """Return the module that a file or a name stands for."""
    if not source.endswith(".py"):
        return _import(source)
    path = os.path.realpath(os.path.join(folder, source))
    # The app's own module, run as a script or imported, is not to be run a second time.
    for module in [*_files.values(), *sys.modules.values()]:
        file = getattr(module, "__file__", None)
        if isinstance(file, str) and os.path.realpath(file) == path:
            return module
    if not os.path.isfile(path):
        raise Invalid(f"source: there is no file {path}")
    stem = os.path.basename(path).removesuffix(".py")
    name = stem if stem not in sys.modules else f"{stem}@{len(_files)}"
    spec = spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    if os.path.dirname(path) not in sys.path:
        # As if it had been run from there: it may import what stands beside it.
        sys.path.insert(0, os.path.dirname(path))
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        raise Invalid(f"source: loading {path} failed: {where(error)}") from error
    _files[path] = module
    return module


def _function(module: ModuleType, name: str, shown: str) -> Callable[..., Any]:
    found: Any = module
    for part in name.split("."):
        found = getattr(found, part, None)
    if callable(found):
        return found  # type: ignore[no-any-return]
    if found is not None:
        raise Invalid(f"method: {name!r} in {shown} is of type {type(found).__name__}; expected a function")
    functions = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
    near = difflib.get_close_matches(name, functions, 1)
    hint = f" (did you mean {near[0]}?)" if near else ""
    raise Invalid(f"method: {shown} has no function {name!r}{hint}")
