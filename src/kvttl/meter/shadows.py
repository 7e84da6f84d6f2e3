"""Shadow caches: what policies would hit with the memory tier's room, and what the best would.

Sampled in space (Waldspurger et al., "Efficient MRC Construction with SHARDS", FAST 2015): a cache
that is too large is followed through one of 2, 4, 8, ... chunks, by a hash of the whole prefix up
to it, in as small a part of its room. Sampled chunks of a prompt are a prefix chain again, so
policies run on them as they are. What is missed is sampled, and hits are the rest: a system prompt
that all requests share, one chunk among thousands, would else decide the ratio.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from kvttl.policies import Adaptive, Fixed, OnlinePolicy, Recency
from kvttl.policies.kernel import Requests
from kvttl.policies.runs import LEVELS, SEEN
from kvttl.policies.signals import FINISH_REASONS, UNKNOWN
from kvttl.policies.state import REAL
from kvttl.replay.engine import STEP, Sweep, in_order_of_time, play_events, replay
from kvttl.traces.trace import COLUMNS, Trace, dense

_REMEMBERED = 4  # times as many, that the policy which learns still knows
_HOUR_S = 3600.0
_LOOK_S = 600.0  # between two looks at what the optimum would have hit
_LOGGED = 1 << 20  # accesses that it is shown at most; more of them are less than an hour
_SET_BACK_S = 3600.0  # of the clock; else requests that ran at once
_HASHED = np.uint64(0x9E3779B97F4A7C15)
_RULES = tuple(Sweep())  # of room, as LMCache makes it


# Name -> the policy, and how long chunks stay after a use; None: as the request says.
POLICIES: dict[str, tuple[Callable[..., OnlinePolicy], float | None]] = {
    "lru": (Recency, math.inf),
    "fixed_5m": (Fixed, 300.0),
    "fixed_1h": (Fixed, 3600.0),
    "formula": (Fixed, None),
    "adaptive": (Adaptive, math.inf),
}


class Asked(NamedTuple):
    """A request whose generation has ended."""

    keys: np.ndarray  # (complete chunks,) int64, each of the prompt up to it
    begin_s: float
    end_s: float
    prompt_tokens: int
    finish: str | None = None  # how it ended, as an engine says it
    output_tokens: int = 0
    ttl_s: float = math.inf  # the formula's


class Tokens(NamedTuple):
    """What a policy was asked for and would have hit; chunks times seconds in its cache."""

    asked: float
    hit: float
    chunk_s: float


class Shadows:
    """One cache a policy, followed request by request, and the optimum an hour later.

    The optimum of a request is known when the hour after it is over: it knows what came in it.

    Parameters
    ----------
    capacity : int or None
        Chunks that the memory tier has room for; None: no limit.
    chunk_tokens : int
        Tokens in a chunk.
    sampled : int
        Chunks that a shadow holds at most.

    Examples
    --------
    >>> shadows = Shadows(capacity=100, chunk_tokens=16, sampled=1_000)
    >>> prompt = Asked(np.arange(8), 0.0, 1.0, 130)
    >>> found = shadows.play([prompt, prompt._replace(begin_s=400.0, end_s=401.0)])
    >>> found["lru"].hit, found["fixed_5m"].hit, found["lru"].asked
    (128.0, 0.0, 260.0)
    >>> shadows.optimum(math.inf).hit
    128.0
    """

    def __init__(self, capacity: int | None, chunk_tokens: int, sampled: int):
        self.bits = max(0, math.ceil(math.log2(max(capacity or 1, 1) / sampled)))
        self.chunk_tokens = chunk_tokens
        self.capacity = None if capacity is None else capacity >> self.bits
        self._policies = {name: self._made(make, sampled) for name, (make, _) in POLICIES.items()}
        self._origin_s, self._last_s, self._chunk_s = None, 0.0, dict.fromkeys(POLICIES, 0.0)
        self._log = np.empty(0, np.int64), np.empty((0, 4))
        self._counted, self._looked_s = 0, 0.0

    def _made(self, make, sampled):
        known = sampled * (_REMEMBERED if make is Adaptive else 1)
        return make(self.capacity, self.chunk_tokens << self.bits, remember=known, fit=True)

    def play(self, asked: Sequence[Asked]) -> dict[str, Tokens]:
        """Follow requests, of which none came before those of the last call; by policy."""
        asked = sorted(asked, key=lambda each: each.begin_s)
        work, chunks = self._work(asked)
        told, found = np.array([each.ttl_s for each in asked]), {}
        rows = work.arrival_s, np.diff(work.offsets), chunks, work.prompt_tokens
        log = work.keys, np.column_stack(rows)
        self._log = tuple(map(np.concatenate, zip(self._log, log)))
        for name, (_, ttl_s) in POLICIES.items():
            policy = self._policies[name]
            ttls_s = told if ttl_s is None else np.full(len(asked), ttl_s)
            mine = work._replace(ttl_s=ttls_s, first=int(policy.runs.counter[SEEN]))
            hits = np.zeros((len(asked), LEVELS), np.int64)
            for at in range(0, len(work.events), STEP):
                play_events(policy, mine, at, min(at + STEP, len(work.events)), _RULES, hits)
            area = policy.held_at(self._last_s)[1][REAL] * 2.0**self.bits
            found[name] = self._tokens(log[1], hits[:, REAL], area - self._chunk_s[name])
            self._chunk_s[name] = area
        return found

    def _tokens(self, rows, hits, chunk_s=0.0):
        """Return what hits of sampled chunks stand for."""
        _, sampled, chunks, prompts = rows.sum(axis=0).tolist()
        missed = (sampled - float(hits.sum())) * 2**self.bits
        return Tokens(prompts, self.chunk_tokens * (chunks - missed), chunk_s)

    def _work(self, asked):
        """Return requests as arrays, of sampled chunks, and how many chunks each of them has."""
        keys = np.concatenate([each.keys for each in asked]).astype(np.int64)
        chunks = np.array([len(each.keys) for each in asked])
        hashes = keys.view(np.uint64) * _HASHED
        keep = (hashes >> np.uint64(16)) & np.uint64((1 << self.bits) - 1) == 0
        offsets = np.concatenate([[0], np.cumsum(keep)])[np.cumsum([0, *chunks])]
        finish = [FINISH_REASONS.get(each.finish, UNKNOWN) for each in asked]
        prompts, outputs = zip(*((each.prompt_tokens, each.output_tokens) for each in asked))
        told = [np.array(values, np.int64) for values in (prompts, finish, outputs)]
        begin_s, end_s = self._times(np.array([(each.begin_s, each.end_s) for each in asked]))
        events = in_order_of_time(np.column_stack([begin_s, end_s]).ravel())
        arrays = keys[keep], offsets, begin_s, end_s, *told, events
        return Requests(*arrays, begin_s, 0), chunks

    def _times(self, span_s):
        """Return begins and ends on a clock of our own, which never goes back."""
        first_s = span_s[0, 0]
        if self._origin_s is None or first_s - self._origin_s < self._last_s - _SET_BACK_S:
            self._origin_s = first_s - self._last_s
        span_s = np.maximum(span_s - self._origin_s, self._last_s)
        self._last_s = span_s.max()
        return np.ascontiguousarray(span_s[:, 0]), np.maximum(span_s[:, 0], span_s[:, 1])

    def optimum(self, now_s: float) -> Tokens | None:
        """Count the requests of which the hour after is over at `now_s`, if it is time to."""
        keys, rows = self._log
        ends, now_s = np.cumsum(rows[:, 1]), now_s - (self._origin_s or 0.0)
        due = int(np.searchsorted(rows[:, 0], now_s - _HOUR_S, "right"))
        if len(keys) > _LOGGED:
            due = max(due, int(np.searchsorted(ends, 0.75 * len(keys))))
        elif now_s - self._looked_s < _LOOK_S:
            return None
        self._looked_s = now_s
        if due <= self._counted:
            return None
        asked, self._counted = slice(self._counted, due), due
        found = self._tokens(rows[asked], self._best(keys, rows)[asked])
        self._forget(ends)
        return found

    def _best(self, keys, rows):
        """Return the sampled chunks that each logged request would hit at best."""
        counts = rows[:, 1].astype(np.int32)
        columns = {name: np.zeros(len(rows), dtype) for name, dtype in COLUMNS.items()}
        columns |= {"arrival_s": rows[:, 0].copy(), "prompt_tokens": counts * self.chunk_tokens}
        columns["offsets"] = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])
        columns |= dense(keys)
        trace = Trace(**columns, names=np.array([], str), block_tokens=self.chunk_tokens)
        return replay(trace, "optimal", self.capacity).hit_blocks[:, 0]

    def _forget(self, ends):
        """Keep of what was counted the last hour, or as many accesses as a quarter of the log."""
        (keys, rows), last = self._log, self._counted - 1
        hour = np.searchsorted(rows[:, 0], rows[last, 0] - _HOUR_S)
        start = int(max(hour, np.searchsorted(ends, ends[last] - _LOGGED // 4)))
        first = int(ends[start - 1]) if start else 0
        self._log, self._counted = (keys[first:], rows[start:]), self._counted - start


def compile_all() -> None:
    """Call all that a measurement calls, with what else runs going first."""
    os.nice(19)
    shadows = Shadows(1, 1, 1)
    shadows.play([Asked(np.arange(2), 0.0, 0.0, 2)])
    shadows.optimum(math.inf)


if __name__ == "__main__":
    compile_all()
