"""A JSON Schema of configuration files, for editors: ``kq check --schema``."""

from __future__ import annotations

from typing import Any

from kq.config_file.kind import FILE


def json_schema() -> dict[str, Any]:
    """Return the schema, as JSON Schema 2020-12, which YAML language servers understand."""
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "kq configuration",
        "description": "Drivers, queues, consumers and policies of a kq application.",
        **FILE.schema(),
    }
