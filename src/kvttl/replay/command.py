"""`make replay TRACE= POLICY= CAPACITY=`: one policy on one trace; ends with one line of JSON."""

import argparse
import sys
import time
from collections.abc import Sequence

import msgspec

from caching_heuristics import TIERS, unknown_name
from kvttl import exit_status
from kvttl.lmcache.kv_size import KV_BITS, kv_bytes_per_token
from kvttl.replay.baselines import BASELINES, replay_baseline
from kvttl.replay.costs import TierCosts, result_costs
from kvttl.replay.engine import replay
from kvttl.replay.money.bills import break_even, money_table
from kvttl.replay.money.tariffs import load_tariffs
from kvttl.replay.policies import POLICIES, ReplayPolicy
from kvttl.replay.result import ReplayResult
from kvttl.settings import settings_from
from kvttl.traces.formats import FORMATS
from kvttl.traces.reading import read_trace
from kvttl.traces.source import ORDER, SESSIONS_PER_HOUR, SUBAGENT_TIMES, TIME_UNITS, Source
from kvttl.traces.trace import Trace

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


def pairs(given: Sequence[str]) -> dict[str, str]:
    """Return the names and values of ``NAME=VALUE`` texts.

    Examples
    --------
    >>> pairs(["base_ttl=300", "gamma=0"])
    {'base_ttl': '300', 'gamma': '0'}
    """
    return dict(pair.partition("=")[::2] for pair in given)


def main(argv: list[str] | None = None) -> int:
    """Replay and print; returns the exit status."""
    parser = replay_options(__doc__.splitlines()[0])
    parser.add_argument("--per", choices=("request", "block"), help="of the heuristics' decisions")
    parser.add_argument("--tariff", help="a YAML file: say what each TTL would have cost instead")
    parser.add_argument("--model", help="whose KV cache it is: a config.json or its folder")
    parser.add_argument("--kv-dtype", choices=list(KV_BITS), default="auto")
    options = parser.parse_args(argv)
    # What is not known, NaN, is null.
    return exit_status(lambda: print(msgspec.json.encode(_run(options)).decode()))


def replay_options(description: str, policy: str = "lru") -> argparse.ArgumentParser:
    """Return a parser of what every command takes that replays a trace: which, how read, policy."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--trace", default=SAMPLE, help="file or folder")
    parser.add_argument("--format", choices=list(FORMATS), help="default: found from the content")
    parser.add_argument("--policy", default=policy, help=", ".join((*POLICIES, *BASELINES)))
    parser.add_argument("--capacity", default="", help="blocks or a share; or gpu,disk,remote")
    parser.add_argument("--set", nargs="*", default=[], metavar="NAME=VALUE", dest="settings")
    parser.add_argument("--skip-bad", action="store_true", help="skip and count bad lines")
    parser.add_argument("--seed", type=int, default=0, help="of overlaid sessions")
    parser.add_argument("--sessions-per-hour", type=float, default=SESSIONS_PER_HOUR)
    parser.add_argument("--max-sessions", type=int)
    parser.add_argument("--block-tokens", type=int, help="where the file does not say")
    units = (*TIME_UNITS, ORDER)
    parser.add_argument("--time-unit", choices=units, help="of a trace that does not say it")
    found = "default: found from all sessions"
    parser.add_argument("--subagent-times", choices=SUBAGENT_TIMES, help=found)
    rate = "tokens of output in a second, where lines wait for the end of others; inf: at once"
    parser.add_argument("--output-rate", type=float, help=rate)
    parser.add_argument("--cache-dir", default=CACHE_DIR, help="compact copies; empty = none")
    return parser


def read_asked(options: argparse.Namespace) -> Trace:
    """Return the trace that `replay_options` name; says on stderr what it holds."""
    reading = {name: value for name, value in vars(options).items() if hasattr(Source, name)}
    copies = options.cache_dir or None
    trace = read_trace(options.trace, options.format, cache_dir=copies, progress=True, **reading)
    print(f"{trace.name}: {trace}", file=sys.stderr)
    if trace.skipped_lines:
        print(f"{trace.skipped_lines} bad lines skipped", file=sys.stderr)
    return trace


def _run(options):
    capacity = parse_capacity(options.capacity)
    config = settings_from(pairs(options.settings))
    known = (*POLICIES, *BASELINES)
    if options.policy not in known:
        raise ValueError(unknown_name("POLICY", options.policy, known))
    start_s = time.perf_counter()
    trace = read_asked(options)
    read_s = time.perf_counter() - start_s
    if options.tariff:
        return _bills(trace, options, capacity)
    policy = POLICIES.get(options.policy, ReplayPolicy(None))
    metadata = {"per": options.per} if options.per and policy.reads_metadata else {}
    if options.policy in BASELINES:
        result = replay_baseline(trace, options.policy, capacity)
    else:
        result = replay(trace, options.policy, capacity, config, progress=True, **metadata)
    replay_s = time.perf_counter() - start_s - read_s
    print(describe(result), file=sys.stderr)
    return {
        **result.to_dict(),
        "moved_bytes": result.moved_bytes(TierCosts().bytes_per_token),
        **{name: value for name, value in result_costs(result).items() if "price" not in name},
        "settings": config.to_dict() if policy.reads_config else {},
        "skipped_lines": trace.skipped_lines,
        "read_s": read_s,
        "replay_s": replay_s,
    }


def _bills(trace, options, capacity):
    size = kv_bytes_per_token(options.model, options.kv_dtype) if options.model else None
    tariffs = load_tariffs(options.tariff, size)
    policies = [options.policy] if options.capacity else []
    table = money_table(trace, tariffs, policies, capacity)
    tokens, hours = trace.prompt_tokens.sum(dtype=int), trace.span_s / 3600
    whole = f"All {tokens} prompt tokens cost ({hours:.1f} h: longer TTLs never ended)"
    for column, title in (("per_mtok", "A million prompt tokens cost"), ("total", whole)):
        answer = table.pivot(index="tariff", columns="policy", values=column).round(4)
        print(f"{title}\n{answer.to_string(na_rep='')}", file=sys.stderr)
    worth = {name: break_even(tariff).to_dict("records") for name, tariff in tariffs.items()}
    return {"trace": trace.name, "bills": table.to_dict("records"), "break_even": worth}


def describe(result: ReplayResult) -> str:
    """Return a replay's figures for a reader."""
    share = result.hit_tokens.sum(axis=0) / max(1, result.trace.prompt_tokens.sum(dtype=int))
    hours = result.block_seconds / 3600
    blocks, tokens = result.block_hit_ratio, result.token_hit_ratio
    lines = [f"{result.policy}: {blocks:.4f} of blocks hit, {tokens:.4f} of tokens"]
    lines += [
        f"  {tier:6} {part:7.2%} of tokens, {kept:12.1f} block-hours kept"
        for tier, part, kept, capacity in zip(TIERS, share, hours, result.capacity_blocks)
        if capacity != 0
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
