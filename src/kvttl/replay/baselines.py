"""libCacheSim's policies on the same accesses, to compare with and to be checked against.

They see a flat stream of block accesses of size 1: no prefixes, tiers or TTLs.
libCacheSim (libcachesim 0.3.5): https://github.com/1a1a11a/libCacheSim
"""

import tempfile
from contextlib import ExitStack
from pathlib import Path

import numpy as np

from caching_heuristics import unknown_name
from kvttl.replay.policies import capacities
from kvttl.replay.result import ReplayResult
from kvttl.traces.trace import Trace

_NAMES = "FIFO LRU LFU ARC S3-FIFO SIEVE W-TinyLFU GDSF LIRS Belady".split()
# Name -> libcachesim's class.
BASELINES = {name: name.replace("-", "") for name in _NAMES} | {"SIEVE": "Sieve"}
# Blocks: below, a part of libcachesim's policy (a window of 1 %, a queue of 10 %) rounds
# to none: W-TinyLFU never hits then, or aborts the process, as S3-FIFO does.
LEAST_BLOCKS = {"W-TinyLFU": 100, "S3-FIFO": 10}
# libCacheSim's oracleGeneral format.
_RECORD = np.dtype([("time_s", "<u4"), ("key", "<u8"), ("size", "<u4"), ("next_access", "<i8")])


class BaselineFile(ExitStack):
    """A trace in libCacheSim's own binary format, in a scratch file until the block ends.

    Examples
    --------
    >>> from kvttl.traces.builder import make_trace
    >>> with BaselineFile(make_trace([[0], [1], [0]], block_tokens=1)) as file:
    ...     file.hits("LRU", 1), file.hits("LRU", 2)
    (0, 1)
    """

    def __init__(self, trace: Trace) -> None:
        super().__init__()
        folder = self.enter_context(tempfile.TemporaryDirectory(prefix="kv-baseline-"))
        self.trace, self.path = trace, Path(folder, "trace.oracleGeneral")
        records = np.empty(trace.accesses, _RECORD)
        records["time_s"] = np.repeat(trace.arrival_s, trace.blocks)
        records["key"], records["size"] = trace.block_ids + 1, 1
        records["next_access"] = next_accesses(trace.block_ids)
        records.tofile(self.path)

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

        size = _size(capacity, self.trace)
        if 0 < size < LEAST_BLOCKS.get(policy, 0):
            return np.nan
        cache, kind = _cache(policy, size), libcachesim.TraceType.ORACLE_GENERAL_TRACE
        if not self.trace.accesses or cache is None:
            return 0
        misses, _ = cache.process_trace(libcachesim.TraceReader(str(self.path), kind))
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

    blocks, size = capacities(capacity, trace), _size(capacity, trace)
    unknown, moved = np.full((2, 3), np.nan), np.zeros((4, 4), np.int64)
    if 0 < size < LEAST_BLOCKS.get(policy, 0):
        hits = np.full((2, trace.requests, 3), np.nan)
        return ReplayResult(trace, policy, blocks, *hits, *unknown, moved)
    cache, hit = _cache(policy, size), np.zeros(trace.accesses, bool)
    request = libcachesim.Request()
    request.obj_size = 1
    after = next_accesses(trace.block_ids)
    after = np.where(after < 0, np.iinfo(np.int64).max, after).tolist()
    for at, block in enumerate((trace.block_ids + 1).tolist() if cache is not None else ()):
        request.obj_id = block
        request.next_access_vtime = after[at]
        hit[at] = cache.get(request)
    hits = _prefix_hits(trace, hit)
    return ReplayResult(trace, policy, blocks, *hits, *unknown, moved, int(hit.sum()))


def _prefix_hits(trace, hit):
    """Return hit blocks and hit tokens of each request, in the first tier."""
    hits, tails = np.zeros((2, trace.requests, 3), np.int64), trace.tail_tokens()
    misses = np.append(np.flatnonzero(~hit), trace.accesses)
    first_miss = misses[np.searchsorted(misses, trace.offsets[:-1])]
    hits[0, :, 0] = np.minimum(first_miss, trace.offsets[1:]) - trace.offsets[:-1]
    whole = (hits[0, :, 0] == trace.blocks) & (trace.blocks > 0)
    hits[1, :, 0] = hits[0, :, 0] * trace.block_tokens - whole * (trace.block_tokens - tails)
    return hits


def _size(capacity, trace):
    """Return a capacity in blocks; all that there are where it is unlimited."""
    size, _, _ = capacities(capacity, trace)
    return trace.unique_blocks if size < 0 else size


def _cache(policy, size):
    """Return a libCacheSim cache, None where it could not hold a block."""
    import libcachesim

    if policy not in BASELINES:
        raise ValueError(unknown_name("policy", policy, BASELINES))
    if not size:
        return None
    # Its default, 24, would clear 128 MiB of hash table for each cache.
    hashpower = min(24, max(12, int(size).bit_length() + 1))
    return getattr(libcachesim, BASELINES[policy])(cache_size=size, hashpower=hashpower)


def next_accesses(ids: np.ndarray) -> np.ndarray:
    """Return the number of the access that comes next to each access's block, -1 = none."""
    order = np.argsort(ids, kind="stable")  # each block's accesses, one after the other
    again = ids[order[1:]] == ids[order[:-1]]
    out = np.full(len(ids), -1)
    out[order[:-1][again]] = order[1:][again]
    return out
