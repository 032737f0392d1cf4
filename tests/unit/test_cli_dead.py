from __future__ import annotations

import json
import math
from dataclasses import replace
from datetime import datetime, timezone
from decimal import Decimal

from kq.cli.dead import _fields
from kq.dead_letter import DeadLetter

LETTER = DeadLetter("m-1", "a:b", b"\x00\xff", b"\x00\xff", {}, "undecodable", 0, None, None, None)


def test_any_letter_can_be_printed_as_json() -> None:
    """What strangers put into headers, which JSON has no word for, hides no letter."""
    letter = replace(
        LETTER,
        headers={
            "b": b"\x00\xff", "t": datetime(2026, 1, 2, tzinfo=timezone.utc), "d": Decimal("1.5"), "l": [b"x"],
            "k": {b"\x01": 1}, "n": math.nan,
        },
    )  # fmt: skip

    fields = json.loads(json.dumps(_fields(letter)))

    assert fields["headers"] == {"b": "AP8=", "t": "2026-01-02 00:00:00+00:00", "d": "1.5", "l": ["eA=="],
                                 "k": {"b'\\x01'": 1}, "n": "nan"}  # fmt: skip
    assert (fields["payload"], fields["body"]) == ("AP8=", "AP8=")
