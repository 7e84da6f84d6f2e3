"""Policies of the replay engines, as plug-ins: a function from a trace's runs to a `Plan`.

A plan says for each run, at its access, in which tier its blocks go, until when
they may stay, and in which order they are evicted where a tier is full. To add
a policy, learned ones included, write such a function and hand it to
`trace_replay.replay`, or put it into `POLICIES`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from caching_heuristics import TIERS, HeuristicConfig
from trace_runs import RunIndex

UNLIMITED = -1  # as a capacity


@dataclass(frozen=True, eq=False)
class Plan:
    """What a policy decides about each run of an index.

    Parameters
    ----------
    index : RunIndex
        The runs; maybe cut further than those the policy was given.
    key : numpy.ndarray, optional
        Shape (runs,): the lowest key is evicted first; among equal ones the
        earliest access, and of one request the deepest block. Default: recency.
    ttl_s : numpy.ndarray, optional
        Shape (runs,): seconds in the first tier. Default: for ever.
    tier : numpy.ndarray, optional
        Shape (runs,), int8, indices into TIERS: the first tier. Default: gpu.
    ladder : tuple of float, optional
        Factors of the TTL in tiers that blocks come down to. Default: none, they go.

    Examples
    --------
    >>> from trace_builder import make_trace
    >>> from trace_replay import replay
    >>> def least_used(index, config):
    ...     return Plan(index, key=index.access_count)
    >>> trace = make_trace([[0], [0], [1], [2], [0], [1]], block_tokens=1)
    >>> replay(trace, least_used, capacity=2).hit_tokens.sum(), replay(trace, "lru", 2).hit_tokens.sum()
    (np.int64(2), np.int64(1))
    """

    index: RunIndex
    key: np.ndarray | None = None
    ttl_s: np.ndarray | None = None
    tier: np.ndarray | None = None
    ladder: tuple[float, float, float] | None = None


def infinite(index: RunIndex, config: HeuristicConfig) -> Plan:
    """Keep everything for ever: the most that any policy can hit."""
    return Plan(index)


def recency(index: RunIndex, config: HeuristicConfig) -> Plan:
    """Evict what was used least recently, a prompt's end before its start."""
    return Plan(index)


def fixed_ttl(index: RunIndex, config: HeuristicConfig) -> Plan:
    """Keep everything in gpu for ``base_ttl`` seconds after its last access."""
    return Plan(index, ttl_s=np.full(index.runs, config.base_ttl))


def heuristic(index: RunIndex, config: HeuristicConfig, **metadata) -> Plan:
    """`compute_ttl`, `select_backend` and the expiry ladder; recency where a tier is full."""
    ttl_s, tier = decisions(index, config, **metadata)
    return Plan(index, ttl_s=ttl_s, tier=tier, ladder=tuple(config.ladder.values()))


def heuristic_order(index: RunIndex, config: HeuristicConfig, **metadata) -> Plan:
    """`compute_ttl` as eviction order: what would expire first goes first, and only then."""
    ttl_s, _ = decisions(index, config, **{"per": "block", **metadata})
    return Plan(index, key=index.arrival_s + ttl_s)


def optimal(index: RunIndex, config: HeuristicConfig) -> Plan:
    """Belady's rule, knowing the future: evict what is used again last or never.

    A whole request at once: its own blocks may be evicted as soon as it is done.
    """
    cut = index.split_by_future()
    return Plan(cut, key=-(cut.next_request + cut.depth / 2.0**21))


POLICIES: dict[str, Callable[..., Plan]] = {
    "infinite": infinite,
    "recency": recency,
    "ttl": fixed_ttl,
    "heuristic": heuristic,
    "heuristic_order": heuristic_order,
    "optimal": optimal,
}


def decisions(
    index: RunIndex,
    config: HeuristicConfig,
    per: str = "request",
    perplexity: float | np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Return `compute_ttl` (seconds) and `select_backend` (int8 codes) of each run.

    Parameters
    ----------
    per : str
        ``"request"``: one decision a request, from the longest prefix seen
        before, as the live manager makes it; ``"block"``: from each block's own
        history.
    perplexity : float or numpy.ndarray, optional
        Of all requests or of each, shape (requests,). Traces hold none: neutral.
    """
    metadata = index.metadata("block")
    if per == "block":
        chosen = slice(None)
    else:
        metadata = {name: _by_request(index, values) for name, values in metadata.items()}
        chosen = index.request
        if per != "request":
            raise ValueError(f"per must be 'request' or 'block', got {per!r}")
    if perplexity is not None:
        perplexity = np.broadcast_to(np.asarray(perplexity, float), index.trace.requests)
        metadata["perplexity"] = perplexity[index.request] if per == "block" else perplexity
    tiers = config.tier(metadata)
    codes = np.full(len(tiers), 1, np.int8)  # disk
    codes[tiers == TIERS[0]], codes[tiers == TIERS[2]] = 0, 2
    return config.ttl(metadata)[chosen], codes[chosen]


def _by_request(index, values):
    known = index.longest_known
    return np.where(known >= 0, values[known], 0.0) if len(values) else np.zeros(len(known))


def capacities(capacity, trace) -> tuple[int, int, int]:
    """Return blocks of gpu, disk and remote from what a caller may give.

    Parameters
    ----------
    capacity : None, int, float or sequence of three
        None is unlimited; an int is blocks; a float in ]0, 1] is a share of the
        trace's unique blocks, any other float must be whole; one value is gpu's,
        and there are no other tiers then.

    Examples
    --------
    >>> from trace_builder import make_trace
    >>> trace = make_trace([range(200)])
    >>> capacities(0.05, trace), capacities((10, 0.5, None), trace)
    ((10, 0, 0), (10, 100, -1))
    """
    if isinstance(capacity, (list, tuple)):
        if len(capacity) != len(TIERS):
            raise ValueError(f"capacity must be one value or one for each of {TIERS}")
        return tuple(_blocks(value, trace, tier) for value, tier in zip(capacity, TIERS))
    return (_blocks(capacity, trace, "capacity"), 0, 0)


def _blocks(value, trace, name):
    if value is None:
        return UNLIMITED
    number = isinstance(value, (int, float, np.integer, np.floating))
    if not number or isinstance(value, bool) or not 0 <= value < math.inf:
        raise ValueError(f"{name} must be None, blocks >= 0 or a share in ]0, 1], got {value!r}")
    if isinstance(value, (int, np.integer)):
        return int(value)
    if value <= 1.0:
        return int(value * trace.unique_blocks)
    if value != int(value):
        raise ValueError(f"{name} must be whole blocks or a share in ]0, 1], got {value!r}")
    return int(value)
