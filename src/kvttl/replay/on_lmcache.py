"""Requests replayed through the manager's own code, on the model of LMCache's rules or without."""

from collections.abc import Sequence
from itertools import chain
from types import SimpleNamespace
from typing import Any

import numpy as np

from caching_heuristics import TIERS, HeuristicConfig
from kvttl.lmcache.model import LMCacheModel, ServerModuleModel
from kvttl.manager.clock import SessionClock, ends_on_the_way
from kvttl.manager.policy import tell
from kvttl.policies import Answer, CachePolicy
from kvttl.replay.result import ReplayResult
from kvttl.traces.trace import REASONS, Trace
from tiered_caching import MultiTierCache

_QUIET: dict[str, Any] = {"notify": None, "sweep_every_s": None, "perplexity_source": "off"}


class _Engine:
    """Stands for vLLM in front of the model."""

    def __init__(self, model):
        self._model, self.hits = model, []

    def generate(self, prompts, sampling_params):
        self.hits = self._model.serve_at_once(prompts)
        return list(map(self._answer, prompts, self.hits))

    def _answer(self, prompt, hits):
        answer = SimpleNamespace(outputs=[SimpleNamespace(text="")], prompt_token_ids=prompt)
        answer.num_cached_tokens = sum(hits.values())
        return answer


def replay_on_lmcache(
    trace: Trace,
    prompts: Sequence[Sequence[int]],
    hot_chunks: int,
    config: HeuristicConfig | None = None,
    *,
    policy: str | CachePolicy = "formula",
    perplexity: Sequence[float] | None = None,
    turns: Sequence[Sequence[int]] | None = None,
    start_s: float = 0.0,
    inside: bool = False,
    **rules: float,
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
    policy : str or CachePolicy
        The manager's; see `MultiTierCache`.
    perplexity : sequence of float, optional
        As measured, one a request; NaN or None: unknown.
    turns : sequence of sequence of int, optional
        Requests that come at once, at the last one's arrival; None: one by one.
    start_s : float
        The clock's first second; later than all that a policy object was told before.
    inside : bool
        The manager is in the server, as `kvttl.server` is.
    **rules
        LMCache's: ``retain``, ``watermark``, ``ratio`` of `LMCacheModel`.

    Returns
    -------
    ReplayResult
        Hits; memory-time (of disk and remote: all copies there, also of chunks that are in gpu
        too); moves are not counted.
    """
    kind = ServerModuleModel if inside else LMCacheModel
    engine = _Engine(model := kind(hot_chunks, trace.block_tokens, **rules))
    known = dict(enumerate([] if perplexity is None else perplexity))
    told = {"policy": policy, "config": config or HeuristicConfig(), "clock": SessionClock(start_s)}
    area, by_row = np.zeros(3), {}
    with MultiTierCache(model, engine, **told, **_QUIET) as cache:
        _connect(cache, model)
        for turn in turns or [[row] for row in range(trace.requests)]:
            _pass_time(cache, model, float(trace.arrival_s[turn[-1]]), area)
            asked = [list(prompts[row]) for row in turn]
            given = [{"perplexity": known.get(row)} for row in turn]  # None and NaN: unknown
            _serve(cache, engine, asked, None if config is None else given, policy == "formula")
            by_row |= dict(zip(turn, zip(engine.hits, model.stored_tokens)))
            model.evict()
    return _result(trace, hot_chunks, config, area, [by_row[row] for row in sorted(by_row)])


def _result(trace, hot_chunks, config, area, served):
    hits = np.array([[found.get(tier, 0) for tier in TIERS] for found, _ in served]).reshape(-1, 3)
    blocks, moved = hits // trace.block_tokens, np.zeros((4, 4), np.int64)
    name = "LMCache" if config is None else "kit on LMCache"
    figures = blocks, hits, area, area * trace.block_tokens, moved
    stored = np.array([stored for _, stored in served])
    return ReplayResult(trace, name, (hot_chunks, -1, -1), *figures, stored_tokens=stored)


def _serve(cache, engine, asked, given, by_formula):
    """Serve prompts at once, and decide about each if metadata are given."""
    for managed in [] if given is None else cache.generate(asked, None, given):
        if isinstance(cache.controller, ServerModuleModel):
            cache.controller.note(managed.decision.result(), by_formula)
    if given is None:
        engine.generate(asked, None)


def _connect(cache, model):
    """Let the model of a server with the module in it hear what the module does."""
    if isinstance(model, ServerModuleModel):
        model.wanted = lambda keys: cache.claims.wanted(keys, cache.clock())
        if advisor := cache._decider.advisor:
            in_force = lambda: getattr(advisor.policy, "index_in_force", False)  # noqa: E731
            advisor.heard = lambda *said: model.valued(in_force(), *said)


def _pass_time(cache, model, arrival_s, area):
    """Let TTLs end when they are due, and count what the tiers hold meanwhile."""
    since_s = cache.clock() - cache.clock.start_s
    for due_s in chain(ends_on_the_way(cache, arrival_s), [arrival_s]):
        held = [len(model.held[tier]) for tier in TIERS]
        area += np.multiply(held, max(0.0, due_s - since_s))
        since_s = due_s
        cache.sweep()


def answers_as_live(trace: Trace, policy: CachePolicy) -> list[Answer]:
    """Tell a policy of each request when it has ended, and return what it says then.

    By request. Of a decision log these are what the manager was told: the same TTLs and tiers.

    Examples
    --------
    >>> from kvttl.policies import FAMILIES
    >>> from kvttl.traces.builder import make_trace
    >>> (answer,) = answers_as_live(make_trace([[1, 2]]), FAMILIES["fixed"](ttl_s=9.0))
    >>> answer.ttl_s.tolist()
    [9.0, 9.0]
    """
    end_s = trace.arrival_s + trace.generation_s
    answers, told_s = {}, 0.0
    for request in np.argsort(end_s, kind="stable").tolist():
        keys = trace.request(request).astype(np.int64)
        span_s = float(trace.arrival_s[request]), float(end_s[request])
        ended = REASONS[trace.finish[request]], int(trace.output_tokens[request])
        prompt = int(trace.prompt_tokens[request])
        told_s = tell(policy, told_s, keys, span_s, prompt, ended, {})
        answers[request] = policy.ask(keys, told_s)
    return [answers[request] for request in range(trace.requests)]
