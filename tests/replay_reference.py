"""Replays in plain Python, block by block and slow on purpose: what the engines must equal."""

from __future__ import annotations

import math
import statistics
from collections import OrderedDict, defaultdict
from functools import partial

import numpy as np

from caching_heuristics import TIERS, compute_ttl, select_backend

NEVER = 2**31  # as the next request


class Outcome:
    """Hits by request and tier, memory-time by tier, tokens moved."""

    def __init__(self, trace):
        self.trace = trace
        self.hit_blocks = [[0, 0, 0] for _ in range(trace.requests)]
        self.hit_tokens = [[0, 0, 0] for _ in range(trace.requests)]
        self.block_seconds, self.token_seconds = [0.0] * 3, [0.0] * 3
        self.moved = defaultdict(int)
        self.clock_s = 0.0
        self.level_hits = 0

    def pass_time(self, now_s, places, sizes):
        """Add the residence of blocks ({block: tier}) up to now."""
        for block, tier in places.items():
            self.block_seconds[tier] += now_s - self.clock_s
            self.token_seconds[tier] += (now_s - self.clock_s) * sizes[block]
        self.clock_s = now_s

    def count_prefix(self, r, places, sizes):
        for block in self.trace.request(r).tolist():
            if block not in places:
                break
            self.hit_blocks[r][places[block]] += 1
            self.hit_tokens[r][places[block]] += sizes[block]


def sizes_of(trace):
    """Tokens of each block, by the prompts that end in it."""
    sizes = [trace.block_tokens] * trace.unique_blocks
    for r in range(trace.requests):
        row = trace.request(r).tolist()
        if row:
            sizes[row[-1]] = int(trace.prompt_tokens[r]) - (len(row) - 1) * trace.block_tokens
    return sizes


def block_lists(trace, refresh, capacity):
    """LRU or FIFO lists, each tier's oldest block going down; capacities -1 = unlimited."""
    out, sizes = Outcome(trace), sizes_of(trace)
    lists = [OrderedDict() for _ in TIERS]
    for r in range(trace.requests):
        places = {block: tier for tier in range(3) for block in lists[tier]}
        out.pass_time(float(trace.arrival_s[r]), places, sizes)
        out.count_prefix(r, places, sizes)
        for block in trace.request(r).tolist():
            tier = next((t for t in range(3) if block in lists[t]), 3)
            out.level_hits += tier < 3
            if tier == 0 and not refresh:
                continue
            if tier < 3:
                del lists[tier][block]
            lists[0][block] = None
            out.moved[tier, 0] += sizes[block] if tier else 0
            for full in range(3):
                while 0 <= capacity[full] < len(lists[full]):
                    old, _ = lists[full].popitem(last=False)
                    below = next((t for t in range(full + 1, 3) if capacity[t]), 3)
                    out.moved[full, below] += sizes[old]
                    if below < 3:
                        lists[below][old] = None
    return out


class Tiers:
    """Three tiers of blocks, each with an eviction key and deadlines."""

    def __init__(self, trace, capacity):
        self.out, self.sizes, self.capacity = Outcome(trace), sizes_of(trace), capacity
        self.place, self.key, self.until = {}, {}, {}

    def sink(self, block, below):
        self.out.moved[self.place[block], below] += self.sizes[block]
        if below < 3:
            self.place[block] = below
        else:
            del self.place[block]

    def evict(self):
        for tier in range(3):
            here = [block for block, place in self.place.items() if place == tier]
            over = len(here) - self.capacity[tier] if self.capacity[tier] >= 0 else 0
            below = next((t for t in range(tier + 1, 3) if self.capacity[t]), 3)
            for block in sorted(here, key=self.key.get)[: max(0, over)]:
                self.sink(block, below)

    def expire(self, now_s):
        """Every deadline before now, in order of time; ties as the keys' second half."""
        while True:
            due = [
                (self.until[block][tier], self.key[block][1:], block)
                for block, tier in self.place.items()
                if self.until[block][tier] < now_s
            ]
            if not due:
                return
            at_s, _, block = min(due)
            self.out.pass_time(at_s, self.place, self.sizes)
            lower = range(self.place[block] + 1, 3)
            alive = (t for t in lower if self.capacity[t] and self.until[block][t] > at_s)
            self.sink(block, next(alive, 3))
            self.evict()

    def access(self, r, decide):
        """Replay one request; decide(depth, block) -> (key, ttl_s, first tier, ladder)."""
        now_s, row = float(self.out.trace.arrival_s[r]), self.out.trace.request(r).tolist()
        self.expire(now_s)
        self.out.pass_time(now_s, self.place, self.sizes)
        self.out.count_prefix(r, self.place, self.sizes)
        for depth, block in enumerate(row):
            key, ttl_s, tier, ladder = decide(depth, block)
            there = [t for t in range(3) if self.capacity[t]]
            tier = min(there, key=lambda t: (t < tier, abs(t - tier)))
            before = self.place.get(block, 3)
            self.out.moved[before, tier] += self.sizes[block] if before != tier else 0
            self.place[block] = tier
            self.key[block] = (key, r, -depth)
            self.until[block] = deadlines(now_s, ttl_s, tier, ladder)
        self.evict()


def deadlines(now_s, ttl_s, first, ladder):
    """Until when a block may be in each tier."""
    until, at_s = [-math.inf] * 3, now_s + ttl_s
    for tier in range(first, 3):
        at_s += ttl_s * ladder[tier] if tier > first else 0.0
        until[tier] = at_s
    return until


def next_requests(trace):
    """For each request and block: the request that accesses the block next."""
    coming, out = {}, [None] * trace.requests
    for r in reversed(range(trace.requests)):
        row = trace.request(r).tolist()
        out[r] = {block: coming.get(block, NEVER) for block in row}
        coming |= dict.fromkeys(row, r)
    return out


class History:
    """Access times of each block, and the metadata that follow from them."""

    def __init__(self):
        self.times = defaultdict(list)

    def metadata(self, block, now_s):
        times = self.times[block]
        if not times:
            return {"access_count": 0, "time_variance": 0.0, "seconds_since_access": 0.0}
        gaps = [b - a for a, b in zip(times, [*times[1:], now_s])]
        mean = statistics.fmean(gaps)
        cv = statistics.pstdev(gaps) / mean if len(gaps) > 1 and mean > 0 else 0.0
        return {
            "access_count": len(times),
            "time_variance": cv / (1 + cv),
            "seconds_since_access": now_s - times[-1],
        }


def policy_replay(trace, policy, capacity, config, per="request", perplexity=None):
    """Replay one of `kvttl.replay.policies.POLICIES` in three tiers."""
    capacity = (-1, -1, -1) if policy == "infinite" else capacity
    tiers, history, coming = Tiers(trace, capacity), History(), next_requests(trace)
    for r in range(trace.requests):
        now_s, row = float(trace.arrival_s[r]), trace.request(r).tolist()
        known = [block for block in row if history.times[block]]
        whole = history.metadata(known[-1] if known else -1, now_s)
        own = {block: history.metadata(block, now_s) for block in row}

        seen = {block: own[block] if per == "block" else whole for block in row}
        if perplexity is not None:
            seen = {block: {**values, "perplexity": perplexity} for block, values in seen.items()}
        tiers.access(r, partial(_decide, policy, config, r, now_s, seen, coming[r]))
        for block in row:
            history.times[block].append(now_s)
    return tiers.out


def _decide(policy, config, r, now_s, seen, coming, depth, block):
    """Return key, TTL, first tier and ladder of one block."""
    if policy == "ttl":
        return r, config.base_ttl, 0, (1.0, 0.0, 0.0)
    if policy == "heuristic":
        tier = TIERS.index(scalar_tier(seen[block], config))
        return r, scalar_ttl(seen[block], config), tier, tuple(config.ladder.values())
    key = r
    if policy == "heuristic_order":
        key = now_s + scalar_ttl(seen[block], config)
    elif policy == "optimal":
        never = coming[block] == NEVER
        key = (-coming[block], 0 if never else -depth)
    return key, math.inf, 0, (1.0, 0.0, 0.0)


def scalar_ttl(metadata, c):
    return compute_ttl(metadata, c.base_ttl, c.min_ttl, c.max_ttl, c.alpha, c.gamma)


def scalar_tier(metadata, c):
    limits = (c.hot_threshold, c.recent_seconds, c.cold_threshold, c.variance_threshold)
    return select_backend(metadata, *limits)


def live_hits(trace, policy, capacity):
    """Blocks that hit in one tier, by request, if a live caller asks any `CachePolicy`."""
    held, hits = set(), []
    for request in range(trace.requests):
        keys, now_s = trace.request(request).tolist(), float(trace.arrival_s[request])
        hits.append(next((at for at, key in enumerate(keys) if key not in held), len(keys)))
        number = policy.begin(keys, now_s, int(trace.prompt_tokens[request]))
        reason = (None, "tool_calls", "stop")[trace.finish[request]]
        end_s = now_s + float(trace.generation_s[request])
        policy.end(number, end_s, reason, int(trace.output_tokens[request]))
        held |= set(keys)
        held -= set(policy.make_room(max(0, len(held) - capacity), now_s).tolist())
    return hits


def assert_equal(result, expected, moves=True):
    """Request by request, tier by tier; memory-time up to rounding."""
    assert result.hit_blocks.tolist() == expected.hit_blocks
    assert result.hit_tokens.tolist() == expected.hit_tokens
    np.testing.assert_allclose(result.block_seconds, expected.block_seconds, rtol=1e-9, atol=1e-6)
    np.testing.assert_allclose(result.token_seconds, expected.token_seconds, rtol=1e-9, atol=1e-6)
    if moves:
        got = {(i, j): int(n) for (i, j), n in np.ndenumerate(result.moved_tokens) if n}
        assert got == {way: n for way, n in expected.moved.items() if n}
