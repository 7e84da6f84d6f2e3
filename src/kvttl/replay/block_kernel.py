"""The compiled cores of replays as if block by block: LRU and FIFO lists in three tiers.

Blocks are touched in the order of the prompt and a full tier evicts at once, as a
cache that knows no prefixes does. A hit in a lower tier brings the block to gpu.

LRU goes piece by piece of the prompts. A tier's blocks were all used after those of
the next one: the tiers are one list in order of use, cut in three. And as `lru_curve`
has it, all blocks of a piece have as many others used since: when their turn comes,
all are in one tier.
"""

from typing import NamedTuple

import numpy as np
from numba import njit

from kvttl.replay.runs import SegmentArrays

# Nothing here allocates: counting references would take most of the time. Several replays may run
# at the same time, a thread each: `policy_tuning` does so.
compiled = njit(cache=True, _nrt=False, nogil=True)
inlined = njit(cache=True, _nrt=False, inline="always")

# Columns of a block's row: 16 bytes, so that a block is one cache line, not four.
_NEWER, _OLDER, _TIER, _TOKENS = 0, 1, 2, 3
_NONE = 3  # as a tier


def block_rows(trace):
    """Return the rows of all blocks, in no tier, and of the ends of three empty lists.

    Shape (unique + 3, 4), int32. All blocks are complete but prompts' tails.
    """
    rows, some = np.empty((trace.unique_blocks + 3, 4), np.int32), trace.blocks > 0
    rows[:, _TIER], rows[:, _TOKENS] = _NONE, trace.block_tokens
    rows[trace.block_ids[trace.offsets[1:][some] - 1], _TOKENS] = trace.tail_tokens()[some]
    for end in range(trace.unique_blocks, len(rows)):
        rows[end, _NEWER] = rows[end, _OLDER] = end
    return rows


@compiled
def replay_blocks(ids, offsets, arrival_s, rows, capacity, held, first, last, out):
    """Replay requests [first, last); returns the block-level hits.

    Parameters
    ----------
    rows : array
        Of `block_rows`; kept from call to call, as `held` is.
    held : array
        Shape (2, 3): blocks and tokens in each tier.
    out : tuple of arrays
        hit_blocks, hit_tokens (requests, 3); area (2, 3); moved (4, 4) tokens.
    """
    hit_blocks, hit_tokens, area, moved = out
    hits = 0
    for r in range(first, last):
        if r > 0:
            add_time(area, held, arrival_s[r] - arrival_s[r - 1])
        for at in range(offsets[r], offsets[r + 1]):
            tier = rows[ids[at], _TIER]
            if tier == _NONE:
                break
            hit_blocks[r, tier] += 1
            hit_tokens[r, tier] += rows[ids[at], _TOKENS]
        for at in range(offsets[r], offsets[r + 1]):
            block = ids[at]
            tier = rows[block, _TIER]
            hits += tier < _NONE
            if tier == 0:
                continue
            if tier < _NONE:
                _leave(rows, block, tier, held)
            _enter(rows, block, tier, 0, held, moved)
            _overflow_blocks(rows, capacity, held, moved)
    return hits


@inlined
def add_time(area, held, dt):
    """Count `dt` seconds of what the tiers hold."""
    for tier in range(3):
        area[0, tier] += held[0, tier] * dt
        area[1, tier] += held[1, tier] * dt


@inlined
def hold(held, tier, blocks, tokens):
    """Count blocks that come into a tier, or leave it (< 0)."""
    held[0, tier] += blocks
    held[1, tier] += tokens


@inlined
def next_tier(tier, capacity):
    """The next tier below that exists; 3 = none."""
    tier += 1
    while tier < 3 and capacity[tier] == 0:
        tier += 1
    return tier


@inlined
def _leave(rows, block, tier, held):
    newer, older = rows[block, _NEWER], rows[block, _OLDER]
    rows[newer, _OLDER], rows[older, _NEWER] = older, newer
    hold(held, tier, -1, -rows[block, _TOKENS])


@inlined
def _enter(rows, block, source, tier, held, moved):
    end = len(rows) - 3 + tier  # of the tier's list, a row of its own in the ring
    newest = rows[end, _OLDER]
    rows[end, _OLDER], rows[block, _NEWER] = block, end
    rows[block, _OLDER], rows[newest, _NEWER] = newest, block
    rows[block, _TIER] = tier
    hold(held, tier, 1, rows[block, _TOKENS])
    moved[source, tier] += rows[block, _TOKENS]


@compiled
def _overflow_blocks(rows, capacity, held, moved):
    """Move the oldest blocks of full tiers down, or drop them."""
    for tier in range(3):
        if capacity[tier] < 0:
            return
        while held[0, tier] > capacity[tier]:
            block = rows[len(rows) - 3 + tier, _NEWER]
            _leave(rows, block, tier, held)
            below = next_tier(tier, capacity)
            if below < _NONE:
                _enter(rows, block, tier, below, held, moved)
            else:
                rows[block, _TIER] = _NONE
                moved[tier, _NONE] += rows[block, _TOKENS]


@inlined
def size_of(segment, begin, end, r):
    """Tokens of a segment's blocks [begin, end)."""
    if end <= begin:
        return 0
    lacks = r.segments.short[segment] if end == r.segments.length[segment] else 0
    return (end - begin) * r.block_tokens - lacks


class Lists(NamedTuple):
    """Everything that changes during a replay."""

    taken: np.ndarray  # (requests,) int32: blocks of each that later ones have used
    oldest: np.ndarray  # (3, 2) int64: request and place of each tier's oldest block, or before it
    held: np.ndarray  # (2, 3) int64: blocks, tokens in each tier
    area: np.ndarray  # (2, 3) float64: the same x seconds
    moved: np.ndarray  # (4, 4) int64 tokens


class Prompts(NamedTuple):
    """What the kernel reads."""

    segments: SegmentArrays  # by request
    capacity: np.ndarray  # (3,) int64, -1 = unlimited; gpu's is not 0
    block_tokens: int


def new_lists(requests: int) -> Lists:
    """Return the state of three empty tiers."""
    taken, oldest = np.zeros(requests, np.int32), np.zeros((3, 2), np.int64)
    sums = np.zeros((2, 3), np.int64), np.zeros((2, 3)), np.zeros((4, 4), np.int64)
    return Lists(taken, oldest, *sums)


@inlined
def _first(s, tier, request, begin, end):
    """Where what a tier and those above it hold of a request's blocks [begin, end) begins."""
    if request == s.oldest[tier, 0]:
        return min(max(begin, s.oldest[tier, 1]), end)
    return begin if request > s.oldest[tier, 0] else end


@compiled
def _count_hits(s, r, first, last, hit_blocks, hit_tokens):
    """Count the blocks of the pieces [first, last) that are there, to the first that is not."""
    for piece in range(first, last):
        old, begin = r.segments.piece_old[piece], r.segments.piece_start[piece]
        end = begin + r.segments.piece_length[piece]
        if old < 0 or _first(s, 2, old, begin, end) > begin:
            return
        for tier in range(3):
            at = _first(s, tier, old, begin, end)
            hit_blocks[tier] += end - at
            hit_tokens[tier] += size_of(old, at, end, r)
            end = at


@inlined
def _take(s, r, old, begin, end):
    """Take blocks out of the tiers; returns that in which they are when their turn comes."""
    stop = end
    s.taken[old] = end
    for tier in range(3):
        at = _first(s, tier, old, begin, stop)
        hold(s.held, tier, at - stop, -size_of(old, at, stop, r))
        if at == begin:
            return tier
        if r.capacity[tier] != 0:  # before their turn these go down, as do all above them
            s.moved[tier, next_tier(tier, r.capacity)] += size_of(old, at, end, r)
        stop = at
    return 3


@compiled
def _overflow(s, r, request, end):
    """Move the oldest blocks of full tiers down, or drop them; `request` has come to `end`."""
    for tier in range(3):
        if r.capacity[tier] == 0:
            s.oldest[tier, 0], s.oldest[tier, 1] = s.oldest[tier - 1, 0], s.oldest[tier - 1, 1]
        over, below = s.held[0, tier] - r.capacity[tier], next_tier(tier, r.capacity)
        while 0 < over and r.capacity[tier] > 0:
            old = s.oldest[tier, 0]
            begin = max(s.oldest[tier, 1], s.taken[old])
            stop = min(begin + over, r.segments.length[old] if old < request else end)
            there = size_of(old, begin, stop, r)
            hold(s.held, tier, begin - stop, -there)
            if below < 3:
                hold(s.held, below, stop - begin, there)
            s.moved[tier, below] += there
            over -= stop - begin
            s.oldest[tier, 0], s.oldest[tier, 1] = (old + 1, 0) if over > 0 else (old, stop)


@compiled
def replay_lru(s, r, arrival_s, first, last, hit_blocks, hit_tokens):
    """Replay requests [first, last); fills their rows of hits, returns the block-level hits."""
    hits = 0
    for request in range(first, last):
        if request > 0:
            add_time(s.area, s.held, arrival_s[request] - arrival_s[request - 1])
        begins, ends = r.segments.piece_offsets[request], r.segments.piece_offsets[request + 1]
        _count_hits(s, r, begins, ends, hit_blocks[request], hit_tokens[request])
        end = 0
        for piece in range(begins, ends):
            old, begin, tier = r.segments.piece_old[piece], end, 3
            end += r.segments.piece_length[piece]
            if old >= 0:
                tier = _take(s, r, old, begin, end)
            hits += end - begin if tier < 3 else 0
            come = size_of(request, begin, end, r)
            s.moved[tier, 0] += come if tier > 0 else 0
            hold(s.held, 0, end - begin, come)
            if tier > 0:
                _overflow(s, r, request, end)
    return hits
