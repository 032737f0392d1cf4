"""What ends deliveries, as the frames that it is: many of them are one write, not one for each."""

from __future__ import annotations

from collections.abc import Iterable
from struct import Struct
from typing import Final

#: A method's frame, whole: type, channel and size; class and method; the delivery's tag; a bit; the frame's end.
_FRAME: Final = Struct(">BHIHHQBB")
_SIZE: Final = 13
_BASIC: Final = 60
_ACK: Final = 80
_REJECT: Final = 90
_END: Final = 0xCE


def acknowledgements(channel: int, up_to: int, tags: Iterable[int]) -> bytes:
    """Return the frames that acknowledge deliveries of a channel.

    Args:
        channel: Its number.
        up_to: The tag up to which all are acknowledged, by one frame; 0 for none.
        tags: Of others, each by one of its own.
    """
    frames = [_FRAME.pack(1, channel, _SIZE, _BASIC, _ACK, up_to, 1, _END)] if up_to else []
    frames += [_FRAME.pack(1, channel, _SIZE, _BASIC, _ACK, tag, 0, _END) for tag in tags]
    return b"".join(frames)


def rejections(channel: int, tags: Iterable[int]) -> bytes:
    """Return the frames that give deliveries of a channel back to their queues."""
    return b"".join([_FRAME.pack(1, channel, _SIZE, _BASIC, _REJECT, tag, 1, _END) for tag in tags])
