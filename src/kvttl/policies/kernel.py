"""Whole replays, and questions about a prompt, compiled."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numba import njit

from kvttl.policies.eviction import room_in_all, sweep_due, value_of
from kvttl.policies.hazard import bin_of, seconds_above
from kvttl.policies.requests import begin, end
from kvttl.policies.runs import walk
from kvttl.policies.state import CLOCK, INDEX, REAL


class Requests(NamedTuple):
    """Requests to replay; see `kvttl.traces.trace.Trace`. An event is 2 x request, + 1: its end."""

    keys: np.ndarray  # (chunks,) int64
    offsets: np.ndarray  # (requests + 1,)
    arrival_s: np.ndarray
    end_s: np.ndarray
    prompt_tokens: np.ndarray
    finish: np.ndarray
    output_tokens: np.ndarray
    events: np.ndarray  # (2 x requests,) int64, in order


@njit(cache=True)
def play(s, x, r, w, first, last, rules, path, hits):
    """Replay events [first, last); `hits` is (requests, LEVELS).

    `rules` as in `sweep_due`; at 0 seconds after each request.
    """
    for at in range(first, last):
        k = w.events[at] >> 1
        if w.events[at] & 1:
            end(s, x, r, k, w.end_s[k], w.finish[k], w.output_tokens[k])
        else:
            now_s = w.arrival_s[k]
            if rules[0] > 0:
                sweep_due(s, x, r, rules, now_s)
            keys = w.keys[w.offsets[k] : w.offsets[k + 1]]
            begin(s, x, r, keys, now_s, w.prompt_tokens[k], path, hits[k])
        its_end_is_next = at + 1 < len(w.events) and w.events[at + 1] == 2 * k + 1
        if rules[0] == 0 and not its_end_is_next:
            room_in_all(s, x, r, rules, x.clock[CLOCK])


@njit(cache=True)
def ask(s, x, r, keys, now_s, prices, longest_s, answers):
    """Fill in what a prompt's chunks are worth, for how long, and the codes of wanted tiers.

    `answers`: (value, ttl_s, tier) of each chunk, (chunks,). `prices`: (tiers,) index a second.
    """
    path = np.empty(len(keys), np.int32)
    runs, known = walk(s, keys, path)
    value, ttl_s, tier = answers
    value[:], ttl_s[:], tier[:] = -np.inf, 0.0, len(prices)
    best, longest, hottest, stop = -np.inf, 0.0, len(prices), known
    for at in range(runs - 1, -1, -1):
        use = s.run[path[at]]
        worth, left_s, wanted = _judge(x, r, use, now_s, prices)
        best, longest = max(best, worth), max(longest, min(left_s, longest_s))
        hottest = min(hottest, wanted)
        for k in range(use.depth, stop):
            value[k], ttl_s[k], tier[k] = best, longest, hottest
        stop = use.depth


@njit(cache=True)
def _judge(x, r, use, now_s, prices):
    """Return a run's value, seconds to stay in the wanted tier, and that (len(prices) = none)."""
    age_s = max(now_s - use.since_s, 0.0)
    deeper = r.deeper * r.chunk_tokens
    own = value_of(x.hazard.mean, r.order, deeper, use, now_s, bin_of(age_s))
    if r.order != INDEX:
        return own, max(use.expires_s - now_s, 0.0), np.int64(use.tier)
    if x.duel[2] == 0:  # recency is in force: as long as it kept what went last
        idle_s, wanted = now_s - use.begin_s, len(prices)
        left_s = 0.0
        for level in range(len(prices) - 1, -1, -1):
            if idle_s < x.last_age[REAL + level]:
                wanted, left_s = level, x.last_age[REAL + level] - idle_s
        return np.float64(use.touch), left_s, wanted
    wanted, left_s = len(prices), 0.0
    for level in range(len(prices) - 1, -1, -1):
        if own > prices[level]:
            bar = prices[level] / (1.0 + deeper * use.depth)
            wanted, left_s = level, seconds_above(use.row, age_s, bar)
    return own, left_s, wanted
