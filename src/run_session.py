"""`make run`: an agent-like session on the real stack, every generation managed.

A few agents with a system prompt each ask questions in a seeded order; some
questions come back, and each kind of question has its own metadata. At the end
stand the decisions as a table, a summary, a JSON-lines file and a picture.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from cache_controller import LMCacheController
from caching_heuristics import TIERS, HeuristicConfig
from decision_log import DecisionRecord, write_records
from tiered_caching import MultiTierCache

RUNS_FOLDER = Path("data/runs")
MAX_TOKENS = 12  # of each answer: the session is about prompts

# vLLM and LMCache write some 80 lines before the first token, torch one a process,
# and Python's resource tracker one about vLLM's shared memory at the end.
_QUIET = (
    ("VLLM_LOGGING_LEVEL", "ERROR"),
    ("LMCACHE_LOG_LEVEL", "ERROR"),
    ("LMCACHE_DISABLE_BANNER", "1"),
    ("TORCH_CPP_LOG_LEVEL", "ERROR"),
    ("PYTHONWARNINGS", "ignore::UserWarning:multiprocessing.resource_tracker"),
)

# Kind of request -> what the caller knows about it (perplexity, time variance).
_KINDS = {
    "template": (9.0, 0.05),  # the same form again and again
    "code": (16.0, 0.15),
    "chat": (33.0, 0.30),
    "bursty": (14.0, 0.70),  # predictable text at unpredictable times
    "noise": (72.0, 0.40),  # logs, keys, binary dumps
}
_AGENTS = ("code reviewer", "data analyst", "release manager")
_RULES = (
    "Read the whole request before you answer.",
    "Name the file and the line for every finding.",
    "Prefer a small change that can be tested.",
    "Say what you measured and what you only assume.",
    "Never print a password, a token or a private key.",
    "If two answers are possible, give the simpler one first.",
)
_SUBJECTS = "parser scheduler tokenizer allocator planner logger session index".split()


@dataclass(frozen=True)
class Request:
    """One request of the session: who asks, what kind, the prompt and its metadata."""

    agent: str
    kind: str
    prompt: str
    metadata: dict[str, float]


def session_requests(count: int, seed: int = 0) -> list[Request]:
    """Return a seeded session in which prompts share system prompts and come back.

    Parameters
    ----------
    count : int
        Requests, >= 1.
    seed : int
        Equal seeds give equal sessions.

    Examples
    --------
    >>> requests = session_requests(40)
    >>> len({r.prompt for r in requests}) < len(requests)  # some repeat
    True
    """
    if count < 1:
        raise ValueError(f"count must be >= 1, got {count}")
    rng = random.Random(seed)
    asked: list[Request] = []
    seen: Counter[str] = Counter()
    for _ in range(count):
        again = asked and rng.random() < 0.4
        old = rng.choice(asked) if again else _new_request(rng)
        metadata = {
            **dict(zip(("perplexity", "time_variance"), _KINDS[old.kind])),
            "access_count": seen[old.prompt],
            "seconds_since_access": rng.choice([5.0, 60.0, 600.0, 5400.0]) if again else 0.0,
        }
        seen[old.prompt] += 1
        asked.append(Request(old.agent, old.kind, old.prompt, metadata))
    return asked


def _new_request(rng: random.Random) -> Request:
    agent, kind = rng.choice(_AGENTS), rng.choice(list(_KINDS))
    rules = "\n".join(f"{n}. {rule}" for n, rule in enumerate(_RULES * 3, start=1))
    body = _question(rng, kind)
    return Request(agent, kind, f'"""You are a {agent}.\n{rules}\n"""\n{body}', {})


def _question(rng: random.Random, kind: str) -> str:
    subject, number = rng.choice(_SUBJECTS), rng.randrange(1000)
    if kind == "noise":
        alphabet = "".join(map(chr, range(33, 127)))
        return "".join(rng.choice(alphabet) for _ in range(160))
    if kind == "code":
        lines = [f"    {subject}_{i} = self.{subject}.get({i + number})" for i in range(8)]
        return f"class {subject.title()}{number}:\n" + "\n".join(lines)
    if kind == "template":
        return f"Report {number}. " + f"Status of the {subject}: open. Owner: none. " * 6
    return f"Question {number}: why does the {subject} need so long, and what would you try? " * 3


def main(argv: Sequence[str] | None = None) -> int:
    """Run the session; returns the exit status."""
    options = _options(argv)
    try:
        _run(options)
    except KeyboardInterrupt:
        print("\nstopped; all services are down", file=sys.stderr)
        return 130
    except (ValueError, RuntimeError) as error:  # settings, StackError
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _options(argv):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", default="config.yaml")
    parser.add_argument("--llm", help="model folder or hub id that is on this machine")
    parser.add_argument("--redis-url", help="use this Redis instead of the embedded one")
    parser.add_argument("--generations", type=int, default=48, metavar="N")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help=f"folder of the results ({RUNS_FOLDER}/<time>)")
    return parser.parse_args(argv)


def _run(options):
    requests = session_requests(options.generations, options.seed)
    started_s = time.perf_counter()
    print("Starting coordinator, LMCache server and Redis ...", flush=True)
    with session_stack(options.config, options.redis_url) as stack:
        from demo_model import model_path

        model = model_path(options.llm)
        print(f"Loading vLLM with {Path(model).name} (CPU, about 20 s) ...", flush=True)
        with engine(stack, model) as llm:
            cache = managed(stack, llm)
            records = list(run_session(cache, requests))
            cache.close()
    folder = options.out or RUNS_FOLDER / datetime.now().strftime("%Y-%m-%dT%H-%M-%S")
    _write_results(folder, requests, records)
    print(table(requests, records))
    print(summary(records))
    print(f"\nWrote {folder}/decisions.jsonl and {folder}/timeline.png")
    print(f"All services are stopped. Total: {time.perf_counter() - started_s:.0f} s")


@contextmanager
def session_stack(config_path: str | Path = "config.yaml", redis_url: str | None = None):
    """Start a stack of the session's own: free ports, an empty disk tier, gone afterwards.

    KV that an earlier run left on disk would be hits that the directory knows
    nothing of, and that therefore nobody could manage.
    """
    from lmcache_stack import LMCacheStack, load_config

    _be_quiet()  # here already: vLLM reads these when it is first imported
    with tempfile.TemporaryDirectory(prefix="kv-session-") as folder:
        overrides = {"disk_path": folder} | ({"redis_url": redis_url} if redis_url else {})
        config = load_config(config_path, **overrides)
        with LMCacheStack(config, free_ports=True) as stack:
            yield stack


@contextmanager
def engine(stack, model: str):
    """Load vLLM, connected to `stack`; shut it down before the stack goes.

    An engine that has lost its LMCache server hangs when its process ends.
    """
    _be_quiet()
    from vllm import LLM

    llm = LLM(**stack.engine_kwargs(model, use_tqdm_on_load=False))
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()


def _be_quiet():
    """Lower the log levels that the user has not set."""
    for name, value in _QUIET:
        os.environ.setdefault(name, value)


def managed(stack, llm, config: HeuristicConfig | None = None, **options) -> MultiTierCache:
    """Return a manager for an engine on a stack, silent unless `notify` is given."""
    controller = LMCacheController(stack.host, stack.port, instance_id=stack.instance_id)
    return MultiTierCache(controller, llm, config=config, **{"notify": None, **options})


def run_session(cache: MultiTierCache, requests: Iterable[Request]) -> Iterator[DecisionRecord]:
    """Generate and manage each request; yields the records, with a progress bar on stderr."""
    from tqdm.auto import tqdm
    from vllm import SamplingParams

    sampling = SamplingParams(temperature=0.0, max_tokens=MAX_TOKENS)
    for request in tqdm(list(requests), desc="generations", unit="prompt"):
        cache.generate_and_manage(request.prompt, sampling, request.metadata)
        yield cache.records[-1]


def table(requests: Sequence[Request], records: Sequence[DecisionRecord]) -> str:
    """Return the decisions as a text table, one line a generation."""
    lines = [
        "\n  # agent            kind      tokens  perpl. var. uses     TTL  hit tokens (tier)"
        "     wanted  now in              moves"
    ]
    for number, (request, record) in enumerate(zip(requests, records), start=1):
        metadata = record.metadata
        moves = ", ".join(_short_move(move) for move in record.moves) or "-"
        lines.append(
            f"{number:3d} {request.agent:16} {request.kind:9} {record.prompt_tokens:6d}"
            f"  {metadata['perplexity']:6.1f} {metadata['time_variance']:4.2f}"
            f" {metadata['access_count']:4d} {record.ttl_s or 0:6.0f}s"
            f"  {_parts(record.hit_tokens):22} {record.wanted_tier or '?':7}"
            f" {_parts(record.tier_after):19} {record.error or moves}"
        )
    return "\n".join(lines)


def summary(records: Sequence[DecisionRecord]) -> str:
    """Return what came of a session: hits, moves, TTLs, time."""
    import numpy as np

    prompt_tokens = sum(record.prompt_tokens for record in records)
    hits = _total(record.hit_tokens for record in records)
    moves = Counter()
    for record in records:
        for move in record.moves:
            moves[f"{move['from']}→{move['to']} {move['status']}"] += move["moved_chunks"]
    ttls = [record.ttl_s for record in records if record.ttl_s]
    ttl = np.percentile(ttls, [10, 50, 90]) if ttls else [np.nan] * 3
    generate = np.array([record.generate_s for record in records])
    manage = np.array([record.manage_s for record in records])
    failed = sum(bool(record.error) for record in records)
    hit_share = sum(hits.values()) / max(prompt_tokens, 1)
    return "\n".join(
        (
            f"\n{len(records)} generations, {prompt_tokens} prompt tokens, {failed} not managed",
            f"  hit tokens      {sum(hits.values())} ({hit_share:.0%}): {_parts(hits) or 'none'}",
            f"  wanted tiers    {_parts(Counter(r.wanted_tier for r in records))}",
            f"  chunks moved    {_parts(moves) or 'none'}",
            "  TTL             p10 {:.0f} s, p50 {:.0f} s, p90 {:.0f} s".format(*ttl),
            f"  per generation  {np.median(generate) * 1e3:.0f} ms in the engine (p50),"
            f" managing {np.median(manage) * 1e3:.1f} ms (p50),"
            f" {np.percentile(manage, 90) * 1e3:.1f} ms (p90)",
            f"  managing took   {manage.sum() / (manage.sum() + generate.sum()):.1%} of the time",
        )
    )


def _write_results(folder, requests, records):
    from decision_plots import plot_session

    folder.mkdir(parents=True, exist_ok=True)
    write_records(folder / "decisions.jsonl", records)
    labels = [f"{request.agent}, {request.kind}" for request in requests]
    plot_session(records, labels).savefig(folder / "timeline.png", dpi=150)


def _total(counts: Iterable) -> Counter:
    total: Counter[str] = Counter()
    for count in counts:
        total.update(count)
    return total


def _parts(counts) -> str:
    """Show counts by name, tiers hottest first, as in "gpu 3, disk 1"."""
    order = {name: place for place, name in enumerate(TIERS)}
    names = sorted(counts, key=lambda name: (order.get(name, len(order)), str(name)))
    return ", ".join(f"{name} {counts[name]}" for name in names if counts[name])


def _short_move(move) -> str:
    text = f"{move['from']}→{move['to']}"
    return text if move["status"] == "done" else f"{text} ({move['status']})"


if __name__ == "__main__":
    sys.exit(main())
