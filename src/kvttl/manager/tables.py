"""A table that is bounded in entries and in bytes."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any


class BoundedTable(OrderedDict):
    """Keeps what was put last; what was put first gives way. Not safe for threads by itself.

    Parameters
    ----------
    max_entries : int
        Entries that are kept.
    max_bytes : int
        What they may take together; the newest one is kept whatever it takes.
    size_bytes : callable
        Value -> what it takes.

    Examples
    --------
    >>> table = BoundedTable(10, 5, len)
    >>> table.put("a", "123"), table.put("b", "45"), table.put("c", "6"), list(table.values())
    (0, 0, 1, ['45', '6'])
    """

    def __init__(
        self, max_entries: int, max_bytes: float, size_bytes: Callable[[Any], int]
    ) -> None:
        super().__init__()
        self._max_entries, self._max_bytes = max_entries, max_bytes
        self._size_bytes, self._bytes = size_bytes, 0

    def pop(self, key: str) -> Any:
        """Take an entry out and return it, None where there is none."""
        value = super().pop(key, None)
        if value is not None:
            self._bytes -= self._size_bytes(value)
        return value

    def put(self, key: str, value: Any) -> int:
        """Add an entry, or replace it as the newest; return how many gave way."""
        self.pop(key)
        self[key] = value
        self._bytes += self._size_bytes(value)
        gone = 0
        while len(self) > 1 and (len(self) > self._max_entries or self._bytes > self._max_bytes):
            self.pop(next(iter(self)))
            gone += 1
        return gone
