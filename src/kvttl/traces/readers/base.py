"""What `kvttl.traces.formats` knows of a format, and what readers have in common."""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from kvttl.traces.builder import TraceBuilder
from kvttl.traces.source import Source

_MOST = 1 << 20  # 67 million tokens in blocks of 64
_OPTIONS = ("skip_bad", "block_tokens", "time_unit", "output_rate")
OF_SESSIONS = (*_OPTIONS, "seed", "sessions_per_hour", "max_sessions", "subagent_times")


class Format(NamedTuple):
    """How a format is read and known, and which of `read_trace`'s options it depends on."""

    read: Callable[[Sequence[Path], Source], TraceBuilder]
    can_read: Callable[[dict], bool]  # whether a record is this format's, and of none above
    mark: str  # a key that tells it in a line too long to be parsed
    files: str = "*.jsonl"  # of a folder, packed or not
    options: tuple[str, ...] = _OPTIONS


def hash_text(key: int) -> str:
    """Return a 64-bit key as a message shows it: of the first model the end of a log's hash."""
    return f"0x...{key % 2**64:016x}"


def tools_told(names: Iterable, starts_s: Sequence = (), ends_s: Sequence = ()) -> dict:
    """Return the fields of `Details` of tools: their names, and from first start to last end."""
    told = {"tool": "+".join(sorted(set(names) - {-1}))[:80]} if set(names) - {-1} else {}
    if any(end < start for start, end in zip(starts_s, ends_s)):
        raise ValueError("a tool must not end before it starts")
    if ends_s:
        told["tool_s"] = max(ends_s) - min(starts_s)
    return told


class MintedIds:
    """Ids of prompts of which only lengths, and what was in a cache, are known.

    A prompt is a list of runs of ids, (first, count): it keeps the first blocks of one before
    it, and gets new ones for the rest. What fills no block has no id.

    Examples
    --------
    >>> ids = MintedIds()
    >>> before = ids.prompt([], 0, 3)
    >>> ids.prompt(before, 2, 4)
    [(0, 2), (3, 2)]
    """

    def __init__(self) -> None:
        self._next = 0

    def prompt(self, before: Iterable[tuple[int, int]], kept: int, blocks: int) -> list:
        """Return the runs of a prompt of so many blocks that keeps at most `kept` of another."""
        if blocks > _MOST:
            raise ValueError(f"a prompt must have at most {_MOST} blocks, got {blocks}")
        runs, left = [], min(kept, blocks)
        for first, count in before:
            if left > 0:
                runs.append((first, min(count, left)))
                left -= runs[-1][1]
        if new := blocks - min(kept, blocks) + max(left, 0):
            runs.append((self._next, new))
            self._next += new
        return runs


def ids_of(runs: Iterable[tuple[int, int]]) -> np.ndarray:
    """Return the ids of runs, one by one."""
    return np.concatenate([np.arange(first, first + count) for first, count in [(0, 0), *runs]])
