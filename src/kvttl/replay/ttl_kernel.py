"""The compiled core of the TTL engine: hits and memory-time without a capacity, in one pass."""

import numpy as np
from numba import njit


@njit(cache=True)
def ladder_deadlines(at_s, ttl_s, first, factors):
    """Return until when each segment may be in gpu, disk, remote: (segments, 3), seconds.

    In the tiers above the first they may not be at all. Factors of the TTL are by tier.
    """
    until_s = np.full((len(at_s), 3), -np.inf)
    for at in range(len(at_s)):
        end_s = at_s[at]
        for tier in range(first[at], 3):
            end_s += ttl_s[at] * factors[tier] if tier > first[at] else ttl_s[at]
            until_s[at, tier] = end_s
    return until_s


@njit(cache=True)
def _reside(blocks, tokens, begin_s, end_s, until_s, first, area, moved):
    """Count the stay of some blocks from their access to `end_s`; returns their tier then."""
    tier, since_s = first, begin_s
    while tier < 3:
        stay_s = min(until_s[tier], end_s) - since_s
        area[0, tier] += blocks * stay_s
        area[1, tier] += tokens * stay_s
        if end_s <= until_s[tier]:
            return tier
        below = tier + 1
        while below < 3 and until_s[below] <= until_s[tier]:
            below += 1
        moved[tier, below] += tokens
        tier, since_s = below, until_s[tier]
    return 3


@njit(cache=True)
def replay_ttl(s, arrival_s, until_s, first, block_tokens, hit_blocks, hit_tokens):
    """Fill hits by request and tier, (requests, 3); returns area (2, 3), moved (4, 4).

    `s` are `SegmentArrays`; `ladder_deadlines` and the first tier are by segment.
    """
    area, moved = np.zeros((2, 3)), np.zeros((4, 4), np.int64)
    end_s = arrival_s[-1] if len(arrival_s) else 0.0
    for r in range(len(s.offsets) - 1):
        whole, now_s = True, arrival_s[r]
        for at in range(s.offsets[r], s.offsets[r + 1]):
            target, stored, tier = first[at], 0, 3
            for piece in range(s.piece_offsets[at], s.piece_offsets[at + 1]):
                old, blocks, tier = s.piece_old[piece], s.piece_length[piece], 3
                tokens = blocks * block_tokens
                if old >= 0:
                    to_end = s.piece_start[piece] + blocks == s.length[old]
                    tokens -= s.short[old] if to_end else 0
                    since_s = arrival_s[s.request[old]]
                    ends_s = until_s[old]
                    tier = _reside(blocks, tokens, since_s, now_s, ends_s, first[old], area, moved)
                whole = whole and tier < 3
                if whole:
                    hit_blocks[r, tier] += blocks
                    hit_tokens[r, tier] += blocks * block_tokens
                if tier < 3:
                    stored += tokens
                    moved[tier, target] += tokens if tier != target else 0
            if whole and tier < 3:
                hit_tokens[r, tier] -= s.short[at]
            moved[3, target] += max(0, s.length[at] * block_tokens - s.short[at] - stored)
            left = s.rest[at] * block_tokens - min(s.rest[at], 1) * s.short[at]
            _reside(s.rest[at], left, now_s, end_s, until_s[at], target, area, moved)
    return area, moved
