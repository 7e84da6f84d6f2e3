"""The traces that replay tests use: the real ones where they are, else the shipped sample."""

from __future__ import annotations

import functools
import gzip
import json
import os
from pathlib import Path

import numpy as np

from kvttl.traces.builder import make_trace
from kvttl.traces.reading import read_trace
from kvttl.traces.trace import Trace

SAMPLE_FILE = Path(__file__).parents[1] / "data" / "sample_trace.jsonl.gz"
HOME = os.environ.get("KV_TRACE_DIR")  # folder of the real traces
CONVERSATION = Path(HOME or "/nowhere") / "mooncake" / "conversation_trace.jsonl"
AGENTIC = Path(HOME or "/nowhere") / "weka-agentic"


@functools.cache
def sample():
    return read_trace(SAMPLE_FILE)


@functools.cache
def conversation():
    """Mooncake's conversation trace, or None."""
    return read_trace(CONVERSATION) if CONVERSATION.exists() else None


@functools.cache
def agentic(sessions=40):
    """Overlaid agentic sessions, or None."""
    if not AGENTIC.exists():
        return None
    return read_trace(AGENTIC, max_sessions=sessions, seed=0)


def real_or_sample():
    """Every trace at hand, by name."""
    found = {"sample": sample(), "conversation": conversation(), "agentic": agentic()}
    return {name: trace for name, trace in found.items() if trace is not None}


def random_trace(seed, requests=60, block_tokens=4, gap_s=5.0):
    """Prompts that branch off earlier prompts at random places, with ties in time.

    Half of the new prompts end in an incomplete block; what extends such a
    prompt does not have that block.
    """
    rng = np.random.default_rng(seed)
    prompts, arrival_s, tokens, now_s, key, tails = [], [], [], 0.0, 0, {}
    for _ in range(requests):
        old = prompts[rng.integers(len(prompts))] if prompts and rng.random() < 0.8 else []
        kept = old[: rng.integers(len(old) + 1)] if rng.random() < 0.7 else old
        added = int(rng.integers(0, 7))
        if added and kept and kept[-1] in tails:
            kept = kept[:-1]
        prompts.append([*kept, *range(key, key + added)])
        key += added
        if added and rng.random() < 0.5:
            tails[key - 1] = int(rng.integers(1, block_tokens))
        now_s += 0.0 if rng.random() < 0.2 else float(np.round(rng.exponential(gap_s), 3))
        arrival_s.append(now_s)
        short = tails.get(prompts[-1][-1], block_tokens) if prompts[-1] else block_tokens
        tokens.append(len(prompts[-1]) * block_tokens - (block_tokens - short))
    return make_trace(prompts, arrival_s, tokens, block_tokens)


def write_mooncake(trace: Trace, path) -> None:
    """Write a trace as Mooncake's JSON lines (gzipped where the name ends in ``.gz``)."""
    lines = []
    for r in range(trace.requests):
        record = {
            "timestamp": round(float(trace.arrival_s[r]) * 1e3),
            "input_length": int(trace.prompt_tokens[r]),
            "output_length": int(trace.output_tokens[r]),
            "hash_ids": trace.request(r).tolist(),
        }
        lines.append(json.dumps(record, separators=(",", ":")) + "\n")
    data = "".join(lines).encode()
    Path(path).write_bytes(gzip.compress(data, mtime=0) if str(path).endswith(".gz") else data)
