"""`make bench-replay`: block accesses per second, ours and libCacheSim's, in one run.

On Mooncake's conversation trace where KV_TRACE_DIR has it, else on a generated
one. Medians of several repeats, taken in turns, so that other jobs on the machine
slow all alike. Ends with one line of JSON; the report is data/reports/replay.json.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from caching_heuristics import HeuristicConfig
from kvttl.bench.figures import machine, rounded_figures, write_json
from kvttl.replay.baselines import BaselineFile
from kvttl.replay.engine import replay, replay_without_capacity
from kvttl.replay.lru_curve import lru_curve
from kvttl.replay.runs import index_runs
from kvttl.traces.generator import agent_loops, tiled
from kvttl.traces.reading import read_trace

REPORT = Path("data/reports/replay.json")
GOALS = {"ttl_accesses_per_s": 50e6, "tiers_accesses_per_s": 20e6, "slider_step_ms": 50.0}
_CAPACITY = 0.05  # of unique blocks
_CURVE = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5)  # capacities of lru_curve, all in one pass
_TIERS = (0.01, 0.05, 0.2)
_CONFIG = HeuristicConfig(base_ttl=100)
_COMPARED = (
    "ttl",
    "ttl_with_index",
    "tiers",
    "tiers_recency",
    "recency",
    "lru",
    "lru_curve",
    "lru_curve_with_index",
)
_GROWTH = (1_000_000, 10_000_000, 100_000_000)  # accesses


def bench_trace():
    """Return the conversation trace, or a generated one of the same size."""
    home = os.environ.get("KV_TRACE_DIR")
    path = Path(home or "") / "mooncake" / "conversation_trace.jsonl"
    if home and path.exists():
        return read_trace(path)
    return agent_loops(6_000, seed=0, block_tokens=512, system_blocks=12, turn_blocks=3.0)


def median_seconds(jobs: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Time jobs in turns, after one unmeasured call each; returns the medians."""
    for job in jobs.values():
        job()  # compiles
    seconds = {name: [] for name in jobs}
    for _ in range(repeats):
        for name, job in jobs.items():
            start_s = time.perf_counter()
            job()
            seconds[name].append(time.perf_counter() - start_s)
    return {name: float(np.median(values)) for name, values in seconds.items()}


def engines(trace, repeats: int) -> dict[str, float]:
    """Measure every engine on one trace; keys end in accesses_per_s, or in ms."""
    index = index_runs(trace)
    with BaselineFile(trace) as file:
        jobs = {
            "ttl": lambda: replay_without_capacity(index, _CONFIG),
            "ttl_with_index": lambda: replay_without_capacity(index_runs(trace), _CONFIG),
            "index": lambda: index_runs(trace),
            "tiers": lambda: replay(index, "heuristic", _TIERS, _CONFIG),
            "tiers_recency": lambda: replay(index, "recency", _TIERS),
            "tiers_with_index": lambda: replay(trace, "heuristic", _TIERS, _CONFIG),
            "tiers_lru": lambda: replay(trace, "lru", _TIERS),
            "recency": lambda: replay(index, "recency", _CAPACITY),
            "lru": lambda: replay(trace, "lru", _CAPACITY),
            "lru_curve": lambda: lru_curve(index, _CURVE),
            "lru_curve_with_index": lambda: lru_curve(trace, _CURVE),
            "heuristic_order": lambda: replay(index, "heuristic_order", _CAPACITY, _CONFIG),
            "optimal": lambda: replay(index, "optimal", _CAPACITY),
            "libcachesim": lambda: file.hits("LRU", _CAPACITY),
        }
        seconds = median_seconds(jobs, repeats)
        theirs = file.hits("LRU", _CAPACITY)
        same = replay(trace, "lru", _CAPACITY).block_level_hits == theirs
        same = same and lru_curve(index, [_CAPACITY])["block_level_hits"][0] == theirs
    figures = {f"{name}_accesses_per_s": trace.accesses / s for name, s in seconds.items()}
    theirs = figures["libcachesim_accesses_per_s"]
    ratios = {
        f"{name}_vs_libcachesim": figures[f"{name}_accesses_per_s"] / theirs for name in _COMPARED
    }
    return {
        **figures,
        **ratios,
        "lru_hits_equal_libcachesim": bool(same),
        "slider_step_ms": seconds["ttl"] * 1e3,
        "accesses_per_run": trace.accesses / max(index.runs, 1),
    }


def growth(sizes=_GROWTH, repeats: int = 3) -> list[dict[str, float]]:
    """Measure the engines on generated traces of growing size."""
    start = agent_loops(10_000, seed=1, block_tokens=64, system_blocks=16, turn_blocks=3.0)
    rows = []
    for size in sizes:
        trace = tiled(start, size)
        trace = trace.head(int(np.searchsorted(trace.offsets, size)))
        index = index_runs(trace)
        jobs = {
            "index": lambda t=trace: index_runs(t),
            "ttl": lambda i=index: replay_without_capacity(i, _CONFIG),
            "tiers": lambda i=index: replay(i, "heuristic", _TIERS, _CONFIG),
            "lru": lambda t=trace: replay(t, "lru", _CAPACITY),
        }
        seconds = median_seconds(jobs, repeats)
        row = {"accesses": trace.accesses, "runs": index.runs}
        rows.append(row | {f"{name}_s": value for name, value in seconds.items()})
    return rows


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark, write the report, print the figures; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--largest", type=int, default=_GROWTH[-1], help="accesses")
    parser.add_argument("--report", type=Path, default=REPORT)
    options = parser.parse_args(argv)
    about, trace = machine("numba", "libcachesim"), bench_trace()
    figures = engines(trace, options.repeats)
    rows = growth([size for size in _GROWTH if size <= options.largest])
    report = {
        "trace": trace.name,
        "accesses": trace.accesses,
        "unique_blocks": trace.unique_blocks,
        "goals": GOALS,
        **figures,
        "growth": rows,
        **about,
    }
    write_json(options.report, report)
    _explain(trace, figures, rows)
    print(json.dumps(rounded_figures(figures | {"growth": rows})))
    return 0


def _explain(trace, figures, rows):
    print(f"{trace.name}: {trace}; {figures['accesses_per_run']:.1f} accesses a run")
    for name, value in figures.items():
        if name.endswith("accesses_per_s"):
            print(f"  {name.removesuffix('_accesses_per_s'):18} {value / 1e6:9.1f} M accesses/s")
    print(f"  one slider step    {figures['slider_step_ms']:9.2f} ms")
    for row in rows:
        rates = [
            f"{n} {row['accesses'] / row[f'{n}_s'] / 1e6:.0f}" for n in ("ttl", "tiers", "lru")
        ]
        print(f"  {row['accesses'] / 1e6:6.1f} M accesses: {', '.join(rates)} M/s")


if __name__ == "__main__":
    sys.exit(main())
