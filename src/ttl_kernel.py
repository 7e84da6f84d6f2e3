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
    """Return until when each run's blocks may be in gpu, disk, remote; shape (runs, 3), seconds.

    In the tiers above the first they may not be at all.
    """
    out = np.empty((len(at_s), 3))
    for run in range(len(at_s)):
        for tier in range(3):
            if tier < first[run]:
                out[run, tier] = -np.inf
            else:
                out[run, tier] = _until(
                    at_s[run], ttl_s[run], first[run], tier, disk_factor, remote_factor
                )
    return out


@njit(cache=True)
def _reside(run, blocks, tokens, begin_s, end_s, ttl_s, first, factors, area, moved):
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
def replay_ttl(
    columns, offsets, arrival_s, ttl_s, first, factors, block_tokens, hit_blocks, hit_tokens
):
    """Fill hits by request and tier, (requests, 3); returns area (2, 3), moved (4, 4).

    Columns are those of RunIndex: previous, start, length, short, rest.
    """
    previous, start, length, short, rest, request = columns
    area, moved = np.zeros((2, 3)), np.zeros((4, 4), np.int64)
    end_s = arrival_s[-1] if len(arrival_s) else 0.0
    for r in range(len(offsets) - 1):
        whole = True
        for run in range(offsets[r], offsets[r + 1]):
            tokens = length[run] * block_tokens - short[run]
            old, tier, known = previous[run], 3, 0
            if old >= 0:
                to_end = start[run] + length[run] == length[old]
                known = length[run] * block_tokens - (short[old] if to_end else 0)
                tier = _reside(
                    old,
                    length[run],
                    known,
                    arrival_s[request[old]],
                    arrival_s[r],
                    ttl_s[old],
                    first[old],
                    factors,
                    area,
                    moved,
                )
            whole = whole and tier < 3
            if whole:
                hit_blocks[r, tier] += length[run]
                hit_tokens[r, tier] += tokens
            if tier == 3:
                moved[3, first[run]] += tokens
            else:
                moved[3, first[run]] += max(0, tokens - known)
                if tier != first[run]:
                    moved[tier, first[run]] += known
            if rest[run] > 0:
                left = rest[run] * block_tokens - short[run]
                _reside(
                    run,
                    rest[run],
                    left,
                    arrival_s[r],
                    end_s,
                    ttl_s[run],
                    first[run],
                    factors,
                    area,
                    moved,
                )
    return area, moved
