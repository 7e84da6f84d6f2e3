"""The compiled core of the capacity engine: segments in three tiers, request by request.

A segment's resident blocks are one stretch of it: first those in gpu, then disk,
then remote. Requests take from its front and evictions from its back, so four
numbers say where all its blocks are: gpu holds [lo, g), disk [g, d), remote [d, m).
"""

from typing import NamedTuple

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

from kvttl.replay.block_kernel import add_time, compiled, hold, inlined, next_tier, size_of
from kvttl.replay.runs import SegmentArrays


class State(NamedTuple):
    """Everything that changes during a replay; arrays by segment, by tier, or sums."""

    marks: np.ndarray  # (segments, 4) int32: lo, g, d, m
    there: np.ndarray  # (3, words) uint64: bits of the segments that may be in a tier, by rank
    levels: np.ndarray  # where in `there` the bits begin, bits of words that have some, and so on
    passed: np.ndarray  # (1,) int64: deadlines that took effect
    held: np.ndarray  # (2, 3) int64: blocks, tokens in each tier
    area: np.ndarray  # (2, 3) float64: the same x seconds
    moved: np.ndarray  # (4, 4) int64 tokens
    clock_s: np.ndarray  # (1,) float64
    counts: np.ndarray  # (2, 4) int64: a piece's blocks, a segment's tokens; by source


class Work(NamedTuple):
    """What the kernel reads; see SegmentArrays and Plan."""

    segments: SegmentArrays
    rank: np.ndarray  # (segments,) uint32: place in the order of eviction
    by_rank: np.ndarray  # (segments,) uint32: its inverse
    tier: np.ndarray  # (segments,) int8
    until_s: np.ndarray  # (segments, 3) float64, not falling; or (0, 3): nothing expires
    due_s: np.ndarray  # (deadlines,) float64, ascending
    due: np.ndarray  # (deadlines,) uint32: whose they are
    capacity: np.ndarray  # (3,) int64, -1 = unlimited
    block_tokens: int


def new_state(segments: int) -> State:
    """Return the state of three empty tiers."""
    sizes = [max(1, -(-segments // 64))]
    while sizes[-1] > 1:
        sizes.append(-(-sizes[-1] // 64))
    there, levels = np.zeros((3, sum(sizes)), np.uint64), np.cumsum([0, *sizes[:-1]])
    sums = (np.zeros((2, 3), np.int64), np.zeros((2, 3)), np.zeros((4, 4), np.int64))
    marks, counts = np.zeros((segments, 4), np.int32), np.zeros((2, 4), np.int64)
    return State(marks, there, levels, np.zeros(1, np.int64), *sums, np.zeros(1), counts)


def work_of(segments, key, tier, until_s, capacity, block_tokens, end_s) -> Work:
    """Return what the kernel reads; `key` None: recency, `until_s` None: nothing expires."""
    order = mirror = segments.mirror.astype(np.uint32)  # what may be < 0 takes numba longer
    if key is not None:  # else by request, and of each the deepest first
        order = mirror[np.argsort(key[mirror], kind="stable")]
    rank = np.empty_like(order)
    rank[order] = np.arange(len(order))
    until_s = np.empty((0, 3)) if until_s is None else until_s
    due = _in_order(*_deadlines(mirror[: len(until_s)], until_s, capacity, end_s))
    return Work(segments, rank, order, tier, until_s, *due, capacity, block_tokens)


def _in_order(at_s, who):
    """Sort by time: roughly first, by radix, since floats nearly in order are sorted fast."""
    scale = 65535 / max(at_s.max(initial=0.0), 1e-9)
    order = np.argsort((at_s * scale).astype(np.uint16), kind="stable")
    order = order[np.argsort(at_s[order], kind="stable")]
    return at_s[order], who[order]


@njit(cache=True)
def _deadlines(mirror, until_s, capacity, end_s):
    """Return the times before `end_s` at which a segment must leave a tier, and the segments."""
    at_s, who, count = np.empty(until_s.size), np.empty(until_s.size, np.uint32), 0
    for segment in mirror:
        before_s = -np.inf
        for tier in range(3):
            if capacity[tier] != 0 and before_s < until_s[segment, tier] < end_s:
                before_s = at_s[count] = until_s[segment, tier]
                who[count] = segment
                count += 1
    return at_s[:count], who[:count]


@intrinsic
def _lowest_bit(typing, word):
    """The place of the lowest bit that is set; numba has none."""

    def generate(context, builder, signature, values):
        return builder.cttz(values[0], ir.Constant(ir.IntType(1), 1))

    return types.int64(types.uint64), generate


@compiled
def _mark(there, levels, rank, is_there):
    """Note that a segment may be in a tier, or that it is not."""
    for level in range(len(levels)):
        at, bit = levels[level] + (rank >> 6), np.uint64(1) << np.uint64(rank & 63)
        before = there[at]
        there[at] = before | bit if is_there else before & ~bit
        if (before if is_there else there[at]) != 0:
            return
        rank >>= 6


@compiled
def _lowest(there, levels):
    """The rank of what goes first, of a tier that holds some."""
    rank = np.uint64(0)
    for level in range(len(levels) - 1, -1, -1):
        rank = rank << np.uint64(6) | np.uint64(_lowest_bit(there[np.uint64(levels[level]) + rank]))
    return rank


@inlined
def _tick(s, now_s):
    dt = now_s - s.clock_s[0]
    if dt > 0.0:
        add_time(s.area, s.held, dt)
        s.clock_s[0] = now_s


@inlined
def _sink(s, r, segment, tier, blocks, below):
    """Move the last blocks of a segment's share of a tier to a tier below; 3 drops them."""
    end = s.marks[segment, tier + 1]
    begin = end - blocks
    tokens = size_of(segment, begin, end, r)
    hold(s.held, tier, -blocks, -tokens)
    s.moved[tier, below] += tokens
    if below < 3:
        if r.capacity[below] > 0:
            _mark(s.there[below], s.levels, r.rank[segment], True)
        hold(s.held, below, blocks, tokens)
    for k in range(tier + 1, min(below, 3) + 1):  # no blocks are between the two tiers
        s.marks[segment, k] = begin


@inlined
def _evict(s, r, first):
    """Bring each tier from `first` down to its capacity, hottest tier first."""
    for tier in range(first, 3):
        below = next_tier(tier, r.capacity)
        while 0 < r.capacity[tier] < s.held[0, tier]:
            rank = _lowest(s.there[tier], s.levels)
            segment = r.by_rank[rank]
            there = s.marks[segment, tier + 1] - s.marks[segment, tier]
            over = s.held[0, tier] - r.capacity[tier]
            if over >= there:
                _mark(s.there[tier], s.levels, rank, False)
            if there > 0:
                _sink(s, r, segment, tier, min(over, there), below)


@compiled
def _expire(s, r, now_s):
    """Let every TTL that passed before `now_s` take effect, in order of time."""
    while s.passed[0] < len(r.due) and r.due_s[s.passed[0]] < now_s:
        at_s, segment = r.due_s[s.passed[0]], r.due[s.passed[0]]
        s.passed[0] += 1
        if s.marks[segment, 0] >= s.marks[segment, 3]:
            continue  # all taken or evicted
        _tick(s, at_s)
        below = 3  # the next rung
        for tier in range(2, r.tier[segment], -1):
            if r.until_s[segment, tier] > at_s and r.capacity[tier] != 0:
                below = tier
        for tier in range(2, -1, -1):
            there = s.marks[segment, tier + 1] - s.marks[segment, tier]
            if there > 0 and r.until_s[segment, tier] <= at_s:
                _sink(s, r, segment, tier, there, below)
        _evict(s, r, 0)


@inlined
def _take(s, r, piece):
    """Take a piece's blocks out of the segment they were in; counts them by tier."""
    for tier in range(3):
        s.counts[0, tier] = 0
    s.counts[0, 3] = r.segments.piece_length[piece]
    old = r.segments.piece_old[piece]
    if old < 0:
        return
    begin, end = s.marks[old, 0], r.segments.piece_start[piece] + r.segments.piece_length[piece]
    for tier in range(3):
        stop = min(end, s.marks[old, tier + 1])
        if stop > begin:
            tokens = size_of(old, begin, stop, r)
            s.counts[0, tier] = stop - begin
            s.counts[0, 3] -= stop - begin
            s.counts[1, tier] += tokens
            hold(s.held, tier, begin - stop, -tokens)
            begin = stop
    for k in range(4):
        s.marks[old, k] = max(end, s.marks[old, k])


@inlined
def _put(s, r, segment):
    """Put a segment's blocks into its first tier."""
    length, tier = r.segments.length[segment], r.tier[segment]
    for k in range(4):
        s.marks[segment, k] = length if k > tier else 0
    tokens = size_of(segment, 0, length, r)
    hold(s.held, tier, length, tokens)
    known = 0
    for source in range(3):
        s.moved[source, tier] += s.counts[1, source] if source != tier else 0
        known += s.counts[1, source]
    s.moved[3, tier] += max(0, tokens - known)
    if r.capacity[tier] > 0:
        _mark(s.there[tier], s.levels, r.rank[segment], True)


@inlined
def _deepest(s):
    """The tier of the last block that the last piece found."""
    tier = 2
    while tier > 0 and s.counts[0, tier] == 0:
        tier -= 1
    return tier


@compiled
def replay_requests(s, r, arrival_s, first, last, hit_blocks, hit_tokens):
    """Replay requests [first, last); fills their rows of hits, (requests, 3)."""
    pieces = r.segments.piece_offsets
    for request in range(first, last):
        _expire(s, r, arrival_s[request])
        _tick(s, arrival_s[request])
        whole = True  # so far the prefix is resident
        for segment in range(r.segments.offsets[request], r.segments.offsets[request + 1]):
            if r.segments.length[segment] == 0:
                continue
            s.counts[1, 0] = s.counts[1, 1] = s.counts[1, 2] = 0
            for piece in range(pieces[segment], pieces[segment + 1]):
                _take(s, r, piece)
                for tier in range(3 if whole else 0):
                    hit_blocks[request, tier] += s.counts[0, tier]
                    hit_tokens[request, tier] += s.counts[0, tier] * r.block_tokens
                whole = whole and s.counts[0, 3] == 0
            if whole:
                hit_tokens[request, _deepest(s)] -= r.segments.short[segment]
            _put(s, r, segment)
        _evict(s, r, 0)
