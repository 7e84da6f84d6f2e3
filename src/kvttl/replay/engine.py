"""What a policy would have done on a trace, exactly.

`replay` runs any policy with a capacity for each tier, request by request.
`replay_without_capacity` answers the same for TTL policies in one pass: without
a limit, blocks hit if their gap is within the TTL given at the access before.
Both count a prompt's longest resident prefix as its hit.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np

from caching_heuristics import HeuristicConfig, unknown_name
from kvttl.policies import OnlinePolicy
from kvttl.replay.block_kernel import block_rows, replay_blocks
from kvttl.replay.online import Sweep, replay_online
from kvttl.replay.policies import POLICIES, UNLIMITED, Plan, capacities
from kvttl.replay.result import ReplayResult
from kvttl.replay.runs import RunIndex, index_runs
from kvttl.replay.tier_kernel import Work, new_state, replay_requests
from kvttl.replay.ttl_kernel import ladder_deadlines, replay_ttl
from kvttl.traces.trace import Trace

_CHUNK = 16_384  # requests between two steps of the progress bar
_NO_LIMITS = (UNLIMITED,) * 3


def replay(
    trace: Trace | RunIndex,
    policy: str | Callable[..., Plan] = "lru",
    capacity=None,
    config: HeuristicConfig | None = None,
    *,
    progress: bool = False,
    sweep: Sweep | None = None,
    ends: str = "told",
    **metadata,
) -> ReplayResult:
    """Replay a trace under a policy, with a capacity for each tier.

    Parameters
    ----------
    trace : Trace or RunIndex
        An index (`index_runs`) saves grouping the trace again in each call.
    policy : str, callable or type
        One of `POLICIES`, or a function (index, config) -> Plan, or a class of online policies
        such as `kvttl.policies.template.Template`.
        ``"lru"`` and ``"fifo"`` touch blocks in the prompt's order and evict at
        once, as a cache without prefixes does; all others evict after the
        request, and of equals a prompt's end first.
    capacity : None, int, float or sequence of three
        Blocks of gpu, or of (gpu, disk, remote): an int is blocks, a float in
        ]0, 1] a share of the trace's unique blocks, None unlimited. With one
        value there is one tier: no ladder, and placement does not matter.
        ``"infinite"`` has no limit in any case.
    config : HeuristicConfig, optional
        Settings of the TTL policies.
    progress : bool
        Show a bar on stderr once it takes more than a second.
    sweep, ends
        See `kvttl.replay.online.replay_online`; only for policies that decide as they go.
    **metadata
        ``per`` and ``perplexity`` of `kvttl.replay.policies.decisions`.

    Raises
    ------
    ValueError
        Names the argument, its value and the range.

    Examples
    --------
    >>> from kvttl.traces.generator import agent_loops
    >>> trace = agent_loops(200, seed=1)
    >>> results = [replay(trace, name, capacity=0.2) for name in ("lru", "optimal")]
    >>> results[0].block_hit_ratio < results[1].block_hit_ratio
    True
    """
    flat = trace.trace if isinstance(trace, RunIndex) else trace
    blocks = capacities(capacity, flat)
    make = _online(policy, config)
    if make is not None:
        online = _made(make, flat, blocks, sweep)
        steps = functools.partial(_with_bar, progress=progress, name=_name(policy))
        return replay_online(flat, online, _name(policy), sweep, ends, steps)
    if sweep is not None or ends != "told":
        raise ValueError(f"sweep and ends are for policies that decide as they go, not {policy!r}")
    if policy in [name for name, row in POLICIES.items() if row.plan is None]:
        return _replay_blocks(flat, policy, blocks, progress)
    if policy == "infinite":
        blocks = _NO_LIMITS
    plan = _plan(trace, policy, config, metadata)
    return _replay_plan(plan, _name(policy), blocks, progress)


def replay_without_capacity(
    trace: Trace | RunIndex,
    config: HeuristicConfig | None = None,
    policy: str | Callable[..., Plan] = "heuristic",
    **metadata,
) -> ReplayResult:
    """Replay a TTL policy with unlimited tiers in one pass; what sliders call.

    Equal to ``replay(trace, policy, (None, None, None), config)``.

    Raises
    ------
    ValueError
        For a policy that orders evictions (its plan has a key): nothing is evicted here.

    Examples
    --------
    >>> from kvttl.traces.generator import agent_loops
    >>> index = index_runs(agent_loops(200, seed=1))
    >>> short, long = (
    ...     replay_without_capacity(index, HeuristicConfig(base_ttl=s), "ttl") for s in (9, 900)
    ... )
    >>> short.token_hit_ratio < long.token_hit_ratio
    True
    """
    known = [name for name, row in POLICIES.items() if row.plan and not row.needs_capacity]
    if isinstance(policy, str) and policy not in known:
        raise ValueError(
            f"without capacity, policy must be one of {', '.join(known)}, got {policy!r};"
            f" `replay` takes a capacity and {', '.join(POLICIES)}"
        )
    plan = _plan(trace, policy, config, metadata)
    if plan.key is not None:
        reason = "orders evictions (its plan has a key), which needs a capacity: use `replay`"
        raise ValueError(f"policy {_name(policy)!r} {reason}")
    trace, hits = plan.index.trace, _hit_arrays(plan.index.trace)
    tier = _tiers(plan, _NO_LIMITS)
    decided = (_deadlines(plan, tier), tier)
    area, moved = replay_ttl(plan.segments, trace.arrival_s, *decided, trace.block_tokens, *hits)
    return ReplayResult(trace, _name(policy), _NO_LIMITS, *hits, *area, moved)


def _online(policy, config):
    """Return what makes a policy that decides as it goes, or None where it is not one."""
    row = POLICIES.get(policy) if isinstance(policy, str) else None
    if row is not None and row.online is not None:
        given = {"config": config or HeuristicConfig()} if row.reads_config else {}
        return functools.partial(row.online, **given)
    return policy if isinstance(policy, type) and issubclass(policy, OnlinePolicy) else None


def _made(make, trace, blocks, sweep):
    """Make a policy for a trace; without limits it forgets nothing."""
    there = [None if c == UNLIMITED else c for c in blocks]
    while len(there) > 1 and there[-1] == 0:
        there.pop()
    options = {"remember": trace.unique_blocks} if None in there else {}
    fit = 0 if sweep is None else 2 if sweep.whole else 1
    return make(there, trace.block_tokens, fit=fit, **options)


def _name(policy):
    return policy if isinstance(policy, str) else getattr(policy, "__name__", "plan")


def _plan(trace, policy, config, metadata):
    if isinstance(policy, str):
        if policy not in POLICIES:
            raise ValueError(unknown_name("policy", policy, POLICIES))
        policy = POLICIES[policy].plan
    index = trace if isinstance(trace, RunIndex) else index_runs(trace)
    return policy(index, config or HeuristicConfig(), **metadata)


def _hit_arrays(trace):
    return np.zeros((2, trace.requests, 3), np.int64)


def _tiers(plan, blocks):
    """Return each run's first tier that exists: the wanted one, else colder, else hotter."""
    wanted = np.zeros(len(plan.segments.request), np.int8) if plan.tier is None else plan.tier
    there = [tier for tier in range(3) if blocks[tier] != 0]
    if len(there) in (0, 3):
        return np.ascontiguousarray(wanted, np.int8)
    nearest = [min(there, key=lambda t: (t < tier, abs(t - tier))) for tier in range(3)]
    return np.array(nearest, np.int8)[wanted]


def _deadlines(plan, tier):
    """Return until when each segment may be in each tier, seconds, shape (segments, 3)."""
    arrival_s = plan.index.trace.arrival_s[plan.segments.request]
    ttl_s = np.full(len(arrival_s), np.inf) if plan.ttl_s is None else plan.ttl_s
    factors = np.array(plan.ladder or (1.0, 0.0, 0.0), np.float64)
    return ladder_deadlines(arrival_s, np.ascontiguousarray(ttl_s, np.float64), tier, factors)


def _replay_plan(plan, name, blocks, progress):
    segments, trace = plan.segments, plan.index.trace
    hits, state = _hit_arrays(trace), new_state(len(segments.request))
    key = np.array(segments.request if plan.key is None else plan.key, np.float64)
    tier, limits = _tiers(plan, blocks), np.array(blocks, np.int64)
    until_s = np.empty((0, 3)) if plan.ttl_s is None else _deadlines(plan, tier)
    work = Work(segments, key, tier, until_s, limits, trace.block_tokens)
    for first, last in _chunks(trace, blocks, progress, name):
        replay_requests(state, work, trace.arrival_s, first, last, *hits)
    return ReplayResult(trace, name, blocks, *hits, *state.area, state.moved)


def _replay_blocks(trace, name, blocks, progress):
    if blocks[0] == 0 and any(blocks):
        raise ValueError(f"gpu must hold blocks for {name!r}, got capacity 0")
    hits, area, moved = _hit_arrays(trace), np.zeros((2, 3)), np.zeros((4, 4), np.int64)
    limits, held, level_hits = np.array(blocks, np.int64), np.zeros((2, 3), np.int64), 0
    arrays = (trace.block_ids, trace.offsets, trace.arrival_s, block_rows(trace), limits)
    state = (POLICIES[name].refreshes, held)
    for first, last in _chunks(trace, blocks, progress, name):
        level_hits += replay_blocks(*arrays, *state, first, last, (*hits, area, moved))
    return ReplayResult(trace, name, blocks, *hits, *area, moved, int(level_hits))


def _chunks(trace, blocks, progress, name):
    """Yield (first, last) requests of each step, with a bar; none if there is no tier at all."""
    requests = trace.requests if any(blocks) else 0
    steps = [(at, min(at + _CHUNK, requests)) for at in range(0, requests, _CHUNK)]
    yield from _with_bar(steps, progress, name)


def _with_bar(steps, progress, name):
    if not progress:
        return steps
    from tqdm.auto import tqdm

    return tqdm(steps, desc=name, unit="step", delay=1)
