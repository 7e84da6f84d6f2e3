"""A manager without servers: real bytes in memory, a stand-in for vLLM, a clock set by hand."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np

from cache_controller import LocalLMCacheController
from caching_heuristics import TIER_CODES, TIERS, HeuristicConfig
from tiered_caching import InMemoryBackend, MultiTierCache

CHUNK = 8  # characters, which are the tokens here

# Every field is given: the decision is the same at each access. TTL 100, 100, 88 s.
_STEADY = {"time_variance": 0.0, "access_count": 0, "seconds_since_access": 0.0}
HOT = {**_STEADY, "perplexity": 20.0}
WARM = {**_STEADY, "perplexity": 30.0}
COLD = {**_STEADY, "perplexity": 90.0}
CONFIG = HeuristicConfig(base_ttl=100.0, min_ttl=1.0, alpha=0.0)
HOT_TTL_S = CONFIG.ttl(HOT)
LADDER_S = 100_000.0  # longer than any claim lives


class Clock:
    """Unix seconds that pass only when told to."""

    def __init__(self, now_s: float = 1000.0) -> None:
        self.now_s = now_s

    def __call__(self) -> float:
        return self.now_s


class Engine:
    """Stands for vLLM: answers in capitals, and takes KV from the tiers where they have it."""

    def __init__(self, controller: LocalLMCacheController) -> None:
        self._controller = controller
        self.calls: list = []  # (prompts, sampling parameters)

    def generate(self, prompts, sampling_params):
        self.calls.append((prompts, sampling_params))
        one = isinstance(prompts, str)
        return [self._answer(prompt) for prompt in ([prompts] if one else prompts)]

    def _answer(self, prompt):
        tokens = list(prompt.encode())
        return SimpleNamespace(
            prompt_token_ids=tokens,
            num_cached_tokens=CHUNK * len(self._controller.load(tokens)),
            outputs=[SimpleNamespace(text=prompt.upper(), logprobs=None)],
        )


def local_controller(**options) -> LocalLMCacheController:
    """Return a controller on memory alone."""
    backends = {tier: InMemoryBackend() for tier in TIERS}
    return LocalLMCacheController(chunk_size_tokens=CHUNK, **{"backends": backends, **options})


def local_manager(controller=None, clock=None, llm=None, **options) -> MultiTierCache:
    """Return a silent manager; nothing sweeps by itself."""
    controller = controller or local_controller()
    llm = llm or Engine(controller)
    quiet = {"notify": None, "sweep_every_s": None, "keep_prompts": True}
    defaults = {"config": CONFIG, "clock": clock or Clock(), **quiet}
    return MultiTierCache(controller, llm, **{**defaults, **options})


def hottest(cache: MultiTierCache, prompt: str) -> list[str | None]:
    """Return each chunk's hottest tier, None where it is in none."""
    controller = cache.controller
    held = controller.layout(controller.tokenize(prompt)).of(controller.instance_id)
    return [tiers[0] if tiers else None for tiers in held]


def assert_all_claimed_and_none_too_hot(cache: MultiTierCache) -> None:
    """Every stored chunk has a claim, and is not hotter than its hottest claim wants it."""
    layout = cache.controller.layout_of()
    wanted = cache.claims.wanted(layout.keys, cache.clock())
    for key, tiers, tier in zip(layout.keys, layout.of(cache.controller.instance_id), wanted):
        assert not tiers or tier is not None, f"nobody claims {key}: immortal in {tiers}"
        assert not tiers or TIER_CODES[tiers[0]] >= TIER_CODES[tier], (key, tiers, tier)


def assert_nothing_is_immortal(cache: MultiTierCache) -> None:
    """Once all ladders are past, a sweep leaves no claim and no byte behind."""
    cache.clock.now_s += LADDER_S
    cache.sweep()
    assert len(cache.claims) == 0
    layout = cache.controller.layout_of()
    assert not any(layout.of(cache.controller.instance_id)), "bytes are left"


def assert_replay_decides_the_same(records, folder, policy):
    """What a log says was decided is what a fresh policy says of it in a replay."""
    from kvttl.replay.on_lmcache import answers_as_live  # compiled code: only where it is needed
    from kvttl.traces.reading import read_trace

    trace = read_trace(folder)
    assert trace.requests == len(records)
    told = [record.decided for record in sorted(records, key=lambda r: r.time_s - r.generate_s)]
    for answer, decided in zip(answers_as_live(trace, policy), told):
        counts = np.diff([0, *(part["chunks"] for part in decided)])
        for name, given in (("ttl_s", answer.ttl_s), ("value", answer.value)):
            said = np.repeat([part[name] for part in decided], counts)
            assert np.allclose(given, said, rtol=1e-5, atol=1e-4), name
        said = np.repeat([TIERS.index(part["tier"]) for part in decided], counts)
        assert (answer.tier == said).all()
