"""The contenders of `make bench`: a table of them, and what runs one: a vLLM engine of its own.

Each serves the same requests and says of every one when its first token came,
which tier served how many of its tokens, and how much memory its hot tier held.
Think times pass on a clock of the session's own; what LMCache does by the real
clock (storing, evicting once a second) is waited for between two requests.
"""

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from itertools import product
from typing import Any

from cache_controller import LMCacheController
from caching_heuristics import HeuristicConfig
from kvttl.bench.workloads import CHUNK_TOKENS, BenchRequest
from kvttl.lmcache.client import Service
from kvttl.lmcache.kv_size import kv_bytes_per_token
from kvttl.lmcache.layout import hits_by_tier
from kvttl.lmcache.model import EVICTION_RATIO, EVICTION_WATERMARK
from kvttl.manager.clock import SessionClock, ends_on_the_way
from kvttl.replay.costs import TierCosts
from kvttl.session.calibrate import calibrate
from kvttl.session.launch import be_quiet, greedy, managed, say_unused, session_folder
from kvttl.stack.config import PORT_FIELDS, StackConfig, engine_kwargs, load_config
from kvttl.stack.lifecycle import LMCacheStack
from kvttl.stack.process import comes_true

MAIN_SHARE = 0.25  # of the working set, in the hot tier
ANSWER_TOKENS = 4  # a TTFT needs one; a perplexity from the answer some more
# Settings that are the same for all, whatever config.yaml says: one Redis for several servers
# would mix them up.
_OWN = {"redis_url": None, "chunk_size_tokens": CHUNK_TOKENS, "block_size_tokens": CHUNK_TOKENS}
_OWN |= {"inside": False}
_QUIET_S = 3.0  # the longest wait for LMCache to have stored and evicted
_POLL_S = 0.02
_ENGINE_BLOCKS = 192  # of an engine without a prefix cache: three of the longest prompts
_LEAST_BLOCKS = 66  # vLLM wants room for one prompt of its full context


@dataclass(frozen=True)
class Contender:
    """One of what is compared.

    Parameters
    ----------
    name, colour : str
        In tables and the picture.
    every_share : bool
        It runs at every share of the working set, not only at `MAIN_SHARE`.
    prefix_cache : bool
        vLLM's own prefix cache is its hot tier.
    stack : mapping, optional
        Settings of its LMCache; None = it has none.
    config : HeuristicConfig, optional
        The kit manages it with these settings; None = it is not managed.
    """

    name: str
    colour: str
    every_share: bool = False
    prefix_cache: bool = False
    stack: Mapping[str, Any] | None = None
    config: HeuristicConfig | None = None

    @property
    def rules(self) -> dict[str, Any]:
        """Its LMCache's rules, as `LMCacheModel` takes them; empty without one."""
        if self.stack is None:
            return {}
        rules = {"watermark": self.stack["trigger_watermark"]}
        rules |= {"ratio": self.stack["eviction_ratio"]}
        return rules | {"retain": self.stack["prefetch_policy"] == "retain"}


NONE, PREFIX, LMCACHE, RETAIN = "no cache", "vLLM prefix cache", "LMCache", "LMCache, retain"
PEER = "LMCache, tuned"  # the one to beat
KIT, TUNED = "kit, defaults", "kit, tuned"
_AS_IT_COMES = {"prefetch_policy": "default", "redis_client": "lmcache"}
_AS_IT_COMES |= {"trigger_watermark": EVICTION_WATERMARK, "eviction_ratio": EVICTION_RATIO}
_FULLER = {"trigger_watermark": 0.95, "eviction_ratio": 0.05}
_RETAIN = {**_AS_IT_COMES, "prefetch_policy": "retain"}
_MANAGED = {"prefetch_policy": "default", "redis_client": "kit", **_FULLER}
CONTENDERS = {
    row.name: row
    for row in (
        Contender(NONE, "#888888"),
        Contender(PREFIX, "#e69f00", every_share=True, prefix_cache=True),
        Contender(LMCACHE, "#0072b2", every_share=True, stack=_AS_IT_COMES),
        Contender(RETAIN, "#56b4e9", stack=_RETAIN),
        Contender(PEER, "#cc79a7", every_share=True, stack={**_RETAIN, **_FULLER}),
        Contender(KIT, "#d55e00", every_share=True, stack=_MANAGED, config=HeuristicConfig()),
        # `bench_settings` replaces the settings of this one.
        Contender(TUNED, "#009e73", every_share=True, stack=_MANAGED, config=HeuristicConfig()),
    )
}
ORDER = tuple(CONTENDERS)


@dataclass(frozen=True)
class Served:
    """One request's outcome.

    Parameters
    ----------
    ttft_s, call_s : float
        Until the engine's first token; the whole call, seconds.
    prompt_tokens, cached_tokens : int
        Tokens, and of these what the engine did not compute.
    hit_tokens : dict
        Tier -> tokens that it served.
    manage_s, engine_s : float
        Of the kit: seconds to decide and move, in the background; in the engine.
    moved_chunks : int
        Chunks that the kit moved because of this request.
    perplexity : float
        As the kit measured it; NaN without the kit.
    """

    ttft_s: float
    call_s: float
    prompt_tokens: int
    cached_tokens: int
    hit_tokens: dict[str, int]
    manage_s: float = 0.0
    engine_s: float = 0.0
    moved_chunks: int = 0
    perplexity: float = math.nan
    error: str = ""


class Runner:
    """An engine without LMCache: no cache at all, or vLLM's own prefix cache.

    Parameters
    ----------
    llm : vllm.LLM
        The engine, with ``disable_log_stats=False``.
    bytes_per_token : int
        KV cache of a token.
    hot_blocks : int
        Blocks of its prefix cache; 0 = it has none.
    """

    def __init__(self, llm: Any, bytes_per_token: int, hot_blocks: int = 0) -> None:
        self.llm, self.bytes_per_token, self.hot_blocks = llm, bytes_per_token, hot_blocks

    def reset(self, settings: HeuristicConfig | None = None) -> None:
        """Forget everything: a pass starts with this."""
        self.hot_bytes, self.hot_byte_seconds, self._now_s = 0, 0.0, 0.0
        self._seen: set[int] = set()
        if self.hot_blocks and not self.llm.reset_prefix_cache():
            raise RuntimeError("vLLM did not reset its prefix cache")

    def warm_up(self) -> None:
        """Generate a few times: first calls take seconds, with log-probabilities once more."""
        for length, logprobs in product((40, 400, 1_600), (None, 20)):
            prompt = {"prompt_token_ids": list(range(300, 300 + length))}
            self.llm.generate(prompt, sampling(logprobs), use_tqdm=False)

    def advance(self, arrival_s: float) -> None:
        """Let the session's time pass until the next request."""
        self.hot_byte_seconds += self.hot_bytes * (arrival_s - self._now_s)
        self._now_s = arrival_s

    def serve(self, request: BenchRequest, blocks: Sequence[int]) -> Served:
        """Generate; `blocks` are the prompt's complete chunks, numbered."""
        self._seen.update(blocks)
        held = self._held(request)
        start_s = time.perf_counter()
        output, decision = self._generate(request)
        call_s = time.perf_counter() - start_s
        cached = output.num_cached_tokens or 0
        hits = hits_by_tier(held, cached, CHUNK_TOKENS)
        ttft_s = output.metrics.first_token_latency
        kit = _of_decision(decision.result()) if decision else {"engine_s": call_s}
        return Served(ttft_s, call_s, len(request.tokens), cached, hits, **kit)

    def _held(self, request):
        """Return the tiers of each chunk of a prompt, before it is generated."""
        return [("gpu",)] * (len(request.tokens) // CHUNK_TOKENS)

    def _generate(self, request):
        """Return the engine's answer, and the future decision if there is a manager."""
        return self.llm.generate(_prompt(request), sampling(), use_tqdm=False)[0], None

    def settle(self, below: float = math.inf) -> None:
        """Wait until the request's KV is stored: the next contender's turn must not pay for it.

        And until the used share of the hot tier is `below` a limit; then `hot_bytes` is what
        it holds. vLLM frees a cached block only to reuse it, so its prefix cache holds what
        it has seen until its pool is full.
        """
        blocks = min(len(self._seen), self.hot_blocks)
        self.hot_bytes = blocks * CHUNK_TOKENS * self.bytes_per_token

    def expired_chunks(self) -> int:
        """Chunks that went down the ladder because a TTL had ended: none without a manager."""
        return 0

    def close(self) -> None:
        """End the engine."""
        self.llm.llm_engine.engine_core.shutdown()


class LMCacheRunner(Runner):
    """An engine on an LMCache server of its own; with `settings`, managed by the kit."""

    def __init__(self, llm: Any, bytes_per_token: int, stack: Any, policy: str) -> None:
        super().__init__(llm, bytes_per_token)
        self.stack, self.policy = stack, policy
        self._server = Service(stack.server_http_url, read_timeout_s=10.0)
        self._pass = ExitStack()  # what a pass has opened

    def reset(self, settings: HeuristicConfig | None = None) -> None:
        """Empty every tier; start a manager anew if there are settings."""
        self._pass.close()
        super().reset()
        stack, self._cache = self.stack, None
        look = LMCacheController(stack.host, stack.port, instance_id=stack.instance_id)
        self._look = self._pass.enter_context(closing(look))
        self._look.attach_engine(self.llm)
        self._empty()
        if settings is not None:
            options = {"clock": SessionClock(0.0), "background": True, "sweep_every_s": None}
            options |= {"policy": self.policy}
            cache = managed(stack, self.llm, settings, **options)
            self._cache = self._pass.enter_context(cache)

    def _empty(self):
        if not comes_true(lambda: not self._look.discard(self._look.layout_of().keys), 30.0):
            raise RuntimeError("LMCache does not give up all chunks")
        self.settle()

    def advance(self, arrival_s: float) -> None:
        """Let time pass, and TTLs end on the way when they are due."""
        if self._cache is not None:
            for due_s in ends_on_the_way(self._cache, arrival_s):
                super().advance(max(due_s, self._now_s))
                self._cache.sweep()
                self._look_at_server()
            self._cache.sweep()
        super().advance(arrival_s)

    def _held(self, request):
        return self._look.layout(request.tokens).of(self.stack.instance_id)

    def _generate(self, request):
        if self._cache is None:
            return super()._generate(request)
        return self._cache.generate(_prompt(request), sampling())[0]

    def settle(self, below: float = math.inf) -> None:
        """Wait until LMCache has stored what it was given, and evicted: once a second at most."""
        deadline_s = time.monotonic() + _QUIET_S
        while True:
            at_work, used_share = self._look_at_server()
            if time.monotonic() > deadline_s or (not at_work and used_share < below):
                return
            time.sleep(_POLL_S)

    def expired_chunks(self) -> int:
        """Chunks that went down the ladder because a TTL had ended."""
        records = list(self._cache.records) if self._cache else []
        return sum(_moved_chunks(r) for r in records if r.kind in ("expiry", "settled"))

    def _look_at_server(self):
        """Note the bytes in the memory tier; return the work that waits, and the used share."""
        storage = self._server.call("GET", "/status")["storage_manager"]
        l1, store = storage["l1_manager"], storage["store_controller"]
        at_work = store["pending_keys_count"] + store["in_flight_task_count"]
        at_work += l1["write_locked_count"] + l1["temporary_count"]
        at_work += storage["prefetch_controller"]["in_flight_request_count"]
        self.hot_bytes = l1["memory_used_bytes"]
        return at_work, l1["memory_usage_ratio"]

    def calibrate(self) -> TierCosts:
        """Measure what loading from each tier and prefilling cost on this stack."""
        self.reset(HeuristicConfig())
        return calibrate(self._cache, (20, 250, 500), bytes_per_token=self.bytes_per_token)

    def close(self) -> None:
        """End the manager, then the engine, then the stack."""
        self._pass.close()
        self._server.close()
        super().close()
        self.stack.stop()


def sampling(logprobs: int | None = None) -> Any:
    """Return the sampling parameters of every request."""
    return greedy(ANSWER_TOKENS, ignore_eos=True, logprobs=logprobs)


def _prompt(request):
    return {"prompt_token_ids": list(request.tokens)}


def _of_decision(record):
    """Return the fields of `Served` that the kit's record has."""
    times = {"manage_s": record.manage_s, "engine_s": record.generate_s}
    known = {"perplexity": record.metadata.get("perplexity", math.nan), "error": record.error}
    return {"moved_chunks": _moved_chunks(record), **times, **known}


def _moved_chunks(record):
    return sum(move["moved_chunks"] for move in record.moves)


# ---- starting them ----------------------------------------------------------------


@contextmanager
def running_contenders(
    names: Sequence[str], hot_tokens: int, model: str, config_path: str, policy: str = "formula"
) -> Iterator[dict[str, Runner]]:
    """Start engines and stacks, each on free ports, with a hot tier of so many tokens.

    `policy` decides where the kit has its default settings.
    """
    be_quiet()
    rows = [CONTENDERS[name] for name in names]
    size = kv_bytes_per_token(model)
    with ExitStack() as cleanup:
        with ThreadPoolExecutor() as pool:
            start = pool.map(lambda row: _stack(hot_tokens * size, config_path, cleanup, row), rows)
            stacks = list(start)
        made: dict[str, Runner] = {}
        cleanup.callback(_close, made)
        for row, stack in zip(rows, stacks):
            made[row.name] = _runner(row, stack, hot_tokens, model, size, policy)
            made[row.name].warm_up()
        yield made


def say_unused_settings(config_path: str) -> None:
    """Print which settings of config.yaml the benchmark has its own for."""
    names = [*PORT_FIELDS, *_OWN, *_MANAGED, "l1_size_gb"]
    say_unused(load_config(config_path), names, "each contender has its own")


def _close(made):
    """End all at once: each engine takes seconds."""
    with ThreadPoolExecutor() as pool:
        list(pool.map(lambda runner: runner.close(), made.values()))


def _stack(hot_bytes, config_path, cleanup, row):
    """Return the running stack of a contender, None for one without LMCache."""
    if row.stack is None:
        return None
    config = load_config(config_path, **_OWN, **row.stack, l1_size_gb=hot_bytes / 2**30)
    folder = cleanup.enter_context(session_folder(config))
    return cleanup.enter_context(LMCacheStack(config.replaced(disk_path=folder), free_ports=True))


def _runner(row, stack, hot_tokens, model, size, policy):
    from vllm import LLM

    blocks = max(hot_tokens // CHUNK_TOKENS, _LEAST_BLOCKS) if row.prefix_cache else 0
    options = {
        "disable_log_stats": False,  # else a request's time to first token is not kept
        "use_tqdm_on_load": False,
        "num_gpu_blocks_override": blocks or _ENGINE_BLOCKS,
    }
    if stack is not None:
        policy = policy if row.name == KIT else "formula"
        return LMCacheRunner(LLM(**stack.engine_kwargs(model, **options)), size, stack, policy)
    kwargs = engine_kwargs(StackConfig(), model, **options, enable_prefix_caching=bool(blocks))
    del kwargs["kv_transfer_config"]
    return Runner(LLM(**kwargs), size, blocks)
