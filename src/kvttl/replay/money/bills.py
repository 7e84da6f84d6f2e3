"""Bills of replays: what each TTL would have cost on a trace, 5 min, 1 h, 24 h or a learned one."""

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd

from kvttl.policies import Adaptive
from kvttl.replay.costs import TierCosts
from kvttl.replay.engine import in_order_of_time, replay, replay_without_capacity
from kvttl.replay.money.tariffs import Tariff
from kvttl.replay.policies import Plan
from kvttl.replay.result import ReplayResult
from kvttl.replay.runs import RunIndex, index_runs
from kvttl.traces.trace import REASONS, Trace

TTLS_S = (300.0, 3600.0, 86_400.0)  # asked about where a tariff leaves the TTL open


def bill(result: ReplayResult, tariff: Tariff, write=1.0) -> dict[str, float]:
    """Return what a replay's prompts cost, by what it is paid for.

    Parameters
    ----------
    write : float or numpy.ndarray
        What a token costs that is computed and cached, as a share; of all requests or of each.

    Returns
    -------
    dict
        computing, writing (what it costs more), reading, storage, total, and per_mtok: the total
        for a million prompt tokens. Memory is paid for until the trace's last arrival.
    """
    prompts, hits = result.trace.prompt_tokens.astype(float), result.hit_tokens.sum(axis=1)
    hits = np.where(hits >= tariff.least_tokens, hits, 0)
    written = np.where(prompts >= tariff.least_tokens, prompts - hits, 0)
    token = tariff.input_per_mtok / 1e6
    parts = {
        "computing": (tariff.computing(prompts) - tariff.computing(hits)).sum(),
        "writing": ((np.asarray(write) - 1) * written).sum() * token,
        "reading": hits.sum() * tariff.read * token,
        "storage": result.token_seconds.sum() / 3600 * tariff.storage_per_mtok_hour / 1e6,
    }
    parts["total"] = sum(parts.values())
    parts["per_mtok"] = parts["total"] / max(prompts.sum(), 1) * 1e6
    return {name: float(value) for name, value in parts.items()}


def money_table(
    trace: Trace | RunIndex,
    tariffs: Mapping[str, Tariff],
    policies: Sequence[str] = (),
    capacity=None,
) -> pd.DataFrame:
    """Return what a trace costs under each tariff with each TTL that it offers, and a learned one.

    Parameters
    ----------
    policies, capacity
        Others to bill, as of `kvttl.replay.engine.replay`.

    Returns
    -------
    pandas.DataFrame
        A row a tariff and policy: tariff, policy, token_hit_ratio, mean_gib_held, and what `bill`
        returns. "no cache"; fixed TTLs since the last use, without a limit of room; "learned": of
        `learned` or `leader`; "hindsight", where any TTL is on offer: the least possible.

    Examples
    --------
    >>> from datetime import date
    >>> from kvttl.traces.generator import agent_loops
    >>> terms = {"source": "a page", "read_on": date(2026, 6, 17), "read": 0.1}
    >>> rented = Tariff(**terms, input_per_mtok=3.0, storage_per_mtok_hour=1.0)
    >>> table = money_table(agent_loops(50), {"rented": rented}).set_index("policy")
    >>> bool(table.total["hindsight"] <= table.total["5 min"] <= table.total["no cache"])
    True
    """
    index, rows = trace if isinstance(trace, RunIndex) else index_runs(trace), []
    ttls_s = sorted({*TTLS_S, *(float(s) for tariff in tariffs.values() for s in tariff.writes)})
    all_s = {ttl_s: np.full(index.trace.requests, ttl_s) for ttl_s in ttls_s}
    fixed = {ttl_s: _kept(Plan(index, ttl_s=each_s)) for ttl_s, each_s in all_s.items()}
    others = {name: (replay(index, name, capacity),) for name in policies}
    nothing = replay(index, "recency", 0)
    for name, tariff in tariffs.items():
        writes = tariff.writes or dict.fromkeys(ttls_s, 1.0)
        found = {"no cache": (nothing,)}
        found |= {ttl_name(ttl_s): (fixed[ttl_s], share) for ttl_s, share in writes.items()}
        if tariff.writes:
            found["learned"] = leader(index, tariff, fixed)
        else:
            found |= others | {"learned": (_kept(learned(index, tariff)),)}
            found["hindsight"] = (_kept(hindsight(index, tariff)),)
        for policy, (result, *paid) in found.items():
            held = result.token_seconds.sum() / max(index.trace.span_s, 1e-9)
            row = {"tariff": name, "policy": policy, "token_hit_ratio": result.token_hit_ratio}
            row["mean_gib_held"] = held * tariff.bytes_per_token / 2**30
            rows.append(row | bill(result, tariff, *paid))
    order = ["no cache", *map(ttl_name, ttls_s), *others, "learned", "hindsight"]
    table = pd.DataFrame(rows)
    table["policy"] = pd.Categorical(table["policy"], order)
    return table.assign(tariff=pd.Categorical(table["tariff"], list(tariffs)))


def _kept(plan):
    return replay_without_capacity(plan.index, policy=lambda index, config: plan)


def ttl_name(ttl_s: float) -> str:
    """Return how people call a TTL: ``5 min``, ``24 h``."""
    return f"{ttl_s / 60:g} min" if ttl_s < 3600 else f"{ttl_s / 3600:g} h"


def hindsight(index: RunIndex, tariff: Tariff) -> Plan:
    """Keep what is used again before its storage costs more than computing it then would save."""
    cut = index.by_future
    arrival_s = np.append(index.trace.arrival_s, np.inf)
    wait_s = arrival_s[cut.next_request] - cut.arrival_s
    saved = 1 + cut.depth * index.trace.block_tokens / tariff.attention_tokens - tariff.read
    rent = tariff.storage_per_mtok_hour / 3600 / tariff.input_per_mtok  # a second
    with np.errstate(invalid="ignore"):
        return Plan(cut, "run", ttl_s=np.where(wait_s * rent <= saved, wait_s, 0.0))


def learned(index: RunIndex, tariff: Tariff) -> Plan:
    """Keep what `Adaptive` would, from a cold start, at a tariff where any TTL is on offer.

    Asked when a generation ends; the tariff's storage is the price of a place.
    """
    ttl_s = np.zeros(index.runs)
    for policy, request, keys, now_s, is_end in _told(index.trace, tariff):
        rows = slice(index.offsets[request], index.offsets[request + 1])
        if is_end and len(keys):
            left_s = policy.ask_index(keys, now_s).ttl_s[index.depth[rows].clip(max=len(keys) - 1)]
            ttl_s[rows] = np.where(left_s > 0, now_s - index.trace.arrival_s[request] + left_s, 0.0)
    return Plan(index, "run", ttl_s=ttl_s)


def leader(
    index: RunIndex, tariff: Tariff, fixed: Mapping[float, ReplayResult]
) -> tuple[ReplayResult, np.ndarray]:
    """Replay a choice among the TTLs on offer: the one, or none, that would have cost least so far.

    It is made for each request as it comes. A hit keeps the TTL that was paid for.

    Parameters
    ----------
    fixed : mapping of float to ReplayResult
        What each TTL on offer hits.

    Returns
    -------
    tuple
        The replay, and what a token costs that is computed then, as a share, (requests,).
    """
    offers_s, shares = np.array([(0.0, 1.0), *sorted(tariff.writes.items())]).T
    cost = [index.trace.prompt_tokens.astype(float)]
    for ttl_s, share in zip(offers_s[1:], shares[1:]):
        hits = fixed[ttl_s].hit_tokens.sum(axis=1)
        cost.append(share * cost[0] + (tariff.read - share) * hits)
    chosen = np.argmin(np.cumsum(cost, axis=1) - cost, axis=0)
    ttl_s, waited_s = offers_s[chosen[index.request]], index.seconds_since_access
    last, whole = -1, True
    for run, (request, before) in enumerate(zip(index.request.tolist(), index.previous.tolist())):
        whole = (whole or request != last) and before >= 0 and waited_s[run] <= ttl_s[before]
        ttl_s[run], last = ttl_s[before] if whole else ttl_s[run], request
    return _kept(Plan(index, "run", ttl_s=ttl_s)), shares[chosen]


def _told(trace, tariff):
    """Tell an `Adaptive` of a trace, in order of time, and yield it after each event."""
    flat, end_s = trace.without_tails(renumber=False), trace.arrival_s + trace.generation_s
    costs = TierCosts(  # of one tier, in which a token is a GiB
        bytes_per_token=2.0**30,
        prefill_tokens_per_s=1.0,
        bytes_per_s=(2.0**30 / max(tariff.read, 1e-9),) * 3,
        engine_price_per_hour=3600 * tariff.input_per_mtok,
        price_per_gib_hour=(tariff.storage_per_mtok_hour,) * 3,
    )
    rules = {"deeper": 1 / tariff.attention_tokens, "remember": trace.unique_blocks}
    policy = Adaptive(None, trace.block_tokens, costs=costs, **rules)
    times_s = np.column_stack([trace.arrival_s, end_s]).ravel()
    for event in in_order_of_time(times_s):
        request, is_end, now_s = event >> 1, event & 1, float(times_s[event])
        keys = flat.request(request).astype(np.int64)
        if is_end:
            told = REASONS[trace.finish[request]], int(trace.output_tokens[request])
            policy.end(request, now_s, *told)
        else:
            policy.begin(keys, now_s, int(trace.prompt_tokens[request]))
        yield policy, request, keys, now_s, is_end


def break_even(
    tariff: Tariff, prompt_tokens: Sequence[float] = (1_000, 10_000, 100_000)
) -> pd.DataFrame:
    """Return for how long a prompt is worth keeping, by its size.

    Where TTLs are on offer, a prompt is kept by reading it once a TTL.

    Returns
    -------
    pandas.DataFrame
        A row a size and TTL on offer: prompt_tokens, ttl ("any" where all are); computing, writing
        (what caching costs more) and reading it; uses: hits that pay for writing; longest_s:
        from this wait for the next use on, computing it then is cheaper; inf: storage is free.
    """
    rows, whole = [], np.asarray(prompt_tokens, float)
    computing, token = tariff.computing(whole), tariff.input_per_mtok / 1e6
    reading = whole * tariff.read * token
    gain = np.where(whole >= tariff.least_tokens, computing - reading, 0.0).clip(0.0)
    for ttl_s, share in sorted(tariff.writes.items()) or [(None, 1.0)]:
        writing = whole * (share - 1) * token
        held = whole * tariff.storage_per_mtok_hour / 3.6e9  # a second
        held = reading / ttl_s if ttl_s else held
        with np.errstate(divide="ignore", invalid="ignore"):
            longest_s = np.where(gain > 0, (gain + writing) / held, 0.0)
            uses = np.where(writing > 0, writing / gain, 0.0)
        columns = {"prompt_tokens": prompt_tokens, "ttl": ttl_name(ttl_s) if ttl_s else "any"}
        columns |= {"computing": computing, "writing": writing, "reading": reading}
        rows.append(pd.DataFrame(columns | {"uses": uses, "longest_s": longest_s}))
    return pd.concat(rows, ignore_index=True)
