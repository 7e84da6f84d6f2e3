"""Claims: which prompts want which chunk in which tier, and until when.

A chunk of KV cache is shared by every prompt with the same prefix, so a
decision about one prompt is only a *claim* on its chunks. A chunk belongs in
the hottest tier that any live claim asks for. A claim whose TTL has passed
goes down the ladder gpu -> disk -> remote -> dropped.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from caching_heuristics import TIER_CODES, TIERS, HeuristicConfig

_NONE = -1  # no chunk, no claim
_FIRST_ROWS = 1024
_DIGEST = re.compile("[0-9a-fA-F]{1,16}")
_TREE = np.dtype([("parent", np.int32), ("live", np.int32, (3,))])
_CLAIM = np.dtype(
    [
        ("owner", np.uint64),
        ("deadline_s", np.float64),
        ("ttl_s", np.float64),
        ("leaf", np.int32),  # slot of the claim's last chunk
        ("length", np.int32),  # chunks, counted from the leaf up
        ("next", np.int32),  # next claim in the same bucket
        ("tier", np.int8),
    ]
)


@dataclass(frozen=True, slots=True)
class Step:
    """A claim whose TTL passed: its chunks and where they belong now, as far as it goes.

    Parameters
    ----------
    owner : str
        The prompt's digest.
    chunks : tuple of str
        Chunk keys in prefix order.
    from_tier : str
        Where the claim was.
    tier : str or None
        The rung it came down to; None = past the last one.
    ttl_s : float or None
        What it got there, seconds.
    """

    owner: str
    chunks: tuple[str, ...]
    from_tier: str
    tier: str | None
    ttl_s: float | None


class ClaimLedger:
    """Live claims, and the tier that each chunk is wanted in; safe for concurrent use.

    Chunk keys are prefix-chained: a key stands for everything before it too, so
    the chunks form a tree, and a claim is stored as its last chunk alone. Time
    is passed in, never read; equal calls give equal answers.

    Parameters
    ----------
    ladder : mapping, optional
        Tier -> what a claim's `ttl_s` is multiplied by when it comes down to it.

    Notes
    -----
    Claims and chunks are rows of NumPy arrays: 200 to 290 bytes for a claim with
    a chunk of its own. Deadlines are found by one vectorised comparison, which
    for 100,000 claims takes about 0.15 ms; a heap would cost more memory
    than the claims, and keep the stale entries of renewed ones.

    Examples
    --------
    >>> ledger = ClaimLedger()
    >>> ledger.claim("0a", ["system", "a"], "gpu", now_s=0, ttl_s=100)
    >>> ledger.claim("0b", ["system", "b"], "remote", now_s=0, ttl_s=5000)
    >>> ledger.wanted(["system", "b"], now_s=0)  # 0a keeps the shared chunk hot
    ['gpu', 'remote']
    >>> [(step.owner, step.tier) for step in ledger.sweep(now_s=100)]
    [('000000000000000a', 'disk')]
    >>> ledger.wanted(["system", "b"], now_s=100)
    ['disk', 'remote']
    """

    def __init__(self, ladder: Mapping[str, float] | None = None) -> None:
        ladder = ladder or HeuristicConfig().ladder
        self._factors = [float(ladder[tier]) for tier in TIERS]
        self._slots: dict[bytes | str, int] = {}  # packed chunk key -> row of _chunks
        self._keys: list[bytes | str | None] = []  # row -> packed chunk key
        self._chunks, self._free_chunks = np.zeros(0, _TREE), []
        self._claims, self._free_claims = np.zeros(0, _CLAIM), []
        self._buckets = np.full(1, _NONE, np.int32)  # owner modulo their number -> first claim
        self._live = 0
        self._next_due_s = np.inf  # no claim ends before
        self._steps: list[Step] = []  # taken, not yet handed out by sweep
        self._lock = threading.RLock()

    def __len__(self) -> int:
        return self._live

    @property
    def next_due_s(self) -> float:
        """No claim ends before this time, seconds; infinite if there is none."""
        with self._lock:
            return float("-inf") if self._steps else self._next_due_s

    def claim(
        self, owner: str, chunks: Sequence[str], tier: str, now_s: float, ttl_s: float
    ) -> None:
        """Record a prompt's wish; it replaces (renews) the prompt's previous one.

        Parameters
        ----------
        owner : str
            The prompt's digest, at most 16 hexadecimal digits.
        chunks : sequence of str
            Chunk keys in prefix order; none = nothing to claim.
        tier : str
            Where they are wanted for the next `ttl_s` seconds.
        now_s, ttl_s : float
            The access, and `compute_ttl`'s answer, seconds.

        Raises
        ------
        ValueError
            If `tier` is not one of ``TIERS``, `owner` is no digest, or a time no number.
        """
        if tier not in TIER_CODES:
            raise ValueError(f"tier must be one of {', '.join(TIERS)}, got {tier!r}")
        if not 0 <= now_s + ttl_s < np.inf:  # NaN would never be due
            raise ValueError(f"now_s + ttl_s must be >= 0 and finite, got {now_s!r} + {ttl_s!r}")
        number = _owner_number(owner)
        with self._lock:
            self._advance(now_s)
            if not chunks:
                return
            deadline_s, path = now_s + ttl_s, self._rows_of(chunks)
            renewed = self._find(number, path[-1])
            self._add(number, path, TIER_CODES[tier], deadline_s, ttl_s)
            self._drop(renewed)  # last, so that the chunks are never without a claim

    def release(self, owner: str, chunks: Sequence[str]) -> bool:
        """Forget a prompt's claim; False if there was none."""
        with self._lock:
            leaf = self._slots.get(_packed(chunks[-1]), _NONE) if chunks else _NONE
            return self._drop(self._find(_owner_number(owner), leaf))

    def wanted(self, chunks: Sequence[str], now_s: float) -> list[str | None]:
        """Return the hottest tier that a live claim asks for, for each chunk (None: no claim)."""
        with self._lock:
            self._advance(now_s)
            return [self._hottest(self._slots.get(_packed(chunk))) for chunk in chunks]

    def sweep(self, now_s: float, limit: int | None = None) -> list[Step]:
        """Take all claims that ended at or before `now_s` down the ladder; return what stepped.

        A claim that is several rungs late takes them in one step. Steps that
        other calls have found since the last sweep are handed out as well.
        """
        with self._lock:
            self._advance(now_s)
            limit = len(self._steps) if limit is None else limit
            steps, self._steps = self._steps[:limit], self._steps[limit:]
            return steps

    # ---- deadlines ---------------------------------------------------------------

    def _advance(self, now_s):
        """Move every claim that is due down its ladder, earliest deadline first."""
        if now_s < self._next_due_s:
            return
        due = np.flatnonzero(self._claims["deadline_s"] <= now_s)
        due = due[np.argsort(self._claims["deadline_s"][due], kind="stable")]
        self._steps += [self._step(int(row), now_s) for row in due]
        self._next_due_s = self._claims["deadline_s"].min(initial=np.inf)

    def _step(self, row, now_s):
        claim = self._claims[row]
        before = tier = int(claim["tier"])
        deadline_s = float(claim["deadline_s"])
        while deadline_s <= now_s and tier < len(TIERS):
            tier += 1
            deadline_s += claim["ttl_s"] * self._factors[tier] if tier < len(TIERS) else 0.0
        path = self._path(row)
        chunks = tuple(_unpacked(self._keys[slot]) for slot in path)
        owner, to, ttl_s = f"{int(claim['owner']):016x}", None, None
        if tier == len(TIERS):
            self._drop(row)
        else:
            to, ttl_s = TIERS[tier], float(claim["ttl_s"] * self._factors[tier])
            claim["tier"], claim["deadline_s"] = tier, deadline_s
            self._chunks["live"][path, before] -= 1
            self._chunks["live"][path, tier] += 1
        return Step(owner, chunks, TIERS[before], to, ttl_s)

    # ---- rows --------------------------------------------------------------------

    def _hottest(self, slot):
        if slot is None:
            return None
        live = self._chunks["live"][slot]
        return next((tier for tier, claims in zip(TIERS, live) if claims), None)

    def _path(self, row):
        """Return the rows of a claim's chunks, in prefix order."""
        parent, slot = self._chunks["parent"], int(self._claims[row]["leaf"])
        path = [slot]
        for _ in range(int(self._claims[row]["length"]) - 1):
            slot = int(parent[slot])
            path.append(slot)
        return path[::-1]

    def _rows_of(self, chunks):
        """Return the chunks' rows, new ones where a key was unknown."""
        path, parent = [], _NONE
        for key in [_packed(chunk) for chunk in chunks]:  # all, before any gets a row
            slot = self._slots.get(key)
            if slot is None:
                slot = self._new_chunk(key)
            if parent != _NONE:  # a claim may begin at an inner chunk: others need its parent
                self._chunks["parent"][slot] = parent
            path.append(slot)
            parent = slot
        return path

    def _new_chunk(self, key):
        if not self._free_chunks:
            self._chunks, self._free_chunks = _grown(self._chunks)
            self._keys += [None] * (len(self._chunks) - len(self._keys))
        slot = self._free_chunks.pop()
        self._slots[key], self._keys[slot] = slot, key
        self._chunks[slot] = (_NONE, 0)
        return slot

    def _find(self, number, leaf):
        """Return the row of a prompt's claim on a leaf, or none."""
        if leaf == _NONE:
            return _NONE
        row = int(self._buckets[number % len(self._buckets)])
        while row != _NONE:
            claim = self._claims[row]
            if int(claim["owner"]) == number and claim["leaf"] == leaf:
                break
            row = int(claim["next"])
        return row

    def _add(self, number, path, tier, deadline_s, ttl_s):
        if not self._free_claims:
            self._grow_claims()
        row, bucket = self._free_claims.pop(), number % len(self._buckets)
        first = self._buckets[bucket]
        self._claims[row] = (number, deadline_s, ttl_s, path[-1], len(path), first, tier)
        self._buckets[bucket] = row
        self._chunks["live"][path, tier] += 1
        self._live += 1
        self._next_due_s = min(self._next_due_s, deadline_s)

    def _grow_claims(self):
        used = len(self._claims)  # all of its rows
        self._claims, self._free_claims = _grown(self._claims)
        self._claims["deadline_s"][self._free_claims] = np.inf  # never due
        buckets = (self._claims["owner"][:used] % len(self._claims)).astype(np.int64)
        rows = np.argsort(buckets)
        buckets, following = buckets[rows], np.roll(rows, -1)
        following[np.diff(buckets, append=_NONE) != 0] = _NONE  # the last one of its bucket
        self._claims["next"][rows] = following
        first = np.diff(buckets, prepend=_NONE) != 0
        self._buckets = np.full(len(self._claims), _NONE, np.int32)
        self._buckets[buckets[first]] = rows[first]

    def _drop(self, row):
        """Remove a claim, and the chunks that nobody claims any more."""
        if row == _NONE:
            return False
        path, claim = self._path(row), self._claims[row]
        self._unlink(row)
        live = self._chunks["live"]
        live[path, claim["tier"]] -= 1
        for slot in path:
            if not live[slot].any():
                del self._slots[self._keys[slot]]
                self._keys[slot] = None
                self._free_chunks.append(slot)
        claim["deadline_s"] = np.inf
        self._free_claims.append(row)
        self._live -= 1
        if not self._live:
            self._next_due_s = np.inf
        return True

    def _unlink(self, row):
        following = self._claims["next"][row]
        bucket = int(self._claims["owner"][row]) % len(self._buckets)
        before = int(self._buckets[bucket])
        if before == row:
            self._buckets[bucket] = following
            return
        while int(self._claims["next"][before]) != row:
            before = int(self._claims["next"][before])
        self._claims["next"][before] = following


def _grown(rows):
    """Return the table with half as many rows again, and the new rows' numbers."""
    size = max(_FIRST_ROWS, len(rows) + len(rows) // 2)
    table = np.zeros(size, rows.dtype)
    table[: len(rows)] = rows
    return table, list(range(size - 1, len(rows) - 1, -1))


def _owner_number(owner):
    if not (isinstance(owner, str) and _DIGEST.fullmatch(owner)):
        raise ValueError(f"owner must be a digest of at most 16 hex digits, got {owner!r}")
    return int(owner, 16)


def _packed(key):
    """Return a chunk key as it is kept: LMCache's 64 hex digits need 80 bytes, not 113."""
    if len(key) == 64:
        try:
            packed = bytes.fromhex(key)
        except ValueError:
            return key
        return packed if packed.hex() == key else key
    return key


def _unpacked(key):
    return key.hex() if isinstance(key, bytes) else key
