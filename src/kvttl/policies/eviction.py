"""Which runs go first, and room made by that order, compiled."""

from __future__ import annotations

from heapq import heappop, heappush

import numpy as np
from numba import njit

from kvttl.policies.hazard import BINS, LEAST, bin_of, index_in, index_row
from kvttl.policies.runs import LEVELS, N_LIVE, N_LOG, N_ORDER, tidy_order
from kvttl.policies.state import GONE, INDEX, LRU_SHADOW, REAL, RECENCY, SWEEP


@njit(cache=True)
def value_of(mean, order, deeper, use, now_s, j):
    """Return what a run, whose age is in bin j, is worth now; `deeper` is that of a chunk."""
    if order != INDEX:
        return use.touch - (1e15 if now_s > use.expires_s else 0.0)
    if not use.fresh:
        index_row(mean[use.running], use.codes, use.row)
        use.fresh = 1
    return index_in(use.row, j, max(now_s - use.since_s, 0.0)) * (1.0 + deeper * use.depth)


@njit(cache=True)
def make_room(s, x, r, level, target, by_recency, now_s):
    """Evict from one level down to so many chunks."""
    need = s.counter[level] - target
    if need <= 0:
        return np.empty(0, np.int32), np.empty(0, np.int64)
    x.clock[GONE] += 1
    if by_recency:
        victims, weight = _oldest(s, x, level, need, now_s)
    else:
        victims, weight = _lowest(s, x, r, level, need, now_s)
    gone = np.empty(len(victims), np.int64)
    for k in range(len(victims)):  # the first is the last to go: of it only the end
        gone[k] = s.run[victims[k]].held[level] - (weight - need if k == 0 else 0)
        _evict(s, x, victims[k], level, gone[k], now_s)
    return np.array(victims), gone


@njit(cache=True)
def _oldest(s, x, level, need, now_s):
    """Find the runs of the oldest use that hold `need` chunks, as `_lowest` does."""
    runs, order, weight, at = s.run, s.order, 0, x.head[level]
    victims = [order[0] for _ in range(0)]  # empty, of a known type
    while weight < need:
        run = order[at]
        if runs[run].place == at and runs[run].held[level] > 0:
            victims.append(run)
            weight += runs[run].held[level]
        at += 1
    x.head[level] = at - 1
    x.last_age[level] = now_s - runs[victims[-1]].begin_s
    victims[0], victims[-1] = victims[-1], victims[0]
    return victims, weight


@njit(cache=True)
def _evict(s, x, run, level, most, now_s):
    """Take chunks off a run's end in one level."""
    use = s.run[run]
    use.held[level] -= most
    s.counter[level] -= most
    x.area[level] += most * (min(now_s, use.expires_s) - use.begin_s)


@njit(cache=True)
def _lowest(s, x, r, level, need, now_s):
    """Find the runs of least value that hold `need` chunks, as a heap, the highest first.

    A run is worth no less than those after it. Returns also how many chunks they hold.
    """
    # Arrays have names of their own here: taking one out of a tuple counts its references.
    runs, order, mean = s.run, s.order, x.hazard.mean
    heap, weight, j = [(0.0, 0) for _ in range(0)], 0, 0  # of (- value, - place)
    highest = np.inf  # of what is enough
    for at in range(s.size[N_ORDER]):
        use = runs[order[at]]
        if use.place != at or use.held[level] == 0:
            continue
        j = bin_of(max(now_s - use.since_s, 0.0), j)
        value = max(value_of(mean, r.order, r.deeper * r.chunk_tokens, use, now_s, j), use.best)
        if use.best > -np.inf:
            use.best = -np.inf
        if use.parent >= 0 and runs[use.parent].best < value:
            runs[use.parent].best = value
        if value >= highest:
            continue
        heappush(heap, (-value, -at))
        weight += use.held[level]
        while weight - runs[order[-heap[0][1]]].held[level] >= need:
            weight -= runs[order[-heappop(heap)[1]]].held[level]
        highest = -heap[0][0] if weight >= need else np.inf
    if r.order == INDEX and len(heap):
        share = 1.0 - np.exp(-need / (r.price_memory * max(r.capacity[level], 1)))
        x.price[level] *= (max(-heap[0][0], LEAST) / x.price[level]) ** share
    return [order[-place] for _, place in heap], weight


@njit(cache=True)
def by_recency(x, r, level):
    """Whether a level evicts the oldest use now: the order in force."""
    if r.order != INDEX:
        return r.order == RECENCY
    return level == LRU_SHADOW or (level >= REAL and x.duel[2] == 0)


@njit(cache=True)
def room_in_all(s, x, r, rules, now_s):
    """Bring every level that is too full down; returns whether there was one. See `sweep_due`."""
    some = False
    for level in range(LEVELS):
        capacity, held = r.capacity[level], s.counter[level]
        if capacity < 0 or (rules[0] > 0 and held < rules[1] * capacity) or held == 0:
            continue
        target = held - max(1, np.int64(rules[2] * held)) if rules[0] > 0 else capacity
        some = some or target < held
        make_room(s, x, r, level, target, by_recency(x, r, level), now_s)
    tidy(s, x)
    return some


@njit(cache=True)
def room_in_shadows(s, x, r, now_s):
    """Bring the shadows down to their capacity."""
    for level in range(REAL):
        if r.capacity[level] >= 0:
            make_room(s, x, r, level, r.capacity[level], level == LRU_SHADOW, now_s)


@njit(cache=True)
def tidy(s, x):
    """Drop what the orders hold of the past, once it is half of them."""
    if s.size[N_ORDER] > 2 * s.size[N_LIVE] + 256:
        tidy_order(s)
        x.head[:] = 0
    _drop_log(s, x)


@njit(cache=True)
def _drop_log(s, x):
    """Drop the log's entries of which every bin has been learned, once they are half of it."""
    log = s.log
    for which in range(2):
        done, uses = x.hazard.bin_at[which, BINS - 2], s.size[N_LOG + which]
        if 2 * done >= uses:
            for at in range(done, uses):
                log[at - done, which] = log[at, which]
            s.size[N_LOG + which] -= done
            for j in range(BINS):
                x.hazard.bin_at[which, j] -= done


@njit(cache=True)
def sweep_due(s, x, r, rules, now_s):
    """Sweep, if it is time to.

    `rules`: (every so many seconds; from which share of the capacity on; share that goes). At 0
    seconds what is above the capacity goes now.
    """
    if rules[0] == 0:
        room_in_all(s, x, r, rules, now_s)
        return
    while x.clock[SWEEP] <= now_s:
        some = room_in_all(s, x, r, rules, x.clock[SWEEP])
        x.clock[SWEEP] += rules[0]
        if not some:  # nor will there be, until the next request
            x.clock[SWEEP] = (np.floor(now_s / rules[0]) + 1) * rules[0]
