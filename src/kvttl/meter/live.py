"""The regret meter of a manager: its generations through shadow caches, as metrics.

Once a minute, on a thread of its own; what fails here is counted, and costs no generation.
"""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

from caching_heuristics import TIERS
from kvttl.background import BoundedDeque, Repeater
from kvttl.decisions.metrics import DecisionMetrics
from kvttl.decisions.record import DecisionRecord
from kvttl.lmcache.client import LMCacheError
from kvttl.lmcache.layout import BaseController
from kvttl.manager.policy import Policy, chunk_numbers

logger = logging.getLogger(__name__)

_EVERY_S = 60.0
_WAITING, _WAITING_BYTES = 20_000, 16 * 2**20  # requests that are not measured yet
_REQUEST_BYTES = 400  # beside its keys
OPTIMUM = "optimum"
SHADOWS = ("lru", "fixed_5m", "fixed_1h", "formula", "adaptive", OPTIMUM)
_COUNTED = {f"shadow_{what}_total": SHADOWS for what in ("hit_tokens", "prompt_tokens")}
_COUNTED |= {"byte_seconds_total": TIERS, "shadow_byte_seconds_total": SHADOWS[:-1]}
_COMPILED = "kvttl.meter.shadows"
_SAMPLED_CHUNKS, _LEAST_CHUNKS = 8_192, 1_024  # that a shadow holds at most, and after:
_MOST_S = 0.5  # of a core, for a measurement; then half the sample takes its place, from cold
_FAILURES = 3  # after which it rests for good


class RegretMeter:
    """Counts in metrics what policies would have hit with the memory tier's room.

    Parameters
    ----------
    controller : BaseController
        Says how much room there is, and what the tiers hold.
    config : Policy
        The formula's settings.
    metrics : DecisionMetrics
        Shows the counters; those of several managers are sums.
    every_s : float
        Seconds between two measurements, > 0.

    Attributes
    ----------
    failures : int
        Measurements that failed; after three it rests for good.
    """

    def __init__(
        self,
        controller: BaseController,
        config: Policy,
        metrics: DecisionMetrics,
        every_s: float = _EVERY_S,
    ) -> None:
        self._controller, self._config, self._metrics = controller, config, metrics
        self._waiting = self._no_requests()
        self._shadows: Any = None
        self._sampled = _SAMPLED_CHUNKS
        self._owed: Counter = Counter()  # of a sample: more misses than its requests have tokens
        self._lock, self._measuring = threading.Lock(), threading.Lock()
        self._looked_s, self.failures = time.monotonic(), 0
        self._ended_s = 0.0, self._looked_s  # the last request, by its clock and by ours
        self._compiler: subprocess.Popen | None = None
        self._thread = Repeater(self.measure, every_s)
        for name, labels in _COUNTED.items():  # from the start, so that a rate sees the first one
            for label in labels:
                metrics.add(name, 0, label)

    def _no_requests(self):
        return BoundedDeque(_WAITING, _WAITING_BYTES, lambda a: a[0].nbytes + _REQUEST_BYTES)

    def observe(self, record: DecisionRecord) -> None:
        """Take note of a generation; all else happens later."""
        managed = record.kind == "generation" and (record.chunk_keys or not record.error)
        if not managed or self.failures >= _FAILURES:
            return
        keys = chunk_numbers(record.chunk_keys, getattr(self._controller, "model", ""))
        span_s = record.time_s - record.generate_s, record.time_s
        ended = record.prompt_tokens, record.finish_reason, record.output_tokens
        ttl_s = float(self._config.ttl(record.metadata))
        with self._lock:
            self._waiting.append((keys, *span_s, *ended, ttl_s))
            self._ended_s = record.time_s, time.monotonic()
        self._thread.start()

    def measure(self) -> None:
        """Let the shadow caches follow what came since, and count; never raises."""
        start_s, is_new = time.thread_time(), self._shadows is None
        try:
            with self._measuring:
                for name, amount, label in self._measured():
                    owed = amount + self._owed.pop((name, label), 0.0)
                    self._owed[name, label] = min(owed, 0.0)
                    self._metrics.add(name, max(owed, 0.0), label)
            too_long = time.thread_time() - start_s > _MOST_S and not is_new  # that loads code
            if too_long and self._sampled > _LEAST_CHUNKS:
                self._sampled, self._shadows = self._sampled // 2, None
        except LMCacheError as error:
            logger.info("the meter waits: %s", error)
        except Exception:
            self.failures, self._shadows, self._compiler = self.failures + 1, None, None
            self._metrics.add("meter_failures_total", 1)
            logger.exception("the meter failed, for the %d. time", self.failures)

    def _measured(self) -> Iterator[tuple[str, float, str]]:
        """Yield amounts: the metric, the amount, its label."""
        if not self._is_compiled():
            return
        from kvttl.meter.shadows import Asked, Shadows  # seconds, not on any request's way

        if self._shadows is None:
            room = self._controller.room_chunks()[0]
            self._shadows = Shadows(room, self._controller.chunk_size_tokens, self._sampled)
        size, before_s = self._controller.chunk_bytes() or 0, self._looked_s
        held, self._looked_s = self._controller.held_chunks(), time.monotonic()
        for tier, chunks in held.items():
            yield "byte_seconds_total", chunks * size * (self._looked_s - before_s), tier
        with self._lock:
            waiting, self._waiting = self._waiting, self._no_requests()
            ended_s, at_s = self._ended_s
        found = self._shadows.play([Asked(*each) for each in waiting]) if waiting else {}
        if best := self._shadows.optimum(ended_s + time.monotonic() - at_s):
            found[OPTIMUM] = best
        for policy, tokens in found.items():
            yield "shadow_prompt_tokens_total", tokens.asked, policy
            yield "shadow_hit_tokens_total", tokens.hit, policy
            yield "shadow_byte_seconds_total", tokens.chunk_s * size, policy

    def _is_compiled(self):
        """Say whether what is compiled is; another process does it, minutes once on a machine."""
        if _COMPILED in sys.modules:
            return True
        if self._compiler is None:
            env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
            self._compiler = subprocess.Popen([sys.executable, "-m", _COMPILED], env=env)
        status = self._compiler.poll()
        if status:
            raise RuntimeError(f"{_COMPILED} was not compiled: exit status {status}")
        return status == 0

    def close(self) -> None:
        """Stop; what came since the last measurement is not counted."""
        if self._compiler is not None:
            self._compiler.kill()
            self._compiler.wait()
        self._thread.close()
