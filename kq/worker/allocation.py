"""How the C library keeps memory.

glibc raises the size from which on it takes memory from the system, block by block, and gives it back, with every large
block that is freed. After one message of 10 MB all others of that size come from its heap, which keeps what it has
got. A worker's memory is to be flat, whatever strangers send.
"""

from __future__ import annotations

import ctypes
import sys
from contextlib import suppress
from typing import Final

#: The number of the option in ``mallopt`` (https://man7.org/linux/man-pages/man3/mallopt.3.html).
_M_MMAP_THRESHOLD: Final = -3
#: Bytes of a block that is taken from the system by itself and given back when it is free.
_LARGE: Final = 512 * 1024


def give_large_blocks_back() -> None:
    """Have large blocks of memory go back to the system at once, where the C library can be told so."""
    if sys.platform == "linux":
        with suppress(OSError, AttributeError):
            ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, _LARGE)
