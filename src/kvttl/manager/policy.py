"""What a policy of one's own must be for the live manager. Imports nothing of this package.

Policies that decide as they go are others: see `kvttl.policies`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

POLICY_NAMES = ("formula", "adaptive", "recency", "fixed")  # who decides: of `kvttl.policies`


class Policy(Protocol):
    """Decides for how long a prompt's KV cache is kept, and in which tier.

    `caching_heuristics.HeuristicConfig` is one; any object with these four will do. The
    manager asks after every generation, on the thread that decides (several at once if
    several threads generate), and hands over only what is known then: the metadata
    (``perplexity``, ``time_variance``, ``access_count``, ``seconds_since_access``; unknown
    ones are absent). A policy sees no text, no token ids, no clock and not what other
    prompts wish; it must neither block nor change the metadata. What it raises, and an
    answer that is not allowed, becomes the decision's record with its reason: the text is
    returned all the same, and the KV cache is claimed for `base_ttl` in gpu.
    """

    @property
    def base_ttl(self) -> float:
        """TTL of KV cache about which nothing could be decided, seconds, > 0."""

    @property
    def ladder(self) -> Mapping[str, float]:
        """Tier -> what the TTL is multiplied by when a claim comes down to it; all three, > 0."""

    def ttl(self, metadata: Mapping[str, float]) -> float:
        """Return the TTL in the wanted tier, from the access on: seconds, >= 0 and finite."""

    def tier(self, metadata: Mapping[str, float]) -> str:
        """Return the wanted tier: ``"gpu"``, ``"disk"`` or ``"remote"``."""
