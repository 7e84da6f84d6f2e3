"""What runs a contender of `make bench`: a vLLM engine, with an LMCache server or without."""

import math
import os
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import redis

from cache_controller import LMCacheController
from caching_heuristics import HeuristicConfig
from kvttl.bench.workloads import CHUNK_TOKENS, BenchRequest, perplexity_of
from kvttl.lmcache.client import Service, work_in
from kvttl.lmcache.layout import hits_by_tier
from kvttl.manager.clock import SessionClock, ends_on_the_way
from kvttl.replay.costs import TierCosts
from kvttl.session.calibrate import calibrate
from kvttl.session.launch import greedy, managed
from kvttl.stack.process import comes_true

ANSWER_TOKENS = 4  # an answer that completes no chunk
_QUIET_S = 10.0  # the longest wait for LMCache to have stored and evicted
_DECIDED_S = 120.0  # the longest wait for a server's decision: it may have to compile its policy
_POLL_S = 0.02
_STEP_S = 10.0  # of the session, within which the TTLs in a server end together
DAY_S = 86_400.0  # between two passes on a server's clock: what a policy has learned is kept


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
        As the kit was told; NaN where it was not.
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
    """An engine without LMCache: no cache at all.

    Parameters
    ----------
    llm : vllm.LLM
        The engine, with ``disable_log_stats=False``.
    bytes_per_token : int
        KV cache of a token.
    """

    def __init__(self, llm: Any, bytes_per_token: int) -> None:
        self.llm, self.bytes_per_token = llm, bytes_per_token

    def reset(self, settings: HeuristicConfig | None = None) -> None:
        """Forget everything: a pass starts with this."""
        self.hot_bytes, self.hot_byte_seconds, self._now_s = 0, 0.0, 0.0
        self.written_bytes: Counter[str] = Counter()  # by tier

    def warm_up(self) -> None:
        """Generate a few times: first calls take seconds."""
        for length in (40, 400, 1_600):
            prompt = {"prompt_token_ids": list(range(300, 300 + length))}
            self.llm.generate(prompt, sampling(), use_tqdm=False)

    def advance(self, arrival_s: float) -> None:
        """Let the session's time pass until the next request."""
        self.hot_byte_seconds += self.hot_bytes * (arrival_s - self._now_s)
        self._now_s = arrival_s

    def serve(self, requests: Sequence[BenchRequest]) -> list[Served]:
        """Generate for all at once."""
        held = [self._held(request) for request in requests]
        start_s = time.perf_counter()
        outputs = self._generate(requests)
        call_s = time.perf_counter() - start_s
        known = self._decided(len(requests)) or [{"engine_s": call_s}] * len(requests)
        return [_served(*each, call_s) for each in zip(requests, outputs, held, known, strict=True)]

    def _held(self, request):
        """Return the tiers of each chunk of a prompt, before it is generated."""
        return []

    def _generate(self, requests):
        """Return the engine's answers."""
        return self.llm.generate([*map(_prompt, requests)], sampling(), use_tqdm=False)

    def _decided(self, count):
        """Wait for the decisions about the last requests; return what they say of each."""
        return []

    def settle(self, below: float = math.inf) -> None:
        """Wait until the request's KV is stored: the next contender's turn must not pay for it.

        And until the used share of the hot tier is `below` a limit; `hot_bytes` is what it holds.
        """

    def expired_chunks(self) -> int:
        """Chunks that were moved with no request: a TTL had ended, or a wish was late."""
        return 0

    def close(self) -> None:
        """End the engine."""
        self.llm.llm_engine.engine_core.shutdown()


class LMCacheRunner(Runner):
    """An engine on an LMCache server of its own; with `settings`, managed by the kit outside."""

    def __init__(self, llm: Any, bytes_per_token: int, stack: Any, policy: str = "formula") -> None:
        super().__init__(llm, bytes_per_token)
        self.stack, self.policy = stack, policy
        self._server = Service(stack.server_http_url, read_timeout_s=10.0)
        self._redis = redis.Redis(*stack.config.redis_address)
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
        self._begin(settings)

    def _empty(self):
        if not comes_true(lambda: not self._look.discard(self._look.layout_of().keys), 30.0):
            raise RuntimeError("LMCache does not give up all chunks")
        self._stored = {}
        self.settle()
        self.written_bytes.clear()

    def _begin(self, settings):
        if settings is not None:
            options = {"clock": SessionClock(0.0), "background": True, "sweep_every_s": None}
            options |= {"policy": self.policy, "perplexity_source": "off"}
            cache = managed(self.stack, self.llm, settings, **options)
            self._cache = self._pass.enter_context(cache)

    def advance(self, arrival_s: float) -> None:
        """Let time pass, and TTLs end on the way when they are due."""
        if self._cache is not None:
            for due_s in ends_on_the_way(self._cache, arrival_s):
                self._ends(due_s)
            self._cache.sweep()
        super().advance(arrival_s)

    def _ends(self, due_s):
        """Let the TTLs end that are due; note what the tiers hold from then on."""
        super().advance(max(due_s, self._now_s))
        self._cache.sweep()
        self._look_at_server()
        self._note_writes()

    def _held(self, request):
        perplexity_of(request.tokens)  # by now: it is nothing that the kit's call takes
        return self._look.layout(request.tokens).of(self.stack.instance_id)

    def _generate(self, requests):
        if self._cache is None:
            return super()._generate(requests)
        told = [{"perplexity": perplexity_of(request.tokens)} for request in requests]
        made = self._cache.generate([*map(_prompt, requests)], sampling(), told)
        self._decisions = [each.decision for each in made]
        return [each.output for each in made]

    def _decided(self, count):
        if self._cache is None:
            return []
        return [_of_decision(decision.result()) for decision in self._decisions]

    def settle(self, below: float = math.inf) -> None:
        """Wait until LMCache has stored what it was given, and evicted: once a second at most."""
        deadline_s = time.monotonic() + _QUIET_S
        at_work, used_share = self._look_at_server()
        while (at_work or used_share >= below) and time.monotonic() < deadline_s:
            time.sleep(_POLL_S)
            at_work, used_share = self._look_at_server()
        self._note_writes()

    def expired_chunks(self) -> int:
        """Chunks that were moved with no request: a TTL had ended, or a wish was late."""
        records = list(self._cache.records) if self._cache else []
        return sum(_moved_chunks(r) for r in records if r.kind in ("expiry", "settled"))

    def _look_at_server(self):
        """Note the bytes in the memory tier; return the work that waits, and the used share."""
        status = self._server.call("GET", "/status")
        l1 = status["storage_manager"]["l1_manager"]
        self.hot_bytes = l1["memory_used_bytes"]
        return work_in(status), l1["memory_usage_ratio"]

    def _note_writes(self):
        """Count what is new in the disk's folder and in Redis; no name's value ever changes."""
        files = os.scandir(self.stack.config.disk_path)
        below = {"disk": {each.name: each for each in files if ".tmp" not in each.name}}
        below["remote"] = {name: name for name in self._redis.keys()}
        for tier, held in below.items():
            new = held.keys() - self._stored.get(tier, set())
            self.written_bytes[tier] += sum(self._size(held[name]) for name in new)
        self._stored = {tier: set(held) for tier, held in below.items()}

    def _size(self, of):
        if isinstance(of, bytes):
            return self._redis.strlen(of)
        with suppress(FileNotFoundError):  # deleted meanwhile
            return of.stat().st_size
        return 0

    def calibrate(self) -> TierCosts:
        """Measure what loading from each tier and prefilling cost on this stack."""
        self.reset(HeuristicConfig())
        return calibrate(self._cache, (20, 250, 500), bytes_per_token=self.bytes_per_token)

    def close(self) -> None:
        """End the manager, then the engine, then the stack."""
        self._pass.close()
        self._server.close()
        self._redis.close()
        super().close()
        self.stack.stop()


class InsideRunner(LMCacheRunner):
    """An engine on a server that decides by itself; from here come only the time and settings.

    Between two passes a day goes by: what a policy has learned is kept, as in a server that runs.
    """

    _start_s = 0.0

    def _begin(self, settings):
        settings = settings or HeuristicConfig()
        changes = {"heuristics": settings.to_dict()}
        self._server.call("PATCH", "/kvttl/config", changes)
        self._clock, self._records = SessionClock(self._start_s), []
        policy = self.stack.config.inside
        policy = policy if isinstance(policy, str) else "formula"
        self._lead = self._look.hand_over(settings.ladder, policy, self._clock).begin()
        self._pass.callback(self._lead.release)
        self._cache = SimpleNamespace(clock=self._clock, claims=self._lead, sweep=self._sweep)

    def _sweep(self):
        self._records += self._lead.sweep(self._clock())

    def advance(self, arrival_s: float) -> None:
        """Let time pass, and TTLs end on the way, those of a few seconds together."""
        clock = self._clock
        while self._now_s + _STEP_S < arrival_s:
            due_s = max(self._lead.next_due_s - clock.start_s, self._now_s) + _STEP_S
            if due_s >= arrival_s:
                break
            clock.advance(due_s)
            self._ends(due_s)
        clock.advance(arrival_s)
        self._sweep()
        Runner.advance(self, arrival_s)
        self._start_s = clock() + DAY_S

    def _generate(self, requests):
        return Runner._generate(self, requests)

    def _decided(self, count):
        before = len(self._generations())
        comes_true(lambda: self._sweep() or len(self._generations()) >= before + count, _DECIDED_S)
        return []

    def _generations(self):
        return [record for record in self._records if record["kind"] == "generation"]

    def expired_chunks(self) -> int:
        """Chunks that the server moved."""
        return sum(move["moved_chunks"] for each in self._records for move in each["moves"])


def _served(request, output, held, known, call_s):
    cached = output.num_cached_tokens or 0
    hits = hits_by_tier(held, cached, CHUNK_TOKENS)
    ttft_s = output.metrics.first_token_latency
    return Served(ttft_s, call_s, len(request.tokens), cached, hits, **known)


def sampling() -> Any:
    """Return the sampling parameters of every request."""
    return greedy(ANSWER_TOKENS, ignore_eos=True)


def _prompt(request):
    return {"prompt_token_ids": list(request.tokens)}


def _of_decision(record):
    """Return the fields of `Served` that the kit's record has."""
    times = {"manage_s": record.manage_s, "engine_s": record.generate_s}
    known = {"perplexity": record.metadata.get("perplexity", math.nan), "error": record.error}
    return {"moved_chunks": _moved_chunks(record), **times, **known}


def _moved_chunks(record):
    return sum(move["moved_chunks"] for move in record.moves)
