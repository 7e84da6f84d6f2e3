"""What a prompt's chunks are worth now, for how long, and in which tier, compiled.

Asking changes nothing: what a policy answers later is the same whether or not it was asked.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from kvttl.policies.hazard import BINS, LEAST, index_at, index_row, seconds_above
from kvttl.policies.runs import walk
from kvttl.policies.state import INDEX, REAL


def load_shares(costs: Any) -> np.ndarray:
    """Return what loading a chunk takes, by tier, as a share of computing a prompt's first one.

    `costs` is a `kvttl.replay.costs.TierCosts`. Beyond 1, only chunks deep in a prompt are worth
    loading: they cost more to compute.
    """
    load_s = costs.bytes_per_token / np.array(costs.bytes_per_s)
    return load_s * costs.prefill_tokens_per_s


def with_costs(prices: np.ndarray, costs: Any) -> np.ndarray:
    """Return prices of hits as prices of time saved, and no less than what a tier's memory costs.

    (tiers,), in hits a second, each of which saves the time that a prompt's first chunk takes.
    """
    engine = costs.engine_price_per_hour / costs.prefill_tokens_per_s  # of a token, / 3600
    memory = np.array(costs.price_per_gib_hour) * costs.bytes_per_token / 2**30
    with np.errstate(divide="ignore", invalid="ignore"):
        rent = np.where(memory > 0, memory / engine, 0.0)
    return np.maximum(prices * np.maximum(1.0 - load_shares(costs), LEAST), rent)


@njit(cache=True)
def ask(s, x, r, keys, now_s, prices, loads, longest_s, answers):
    """Fill in what a prompt's chunks are worth, for how long, and the codes of wanted tiers.

    `answers`: (value, ttl_s, tier) of each chunk, (chunks,). `prices`, `loads`: (tiers,) index a
    second; what loading takes of what computing a first chunk takes.
    """
    path, row = np.empty(len(keys), np.int32), np.empty(BINS, np.float32)
    runs, known = walk(s, keys, path)
    value, ttl_s, tier = answers
    value[:], ttl_s[:], tier[:] = -np.inf, 0.0, len(prices)
    best, longest, hottest, stop = -np.inf, 0.0, len(prices), known
    for at in range(runs - 1, -1, -1):
        use = s.run[path[at]]
        worth, left_s, wanted = _judge(x, r, use, now_s, prices, loads, row)
        best, left_s = max(best, worth), min(left_s, longest_s)
        if wanted < hottest:
            hottest, longest = wanted, left_s
        elif wanted == hottest:
            longest = max(longest, left_s)
        for k in range(use.depth, stop):
            value[k], ttl_s[k], tier[k] = best, longest, hottest
        stop = use.depth


@njit(cache=True)
def _judge(x, r, use, now_s, prices, loads, row):
    """Return a run's value, seconds to stay in the wanted tier, and that (len(prices) = none)."""
    if r.order != INDEX:
        over = now_s > use.expires_s
        value = use.touch - (1e15 if over else 0.0)
        return value, max(use.expires_s - now_s, 0.0), np.int64(use.tier)
    cost = 1.0 + r.deeper * use.depth * r.chunk_tokens
    wanted, left_s = len(prices), 0.0
    if x.duel[2] == 0:  # recency is in force: as long as it kept what went last
        idle_s = now_s - use.begin_s
        for level in range(len(prices) - 1, -1, -1):
            if idle_s < x.last_age[REAL + level] and cost > loads[level]:
                wanted, left_s = level, x.last_age[REAL + level] - idle_s
        return np.float64(use.touch), left_s, wanted
    age_s = max(now_s - use.since_s, 0.0)
    if use.fresh:
        row[:] = use.row
    else:
        index_row(x.hazard.mean[use.running], use.codes, row)
    index = index_at(row, age_s)
    for level in range(len(prices) - 1, -1, -1):
        saved = cost - loads[level]
        if saved > 0 and index * saved > prices[level]:
            wanted, left_s = level, seconds_above(row, age_s, prices[level] / saved)
    return index * cost, left_s, wanted
