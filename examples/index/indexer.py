"""An app that indexes Python source: one message a file, one row a file in the end.

Three things that happen in every real queue happen here too. Some files do not parse: no retry helps,
so `errors.Invalid` sends them to the dead-letter queue, where `kq dead list` shows file and reason. One
file cannot be read at first: `errors.Internal` has it tried again. And all others just work.
"""

import ast
import json
import os
from pathlib import Path

import kq
from kq import errors, queue

app = kq.App("index")
app.queue("index:files", retry=kq.Backoff(initial=0.2, factor=2, jitter="none"))

#: One JSON line a file; appended in one write, so that processes do not mix.
RESULTS = Path(os.environ.get("INDEX_RESULTS", "index.jsonl"))
#: The file whose disk is slow to wake up.
FLAKY = "this.py"


@app.consumer("index:files", timeout=30)
def index(payload):
    """Count the functions and classes of one file."""
    path = Path(payload["path"])
    message = queue.message()
    if path.name == FLAKY and message.attempt() < 3:
        raise errors.Internal(f"{path.name}: the disk is not ready (attempt {message.attempt()})")
    try:
        tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError, RecursionError) as error:
        raise errors.Invalid(f"{path.name} does not parse: {error}") from None
    nodes = list(ast.walk(tree))
    row = {
        "path": str(path),
        "id": message.id(),
        "attempt": message.attempt(),
        "functions": sum(isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) for node in nodes),
        "classes": sum(isinstance(node, ast.ClassDef) for node in nodes),
    }
    with RESULTS.open("a") as results:
        results.write(json.dumps(row) + "\n")
