"""Whether all maps of a msgpack text have texts for keys, told before it is decoded.

msgpack allows any key, and only texts and bytes have hashes that a stranger cannot foresee. Numbers can be chosen so
that they get into each other's way; and a decoder makes tuples of lists, of which all of -1 and -2 have one hash. A map
of fifty thousand such keys, which is less than 1 MiB, takes a minute to be filled, under the interpreter's lock.
"""

from __future__ import annotations

from typing import Final

#: Bytes up to which nothing can take long.
_SMALL: Final = 1 << 14
#: How maps of more than fifteen entries begin (https://github.com/msgpack/msgpack/blob/master/spec.md).
_LARGE_MAPS: Final = (b"\xde", b"\xdf")

#: What begins with a byte: bytes of a length or count that follow, and what that counts.
_FIXED: Final = {
    0xC0: 0, 0xC2: 0, 0xC3: 0, 0xCA: 4, 0xCB: 8, 0xCC: 1, 0xCD: 2, 0xCE: 4, 0xCF: 8, 0xD0: 1, 0xD1: 2, 0xD2: 4, 0xD3: 8,
    0xD4: 2, 0xD5: 3, 0xD6: 5, 0xD7: 9, 0xD8: 17,
}  # fmt: skip
_BYTES: Final = {0xC4: 1, 0xC5: 2, 0xC6: 4, 0xD9: 1, 0xDA: 2, 0xDB: 4}
_EXTENSIONS: Final = {0xC7: 1, 0xC8: 2, 0xC9: 4}
_ITEMS: Final = {0xDC: 2, 0xDD: 4}
_PAIRS: Final = {0xDE: 2, 0xDF: 4}


def has_plain_keys(data: bytes) -> bool:
    """Tell whether each map has texts for keys, or it does not matter; what is no msgpack may be either.

    Takes a look where no map is large, else time in proportion to the values.
    """
    if len(data) < _SMALL or all(data.find(mark) < 0 for mark in _LARGE_MAPS):
        return True
    return _walk(data)


def _walk(data: bytes) -> bool:
    at, size = 0, len(data)
    #: What is still to come: of a list its items, of a map its keys and values, for which the number is negative.
    open_ = [1]
    while open_:
        left = open_[-1]
        if left == 0:
            open_.pop()
            continue
        is_key = left < 0 and left % 2 == 0
        open_[-1] = left + 1 if left < 0 else left - 1
        if at >= size:
            return True
        kind = data[at]
        at += 1
        if is_key and not (0xA0 <= kind < 0xC0 or 0xD9 <= kind <= 0xDB or kind == 0xC1):
            return False
        if kind < 0x80 or kind >= 0xE0:
            continue
        if 0xA0 <= kind < 0xC0:
            at += kind - 0xA0
        elif kind in _FIXED:
            at += _FIXED[kind]
        elif kind in _BYTES or kind in _EXTENSIONS:
            width = _BYTES.get(kind) or _EXTENSIONS[kind]
            at += width + int.from_bytes(data[at : at + width], "big") + (kind in _EXTENSIONS)
        elif kind == 0xC1:
            # It means nothing: a decoder says so.
            return True
        elif kind < 0x90 or kind in _PAIRS:
            width = _PAIRS.get(kind, 0)
            count = int.from_bytes(data[at : at + width], "big") if width else kind - 0x80
            at += width
            open_.append(-2 * count)
        else:
            width = _ITEMS.get(kind, 0)
            count = int.from_bytes(data[at : at + width], "big") if width else kind - 0x90
            at += width
            open_.append(count)
    return True
