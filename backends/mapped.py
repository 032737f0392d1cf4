"""Around what is asked of a broker: what its client raises becomes one of kq's errors."""

from __future__ import annotations

from types import TracebackType

from kq.errors import Error


class Mapped:
    """A context manager that may be used again, and by several threads at once."""

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            ours = self.ours(error)
            if ours is not None:
                raise ours from None

    def ours(self, error: BaseException) -> Error | None:
        """Return kq's error for what a client raised, or None for what passes as it is."""
        raise NotImplementedError
