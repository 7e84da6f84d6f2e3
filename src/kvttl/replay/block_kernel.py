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


# Columns of a block's row: 16 bytes, so that a block is one cache line, not four.
_NEWER, _OLDER, _TIER, _TOKENS = 0, 1, 2, 3
_NONE = 3  # as a tier


@_inlined
def _unlink(rows, block):
    newer, older = rows[block, _NEWER], rows[block, _OLDER]
    rows[newer, _OLDER] = older
    rows[older, _NEWER] = newer


@_inlined
def _link(rows, block, end):
    """Put a block at a list's new end; `end` is the list's own row in the ring."""
    newest = rows[end, _OLDER]
    rows[end, _OLDER], rows[block, _NEWER] = block, end
    rows[block, _OLDER], rows[newest, _NEWER] = newest, block


def block_rows(sizes):
    """Return the rows of all blocks, in no tier, and of the ends of three empty lists.

    Sizes are the tokens of each block, shape (unique,); rows are (unique + 3, 4) int32.
    """
    unique = len(sizes)
    rows = np.empty((unique + 3, 4), np.int32)
    rows[:, _TIER], rows[:unique, _TOKENS] = _NONE, sizes
    for end in range(unique, unique + 3):
        rows[end, _NEWER] = rows[end, _OLDER] = end
    return rows


@_compiled
def replay_blocks(ids, offsets, arrival_s, rows, capacity, refresh, held, first, last, out):
    """Replay requests [first, last); returns the block-level hits.

    Parameters
    ----------
    rows : array
        Of `block_rows`; kept from call to call, as `held` is.
    refresh : bool
        Whether a hit makes a block the newest (LRU) or not (FIFO).
    held : array
        Shape (2, 3): blocks and tokens in each tier.
    out : tuple of arrays
        hit_blocks, hit_tokens (requests, 3); area (2, 3); moved (4, 4) tokens.
    """
    hit_blocks, hit_tokens, area, moved = out
    gpu, hits = len(rows) - 3, 0
    for r in range(first, last):
        if r > 0:
            _tick(area, held, arrival_s[r] - arrival_s[r - 1])
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
                if refresh:
                    _unlink(rows, block)
                    _link(rows, block, gpu)
                continue
            if tier < _NONE:
                _unlink(rows, block)
                held[0, tier] -= 1
                held[1, tier] -= rows[block, _TOKENS]
            _enter(rows, block, tier, 0, held, moved)
            _overflow(rows, capacity, held, moved)
    return hits


@_inlined
def _tick(area, held, dt):
    for tier in range(3):
        area[0, tier] += held[0, tier] * dt
        area[1, tier] += held[1, tier] * dt


@_inlined
def _enter(rows, block, source, tier, held, moved):
    _link(rows, block, len(rows) - 3 + tier)
    rows[block, _TIER] = tier
    held[0, tier] += 1
    held[1, tier] += rows[block, _TOKENS]
    moved[source, tier] += rows[block, _TOKENS]


@_compiled
def _overflow(rows, capacity, held, moved):
    """Move the oldest blocks of full tiers down, or drop them."""
    for tier in range(3):
        if capacity[tier] < 0:
            return
        while held[0, tier] > capacity[tier]:
            block = rows[len(rows) - 3 + tier, _NEWER]
            tokens = rows[block, _TOKENS]
            _unlink(rows, block)
            held[0, tier] -= 1
            held[1, tier] -= tokens
            below = tier + 1
            while below < _NONE and capacity[below] == 0:
                below += 1
            if below < _NONE:
                _enter(rows, block, tier, below, held, moved)
            else:
                rows[block, _TIER] = _NONE
                moved[tier, _NONE] += tokens


@njit(cache=True)
def block_sizes(ids, offsets, tail_tokens, unique, block_tokens):
    """Return the tokens of each block, shape (unique,): all complete but prompts' tails."""
    sizes = np.full(unique, block_tokens, np.int32)
    for r in range(len(offsets) - 1):
        if offsets[r + 1] > offsets[r]:
            sizes[ids[offsets[r + 1] - 1]] = tail_tokens[r]
    return sizes
