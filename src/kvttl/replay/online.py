"""Replays of policies that learn and decide as they go: the same objects that run live."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from kvttl.policies import kernel
from kvttl.policies.online import CachePolicy, OnlinePolicy
from kvttl.policies.runs import LEVELS
from kvttl.policies.state import REAL
from kvttl.replay.result import ReplayResult
from kvttl.traces.trace import Trace

_STEP = 1024  # events between two steps of the progress bar
_LEVELS = slice(REAL, REAL + 3)
_REASONS = (None, "tool_calls", "stop")  # of FINISH


class Sweep(NamedTuple):
    """How LMCache makes room: not at once, but every second, above a watermark.

    What does not fit in between is not stored. Its own defaults are 0.8 and 0.2.
    """

    every_s: float = 1.0
    watermark: float = 0.95  # share of the capacity from which on it evicts
    ratio: float = 0.05  # share of what is held that goes then
    whole: bool = True  # of a prompt all is stored or nothing; False: what fits


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
        LMCache's way of making room; the policy was made with ``fit=2`` (1 if not whole) then.
        By default a request is stored, and then what is too much goes.
    ends : str
        ``"told"``: a request is one instant, which tells when and how its generation will end;
        ``"due"``: that is told when it is over, which is what a live policy knows.
    """
    work = _work(trace, policy, ends)
    hits = np.zeros((trace.requests, LEVELS), np.int64)
    rules = (0.0, 1.0, 0.0) if sweep is None else sweep[:3]
    for first in progress(range(0, len(work.events), _STEP)):
        _play(policy, work, first, min(first + _STEP, len(work.events)), rules, hits)
    return _result(trace, policy, name, hits)


def _work(trace, policy, ends):
    flat = trace if policy.KEEPS_TAILS else trace.without_tails(renumber=False)
    keys, arrival_s = flat.block_ids.astype(np.int64), trace.arrival_s
    end_s, events = arrival_s + trace.generation_s, np.arange(2 * trace.requests)
    if ends == "due":
        events = events[np.lexsort((events, np.column_stack([arrival_s, end_s]).ravel()))]
    elif ends != "told":
        raise ValueError(f"ends must be 'told' or 'due', got {ends!r}")
    told = trace.prompt_tokens, trace.finish, trace.output_tokens
    return kernel.Work(keys, flat.offsets, arrival_s, end_s, *told, events)


def _play(policy, work, first, last, rules, hits):
    if type(policy).decide is not OnlinePolicy.decide:
        _one_by_one(policy, work, first, last, rules, hits)
        return
    requests = work.events[first:last] >> 1
    chunks = int((work.offsets[requests + 1] - work.offsets[requests]).sum())
    policy.reserve(last - first, chunks)
    state = policy.runs, policy.now, policy.rules
    kernel.play(*state, work, first, last, rules, policy.path, hits)


def _one_by_one(policy, work, first, last, rules, hits):
    """Replay events as a live caller tells them."""
    for event in work.events[first:last].tolist():
        request, is_end = event >> 1, event & 1
        if is_end:
            told = _REASONS[work.finish[request]], work.output_tokens[request]
            policy.end(request, work.arrival_s[request], *told)
        else:
            keys = work.keys[work.offsets[request] : work.offsets[request + 1]]
            policy.sweep(float(work.arrival_s[request]), rules)
            policy.begin(keys, work.arrival_s[request], work.prompt_tokens[request])
            hits[request] = policy.hits
        if rules[0] == 0:
            policy.sweep(float(work.arrival_s[request]), rules)


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


def replay_any(trace: Trace, policy: CachePolicy, capacity: int, name: str = "") -> ReplayResult:
    """Replay any `CachePolicy` in one tier, chunk by chunk, as a live caller would ask it: slow."""
    held, hits = set(), np.zeros((trace.requests, 3), np.int64)
    flat = trace.without_tails(renumber=False)
    for request in range(trace.requests):
        keys = flat.request(request).astype(np.int64)
        missing = [at for at, key in enumerate(keys.tolist()) if key not in held]
        hits[request, 0] = missing[0] if missing else len(keys)
        now_s = float(trace.arrival_s[request])
        number = policy.begin(keys, now_s, int(trace.prompt_tokens[request]))
        told = _REASONS[trace.finish[request]], int(trace.output_tokens[request])
        policy.end(number, now_s + trace.generation_s[request], *told)
        held |= set(keys.tolist())
        if len(held) > capacity:
            held -= set(policy.make_room(len(held) - capacity, now_s).tolist())
    nothing = np.full(3, np.nan), np.full(3, np.nan), np.zeros((4, 4), np.int64)
    tokens = np.minimum(hits * trace.block_tokens, trace.prompt_tokens[:, None])
    return ReplayResult(trace, name, (capacity, 0, 0), hits, tokens, *nothing)
