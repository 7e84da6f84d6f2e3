"""`make replay TRACE= POLICY= CAPACITY=`: one policy on one trace; ends with one line of JSON."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence

import msgspec

from caching_heuristics import TIERS, HeuristicConfig, unknown_name
from kvttl.replay.baselines import BASELINES, replay_baseline
from kvttl.replay.costs import TierCosts, result_costs
from kvttl.replay.engine import replay
from kvttl.replay.policies import POLICIES, ReplayPolicy
from kvttl.replay.result import ReplayResult
from kvttl.settings import settings_from
from kvttl.traces.formats import FORMATS, SESSIONS_PER_HOUR
from kvttl.traces.reading import read_trace

CACHE_DIR = "data/trace_cache"
SAMPLE = "data/sample_trace.jsonl.gz"


def parse_capacity(text: str):
    """Return a capacity for `replay` from a command line.

    Examples
    --------
    >>> parse_capacity("0.05"), parse_capacity("4096"), parse_capacity("0.01,0.1,unlimited")
    (0.05, 4096, (0.01, 0.1, None))
    """
    parts = [_one_capacity(part.strip()) for part in text.split(",")]
    if len(parts) not in (1, len(TIERS)):
        raise ValueError(f"CAPACITY must be one value or gpu,disk,remote, got {text!r}")
    return parts[0] if len(parts) == 1 else tuple(parts)


def _one_capacity(text):
    if text in ("", "unlimited"):
        return None
    try:
        return float(text) if "." in text or "e" in text else int(text)
    except ValueError:
        wanted = "blocks, a share such as 0.05, or unlimited"
        raise ValueError(f"CAPACITY must be {wanted}, got {text!r}") from None


def parse_settings(pairs: Sequence[str]) -> HeuristicConfig:
    """Return settings from ``name=value`` words.

    Examples
    --------
    >>> parse_settings(["base_ttl=300", "gamma=0"]).base_ttl
    300.0
    """
    return settings_from(dict(pair.partition("=")[::2] for pair in pairs))


def main(argv: Sequence[str] | None = None) -> int:
    """Replay and print; returns the exit status."""
    options = _options(argv)
    try:
        figures = _run(options)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        return 130
    print(msgspec.json.encode(figures).decode())  # what is not known, NaN, is null
    return 0


def _options(argv):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trace", default=SAMPLE, help="file or folder")
    parser.add_argument("--format", choices=list(FORMATS), help="default: found from the content")
    parser.add_argument("--policy", default="lru", help=", ".join((*POLICIES, *BASELINES)))
    parser.add_argument("--capacity", default="", help="blocks or a share; or gpu,disk,remote")
    parser.add_argument("--set", nargs="*", default=[], metavar="NAME=VALUE", dest="settings")
    parser.add_argument("--per", choices=("request", "block"), help="of the heuristics' decisions")
    parser.add_argument("--skip-bad", action="store_true", help="skip and count bad lines")
    parser.add_argument("--seed", type=int, default=0, help="of overlaid sessions")
    parser.add_argument("--sessions-per-hour", type=float, default=SESSIONS_PER_HOUR)
    parser.add_argument("--max-sessions", type=int)
    parser.add_argument("--block-tokens", type=int)
    parser.add_argument("--cache-dir", default=CACHE_DIR, help="compact copies; empty = none")
    return parser.parse_args(argv)


_OPTIONS = ("skip_bad", "seed", "sessions_per_hour", "max_sessions", "block_tokens")


def _run(options):
    capacity, config = parse_capacity(options.capacity), parse_settings(options.settings)
    known = (*POLICIES, *BASELINES)
    if options.policy not in known:
        raise ValueError(unknown_name("POLICY", options.policy, known))
    start_s = time.perf_counter()
    trace = read_trace(
        options.trace,
        options.format,
        cache_dir=options.cache_dir or None,
        progress=True,
        **{name: getattr(options, name) for name in _OPTIONS},
    )
    read_s = time.perf_counter() - start_s
    print(f"{trace.name}: {trace}", file=sys.stderr)
    policy = POLICIES.get(options.policy, ReplayPolicy(None))
    metadata = {"per": options.per} if options.per and policy.reads_metadata else {}
    if options.policy in BASELINES:
        result = replay_baseline(trace, options.policy, capacity)
    else:
        result = replay(trace, options.policy, capacity, config, progress=True, **metadata)
    replay_s = time.perf_counter() - start_s - read_s
    print(describe(result), file=sys.stderr)
    settings = config.to_dict() if policy.reads_config else {}
    costs = TierCosts()
    times = {n: v for n, v in result_costs(result, costs).items() if "price" not in n}
    extra = {
        "moved_bytes": result.moved_bytes(costs.bytes_per_token),
        **times,
        "settings": settings,
        "skipped_lines": trace.skipped_lines,
    }
    return result.to_dict() | extra | {"read_s": read_s, "replay_s": replay_s}


def describe(result: ReplayResult) -> str:
    """Return a replay's figures for a reader."""
    share = result.hit_tokens.sum(axis=0) / max(1, result.trace.prompt_tokens.sum(dtype=int))
    hours = result.block_seconds / 3600
    lines = [
        f"{result.policy}: {result.block_hit_ratio:.4f} of blocks hit,"
        f" {result.token_hit_ratio:.4f} of tokens"
    ]
    for code, tier in enumerate(TIERS):
        if result.capacity_blocks[code] != 0:
            lines.append(
                f"  {tier:6} {share[code]:7.2%} of tokens, {hours[code]:12.1f} block-hours kept"
            )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
