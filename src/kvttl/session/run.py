"""`make run`: an agent-like session on the real stack, every generation managed.

A few agents with a system prompt each ask questions in a seeded order; some
questions come back. Nothing is known about them but their text: perplexity,
access counts and time variance are measured. The session's clock jumps over the
think times, so that hours pass, TTLs end and KV cache goes down the ladder. At
the end stand the decisions as a table, a summary, a log and a picture.
"""

import argparse
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext

from caching_heuristics import TIERS
from kvttl import exit_status, user_path
from kvttl.decisions.log import DecisionLog, DecisionRecord, to_frame
from kvttl.decisions.metrics import DecisionMetrics
from kvttl.manager.clock import ends_on_the_way
from kvttl.manager.metadata import PERPLEXITY_SOURCES
from kvttl.session import launch
from kvttl.session.demo_model import model_path
from kvttl.session.workload import Request, session_requests
from kvttl.settings import FILE_NAME, save_settings
from kvttl.stack.config import add_inside_option, overrides_of
from tiered_caching import MultiTierCache

MAX_TOKENS = 12  # of each answer: the session is about prompts


def main(argv: Sequence[str] | None = None) -> int:
    """Run the session; returns the exit status."""
    options = _options(argv)
    launch.ends_with_parent()
    return exit_status(lambda: _run(options), "stopped; all services are down")


def _options(argv):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", default="config.yaml")
    parser.add_argument("--llm", help="model folder or hub id that is on this machine")
    parser.add_argument("--redis-url", help="use this Redis instead of the embedded one")
    launch.add_policy_option(parser)
    add_inside_option(parser)
    parser.add_argument("--generations", type=int, default=48, metavar="N")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--perplexity", choices=PERPLEXITY_SOURCES, default="prompt")
    parser.add_argument("--metrics-port", type=int, help="serve Prometheus metrics on loopback")
    parser.add_argument("--out", type=user_path, help="folder of the results (data/runs/<time>)")
    return parser.parse_args(argv)


def _run(options):
    requests = session_requests(options.generations, options.seed)
    folder = options.out or launch.new_run_folder()
    started_s, model = time.perf_counter(), model_path(options.llm)
    made = {**launch.measuring(model, options.perplexity), "policy": options.policy}
    given = overrides_of(options.config, options.inside, options.redis_url, options.policy)
    with (
        _metrics(options.metrics_port) as metrics,
        DecisionLog(folder) as log,
        launch.session_stack(options.config, **given) as stack,
        launch.engine(stack, model) as llm,
        launch.session_manager(stack, llm, log=log, metrics=metrics, **made) as cache,
    ):
        save_settings(cache.config, folder / FILE_NAME)
        rows = list(run_session(cache, requests))
    _write_pictures(folder, rows)
    print(session_table(rows))
    print(session_summary([record for _, record in rows]))
    print(f"\nWrote the decision log, timeline.png and served.png to {folder}")
    print(f"All services are stopped. Total: {time.perf_counter() - started_s:.0f} s")


@contextmanager
def _metrics(port):
    """Serve metrics while the session runs; None without a port."""
    metrics = None if port is None else DecisionMetrics()
    with metrics.serve(port) if metrics else nullcontext() as server:
        if server:
            print(f"Metrics: http://127.0.0.1:{server.port}/metrics")
        yield metrics


def run_session(
    cache: MultiTierCache, requests: Iterable[Request], progress: bool = True
) -> Iterator[tuple[Request | None, DecisionRecord]]:
    """Generate and manage each request at its arrival on the manager's `SessionClock`.

    Yields
    ------
    tuple
        A request with its record; None with the record of a TTL that ended.
    """
    from tqdm.auto import tqdm

    sampling = launch.greedy(MAX_TOKENS)
    for request in tqdm(list(requests), desc="generations", unit="prompt", disable=not progress):
        for _ in ends_on_the_way(cache, request.arrival_s):  # TTLs end when they are due
            yield from ((None, record) for record in cache.sweep())
        yield from ((None, record) for record in cache.sweep())
        (managed,) = cache.generate(request.prompt, sampling)
        # The think time until the next request is over at once.
        yield request, managed.decision.result()


def session_table(rows: Sequence[tuple[Request | None, DecisionRecord]]) -> str:
    """Return the decisions as a text table: one line a generation, one a TTL that ended."""
    lines = [
        "\n   #  time agent            kind      tokens  perpl. var. uses     TTL"
        "  hit tokens (tier)      wanted  now in               moves"
    ]
    numbers: dict[str, int] = {}
    start_s = rows[0][1].time_s - rows[0][0].arrival_s if rows and rows[0][0] else 0.0
    count = 0
    for request, record in rows:
        clock = _hours(record.time_s - start_s)
        if request is None:
            lines.append(f"     {clock} {_expiry_line(record, numbers)}")
        else:
            count += 1
            numbers[record.prompt_digest] = count
            lines.append(f"{count:4d} {clock} {_generation_line(request, record)}")
    return "\n".join(lines)


def _generation_line(request, record):
    known = {"perplexity": float("nan"), "time_variance": 0.0, "access_count": 0}
    metadata = {**known, **record.metadata}
    return (
        f"{request.agent:16} {request.kind:9} {record.prompt_tokens:6d}"
        f"  {metadata['perplexity']:6.1f} {metadata['time_variance']:4.2f}"
        f" {metadata['access_count']:4.0f} {record.ttl_s or 0:6.0f}s"
        f"  {_parts(record.hit_tokens):22} {record.wanted_tier or '?':7}"
        f" {_parts(record.tier_after):20} {record.error or _short_moves(record) or '-'}"
    )


def _expiry_line(record, numbers):
    what = f"TTL in {record.from_tier} ended" if record.kind == "expiry" else "moved later"
    moves = record.error or _short_moves(record) or "its chunks stay where others want them"
    return f"  ↓ #{numbers.get(record.prompt_digest, '?')}: {what}, {moves}"


def session_summary(records: Sequence[DecisionRecord]) -> str:
    """Return what came of a session: hits, moves, TTLs, time."""
    frame = to_frame(records)
    made = frame[frame["kind"] == "generation"]
    generations = [record for record in records if record.kind == "generation"]
    swept = [record for record in records if record.kind in ("expiry", "settled")]
    hits = {tier: made[f"hit_tokens_{tier}"].sum() for tier in (*TIERS, "none")}
    hit_share = sum(hits.values()) / max(made["prompt_tokens"].sum(), 1)
    manage_ms = made["manage_s"].quantile([0.5, 0.9]) * 1e3
    return "\n".join(
        (
            f"\n{len(made)} generations, {made['prompt_tokens'].sum()} prompt tokens,"
            f" {(made['error'] != '').sum()} not managed",
            f"  hit tokens      {sum(hits.values())} ({hit_share:.0%}): {_parts(hits) or 'none'}",
            f"  wanted tiers    {_parts(Counter(r.wanted_tier or 'none' for r in generations))}",
            f"  chunks moved    {_parts(_moved_chunks(generations)) or 'none'}",
            f"  TTLs that ended {(frame['kind'] == 'expiry').sum()}:"
            f" {_parts(_moved_chunks(swept)) or 'no move'}",
            "  TTL             p10 {:.0f} s, p50 {:.0f} s, p90 {:.0f} s".format(
                *made["ttl_s"].quantile([0.1, 0.5, 0.9])
            ),
            f"  per generation  {made['generate_s'].median() * 1e3:.0f} ms in the engine (p50);"
            " managing, in the background: {:.1f} ms (p50), {:.1f} ms (p90)".format(*manage_ms),
        )
    )


def _write_pictures(folder, rows):
    from kvttl.plots.decision_plots import plot_session, plot_timeline

    labels, kept = session_labels(rows), [record for _, record in rows]
    plot_timeline(kept, labels).savefig(folder / "timeline.png", dpi=150)
    served = [(record, label) for record, label in zip(kept, labels) if record.kind == "generation"]
    plot_session(*zip(*served)).savefig(folder / "served.png", dpi=150)


def session_labels(rows: Sequence[tuple[Request | None, DecisionRecord]]) -> list[str]:
    """Return a name for each row of a session: the agent and the kind of its prompt."""
    names = {record.prompt_digest: f"{r.agent}, {r.kind}" for r, record in rows if r is not None}
    return [names.get(record.prompt_digest, record.prompt_digest) for _, record in rows]


def _moved_chunks(records):
    moves = [move for record in records for move in record.moves]
    named = (Counter({f"{m['from']}→{m['to']} {m['status']}": m["moved_chunks"]}) for m in moves)
    return sum(named, Counter())


def _parts(counts) -> str:
    """Show counts by name, tiers hottest first, as in "gpu 3, disk 1"."""
    names = (*TIERS, *sorted(set(counts) - set(TIERS)))
    return ", ".join(f"{name} {counts[name]}" for name in names if counts.get(name))


def _hours(seconds) -> str:
    return f"{int(seconds // 3600):2d}h{int(seconds % 3600 // 60):02d}"


def _short_moves(record) -> str:
    ends = [(f"{move['from']}→{move['to']}", move["status"]) for move in record.moves]
    return ", ".join(text if how == "done" else f"{text} ({how})" for text, how in ends)


if __name__ == "__main__":
    sys.exit(main())
