"""LMCache 0.5.6's own rules without LMCache: the manager's real code on a model of the server.

`kvttl.replay.engine` answers fast what a policy would hit. This answers slowly (a few
thousand requests) what this kit's manager *on LMCache* would: its real claims,
ladder and moves, on a memory tier that evicts in batches above a watermark,
does not take in what it loads from below, and refuses what does not fit.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np

from caching_heuristics import TIER_CODES, TIERS, HeuristicConfig
from kvttl.lmcache.layout import BaseController, KVLayout, Outcome, unseen
from kvttl.replay.result import ReplayResult
from kvttl.session.workload import SessionClock, ends_on_the_way
from kvttl.traces.trace import Trace
from tiered_caching import MultiTierCache

# Defaults of `lmcache server` 0.5.6.
EVICTION_WATERMARK = 0.8
EVICTION_RATIO = 0.2


class LMCacheModel(BaseController):
    """Where an LMCache server with a disk and a Redis adapter would hold its chunks.

    Parameters
    ----------
    hot_chunks : int
        Chunks that the memory tier (L1) has room for, >= 1.
    chunk_size_tokens : int
        Tokens a chunk.
    retain : bool
        LMCache's prefetch policy ``retain``: what a hit loads from disk or Redis
        stays in L1. The default policy drops it after the load.

    Examples
    --------
    >>> model = LMCacheModel(hot_chunks=4, chunk_size_tokens=2)
    >>> model.serve([1, 2, 3, 4, 5]), model.serve([1, 2, 3, 4, 9])
    ({}, {'gpu': 4})
    """

    def __init__(self, hot_chunks: int, chunk_size_tokens: int = 32, retain: bool = False) -> None:
        if hot_chunks < 1:
            raise ValueError(f"hot_chunks must be >= 1, got {hot_chunks}")
        self.hot_chunks, self.chunk_size_tokens, self.retain = hot_chunks, chunk_size_tokens, retain
        # Of gpu the order matters: least recently used first.
        self.held: dict[str, dict[str, None]] = {tier: {} for tier in TIERS}

    # ---- what the engine sees ----------------------------------------------------

    def serve(self, tokens: Sequence[int]) -> dict[str, int]:
        """Look a prompt up, load, compute and store the rest; returns hit tokens by tier."""
        keys = self._keys(tokens)
        sources = self._load(keys, keep=self.retain)
        hits = len(sources)
        new = [key for key in keys[hits:] if key not in self.held["gpu"]]
        if len(new) <= self._free():  # one allocation for all: all of them or none
            self._create(new)
            for tier in TIERS[1:]:  # written through
                self.held[tier].update(dict.fromkeys(new))
        self._touch(keys)
        return {t: n * self.chunk_size_tokens for t in TIERS if (n := sources.count(t))}

    def evict(self) -> None:
        """Do what LMCache's eviction loop does once a second, until it has nothing to do."""
        hot = self.held["gpu"]
        while len(hot) >= EVICTION_WATERMARK * self.hot_chunks:
            for key in list(hot)[: max(1, int(len(hot) * EVICTION_RATIO))]:
                del hot[key]

    def _load(self, keys, keep):
        """Return the tier of each chunk of the longest prefix that can be loaded."""
        sources = []
        for key in keys:
            tier = next((tier for tier in TIERS if key in self.held[tier]), None)
            if tier is None:
                break
            sources.append(tier)
        free = self._free()
        for tier in TIERS[1:]:  # one allocation an adapter: all of its chunks or none
            wanted = sources.count(tier)
            if wanted > free:
                sources = sources[: sources.index(tier)]
                break
            free -= wanted
        if keep:
            self._create([key for key, tier in zip(keys, sources) if tier != "gpu"])
        return sources

    def _free(self):
        return self.hot_chunks - len(self.held["gpu"])

    def _create(self, keys):
        self.held["gpu"].update(dict.fromkeys(reversed(keys)))

    def _touch(self, keys):
        """Make a prompt's chunks the most recently used, its first one last of all."""
        hot = self.held["gpu"]
        for key in reversed(keys):
            if key in hot:
                del hot[key]
                hot[key] = None

    def _keys(self, tokens):
        size, state, keys = self.chunk_size_tokens, hashlib.sha256(), []
        for at in range(0, len(tokens) - size + 1, size):
            state.update(array("q", tokens[at : at + size]).tobytes())
            keys.append(state.copy().hexdigest())
        return tuple(keys)

    # ---- what the manager sees ---------------------------------------------------

    def layout(self, tokens: Sequence[int]) -> KVLayout:
        """Return where each complete chunk of a prompt is."""
        return self.layout_of(self._keys(tokens))

    def layout_of(self, keys: Sequence[str] | None = None) -> KVLayout:
        """Return where chunks are (None: all)."""
        if keys is None:
            keys = list(dict.fromkeys(key for tier in TIERS for key in self.held[tier]))
        found = tuple(tuple(t for t in TIERS if key in self.held[t]) for key in keys)
        return KVLayout(tuple(keys), {self.instance_id: found})

    def discard(self, keys: Sequence[str]) -> int:
        """Delete every copy of some chunks."""
        for chunks in self.held.values():
            for key in keys:
                chunks.pop(key, None)
        return 0

    def _refusal(self, source, target, tokens):
        if source[1] == "remote" and target[1] == "disk":
            return "LMCache has no L2-to-L2 copy"
        return super()._refusal(source, target, tokens)

    def _move(self, source, target, tokens, wanted, keys, timeout_s):
        if keys is None:
            keys = self._keys(tokens)
        chosen = [key for n, key in enumerate(keys) if wanted is None or n in wanted]
        if target[1] == "gpu":
            return self._promote(keys, [key for key in chosen if key not in self.held["gpu"]])
        outcome = Outcome()
        for key in chosen:
            if key not in self.held[target[1]]:
                reason = unseen(target[1])
                outcome.skipped[reason] = outcome.skipped.get(reason, 0) + 1
                continue
            outcome.moved += 1
            for tier in TIERS[: TIER_CODES[target[1]]]:
                self.held[tier].pop(key, None)
        return outcome

    def _promote(self, keys, wanted):
        """Prefetch the prefix up to the last chunk that is wanted in gpu."""
        outcome = Outcome()
        if wanted:
            prefix = keys[: keys.index(wanted[-1]) + 1]
            self._load(prefix, keep=True)
            self._touch(prefix)
        left = sum(key not in self.held["gpu"] for key in wanted)
        outcome.moved = len(wanted) - left
        if left:
            outcome.skipped[unseen("gpu")] = left
        return outcome


class _Engine:
    """Stands for vLLM in front of the model."""

    def __init__(self, model):
        self._model, self.hits = model, {}

    def generate(self, prompt, sampling_params):
        self.hits = self._model.serve(prompt)
        answer = SimpleNamespace(text="")
        return [
            SimpleNamespace(
                outputs=[answer],
                prompt_token_ids=prompt,
                num_cached_tokens=sum(self.hits.values()),
            )
        ]


def replay_on_lmcache(
    trace: Trace,
    prompts: Sequence[Sequence[int]],
    hot_chunks: int,
    config: HeuristicConfig | None = None,
    *,
    retain: bool = False,
    perplexity: Sequence[float] | None = None,
) -> ReplayResult:
    """Replay prompts on a model of LMCache, managed if there are settings.

    Parameters
    ----------
    trace : Trace
        Arrivals and blocks of the prompts; a block is a chunk.
    prompts : sequence of sequence of int
        Token ids, one row a request.
    hot_chunks : int
        Chunks that LMCache's memory tier holds.
    config : HeuristicConfig, optional
        The manager's settings; None: LMCache as it comes.
    retain : bool
        See `LMCacheModel`.
    perplexity : sequence of float, optional
        As measured, one a request; NaN or None: unknown.

    Returns
    -------
    ReplayResult
        Hits by request and tier; memory-time of gpu (of disk and remote: all
        copies there, also of chunks that are in gpu too); moves are not counted.
    """
    model = LMCacheModel(hot_chunks, trace.block_tokens, retain)
    engine, clock = _Engine(model), SessionClock(0.0)
    hits, area = np.zeros((trace.requests, 3), np.int64), np.zeros(3)
    known = {} if perplexity is None else dict(enumerate(perplexity))
    settings = config or HeuristicConfig()
    options: dict[str, Any] = {"notify": None, "sweep_every_s": None, "perplexity_source": "off"}
    with MultiTierCache(model, engine, config=settings, clock=clock, **options) as cache:
        for row, prompt in enumerate(prompts):
            _pass_time(cache, model, float(trace.arrival_s[row]), area)
            if config is None:
                engine.generate(list(prompt), None)
            else:
                p = known.get(row, np.nan)
                given = {} if np.isnan(p) else {"perplexity": p}
                cache.generate_and_manage(list(prompt), None, given)
            hits[row] = [engine.hits.get(tier, 0) for tier in TIERS]
            model.evict()
    blocks, moved = hits // trace.block_tokens, np.zeros((4, 4), np.int64)
    name = "LMCache" if config is None else "kit on LMCache"
    capacity = (hot_chunks, -1, -1)
    return ReplayResult(trace, name, capacity, blocks, hits, area, area * trace.block_tokens, moved)


def _pass_time(cache, model, arrival_s, area):
    """Let TTLs end when they are due, and count what the tiers hold meanwhile."""
    since_s = cache.clock()
    for due_s in ends_on_the_way(cache, arrival_s):  # without claims there is none
        _count(area, model, due_s - since_s)
        since_s = due_s
        cache.sweep()
    _count(area, model, arrival_s - since_s)
    cache.sweep()


def _count(area, model, seconds):
    area += [len(model.held[tier]) * max(0.0, seconds) for tier in TIERS]
