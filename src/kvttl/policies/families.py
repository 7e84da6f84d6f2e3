"""Policies that learn nothing: recency, a fixed TTL, and the requirements' formula."""

from __future__ import annotations

import numpy as np

from caching_heuristics import METADATA_FIELDS, TIER_CODES, HeuristicConfig, check_metadata
from kvttl.policies.online import OnlinePolicy
from kvttl.policies.state import EXPIRY


class Recency(OnlinePolicy):
    """What was used least recently goes first, a prompt's end before its start."""


class Fixed(OnlinePolicy):
    """Everything stays for so long after its last use; what is over goes first, then by recency.

    Examples
    --------
    >>> policy = Fixed(ttl_s=60.0)
    >>> _ = policy.begin([1, 2], now_s=0.0)
    >>> policy.ask([1, 2], 10.0).ttl_s.tolist()
    [50.0, 50.0]
    """

    ORDER = EXPIRY

    def __init__(self, capacity=None, chunk_tokens: int = 256, *, ttl_s: float = 3600.0, **options):
        super().__init__(capacity, chunk_tokens, **options)
        self.ttl_s = ttl_s

    def decide(self, path, known, now_s, hints):
        self.runs.run["expires_s"][path] = now_s + self.ttl_s


class Formula(OnlinePolicy):
    """`compute_ttl` and `select_backend`, once a request, from its longest known prefix.

    What is over goes first, then by recency.

    Examples
    --------
    >>> policy = Formula()
    >>> _ = policy.begin([1, 2], now_s=0.0, hints={"perplexity": 15, "time_variance": 0.05})
    >>> policy.ask([1, 2], 0.0).ttl_s.round(1).tolist()
    [3693.6, 3693.6]
    """

    ORDER = EXPIRY

    def __init__(self, capacity=None, chunk_tokens: int = 256, *, config=None, **options):
        super().__init__(capacity, chunk_tokens, **options)
        self.config = config or HeuristicConfig()

    def decide(self, path, known, now_s, hints):
        metadata = self._measured(self.runs.run[path[known - 1]]) if known else {}
        metadata |= _usable(hints)
        self.runs.run["expires_s"][path] = now_s + self.config.ttl(metadata)
        self.runs.run["tier"][path] = TIER_CODES[self.config.tier(metadata)]

    def _measured(self, run):
        gaps, mean_s, variance = int(run["count"]) - 1, float(run["mean"]), 0.0
        if gaps >= 2 and mean_s > 0:
            spread = np.sqrt(max(0.0, float(run["squares"])) / gaps)
            variance = float(spread / (mean_s + spread))
        since_s = float(run["gap_s"])
        return {"access_count": gaps, "time_variance": variance, "seconds_since_access": since_s}


def _usable(hints):
    """Return the hints that are metadata; what is out of its range counts as unknown."""
    usable = {}
    for name in set(hints) & set(METADATA_FIELDS):
        try:
            usable |= check_metadata({name: hints[name]})
        except ValueError:
            continue
    return usable
