"""A small decision log that needs no engine.

`python -m kvttl.session.sample` writes the shipped one: a seeded session of a few agents, decided
about by the manager on a model of LMCache. How predictable its prompts are is drawn from a seeded
generator; its times in the engine and in the manager are made up.
"""

import argparse
import random
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

from caching_heuristics import HeuristicConfig
from kvttl import user_path
from kvttl.decisions.log import DecisionRecord, write_records
from kvttl.decisions.sample import FILE_NAME
from kvttl.lmcache.model import LMCacheModel
from kvttl.manager.clock import SessionClock, ends_on_the_way
from kvttl.session.workload import session_requests
from tiered_caching import MultiTierCache

_START_S = 1_767_225_600.0  # 2026-01-01T00:00:00Z
_PERPLEXITY = {"template": 8.0, "code": 16.0, "prose": 33.0, "noise": 80.0}  # the median
_HOT_CHUNKS = 10_000  # room for all
_MOVE_S = 0.025


def sample_records(requests: int = 76, seed: int = 0) -> list[DecisionRecord]:
    """Return the decisions about a seeded session of some requests, in the order of time.

    Examples
    --------
    >>> records = sample_records()
    >>> records == sample_records() != sample_records(seed=1)
    True
    >>> sorted({record.kind for record in records})
    ['expiry', 'generation']
    """
    rng, model, perplexities = random.Random(seed), LMCacheModel(_HOT_CHUNKS), {}
    options = {"notify": None, "sweep_every_s": None, "perplexity_source": "off"}
    options |= {"config": HeuristicConfig(), "clock": SessionClock(_START_S)}
    with MultiTierCache(model, **options) as cache:
        for request in session_requests(requests, seed):
            for _ in ends_on_the_way(cache, request.arrival_s):
                cache.sweep()
            drawn = round(_PERPLEXITY[request.kind] * rng.lognormvariate(0, 0.3), 2)
            perplexity = perplexities.setdefault(request.prompt, drawn)
            tokens = list(request.prompt.encode())
            cached = sum(model.serve(tokens).values())
            answer = SimpleNamespace(prompt_token_ids=tokens, num_cached_tokens=cached)
            generate_s = round(0.1 + 1e-4 * (len(tokens) - cached), 4)
            cache.manage(None, answer, {"perplexity": perplexity}, generate_s)
        return list(map(_with_made_up_times, cache.records))


def _with_made_up_times(record):
    """Return a record that is the same in every run; and a short one."""
    moves = tuple({**move, "latency_s": _MOVE_S} for move in record.moves)
    return replace(record, moves=moves, manage_s=0.005 + _MOVE_S * len(moves), chunk_keys=())


def main(argv: list[str] | None = None) -> int:
    """Write the sample; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--requests", type=int, default=76)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=user_path, default=Path("data", FILE_NAME))
    options = parser.parse_args(argv)
    records = sample_records(options.requests, options.seed)
    options.out.unlink(missing_ok=True)
    print(f"Wrote {write_records(options.out, records)} records to {options.out}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
