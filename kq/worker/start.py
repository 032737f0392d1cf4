"""Where this program was started, wherever its app goes: whatever is started later starts from there as well."""

from __future__ import annotations

import os
from typing import Final


def _current() -> str | None:
    try:
        return os.getcwd()
    except OSError:
        # Somebody has deleted it.
        return None


#: Noted before the app is imported.
_FOLDER: Final = _current()


def folder() -> str | None:
    """Return the folder; None where it is gone, and things start wherever this process is."""
    return _FOLDER if _FOLDER is not None and os.path.isdir(_FOLDER) else None
