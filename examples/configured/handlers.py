"""What kq.yaml beside it runs on each message of app:emails."""

import logging

from kq import errors, queue

log = logging.getLogger(__name__)


def handle_email(payload: dict[str, str]) -> None:
    """Send an e-mail; an address without an @ can never be reached, so it is not tried again."""
    msg = queue.message()
    if "@" not in payload["to"]:
        raise errors.Invalid(f"{payload['to']!r} is no address")
    log.info("to %s, id %s, priority %s", payload["to"], msg.id(), msg.header("priority"))
