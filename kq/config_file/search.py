"""Which file is read. What reads it is imported where there is one: most programs have none."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Final

from kq.config_file.document import Document, empty
from kq.errors import Invalid

#: What is read where nobody names a file.
DEFAULT: Final = "kq.yaml"
#: The variable by which a worker tells its children, and itself when it starts anew, where that was: where it is gone
#: by then, they are to say so, and not to be another app.
FOUND: Final = "KQ_CONFIG_FOUND"


def find(path: str | None, environment: Mapping[str, str]) -> str | None:
    """Return the file to read: the one named, else ``KQ_CONFIG``, else ``kq.yaml`` if there is one, or was."""
    named = path or environment.get("KQ_CONFIG") or None
    if named is None and os.path.isfile(DEFAULT):
        return DEFAULT
    was = environment.get(FOUND)
    return was if named is None and was and not os.path.isfile(was) else named


def load(path: str | os.PathLike[str] | None = None, environment: Mapping[str, str] | None = None) -> Document:
    """Return what the configuration file and those it includes say.

    Args:
        path: The file; see `find`. Where there is none the document is empty.
        environment: Where ``${env:NAME}`` is looked up, instead of the process's own.

    Raises:
        Invalid: If a file cannot be read or is wrong; each line of the text is one mistake, with its place.
    """
    if not isinstance(path, (str, os.PathLike, type(None))):
        raise Invalid(f"config: expected the path of a configuration file, got {type(path).__name__}")
    environment = os.environ if environment is None else environment
    found = find(None if path is None else os.fspath(path), environment)
    if found is None:
        return empty()
    from kq.config_file.loader import Loader

    return Loader(environment).load(found)
