"""Bills of replays: what each TTL would have cost on a trace, 5 min, 1 h, 24 h or a learned one."""

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd

from kvttl.policies import Adaptive
from kvttl.policies.hazard import EDGES_S
from kvttl.replay.costs import TierCosts
from kvttl.replay.engine import in_order_of_time, replay, replay_without_capacity
from kvttl.replay.money.tariffs import Tariff
from kvttl.replay.policies import Plan
from kvttl.replay.result import ReplayResult
from kvttl.replay.runs import RunIndex, index_runs
from kvttl.traces.trace import REASONS, Trace

TTLS_S = (300.0, 3600.0, 86_400.0)  # asked about where a tariff leaves the TTL open


def bill(result: ReplayResult, tariff: Tariff, write=1.0, rewritten=0) -> dict[str, float]:
    """Return what a replay's prompts cost, by what it is paid for.

    Parameters
    ----------
    write : float or numpy.ndarray
        What a token costs that is computed and cached, as a share; of all requests or of each.
    rewritten : int or numpy.ndarray
        Hit tokens, of each request, that were written anew to live longer.

    Returns
    -------
    dict
        computing, writing (what it costs more), reading, storage, total, and per_mtok: the total
        for a million prompt tokens. Memory is paid for until the trace's last arrival.
    """
    prompts, hits = result.trace.prompt_tokens.astype(float), result.hit_tokens.sum(axis=1)
    hits = np.where(hits >= tariff.least_tokens, hits - rewritten, 0)
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
        `learned` or `learned_choice`; "hindsight", where any TTL is on offer: the least possible.

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
            found["learned"] = learned_choice(index, tariff)
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


def learned_choice(index: RunIndex, tariff: Tariff) -> tuple[ReplayResult, np.ndarray, np.ndarray]:
    """Replay a choice among the TTLs on offer, for each request, by a hazard learned online.

    It is made when a request comes, before anybody knows how its generation will end: the TTL (or
    none) that costs least now and at the uses to come. Each comes within the longest TTL as likely
    as the hazard says; one that comes later than the TTL means writing anew. A hit keeps the TTL
    that was paid for; for a longer one it is written anew.

    Returns
    -------
    tuple
        The replay; what a computed token costs, as a share, (requests,); hit tokens that are
        written anew, (requests,).
    """
    trace, ttl_s = index.trace, np.zeros(index.runs)
    offers_s, shares = np.array([(0.0, 1.0), *sorted(tariff.writes.items())]).T
    write, rewritten = np.ones(trace.requests), np.zeros(trace.requests)
    waited_s = index.seconds_since_access
    for policy, request, keys, _, is_end in _told(trace, tariff):
        if is_end:
            continue
        rows = np.arange(index.offsets[request], index.offsets[request + 1])
        before, tokens = index.previous[rows], index.length[rows] * trace.block_tokens
        there = (before >= 0) & (waited_s[rows] <= ttl_s[before])
        hit = np.logical_and.accumulate(there)
        kept_s, new = np.where(hit, ttl_s[before], 0.0), tokens[~hit].sum()
        hazard = policy.hazards([policy.signals(keys)], running=True)[0]
        within = reuse_within(hazard, offers_s).clip(max=0.999)
        uses = within[-1] / (1 - within[-1])  # still to come, were each as likely as the next
        paid = shares + (tariff.read - shares) * within / within[-1]  # for a token of each
        anew = (tokens * hit) @ (kept_s[:, None] < offers_s)
        best = np.argmin(shares * (new + anew) - tariff.read * anew + tokens.sum() * uses * paid)
        ttl_s[rows] = np.maximum(offers_s[best], kept_s)
        write[request], rewritten[request] = shares[best], anew[best]
    return _kept(Plan(index, "run", ttl_s=ttl_s)), write, rewritten


def reuse_within(hazard: np.ndarray, ttls_s: np.ndarray) -> np.ndarray:
    """Return how likely a use comes within each TTL, (ttls,), by a hazard a second, (BINS,)."""
    ends_s = np.append(EDGES_S[1:], np.inf)
    spent_s = np.clip(ttls_s[:, None], EDGES_S, ends_s) - EDGES_S
    return 1 - np.exp(-spent_s @ hazard)


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
