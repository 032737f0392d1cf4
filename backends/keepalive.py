"""How the kernel is told to probe a silent connection: by what names a system has for it."""

from __future__ import annotations

import socket
from typing import Final

#: How many probes may stay unanswered.
_PROBES: Final = 3


def keepalive(heartbeat: float) -> dict[int, int]:
    """Return options of TCP with which a silent connection is probed every third of ``heartbeat`` seconds."""
    interval = max(1, int(heartbeat / 3))
    # The first wait has another name on macOS, and some systems lack one or another.
    wanted = {"TCP_KEEPIDLE": interval, "TCP_KEEPALIVE": interval, "TCP_KEEPINTVL": interval, "TCP_KEEPCNT": _PROBES}
    return {getattr(socket, name): value for name, value in wanted.items() if hasattr(socket, name)}
