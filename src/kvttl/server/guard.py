"""Nothing of this kit may break an LMCache server: hooks that fail are counted, then left out.

LMCache 0.5.6 protects its listeners, policies and wrapped handlers little or not at all.
"""

from __future__ import annotations

import functools
import logging
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

logger = logging.getLogger(__name__)

_FAILURES = 100  # of one hook in a row; then it rests
_REST_S = 60.0
_LOGGED = 3  # tracebacks of one hook


class Guard:
    """Calls hooks so that none of their errors reaches LMCache.

    Attributes
    ----------
    failures : Counter
        Errors by hook, since the start.

    Examples
    --------
    >>> logging.disable()
    >>> guard = Guard()
    >>> half = guard(lambda number: 1 / number, "half", default=0.0)
    >>> half(2), half(0), dict(guard.failures)
    (0.5, 0.0, {'half': 1})
    >>> logging.disable(logging.NOTSET)
    """

    def __init__(self) -> None:
        self.failures: Counter[str] = Counter()
        self._in_a_row: Counter[str] = Counter()
        self._rests_until_s: dict[str, float] = {}

    def __call__(self, hook: Callable, name: str, default: Any = None) -> Callable:
        """Return a hook that returns `default` where it fails, or while it rests."""

        @functools.wraps(hook)
        def guarded(*args, **kwargs):
            if name in self._rests_until_s and self._is_resting(name):
                return default
            try:
                result = hook(*args, **kwargs)
            except Exception:
                self._failed(name)
                return default
            if name in self._in_a_row:
                del self._in_a_row[name]
            return result

        return guarded

    @property
    def resting(self) -> list[str]:
        """Hooks that are left out now."""
        return [name for name in list(self._rests_until_s) if self._is_resting(name)]

    def _is_resting(self, name):
        return time.monotonic() < self._rests_until_s[name]

    def _failed(self, name):
        self.failures[name] += 1
        self._in_a_row[name] += 1
        if self.failures[name] <= _LOGGED:
            logger.exception("%s failed, for the %d. time", name, self.failures[name])
        if self._in_a_row[name] >= _FAILURES:
            logger.error("%s is left out for %.0f s: it failed again and again", name, _REST_S)
            self._rests_until_s[name] = time.monotonic() + _REST_S
            del self._in_a_row[name]
