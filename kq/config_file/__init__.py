"""``kq.yaml``: drivers, queues, consumers, policies and settings in a file.

One module a step: `search` finds the file, `reader` makes a tree of a text, `value` and `kind` say what may stand in
it, `loader` checks it and makes a `document`, `schema` and `reference` describe it to editors and people.
"""

from kq.config_file.document import Document, Entry, Given, Place, empty
from kq.config_file.search import DEFAULT, FOUND, find, load

__all__ = ["DEFAULT", "FOUND", "Document", "Entry", "Given", "Place", "empty", "find", "load"]
