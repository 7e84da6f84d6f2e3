"""TTLs that learn: KV cache stays as long as its hits are worth the memory's price."""

from __future__ import annotations

import numpy as np

from caching_heuristics import TIERS
from kvttl.policies.hazard import BINS, Learning, hazard_row
from kvttl.policies.online import Answer, OnlinePolicy
from kvttl.policies.runs import SIGNALS, walk
from kvttl.policies.state import INDEX, INDEX_SHADOW, REAL
from kvttl.policies.worth import load_shares, with_costs

ATTENTION_TOKENS = 30_500.0  # before a token for which attention costs as much as the rest: 8B


class Adaptive(OnlinePolicy):
    """What goes first has the lowest index: hits per chunk and second, learned from a cold start.

    The TTL is a price test, renewed whenever it is asked: the time until the index falls to the
    price at which the tier is full. Two shadows of metadata, least recently used and the index,
    say which order is in force; until the index leads it is recency.

    Parameters
    ----------
    capacity, chunk_tokens, remember, fit
        See `OnlinePolicy`.
    learning : Learning
        Rates and half lives.
    refresh_s : float
        How old a run's index may get before it is computed from newer weights, seconds.
    turnovers, lead : float
        Half life of the comparison of the shadows, in times that the cache was filled; the share
        of the tokens asked for by which the index must lead.
    price_memory : float
        Share of the capacity over which the price is averaged.
    deeper : float
        What each token before a chunk adds to the cost of computing it, as a share; 0: hits
        count alike, as by default without `costs`. With them 1 / 30,500: in an 8B model
        attention equals the rest after so many tokens.
    costs : TierCosts, optional
        With them chunks are worth the seconds that a hit saves, and tiers have prices for that.

    Examples
    --------
    >>> policy = Adaptive(capacity=1000, chunk_tokens=256)
    >>> number = policy.begin([11, 12, 13], now_s=0.0)
    >>> policy.end(number, 4.0, "tool_calls", output_tokens=60)
    >>> answer = policy.ask([11, 12, 13, 14], 5.0)
    >>> answer.ttl_s[:3].min() > 0, float(answer.ttl_s[3])
    (np.True_, 0.0)
    """

    ORDER = INDEX
    KEEPS_TAILS = False

    def __init__(
        self,
        capacity=None,
        chunk_tokens: int = 256,
        *,
        learning: Learning | None = None,
        refresh_s: float = 240.0,
        turnovers: float = 5.0,
        lead: float = 0.002,
        price_memory: float = 0.1,
        deeper: float | None = None,
        costs=None,
        **options,
    ):
        if deeper is None:
            deeper = 0.0 if costs is None else 1 / ATTENTION_TOKENS
        # Floats all: what is compiled for them would be compiled anew for an int, for minutes.
        given = refresh_s, turnovers, lead, price_memory, deeper
        self._given = Learning(*map(float, learning or ())), *map(float, given)
        self.costs = costs
        super().__init__(capacity, chunk_tokens, **options)
        if costs is not None:
            self.loads = load_shares(costs)

    def _settings(self):
        return self._given

    @property
    def index_in_force(self) -> bool:
        """Whether the learned order leads; else it is recency's."""
        return bool(self.now.duel[2])

    def ask_index(self, keys, now_s) -> Answer:
        """Answer as `ask` does where the learned order is in force, whether it is or not."""
        now = self.now
        self.now = now._replace(duel=np.ones_like(now.duel))
        try:
            return self.ask(keys, now_s)
        finally:
            self.now = now

    def signals(self, keys) -> np.ndarray:
        """Return the codes of a prompt's last known chunk, (SIGNALS,); all 0 if none is known."""
        keys = np.ascontiguousarray(keys, np.int64)
        path = np.empty(len(keys), np.int32)
        runs, _ = walk(self.runs, keys, path)
        return self.runs.run["codes"][path[runs - 1]].copy() if runs else np.zeros(SIGNALS, "u1")

    def hazards(self, codes) -> np.ndarray:
        """Return how likely a use is a second, as learned by now: (n, SIGNALS) -> (n, BINS).

        By age since the generation's end, in the bins of `kvttl.policies.hazard.EDGES_S`.
        """
        rows = np.empty((len(codes), BINS))
        for code, row in zip(codes, rows):
            hazard_row(self.now.hazard.mean[0], code, row)
        return rows

    def prices(self) -> np.ndarray:
        """Return the price of a place in each tier, (tiers,): index a second, falling.

        With `costs` it is of time saved: a chunk is worth what computing it takes more than
        loading it, and no tier is cheaper than its memory.
        """
        prices = self.now.price[REAL : REAL + len(TIERS)].copy()
        prices[0] = max(prices[0], self.now.price[INDEX_SHADOW])
        prices[self.levels :] = np.inf if self.levels > 1 else prices[0]
        return prices if self.costs is None else with_costs(prices, self.costs)
