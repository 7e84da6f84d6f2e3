"""A manager's clock that jumps over idle time, so that hours of TTLs end within a minute."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any


class SessionClock:
    """A clock that stands still between requests, so that hours of think time take no time.

    Examples
    --------
    >>> clock = SessionClock(start_s=100.0)
    >>> clock.advance(25.0); clock()
    125.0
    """

    def __init__(self, start_s: float) -> None:
        self.start_s = start_s
        self._passed_s = 0.0

    def __call__(self) -> float:
        return self.start_s + self._passed_s

    def advance(self, to_s: float) -> None:
        """Go to `to_s` seconds after the start; never back."""
        self._passed_s = max(self._passed_s, to_s)


def ends_on_the_way(cache: Any, to_s: float) -> Iterator[float]:
    """Advance a manager's `SessionClock` to `to_s`, with a stop wherever a TTL ends.

    Yields
    ------
    float
        Seconds after the start; the clock stands there, and `sweep` is the caller's.
    """
    clock = cache.clock
    while (due_s := cache.claims.next_due_s - clock.start_s + 0.001) < to_s:
        clock.advance(due_s)
        yield due_s
    clock.advance(to_s)
