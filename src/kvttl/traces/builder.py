"""Builds a `Trace` request by request: numbers block keys densely, chains what is not."""

import math
from array import array
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from numba import njit

from kvttl.traces.trace import COLUMNS, NAMED, OF_REQUESTS, Trace, reordered


class Details(NamedTuple):
    """What few files say of a request, as in `Trace`; names as text, -1 where unknown."""

    turn_kind: int = 0
    tool: str | int = -1
    tool_s: float = math.nan
    think_s: float = math.nan
    model: str | int = -1
    tenant: str | int = -1
    request_type: str | int = -1


_UNKNOWN = Details()


class TraceBuilder:
    """Collects requests one by one in about 4 bytes an access plus 24 a distinct block.

    Parameters
    ----------
    block_tokens : int
        Tokens in a complete block, >= 1.
    chained : bool
        Whether equal keys already mean equal prefixes, which is then checked;
        False chains them.
    shown : callable
        Gives a key as a message shows it.

    Examples
    --------
    >>> builder = TraceBuilder(block_tokens=16, chained=False)
    >>> builder.add([7, 8], arrival_s=0.0, prompt_tokens=32)
    >>> builder.add([9, 8], arrival_s=1.0, prompt_tokens=32)  # 8 after another prefix
    >>> builder.finish().block_ids.tolist()
    [0, 1, 2, 3]
    """

    def __init__(self, block_tokens: int, chained: bool = True, shown: Callable = int) -> None:
        if block_tokens < 1:
            raise ValueError(f"block_tokens must be >= 1, got {block_tokens}")
        self.block_tokens = int(block_tokens)
        self._raw, self._shown = None if chained else DenseIds(), shown
        self._dense = DenseIds()
        self._ids, self._ends = array("i"), array("q", [0])
        self._of_requests = [array(np.dtype(COLUMNS[name]).char) for name in OF_REQUESTS]
        self._names: dict[str, int] = {}

    def __len__(self) -> int:
        return len(self._ends) - 1

    def add(
        self,
        keys: Sequence[int] | np.ndarray,
        arrival_s: float,
        prompt_tokens: int,
        output_tokens: int = 0,
        session: int = -1,
        generation_s: float = 0.0,
        finish: int = 0,
        details: Details = _UNKNOWN,
    ) -> None:
        """Append a request: its blocks' 64-bit keys in prefix order, seconds, tokens, its end.

        Raises
        ------
        ValueError
            A known key follows another than before; nothing is appended.
        """
        keys, arrival_s = np.asarray(keys, np.int64), float(arrival_s)
        if self._raw is None:
            ids = self._dense.prefixes(keys, self._shown)  # a key that comes twice is not chained
        else:
            ids = self._dense.chain(self._raw.ids(keys))
        self._ids.frombytes(memoryview(ids).cast("B") if len(ids) else b"")
        self._ends.append(len(self._ids))
        values = arrival_s, prompt_tokens, output_tokens, session, generation_s, finish
        for column, value in zip(self._of_requests, (*values, *details)):
            column.append(value if type(value) is not str else self._code(value))

    def add_rows(self, keys, blocks, arrival_s, prompt_tokens, output_tokens) -> bool:
        """Append requests of chained keys, one after another, of which no more is known.

        Returns whether: where a row is not chained, nothing is appended.
        """
        ends = np.cumsum(blocks)
        try:
            ids = self._dense.prefixes(keys, ends=ends)
        except ValueError:
            return False
        self._ends.frombytes((ends + len(self._ids)).tobytes())
        self._ids.frombytes(ids.tobytes())
        rest = (np.full(len(ends), value) for value in (-1, 0.0, 0, *_UNKNOWN))
        for column, values in zip(
            self._of_requests, (arrival_s, prompt_tokens, output_tokens, *rest)
        ):
            column.frombytes(np.asarray(values, column.typecode).tobytes())
        return True

    def _code(self, name):
        return self._names.setdefault(name, len(self._names))

    def tell(self, request: int, **details: str | float) -> None:
        """Say more of a request that was added, by its number: fields of `Details`."""
        for name, value in details.items():
            column = self._of_requests[OF_REQUESTS.index(name)]
            column[request] = self._code(value) if name in NAMED else value

    def set_arrivals(self, arrival_s: Sequence[float]) -> None:
        """Give all requests, in order of adding, other arrivals, seconds."""
        self._of_requests[0] = array("d", arrival_s)

    def finish(self, name: str = "", skipped_lines: int = 0, timed: bool = True) -> Trace:
        """Return the trace, by arrival (equal times in order of adding), from second 0."""
        arrays = self._ids, self._ends, *self._of_requests
        columns = [np.asarray(a, dtype) for a, dtype in zip(arrays, COLUMNS.values())]
        ids, offsets, *of_requests = columns
        arrival_s, unique = of_requests[0], len(self._dense)
        if np.any(arrival_s[1:] < arrival_s[:-1]):
            order = np.argsort(arrival_s, kind="stable")
            ids, offsets = reordered(ids, offsets, order)
            of_requests = [column[order] for column in of_requests]
        arrival_s, prompt, output, sessions, *endings = of_requests
        arrival_s -= arrival_s[:1]
        if sessions.min(initial=0) < 0:
            guessed = sessions_by_prefix(ids, offsets, unique) + sessions.max() + 1
            sessions = np.where(sessions < 0, guessed, sessions)
        arrays = ids, offsets, arrival_s, prompt, output, sessions, *endings
        names = np.array(list(self._names), str)
        return Trace(*arrays, names, self.block_tokens, unique, name, skipped_lines, timed)


def make_trace(
    requests: Sequence[Sequence[int]],
    arrival_s: Sequence[float] | None = None,
    prompt_tokens: Sequence[int] | None = None,
    block_tokens: int = 16,
    sessions: Sequence[int] | None = None,
) -> Trace:
    """Return a trace from lists of prefix-chained block ids; by default one request a second."""
    builder = TraceBuilder(block_tokens)
    arrival_s = range(len(requests)) if arrival_s is None else arrival_s
    if prompt_tokens is None:
        prompt_tokens = [len(blocks) * block_tokens for blocks in requests]
    sessions = [-1] * len(requests) if sessions is None else sessions
    for blocks, *values, session in zip(requests, arrival_s, prompt_tokens, sessions):
        builder.add(blocks, *values, session=session)
    return builder.finish("made")


class DenseIds:
    """Numbers 64-bit keys 0, 1, 2, ... by first appearance (an open hash table in NumPy).

    Examples
    --------
    >>> DenseIds().ids(np.array([70, 50, 70, 90])).tolist()
    [0, 1, 0, 2]
    """

    def __init__(self) -> None:
        self._slots = np.full(1024, -1, np.int32)  # hash -> dense id; a power of two
        self._keys = np.empty(512, np.int64)  # dense id -> key
        self._parents = np.empty(0, np.int32)  # dense id -> that before it, -1: none
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def key(self, number: int) -> int:
        """Return the key that has a number."""
        return int(self._keys[number])

    def ids(self, keys: np.ndarray) -> np.ndarray:
        """Return the dense ids of keys, shape (n,), int32; unknown keys get the next numbers."""
        return self._numbered(keys, chained=False)[0]

    def prefixes(self, keys: np.ndarray, shown: Callable = int, ends=None) -> np.ndarray:
        """Return `ids` of keys in prefix order, each of which always follows the same key.

        With `ends` they are several rows.

        Raises
        ------
        ValueError
            A known key follows another than before; these rows are forgotten.

        Examples
        --------
        >>> dense = DenseIds()
        >>> dense.prefixes(np.array([70, 50])).tolist()
        [0, 1]
        >>> dense.prefixes(np.array([90, 50]))
        Traceback (most recent call last):
        ValueError: id 50 follows 90 here and 70 before: ids must be prefix-chained
        """
        kept = self._count
        self._reserve(len(keys))
        self._parents.resize(len(self._keys), refcheck=False)
        out, bad = self._numbered(keys, chained=False, ends=ends)
        if bad >= 0:
            parent = self._parents[out[bad]]
            here = shown(int(keys[bad - 1])) if bad else "nothing"
            before = shown(int(self._keys[parent])) if parent >= 0 else "nothing"
            _forget(self._slots, self._keys, kept, self._count)
            self._count = kept
            follows = f"id {shown(int(keys[bad]))} follows {here} here and {before} before"
            raise ValueError(f"{follows}: ids must be prefix-chained")
        return out

    def chain(self, ids: np.ndarray) -> np.ndarray:
        """Return ids that are equal only where all ids before them in the row are equal too."""
        return self._numbered(ids, chained=True)[0]

    def _numbered(self, keys, chained, ends=None):
        """Return ids, and the first place with another parent than before (-1; if that counts)."""
        self._reserve(len(keys))
        tables, out = (self._slots, self._keys, self._parents), np.empty(len(keys), np.int32)
        ends = np.array([len(keys)]) if ends is None else ends
        self._count, bad = _number_rows(keys, ends, chained, *tables, self._count, out)
        return out, bad

    def _reserve(self, more):
        need = self._count + more
        if need >= 2**31:
            raise ValueError(f"distinct blocks must be < 2147483648, got {need}")
        if need > len(self._keys):
            self._keys.resize(max(need, len(self._keys) * 5 // 4), refcheck=False)
        size = len(self._slots)
        while need * 4 > size * 3:
            size *= 2
        if size > len(self._slots):
            self._slots = np.full(size, -1, np.int32)
            _fill_slots(self._slots, self._keys, self._count)


@njit(cache=True)
def _slot_of(key, slots, keys):
    mask = len(slots) - 1
    at = key & mask  # of ids that count up, neighbours: they are looked up together
    if slots[at] < 0 or keys[slots[at]] == key:
        return at
    mixed = np.uint64(key) * np.uint64(0x9E3779B97F4A7C15)
    at = np.int64((mixed ^ (mixed >> np.uint64(29))) & np.uint64(mask))
    while slots[at] >= 0 and keys[slots[at]] != key:
        at = (at + 1) & mask
    return at


@njit(cache=True)
def _fill_slots(slots, keys, count):
    for number in range(count):
        slots[_slot_of(keys[number], slots, keys)] = number


@njit(cache=True)
def _forget(slots, keys, kept, count):
    """Take back the last keys; in reverse, so that no probe runs into a gap."""
    for number in range(count - 1, kept - 1, -1):
        slots[_slot_of(keys[number], slots, keys)] = -1


@njit(cache=True)
def _number_rows(rows, ends, chained, slots, keys, parents, count, out):
    """Number keys of rows, chained ones (dense ids) together with the number before.

    Returns the new count, and the first place whose key has another parent; -1: none, or no
    `parents` are kept.
    """
    first = 0
    for end in ends:
        parent = np.int64(-1)
        for i in range(first, end):
            key = np.int64(rows[i])
            if chained:
                key |= (parent + 1) << 32
            at = _slot_of(key, slots, keys)
            out[i] = slots[at] if slots[at] >= 0 else count
            if out[i] == count:
                slots[at], keys[count] = count, key
                if len(parents):
                    parents[count] = parent
                count += 1
            elif len(parents) and parents[out[i]] != parent:
                return count, i
            parent = np.int64(out[i])
        first = end
    return count, -1


@njit(cache=True)
def sessions_by_prefix(ids, offsets, unique):
    """Guess each request's session: it continues the one whose prompt it extends.

    The last block that a request shares with earlier ones names a session if
    an earlier prompt ended there, or one block later (its tail was incomplete).
    The first block names none: it is most often everybody's system prompt.
    """
    seen, ended = np.zeros(unique, np.bool_), np.full(unique, -1, np.int32)
    out, sessions = np.empty(len(offsets) - 1, np.int32), 0
    for r in range(len(out)):
        row = ids[offsets[r] : offsets[r + 1]]
        known = 0
        while known < len(row) and seen[row[known]]:
            known += 1
        session = ended[row[known - 1]] if known > 1 else -1
        if session < 0:
            session = sessions
            sessions += 1
        out[r] = session
        for k in range(known, len(row)):
            seen[row[k]] = True
        for k in range(max(1, len(row) - 2), len(row)):
            ended[row[k]] = session
    return out
