"""`make bench-replay`: block accesses per second of processor time, ours and libCacheSim's.

On Mooncake's conversation trace where KV_TRACE_DIR has it, else on a generated
one. Medians of several repeats, taken in turns in one run, so that other jobs on the
machine slow all alike. Ends with one line of JSON; the report is data/reports/replay.json.
"""

import argparse
import os
import time
import timeit
from pathlib import Path

import numpy as np

from caching_heuristics import HeuristicConfig
from kvttl import user_path
from kvttl.bench.figures import machine, publish
from kvttl.replay.baselines import BaselineFile
from kvttl.replay.engine import replay, replay_without_capacity
from kvttl.replay.lru_curve import lru_curve
from kvttl.replay.runs import index_runs
from kvttl.traces.generator import agent_loops
from kvttl.traces.overlay import tiled
from kvttl.traces.reading import read_trace

REPORT = Path("data/reports/replay.json")
GOALS = {"ttl_accesses_per_s": 50e6, "tiers_accesses_per_s": 20e6, "slider_step_ms": 50.0}
_CAPACITY = 0.05  # of unique blocks
_CURVE = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5)  # capacities of lru_curve, all in one pass
_TIERS = (0.01, 0.05, 0.2)
_CONFIG = HeuristicConfig(base_ttl=100)
_OURS = "ttl ttl_with_index tiers tiers_recency tiers_with_index tiers_lru recency lru lru_curve"
_OURS = [*_OURS.split(), "lru_curve_with_index", "heuristic_order", "optimal"]
_GROWTH = (1_000_000, 10_000_000, 100_000_000)  # accesses


def bench_trace():
    """Return the conversation trace, or a generated one of the same size."""
    home = os.environ.get("KV_TRACE_DIR")
    path = user_path(home or "") / "mooncake" / "conversation_trace.jsonl"
    if home and path.exists():
        return read_trace(path)
    return agent_loops(6_000, seed=0, block_tokens=512, system_blocks=12, turn_blocks=3.0)


def median_seconds(jobs: dict, repeats: int) -> dict[str, float]:
    """Time jobs in turns, after one unmeasured call each; returns the medians."""
    for job in jobs.values():
        job()  # compiles
    seconds = {name: [] for name in jobs}
    for _ in range(repeats):
        for name, job in jobs.items():
            seconds[name].append(timeit.timeit(job, timer=time.process_time, number=1))
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
    for name in _OURS:
        figures[f"{name}_vs_libcachesim"] = figures[f"{name}_accesses_per_s"] / theirs
    figures |= {"lru_hits_equal_libcachesim": bool(same), "slider_step_ms": seconds["ttl"] * 1e3}
    return {**figures, "accesses_per_run": trace.accesses / max(index.runs, 1)}


def growth(sizes=_GROWTH, repeats: int = 3) -> list[dict[str, float]]:
    """Measure the engines on generated traces of growing size."""
    start = agent_loops(10_000, seed=1, block_tokens=64, system_blocks=16, turn_blocks=3.0)
    return [_growth_row(tiled(start, size), size, repeats) for size in sizes]


def _growth_row(trace, size, repeats):
    trace = trace.head(int(np.searchsorted(trace.offsets, size)))
    index = index_runs(trace)
    jobs = {
        "index": lambda: index_runs(trace),
        "ttl": lambda: replay_without_capacity(index, _CONFIG),
        "tiers": lambda: replay(index, "heuristic", _TIERS, _CONFIG),
        "lru": lambda: replay(trace, "lru", _CAPACITY),
    }
    seconds = {f"{name}_s": value for name, value in median_seconds(jobs, repeats).items()}
    return {"accesses": trace.accesses, "runs": index.runs, **seconds}


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark, write the report, print the figures; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--largest", type=int, default=_GROWTH[-1], help="accesses")
    parser.add_argument("--report", type=user_path, default=REPORT)
    options = parser.parse_args(argv)
    about, trace = machine("numba", "libcachesim"), bench_trace()
    figures = engines(trace, options.repeats)
    figures["growth"] = growth([size for size in _GROWTH if size <= options.largest])
    about |= {"trace": trace.name, "goals": GOALS}
    about |= {name: getattr(trace, name) for name in ("accesses", "unique_blocks")}
    publish(options.report, about, figures, list(_lines(trace, figures)))
    return 0


def _lines(trace, figures):
    yield f"{trace.name}: {trace}; {figures['accesses_per_run']:.1f} accesses a run"
    for name, value in figures.items():
        if name.endswith("accesses_per_s"):
            yield f"  {name.removesuffix('_accesses_per_s'):18} {value / 1e6:9.1f} M accesses/s"
    yield f"  one slider step    {figures['slider_step_ms']:9.2f} ms"
    for row in figures["growth"]:
        count = row["accesses"] / 1e6
        rates = [f"{name} {count / row[f'{name}_s']:.0f}" for name in ("ttl", "tiers", "lru")]
        yield f"  {count:6.1f} M accesses: {', '.join(rates)} M/s"


if __name__ == "__main__":
    raise SystemExit(main())
