"""Sees every generation through its decision; each one ends as one record.

Nothing on this way can break a generation: a failure becomes part of the record, and KV
cache about which nothing could be decided is claimed by a default wish all the same.
"""

from __future__ import annotations

import contextlib
import json
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kvttl import user_path
from kvttl.background import JobQueue, Repeater
from kvttl.decisions.keeper import RecordKeeper
from kvttl.decisions.log import DecisionRecord, each_record
from kvttl.decisions.metrics import DecisionMetrics
from kvttl.decisions.record import parse_record
from kvttl.lmcache.client import LMCacheError
from kvttl.lmcache.inside import Handover
from kvttl.lmcache.layout import BaseController
from kvttl.lmcache.lease import AlreadyManaged
from kvttl.lmcache.requests import salt_of_answer
from kvttl.manager.claims import ClaimLedger, RenewedLedger
from kvttl.manager.draft import Draft, Wish
from kvttl.manager.engine_calls import EngineDied
from kvttl.manager.generation import (
    Generation,
    ManagedOutput,
    compact,
    end_of,
    prompt_digest,
    tokens_of,
)
from kvttl.manager.metadata import PromptHistory, RequestMetadata
from kvttl.manager.motion import Motion
from kvttl.manager.placement import KVPlacement
from kvttl.manager.policy import Advisor, Policy
from kvttl.manager.recovery import adopt_strays, adopt_unclaimed, recover_claims
from kvttl.manager.settling import Settler

logger = logging.getLogger(__name__)

_SAVE_EVERY_S = 300.0  # what a policy has learned; a crash costs no more


@dataclass(eq=False, slots=True)
class _Job:
    draft: Draft
    made: Generation | None = None
    future: Future = field(default_factory=Future)


@dataclass(eq=False)
class Decider:
    """Decides about generations and lets their TTLs end, here or on threads of its own.

    Parameters
    ----------
    decide : callable
        Fills a draft with the decision about a generation, and has it placed.
    controller : BaseController
        Says where KV is, and moves it.
    policy : Policy
        Its ladder and `base_ttl` are of use here.
    measured : RequestMetadata
        Measures what the caller does not give.
    records : RecordKeeper
        Gets every record.
    clock : callable
        Unix time in seconds; may fail.
    workers : int
        Decisions that are made at the same time in the background; 0 = each is
        made on the caller's thread, before `submit` returns.
    max_queue, max_queue_bytes : int
        What may wait for a worker: decisions, and their token ids in bytes; beyond
        either, the oldest is given up ("shed").
    sweep_every_s : float, optional
        See `MultiTierCache`.
    keep_prompts : bool
        Show the prompts' text in records.
    advisor : Advisor, optional
        Has the last word; None: what `decide` fills in counts.
    handover : Handover, optional
        Has KV cache placed, and lets TTLs end, in the LMCache server; None: done here.

    Attributes
    ----------
    shed : int
        Decisions that were given up.
    is_led : callable
        Says whether somebody else says when TTLs end.
    """

    decide: Callable[[Draft, Generation], None]
    controller: BaseController
    policy: Policy
    measured: RequestMetadata
    records: RecordKeeper
    clock: Callable[[], float]
    workers: int
    max_queue: int
    max_queue_bytes: int
    sweep_every_s: float | None
    keep_prompts: bool
    advisor: Advisor | None = None
    handover: Handover | None = None
    is_led: Callable[[], bool] = lambda: False

    def __post_init__(self) -> None:
        self.claims = self.settler = self.placement = self.handover
        if self.handover is None:
            self._place_here()
        limits = {"max_bytes": self.max_queue_bytes, "size_bytes": lambda job: job.made.size_bytes}
        queue = JobQueue(self._run, self._shed, self.max_queue, workers=self.workers or 1, **limits)
        self._jobs = queue if self.workers else None
        every_s = self.sweep_every_s
        self.sweeper = Repeater(self._sweep_in_turn, every_s) if every_s is not None else None
        self._lock = threading.Lock()
        self._open: dict[_Job, float] = {}  # decisions that are not made yet -> their access
        self.shed = 0
        lease = self.controller.lease if self.handover is None else self.handover.begin
        self._lease = lease()
        self._looked_at_s: float | None = None

    def _place_here(self):
        motion, advisor = Motion(self.controller), self.advisor
        self.claims = ClaimLedger(self.policy.ladder)
        if advisor is not None:
            self.claims = RenewedLedger(self.policy.ladder, advisor.ask)
        self.settler = Settler(self.claims, motion, self.records.write_ahead)
        advise = advisor.decide if advisor is not None else lambda _draft, _keys: None
        self.placement = KVPlacement(self.settler, motion, advise)

    def watch(self, metrics: DecisionMetrics) -> None:
        """Show how many claims live, decisions wait, patterns are tracked and tiers fail."""
        metrics.watch("live_claims", lambda: len(self.claims))
        metrics.watch("queue_depth", lambda: len(self._jobs or ()))
        metrics.watch("tracked_patterns", lambda: len(self.measured.history or ()))
        metrics.watch("failing_tiers", lambda: len(self.controller.tier_errors()))

    def start(self) -> None:
        """Start sweeping, if that is not under way."""
        try:
            if self.sweeper:
                self.sweeper.start()
        except RuntimeError:  # no more threads: the text matters more
            logger.exception("the sweeper could not be started")

    def now(self) -> Callable[[], float]:
        """Return a function that says what time it is now, also later."""
        try:
            now_s = self.clock()
        except Exception:  # the caller's clock: `submit` will meet and record it again
            return self.clock
        return lambda: now_s

    def managed_call(
        self, generate: Callable[[], tuple[Sequence[Any], float]], requests: Iterable[tuple]
    ) -> list[ManagedOutput]:
        """Return a call's outputs, each with its decision.

        Parameters
        ----------
        generate : callable
            Returns the outputs and the seconds they took.
        requests : iterable of tuple
            What was asked, in the outputs' order: prompt, metadata and cache_salt.
        """
        left, managed = deque(requests), []
        try:
            outputs, generate_s = generate()
            share_s, now = generate_s / len(left), self.now()
            for output in outputs:
                prompt, metadata, salt = left.popleft()
                decision = self.submit(prompt, output, metadata, share_s, now, salt)
                managed.append(ManagedOutput(output, decision))
        except BaseException as error:
            if isinstance(error, (EngineDied, TimeoutError)) or not isinstance(error, Exception):
                for prompt, metadata, salt in left:  # what was computed by then may be in LMCache
                    self.submit(prompt, error, metadata, 0.0, self.now(), salt)
            raise
        return managed

    def submit(
        self,
        prompt: Any,
        output: Any,
        metadata: Any,
        generate_s: float,
        now: Callable[[], float],
        cache_salt: str | None = None,
    ) -> Future[DecisionRecord]:
        """Decide, now or soon, and return the future record; never raises, never fails.

        `now` is of the moment when the engine had answered, after `generate_s` seconds. An
        exception in the place of the output is the reason why nothing is decided.
        `cache_salt` is what the KV is under; None = as the prompt and the answer say.
        """
        job = _Job(Draft(time.time(), generate_s))
        job.future.set_running_or_notify_cancel()  # from here on nobody can cancel it
        try:
            if cache_salt is None:
                cache_salt = salt_of_answer(prompt, output)
            job.draft.cache_salt = cache_salt
            job.made = self._facts(prompt, output, metadata, cache_salt)
            job.draft.prompt, job.draft.prompt_tokens = job.made.prompt, len(job.made.tokens)
            job.draft.prompt_digest = prompt_digest(job.made.tokens, cache_salt)
            job.draft.finish_reason = job.made.finish_reason
            job.draft.output_tokens = job.made.output_tokens
            job.draft.time_s = now()
            with self._lock:
                self._open[job] = job.draft.time_s
            if isinstance(output, BaseException):
                raise output
            if self._jobs is None:
                self._run(job)
            elif not self._jobs.put(job):
                raise RuntimeError("the manager is closed")
        except BaseException as error:
            self._finish(job, f"{type(error).__name__}: {error}")
            if error is not output and not isinstance(error, Exception):
                raise  # Ctrl-C: an open decision would keep every TTL from ending
        return job.future

    def _facts(self, prompt, output, metadata, cache_salt):
        tokens = getattr(output, "prompt_token_ids", None)
        tokens = tokens or tokens_of(prompt, self.controller.tokenize)
        if isinstance(prompt, Mapping):
            prompt = prompt.get("prompt")
        return Generation(
            compact(tokens),
            getattr(output, "num_cached_tokens", None) or 0,
            self.measured.of_answer(output),
            dict(metadata) if isinstance(metadata, dict) else metadata,  # it may be used again
            prompt if self.keep_prompts and isinstance(prompt, str) else None,
            cache_salt,
            *end_of(output),
        )

    def metadata_of(
        self, made: Generation, now_s: float
    ) -> tuple[Mapping[str, float], Mapping[str, str]]:
        """Count the access; see `RequestMetadata.complete`."""
        if self.measured.history is None:  # the controller may have to ask the server
            history = PromptHistory(self.controller.chunk_size_tokens)
            with self._lock:
                if self.measured.history is None:
                    self.measured.history = history
        tokens = made.tokens.tolist()
        facts = (made.metadata, tokens, made.perplexity, now_s)
        return self.measured.complete(*facts, *filter(None, [made.cache_salt]))

    def sweep(self, now_s: float | None = None) -> list[DecisionRecord]:
        """Take expired claims down the ladder now; returns a record for each."""
        swept: list[DecisionRecord] = []
        self.check_lease()
        while not (self.sweeper and self.sweeper.must_stop):  # `recover` takes the rest up again
            until_s = self._known_until(self.clock() if now_s is None else now_s)
            if self.handover is not None:
                made = map(parse_record, map(json.dumps, self.handover.sweep(until_s)))
                return [self.records.keep(record) for record in made]
            adopt_unclaimed(self.settler, until_s, self.policy.base_ttl)
            records = self.settler.sweep(until_s)
            if not records:
                self._adopt_strays(until_s)
                break
            swept += [self.records.keep(record) for record in records]
        return swept

    def _sweep_in_turn(self):
        with contextlib.suppress(AlreadyManaged):  # each decision's record says it
            if not self.is_led():
                self.sweep()
            if self.advisor is not None:
                self.advisor.save(_SAVE_EVERY_S)

    def _adopt_strays(self, now_s):
        """Look for KV without a claim twice a `base_ttl`; not at the first sweep already."""
        if self._looked_at_s is None:
            self._looked_at_s = now_s
        elif abs(now_s - self._looked_at_s) >= self.policy.base_ttl / 2:  # a clock may go back
            self._looked_at_s = now_s
            adopt_strays(self.settler, now_s, self.policy.base_ttl)

    def recover(self, log: str | Path | Iterable[DecisionRecord]) -> dict[str, int]:
        """Make an earlier process's claims again; see `recover_claims`."""
        self.start()  # what is claimed again must end without a generation too
        if self.advisor is not None:
            self.advisor.prepare()
        if self.handover is not None:  # they are in the server, and live on without a manager
            return {"claims": len(self.handover), "adopted": 0, "unsettled": 0}
        if isinstance(log, (str, Path)):
            is_there = user_path(log).exists()  # not at the first start
            log = each_record(log, kinds=None) if is_there else ()
        return recover_claims(self.settler, log, self.clock(), self.policy.base_ttl)

    def flush(self, timeout_s: float | None = None) -> bool:
        """Wait until every decision submitted so far is made; False if the time was short."""
        return True if self._jobs is None else self._jobs.flush(timeout_s)

    def close(self) -> None:
        """Make the decisions that wait, and stop sweeping; later decisions say so."""
        if self._jobs is not None:
            self._jobs.close()
        if self.sweeper:
            self.sweeper.close()
        if self.advisor is not None:
            self.advisor.save()
        if self._lease is not None:
            self._lease.release()

    def check_lease(self) -> None:
        """Raise AlreadyManaged if a later manager has taken the LMCache server over."""
        if self._lease is not None:
            self._lease.check()
        if self.handover is None:
            self.controller.check_alone()

    def _known_until(self, now_s):
        """Return the time up to which all accesses are claimed: one that is not yet renews."""
        with self._lock:
            return min([now_s, *self._open.values()])

    def _run(self, job):
        start_s, problem = time.perf_counter(), ""
        try:
            self.check_lease()
            self.decide(job.draft, job.made)
        except Exception as error:  # a bug must not cost the caller the text either
            if not isinstance(error, (LMCacheError, ValueError)):
                logger.exception("managing a prompt's KV cache failed")
            problem = f"{type(error).__name__}: {error}"
        job.draft.manage_s = time.perf_counter() - start_s
        self._finish(job, problem)

    def _shed(self, job):
        with self._lock:
            self.shed += 1
        self._finish(job, "the queue of decisions was full", "shed")

    def _finish(self, job, error, kind="generation"):
        """Let a sweep claim KV that nothing was decided about; keep the record, hand it back."""
        draft = job.draft
        if job.made is not None and not draft.claimed:
            wish = Wish("gpu", draft.time_s, self.policy.base_ttl)
            owner, tokens = draft.prompt_digest, job.made.tokens
            self.settler.claim_later(owner, tokens, wish, draft.cache_salt)
        with self._lock:
            self._open.pop(job, None)
        job.future.set_result(self.records.keep(draft.record(kind, error)))
