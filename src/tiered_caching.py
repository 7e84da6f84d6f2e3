"""The manager: after every generation, decide how long the KV cache lives and where.

The storage backends are in `storage_backends` and can be imported from here.
"""

from __future__ import annotations

import hashlib
import inspect
import logging
import threading
import time
from array import array
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Mapping
from typing import Any

from cache_controller import BaseController
from caching_heuristics import TIER_CODES, TIERS, HeuristicConfig
from decision_log import DecisionRecord
from lmcache_http import LMCacheError, LMCacheUnavailable
from storage_backends import BaseBackend, InMemoryBackend, LocalDiskBackend, RemoteBackend
from ttl_expiry import ClaimLedger

__all__ = [
    "BaseBackend",
    "InMemoryBackend",
    "LocalDiskBackend",
    "MultiTierCache",
    "RemoteBackend",
    "notices",
]

logger = logging.getLogger(__name__)

_MAX_DEFERRED = 1_000  # prompts; a few kB of token ids each
_MAX_SETTLE_TRIES = 20  # later looks at a demotion that found no copy to fall back on
_EXPIRE_EVERY_S = 30.0
_MAX_REMEMBERED = 200_000  # chunks; about 150 bytes each


class MultiTierCache:
    """Generates text, and places the prompt's KV cache by the heuristics afterwards.

    Parameters
    ----------
    lmcache_controller : BaseController
        Says where KV is, and moves it.
    llm : vllm.LLM, optional
        The engine; `set_llm` gives it later.
    config : HeuristicConfig, optional
        Settings of the two decisions.
    notify : callable, optional
        Gets one line about each decision; None = silence.
    clock : callable
        Unix time in seconds, for deadlines and records.
    max_records : int
        Records kept in memory; the oldest go first.

    Notes
    -----
    Nothing on the way to a decision can break a generation: a failure becomes
    a record with its reason, and the text is returned.

    Examples
    --------
    >>> from cache_controller import LocalLMCacheController
    >>> memory = {tier: InMemoryBackend() for tier in TIERS}
    >>> class Echo:  # stands for vllm.LLM
    ...     def generate(self, prompt, sampling_params):
    ...         return prompt.upper()
    >>> local = LocalLMCacheController(chunk_size_tokens=4, backends=memory)
    >>> cache = MultiTierCache(local, Echo())
    >>> cache.generate_and_manage("what is KV?", None, {"perplexity": 35.0})
    ✓ Moved KV from gpu to disk (TTL: 3534s)
    'WHAT IS KV?'
    """

    def __init__(
        self,
        lmcache_controller: BaseController,
        llm: Any = None,
        *,
        config: HeuristicConfig | None = None,
        notify: Callable[[str], Any] | None = print,
        clock: Callable[[], float] = time.time,
        max_records: int = 10_000,
    ) -> None:
        self.controller = lmcache_controller
        self.config = config or HeuristicConfig()
        self.records: deque[DecisionRecord] = deque(maxlen=max_records)
        self.claims = ClaimLedger()
        self._notify = notify
        self._clock = clock
        self._lock = threading.Lock()
        self._deferred: OrderedDict[str, tuple] = OrderedDict()  # demotions to try again
        self._last_tier: OrderedDict[str, str] = OrderedDict()  # chunk key -> where last seen
        self._next_expiry_s = 0.0
        self._llm: Any = None
        if llm is not None:
            self.set_llm(llm)

    def set_llm(self, llm: Any) -> None:
        """Set the engine: anything with vLLM's ``generate(prompt, sampling_params)``."""
        self._llm = llm
        # vLLM draws a progress bar for every call unless told not to.
        takes_tqdm = "use_tqdm" in inspect.signature(llm.generate).parameters
        self._generate_options = {"use_tqdm": False} if takes_tqdm else {}
        self.controller.attach_engine(llm)

    def generate_and_manage(
        self,
        prompt: str,
        sampling_params: Any,
        metadata: Mapping[str, float] | None = None,
    ) -> str:
        """Generate text, then place the prompt's KV cache.

        Parameters
        ----------
        prompt : str
            The prompt.
        sampling_params : vllm.SamplingParams
            Handed to the engine as it is.
        metadata : mapping, optional
            ``perplexity``, ``time_variance``, ``access_count``,
            ``seconds_since_access``; see `compute_ttl`.

        Returns
        -------
        str
            The generated text.

        Raises
        ------
        RuntimeError
            Before an engine was set.
        TypeError
            For a list of prompts; call once for each. The engine's own errors pass through;
            nothing else is ever raised.
        """
        if self._llm is None:
            raise RuntimeError("no engine yet: call set_llm(llm) first")
        if isinstance(prompt, list) and not (prompt and all(isinstance(t, int) for t in prompt)):
            raise TypeError("prompt must be one prompt; got a list")  # the rest would be lost
        start_s = time.perf_counter()
        outputs = self._llm.generate(prompt, sampling_params, **self._generate_options)
        output = outputs[0] if isinstance(outputs, (list, tuple)) else outputs
        self._manage(prompt, output, metadata, time.perf_counter() - start_s)
        return output if isinstance(output, str) else output.outputs[0].text

    def close(self) -> None:
        """Release the controller's connections."""
        self.controller.close()

    def _manage(self, prompt, output, metadata, generate_s):
        """Decide and move; whatever fails becomes part of the record."""
        start_s = time.perf_counter()
        entry: dict[str, Any] = {"time_s": time.time(), "prompt_digest": "", "error": ""}
        try:
            with self._lock:
                self._decide(entry, prompt, output, metadata)
        except (LMCacheUnavailable, LMCacheError, ValueError) as error:
            entry["error"] = f"{type(error).__name__}: {error}"
        except Exception as error:  # a bug must not cost the caller the text either
            logger.exception("managing a prompt's KV cache failed")
            entry["error"] = f"{type(error).__name__}: {error}"
        entry["manage_s"] = time.perf_counter() - start_s
        entry["moves"] = tuple(entry.get("moves", ()))
        record = DecisionRecord(generate_s=generate_s, **entry)
        self.records.append(record)
        self._tell(record)

    def _decide(self, entry, prompt, output, metadata):
        """Fill `entry` step by step, so that a failure leaves what was known before it."""
        entry["time_s"] = now_s = self._clock()
        tokens = list(getattr(output, "prompt_token_ids", None) or self.controller.tokenize(prompt))
        owner = entry["prompt_digest"] = _digest(tokens)
        entry["prompt_tokens"] = len(tokens)
        metadata = {} if metadata is None else metadata
        entry["metadata"] = dict(metadata) if isinstance(metadata, Mapping) else {}
        entry["ttl_s"] = ttl_s = float(self.config.ttl(metadata))
        entry["wanted_tier"] = tier = str(self.config.tier(metadata))

        self.controller.note_generated(tokens)
        layout = self.controller.layout(tokens)
        cached_tokens = getattr(output, "num_cached_tokens", None) or 0
        held = self._without_load_buffers(layout, cached_tokens)
        entry["chunks"] = len(held)
        entry["tier_before"] = entry["tier_after"] = _by_hottest(held)
        entry["hit_tokens"] = self._hits_by_tier(held, cached_tokens)
        if now_s >= self._next_expiry_s:
            self.claims.expire(now_s)  # else a long-lived process keeps every claim
            self._next_expiry_s = now_s + _EXPIRE_EVERY_S
        self.claims.claim(owner, layout.keys, tier, now_s + ttl_s)
        if not all(held):
            self.controller.check_health()  # says why, if LMCache is away
        wanted = self.claims.wanted(layout.keys, now_s)
        moves = entry["moves"] = []
        try:
            self._move_all(tokens, held, wanted, cached_tokens, moves)
        except Exception:
            self._defer(owner, tokens)
            raise
        if any(move["status"] in ("timeout", "partial") for move in moves):
            self._defer(owner, tokens)
        if any(move["moved_chunks"] for move in entry["moves"]):
            held = self.controller.layout(tokens).of(self.controller.instance_id)
            entry["tier_after"] = _by_hottest(held)
        self._remember(layout.keys, held)
        if any(move["to"] == "gpu" and move["status"] != "done" for move in moves):
            self._forget(layout.keys)  # it may be there, or still come: believe the directory
        self._settle_oldest(owner, now_s)

    def _without_load_buffers(self, layout, cached_tokens):
        """Return each chunk's tiers, less the L1 copies that a load from L2 has just made.

        The directory shows such a copy for an instant, until the delete that
        follows the load; a chunk that was colder and has been a hit since
        cannot have become hot by itself.
        """
        held = layout.of(self.controller.instance_id)
        hits = self._chunks(cached_tokens, held)
        colder = [TIER_CODES[self._last_tier.get(key, "gpu")] for key in layout.keys[:hits]]
        served = tuple(
            tuple(tier for tier in tiers if TIER_CODES[tier] >= code) or tiers
            for tiers, code in zip(held, colder)
        )
        return served + held[hits:]

    def _remember(self, keys, held):
        """Keep where each chunk was last seen, for the next look (bounded)."""
        for key, tiers in zip(keys, held):
            self._last_tier.pop(key, None)
            if tiers:
                self._last_tier[key] = tiers[0]
        while len(self._last_tier) > _MAX_REMEMBERED:
            self._last_tier.popitem(last=False)

    def _forget(self, keys):
        for key in keys:
            self._last_tier.pop(key, None)

    def _chunks(self, tokens, held):
        """Return how many chunks `tokens` tokens of prefix touch."""
        return -(-tokens // self.controller.chunk_size_tokens) if tokens and held else 0

    def _hits_by_tier(self, held, cached_tokens):
        """Split the engine's cached-token count by the tier that each chunk came from."""
        hits: dict[str, int] = {}
        left = cached_tokens
        for tiers in held[: self._chunks(cached_tokens, held)]:
            tier = tiers[0] if tiers else "none"
            tokens = min(self.controller.chunk_size_tokens, left)
            hits[tier] = hits.get(tier, 0) + tokens
            left -= tokens
        return hits

    def _move_all(self, tokens, held, wanted, cached_tokens, moves):
        """Move each group of chunks to its wanted tier; adds the statuses to `moves`."""
        fresh_from = self._chunks(cached_tokens, held)  # from here on just computed
        plan: dict[tuple[str, str, float | None], list[int]] = {}
        for index, (tiers, tier) in enumerate(zip(held, wanted)):
            fresh = index >= fresh_from
            source = tiers[0] if tiers else "gpu"
            target = tier if fresh or not tiers else _reachable(tiers, tier)
            if source != target and target is not None:
                # Only a store that is still under way is worth waiting for.
                timeout_s = None if fresh or target == "gpu" else 0.0
                plan.setdefault((source, target, timeout_s), []).append(index)
        for (source, target, timeout_s), chunks in plan.items():
            moves.append(self._move(source, target, tokens, chunks, timeout_s))

    def _move(self, source, target, tokens, chunks, timeout_s):
        instance = self.controller.instance_id
        return self.controller.move(
            [instance, source], [instance, target], tokens, chunks=chunks, timeout_s=timeout_s
        )

    def _defer(self, owner, tokens, tries=0):
        self._deferred[owner] = (tokens, tries)
        while len(self._deferred) > _MAX_DEFERRED:
            self._deferred.popitem(last=False)

    def _settle_oldest(self, current_owner, now_s):
        """Try one earlier prompt again whose demotion found no copy to fall back on."""
        owner = next((o for o in self._deferred if o != current_owner), None)
        if owner is None:
            return
        tokens, tries = self._deferred.pop(owner)
        settled, moves = False, []
        try:
            layout = self.controller.layout(tokens)
            held = layout.of(self.controller.instance_id)
            wanted = self.claims.wanted(layout.keys, now_s)
            self._move_all(tokens, held, wanted, len(tokens), moves)
            unmet = any(_has_nothing_colder(*pair) for pair in zip(held, wanted))
            settled = not unmet and all(move["status"] in ("done", "noop") for move in moves)
            self._forget(layout.keys)
        except Exception as error:  # must not be booked on the current prompt
            logger.warning("settling %s failed: %s", owner, error)
        if not settled and tries < _MAX_SETTLE_TRIES:
            self._defer(owner, tokens, tries + 1)  # at the end of the queue

    def _tell(self, record):
        """Give the decision's one-line notice to `notify`; its failure is logged only."""
        if self._notify is None:
            return
        try:
            for line in notices(record):
                self._notify(line)
        except Exception:
            logger.exception("notify failed")


def notices(record: DecisionRecord) -> list[str]:
    """Return the one-line notices about a decision.

    Examples
    --------
    >>> notices(DecisionRecord(0.0, "a", ttl_s=7200.0, tier_after={"remote": 3}))
    ['✓ KV in remote, TTL: 7200s']
    """
    if record.error:
        return [f"⚠ KV not managed: {record.error}"]
    ttl = f"{record.ttl_s:.0f}s"
    lines = []
    for move in record.moves:
        path = f"from {move['from']} to {move['to']}"
        if move["moved_chunks"]:
            lines.append(f"✓ Moved KV {path} (TTL: {ttl})")
        elif move["status"] != "noop":
            lines.append(f"⚠ KV not moved {path}: {move['reason']}")
    held = [tier for tier in TIERS if record.tier_after.get(tier)]
    return lines or [f"✓ KV in {'+'.join(held) or record.wanted_tier}, TTL: {ttl}"]


def _reachable(tiers, wanted):
    """Return where a chunk can go that wants `wanted`: there, else the next colder copy.

    LMCache cannot write a missing L2 copy, so a chunk in gpu and remote that
    wants disk goes to remote; one that only remote holds stays there.
    """
    if wanted in (None, "gpu") or wanted in tiers:
        return wanted
    colder = [tier for tier in tiers if TIER_CODES[tier] > TIER_CODES[wanted]]
    return colder[0] if colder else tiers[0]


def _has_nothing_colder(tiers, wanted):
    """Say whether a chunk still waits for the copy that would let it go where it is wanted."""
    return wanted not in (None, "gpu") and tiers and TIER_CODES[tiers[-1]] < TIER_CODES[wanted]


def _by_hottest(held):
    """Count chunks by their hottest tier; ``none`` are not seen anywhere (yet)."""
    counts = Counter(tiers[0] if tiers else "none" for tiers in held)
    return {tier: counts[tier] for tier in (*TIERS, "none") if counts[tier]}


def _digest(tokens):
    """Name a prompt by its tokens without showing them."""
    packed = array("q", tokens).tobytes()
    return hashlib.sha256(packed).hexdigest()[:16]
