"""Whole replays, compiled."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numba import njit

from kvttl.policies.eviction import room_in_all, sweep_due
from kvttl.policies.requests import begin, end
from kvttl.policies.state import CLOCK


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
    ttl_s: np.ndarray  # (requests,): how long what they use may stay; infinite: undecided
    first: int  # number of the first one, as the policy counts


@njit(cache=True)
def play(s, x, r, w, first, last, rules, path, hits):
    """Replay events [first, last); `hits` is (requests, LEVELS).

    `rules` as in `sweep_due`; at 0 seconds after each request.
    """
    for at in range(first, last):
        k = w.events[at] >> 1
        if w.events[at] & 1:
            end(s, x, r, w.first + k, w.end_s[k], w.finish[k], w.output_tokens[k])
        else:
            now_s = w.arrival_s[k]
            if rules[0] > 0:
                sweep_due(s, x, r, rules, now_s)
            keys = w.keys[w.offsets[k] : w.offsets[k + 1]]
            runs, _ = begin(s, x, r, keys, now_s, w.prompt_tokens[k], path, hits[k])
            for run in path[:runs]:
                s.run[run].expires_s = now_s + w.ttl_s[k]
        its_end_is_next = at + 1 < len(w.events) and w.events[at + 1] == 2 * k + 1
        if rules[0] == 0 and not its_end_is_next:
            room_in_all(s, x, r, rules, x.clock[CLOCK])
