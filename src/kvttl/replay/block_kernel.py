"""The compiled core of replays that go block by block: FIFO lists in three tiers.

Blocks are touched in the order of the prompt and a full tier evicts at once, as a
cache that knows no prefixes does. A hit in a lower tier brings the block to gpu.
"""

import numpy as np
from numba import njit

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
            _overflow(rows, capacity, held, moved)
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
def _overflow(rows, capacity, held, moved):
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
