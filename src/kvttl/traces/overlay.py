"""Traces made of traces: sessions laid over each other, mixed loads, larger chunks."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from kvttl.traces.trace import COLUMNS, Trace, _dense

_OF_REQUESTS = tuple(COLUMNS)[2:]


def overlaid(traces: Sequence[Trace], starts_s: Sequence[float], name: str = "") -> Trace:
    """Return one trace of several, each from its own second on; their blocks stay apart.

    Examples
    --------
    >>> from kvttl.traces.builder import make_trace
    >>> trace = overlaid([make_trace([[0], [0]]), make_trace([[0]])], [0.0, 0.5])
    >>> trace.block_ids.tolist(), trace.arrival_s.tolist()
    ([0, 1, 0], [0.0, 0.5, 1.0])
    """
    sizes = {trace.block_tokens for trace in traces}
    if len(sizes) != 1:
        raise ValueError(f"block_tokens must be the same in all traces, got {sorted(sizes)}")
    columns = {c: np.concatenate([getattr(t, c) for t in traces]) for c in _OF_REQUESTS}
    counts = [trace.requests for trace in traces]
    columns["arrival_s"] = columns["arrival_s"] + np.repeat(starts_s, counts)
    columns["sessions"] = columns["sessions"] + np.repeat(_before(traces, _sessions), counts)
    shifts = _before(traces, lambda trace: trace.unique_blocks)
    ids = np.concatenate([t.block_ids + shift for t, shift in zip(traces, shifts)])
    offsets = np.concatenate([[0], np.cumsum(np.concatenate([t.blocks for t in traces]))])
    columns |= {"block_ids": ids, "offsets": offsets, "unique_blocks": sum(map(_unique, traces))}
    order = np.argsort(columns["arrival_s"], kind="stable")
    return picked(replace(traces[0], **columns, name=name), order)


def picked(trace: Trace, requests: np.ndarray) -> Trace:
    """Return some requests, in the order given, from the first one's second on."""
    rows = [trace.request(request) for request in requests]
    columns = {name: getattr(trace, name)[requests] for name in _OF_REQUESTS}
    columns["arrival_s"] = columns["arrival_s"] - columns["arrival_s"][:1]
    columns["sessions"] = columns["sessions"].astype(np.int32)
    offsets = np.concatenate([[0], np.cumsum([len(row) for row in rows])]).astype(np.int64)
    columns |= _dense(np.concatenate(rows) if rows else np.zeros(0, np.int32))
    return replace(trace, **columns, offsets=offsets)


def in_chunks_of(trace: Trace, blocks: int) -> Trace:
    """Return the trace in chunks of so many blocks; what fills no chunk is not kept."""
    rows = [trace.request(request)[blocks - 1 :: blocks] for request in range(trace.requests)]
    offsets = np.concatenate([[0], np.cumsum([len(row) for row in rows])]).astype(np.int64)
    columns = _dense(np.concatenate(rows)) | {"offsets": offsets}
    return replace(trace, **columns, block_tokens=trace.block_tokens * blocks)


def _before(traces, count):
    return np.cumsum([0, *map(count, traces)])[:-1]


def _sessions(trace):
    return int(trace.sessions.max(initial=-1)) + 1


def _unique(trace):
    return trace.unique_blocks
