"""``python -m kq`` is ``kq``."""

from kq.cli import main

if __name__ == "__main__":
    main(prog_name="kq")
