"""Sees every generation through its decision; each one ends as one record.

Nothing on this way can break a generation: a failure becomes part of the record, and KV
cache about which nothing could be decided is claimed by a default wish all the same.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field

from kvttl.background import JobQueue
from kvttl.decisions.keeper import RecordKeeper
from kvttl.decisions.record import DecisionRecord
from kvttl.lmcache.client import LMCacheError, LMCacheUnavailable
from kvttl.manager.draft import Draft, Wish
from kvttl.manager.generation import Generation, prompt_digest
from kvttl.manager.settling import Settler

logger = logging.getLogger(__name__)


@dataclass(eq=False, slots=True)
class _Job:
    draft: Draft
    made: Generation | None = None
    future: Future = field(default_factory=Future)


class Decider:
    """Decides about generations, on the caller's thread or on workers.

    Parameters
    ----------
    decide : callable
        Fills a draft with the decision about a generation, and carries it out.
    settler : Settler
        Gets a default wish where `decide` came to none.
    default_ttl_s : float
        TTL of that wish, in gpu, seconds.
    records : RecordKeeper
        Gets every record.
    workers : int
        Decisions that are made at the same time in the background; 0 = each is
        made on the caller's thread, before `submit` returns.
    max_queue, max_queue_bytes : int
        What may wait for a worker: decisions, and their token ids in bytes; beyond
        either, the oldest is given up ("shed").

    Attributes
    ----------
    shed : int
        Decisions that were given up.
    """

    def __init__(
        self,
        decide: Callable[[Draft, Generation], None],
        settler: Settler,
        default_ttl_s: float,
        records: RecordKeeper,
        *,
        workers: int,
        max_queue: int,
        max_queue_bytes: int,
    ) -> None:
        self._decide, self._settler = decide, settler
        self._default_ttl_s, self._records = default_ttl_s, records
        limits = {"max_bytes": max_queue_bytes, "size_bytes": lambda job: job.made.size_bytes}
        queue = JobQueue(self._run, self._shed, max_queue, workers=workers or 1, **limits)
        self._jobs = queue if workers else None
        self._lock = threading.Lock()
        self._open: dict[_Job, float] = {}  # decisions that are not made yet -> their access
        self.shed = 0

    def __len__(self) -> int:
        """Return how many decisions wait for a worker."""
        return len(self._jobs) if self._jobs is not None else 0

    def submit(
        self, facts: Callable[[], Generation], now: Callable[[], float], generate_s: float
    ) -> Future[DecisionRecord]:
        """Decide, now or soon, and return the future record; never raises, never fails.

        Parameters
        ----------
        facts : callable
            Returns what is known of the generation; may raise.
        now : callable
            Returns when the engine had answered, seconds; may raise.
        generate_s : float
            Seconds in the engine.
        """
        job = _Job(Draft(time.time(), generate_s))
        job.future.set_running_or_notify_cancel()  # from here on nobody can cancel it
        try:
            job.made = facts()
            job.draft.prompt, job.draft.prompt_tokens = job.made.prompt, len(job.made.tokens)
            job.draft.prompt_digest = prompt_digest(job.made.tokens)
            job.draft.time_s = now()
            with self._lock:
                self._open[job] = job.draft.time_s
            if self._jobs is None:
                self._run(job)
            elif not self._jobs.put(job):
                raise RuntimeError("the manager is closed")
        except Exception as error:
            self._fail(job, error)
        return job.future

    def known_until(self, now_s: float) -> float:
        """Return the time up to which all accesses are claimed: one that is not yet renews."""
        with self._lock:
            return min([now_s, *self._open.values()])

    def flush(self, timeout_s: float | None = None) -> bool:
        """Wait until every decision submitted so far is made; False if the time was short."""
        return True if self._jobs is None else self._jobs.flush(timeout_s)

    def close(self) -> None:
        """Make the decisions that wait; later ones are records that say so."""
        if self._jobs is not None:
            self._jobs.close()

    def _run(self, job):
        start_s = time.perf_counter()
        try:
            self._decide(job.draft, job.made)
        except Exception as error:  # a bug must not cost the caller the text either
            if not isinstance(error, (LMCacheUnavailable, LMCacheError, ValueError)):
                logger.exception("managing a prompt's KV cache failed")
            job.draft.error = f"{type(error).__name__}: {error}"
        job.draft.manage_s = time.perf_counter() - start_s
        self._finish(job, "generation")

    def _fail(self, job, error):
        job.draft.error = f"{type(error).__name__}: {error}"
        self._finish(job, "generation")

    def _shed(self, job):
        with self._lock:
            self.shed += 1
        job.draft.error = "the queue of decisions was full"
        self._finish(job, "shed")

    def _finish(self, job, kind):
        """Let a sweep claim KV that nothing was decided about; keep the record, hand it back."""
        draft = job.draft
        if job.made is not None and not draft.claimed:
            wish = Wish("gpu", draft.time_s, self._default_ttl_s)
            self._settler.claim_later(draft.prompt_digest, job.made.tokens, wish)
        with self._lock:
            self._open.pop(job, None)
        job.future.set_result(self._records.keep(draft.record(kind)))
