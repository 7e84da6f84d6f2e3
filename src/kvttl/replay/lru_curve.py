"""LRU at every capacity at once: how many distinct blocks lie between two accesses.

A block hits in an LRU cache of C blocks if fewer than C distinct blocks were
accessed since its last access (Mattson, Gecsei, Slutz and Traiger, "Evaluation
techniques for storage hierarchies", IBM Systems Journal 9(2), 1970). Along a
stretch that a prompt shares with one earlier prompt that number is constant: one
block leaves the set between and one enters. So one look-up in a Fenwick tree for
each stretch is enough.
"""

from collections.abc import Sequence

import numpy as np
from numba import njit

from kvttl.replay.policies import capacities as as_blocks
from kvttl.replay.runs import RunIndex, whole_requests
from kvttl.traces.trace import Trace

NEVER = np.iinfo(np.int64).max  # the distance of a first access


def lru_curve(trace: Trace | RunIndex, capacities: Sequence[int | float]) -> dict[str, np.ndarray]:
    """Return what ``replay(trace, "lru", capacity)`` hits, for all capacities in one pass.

    Parameters
    ----------
    trace : Trace or RunIndex
        What to replay.
    capacities : sequence
        Blocks, or shares in ]0, 1] of the trace's unique blocks; shape (n,).

    Returns
    -------
    dict of str to numpy.ndarray
        ``capacity_blocks``, ``block_hit_ratio``, ``token_hit_ratio`` (prefix
        hits) and ``block_level_hits``, shape (n,).

    Examples
    --------
    >>> from kvttl.traces.builder import make_trace
    >>> curve = lru_curve(make_trace([[0, 1], [0, 2], [0, 1]]), [1, 2, 3])
    >>> curve["block_level_hits"].tolist()
    [0, 2, 3]
    """
    segments = whole_requests(trace)
    trace = trace.trace if isinstance(trace, RunIndex) else trace
    own, prefix, tokens = _distances(segments, trace.block_tokens)
    blocks = np.array([as_blocks(capacity, trace)[0] for capacity in capacities], np.int64)
    limits = np.where(blocks < 0, NEVER, blocks)  # a distance below it is a hit
    limits, place = np.unique(limits, return_inverse=True)
    prefix_blocks = _below(prefix, segments.piece_length, limits)[place]
    prompt_tokens = max(1, int(trace.prompt_tokens.sum(dtype=np.int64)))
    return {
        "capacity_blocks": blocks,
        "block_hit_ratio": prefix_blocks / max(1, trace.accesses),
        "token_hit_ratio": _below(prefix, tokens, limits)[place] / prompt_tokens,
        "block_level_hits": _below(own, segments.piece_length, limits)[place],
    }


def _below(distances, weights, limits):
    """Sum the weights of distances below each of the limits, which ascend."""
    over = np.searchsorted(limits, distances, side="right")  # limits that are not above each one
    return np.cumsum(np.bincount(over, weights, len(limits) + 1))[:-1].astype(np.int64)


@njit(cache=True)
def _distances(s, block_tokens):
    """Return by piece of `SegmentArrays`: its distance, the largest of its prefix, its tokens."""
    tree = np.zeros(len(s.length) + 1, np.int64)  # Fenwick: blocks last accessed in each request
    own = np.full(len(s.piece_old), NEVER, np.int64)
    prefix, tokens = own.copy(), np.zeros(len(s.piece_old), np.int64)
    held = 0  # blocks accessed so far, by now
    for r in range(len(s.length)):
        largest = np.int64(-1)
        taken = 0
        for piece in range(s.piece_offsets[r], s.piece_offsets[r + 1]):
            old, blocks = s.piece_old[piece], s.piece_length[piece]
            tokens[piece] = blocks * block_tokens
            if old >= 0:
                own[piece] = s.length[old] - 1 + held - taken - _sum_to(tree, old + 1)
                _add(tree, old + 1, -blocks)
                taken += blocks
            largest = max(largest, own[piece])
            prefix[piece] = largest
        if s.length[r]:
            tokens[s.piece_offsets[r + 1] - 1] -= s.short[r]
            _add(tree, r + 1, s.length[r])
            held += s.length[r] - taken
    return own, prefix, tokens


@njit(cache=True, inline="always")
def _sum_to(tree, at):
    total = 0
    while at > 0:
        total += tree[at]
        at -= at & -at
    return total


@njit(cache=True, inline="always")
def _add(tree, at, value):
    while at < len(tree):
        tree[at] += value
        at += at & -at
