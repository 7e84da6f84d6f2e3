"""Where a chunk can go, given the tiers that hold it: pure rules of LMCache's three tiers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from caching_heuristics import TIER_CODES, TIERS


def reachable(tiers: Sequence[str], wanted: str | None) -> str | None:
    """Return where a chunk can go that wants `wanted`: there, else the next colder copy.

    LMCache cannot write a missing L2 copy, so a chunk in gpu and remote that
    wants disk goes to remote; one that only remote holds stays there.

    Examples
    --------
    >>> reachable(("gpu", "remote"), "disk"), reachable(("gpu", "disk"), "remote")
    ('remote', 'gpu')
    """
    if wanted in (None, "gpu") or wanted in tiers:
        return wanted
    colder = [tier for tier in tiers if TIER_CODES[tier] > TIER_CODES[wanted]]
    return colder[0] if colder else tiers[0]


def by_hottest(held: Iterable[Sequence[str]]) -> Mapping[str, int]:
    """Count chunks by their hottest tier; ``none`` are not seen anywhere (yet).

    Examples
    --------
    >>> by_hottest([("gpu", "disk"), ("disk",), ()])
    {'gpu': 1, 'disk': 1, 'none': 1}
    """
    counts = Counter(tiers[0] if tiers else "none" for tiers in held)
    return {tier: counts[tier] for tier in (*TIERS, "none") if counts[tier]}


def is_above(tier: str, other: str) -> bool:
    """Say whether a tier is hotter than another."""
    return TIER_CODES[tier] < TIER_CODES[other]


def has_nothing_colder(tiers: Sequence[str], wanted: str | None) -> bool:
    """Say whether a chunk still waits for the copy that would let it go where it is wanted."""
    return wanted not in (None, "gpu") and bool(tiers) and is_above(tiers[-1], wanted)


def hits_by_tier(
    held: Sequence[Sequence[str]], cached_tokens: int, chunk_tokens: int
) -> dict[str, int]:
    """Split the engine's cached-token count by the hottest tier that each chunk was in.

    Examples
    --------
    >>> hits_by_tier([("gpu", "disk"), ("disk",), ()], 64, 32)
    {'gpu': 32, 'disk': 32}
    """
    hits: dict[str, int] = {}
    for number, tiers in enumerate(held):
        tokens = min(chunk_tokens, cached_tokens - number * chunk_tokens)
        if tokens > 0:
            tier = tiers[0] if tiers else "none"
            hits[tier] = hits.get(tier, 0) + tokens
    return hits
