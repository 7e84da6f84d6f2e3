"""`make bench-overhead`: what managing adds to a generation, and what a decision costs.

On the real stack, seeded sessions are run once to warm up and then measured, in
turns with decisions on the caller's path ("sync") and on a worker ("background",
without waiting for it between two generations). The peer of every figure is
`llm.generate` in the same call. Then the same decisions are made without ("sync_still") and
during ("sync_sweeping") a sweep of another thread that moves 500 chunks: none should wait for
it. Ends with one line of JSON.
"""

import argparse
import threading
import time
import timeit
from pathlib import Path

import numpy as np

from caching_heuristics import compute_ttl, select_backend
from kvttl.bench.figures import machine, percentile_line, percentiles, publish, run_benchmark
from kvttl.decisions.record import DecisionRecord
from kvttl.session.demo_model import model_path
from kvttl.session.launch import ends_with_parent, engine, greedy, session_manager, session_stack
from kvttl.session.run import MAX_TOKENS
from kvttl.session.workload import session_requests

REPORT = Path("data/reports/overhead.json")
_SCALAR_CALLS = 100_000
_ARRAY_SIZE = 2_000_000
_REPEATS = 9
_TURNS = 3  # of each mode
_SWEEPS, _SWEPT_CHUNKS, _DECIDED = 10, 500, 10
_SWEPT_TOKENS = 1_600  # a prompt


def decision_costs() -> dict[str, float]:
    """Time `compute_ttl` + `select_backend`: one at a time (us), and as arrays (per second)."""
    rng = np.random.default_rng(0)
    arrays = {
        "perplexity": rng.uniform(1, 100, _ARRAY_SIZE),
        "time_variance": rng.random(_ARRAY_SIZE),
        "access_count": rng.integers(0, 100, _ARRAY_SIZE),
        "seconds_since_access": rng.uniform(0, 7200, _ARRAY_SIZE),
    }
    metadata = {name: values[0].item() for name, values in arrays.items()}

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


def timed_session(cache, requests) -> list[tuple[float, DecisionRecord]]:
    """Run a session; returns the seconds that each call took, with its decision."""
    calls, sampling = [], greedy(MAX_TOKENS)
    for request in requests:
        cache.clock.advance(request.arrival_s)
        cache.sweep()  # as the sweeper would, on its own thread
        start_s = time.perf_counter()
        (made,) = cache.generate(request.prompt, sampling)
        calls.append((time.perf_counter() - start_s, made.decision))
    return [(seconds, decision.result()) for seconds, decision in calls]


def mode_figures(name: str, calls: list[tuple[float, DecisionRecord]]) -> dict[str, float]:
    """Return percentiles (ms) of what a mode added to the calls, and of the engine's share."""
    records = [record for _, record in calls]
    called_ms, engine_ms = np.array([(s, record.generate_s) for s, record in calls]).T * 1e3
    added_ms = called_ms - engine_ms
    moved = np.array([any(move["moved_chunks"] for move in record.moves) for record in records])
    figures = {
        f"{name}_generations": len(calls),
        f"{name}_with_moves": int(moved.sum()),
        f"{name}_not_managed": sum(bool(record.error) for record in records),
        **percentiles(name, added_ms),
        **percentiles(f"{name}_engine", engine_ms),
        f"{name}_share": float(added_ms.sum() / called_ms.sum()),
    }
    if name == "sync":
        figures |= percentiles("sync_without_moves", added_ms[~moved])
        figures |= percentiles("sync_with_moves", added_ms[moved])
    return figures


def compare_modes(stack, llm, generations: int, seed: int) -> dict[str, float]:
    """Measure both modes in turns of the same length, on sessions of their own."""
    calls: dict[str, list] = {"sync": [], "background": []}
    for turn in range(2 * _TURNS + 2):
        name = ("sync", "background")[turn % 2]
        requests = session_requests(max(generations // _TURNS, 1), seed + turn)
        with session_manager(stack, llm, background=name == "background") as cache:
            timed = timed_session(cache, requests)
            calls[name] += timed if turn >= 2 else []  # the first two warm up
    return mode_figures("sync", calls["sync"]) | mode_figures("background", calls["background"])


def sweeping_figures(stack, llm, seed: int) -> dict[str, float]:
    """Return percentiles (ms) of the same decisions, sync, without and during a sweep's moves."""
    still_ms, during_ms, moved = [], [], 0
    for turn in range(_SWEEPS):
        with session_manager(stack, llm, background=False) as cache:
            still, during, swept = _decide_around_a_sweep(cache, seed + turn)
        still_ms, during_ms, moved = still_ms + still, during_ms + during, moved + swept
    counts = {"sweeping_decisions": len(during_ms), "swept_chunks": moved / _SWEEPS}
    times = percentiles("sync_still", still_ms) | percentiles("sync_sweeping", during_ms)
    return counts | times


def _decide_around_a_sweep(cache, seed):
    """Decide about the same answers before a sweep, and for as long as it goes on (ms each)."""
    sampling = greedy(MAX_TOKENS)
    count = -(-_SWEPT_CHUNKS * cache.controller.chunk_size_tokens // _SWEPT_TOKENS)
    tokens = np.random.default_rng(seed).integers(300, 2_000, (count, _SWEPT_TOKENS)).tolist()
    hot = {"perplexity": 12.0, "time_variance": 0.0}
    cache.generate([{"prompt_token_ids": each} for each in tokens], sampling, hot)
    cache.clock.advance(1e4)  # longer than their TTL, shorter than the next rung's
    prompts = [request.prompt for request in session_requests(_DECIDED, seed)]
    answers = [output for output, _ in cache.generate(prompts, sampling, hot)]

    def decide(number):
        start_s = time.perf_counter()
        cache.manage(prompts[number % _DECIDED], answers[number % _DECIDED], hot).result()
        return (time.perf_counter() - start_s) * 1e3

    still_ms = [decide(number) for number in range(2 * _DECIDED)]
    swept: list[DecisionRecord] = []
    sweep = threading.Thread(target=lambda: swept.extend(cache.sweep()))
    sweep.start()
    during_ms = []
    while sweep.is_alive():
        during_ms.append(decide(len(during_ms)))
    moved = sum(move["moved_chunks"] for record in swept for move in record.moves)
    return still_ms, during_ms, moved


def main(argv: list[str] | None = None) -> None:
    """Run the benchmark, write `REPORT`, print the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", default="config.yaml")
    parser.add_argument("--generations", type=int, default=120)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(argv)
    ends_with_parent()
    about, figures = machine(), decision_costs()
    with session_stack(options.config) as stack, engine(stack, model_path()) as llm:
        figures |= compare_modes(stack, llm, options.generations, options.seed)
        figures |= sweeping_figures(stack, llm, options.seed)
    publish(REPORT, {"seed": options.seed, **about}, figures, list(_lines(figures)))


def _lines(figures):
    for name in ("sync", "background"):
        n, moves = figures[f"{name}_generations"], figures[f"{name}_with_moves"]
        yield f"{name}: {n} generations, {moves} with moves; added to the caller, and the engine:"
        rows = [key for key in figures if key.startswith(name) and key.endswith("_p50_ms")]
        yield from (percentile_line(row.removesuffix("_p50_ms"), figures) for row in rows)
    rate = figures["array_per_s"] / 1e6
    yield f"  one decision {figures['scalar_us']:.1f} us; arrays {rate:.0f} M decisions/s\n"


if __name__ == "__main__":
    run_benchmark(main)
