"""Loading an app by its path, ``package.module:attribute``, with errors that say which part failed."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from importlib import import_module
from typing import Any

from kq.app import App
from kq.errors import Invalid
from kq.handler import search_here, where

#: Attributes that are tried when a path names none.
_USUAL = ("app", "kq_app")


def open_app(path: str, overrides: Mapping[str, Any] | None = None) -> App:
    """Return an app with all its handlers, ready to work.

    Args:
        path: ``package.module:attribute``; empty for the app that the configuration file describes.
        overrides: Settings that win over all others, by name.

    Raises:
        Invalid: If the app, a handler or a setting is not what it must be.
        Conflict: If a file and Python disagree on a queue or consumer.
    """
    app = load_app(path) if path else App.from_file()
    if overrides:
        app.registry.override(**overrides)
    app.declarations.load_handlers()
    return app


def load_app(path: str) -> App:
    """Return the app that ``path`` names; the current directory is searched first.

    Raises:
        Invalid: If the module or the attribute does not exist, or importing fails; the message says
            which, and where in the user's code.
    """
    module_name, _, attribute = path.partition(":")
    if not module_name or module_name.endswith(".py") or "/" in module_name:
        raise Invalid(f"app: expected package.module:attribute, e.g. shop:app, got {path!r}")
    here = search_here()
    try:
        module = import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is not None and (module_name == error.name or module_name.startswith(error.name + ".")):
            raise Invalid(
                f"app: there is no module {error.name!r} (of {path!r}) in {here} or on the Python path"
            ) from None
        raise Invalid(f"app: importing {module_name!r} failed: {where(error)}") from error
    except (Exception, SystemExit) as error:
        raise Invalid(f"app: importing {module_name!r} failed: {where(error)}") from error
    names = [attribute] if attribute else list(_USUAL)
    for name in names:
        found = getattr(module, name, None)
        if isinstance(found, App):
            return found
        if found is not None and attribute:
            raise Invalid(f"app: {path!r} is of type {type(found).__name__}; expected a kq.App")
    apps = [name for name, value in vars(module).items() if isinstance(value, App)]
    if not attribute and len(apps) == 1:
        return vars(module)[apps[0]]  # type: ignore[no-any-return]
    near = difflib.get_close_matches(names[0], list(vars(module)), 1)
    hint = f"; it has {', '.join(apps)}" if apps else f"; did you mean {near[0]!r}?" if near else ""
    raise Invalid(f"app: module {module_name!r} has no {' or '.join(map(repr, names))}{hint}")
