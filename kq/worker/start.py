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


#: Imported before the app is. None where there is no such folder.
FOLDER: Final = _current()
