"""What kq.yaml beside it runs on each message of app:orders."""

import logging

log = logging.getLogger(__name__)


def handle_order(payload: dict[str, int]) -> None:
    """Take an order: whoever sent it was allowed to, and nobody has changed it on the way."""
    log.info("order %s", payload["order"])
