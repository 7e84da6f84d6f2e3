"""The compiled core of the capacity engine: segments in three tiers, request by request.

A segment's resident blocks are one stretch of it: first those in gpu, then disk,
then remote. Requests take from its front and evictions from its back, so four
numbers say where all its blocks are: gpu holds [lo, g), disk [g, d), remote [d, m).
"""

from typing import NamedTuple

import numpy as np

from kvttl.replay.block_kernel import add_time, compiled, hold, inlined, next_tier
from kvttl.replay.runs import SegmentArrays


class State(NamedTuple):
    """Everything that changes during a replay; arrays by segment, by tier, or heaps."""

    marks: np.ndarray  # (segments, 4) int32: lo, g, d, m
    heap: np.ndarray  # (4, n) int32: places (see mirror); eviction by tier, then deadlines
    heap_key: np.ndarray  # (4, n) float64
    ends: np.ndarray  # (4, 3) int64: where each heap begins and ends; whether it is sorted
    held: np.ndarray  # (2, 3) int64: blocks, tokens in each tier
    area: np.ndarray  # (2, 3) float64: the same x seconds
    moved: np.ndarray  # (4, 4) int64 tokens
    clock_s: np.ndarray  # (1,) float64
    counts: np.ndarray  # (2, 4) int64: a piece's blocks, a segment's tokens; by source


class Work(NamedTuple):
    """What the kernel reads; see SegmentArrays and Plan."""

    segments: SegmentArrays
    key: np.ndarray  # (segments,) float64
    tier: np.ndarray  # (segments,) int8
    until_s: np.ndarray  # (segments, 3) float64, not falling; or (0, 3): nothing expires
    capacity: np.ndarray  # (3,) int64, -1 = unlimited
    block_tokens: int


def new_state(segments: int) -> State:
    """Return the state of three empty tiers."""
    heap_key, ends = np.empty((4, segments + 1)), np.array([[0, 0, 1]] * 4, np.int64)
    heaps = (np.empty(heap_key.shape, np.int32), heap_key, ends)
    sums = (np.zeros((2, 3), np.int64), np.zeros((2, 3)), np.zeros((4, 4), np.int64))
    marks, counts = np.zeros((segments, 4), np.int32), np.zeros((2, 4), np.int64)
    return State(marks, *heaps, *sums, np.zeros(1), counts)


@inlined
def _before(key, place, other_key, other):
    return key < other_key or (key == other_key and place < other)


@inlined
def _push(s, heap, key, place):
    keys, places, ends = s.heap_key[heap], s.heap[heap], s.ends[heap]
    if ends[0] == ends[1]:
        ends[0], ends[1], ends[2] = 0, 0, 1
    at = ends[1]
    if ends[2] == 1:
        if at == 0 or not _before(key, place, keys[at - 1], places[at - 1]):
            ends[1] = at + 1
            keys[at], places[at] = key, place
            return
        at = _compact(keys, places, ends)
    ends[1] = at + 1
    while at > 0:
        up = (at - 1) >> 1
        if not _before(key, place, keys[up], places[up]):
            break
        keys[at], places[at] = keys[up], places[up]
        at = up
    keys[at], places[at] = key, place


@compiled
def _compact(keys, places, ends):
    """Turn a sorted queue into a heap, which it already is but for its place."""
    size = ends[1] - ends[0]
    for at in range(size):
        keys[at], places[at] = keys[ends[0] + at], places[ends[0] + at]
    ends[0], ends[1], ends[2] = 0, size, 0
    return size


@inlined
def _pop(s, heap):
    """Drop the first entry: keys that came in order are a queue, others a binary heap."""
    keys, places, ends = s.heap_key[heap], s.heap[heap], s.ends[heap]
    if ends[2]:
        ends[0] += 1
        return
    ends[1] -= 1
    n = ends[1]
    key, place = keys[n], places[n]
    at = 0
    while True:
        down = 2 * at + 1
        if down >= n:
            break
        if down + 1 < n and _before(keys[down + 1], places[down + 1], keys[down], places[down]):
            down += 1
        if not _before(keys[down], places[down], key, place):
            break
        keys[at], places[at] = keys[down], places[down]
        at = down
    keys[at], places[at] = key, place


@inlined
def _tokens(segment, begin, end, r):
    """Tokens of a segment's blocks [begin, end)."""
    if end <= begin:
        return 0
    lacks = r.segments.short[segment] if end == r.segments.length[segment] else 0
    return (end - begin) * r.block_tokens - lacks


@compiled
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
    tokens = _tokens(segment, begin, end, r)
    hold(s.held, tier, -blocks, -tokens)
    s.moved[tier, below] += tokens
    if below < 3:
        if r.capacity[below] > 0 and s.marks[segment, below] == s.marks[segment, below + 1]:
            _push(s, below, r.key[segment], r.segments.mirror[segment])
        hold(s.held, below, blocks, tokens)
    for k in range(tier + 1, min(below, 3) + 1):  # no blocks are between the two tiers
        s.marks[segment, k] = begin


@inlined
def _evict(s, r, first):
    """Bring each tier from `first` down to its capacity, hottest tier first."""
    for tier in range(first, 3):
        while 0 < r.capacity[tier] < s.held[0, tier]:
            segment = r.segments.mirror[s.heap[tier, s.ends[tier, 0]]]
            there = s.marks[segment, tier + 1] - s.marks[segment, tier]
            over = s.held[0, tier] - r.capacity[tier]
            if over >= there:
                _pop(s, tier)
            if there > 0:
                _sink(s, r, segment, tier, min(over, there), next_tier(tier, r.capacity))


@compiled
def _expire(s, r, now_s):
    """Let every TTL that passed before `now_s` take effect, in order of time."""
    while s.ends[3, 0] < s.ends[3, 1] and s.heap_key[3, s.ends[3, 0]] < now_s:
        at_s, segment = s.heap_key[3, s.ends[3, 0]], r.segments.mirror[s.heap[3, s.ends[3, 0]]]
        _pop(s, 3)
        if s.marks[segment, 0] >= s.marks[segment, 3]:
            continue  # all taken or evicted
        _tick(s, at_s)
        below, next_s = 3, np.inf  # the next rung, and until when
        for tier in range(2, -1, -1):
            until_s = r.until_s[segment, tier]
            if until_s > at_s and r.capacity[tier] != 0 and tier > r.tier[segment]:
                below, next_s = tier, until_s
        for tier in range(2, -1, -1):
            there = s.marks[segment, tier + 1] - s.marks[segment, tier]
            if there > 0 and r.until_s[segment, tier] <= at_s:
                _sink(s, r, segment, tier, there, below)
        if s.marks[segment, 0] < s.marks[segment, 3]:
            _push(s, 3, next_s, r.segments.mirror[segment])
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
            tokens = _tokens(old, begin, stop, r)
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
    tokens = _tokens(segment, 0, length, r)
    hold(s.held, tier, length, tokens)
    known = 0
    for source in range(3):
        s.moved[source, tier] += s.counts[1, source] if source != tier else 0
        known += s.counts[1, source]
    s.moved[3, tier] += max(0, tokens - known)
    if r.capacity[tier] > 0:
        _push(s, tier, r.key[segment], r.segments.mirror[segment])
    if len(r.until_s):
        _push(s, 3, r.until_s[segment, tier], r.segments.mirror[segment])


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
