"""`make bench-meter`: how far the meter's sampled caches are from full ones, and what it costs.

Errors on real traces where KV_TRACE_DIR has them, else on the sample, at shares of the unique
blocks: each policy's hit ratio as the meter counts it, minute by minute, against one replay of the
whole trace without a sample. Cost: decisions of one machine's traffic through `RegretMeter`. Ends
with one line of JSON; the report is data/reports/meter.json.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from pathlib import Path

import numpy as np

from caching_heuristics import HeuristicConfig
from kvttl.bench.figures import machine, publish
from kvttl.bench.policy import traces
from kvttl.decisions.metrics import DecisionMetrics
from kvttl.decisions.record import DecisionRecord
from kvttl.lmcache.layout import chunk_key
from kvttl.meter.live import _SAMPLED_CHUNKS as SAMPLED_CHUNKS
from kvttl.meter.live import OPTIMUM, RegretMeter
from kvttl.meter.shadows import POLICIES, Asked, Shadows
from kvttl.policies import Adaptive, Fixed, Formula, Recency
from kvttl.replay.engine import Sweep, replay, replay_online
from kvttl.replay.runs import index_runs
from kvttl.traces.trace import REASONS

REPORT = Path("data/reports/meter.json")
GOALS = {"worst_error": 0.01, "core_share_at_50_per_s": 0.01}
SHARES = (0.02, 0.10)
_PLAIN = {"lru": Recency, "fixed_5m": Fixed, "fixed_1h": Fixed, "formula": Formula}
_PLAIN |= {"adaptive": Adaptive}


def full_ratios(trace, chunks: int) -> dict[str, float]:
    """Return each policy's token hit ratio with all chunks, in one replay of the whole trace."""
    tokens, ratios = int(trace.prompt_tokens.sum()), {}
    trace = trace.without_tails()
    for name, make in _PLAIN.items():
        options = {"ttl_s": POLICIES[name][1]} if make is Fixed else {}
        policy = make(chunks, trace.block_tokens, fit=True, **options)
        result = replay_online(trace, policy, sweep=Sweep(), ends="due")
        ratios[name] = result.hit_blocks.sum() * trace.block_tokens / tokens
    best = replay(trace, "optimal", chunks)
    return ratios | {OPTIMUM: best.hit_blocks.sum() * trace.block_tokens / tokens}


def asked_of(trace, seed: int) -> list[Asked]:
    """Return a trace's requests as a manager tells them: by their ends, keys as hashes."""
    keys = np.random.default_rng(seed).integers(-(2**63), 2**63, trace.unique_blocks)
    whole = trace.without_tails(renumber=False)
    ttl_s = HeuristicConfig().ttl(index_runs(trace.without_tails()).metadata())
    ends_s = trace.arrival_s + trace.generation_s
    return [
        Asked(
            keys[whole.request(at)],
            float(trace.arrival_s[at]),
            float(ends_s[at]),
            int(trace.prompt_tokens[at]),
            REASONS[trace.finish[at]],
            int(trace.output_tokens[at]),
            float(ttl_s[at]),
        )
        for at in np.argsort(ends_s, kind="stable")
    ]


def metered_ratios(trace, chunks: int, sampled: int = SAMPLED_CHUNKS, seed: int = 0):
    """Return the same as the meter counts it, and one of how many chunks it has followed."""
    shadows = Shadows(chunks, trace.block_tokens, sampled)
    asked, hit = dict.fromkeys([*POLICIES, OPTIMUM], 0.0), dict.fromkeys([*POLICIES, OPTIMUM], 0.0)

    def count(found):
        for name, tokens in found.items():
            asked[name] += tokens.asked
            hit[name] += tokens.hit

    requests = asked_of(trace, seed)
    minutes = np.array([each.end_s // 60 for each in requests])
    for first, last in zip(*(lambda cuts: (cuts[:-1], cuts[1:]))(_cuts(minutes))):
        count(shadows.play(requests[first:last]))
        if best := shadows.optimum(requests[last - 1].end_s):
            count({OPTIMUM: best})
    if best := shadows.optimum(math.inf):
        count({OPTIMUM: best})
    return {name: hit[name] / asked[name] for name in asked}, 2**shadows.bits


def _cuts(minutes):
    return [0, *(np.flatnonzero(np.diff(minutes)) + 1), len(minutes)]


def errors(trace, shares=SHARES, seeds=(0, 1)) -> list[dict]:
    """Return a row a share, seed and policy: full ratio, the meter's, and how far it is off."""
    rows = []
    for share in shares:
        chunks = int(share * trace.unique_blocks)
        full = full_ratios(trace, chunks)
        for seed in seeds:
            metered, one_of = metered_ratios(trace, chunks, seed=seed)
            for name, ratio in full.items():
                row = {"trace": trace.name, "share": share, "chunks": chunks, "one_of": one_of}
                row |= {"seed": seed, "policy": name, "full": ratio, "metered": metered[name]}
                rows.append(row | {"error": metered[name] - ratio})
            if one_of == 1:  # every chunk is followed: no seed matters
                break
    return rows


class _Room:
    """Stands for a controller: so much room, and no server."""

    chunk_size_tokens, model = 256, "a model"

    def __init__(self, chunks):
        self.room_chunks = lambda: (chunks, None, None)

    def chunk_bytes(self):
        return 32 * 2**20

    def held_chunks(self):
        return {"gpu": 1_000}


def core_share(
    chunks: int = 8_192, per_s: float = 50.0, minutes: int = 20, prompt_chunks: int = 24
):
    """Return the share of a core that so many decisions a second take: sessions that grow.

    A session's turn adds two chunks to what it has, after a system prompt of four that all share;
    at `prompt_chunks` a new session takes its place.
    """
    rng, now_s, number, sessions = np.random.default_rng(0), 1.7e9, 0, []
    shared = [chunk_key(rng.bytes(32).hex(), "") for _ in range(4)]
    sessions = [list(shared) for _ in range(1_000)]
    meter = RegretMeter(_Room(chunks), HeuristicConfig(), DecisionMetrics(), every_s=1e6)
    spent_s = counted = 0.0
    for minute in range(minutes):
        records = []
        for _ in range(int(60 * per_s)):
            at, now_s = int(rng.integers(len(sessions))), now_s + 1 / per_s
            keys = sessions[at] = sessions[at] + [rng.bytes(32).hex() for _ in range(2)]
            tokens = 256 * len(keys) + int(rng.integers(256))
            what = {"chunk_keys": tuple(keys), "prompt_tokens": tokens, "generate_s": 2.0}
            what |= {"output_tokens": 200, "finish_reason": "stop", "wanted_tier": "gpu"}
            what["metadata"] = {"perplexity": 12.0, "time_variance": 0.1, "access_count": 3.0}
            records.append(DecisionRecord(now_s, f"{number}", ttl_s=60.0, **what))
            if len(keys) >= prompt_chunks:
                sessions[at] = list(shared)
        start_s = time.process_time()
        for record in records:
            meter.observe(record)
        meter.measure()
        if minute >= 2:  # the first compile
            spent_s, counted = spent_s + time.process_time() - start_s, counted + len(records)
    meter.close()
    assert meter.failures == 0
    return spent_s / (counted / per_s), 2**meter._shadows.bits


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark, write the report, print the figures; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--report", type=Path, default=REPORT)
    options = parser.parse_args(argv)
    about, rows = machine("numba") | {"goals": GOALS}, []
    share, one_of = core_share()
    figures = {"core_share_at_50_per_s": share, "that_sample_one_of": one_of}
    figures["sampled_chunks"] = SAMPLED_CHUNKS
    for trace in traces():
        print(f"{trace.name}: {trace}", file=sys.stderr)
        rows += errors(trace)
        print(f"  worst {max(abs(row['error']) for row in rows):.4f}", file=sys.stderr)
    figures["worst_error"] = max(abs(row["error"]) for row in rows)
    lines = [
        f"{row['trace']:24} {row['share']:4.0%} 1 of {row['one_of']:2} seed {row['seed']} "
        f"{row['policy']:9} full {row['full']:.4f} metered {row['metered']:.4f}"
        for row in rows
    ]
    publish(options.report, about | {"rows": rows}, figures, lines)
    return 0


if __name__ == "__main__":
    sys.exit(main())
