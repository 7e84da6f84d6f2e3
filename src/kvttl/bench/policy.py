"""`make bench-policy`: what policies hit, by trace and capacity, and what deciding costs.

On real traces where KV_TRACE_DIR has them, else on the sample. Hits are those of the second half
of a trace's time; intervals are 95 % of a bootstrap over sessions. Ends with one line of JSON;
the report is data/reports/policy.json.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from kvttl.bench.figures import machine, publish
from kvttl.policies import FAMILIES
from kvttl.policies.adaptive import Adaptive
from kvttl.policies.runs import N_KEYS, N_RUNS
from kvttl.policies.state import REAL
from kvttl.replay.baselines import BASELINES, replay_baseline
from kvttl.replay.engine import Sweep, replay, replay_online
from kvttl.replay.result import ReplayResult
from kvttl.replay.runs import index_runs
from kvttl.traces.builder import make_trace
from kvttl.traces.generator import agent_loops
from kvttl.traces.overlay import in_chunks_of, overlaid, picked
from kvttl.traces.reading import read_trace
from kvttl.traces.trace import COLUMNS, Trace

REPORT = Path("data/reports/policy.json")
GOALS = {"sweep_ms_1m": 20.0, "sweep_ms_1m_separate": 60.0, "state_bytes_per_chunk": 64.0}
GOALS |= {"learn_us_per_request": 200.0, "accesses_per_s": 5e6}
SHARES = (0.005, 0.01, 0.02, 0.05, 0.10, 0.20)  # of the unique blocks
POLICIES = ("recency", "formula", "heuristic_order", "adaptive", "optimal")
DUE = "adaptive, ends when due"  # as a live policy learns of ends: when they are over
_COMPARED_ACCESSES = 2_000_000  # libCacheSim's policies take minutes on longer traces
_HOUR_S = 3600.0
_SAMPLE = Path("data/sample_trace.jsonl.gz")


def traces(sessions: int = 120, seed: int = 0) -> Iterator[Trace]:
    """Yield the traces of the table: conversation, agentic A and B, and a mix of both.

    Agentic: each 120 sessions with starts spread over 4 hours, cut at 8. Mix: the conversation
    over 240 sessions with starts spread over two hours, in its second hour, in chunks alike.
    """
    home = Path(os.environ.get("KV_TRACE_DIR") or "nowhere")
    conversation, folder = home / "mooncake" / "conversation_trace.jsonl", home / "weka-agentic"
    chat = read_trace(conversation) if conversation.exists() else None
    if chat:
        yield chat
    files = sorted(folder.glob("*.json.gz"))
    singles = [read_trace(f, subagent_times="relative") for f in files[: 2 * sessions]]
    for name, first in (("agentic A", 0), ("agentic B", sessions)):
        if some := singles[first : first + sessions]:
            yield _spread(some, 4 * _HOUR_S, 8 * _HOUR_S, seed, name)
    if chat and singles:
        yield _mix(chat, _spread(singles, 2 * _HOUR_S, 4 * _HOUR_S, seed, "mix"))
    if not chat and not singles:
        yield read_trace(_SAMPLE)


def _spread(singles, starts_s, horizon_s, seed, name):
    starts = np.random.default_rng(seed).uniform(0, starts_s, len(singles))
    late = [np.flatnonzero(t.arrival_s + s < horizon_s) for t, s in zip(singles, starts)]
    some = [(t.head(len(rows)), s) for t, s, rows in zip(singles, starts, late) if len(rows)]
    trace = overlaid(*zip(*some), name)
    return picked(trace, np.flatnonzero(trace.blocks))


def _mix(chat, agentic):
    """Return a conversation and what agents do in their second hour, in chunks of one size."""
    chunks = in_chunks_of(agentic, 512 // agentic.block_tokens)
    chunks = picked(chunks, np.flatnonzero(chunks.blocks))
    since_s = chunks.arrival_s - _HOUR_S
    hour = np.flatnonzero((since_s >= 0) & (since_s < chat.span_s))
    return overlaid([chat, picked(chunks, hour)], [0.0, float(since_s[hour[0]])], "mix")


def hit_table(trace: Trace, shares: Sequence[float] = SHARES, policies=POLICIES) -> list[dict]:
    """Return a row a policy and share: token hits, gain over recency, share of the gap closed."""
    index, rows = index_runs(trace), []
    for share in shares:
        results = {name: replay(index, name, share) for name in policies}
        results[DUE] = replay(index, "adaptive", share, ends="due")
        if trace.accesses <= _COMPARED_ACCESSES:
            best = best_baseline(trace, share)
            results[f"{best.policy}, libCacheSim's best"] = best
        low, high = (_second_half(results[name]) for name in ("recency", "optimal"))
        for name, result in results.items():
            hit = _second_half(result)
            row = {"trace": trace.name, "share": share, "policy": name, "token_hits": hit}
            row["gain"] = bootstrap(result, results["recency"])
            rows.append(row | {"gap_closed": (hit - low) / (high - low) if high > low else 0.0})
    return rows


def best_baseline(trace: Trace, share: float) -> ReplayResult:
    """Return what that policy of libCacheSim does which hits most, the optimum left out."""
    names = [name for name in BASELINES if name != "Belady"]
    results = [replay_baseline(trace, name, share) for name in names]
    return max(results, key=lambda result: np.nan_to_num(_second_half(result)))


def in_lmcache(trace: Trace, shares: Sequence[float] = SHARES, sweep: Sweep | None = None):
    """Return the same of recency and adaptive where room is made as LMCache does."""
    rows, how = [], {"sweep": sweep or Sweep()}
    for share in shares:
        old = replay(trace, FAMILIES["recency"], share, **how)
        cell = {"trace": trace.name, "share": share, "recency": _second_half(old)}
        for name, ends in (("adaptive", "told"), (DUE, "due")):
            new = replay(trace, "adaptive", share, ends=ends, **how)
            hits = {"policy": name, "token_hits": _second_half(new), "gain": bootstrap(new, old)}
            rows.append(cell | hits)
    return rows


def _second_half(result):
    return result.since(result.trace.span_s / 2)["token_hit_ratio"]


def bootstrap(
    result: ReplayResult, other: ReplayResult, draws: int = 1000, seed: int = 0
) -> list[float]:
    """Return the 95 % interval of the gain in token hits of the second half, over sessions."""
    trace = result.trace
    late = trace.arrival_s >= trace.span_s / 2
    _, session = np.unique(trace.sessions[late], return_inverse=True)
    more = (result.hit_tokens - other.hit_tokens).sum(axis=1)[late]
    gains, sizes = (np.bincount(session, v) for v in (more, trace.prompt_tokens[late]))
    rng, drawn = np.random.default_rng(seed), []
    for _ in range(draws):
        some = rng.integers(0, len(gains), len(gains))
        drawn.append(gains[some].sum() / max(sizes[some].sum(), 1))
    return np.percentile(drawn, [2.5, 97.5]).tolist()


def speeds(chunks: int = 1_000_000, repeats: int = 9) -> dict[str, float]:
    """Measure sweeps over so many resident chunks, state, and what a request costs."""
    loops = agent_loops(chunks // 70, seed=1, block_tokens=64, system_blocks=64, turn_blocks=60.0)
    _filled(loops.head(100))  # compiles
    start_s = time.perf_counter()
    agentic = _filled(loops)
    figures = {"learn_us_per_request": 1e6 * (time.perf_counter() - start_s) / loops.requests}
    held, known = int(agentic.runs.counter[REAL]), agentic.runs.size
    state_bytes = int(known[N_RUNS]) * agentic.runs.run.itemsize + 8 * int(known[N_KEYS])
    figures["state_bytes_per_chunk"] = state_bytes / held
    figures["sweep_ms_1m"] = _sweep_ms(agentic, repeats) * chunks / held
    return figures | {"sweep_ms_1m_separate": _sweep_ms(_filled(_separate(chunks)), repeats)}


def _filled(trace):
    """Return a policy that was told of a trace, and holds all of it."""
    policy = Adaptive(2 * trace.unique_blocks, trace.block_tokens)
    replay_online(trace, policy)
    return policy


def _separate(chunks):
    """Return a trace of requests of one chunk each, all different."""
    one, ids = make_trace([[0]], block_tokens=64), np.arange(chunks, dtype=np.int32)
    columns = {name: np.repeat(getattr(one, name), chunks) for name in tuple(COLUMNS)[2:]}
    columns |= {"arrival_s": ids / 1000.0, "offsets": np.arange(chunks + 1), "block_ids": ids}
    return replace(one, **columns, unique_blocks=chunks)


def _sweep_ms(policy, repeats):
    """Return the median of sweeps that each take 1 % of what is held, by the index."""
    policy.now.duel[2] = 1
    took = []
    for _ in range(repeats + 1):
        chunks = int(policy.runs.counter[REAL]) // 100
        start_s = time.perf_counter()
        policy.make_room(chunks, float(policy.now.clock[0]) + 1.0)
        took.append(1e3 * (time.perf_counter() - start_s))
    return float(np.median(took[1:]))


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark, write the report, print the figures; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shares", type=float, nargs="*", default=list(SHARES))
    parser.add_argument("--sessions", type=int, default=120, help="of each agentic trace")
    parser.add_argument("--chunks", type=int, default=1_000_000, help="resident in a sweep")
    parser.add_argument("--report", type=Path, default=REPORT)
    options = parser.parse_args(argv)
    about = machine("numba", "libcachesim") | {"goals": GOALS, "seeds": {"starts": 0, "draws": 0}}
    rows, lazy, rates = [], [], []
    for trace in traces(options.sessions):
        print(f"{trace.name}: {trace}", file=sys.stderr)
        rows += hit_table(trace, options.shares)
        lazy += in_lmcache(trace, options.shares)
        start_s = time.perf_counter()
        replay(trace, "adaptive", options.shares[0])
        rates.append(trace.accesses / (time.perf_counter() - start_s))
    figures = gap_summary(rows, lazy) | speeds(options.chunks) | {"accesses_per_s": max(rates)}
    tables = {"rows": rows, "lmcache": lazy}  # in the report only
    publish(options.report, about | tables, figures, policy_lines(rows, lazy))
    return 0


def gap_summary(rows: Sequence[dict], lazy: Sequence[dict] = ()) -> dict:
    """Return the gap closed by trace and share, and the worst loss to recency, with its place."""
    closed, losses = {"adaptive": {}, DUE: {}}, {}
    hits = {(r["trace"], r["share"], r["policy"]): r["token_hits"] for r in rows}
    for row in (row for row in rows if row["policy"] in closed):
        closed[row["policy"]].setdefault(row["trace"], {})[f"{row['share']:g}"] = row["gap_closed"]
        low = hits[row["trace"], row["share"], "recency"]
        losses["at once", row["trace"], row["share"], row["policy"]] = low - row["token_hits"]
    for row in lazy:
        cell = row["trace"], row["share"], row["policy"]
        losses["in LMCache's regime", *cell] = row["recency"] - row["token_hits"]
    worst = max(losses, key=losses.get)
    summary = {"gap_closed": closed["adaptive"], "gap_closed_due": closed[DUE]}
    return summary | {"worst_below_lru": max(losses[worst], 0.0), "worst_at": list(worst)}


def policy_lines(rows: Sequence[dict], lazy: Sequence[dict]) -> list[str]:
    """Return the tables for a reader."""
    out = []
    for row in rows:
        low, high = row["gain"]
        cell = f"{row['trace']:20} {row['share']:6.1%} {row['policy']:24} {row['token_hits']:.4f}"
        out.append(f"{cell}  [{low:+.4f} {high:+.4f}]  closes {row['gap_closed']:6.1%}")
    for row in lazy:
        hits = f"recency {row['recency']:.4f}, {row['policy']} {row['token_hits']:.4f}"
        out.append(f"{row['trace']:20} {row['share']:6.1%} in LMCache's regime: {hits}")
    return out


if __name__ == "__main__":
    sys.exit(main())
