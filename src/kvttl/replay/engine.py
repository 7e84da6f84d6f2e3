"""What a policy would have done on a trace, exactly.

`replay` runs any policy with a capacity for each tier, request by request.
`replay_without_capacity` answers the same for TTL policies in one pass: without
a limit, blocks hit if their gap is within the TTL given at the access before.
Both count a prompt's longest resident prefix as its hit.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from caching_heuristics import HeuristicConfig, unknown_name
from kvttl.policies import kernel
from kvttl.policies.online import OnlinePolicy
from kvttl.policies.runs import LEVELS
from kvttl.policies.state import REAL
from kvttl.replay.block_kernel import Prompts, block_rows, new_lists, replay_blocks, replay_lru
from kvttl.replay.policies import POLICIES, UNLIMITED, Plan, capacities, want_times
from kvttl.replay.result import ReplayResult
from kvttl.replay.runs import RunIndex, index_runs, whole_requests
from kvttl.replay.tier_kernel import new_state, replay_requests, work_of
from kvttl.replay.ttl_kernel import ladder_deadlines, replay_ttl
from kvttl.traces.trace import REASONS, Trace

_CHUNK = 16_384  # requests between two steps of the progress bar
_NO_LIMITS = (UNLIMITED,) * 3
STEP = 1024  # events between two steps of the progress bar
_LEVELS = slice(REAL, REAL + 3)


class Sweep(NamedTuple):
    """How LMCache makes room: not at once, but every second, above a watermark.

    Of what does not fit in between only the first chunks are stored. (LMCache stores what an
    engine's step computed or nothing of it: steps are short.) Its own defaults are 0.8 and 0.2.
    """

    every_s: float = 1.0
    watermark: float = 0.95  # share of the capacity from which on it evicts
    ratio: float = 0.05  # share of what is held that goes then


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
        An index saves grouping the trace again in each call.
    policy : str, callable or type
        One of `POLICIES`, a function (index, config) -> Plan, or a class such as
        `kvttl.policies.template.Template`.
        ``"lru"`` and ``"fifo"`` touch blocks in the prompt's order and evict at once; all
        others evict after the request, and of equals a prompt's end first.
    capacity : None, int, float or sequence of three
        Blocks of gpu, or of (gpu, disk, remote): an int is blocks, a float in
        ]0, 1] a share of the trace's unique blocks, None unlimited. With one
        value there is one tier: no ladder, and placement does not matter.
        ``"infinite"`` has no limit in any case.
    config : HeuristicConfig, optional
        Settings of the TTL policies.
    progress : bool
        Show a bar on stderr once it takes more than a second.
    sweep, ends, **metadata
        See `replay_online`; ``per`` and ``perplexity`` of `kvttl.replay.policies.decisions`.

    Raises
    ------
    ValueError
        Names the argument, its value and the range.

    Examples
    --------
    >>> from kvttl.traces.generator import agent_loops
    >>> lru, best = (replay(agent_loops(200), name, capacity=0.2) for name in ("lru", "optimal"))
    >>> lru.block_hit_ratio < best.block_hit_ratio
    True
    """
    flat = trace.trace if isinstance(trace, RunIndex) else trace
    blocks = capacities(capacity, flat)
    if (make := _online(policy, config)) is not None:
        shown = functools.partial(_with_bar, progress=progress, name=_name(policy))
        made = _made(make, flat, blocks, sweep)
        return replay_online(flat, made, _name(policy), sweep, ends, shown)
    if sweep or ends != "told":
        raise ValueError(f"sweep and ends are for policies that decide as they go, not {policy!r}")
    if policy in [name for name, row in POLICIES.items() if row.plan is None]:
        return _replay_lists(trace, flat, policy, blocks, progress)
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
    want_times(trace)
    there = [None if c == UNLIMITED else c for c in blocks]
    while len(there) > 1 and there[-1] == 0:
        there.pop()
    options = {"remember": trace.unique_blocks} if None in there else {}
    return make(there, trace.block_tokens, fit=sweep is not None, **options)


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
    key = None if plan.key is None else np.asarray(plan.key, np.float64)
    tier, limits = _tiers(plan, blocks), np.array(blocks, np.int64)
    until_s = None if plan.ttl_s is None else _deadlines(plan, tier)
    work = work_of(segments, key, tier, until_s, limits, trace.block_tokens, trace.span_s)
    for first, last in _chunks(trace, blocks, progress, name):
        replay_requests(state, work, trace.arrival_s, first, last, *hits)
    return ReplayResult(trace, name, blocks, *hits, *state.area, state.moved)


def _replay_lists(trace, flat, name, blocks, progress):
    if blocks[0] == 0 and any(blocks):
        raise ValueError(f"gpu must hold blocks for {name!r}, got capacity 0")
    if POLICIES[name].refreshes:
        return _replay_lru(whole_requests(trace), flat, name, blocks, progress)
    return _replay_blocks(flat, name, blocks, progress)


def _replay_lru(segments, trace, name, blocks, progress):
    hits, lists, level_hits = _hit_arrays(trace), new_lists(trace.requests), 0
    work = Prompts(segments, np.array(blocks, np.int64), trace.block_tokens)
    for first, last in _chunks(trace, blocks, progress, name):
        level_hits += replay_lru(lists, work, trace.arrival_s, first, last, *hits)
    return ReplayResult(trace, name, blocks, *hits, *lists.area, lists.moved, int(level_hits))


def _replay_blocks(trace, name, blocks, progress):
    hits, area, moved = _hit_arrays(trace), np.zeros((2, 3)), np.zeros((4, 4), np.int64)
    limits, held, level_hits = np.array(blocks, np.int64), np.zeros((2, 3), np.int64), 0
    arrays = (trace.block_ids, trace.offsets, trace.arrival_s, block_rows(trace), limits, held)
    for first, last in _chunks(trace, blocks, progress, name):
        level_hits += replay_blocks(*arrays, first, last, (*hits, area, moved))
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


def replay_online(
    trace: Trace,
    policy: OnlinePolicy,
    name: str = "",
    sweep: Sweep | None = None,
    ends: str = "told",
    progress=lambda steps: steps,
) -> ReplayResult:
    """Replay a trace under a policy's own caches, which it was made with.

    Parameters
    ----------
    policy : OnlinePolicy
        Fresh; made for the trace's block size.
    sweep : Sweep, optional
        LMCache's way of making room; the policy was made with ``fit=True`` then.
        By default a request is stored, and then what is too much goes.
    ends : str
        ``"told"``: a request is one instant, which tells when and how its generation will end;
        ``"due"``: that is told when it is over, which is what a live policy knows.
    """
    work = _work(trace, policy, ends)
    hits = np.zeros((trace.requests, LEVELS), np.int64)
    rules = (0.0, 1.0, 0.0) if sweep is None else tuple(sweep)
    events = len(work.events) if any(policy.limits) else 0
    for first in progress(range(0, events, STEP)):
        last = min(first + STEP, len(work.events))
        if type(policy).decide is OnlinePolicy.decide:
            play_events(policy, work, first, last, rules, hits)
        else:
            _one_by_one(policy, work, first, last, rules, hits, ends)
    return _result(trace, policy, name, hits)


def _work(trace, policy, ends):
    flat = trace if policy.KEEPS_TAILS else trace.without_tails(renumber=False)
    keys, arrival_s = flat.block_ids.astype(np.int64), trace.arrival_s
    end_s, events = arrival_s + trace.generation_s, np.arange(2 * trace.requests)
    if ends == "due":
        events = in_order_of_time(np.column_stack([arrival_s, end_s]).ravel())
    elif ends != "told":
        raise ValueError(f"ends must be 'told' or 'due', got {ends!r}")
    told = trace.prompt_tokens, trace.finish, trace.output_tokens
    whole = [values.astype(np.int64) for values in told]  # one type, compiled once
    undecided_s = np.full(trace.requests, np.inf)
    return kernel.Requests(keys, flat.offsets, arrival_s, end_s, *whole, events, undecided_s, 0)


def in_order_of_time(times_s: np.ndarray) -> np.ndarray:
    """Return events, 2 x request and + 1 for its end, in order of their times, (2 x requests,)."""
    return np.lexsort((np.arange(len(times_s)), times_s))


def play_events(
    policy: OnlinePolicy,
    work: kernel.Requests,
    first: int,
    last: int,
    rules: tuple[float, float, float],
    hits: np.ndarray,
) -> None:
    """Replay events [first, last) of requests under a policy that leaves TTLs to them, compiled."""
    requests = work.events[first:last] >> 1
    chunks = int((work.offsets[requests + 1] - work.offsets[requests]).sum())
    policy.reserve(last - first, chunks)
    state = policy.runs, policy.now, policy.rules
    kernel.play(*state, work, first, last, rules, policy.path, hits)


def _one_by_one(policy, work, first, last, rules, hits, ends):
    """Replay events as a live caller tells them; an end that is told early as of the arrival."""
    told_s = work.end_s if ends == "due" else work.arrival_s
    for at in range(first, last):
        request, is_end = work.events[at] >> 1, work.events[at] & 1
        now_s = float((told_s if is_end else work.arrival_s)[request])
        if is_end:
            told = REASONS[work.finish[request]], work.output_tokens[request]
            policy.end(request, now_s, *told)
        else:
            keys = work.keys[work.offsets[request] : work.offsets[request + 1]]
            policy.sweep(now_s, rules)
            policy.begin(keys, now_s, work.prompt_tokens[request])
            hits[request] = policy.hits
        if rules[0] == 0 and 2 * request + 1 not in work.events[at + 1 : at + 2]:
            policy.sweep(now_s, rules)


def _result(trace, policy, name, hits):
    by_level = np.zeros((trace.requests, 3), np.int64)
    by_level[:, : policy.levels] = hits[:, REAL : REAL + policy.levels]
    deepest = np.maximum.accumulate(by_level, axis=1)
    blocks = np.diff(deepest, axis=1, prepend=0)
    size, now_s = trace.block_tokens, trace.span_s
    tokens = np.minimum(deepest * size, trace.prompt_tokens[:, None])
    tokens = np.diff(tokens, axis=1, prepend=0)
    held, area = policy.held_at(now_s)
    area = np.diff(np.maximum.accumulate(area[_LEVELS]), prepend=0)
    moved = np.zeros((4, 4), np.int64)
    came = policy.now.stored[_LEVELS]
    moved[3, 0] = came[policy.levels - 1]
    for level in range(policy.levels):
        below = level + 1 if level + 1 < policy.levels else 3
        moved[level, below] = came[level] - held[REAL + level]
        moved[below, 0] += 0 if below == 3 else came[level] - came[below]
    limits = policy.limits + (0,) * (3 - policy.levels)
    return ReplayResult(trace, name, limits, blocks, tokens, area, area * size, moved * size)
