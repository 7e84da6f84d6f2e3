"""A table that is bounded in entries and in bytes."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any


class BoundedTable:
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

    def __init__(self, max_entries: int, max_bytes: int, size_bytes: Callable[[Any], int]) -> None:
        self._max_entries, self._max_bytes = max_entries, max_bytes
        self._size_bytes, self._bytes = size_bytes, 0
        self._entries: OrderedDict[str, Any] = OrderedDict()

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, key: str) -> Any:
        """Return an entry, None where there is none."""
        return self._entries.get(key)

    def values(self) -> Iterator[Any]:
        """Return the entries, the one that was put first first."""
        return iter(self._entries.values())

    def pop(self, key: str) -> Any:
        """Take an entry out and return it, None where there is none."""
        value = self._entries.pop(key, None)
        if value is not None:
            self._bytes -= self._size_bytes(value)
        return value

    def put(self, key: str, value: Any) -> int:
        """Add an entry, or replace it as the newest; return how many gave way."""
        self.pop(key)
        self._entries[key] = value
        self._bytes += self._size_bytes(value)
        gone = 0
        while len(self) > 1 and (len(self) > self._max_entries or self._bytes > self._max_bytes):
            self.pop(next(iter(self._entries)))
            gone += 1
        return gone
