"""Traces made of traces: sessions laid over each other, mixed loads, larger chunks."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from kvttl.traces.trace import NAMED, OF_REQUESTS, Trace, dense, reordered


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
    trace = end_to_end(traces, starts_s, name)
    return picked(trace, np.argsort(trace.arrival_s, kind="stable"))


def tiled(trace: Trace, accesses: int) -> Trace:
    """Repeat a trace end to end, with new blocks each time, until it has so many accesses.

    Examples
    --------
    >>> from kvttl.traces.generator import agent_loops
    >>> trace = agent_loops(20)
    >>> tiled(trace, 3 * trace.accesses).unique_blocks == 3 * trace.unique_blocks
    True
    """
    copies = max(1, -(-accesses // max(trace.accesses, 1)))
    if copies * trace.unique_blocks >= 2**31:
        raise ValueError(f"accesses must leave < 2147483648 distinct blocks, got {accesses}")
    starts_s, name = np.arange(copies) * (trace.span_s + 60.0), f"{trace.name} x {copies}"
    return replace(end_to_end([trace] * copies, starts_s, name), skipped_lines=0)


def end_to_end(traces: Sequence[Trace], starts_s: Sequence[float], name: str) -> Trace:
    """Return the requests of one trace after another's, each from its own second on."""
    columns = {c: np.concatenate([getattr(t, c) for t in traces]) for c in OF_REQUESTS}
    counts = [trace.requests for trace in traces]
    sessions = [int(trace.sessions.max(initial=-1)) + 1 for trace in traces]
    columns["arrival_s"] += np.repeat(starts_s, counts)
    columns["sessions"] += np.repeat(_before(sessions), counts)
    shifts = _before([trace.unique_blocks for trace in traces])
    columns["block_ids"] = np.concatenate([t.block_ids + shift for t, shift in zip(traces, shifts)])
    columns["offsets"] = np.cumsum([0, *np.concatenate([t.blocks for t in traces])])
    columns |= {"unique_blocks": sum(trace.unique_blocks for trace in traces)}
    names, numbers = np.unique(np.concatenate([t.names for t in traces]), return_inverse=True)
    firsts = np.cumsum([len(trace.names) for trace in traces])[:-1]
    for column in NAMED:  # -1, unknown, is the last of the numbers
        codes = zip(traces, np.split(numbers.astype(np.int32), firsts))
        columns[column] = np.concatenate([np.append(n, -1)[getattr(t, column)] for t, n in codes])
        columns[column] = columns[column].astype(np.int32)
    columns["timed"] = all(trace.timed for trace in traces)
    return replace(traces[0], **columns, names=names, name=name)


def picked(trace: Trace, requests: np.ndarray) -> Trace:
    """Return some requests, in the order given, from the first one's second on."""
    columns = {name: getattr(trace, name)[requests] for name in OF_REQUESTS}
    columns["arrival_s"] = columns["arrival_s"] - columns["arrival_s"][:1]
    ids, offsets = reordered(trace.block_ids, trace.offsets, requests)
    return replace(trace, **columns, **dense(ids), offsets=offsets)


def in_chunks_of(trace: Trace, blocks: int) -> Trace:
    """Return the trace in chunks of so many blocks; what fills no chunk is not kept."""
    rows = [trace.request(request)[blocks - 1 :: blocks] for request in range(trace.requests)]
    columns = dense(np.concatenate(rows)) | {"offsets": np.cumsum([0, *map(len, rows)])}
    return replace(trace, **columns, block_tokens=trace.block_tokens * blocks)


def _before(counts):
    return np.cumsum([0, *counts], dtype=np.int32)[:-1]
