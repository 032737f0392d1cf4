"""``kq.yaml``: drivers, queues, consumers, policies and settings in a file.

One module a step: `reader` makes a tree of a text, `value` and `kind` say what may stand in it, `loader`
checks it and makes a `document`, `schema` and `reference` describe it to editors and people.
"""

from kq.config_file.document import Document, Entry, empty
from kq.config_file.kind import RANGES
from kq.config_file.loader import DEFAULT, find, load
from kq.config_file.policy import policy
from kq.config_file.reader import Place
from kq.config_file.value import Given

__all__ = ["DEFAULT", "RANGES", "Document", "Entry", "Given", "Place", "empty", "find", "load", "policy"]
