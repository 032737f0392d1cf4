"""The tables of docs/configuration.md, made from what the loader checks, so that they cannot differ."""

from __future__ import annotations

from kq.config_file import kind
from kq.config_file.value import Field, Many, Section, Value

#: Sections by their headings, in the order of the documentation.
_SECTIONS: dict[str, Section] = {
    "the file": kind.FILE,
    **{f"`{name}`": section for name, section in kind.ENTRIES.items()},
    "`settings`": kind.SETTINGS,
    "`worker`": kind.WORKER,
    "`security`": kind.SECURITY,
    "`signing`": kind.SIGNING,
}


def tables() -> dict[str, str]:
    """Return a Markdown table of fields for every section, by its heading; nested fields as ``a.b``."""
    return {heading: _table(section) for heading, section in _SECTIONS.items()}


def _table(section: Section) -> str:
    lines = ["| field | value | default | meaning |", "|---|---|---|---|"]
    for path, field in _fields(section, ""):
        name = f"`{path}`" + (f" or `{field.alias}`" if field.alias else "")
        expected = field.value.expected.replace("|", "\\|")
        lines.append(f"| {name} | {expected} | {field.default} | {field.doc} |")
    return "\n".join(lines)


def _fields(section: Section, prefix: str) -> list[tuple[str, Field]]:
    found: list[tuple[str, Field]] = []
    for field in section.fields:
        found.append((prefix + field.name, field))
        inner = _inner(field.value)
        # Sections of the file itself have tables of their own.
        if inner is not None and section is not kind.FILE:
            found += _fields(inner, f"{prefix}{field.name}.")
    return found


def _inner(value: Value) -> Section | None:
    if isinstance(value, Many):
        return _inner(value.item)
    return value if isinstance(value, Section) else None
