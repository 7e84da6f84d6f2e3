"""Claims: which prompts want which chunk in which tier, and until when.

A chunk of KV cache is shared by every prompt with the same prefix, so a
decision about one prompt is only a *claim* on its chunks. A chunk belongs in
the hottest tier that any live claim asks for. A claim whose TTL has passed
goes down the ladder gpu -> disk -> remote -> dropped; a `RenewedLedger` asks a policy first.
"""

from __future__ import annotations

import hashlib
import math
import re
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from sortedcontainers import SortedList

from caching_heuristics import TIER_CODES, TIERS, HeuristicConfig
from kvttl.lmcache.salts import salt_of
from kvttl.manager.tables import BoundedTable

_DIGEST = re.compile("[0-9a-fA-F]{1,16}")
_RENEWED = 128  # claims that a sweep asks about although their time is not up
_LET_GO = 100_000  # chunks without a claim that are still known
_LEAST_S = 1.0  # between two questions about a claim


class Step(NamedTuple):
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
    why : str
        What went wrong when a policy was asked; empty if nothing did.
    """

    owner: str
    chunks: tuple[str, ...]
    from_tier: str
    tier: str | None
    ttl_s: float | None
    why: str = ""


@dataclass(slots=True, eq=False)
class _Chunk:
    key: str
    parent: _Chunk | None = None  # the chunk before it, where a claim names one
    live: list[int] = field(default_factory=lambda: [0] * len(TIERS))  # claims, by tier
    filed: int = 0  # the file that knows it, + 1 if that knows its parent too


@dataclass(slots=True, eq=False)
class _Claim:
    key: tuple[str, str]  # owner and last chunk
    length: int  # chunks, counted from the last one up
    tier: int
    access_s: float  # when the access was that made it
    ttl_s: float
    deadline_s: float = -math.inf


class ClaimLedger:
    """Live claims, and the tier that each chunk is wanted in; safe for concurrent use.

    Chunk keys are prefix-chained: a key stands for everything before it too, so
    the chunks form a tree, and a claim is stored as its last chunk alone. Time
    is passed in, never read; equal calls give equal answers.

    Parameters
    ----------
    ladder : mapping, optional
        Tier -> what a claim's `ttl_s` is multiplied by when it comes down to it.

    Attributes
    ----------
    changed : dict or None
        Names (owner, last chunk) of claims that were made, moved or dropped since `rows` was
        asked for them; None: nobody writes them down.

    Notes
    -----
    650 bytes for a claim with a chunk of its own.

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

    AT_ONCE = math.inf  # claims that step in one call; the rest is wanted a little longer

    def __init__(self, ladder: Mapping[str, float] | None = None) -> None:
        self.set_ladder(ladder or HeuristicConfig().ladder)
        self._chunks: dict[str, _Chunk] = {}
        self._claims: dict[tuple[str, str], _Claim] = {}  # by owner and last chunk
        self._deadlines: SortedList[tuple[float, tuple[str, str]]] = SortedList()  # of all claims
        self._steps: list[Step] = []  # taken, not yet handed out by sweep
        self._let_go: BoundedTable = BoundedTable(_LET_GO, math.inf, lambda _known: 0)
        self.changed: dict[tuple[str, str], None] | None = None
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._claims)

    def set_ladder(self, ladder: Mapping[str, float]) -> None:
        """Set by what the TTLs of claims are multiplied that come down from now on."""
        self._factors = [float(ladder[tier]) for tier in TIERS]

    @property
    def next_due_s(self) -> float:
        """When the next claim ends, seconds; infinite if there is none, -infinite if steps wait."""
        with self._lock:
            if self._steps:
                return -math.inf
            return self._deadlines[0][0] if self._deadlines else math.inf

    def claim(
        self, owner: str, chunks: Sequence[str], tier: str, now_s: float, ttl_s: float
    ) -> None:
        """Record a prompt's wish; it replaces (renews) the prompt's one of an earlier access.

        A wish that comes late, after one of a later access, changes nothing.

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
        TypeError
            If a chunk key is no text.
        """
        if tier not in TIER_CODES:
            raise ValueError(f"tier must be one of {', '.join(TIERS)}, got {tier!r}")
        if not 0 <= now_s + ttl_s < math.inf:  # NaN would never be due
            raise ValueError(f"now_s + ttl_s must be >= 0 and finite, got {now_s!r} + {ttl_s!r}")
        owner = _digest(owner)
        if not all(isinstance(chunk, str) for chunk in chunks):
            raise TypeError(f"chunk keys must be text, got {chunks!r:.80}")
        with self._lock:
            self._advance(now_s)
            if chunks:
                self._claim(owner, chunks, TIER_CODES[tier], now_s, ttl_s)

    def wanted(self, chunks: Sequence[str], now_s: float) -> list[str | None]:
        """Return the hottest tier that a live claim asks for, for each chunk (None: no claim)."""
        with self._lock:
            self._advance(now_s)
            return [_hottest(self._chunks.get(chunk)) for chunk in chunks]

    def wanted_before(self, chunks: Sequence[str], now_s: float) -> list[str | None]:
        """Return as `wanted`, with "" for a chunk that was claimed, but is wanted no more."""
        wanted = self.wanted(chunks, now_s)
        with self._lock:
            return ["" if t is None and c in self._let_go else t for c, t in zip(chunks, wanted)]

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

    def _claim(self, owner, chunks, tier, access_s, ttl_s):
        earlier = self._claims.get((owner, chunks[-1]))
        if earlier is not None and earlier.access_s > access_s:
            return
        if earlier is not None and (earlier.length, earlier.tier) == (len(chunks), tier):
            earlier.access_s, earlier.ttl_s = access_s, ttl_s
            self._set_deadline(earlier, access_s + ttl_s)
            return
        self._put(owner, chunks, tier, access_s, ttl_s, access_s + ttl_s)

    def _put(self, owner, chunks, *wish):
        """Make a claim in place of the one of its name."""
        path, earlier = self._chained(chunks), self._claims.get((owner, chunks[-1]))
        for chunk in path:
            chunk.live[wish[0]] += 1
        if earlier is not None:  # only now, so that the chunks are never without a claim
            self._drop(earlier)
        key = earlier.key if earlier is not None else (owner, path[-1].key)
        claim = self._claims[key] = _Claim(key, len(path), *wish)
        self._set_deadline(claim, claim.deadline_s)

    def _set_deadline(self, claim, deadline_s):
        self._deadlines.discard((claim.deadline_s, claim.key))
        claim.deadline_s = deadline_s
        self._deadlines.add((deadline_s, claim.key))
        self._changes(claim)

    def _advance(self, now_s):
        """Move every claim that is due down its ladder, earliest deadline first."""
        stepped = 0
        while stepped < self.AT_ONCE and self._deadlines and self._deadlines[0][0] <= now_s:
            _, key = self._deadlines[0]
            self._note(self._step(self._claims[key], now_s))
            stepped += 1

    def _note(self, step):
        if step is not None:
            self._steps.append(step)

    def _step(self, claim, now_s):
        owner, before, tier = claim.key[0], claim.tier, claim.tier
        deadline_s, ttl_s = claim.deadline_s, None
        while deadline_s <= now_s and tier < len(TIERS):
            tier += 1
            ttl_s = claim.ttl_s * self._factors[tier] if tier < len(TIERS) else None
            deadline_s += ttl_s or 0.0
        path = self._path(claim)
        chunks = tuple(chunk.key for chunk in path)
        if ttl_s is None:
            self._drop(claim)
            return Step(owner, chunks, TIERS[before], None, None)
        for chunk in path:
            chunk.live[before] -= 1
            chunk.live[tier] += 1
        claim.tier = tier
        self._set_deadline(claim, deadline_s)
        return Step(owner, chunks, TIERS[before], TIERS[tier], ttl_s)

    # ---- chunks ------------------------------------------------------------------

    def _chained(self, keys):
        """Return the chunks of these keys, new ones where a key was unknown."""
        path, parent = [], None
        for key in keys:
            chunk = self._chunks.get(key)
            if chunk is None:
                chunk = self._chunks[key] = _Chunk(key)
            if parent is not None:  # a claim may begin at an inner chunk: others need its parent
                chunk.parent = parent
            path.append(chunk)
            parent = chunk
        return path

    def _path(self, claim):
        """Return a claim's chunks, in prefix order."""
        return self._path_to(self._chunks[claim.key[1]], claim.length)

    def _drop(self, claim):
        """Remove a claim, and the chunks that nobody claims any more."""
        self._changes(claim)
        for chunk in self._path(claim):
            chunk.live[claim.tier] -= 1
            if not any(chunk.live):
                del self._chunks[chunk.key]
                self._let_go.put(chunk.key, True)
                chunk.parent = None  # chunks that stay may name this one
        self._deadlines.discard((claim.deadline_s, claim.key))
        del self._claims[claim.key]

    # ---- to be written down -----------------------------------------------------------

    @property
    def names(self) -> list[tuple[str, str]]:
        """What `rows` may be asked for: owner and last chunk of each claim."""
        with self._lock:
            return list(self._claims)

    @property
    def size(self) -> int:
        """Claims and chunks."""
        return len(self._claims) + len(self._chunks)

    def rows(self, file: int, names: Iterable[tuple[str, str]] | None = None) -> list[list]:
        """Return claims as rows for a file, each of whose rows builds on those before it.

        Parameters
        ----------
        file : int
            Its number, even; a newer one has a higher number.
        names : iterable, optional
            Of the claims; None: those that have `changed`, which are then forgotten there.
        """
        with self._lock:
            if names is None:
                names, self.changed = self.changed or (), {}
                # A drop last: what is new may build on chunks that only the dropped one has filed.
                names = sorted(names, key=lambda name: name not in self._claims)
            return [self._row(name, file) for name in names]

    def restore(self, row: Sequence) -> None:
        """Do again what a row of `rows` says; of a claim whose first chunks are lost, the rest."""
        with self._lock:
            if len(row) > 2:
                owner, *wish, length, base = row[:7]
                path = self._path_to(self._chunks.get(base), length)
                self._put(owner, [*(chunk.key for chunk in path), *row[7:]], *wish)
            elif claim := self._claims.get(tuple(row)):
                self._drop(claim)

    def _changes(self, claim):
        if self.changed is not None:
            self.changed[claim.key] = None

    def _row(self, name, file):
        """Return owner, tier, times, length and key of what is in the file, the rest's keys."""
        claim = self._claims.get(name)
        if claim is None:
            return list(name)
        path, wish = self._path(claim), (claim.tier, claim.access_s, claim.ttl_s, claim.deadline_s)
        at = next((n for n, c in enumerate(path) if c.filed < file + (n > 0)), len(path))
        for number, chunk in enumerate(path[at:], at):
            chunk.filed = file + (number > 0)
        base = path[at - 1].key if at else ""
        return [name[0], *wish, at, base, *(chunk.key for chunk in path[at:])]

    def _path_to(self, chunk, length):
        path = []
        while chunk is not None and len(path) < length:
            path.append(chunk)
            chunk = chunk.parent
        return path[::-1]


class Part(NamedTuple):
    """The first chunks of a prompt: where they are wanted, and for how long."""

    chunks: int
    tier: str
    ttl_s: float


class RenewedLedger(ClaimLedger):
    """Claims of a policy that decides as it goes; it is asked again when one ends, or by turns.

    A claim is about a prompt's chunks up to one of them, and named by that: of each path one
    claim a tier. Those of a prompt's parts take the place of those that end within it. What the
    policy does not know, or fails to judge, comes down the ladder.

    Parameters
    ----------
    ladder : mapping, optional
        See `ClaimLedger`.
    ask : callable
        (chunk keys from a prompt's start, seconds) -> parts, of which the last has all chunks;
        None = unknown; and what went wrong.
    """

    AT_ONCE = 1_024

    def __init__(
        self,
        ladder: Mapping[str, float] | None,
        ask: Callable[[Sequence[str], float], tuple[Sequence[Part] | None, str]],
    ) -> None:
        super().__init__(ladder)
        self._ask, self._turn = ask, []

    def claim_parts(self, keys: Sequence[str], parts: Sequence[Part], now_s: float) -> None:
        """Claim the parts of a prompt, in place of what was claimed within it before."""
        with self._lock:
            self._advance(now_s)
            self._claim_ends(keys, parts, now_s)
            ends = {part.chunks for part in parts}
            for at, key in enumerate(keys, 1):
                within = self._claims.get((owner_of(key), key)) if at not in ends else None
                if within is not None and within.access_s <= now_s:
                    self._drop(within)

    def sweep(self, now_s: float, limit: int | None = None) -> list[Step]:
        """As `ClaimLedger.sweep`; asks about some claims again whose time is not up."""
        with self._lock:
            self._turn = self._turn or list(self._claims)
            turn = self._turn[-_RENEWED:]
            del self._turn[-_RENEWED:]
            for claim in filter(None, map(self._claims.get, turn)):
                own = claim.key[0] == owner_of(claim.key[1])  # else a request's hints have made it
                if own and claim.deadline_s > now_s >= claim.access_s + _LEAST_S:
                    self._note(self._renew(claim, now_s))
        return super().sweep(now_s, limit)

    def _claim_ends(self, keys, parts, now_s):
        for chunks, tier, ttl_s in parts:
            owner, ttl_s = owner_of(keys[chunks - 1]), ttl_s and max(ttl_s, _LEAST_S)
            self._claim(owner, keys[:chunks], TIER_CODES[tier], now_s, ttl_s)

    def _step(self, claim, now_s):
        return self._renew(claim, now_s, ended=True)

    def _renew(self, claim, now_s, ended=False):
        """Ask about a claim's chunks again; returns the step down, None where there is none."""
        keys = tuple(chunk.key for chunk in self._path(claim))
        parts, why = self._ask(keys, now_s)
        if parts is None:
            return super()._step(claim, now_s)._replace(why=why) if ended else None
        tier, ttl_s = parts[-1].tier, parts[-1].ttl_s
        before, last = claim.tier, (owner_of(keys[-1]), keys[-1])
        self._claim_ends(keys, parts if ttl_s else parts[:-1], now_s)
        if claim.key != last or not ttl_s:
            self._drop(claim)
        if ttl_s and TIER_CODES[tier] <= before:
            return None
        down = (tier, ttl_s) if ttl_s else (None, None)
        return Step(claim.key[0], keys, TIERS[before], *down)


def _hottest(chunk):
    if chunk is None:
        return None
    return next((tier for tier, claims in zip(TIERS, chunk.live) if claims), None)


def owner_of(key: str) -> str:
    """Return who claims a chunk where no prompt does: equal hashes of two salts are two owners."""
    return hashlib.sha256(key.encode()).hexdigest()[:16] if salt_of(key) else key[:16]


def _digest(owner):
    """Return an owner in one spelling: 16 digits in small letters."""
    if not (isinstance(owner, str) and _DIGEST.fullmatch(owner)):
        raise ValueError(f"owner must be a digest of at most 16 hex digits, got {owner!r}")
    return owner.lower().rjust(16, "0")
