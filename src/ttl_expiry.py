"""Claims: which prompts want which chunk in which tier, and until when.

A chunk of KV cache is shared by every prompt with the same prefix, so a
decision about one prompt is only a *claim* on its chunks. A chunk belongs in
the hottest tier that any live claim asks for.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from caching_heuristics import TIER_CODES, TIERS


@dataclass(frozen=True, slots=True)
class Claim:
    """One prompt's wish for its chunks.

    Parameters
    ----------
    chunks : tuple of str
        Chunk keys in prefix order.
    tier : str
        The tier that the prompt's decision chose.
    deadline_s : float
        When the claim ends, in the ledger's clock, seconds.
    """

    chunks: tuple[str, ...]
    tier: str
    deadline_s: float


class ClaimLedger:
    """Live claims by prompt, and the tier that each chunk is wanted in.

    Safe for concurrent use. Time is passed in, never read.

    Examples
    --------
    >>> ledger = ClaimLedger()
    >>> ledger.claim("A", ["system", "a"], "gpu", deadline_s=100)
    >>> ledger.claim("B", ["system", "b"], "remote", deadline_s=500)
    >>> ledger.wanted(["system", "b"], now_s=0)  # A keeps the shared chunk hot
    ['gpu', 'remote']
    >>> ledger.wanted(["system", "b"], now_s=100)  # until its claim has ended
    ['remote', 'remote']
    """

    def __init__(self) -> None:
        self._claims: dict[str, Claim] = {}
        self._owners: dict[str, set[str]] = {}  # chunk key -> prompts that claim it
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._claims)

    def claim(self, owner: str, chunks: Iterable[str], tier: str, deadline_s: float) -> None:
        """Record `owner`'s wish; it replaces the owner's previous one.

        Raises
        ------
        ValueError
            If `tier` is not one of ``TIERS``.
        """
        if tier not in TIER_CODES:
            raise ValueError(f"tier must be one of {', '.join(TIERS)}, got {tier!r}")
        with self._lock:
            self._drop(owner)
            claim = self._claims[owner] = Claim(tuple(chunks), tier, float(deadline_s))
            for chunk in claim.chunks:
                self._owners.setdefault(chunk, set()).add(owner)

    def release(self, owner: str) -> bool:
        """Forget `owner`'s claim; False if there was none."""
        with self._lock:
            return self._drop(owner) is not None

    def wanted(self, chunks: Sequence[str], now_s: float) -> list[str | None]:
        """Return the hottest tier that a live claim asks for, for each chunk (None: no claim)."""
        with self._lock:
            return [self._hottest(chunk, now_s) for chunk in chunks]

    def expire(self, now_s: float) -> dict[str, Claim]:
        """Remove and return all claims that ended at or before `now_s`, by owner."""
        with self._lock:
            ended = [o for o, claim in self._claims.items() if claim.deadline_s <= now_s]
            return {owner: self._drop(owner) for owner in ended}

    def _hottest(self, chunk, now_s):
        codes = [
            TIER_CODES[claim.tier]
            for owner in self._owners.get(chunk, ())
            if (claim := self._claims[owner]).deadline_s > now_s
        ]
        return TIERS[min(codes)] if codes else None

    def _drop(self, owner):
        claim = self._claims.pop(owner, None)
        for chunk in claim.chunks if claim else ():
            owners = self._owners.get(chunk, set())
            owners.discard(owner)
            if not owners:
                self._owners.pop(chunk, None)
        return claim
