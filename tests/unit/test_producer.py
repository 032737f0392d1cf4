"""What a producer makes by itself."""

from __future__ import annotations

from time import time
from uuid import RFC_4122, UUID

import kq


def test_an_id_is_a_uuid_that_begins_with_the_time() -> None:
    """Ids of one lot sort together, whoever publishes beside."""
    before = int(time() * 1000)
    with kq.App("ids", broker="memory://ids") as app:
        app.queue("test:ids")
        ids = app.publish_many("test:ids", [{"n": n} for n in range(1000)])
    after = int(time() * 1000)

    assert len(set(ids)) == 1000
    for id in ids:
        uuid = UUID(hex=id)
        assert uuid.hex == id
        assert (uuid.version, uuid.variant) == (7, RFC_4122)
        assert before <= int(id[:12], 16) <= after
