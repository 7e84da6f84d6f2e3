"""A policy of your own: copy this file, change `decide`, and hand it to `check_policy`.

Only `decide` is needed. It runs once a request, on arrays: a request's runs, which are stretches
of chunks with one history, from the prompt's start to its end.
"""

from __future__ import annotations

import numpy as np

from kvttl.policies.online import OnlinePolicy
from kvttl.policies.state import EXPIRY


class Template(OnlinePolicy):
    """What was used twice stays for ten minutes, all else for one; the oldest in gpu go first.

    Examples
    --------
    >>> policy = Template(capacity=100)
    >>> _ = policy.begin([1, 2], now_s=0.0)
    >>> _ = policy.begin([1, 3], now_s=5.0)
    >>> policy.ask([1, 3], 5.0).ttl_s.tolist()
    [600.0, 60.0]
    """

    ORDER = EXPIRY  # what is over goes first; RECENCY: TTLs say nothing about what goes first

    def decide(self, path, known, now_s, hints):
        runs = self.runs.run
        ttl_s = np.where(runs["count"][path] >= 2, 600.0, 60.0)
        runs["expires_s"][path] = now_s + ttl_s
        runs["tier"][path] = 0  # an index into TIERS
