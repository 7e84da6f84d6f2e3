"""The manager: after every generation, decide how long the KV cache lives and where.

The storage backends are in `storage_backends` and can be imported from here.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from cache_controller import BaseController
from caching_heuristics import HeuristicConfig
from kvttl.background import JobQueue, Repeater
from kvttl.decisions.keeper import RecordKeeper, notices
from kvttl.decisions.log import DecisionLog, DecisionRecord, read_records
from kvttl.decisions.metrics import DecisionMetrics
from kvttl.lmcache.client import LMCacheError, LMCacheUnavailable
from kvttl.manager.claims import ClaimLedger
from kvttl.manager.generation import Engine, Generation, metadata_of_each, prompt_digest, text_of
from kvttl.manager.metadata import PromptHistory, RequestMetadata
from kvttl.manager.placement import KVPlacement
from kvttl.manager.recovery import adopt_lost_claims, recover_claims
from kvttl.settings import load_settings
from storage_backends import BaseBackend, InMemoryBackend, LocalDiskBackend, RemoteBackend

__all__ = [
    "BaseBackend",
    "InMemoryBackend",
    "LocalDiskBackend",
    "MultiTierCache",
    "RemoteBackend",
    "notices",
]

logger = logging.getLogger(__name__)


class MultiTierCache:
    """Generates text, and places the prompt's KV cache by the heuristics afterwards.

    Parameters
    ----------
    lmcache_controller : BaseController
        Says where KV is, and moves it. One manager for one LMCache server: a second
        one would know nothing of this one's claims.
    llm : vllm.LLM, optional
        The engine; `set_llm` gives it later.
    config : HeuristicConfig, optional
        Settings of the two decisions and of the expiry ladder; by default those that
        the sliders have saved (``data/heuristics.yaml``), else the standard ones.
    notify : callable, optional
        Gets one line about each decision; None = silence.
    clock : callable
        Unix time in seconds, for deadlines and records.
    max_records : int
        Records kept in memory; the oldest go first.
    background : bool
        Decide and move on a worker thread; `generate_and_manage` returns at once.
    max_queue : int
        Decisions that may wait for the worker; beyond that the oldest is given up.
    sweep_every_s : float, optional
        How often expired claims are taken down the ladder; None = only by `sweep`.
    perplexity_source : str
        Where a perplexity comes from that the caller does not give: ``"generation"``
        (the engine's log-probabilities of the answer, no extra pass), ``"prompt"``
        (`scorer`, once a new prompt) or ``"off"``.
    scorer : callable, optional
        Token ids -> perplexity, such as `kvttl.session.demo_model.prompt_perplexity`. It never
        touches the engine.
    log : DecisionLog, optional
        Every record is appended; `recover` reads them after a restart.
    metrics : DecisionMetrics, optional
        Counts every record.

    Notes
    -----
    Nothing on the way to a decision can break a generation: a failure becomes
    a record with its reason, and the text is returned.

    Examples
    --------
    >>> from cache_controller import LocalLMCacheController
    >>> memory = {tier: InMemoryBackend() for tier in ("gpu", "disk", "remote")}
    >>> class Echo:  # stands for vllm.LLM
    ...     def generate(self, prompt, sampling_params):
    ...         return prompt.upper()
    >>> local = LocalLMCacheController(chunk_size_tokens=4, backends=memory)
    >>> with MultiTierCache(local, Echo()) as cache:
    ...     cache.generate_and_manage("what is KV?", None, {"perplexity": 35.0})
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
        background: bool = False,
        max_queue: int = 1_000,
        sweep_every_s: float | None = 1.0,
        perplexity_source: str = "generation",
        scorer: Callable[[Sequence[int]], float] | None = None,
        log: DecisionLog | None = None,
        metrics: DecisionMetrics | None = None,
    ) -> None:
        self.controller = lmcache_controller
        self.config = load_settings() if config is None else config
        self.claims = ClaimLedger(self.config.ladder)
        self._records = RecordKeeper(max_records, log, metrics, notify)
        self.records = self._records.records
        self.clock = clock
        self._placement = KVPlacement(lmcache_controller, self.claims, self._records.claim)
        self._measured = RequestMetadata(None, perplexity_source, scorer)
        self._lock = threading.Lock()
        self._jobs = JobQueue(self._manage, self._shed, max_queue) if background else None
        self._sweeper = Repeater(self.sweep, sweep_every_s) if sweep_every_s is not None else None
        self.shed_decisions = 0
        self._llm: Any = None
        if llm is not None:
            self.set_llm(llm)
        if metrics is not None:
            self._watch(metrics)

    def __enter__(self) -> MultiTierCache:
        return self

    def __exit__(self, *_exc_info: object) -> None:
        self.close()

    def set_llm(self, llm: Any) -> None:
        """Set the engine: anything with vLLM's ``generate(prompt, sampling_params)``."""
        self._llm, self._engine = llm, Engine(llm)
        self.controller.attach_engine(llm)
        if self._engine.vocab_size:
            self._measured.vocab_size = self._engine.vocab_size

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
            Handed to the engine; a copy that also asks for log-probabilities where
            the perplexity is measured from them.
        metadata : mapping, optional
            ``perplexity``, ``time_variance``, ``access_count``,
            ``seconds_since_access``; see `compute_ttl`. What is not given is measured.

        Returns
        -------
        str
            The generated text.

        Raises
        ------
        RuntimeError
            Before an engine was set.
        TypeError
            For a list of prompts: use `generate_and_manage_batch`. The engine's own
            errors pass through; nothing else is ever raised.
        """
        if isinstance(prompt, list) and not (prompt and all(isinstance(t, int) for t in prompt)):
            raise TypeError("prompt must be one prompt; got a list: use generate_and_manage_batch")
        outputs, generate_s = self._generate(prompt, sampling_params)
        output = outputs[0] if isinstance(outputs, (list, tuple)) else outputs
        self._submit(prompt, output, metadata, generate_s, self._now())
        return text_of(output)

    def generate_and_manage_batch(
        self,
        prompts: Sequence[str],
        sampling_params: Any,
        metadata: Mapping[str, float] | Sequence[Mapping[str, float] | None] | None = None,
    ) -> list[str]:
        """Generate texts in one engine batch, then place each prompt's KV cache.

        Parameters
        ----------
        prompts : sequence of str
            The prompts, shape (n,).
        sampling_params : vllm.SamplingParams or sequence of them
            One for all, or one each.
        metadata : mapping or sequence of mapping, optional
            One for all, or one each (None = all measured), shape (n,).

        Returns
        -------
        list of str
            The generated texts, shape (n,).

        Raises
        ------
        RuntimeError, TypeError, ValueError
            No engine; a single text; not as many metadata as prompts.

        Notes
        -----
        A record's ``generate_s`` is the batch's time divided by its prompts.
        """
        is_text, prompts = isinstance(prompts, str), list(prompts)
        if is_text or any(isinstance(prompt, int) for prompt in prompts):
            raise TypeError("prompts must be a list of prompts, got one prompt")
        each = metadata_of_each(prompts, metadata)
        if not prompts:
            return []
        outputs, generate_s = self._generate(prompts, sampling_params)
        time_s = self._now()
        for prompt, output, given in zip(prompts, outputs, each):
            self._submit(prompt, output, given, generate_s / len(prompts), time_s)
        return [text_of(output) for output in outputs]

    def measurable(self, sampling_params: Any) -> Any:
        """Return sampling parameters from whose answer `manage` can measure a perplexity."""
        return self._ready_engine().asking(sampling_params, self._measured.logprobs_wanted)

    def manage(
        self,
        prompt: Any,
        output: Any,
        metadata: Mapping[str, float] | None = None,
        generate_s: float = 0.0,
    ) -> None:
        """Place the KV cache of a generation that somebody else made; never raises.

        For a server. `output` is as vLLM's RequestOutput; it took `generate_s` seconds.
        """
        self._start_sweeper()
        self._submit(prompt, output, metadata, generate_s, self._now())

    def sweep(self, now_s: float | None = None) -> list[DecisionRecord]:
        """Take expired claims down the ladder now; returns a record for each."""
        swept: list[DecisionRecord] = []
        while not (self._sweeper and self._sweeper.must_stop):  # `recover` takes the rest up again
            with self._lock:
                now = self._before_waiting(self.clock() if now_s is None else now_s)
                adopt_lost_claims(self._placement, now, self.config.base_ttl)
                entries = self._placement.sweep(now)
            if not entries:
                break
            swept += [self._records.keep(entry) for entry in entries]
        return swept

    def _before_waiting(self, now_s):
        """Return the time up to which all accesses are known: a decision that waits renews."""
        oldest = self._jobs.oldest() if self._jobs is not None else None
        return now_s if oldest is None or oldest.time_s is None else min(now_s, oldest.time_s)

    def recover(self, log: str | Path | Iterable[DecisionRecord]) -> dict[str, int]:
        """Make the claims again that an earlier process has logged; see `recover_claims`.

        KV that LMCache holds and the log does not name is claimed for ``base_ttl``.
        """
        self._start_sweeper()  # what is claimed again must end without a generation too
        if isinstance(log, (str, Path)):
            log = read_records(log, kinds=None) if Path(log).exists() else ()  # the first start
        with self._lock:
            return recover_claims(self._placement, log, self.clock(), self.config.base_ttl)

    def flush(self, timeout_s: float | None = None) -> bool:
        """Wait until every decision so far is made; False if the time was not enough."""
        return True if self._jobs is None else self._jobs.flush(timeout_s)

    def close(self) -> None:
        """Make the decisions that wait, end the threads, release the connections."""
        if self._jobs is not None:  # an empty queue is falsy, and its worker may be busy
            self._jobs.close()
        if self._sweeper:
            self._sweeper.close()
        self.controller.close()

    # ---- generating ------------------------------------------------------------------

    def _generate(self, prompts, sampling_params):
        engine, logprobs = self._ready_engine(), self._measured.logprobs_wanted
        self._start_sweeper()
        return engine.generate(prompts, sampling_params, logprobs)

    def _ready_engine(self):
        if self._llm is None:
            raise RuntimeError("no engine yet: call set_llm(llm) first")
        return self._engine

    def _start_sweeper(self):
        try:
            if self._sweeper:
                self._sweeper.start()
        except RuntimeError:  # no more threads: the text matters more
            logger.exception("the sweeper could not be started")

    def _now(self):
        try:
            return self.clock()
        except Exception:  # a caller's clock; `_decide` will meet and record it again
            return None

    # ---- managing ---------------------------------------------------------------------

    def _submit(self, prompt, output, given, generate_s, time_s):
        given = dict(given) if isinstance(given, dict) else given  # the caller may reuse its own
        job = Generation(prompt, output, given, generate_s, time_s)
        try:
            if self._jobs is None:
                self._manage(job)
            elif not self._jobs.put(job):
                self._fail(job, "RuntimeError: the manager is closed")
        except RuntimeError as error:  # no more threads
            self._fail(job, f"RuntimeError: {error}")

    def _shed(self, job):
        self.shed_decisions += 1
        self._claim_by_default(job)
        self._fail(job, "the queue of decisions was full", kind="shed")

    def _fail(self, job, reason, **fields):
        entry = {"prompt_digest": "", "error": reason, "generate_s": job.generate_s, **fields}
        self._records.keep({"time_s": time.time() if job.time_s is None else job.time_s, **entry})

    def _manage(self, job):
        """Decide and move; whatever fails becomes part of the record."""
        start_s = time.perf_counter()
        entry: dict[str, Any] = {"time_s": time.time(), "prompt_digest": "", "error": ""}
        try:
            with self._lock:
                self._decide(entry, job)
        except (LMCacheUnavailable, LMCacheError, ValueError) as error:
            entry["error"] = f"{type(error).__name__}: {error}"
        except Exception as error:  # a bug must not cost the caller the text either
            logger.exception("managing a prompt's KV cache failed")
            entry["error"] = f"{type(error).__name__}: {error}"
        if "chunk_keys" not in entry:
            self._claim_by_default(job)
        entry["manage_s"] = time.perf_counter() - start_s
        self._records.keep({**entry, "generate_s": job.generate_s})

    def _claim_by_default(self, job):
        """Let a sweep claim KV that nothing was decided about: it must not live for ever."""
        try:
            tokens = job.tokens(self.controller)
            wish = ("gpu", time.time() if job.time_s is None else job.time_s, self.config.base_ttl)
            self._placement.claim_later(prompt_digest(tokens), tokens, wish)
        except Exception:
            logger.exception("a prompt without a decision could not be claimed")

    def _decide(self, entry, job):
        """Fill `entry` step by step, so that a failure leaves what was known before it."""
        entry["time_s"] = now_s = self.clock() if job.time_s is None else job.time_s
        tokens = job.tokens(self.controller)
        entry["prompt_digest"] = prompt_digest(tokens)
        entry["prompt"] = job.prompt if isinstance(job.prompt, str) else None
        entry["prompt_tokens"] = len(tokens)
        given = job.metadata
        entry["metadata"] = dict(given) if isinstance(given, Mapping) else {}
        metadata, sources = self._measure(given, tokens, job.output, now_s)
        entry["metadata"], entry["metadata_sources"] = metadata, sources
        entry["ttl_s"] = float(self.config.ttl(metadata))
        entry["wanted_tier"] = str(self.config.tier(metadata))
        self.controller.note_generated(tokens)
        cached_tokens = getattr(job.output, "num_cached_tokens", None) or 0
        self._placement.place(entry, tokens, cached_tokens, now_s)

    def _measure(self, given, tokens, output, now_s):
        if self._measured.history is None:  # the controller may have to ask the server
            self._measured.history = PromptHistory(self.controller.chunk_size_tokens)
        return self._measured.complete(given, tokens, output, now_s)

    def _watch(self, metrics):
        metrics.watch("live_claims", lambda: len(self.claims))
        metrics.watch("queue_depth", lambda: len(self._jobs or ()))
        metrics.watch("tracked_patterns", lambda: len(self._measured.history or ()))
