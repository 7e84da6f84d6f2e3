"""A small decision log that needs no engine.

`python -m kvttl.decisions.sample` writes the shipped one. Agents ask for four hours;
what comes back, when, and how predictable it is are drawn from a seeded generator.
Decisions are those of `HeuristicConfig()`, and an idle prompt goes down the expiry
ladder, so that the log has all kinds of events that a real run's has. Its hits and
times in the engine are made up.
"""

import argparse
import hashlib
import heapq
from pathlib import Path

import numpy as np

from caching_heuristics import TIER_CODES, TIERS, HeuristicConfig
from kvttl import user_path
from kvttl.decisions.log import DecisionRecord, read_records, write_records
from kvttl.settings import FILE_NAME as SETTINGS_FILE
from kvttl.settings import load_settings

FILE_NAME = "sample_decisions.jsonl"

_START_S = 1_767_225_600.0  # 2026-01-01T00:00:00Z
_SPAN_S = 4 * 3600.0
_CHUNK_TOKENS = 32
# Kind of prompt: median perplexity, time variance, typical gap between uses (s), share.
_KINDS = {
    "template": (8.0, 0.08, 400.0, 0.25),
    "code": (16.0, 0.20, 900.0, 0.25),
    "chat": (33.0, 0.35, 1800.0, 0.25),
    "bursty": (14.0, 0.70, 1200.0, 0.15),
    "noise": (80.0, 0.45, 6000.0, 0.10),
}


def sample_records(prompts: int = 18, seed: int = 0) -> list[DecisionRecord]:
    """Return a seeded session of `prompts` prompts, in the order of time.

    Examples
    --------
    >>> records = sample_records()
    >>> records == sample_records() != sample_records(seed=1)
    True
    >>> sorted({record.kind for record in records})
    ['expiry', 'generation']
    """
    if prompts < 1:
        raise ValueError(f"prompts must be >= 1, got {prompts}")
    rng = np.random.default_rng(seed)
    config = HeuristicConfig()
    streams = [_prompt_records(rng, number, config) for number in range(prompts)]
    return list(heapq.merge(*streams, key=lambda record: record.time_s))


def _prompt_records(rng, number, config):
    """One prompt's uses, and what expires between them."""
    shares = [kind[3] for kind in _KINDS.values()]
    perplexity, variance, gap_s, _ = _KINDS[rng.choice(list(_KINDS), p=shares)]
    digest = hashlib.sha256(f"sample {number}".encode()).hexdigest()[:16]
    tokens = int(rng.integers(300, 1200))
    prompt = {"prompt_digest": digest, "prompt_tokens": tokens, "chunks": tokens // _CHUNK_TOKENS}
    measured = {
        "perplexity": round(float(perplexity * rng.lognormal(0, 0.3)), 2),
        "time_variance": round(float(np.clip(variance + rng.normal(0, 0.08), 0, 1)), 3),
    }
    times = _use_times(rng, gap_s, measured["time_variance"])
    records, held = [], "none"
    neighbours = zip(times, [times[0], *times], [*times[1:], _SPAN_S])
    for count, (time_s, before_s, next_s) in enumerate(neighbours):
        idle_s = round(time_s - before_s, 3)
        metadata = measured | {"access_count": count, "seconds_since_access": idle_s}
        use = _use(prompt, metadata, time_s, held, config, rng)
        ladder = _ladder(prompt, use, time_s, next_s, config)
        records += [use, *ladder]
        held = ladder[-1].wanted_tier or "none" if ladder else use.wanted_tier
    return records


def _use_times(rng, gap_s, variance):
    """When a prompt is used, s: the more variance, the more its gaps differ."""
    times = [round(float(rng.uniform(0, 0.6 * _SPAN_S)), 3)]
    while len(times) < 8:
        gap = gap_s * rng.lognormal(0, 0.2 + 1.5 * variance)
        if times[-1] + gap > _SPAN_S:
            break
        times.append(round(times[-1] + float(gap), 3))
    return times


def _use(prompt, metadata, time_s, held, config, rng):
    """The record of one generation: KV is where `held` says, and goes where it is wanted."""
    wanted, chunks = config.tier(metadata), prompt["chunks"]
    source = "gpu" if held == "none" else held  # what was just computed is in gpu
    moves = (_move(source, wanted, chunks),) if source != wanted else ()
    cached = 0 if held == "none" else chunks * _CHUNK_TOKENS
    generate_s = 1e-4 * (prompt["prompt_tokens"] - cached) + rng.uniform(0.1, 0.2)
    manage_s = rng.uniform(0.003, 0.012) + 0.025 * len(moves)
    values = {"ttl_s": round(config.ttl(metadata), 3), "wanted_tier": wanted, "moves": moves}
    values |= {"tier_before": {source: chunks}, "tier_after": {wanted: chunks}}
    values |= {"generate_s": round(generate_s, 4), "manage_s": round(manage_s, 4)}
    values["hit_tokens"] = {held: cached} if cached else {}
    return DecisionRecord(_START_S + time_s, **prompt, metadata=metadata, **values)


def _ladder(prompt, use, time_s, next_s, config):
    """The expiries until the next use, one rung after the other."""
    records, tier, due_s = [], use.wanted_tier, time_s + use.ttl_s
    chunks = prompt["chunks"]
    while tier is not None and due_s < next_s:
        code = TIER_CODES[tier] + 1
        below = TIERS[code] if code < len(TIERS) else None
        factor = config.ladder.get(below, 1.0)
        values = {"kind": "expiry", "from_tier": tier, "tier_before": {tier: chunks}}
        if below:
            values |= {"ttl_s": round(use.ttl_s * factor, 3), "wanted_tier": below}
            values |= {"tier_after": {below: chunks}, "moves": (_move(tier, below, chunks),)}
        records.append(DecisionRecord(round(_START_S + due_s, 3), **prompt, **values))
        due_s += use.ttl_s * factor
        tier = below
    return records


def _move(source, target, chunks):
    move = {"from": source, "to": target, "status": "done", "moved_chunks": chunks}
    return move | {"moved_tokens": chunks * _CHUNK_TOKENS}


def latest_log(data_folder: str | Path = "data") -> Path:
    """Return the folder of the newest run that has decisions; else the shipped sample.

    `read_records` takes either.

    Examples
    --------
    >>> latest_log("no/such/folder").name
    'sample_decisions.jsonl'
    """
    newest = {}  # folder -> when it was last written to
    for log in user_path(data_folder).glob("runs/*/*.jsonl"):
        newest[log.parent] = max(log.stat().st_mtime, newest.get(log.parent, 0.0))
    runs = sorted(newest, key=lambda folder: (newest[folder], folder.name), reverse=True)
    made = (run for run in runs if any(r.ttl_s for r in read_records(run, ("generation",))))
    return next(made, user_path(data_folder) / FILE_NAME)


def settings_of(log: str | Path) -> HeuristicConfig:
    """Return the settings that a run was made with: those in its folder, else the defaults."""
    log = user_path(log)
    return load_settings(log / SETTINGS_FILE) if log.is_dir() else HeuristicConfig()


def main(argv: list[str] | None = None) -> int:
    """Write the sample; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompts", type=int, default=18)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=user_path, default=Path("data", FILE_NAME))
    options = parser.parse_args(argv)
    records = sample_records(options.prompts, options.seed)
    options.out.unlink(missing_ok=True)
    print(f"Wrote {write_records(options.out, records)} records to {options.out}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
