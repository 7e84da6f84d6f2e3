"""libCacheSim's policies on the same accesses, to compare with and to be checked against.

They see a flat stream of block accesses of size 1: no prefixes, tiers or TTLs.
libCacheSim (libcachesim 0.3.5): https://github.com/1a1a11a/libCacheSim
"""

from __future__ import annotations

import math
import tempfile
from pathlib import Path

import numpy as np
from numba import njit

from caching_heuristics import unknown_name
from kvttl.replay.policies import capacities
from kvttl.replay.result import ReplayResult
from kvttl.traces.trace import Trace

BASELINES = {  # name -> libcachesim's class
    "FIFO": "FIFO",
    "LRU": "LRU",
    "LFU": "LFU",
    "ARC": "ARC",
    "S3-FIFO": "S3FIFO",
    "SIEVE": "Sieve",
    "W-TinyLFU": "WTinyLFU",
    "GDSF": "GDSF",
    "LIRS": "LIRS",
    "Belady": "Belady",
}
# Blocks: below, a part of libcachesim's policy (a window of 1 %, a queue of 10 %) rounds
# to none: W-TinyLFU never hits then, or aborts the process, as S3-FIFO does.
LEAST_BLOCKS = {"W-TinyLFU": 100, "S3-FIFO": 10}
_RECORD = np.dtype(  # libCacheSim's oracleGeneral format
    [("time_s", "<u4"), ("key", "<u8"), ("size", "<u4"), ("next_access", "<i8")]
)


class BaselineFile:
    """A trace in libCacheSim's own binary format, in a scratch file while the block runs.

    Examples
    --------
    >>> from kvttl.traces.builder import make_trace
    >>> with BaselineFile(make_trace([[0], [1], [0]], block_tokens=1)) as file:
    ...     file.hits("LRU", 1), file.hits("LRU", 2)
    (0, 1)
    """

    def __init__(self, trace: Trace) -> None:
        self.trace = trace
        self._folder = tempfile.TemporaryDirectory(prefix="kv-baseline-")
        self.path = Path(self._folder.name) / "trace.oracleGeneral"

    def __enter__(self) -> BaselineFile:
        records = np.empty(self.trace.accesses, _RECORD)
        records["time_s"] = np.repeat(self.trace.arrival_s, self.trace.blocks)
        records["key"] = self.trace.block_ids + 1
        records["size"] = 1
        records["next_access"] = next_accesses(self.trace.block_ids, self.trace.unique_blocks)
        records.tofile(self.path)
        return self

    def __exit__(self, *error) -> None:
        self._folder.cleanup()

    def hits(self, policy: str, capacity) -> int | float:
        """Return the accesses that hit, counted inside libCacheSim: its fastest way.

        Parameters
        ----------
        policy : str
            One of `BASELINES`.
        capacity : int or float
            Blocks, or a share in ]0, 1] of the trace's unique blocks.

        Returns
        -------
        int or float
            NaN below the policy's `LEAST_BLOCKS`: that would say nothing of the policy.
        """
        import libcachesim

        if _is_unknown(policy, capacity, self.trace):
            return math.nan
        cache = _cache(policy, capacity, self.trace)
        if not self.trace.accesses or cache is None:
            return 0
        kind = libcachesim.TraceType.ORACLE_GENERAL_TRACE
        reader = libcachesim.TraceReader(str(self.path), kind)
        misses, _ = cache.process_trace(reader)
        return self.trace.accesses - round(misses * self.trace.accesses)


def replay_baseline(trace: Trace, policy: str, capacity=None) -> ReplayResult:
    """Replay a trace access by access and count the prefixes that hit.

    A request's hit is the run of hits at its start: until the first miss nothing
    is inserted. About 2 M accesses/s; `BaselineFile.hits` is faster, but counts
    blocks whose prefix is gone as hits too. Below a policy's `LEAST_BLOCKS` nothing
    is known: hits and ratios are NaN, ``block_level_hits`` is None.

    Examples
    --------
    >>> from kvttl.traces.builder import make_trace
    >>> trace = make_trace([[0, 1], [0, 2], [0, 1]])
    >>> replay_baseline(trace, "LRU", 3).hit_blocks[:, 0].tolist()
    [0, 1, 2]
    """
    import libcachesim

    blocks = capacities(capacity, trace)
    size = blocks[0] if blocks[0] >= 0 else max(trace.unique_blocks, 1)
    unknown, moved = np.full((2, 3), np.nan), np.zeros((4, 4), np.int64)
    if _is_unknown(policy, size, trace):
        hits = np.full((2, trace.requests, 3), np.nan)
        return ReplayResult(trace, policy, blocks, *hits, *unknown, moved)
    cache, hit = _cache(policy, size, trace), np.zeros(trace.accesses, bool)
    request = libcachesim.Request()
    request.obj_size = 1
    after = next_accesses(trace.block_ids, trace.unique_blocks)
    after = np.where(after < 0, np.iinfo(np.int64).max, after).tolist()
    for at, block in enumerate((trace.block_ids + 1).tolist() if cache is not None else ()):
        request.obj_id = block
        request.next_access_vtime = after[at]
        hit[at] = cache.get(request)
    hits = _prefix_hits(trace, hit)
    return ReplayResult(trace, policy, blocks, *hits, *unknown, moved, int(hit.sum()))


def _prefix_hits(trace, hit):
    """Return hit blocks and hit tokens of each request, in the first tier."""
    hits = np.zeros((2, trace.requests, 3), np.int64)
    hits[0, :, 0] = _leading(hit, trace.offsets)
    whole = (hits[0, :, 0] == trace.blocks) & (trace.blocks > 0)
    hits[1, :, 0] = hits[0, :, 0] * trace.block_tokens
    hits[1, whole, 0] -= trace.block_tokens - trace.tail_tokens()[whole]
    return hits


def _size(capacity, trace):
    size, _, _ = capacities(capacity, trace)
    return trace.unique_blocks if size < 0 else size


def _is_unknown(policy, capacity, trace):
    """Say whether libcachesim could answer with its rounding only, not with the policy."""
    return 0 < _size(capacity, trace) < LEAST_BLOCKS.get(policy, 0)


def _cache(policy, capacity, trace):
    """Return a libCacheSim cache, None where it could not hold a block."""
    import libcachesim

    if policy not in BASELINES:
        raise ValueError(unknown_name("policy", policy, BASELINES))
    size = _size(capacity, trace)
    if not size:
        return None
    # Its default, 24, would clear 128 MiB of hash table for each cache.
    hashpower = min(24, max(12, int(size).bit_length() + 1))
    return getattr(libcachesim, BASELINES[policy])(cache_size=size, hashpower=hashpower)


@njit(cache=True)
def next_accesses(ids, unique):
    """Return the number of the access that comes next to each access's block, -1 = none."""
    out, coming = np.empty(len(ids), np.int64), np.full(unique, -1, np.int64)
    for at in range(len(ids) - 1, -1, -1):
        out[at] = coming[ids[at]]
        coming[ids[at]] = at
    return out


@njit(cache=True)
def _leading(hit, offsets):
    out = np.zeros(len(offsets) - 1, np.int64)
    for r in range(len(out)):
        at = offsets[r]
        while at < offsets[r + 1] and hit[at]:
            at += 1
        out[r] = at - offsets[r]
    return out
