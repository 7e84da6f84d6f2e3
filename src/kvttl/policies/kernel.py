"""The compiled core of the policies: a request comes, its generation ends, caches make room."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numba import njit

from kvttl.policies import signals
from kvttl.policies.hazard import (
    BINS,
    EDGES_S,
    LEAST,
    TERMS,
    Hazard,
    Learning,
    average,
    bin_of,
    index_at,
    index_row,
    learn,
    new_hazard,
    places,
    seconds_above,
)
from kvttl.policies.runs import (
    LEVELS,
    N_LIVE,
    N_LOG,
    N_ORDER,
    SEEN,
    SIGNALS,
    add,
    append_use,
    cut,
    tidy_order,
    walk,
)

RECENCY, INDEX, EXPIRY = 0, 1, 2  # what goes first: the oldest use, the lowest index, what expired
LRU_SHADOW, INDEX_SHADOW, REAL = 0, 1, 2  # levels; REAL and those after it are nested tiers
OPEN = 1 << 14  # generations that may run at once
FOLLOWED = -1  # as a capacity: what is stored is followed, nothing is evicted
ABSENT = -2  # as a capacity: there is no such level


class Rules(NamedTuple):
    """What does not change during a policy's life."""

    capacity: np.ndarray  # (LEVELS,) int64 chunks; FOLLOWED or ABSENT
    chunk_tokens: int
    order: int  # RECENCY, INDEX or EXPIRY
    learning: Learning
    refresh_s: float  # after it, rows are made anew
    turnovers: float  # half life of the duel, in times the cache was filled
    lead: float  # share of tokens by which the index must lead to come into force
    price_memory: float  # share of the capacity over which a price is averaged
    deeper: float  # of the cost to compute a chunk: what each token before it adds, a share
    fit: int  # 0: all is stored, and room made after; 1: what fits; 2: all of a prompt, or none


class Now(NamedTuple):
    """What changes, beside the runs."""

    hazard: Hazard
    open_run: np.ndarray  # (OPEN,) int32: last run of the generation, by its number; -1: ended
    open_touch: np.ndarray  # (OPEN,) int64
    price: np.ndarray  # (LEVELS,): index of what goes last, a second
    last_age: np.ndarray  # (LEVELS,): seconds since its use, of what went last by recency
    duel: np.ndarray  # (3,): lead and tokens, halved; 1 = the index is in force
    clock: np.ndarray  # (4,): now; next refresh; sweeps with victims since a step; next sweep
    head: np.ndarray  # (LEVELS,) int64: places in order below which a cache holds nothing
    area: np.ndarray  # (LEVELS,): chunks x seconds
    stored: np.ndarray  # (LEVELS,) int64: chunks that came in
    codes: np.ndarray  # (SIGNALS,) uint8, scratch


CLOCK, REFRESH, GONE, SWEEP = 0, 1, 2, 3


def new_now() -> Now:
    """Return what holds before the first request."""
    generations = np.full(OPEN, -1, np.int32), np.full(OPEN, -1, np.int64)
    prices = np.full(LEVELS, LEAST), np.full(LEVELS, np.inf)
    counts = np.zeros(3), np.zeros(4), np.zeros(LEVELS, np.int64), np.zeros(LEVELS)
    scratch = np.zeros(SIGNALS, np.uint8)
    return Now(new_hazard(), *generations, *prices, *counts, np.zeros(LEVELS, np.int64), scratch)


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
    signals.of_request(x.codes, prompt_tokens, tokens, kind, think_s, mean_s)
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
    use.think_log, use.prompt_chunks, use.open = think_log, prompt_chunks, 0
    after = max(prompt_tokens - (use.depth + use.length) * r.chunk_tokens, 0)
    signals.of_run(x.codes, use.count, gap_s, after, use.branches)
    for k in range(SIGNALS):
        use.codes[k] = x.codes[k]
    if r.order == INDEX:
        index_row(x.hazard.mean, use.codes, use.row)
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
    run, before = x.open_run[slot], np.int32(-1)
    x.open_run[slot] = -1
    while run >= 0 and s.run[run].touch == number:
        use = s.run[run]
        use.end_s, use.open = end_s, 1
        if r.order == INDEX:
            signals.of_end(use.codes, finish, output_tokens)
            same = before >= 0
            for k in range(SIGNALS if same else 0):
                same = same and s.run[before].codes[k] == use.codes[k]
            if same:
                use.row[:] = s.run[before].row
            else:
                index_row(x.hazard.mean, use.codes, use.row)
            at = s.size[N_LOG]
            s.log_run[at], s.log_touch[at], s.log_end_s[at] = run, number, end_s
            s.size[N_LOG] += 1
        run, before = use.parent, run


@njit(cache=True)
def advance(s, x, r, now_s):
    """Let time pass: learn from what was not used meanwhile, make rows anew."""
    x.clock[CLOCK] = max(x.clock[CLOCK], now_s)
    if r.order != INDEX:
        return
    now_s, every_s = x.clock[CLOCK], r.learning.every_s
    steps = np.floor((now_s - x.hazard.steps[1]) / every_s)
    if steps >= 1:
        x.hazard.steps[1] += steps * every_s
        _outlived(s, x, r, x.hazard.steps[1])
        average(x.hazard, steps, r.learning)
        if x.clock[GONE] == 0:  # nothing is short of room: prices fall
            for level in range(LEVELS):
                x.price[level] = max(x.price[level] * 0.5 ** (steps * every_s / 60), LEAST)
        x.clock[GONE] = 0
    if now_s >= x.clock[REFRESH]:
        x.clock[REFRESH] = (np.floor(now_s / r.refresh_s) + 1) * r.refresh_s
        for at in range(s.size[N_ORDER]):
            run = s.order[at]
            if s.run[run].place == at:
                index_row(x.hazard.mean, s.run[run].codes, s.run[run].row)


@njit(cache=True)
def _outlived(s, x, r, until_s):
    """Learn from all runs that outlived a bin since the last step."""
    at = np.empty(TERMS, np.int64)
    for j in range(BINS - 1):
        i = x.hazard.bin_at[j]
        while i < s.size[N_LOG] and s.log_end_s[i] + EDGES_S[j + 1] <= until_s:
            run = s.log_run[i]
            if run >= 0 and s.run[run].touch == s.log_touch[i] and s.run[run].open:
                places(s.run[run].codes, at)
                learn(x.hazard, at, j, 0.0, np.sqrt(s.run[run].length), r.learning.rate)
            i += 1
        x.hazard.bin_at[j] = i


@njit(cache=True)
def _drop_log(s, x):
    """Drop the log's entries of which every bin has been learned, once they are half of it."""
    done = x.hazard.bin_at[BINS - 2]
    if 2 * done < s.size[N_LOG]:
        return
    s.size[N_LOG] -= done
    for at in range(s.size[N_LOG]):
        s.log_run[at], s.log_touch[at] = s.log_run[at + done], s.log_touch[at + done]
        s.log_end_s[at] = s.log_end_s[at + done]
    for j in range(BINS):
        x.hazard.bin_at[j] -= done


@njit(cache=True, inline="always")
def value_of(r, use, now_s):
    """Return what a run is worth now, for the order in force."""
    if r.order == EXPIRY:
        return use.touch - (1e15 if now_s > use.expires_s else 0.0)
    value = index_at(use.row, max(now_s - use.end_s, 0.0))
    return value * (1.0 + r.deeper * use.depth * r.chunk_tokens)


@njit(cache=True)
def make_room(s, x, r, level, target, by_recency, now_s):
    """Evict from one level down to so many chunks."""
    need = s.counter[level] - target
    if need <= 0:
        return np.empty(0, np.int32), np.empty(0, np.int64)
    x.clock[GONE] += 1
    if by_recency:
        victims, size, weight = _oldest(s, x, level, need, now_s)
    else:
        victims, size, weight = _lowest(s, x, r, level, need, now_s)
    gone = np.empty(size, np.int64)
    for k in range(size):  # the first is the last to go: of it only the end
        gone[k] = s.run[victims[k]].held[level] - (weight - need if k == 0 else 0)
        _evict(s, x, victims[k], level, gone[k], now_s)
    return victims[:size], gone


@njit(cache=True)
def _oldest(s, x, level, need, now_s):
    """Find the runs of the oldest use that hold `need` chunks, as `_lowest` does."""
    victims, size, weight, at = np.empty(8, np.int32), 0, 0, x.head[level]
    while weight < need:
        run = s.order[at]
        if s.run[run].place == at and s.run[run].held[level] > 0:
            if size == len(victims):
                victims = _twice(victims)
            victims[size] = run
            size += 1
            weight += s.run[run].held[level]
        at += 1
    x.head[level] = at - 1
    x.last_age[level] = now_s - s.run[victims[size - 1]].begin_s
    victims[0], victims[size - 1] = victims[size - 1], victims[0]
    return victims, size, weight


@njit(cache=True)
def _evict(s, x, run, level, most, now_s):
    """Take chunks off a run's end in one level."""
    use = s.run[run]
    use.held[level] -= most
    s.counter[level] -= most
    x.area[level] += most * (min(now_s, use.expires_s) - use.begin_s)


@njit(cache=True)
def _lowest(s, x, r, level, need, now_s):
    """Find the runs of least value that hold `need` chunks; a run is worth no less than those after.

    Returns them as a heap, the highest first, how many they are, and their chunks.
    """
    heap, key, size, weight = np.empty(64, np.int32), np.empty(64), 0, 0
    for at in range(s.size[N_ORDER]):
        run = s.order[at]
        use = s.run[run]
        if use.place != at or use.held[level] == 0:
            continue
        value = max(value_of(r, use, now_s), use.best)
        use.best = -np.inf
        if use.parent >= 0 and s.run[use.parent].best < value:
            s.run[use.parent].best = value
        if weight >= need and value >= key[0]:
            continue
        if size == len(heap):
            heap, key = _twice(heap), _twice(key)
        _push(s, heap, key, size, run, value)
        size += 1
        weight += use.held[level]
        while weight - s.run[heap[0]].held[level] >= need:
            weight -= s.run[heap[0]].held[level]
            size -= 1
            _pop(s, heap, key, size)
    if r.order == INDEX and size:
        share = 1.0 - np.exp(-need / (r.price_memory * max(r.capacity[level], 1)))
        x.price[level] *= (max(key[0], LEAST) / x.price[level]) ** share
    return heap, size, weight


@njit(cache=True)
def _twice(array):
    more = np.empty(2 * len(array), array.dtype)
    more[: len(array)] = array
    return more


@njit(cache=True, inline="always")
def _above(s, heap, key, a, b):
    """Whether entry a goes after b: the higher value, of equal ones the later place."""
    return key[a] > key[b] or (key[a] == key[b] and s.run[heap[a]].place > s.run[heap[b]].place)


@njit(cache=True, inline="always")
def _swap(heap, key, a, b):
    heap[a], heap[b] = heap[b], heap[a]
    key[a], key[b] = key[b], key[a]


@njit(cache=True)
def _push(s, heap, key, size, run, value):
    heap[size], key[size] = run, value
    while size and _above(s, heap, key, size, (size - 1) >> 1):
        _swap(heap, key, size, (size - 1) >> 1)
        size = (size - 1) >> 1


@njit(cache=True)
def _pop(s, heap, key, size):
    """Take out the first entry; `size` is what is left."""
    heap[0], key[0] = heap[size], key[size]
    at = 0
    while True:
        down = 2 * at + 1
        if down >= size:
            return
        if down + 1 < size and _above(s, heap, key, down + 1, down):
            down += 1
        if not _above(s, heap, key, down, at):
            return
        _swap(heap, key, at, down)
        at = down


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


class Work(NamedTuple):
    """Requests to replay; see `kvttl.traces.trace.Trace`. Each event is 2 x request, + 1: its end."""

    keys: np.ndarray  # (chunks,) int64
    offsets: np.ndarray  # (requests + 1,)
    arrival_s: np.ndarray
    end_s: np.ndarray
    prompt_tokens: np.ndarray
    finish: np.ndarray
    output_tokens: np.ndarray
    events: np.ndarray  # (2 x requests,) int64, in order


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
            begin(
                s,
                x,
                r,
                w.keys[w.offsets[k] : w.offsets[k + 1]],
                now_s,
                w.prompt_tokens[k],
                path,
                hits[k],
            )
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
    if r.order != INDEX:
        return value_of(r, use, now_s), max(use.expires_s - now_s, 0.0), np.int64(use.tier)
    age_s = max(now_s - use.end_s, 0.0)
    if x.duel[2] == 0:  # recency is in force: as long as it kept what went last
        idle_s, wanted = now_s - use.begin_s, len(prices)
        left_s = 0.0
        for level in range(len(prices) - 1, -1, -1):
            if idle_s < x.last_age[REAL + level]:
                wanted, left_s = level, x.last_age[REAL + level] - idle_s
        return np.float64(use.touch), left_s, wanted
    cost = 1.0 + r.deeper * use.depth * r.chunk_tokens
    value, wanted, left_s = value_of(r, use, now_s), len(prices), 0.0
    for level in range(len(prices) - 1, -1, -1):
        if value > prices[level]:
            wanted, left_s = level, seconds_above(use.row, age_s, prices[level] / cost)
    return value, left_s, wanted
