"""A request comes, its generation ends, time passes: what a policy takes note of, compiled."""

from __future__ import annotations

import numpy as np
from numba import njit

from kvttl.policies.hazard import BINS, EDGES_S, LEAST, TERMS, average, bin_of, learn, places
from kvttl.policies.runs import LEVELS, N_LOG, N_ORDER, SEEN, SIGNALS, add, append_use, cut, walk
from kvttl.policies.signals import of_end, of_request, of_run
from kvttl.policies.state import (
    ABSENT,
    CLOCK,
    CURSOR,
    GONE,
    INDEX,
    INDEX_SHADOW,
    LRU_SHADOW,
    OPEN,
    REFRESH,
)


@njit(cache=True)
def begin(s, x, r, keys, now_s, prompt_tokens, path, hits):
    """A prompt comes: count its hits by level, and put it into all caches.

    Fills `path` with its runs, first to last, and returns how many they are.
    """
    advance(s, x, r, now_s)
    runs, known = walk(s, keys, path)
    if runs and known < s.run[path[runs - 1]].depth + s.run[path[runs - 1]].length:
        path[runs - 1] = cut(s, path[runs - 1], known - s.run[path[runs - 1]].depth)
    think_log = _session(s, x, r, path, runs, known, now_s, prompt_tokens)
    for at in range(runs):
        _outcome(s, x, r, path[at], now_s)
    _count_hits(s, r, path, runs, now_s, hits)
    known_runs = runs
    if known < len(keys):
        path[runs] = add(s, keys[known:], path[runs - 1] if runs else np.int32(-1))
        runs += 1
    number = s.counter[SEEN]
    s.counter[SEEN] += 1
    for at in range(runs - 1, -1, -1):
        _use(s, x, r, path[at], number, now_s, prompt_tokens, think_log, len(keys))
    for level in range(LEVELS):
        if r.capacity[level] != ABSENT:
            _store(s, x, r, path, runs, level)
    slot = number & (OPEN - 1)
    if x.open_run[slot] >= 0:  # its end was never told
        end(s, x, r, x.open_touch[slot], now_s, 0, 0)
    x.open_run[slot], x.open_touch[slot] = path[runs - 1] if runs else np.int32(-1), number
    _score(x, r, hits, len(keys), prompt_tokens)
    return runs, known_runs


@njit(cache=True)
def _session(s, x, r, path, runs, known, now_s, prompt_tokens):
    """Code what the prompt is to the one that last used its deepest known run."""
    kind, think_s, mean_s, think_log = 0, -1.0, -1.0, -1.0
    if runs:
        last = s.run[path[runs - 1]]
        if 2 * known >= last.prompt_chunks:
            kind = 1 if known >= last.prompt_chunks - 1 else 2
            think_s = max(now_s - last.end_s, 0.0)
            think_log = np.log1p(think_s)
            if last.think_log >= 0:
                think_log = 0.6 * last.think_log + 0.4 * think_log
            mean_s = np.expm1(think_log)
    tokens = prompt_tokens - known * r.chunk_tokens
    of_request(x.codes, prompt_tokens, tokens, kind, think_s, mean_s)
    return think_log


@njit(cache=True)
def _outcome(s, x, r, run, now_s):
    """Learn from a run's next use."""
    use = s.run[run]
    if r.order != INDEX or not use.open:
        return
    age_s = max(now_s - use.end_s, 0.0)
    at = np.empty(TERMS, np.int64)
    places(use.codes, at)
    j, size, rate = bin_of(age_s), np.sqrt(use.length), r.learning.rate
    for i in range(j):
        if use.end_s + EDGES_S[i + 1] > x.hazard.steps[1]:  # else it was learned then
            learn(x.hazard, at, i, 0.0, size, rate)
    learn(x.hazard, at, j, 1.0, size, rate)
    use.open = 0


@njit(cache=True)
def _count_hits(s, r, path, runs, now_s, hits):
    for level in range(LEVELS):
        hits[level] = 0
        for at in range(runs):
            run = s.run[path[at]]
            alive = run.held[level] if now_s <= run.expires_s else 0
            hits[level] += alive
            if alive < run.length:
                break


@njit(cache=True)
def _use(s, x, r, run, number, now_s, prompt_tokens, think_log, prompt_chunks):
    """Count a use of a run; its codes lack what the end tells."""
    use = s.run[run]
    gap_s = now_s - use.begin_s if use.count else -1.0
    use.gap_s = max(gap_s, 0.0)
    if use.count:  # Welford (1962)
        deviation = gap_s - use.mean
        use.mean += deviation / use.count
        use.squares += deviation * (gap_s - use.mean)
    for level in range(LEVELS):
        x.area[level] += use.held[level] * (min(now_s, use.expires_s) - use.begin_s)
        if now_s > use.expires_s:
            s.counter[level] -= use.held[level]
            use.held[level] = 0
    use.count += 1
    use.touch, use.begin_s, use.end_s, use.expires_s = number, now_s, np.inf, np.inf
    use.think_log, use.prompt_chunks, use.open, use.fresh = think_log, prompt_chunks, 0, 0
    after = max(prompt_tokens - (use.depth + use.length) * r.chunk_tokens, 0)
    of_run(x.codes, use.count, gap_s, after, use.branches)
    for k in range(SIGNALS):
        use.codes[k] = x.codes[k]
    append_use(s, run)


@njit(cache=True)
def _store(s, x, r, path, runs, level):
    """Put a prompt's runs into a cache, or what fits of them."""
    missing = 0
    for at in range(runs):
        missing += s.run[path[at]].length - s.run[path[at]].held[level]
    room = missing
    if r.fit and 0 <= r.capacity[level] < s.counter[level] + missing:
        room = max(r.capacity[level] - s.counter[level], 0) if r.fit == 1 else 0
    for at in range(runs):
        run = s.run[path[at]]
        stored = min(run.length - run.held[level], room)
        run.held[level] += stored
        s.counter[level] += stored
        x.stored[level] += stored
        room -= stored
        if run.held[level] < run.length:
            break


@njit(cache=True)
def _score(x, r, hits, chunks, prompt_tokens):
    """Let the shadows fight: by how many tokens the index leads, of how many asked for."""
    if r.order != INDEX:
        return
    fade = 0.5 ** ((chunks - hits[LRU_SHADOW]) / (r.turnovers * max(r.capacity[LRU_SHADOW], 1)))
    x.duel[0] *= fade
    x.duel[1] *= fade
    if x.duel[2] == 1 and x.duel[0] < 0:
        x.duel[2] = 0
    elif x.duel[2] == 0 and x.duel[1] > 0 and x.duel[0] > r.lead * x.duel[1]:
        x.duel[2] = 1
    x.duel[0] += (hits[INDEX_SHADOW] - hits[LRU_SHADOW]) * r.chunk_tokens
    x.duel[1] += prompt_tokens


@njit(cache=True)
def end(s, x, r, number, end_s, finish, output_tokens):
    """A generation ends: from then on its runs have an age. What has ended before is left."""
    slot = number & (OPEN - 1)
    if x.open_touch[slot] != number or x.open_run[slot] < 0:
        return
    run = x.open_run[slot]
    x.open_run[slot] = -1
    while run >= 0 and s.run[run].touch == number:
        use = s.run[run]
        use.end_s, use.open, use.fresh = end_s, 1, 0
        if r.order == INDEX:
            of_end(use.codes, finish, output_tokens)
            at = s.size[N_LOG]
            s.log_run[at], s.log_touch[at], s.log_end_s[at] = run, number, end_s
            s.size[N_LOG] += 1
        run = use.parent


@njit(cache=True)
def advance(s, x, r, now_s):
    """Let time pass: learn from what was not used meanwhile, make rows anew."""
    if now_s <= x.clock[CLOCK]:
        return
    x.clock[CLOCK] = now_s
    if r.order != INDEX:
        return
    every_s = r.learning.every_s
    steps = np.floor((now_s - x.hazard.steps[1]) / every_s)
    if steps >= 1:
        x.hazard.steps[1] += steps * every_s
        _outlived(s, x, r, x.hazard.steps[1])
        average(x.hazard, steps, r.learning)
        if x.clock[GONE] == 0:  # nothing is short of room: prices fall
            for level in range(LEVELS):
                x.price[level] = max(x.price[level] * 0.5 ** (steps * every_s / 60), LEAST)
        x.clock[GONE] = 0
    _refresh(s, x, r, now_s)


@njit(cache=True)
def _refresh(s, x, r, now_s):
    """Let some rows be made anew from newer weights: all of them once every `refresh_s`."""
    places = s.size[N_ORDER]
    due = places * min((now_s - x.clock[REFRESH]) / r.refresh_s, 1.0)
    if due < 1 and places:
        return
    x.clock[REFRESH] = now_s
    for _ in range(int(due)):
        x.clock[CURSOR] = (x.clock[CURSOR] + 1) % places
        s.run[s.order[int(x.clock[CURSOR])]].fresh = 0


@njit(cache=True)
def _outlived(s, x, r, until_s):
    """Learn from all runs that outlived a bin since the last step."""
    at, runs, log_run, log_touch = np.empty(TERMS, np.int64), s.run, s.log_run, s.log_touch
    log_end_s, size = s.log_end_s, s.size[N_LOG]
    for j in range(BINS - 1):
        i = x.hazard.bin_at[j]
        while i < size and log_end_s[i] + EDGES_S[j + 1] <= until_s:
            run = log_run[i]
            if run >= 0 and runs[run].touch == log_touch[i] and runs[run].open:
                places(runs[run].codes, at)
                learn(x.hazard, at, j, 0.0, np.sqrt(runs[run].length), r.learning.rate)
            i += 1
        x.hazard.bin_at[j] = i
