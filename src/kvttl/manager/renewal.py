"""Claims that are renewed: what a policy says of a prompt's parts, asked again as time passes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from caching_heuristics import TIER_CODES, TIERS
from kvttl.manager.claims import ClaimLedger, Step, owner_of
from kvttl.manager.draft import Part

_RENEWED = 128  # claims that a sweep asks about although their time is not up
_LEAST_S = 1.0  # between two questions about a claim


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
                if claim.deadline_s > now_s >= claim.access_s + _LEAST_S:
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
