"""The compiled core of LRU replays, piece by piece of the prompts, in three tiers.

Blocks are touched in the order of the prompt and a full tier evicts at once, as a
cache that knows no prefixes does. A hit in a lower tier brings the block to gpu.
So a tier's blocks were all used after those of the next one: the tiers are one
list in order of use, cut in three. And as `lru_curve` has it, all blocks of a
piece have as many others used since: when their turn comes, all are in one tier.
"""

from typing import NamedTuple

import numpy as np

from kvttl.replay.block_kernel import add_time, compiled, hold, inlined, next_tier
from kvttl.replay.runs import SegmentArrays
from kvttl.replay.tier_kernel import tokens_of


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
            hit_tokens[tier] += tokens_of(old, at, end, r)
            end = at


@inlined
def _take(s, r, old, begin, end):
    """Take blocks out of the tiers; returns that in which they are when their turn comes."""
    stop = end
    s.taken[old] = end
    for tier in range(3):
        at = _first(s, tier, old, begin, stop)
        hold(s.held, tier, at - stop, -tokens_of(old, at, stop, r))
        if at == begin:
            return tier
        if r.capacity[tier] != 0:  # before their turn these go down, as do all above them
            s.moved[tier, next_tier(tier, r.capacity)] += tokens_of(old, at, end, r)
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
            there = tokens_of(old, begin, stop, r)
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
            come = tokens_of(request, begin, end, r)
            s.moved[tier, 0] += come if tier > 0 else 0
            hold(s.held, 0, end - begin, come)
            if tier > 0:
                _overflow(s, r, request, end)
    return hits
