"""Groups a trace's accesses into runs of blocks with one and the same history.

A run is a stretch of a request's prompt whose blocks were all last accessed in
the same run before (or never). So its blocks share every earlier access, hence
their access count, their gaps, their age: what holds for one holds for all, and
the replay engines work on runs instead of blocks. A prompt mostly extends a
prompt that came before, so there are far fewer runs than accesses.

Blocks leave a run in two ways only. A later request always takes them from the
run's front, because it comes from the prompt's start; an eviction takes them
from its back, because a prefix without its end is of use and an end is not.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
from numba import njit

from caching_heuristics import METADATA_FIELDS
from kvttl.traces.trace import Trace


@dataclass(frozen=True, eq=False)
class RunIndex:
    """The runs of a trace, in order of access.

    Parameters
    ----------
    trace : Trace
        What was indexed.
    offsets : numpy.ndarray
        Shape (requests + 1,): request r's runs are ``offsets[r]..offsets[r + 1] - 1``.
    request, previous, start, length : numpy.ndarray
        Shape (runs,), int32: the run's request; the run that its blocks were in
        before (-1 = never seen); its first block's place there; its blocks.
    short : numpy.ndarray
        Shape (runs,), int32: tokens that its last block lacks to a complete one.
    next_request : numpy.ndarray or None
        Shape (runs,): the one request that accesses its blocks next, the number
        of requests if none does. Only in `by_future`.

    Examples
    --------
    >>> from kvttl.traces.builder import make_trace
    >>> index = index_runs(make_trace([[0, 1, 2, 3], [0, 1, 4], [0, 1, 2]]))
    >>> index.request.tolist(), index.length.tolist(), index.previous.tolist()
    ([0, 1, 1, 2, 2], [4, 2, 1, 2, 1], [-1, 0, -1, 1, 0])
    >>> index.access_count.tolist()
    [0.0, 1.0, 0.0, 2.0, 1.0]
    """

    trace: Trace
    offsets: np.ndarray
    request: np.ndarray
    previous: np.ndarray
    start: np.ndarray
    length: np.ndarray
    short: np.ndarray
    next_request: np.ndarray | None = None

    runs = property(lambda self: len(self.request), doc="Number of runs.")

    @cached_property
    def arrival_s(self) -> np.ndarray:
        """Seconds of each run's access, shape (runs,)."""
        return self.trace.arrival_s[self.request]

    @cached_property
    def depth(self) -> np.ndarray:
        """Blocks of the prompt before the run, shape (runs,)."""
        before = np.concatenate([[0], np.cumsum(self.length)])
        return before[:-1] - before[self.offsets[:-1]][self.request]

    @cached_property
    def _history(self):
        return _histories(self.previous, self.arrival_s)

    # Shape (runs,): earlier accesses of a run's blocks; seconds since the last, 0 if there is none;
    # CV / (1 + CV) of the seconds between them, 0 before two gaps.
    access_count = property(lambda self: self._history[0])
    seconds_since_access = property(lambda self: self._history[1])
    time_variance = property(lambda self: self._history[2])

    @cached_property
    def longest_known(self) -> np.ndarray:
        """Run that ends the longest prefix seen before, by request; -1 if there is none."""
        # Known ones come first in a prompt.
        known = np.diff(np.concatenate([[0], np.cumsum(self.previous >= 0)])[self.offsets])
        return np.where(known > 0, self.offsets[:-1] + known - 1, -1)

    def metadata(self, per: str = "request") -> dict[str, np.ndarray]:
        """Return what the heuristics need.

        Parameters
        ----------
        per : str
            ``"request"``: of the longest prefix seen before, shape (requests,), as
            the live manager measures it. ``"block"``: each run's own, shape (runs,).
        """
        if per not in ("request", "block"):
            raise ValueError(f"per must be 'request' or 'block', got {per!r}")
        values = {name: getattr(self, name) for name in METADATA_FIELDS if hasattr(self, name)}
        if per == "block":
            return values
        return dict(self._of_longest_known)

    @cached_property
    def _of_longest_known(self):
        known = self.longest_known >= 0
        values = {name: np.zeros(len(known)) for name in self.metadata("block")}
        for name, of_requests in values.items():
            of_requests[known] = getattr(self, name)[self.longest_known[known]]
        return values

    @cached_property
    def by_run(self) -> "SegmentArrays":
        """The runs as segments, for policies that decide about each."""
        pieces = (np.arange(self.runs + 1), self.previous, self.start, self.length)
        return _segments(self.offsets, self.request, self.length, self.short, *pieces)

    @cached_property
    def by_request(self) -> "SegmentArrays":
        """Whole requests as segments, for policies that decide once a request: far fewer."""
        columns, piece_offsets = _merge(self.offsets, self.request, self.previous, self.length)
        return _whole(self.trace, piece_offsets, *columns)

    @cached_property
    def by_future(self) -> "RunIndex":
        """The runs cut where blocks differ in the request that accesses them next."""
        rest = self.by_run.rest
        taken, left = np.flatnonzero(self.previous >= 0), np.flatnonzero(rest)
        run = np.concatenate([self.previous[taken], left])
        order = np.argsort(run, kind="stable")  # pieces as they are taken, then what is left
        run, after = run[order], np.full(len(left), self.trace.requests, np.int32)
        next_request = np.concatenate([self.request[taken], after])[order]
        length = np.concatenate([self.length[taken], rest[left]])[order]
        offsets = np.searchsorted(run, np.arange(self.runs + 1))  # of each run's pieces
        before = np.cumsum(length) - length
        start = before - before[offsets[:-1]][run]
        piece = np.full(self.runs, -1)  # what a run is of the one before
        piece[taken] = np.argsort(order)[: len(taken)]
        short = np.zeros_like(length)
        short[offsets[1:] - 1] = self.short
        columns = (self.request[run], piece[run], start, length, short, next_request)
        own = (column.astype(np.int32) for column in columns)
        return RunIndex(self.trace, offsets[self.offsets], *own)


class SegmentArrays(NamedTuple):
    """What an engine moves as one: blocks with one last access and one decision.

    Parameters
    ----------
    offsets, request : numpy.ndarray
        Each request's segments, (requests + 1,), and each segment's request, (segments,).
    length, short : numpy.ndarray
        Shape (segments,): blocks; tokens that the last block lacks.
    piece_offsets : numpy.ndarray
        Shape (segments + 1,): each segment's pieces, in the prompt's order.
    piece_old, piece_start, piece_length : numpy.ndarray
        Shape (pieces,): the segment that a piece's blocks were in before (-1 =
        never seen), where in it they begin, and how many they are.
    mirror : numpy.ndarray
        Shape (segments,): a segment's place if each request's went deepest first; its
        own inverse.
    rest : numpy.ndarray
        Shape (segments,): blocks that no later request accesses.
    """

    offsets: np.ndarray
    request: np.ndarray
    length: np.ndarray
    short: np.ndarray
    piece_offsets: np.ndarray
    piece_old: np.ndarray
    piece_start: np.ndarray
    piece_length: np.ndarray
    mirror: np.ndarray
    rest: np.ndarray


def _segments(offsets, request, length, short, piece_offsets, old, start, piece_length):
    mirror = offsets[request] + offsets[request + 1] - 1 - np.arange(len(request))
    rest = length - np.bincount(old + 1, piece_length, len(request) + 1)[1:]  # [0]: never seen
    own, pieces = (offsets, request, length, short), (piece_offsets, old, start, piece_length)
    return SegmentArrays(*own, *pieces, mirror.astype(np.int32), rest.astype(np.int32))


@njit(cache=True)
def _merge(offsets, request, previous, length):
    """Join runs that follow each other and came from one request; returns columns, offsets."""
    columns, ends = np.zeros((3, len(request)), np.int32), np.zeros(len(offsets), np.int64)
    piece = -1
    for r in range(len(offsets) - 1):
        depth, before = 0, np.int64(-2)
        for run in range(offsets[r], offsets[r + 1]):
            old = np.int64(request[previous[run]]) if previous[run] >= 0 else np.int64(-1)
            if old != before:
                piece += 1
                columns[0, piece] = before = old
                columns[1, piece] = depth
            columns[2, piece] += length[run]
            depth += length[run]
        ends[r + 1] = piece + 1
    return columns[:, : piece + 1], ends


def _short(trace):
    """Return the tokens that each request's last block lacks, shape (requests,)."""
    complete = trace.block_tokens * (trace.blocks > 0)
    return (complete - trace.tail_tokens()).astype(np.int32)


def index_runs(trace: Trace) -> RunIndex:
    """Group a trace's accesses into runs, in one pass.

    Raises
    ------
    ValueError
        The ids are not prefix-chained, or a request has a block twice.
    """
    offsets, columns = _indexed(trace, whole=False)
    short = np.zeros(len(columns[0]), np.int32)
    some = trace.blocks > 0
    short[offsets[1:][some] - 1] = _short(trace)[some]
    return RunIndex(trace, offsets, *columns, short)


def whole_requests(trace: Trace | RunIndex) -> SegmentArrays:
    """Return `RunIndex.by_request`, for which no runs are needed."""
    if isinstance(trace, RunIndex):
        return trace.by_request
    piece_offsets, (_, *pieces) = _indexed(trace, whole=True)
    return _whole(trace, piece_offsets, *pieces)


def _whole(trace, piece_offsets, *pieces):
    requests, blocks = np.arange(trace.requests + 1), trace.blocks.astype(np.int32)
    # int32 as by run: for another type the kernels would be compiled once more.
    own = (requests, requests[:-1].astype(np.int32), blocks, _short(trace))
    return _segments(*own, piece_offsets, *pieces)


def _indexed(trace, whole):
    """Return each request's offsets, and columns: request, previous, start, length."""
    # An upper bound; pages that are never written take no memory.
    columns, rest = np.empty((4, trace.accesses), np.int32), np.empty((trace.accesses, 4), np.int32)
    offsets = np.empty(trace.requests + 1, np.int64)
    fronts = np.full(trace.unique_blocks, _NEW, np.int32)
    runs, bad = _index(trace.block_ids, trace.offsets, whole, fronts, rest, columns, offsets)
    if bad >= 0:
        raise ValueError(f"block_ids must be prefix-chained, request {bad} is not")
    return offsets, columns[:, :runs]


_NEW, _WITHIN = -1, -2  # of a block that begins no run's rest: never seen; further back in one


@njit(cache=True)
def _index(ids, offsets, whole, fronts, rest, columns, run_offsets):
    """Fill the runs' columns; returns how many there are and the first bad request, else -1.

    Only where a run begins a block is looked up: the rest of it is compared with the run that it
    comes from. So `fronts` has the run of no blocks but those that a run's rest begins with, and
    `rest`, (runs, 4), the rest's place in `ids`, blocks taken before it, its blocks, its depth.
    `whole` requests are runs: what is counted are pieces of them then, and `previous` is a request.
    """
    request, previous, start, length = columns
    run = 0
    for r in range(len(offsets) - 1):
        run_offsets[r] = run
        at, end = offsets[r], offsets[r + 1]
        while at < end:
            block, depth, taken = ids[at], at - offsets[r], 0
            old = fronts[block]
            if old == _NEW:
                blocks = _new(ids, at, end, fronts)
            else:
                left, place = rest[old], np.int64(rest[old, 0])
                follows = depth == 0 or ids[place - 1] == ids[at - 1]
                if old == _WITHIN or left[3] != depth or not follows:
                    return run, r
                taken, blocks = left[1], _equal(ids, place, at, min(left[2], end - at))
                if blocks < left[2]:
                    fronts[ids[place + blocks]] = old
                left[0], left[1], left[3] = place + blocks, taken + blocks, depth + blocks
                left[2] -= blocks
            fronts[block] = _WITHIN
            if depth == 0 or not whole:
                fronts[block] = r if whole else run
                new = rest[fronts[block]]
                new[0], new[1], new[2], new[3] = at, 0, end - at if whole else blocks, depth
            request[run], previous[run], start[run], length[run] = r, old, taken, blocks
            at += blocks
            run += 1
    run_offsets[-1] = run
    return run, -1


@njit(cache=True)
def _new(ids, at, end, fronts):
    """Count and mark the blocks of a stretch that were never seen."""
    first = at
    while at < end and fronts[ids[at]] == _NEW:
        fronts[ids[at]] = _WITHIN
        at += 1
    return at - first


@njit(cache=True)
def _equal(ids, one, other, most):
    """Count the blocks of two stretches that are equal."""
    blocks = 1
    while blocks < most and ids[one + blocks] == ids[other + blocks]:
        blocks += 1
    return blocks


@njit(cache=True)
def _histories(previous, arrival_s):
    """Return count, seconds since the last access, variance (Welford 1962), by run."""
    runs = len(previous)
    count, since = np.zeros(runs, np.float64), np.zeros(runs, np.float64)
    variance, mean, m2 = np.zeros(runs), np.zeros(runs), np.zeros(runs)
    for run in range(runs):
        old = previous[run]
        if old < 0:
            continue
        gaps = count[old] + 1.0
        gap = arrival_s[run] - arrival_s[old]
        deviation = gap - mean[old]
        mean[run] = mean[old] + deviation / gaps
        m2[run] = m2[old] + deviation * (gap - mean[run])
        count[run], since[run] = gaps, gap
        if gaps >= 2.0 and mean[run] > 0.0:
            spread = np.sqrt(max(0.0, m2[run]) / gaps)
            variance[run] = spread / (mean[run] + spread)
    return count, since, variance
