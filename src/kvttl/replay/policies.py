"""Policies of the replay engines, as plug-ins: a function from a trace's runs to a `Plan`.

A plan says for each run, at its access, in which tier its blocks go, until when
they may stay, and in which order they are evicted where a tier is full. To add
a policy, learned ones included, write such a function and hand it to
`kvttl.replay.engine.replay`, or add a row to `POLICIES`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from caching_heuristics import TIERS, HeuristicConfig
from kvttl.policies import Adaptive, Fixed, Formula, OnlinePolicy
from kvttl.replay.runs import RunIndex, SegmentArrays

UNLIMITED = -1  # as a capacity


@dataclass(frozen=True, eq=False)
class Plan:
    """What a policy decides about each run of an index, or each request.

    Parameters
    ----------
    index : RunIndex
        The runs; maybe cut further than those the policy was given.
    per : str
        Whether the arrays are by ``"request"`` or by ``"run"``.
    key : numpy.ndarray, optional
        Shape (n,): the lowest key is evicted first; among equal ones the
        earliest access, and of one request the deepest block. Default: recency.
    ttl_s : numpy.ndarray, optional
        Shape (n,): seconds in the first tier. Default: for ever.
    tier : numpy.ndarray, optional
        Shape (n,), indices into TIERS: the first tier. Default: gpu.
    ladder : tuple of float, optional
        Factors of the TTL in tiers that blocks come down to. Default: none, they go.

    Raises
    ------
    ValueError
        Names the array that has a wrong shape or value.

    Examples
    --------
    >>> from kvttl.traces.builder import make_trace
    >>> from kvttl.replay.engine import replay
    >>> def least_used(index, config):
    ...     return Plan(index, "run", key=index.access_count)
    >>> trace = make_trace([[0], [0], [1], [2], [0], [1]], block_tokens=1)
    >>> [int(replay(trace, p, capacity=2).hit_tokens.sum()) for p in (least_used, "lru")]
    [2, 1]
    """

    index: RunIndex
    per: str = "request"
    key: np.ndarray | None = None
    ttl_s: np.ndarray | None = None
    tier: np.ndarray | None = None
    ladder: tuple[float, float, float] | None = None

    def __post_init__(self) -> None:
        if self.per not in ("request", "run"):
            raise ValueError(f"per must be 'request' or 'run', got {self.per!r}")
        wanted = self.segments.request.shape
        for name in ("key", "ttl_s", "tier"):
            values = getattr(self, name)
            if values is not None and np.shape(values) != wanted:
                raise ValueError(f"{name} must have shape {wanted}, got {np.shape(values)}")
        if self.key is not None and np.isnan(self.key).any():
            raise ValueError("key must be numbers, got NaN")
        if self.ttl_s is not None:
            want_times(self.index.trace)
        if self.ttl_s is not None and not np.all(np.asarray(self.ttl_s) >= 0):
            raise ValueError("ttl_s must be >= 0, got a lower value or NaN")
        codes = np.zeros(1) if self.tier is None else np.asarray(self.tier)
        if not np.all((codes == 0) | (codes == 1) | (codes == 2)):
            raise ValueError(f"tier must be indices into {TIERS}")

    @property
    def segments(self) -> SegmentArrays:
        """What the engines move as one under this plan."""
        return self.index.by_request if self.per == "request" else self.index.by_run


def recency(index: RunIndex, config: HeuristicConfig) -> Plan:
    """Evict what was used least recently, a prompt's end before its start.

    Without a capacity that is to keep everything for ever: the most that any policy can hit.
    """
    return Plan(index)


def fixed_ttl(index: RunIndex, config: HeuristicConfig) -> Plan:
    """Keep everything in gpu for ``base_ttl`` seconds after its last access."""
    return Plan(index, ttl_s=np.full(index.trace.requests, config.base_ttl))


def heuristic(index: RunIndex, config: HeuristicConfig, per="request", perplexity=None) -> Plan:
    """`compute_ttl`, `select_backend` and the expiry ladder; recency where a tier is full."""
    ttl_s, tier = decisions(index, config, per, perplexity)
    ladder = tuple(config.ladder.values())
    return Plan(index, _PER[per], ttl_s=ttl_s, tier=tier, ladder=ladder)


def heuristic_order(index: RunIndex, config: HeuristicConfig, per="block", perplexity=None) -> Plan:
    """`compute_ttl` as eviction order: what would expire first goes first, and only then."""
    ttl_s, _ = decisions(index, config, per, perplexity)
    arrival_s = index.arrival_s if per == "block" else index.trace.arrival_s
    return Plan(index, _PER[per], key=arrival_s + ttl_s)


_PER = {"request": "request", "block": "run"}  # of a decision -> of a plan


def optimal(index: RunIndex, config: HeuristicConfig) -> Plan:
    """Belady's rule, knowing the future: evict what is used again last or never.

    A whole request at once: its own blocks may be evicted as soon as it is done.
    """
    cut = index.by_future
    deeper = np.where(cut.next_request < index.trace.requests, cut.depth / 2.0**21, 0.0)
    return Plan(cut, "run", key=-(cut.next_request + deeper))


class ReplayPolicy(NamedTuple):
    """What the engine, the command and the plots know of a policy."""

    plan: Callable[..., Plan] | None  # None: block by block without prefixes, or `online`
    refreshes: bool = False  # of such a list: whether a hit makes a block the newest
    needs_capacity: bool = False  # it says what to evict, not when
    reads_config: bool = False
    reads_metadata: bool = False  # it takes `per` and `perplexity`
    colour: str | None = None  # of Okabe and Ito; None = grey, with a mark of its own
    dash: str = "-"
    online: Callable[..., OnlinePolicy] | None = None  # decides as it goes: made for a capacity


def _fixed(capacity, chunk_tokens, config, **options):
    return Fixed(capacity, chunk_tokens, ttl_s=config.base_ttl, **options)


_FORMULA = {"reads_config": True, "reads_metadata": True}
POLICIES = {
    "lru": ReplayPolicy(None, refreshes=True, colour="#56B4E9", dash="--"),
    "fifo": ReplayPolicy(None, colour="#009E73", dash="--"),
    "infinite": ReplayPolicy(recency),
    "recency": ReplayPolicy(recency, needs_capacity=True, colour="#0072B2"),
    "ttl": ReplayPolicy(fixed_ttl, reads_config=True, colour="#CC79A7"),
    "heuristic": ReplayPolicy(heuristic, **_FORMULA, colour="#E69F00"),
    "heuristic_order": ReplayPolicy(
        heuristic_order, needs_capacity=True, **_FORMULA, colour="#D55E00"
    ),
    "adaptive": ReplayPolicy(None, needs_capacity=True, colour="#000080", online=Adaptive),
    "formula": ReplayPolicy(None, reads_config=True, dash=":", online=Formula),
    "fixed": ReplayPolicy(None, reads_config=True, dash=":", online=_fixed),
    "optimal": ReplayPolicy(optimal, needs_capacity=True, colour="#000000"),
}


def decisions(
    index: RunIndex,
    config: HeuristicConfig,
    per: str = "request",
    perplexity: float | np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Return `compute_ttl` (seconds) and `select_backend` (int8 codes) of requests or runs.

    Parameters
    ----------
    per : str
        ``"request"``: one decision a request, from the longest prefix seen
        before, as the live manager makes it, shape (requests,); ``"block"``: from
        each block's own history, shape (runs,).
    perplexity : float or numpy.ndarray, optional
        Of all requests or of each, shape (requests,). Traces hold none: neutral.
    """
    want_times(index.trace)
    metadata = index.metadata(per)
    if perplexity is not None:
        perplexity = np.broadcast_to(np.asarray(perplexity, float), index.trace.requests)
        metadata["perplexity"] = perplexity[index.request] if per == "block" else perplexity
    tiers = config.tier(metadata)
    codes = np.int8(1) + (tiers == TIERS[2]) - (tiers == TIERS[0])  # 1 = disk
    return config.ttl(metadata), codes


def want_times(trace) -> None:
    """Raise where what decides by time is to run on a trace of which only the order is known."""
    if not trace.timed:
        known = f"only the order of the requests of {trace.name or 'this trace'} is known"
        by_order = [name for name, row in POLICIES.items() if not (row.reads_config or row.online)]
        raise ValueError(f"{known}: TTLs need times; without run {', '.join(by_order)}")


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
    >>> from kvttl.traces.builder import make_trace
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
    if isinstance(value, (float, np.floating)) and value <= 1.0:
        return int(value * trace.unique_blocks)
    if value != int(value):
        raise ValueError(f"{name} must be whole blocks or a share in ]0, 1], got {value!r}")
    return int(value)
