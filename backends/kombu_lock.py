"""Kombu's own locks in a forked child.

A cached property of Kombu's has a lock that all objects of its class share, and takes it whenever it is read
(``kombu/utils/objects.py``). Whoever reads one in another thread when the process forks is not there to let go of it.
"""

from __future__ import annotations

import os
from threading import RLock

import kombu
from kombu.utils.objects import cached_property


def _renew() -> None:
    for value in vars(kombu.Connection).values():
        if isinstance(value, cached_property):
            value.lock = RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew)
