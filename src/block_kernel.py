"""The compiled core of replays that go block by block: LRU and FIFO lists in three tiers.

Blocks are touched in the order of the prompt and a full tier evicts at once, as a
cache that knows no prefixes does. A hit in a lower tier brings the block to gpu.
"""

from __future__ import annotations

import numpy as np
from numba import njit

# Nothing here allocates: counting references would take most of the time.
_compiled = njit(cache=True, _nrt=False)
_inlined = njit(cache=True, _nrt=False, inline="always")


@_inlined
def _unlink(newer, older, at):
    older[newer[at]] = older[at]
    newer[older[at]] = newer[at]


@_inlined
def _link(newer, older, at, end):
    """Put a block at a list's new end; `end` is the list's own place in the ring."""
    old = older[end]
    older[end], newer[at] = at, end
    older[at], newer[old] = old, at


@njit(cache=True)
def block_lists(unique):
    """Return rings of three empty lists over so many blocks: newer, older, tier (3 = none)."""
    newer, older = np.empty(unique + 3, np.int32), np.empty(unique + 3, np.int32)
    for end in range(unique, unique + 3):
        newer[end], older[end] = end, end
    return newer, older, np.full(unique, 3, np.int8)


@_compiled
def replay_blocks(ids, offsets, arrival_s, sizes, lists, capacity, refresh, held, first, last, out):
    """Replay requests [first, last); returns the block-level hits.

    Parameters
    ----------
    sizes : array
        Tokens of each block.
    refresh : bool
        Whether a hit makes a block the newest (LRU) or not (FIFO).
    held : array
        Shape (2, 3): blocks and tokens in each tier; kept from call to call.
    out : tuple of arrays
        hit_blocks, hit_tokens (requests, 3); area (2, 3); moved (4, 4) tokens.
    """
    newer, older, tiers = lists
    hit_blocks, hit_tokens, area, moved = out
    unique, hits = len(tiers), 0
    for r in range(first, last):
        if r > 0:
            dt = arrival_s[r] - arrival_s[r - 1]
            for tier in range(3):
                area[0, tier] += held[0, tier] * dt
                area[1, tier] += held[1, tier] * dt
        for at in range(offsets[r], offsets[r + 1]):
            tier = tiers[ids[at]]
            if tier == 3:
                break
            hit_blocks[r, tier] += 1
            hit_tokens[r, tier] += sizes[ids[at]]
        for at in range(offsets[r], offsets[r + 1]):
            block = ids[at]
            tier = tiers[block]
            hits += tier < 3
            if tier == 0:
                if refresh:
                    _unlink(newer, older, block)
                    _link(newer, older, block, unique)
                continue
            if tier < 3:
                _unlink(newer, older, block)
                held[0, tier] -= 1
                held[1, tier] -= sizes[block]
            _enter(block, tier, 0, sizes, lists, held, moved)
            _overflow(sizes, lists, capacity, held, moved)
    return hits


@_inlined
def _enter(block, source, tier, sizes, lists, held, moved):
    newer, older, tiers = lists
    _link(newer, older, block, len(tiers) + tier)
    tiers[block] = tier
    held[0, tier] += 1
    held[1, tier] += sizes[block]
    moved[source, tier] += sizes[block]


@_compiled
def _overflow(sizes, lists, capacity, held, moved):
    """Move the oldest blocks of full tiers down, or drop them."""
    newer, older, tiers = lists
    for tier in range(3):
        if capacity[tier] < 0:
            return
        while held[0, tier] > capacity[tier]:
            block = newer[len(tiers) + tier]
            _unlink(newer, older, block)
            held[0, tier] -= 1
            held[1, tier] -= sizes[block]
            below = tier + 1
            while below < 3 and capacity[below] == 0:
                below += 1
            if below < 3:
                _enter(block, tier, below, sizes, lists, held, moved)
            else:
                tiers[block] = 3
                moved[tier, 3] += sizes[block]


@njit(cache=True)
def block_sizes(ids, offsets, tail_tokens, unique, block_tokens):
    """Return the tokens of each block, shape (unique,): all complete but prompts' tails."""
    sizes = np.full(unique, block_tokens, np.int32)
    for r in range(len(offsets) - 1):
        if offsets[r + 1] > offsets[r]:
            sizes[ids[offsets[r + 1] - 1]] = tail_tokens[r]
    return sizes
