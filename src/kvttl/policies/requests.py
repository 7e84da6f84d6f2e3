"""A request comes, its generation ends, time passes: what a policy takes note of, compiled."""

from __future__ import annotations

import numpy as np
from numba import njit

from kvttl.policies.hazard import (
    BINS,
    EDGES_S,
    LEAST,
    TERMS,
    average,
    bin_of,
    hide_end,
    learn,
    places,
)
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

_SURE = 2.0  # standard errors by which the index has to lead to come into force at first


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
        _use(s, x, r, path[at], number, now_s, prompt_tokens, think_log)
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
        if 2 * known * r.chunk_tokens >= last.prompt_tokens:
            kind = 1 if (known + 1) * r.chunk_tokens >= last.prompt_tokens else 2
            think_s = 0.0 if last.running else max(now_s - last.since_s, 0.0)
            think_log = np.log1p(think_s)
            if last.think_log >= 0:
                think_log = 0.6 * last.think_log + 0.4 * think_log
            mean_s = np.expm1(think_log)
    tokens = prompt_tokens - known * r.chunk_tokens
    of_request(x.codes, prompt_tokens, tokens, kind, think_s, mean_s)
    return think_log


@njit(cache=True)
def _outcome(s, x, r, run, now_s):
    """Learn from a run's next use: by age since its last, and since that generation's end."""
    use = s.run[run]
    if r.order != INDEX:
        return
    at = np.empty(TERMS, np.int64)
    places(use.codes, at)
    for which in range(use.running, 2):
        if which:
            hide_end(at)
        since_s = use.begin_s if which else use.since_s
        j, size, rate = bin_of(max(now_s - since_s, 0.0), 0), np.sqrt(use.length), r.learning.rate
        for i in range(j):
            if since_s + EDGES_S[i + 1] > x.hazard.steps[1]:  # else it was learned then
                learn(x.hazard, which, at, i, 0.0, size, rate)
        learn(x.hazard, which, at, j, 1.0, size, rate)


@njit(cache=True)
def _log_use(s, x, which, run, number, since_s):
    """Take note of a use, in order of time, to learn from what comes of it."""
    at, log = s.size[N_LOG + which], s.log
    s.size[N_LOG + which] += 1
    while at > x.hazard.bin_at[which, 0] and log[at - 1, which].since_s > since_s:
        log[at, which] = log[at - 1, which]
        at -= 1
    entry = log[at, which]
    entry.run, entry.touch, entry.since_s = run, number, since_s


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
def _use(s, x, r, run, number, now_s, prompt_tokens, think_log):
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
    use.touch, use.begin_s, use.since_s, use.expires_s = number, now_s, now_s, np.inf
    use.think_log, use.prompt_tokens, use.running, use.fresh = think_log, prompt_tokens, 1, 0
    after = max(prompt_tokens - (use.depth + use.length) * r.chunk_tokens, 0)
    of_run(x.codes, use.count, gap_s, after, use.branches)
    for k in range(SIGNALS):
        use.codes[k] = x.codes[k]
    append_use(s, run)
    if r.order == INDEX:
        _log_use(s, x, 1, run, number, now_s)


@njit(cache=True)
def _store(s, x, r, path, runs, level):
    """Put a prompt's runs into a cache, or what fits of them."""
    missing = 0
    for at in range(runs):
        missing += s.run[path[at]].length - s.run[path[at]].held[level]
    room = missing
    if r.fit and r.capacity[level] >= 0:
        room = min(missing, max(r.capacity[level] - s.counter[level], 0))
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
    x.duel[3] *= fade * fade
    if x.duel[2] == 1 and x.duel[0] < 0:
        x.duel[2] = 0
    elif x.duel[2] == 0 and x.duel[0] > max(r.lead * x.duel[1], _SURE * np.sqrt(x.duel[3])):
        x.duel[2], x.duel[4] = 1, 1
        x.duel[3] = 0
    more = (hits[INDEX_SHADOW] - hits[LRU_SHADOW]) * r.chunk_tokens
    x.duel[0] += more
    x.duel[1] += prompt_tokens
    x.duel[3] += more * more * (1 - x.duel[4])


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
        use.since_s, use.running, use.fresh = end_s, 0, 0
        if r.order == INDEX:
            of_end(use.codes, finish, output_tokens)
            _log_use(s, x, 0, run, number, end_s)
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
    at, runs, log = np.empty(TERMS, np.int64), s.run, s.log
    for which in range(2):
        uses = s.size[N_LOG + which]
        for j in range(BINS - 1):
            i = x.hazard.bin_at[which, j]
            while i < uses and log[i, which].since_s + EDGES_S[j + 1] <= until_s:
                run = log[i, which].run
                if run >= 0 and runs[run].touch == log[i, which].touch:
                    places(runs[run].codes, at)
                    if which:
                        hide_end(at)
                    size = np.sqrt(runs[run].length)
                    learn(x.hazard, which, at, j, 0.0, size, r.learning.rate)
                i += 1
            x.hazard.bin_at[which, j] = i
