"""The compiled core of the TTL engine: hits and memory-time without a capacity, in one pass."""

from __future__ import annotations

import numpy as np
from numba import njit


@njit(cache=True, inline="always")
def _until(at_s, ttl_s, first, tier, disk_factor, remote_factor):
    """Second until which blocks accessed at `at_s` may be in a tier."""
    until_s = at_s + ttl_s
    if first < 1 <= tier:
        until_s += ttl_s * disk_factor
    if first < 2 <= tier:
        until_s += ttl_s * remote_factor
    return until_s


@njit(cache=True)
def ladder_deadlines(at_s, ttl_s, first, disk_factor, remote_factor):
    """Return until when each segment may be in gpu, disk, remote: (segments, 3), seconds.

    In the tiers above the first they may not be at all.
    """
    out = np.empty((len(at_s), 3))
    for at in range(len(at_s)):
        for tier in range(3):
            if tier < first[at]:
                out[at, tier] = -np.inf
            else:
                out[at, tier] = _until(
                    at_s[at], ttl_s[at], first[at], tier, disk_factor, remote_factor
                )
    return out


@njit(cache=True)
def _reside(blocks, tokens, begin_s, end_s, ttl_s, first, factors, area, moved):
    """Count the stay of some blocks from their access to `end_s`; returns their tier then."""
    tier, since_s = first, begin_s
    while tier < 3:
        until_s = _until(begin_s, ttl_s, first, tier, factors[0], factors[1])
        stay_s = min(until_s, end_s) - since_s
        area[0, tier] += blocks * stay_s
        area[1, tier] += tokens * stay_s
        if end_s <= until_s:
            return tier
        below = tier + 1
        while below < 3 and (
            _until(begin_s, ttl_s, first, below, factors[0], factors[1]) <= until_s
        ):
            below += 1
        moved[tier, below] += tokens
        tier, since_s = below, until_s
    return 3


@njit(cache=True)
def replay_ttl(s, rest, arrival_s, ttl_s, first, factors, block_tokens, hit_blocks, hit_tokens):
    """Fill hits by request and tier, (requests, 3); returns area (2, 3), moved (4, 4).

    `s` are `SegmentArrays`; what no later request takes of each segment (blocks),
    TTL (seconds) and first tier are by segment.
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
                    tier = _reside(
                        blocks, tokens, since_s, now_s, ttl_s[old], first[old], factors, area, moved
                    )
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
            left = rest[at] * block_tokens - min(rest[at], 1) * s.short[at]
            _reside(rest[at], left, now_s, end_s, ttl_s[at], target, factors, area, moved)
    return area, moved
