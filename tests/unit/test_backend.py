from __future__ import annotations

import pytest

from kq import errors
from kq.backend import QueueSpec, unknown_options


def test_unknown_options_are_named() -> None:
    """An option that a backend does not know is Invalid, with those it knows; others' options are not its business."""
    queue = QueueSpec("app:a", options={"amqp": {"queue_typ": 1}, "redis": {"x": 1}})
    with pytest.raises(
        errors.Invalid, match="queue app:a: unknown option 'queue_typ' for amqp; expected arguments, queue_type"
    ):
        unknown_options(queue, "amqp", frozenset({"queue_type", "arguments"}))
    with pytest.raises(errors.Invalid, match="unknown option 'x' for redis; expected none"):
        unknown_options(queue, "redis", frozenset())
    unknown_options(queue, "sqlite", frozenset())
