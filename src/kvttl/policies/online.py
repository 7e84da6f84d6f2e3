"""What a policy is told and what it is asked; and everything that does not depend on the policy.

One object for all homes: a replay of a trace, the manager and a server tell it the same things
and get the same answers. It has no clock, no thread, no I/O: times are arguments, in seconds.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

import numpy as np
from numba import njit

from caching_heuristics import TIERS
from kvttl.policies.eviction import by_recency, make_room, room_in_shadows, sweep_due, tidy
from kvttl.policies.hazard import Hazard, Learning
from kvttl.policies.requests import advance, begin, end
from kvttl.policies.runs import (
    LEVELS,
    N_KEYS,
    N_RUNS,
    SEEN,
    Runs,
    forget,
    new_runs,
    walk,
    with_room,
)
from kvttl.policies.signals import FINISH_REASONS, UNKNOWN
from kvttl.policies.state import (
    ABSENT,
    FOLLOWED,
    INDEX,
    LRU_SHADOW,
    REAL,
    RECENCY,
    Now,
    Rules,
    new_now,
)
from kvttl.policies.worth import ask

MAX_TTL_S = 604_800.0


class Answer(NamedTuple):
    """What a policy says of each chunk of a prompt; arrays, shape (chunks,).

    Along a prompt value never rises and tiers get no hotter, nor TTLs longer in one tier: a
    chunk is of no use without those before it.
    """

    value: np.ndarray  # what has less goes first; no unit; -inf: unknown chunk
    ttl_s: np.ndarray  # seconds from now, 0..`MAX_TTL_S`
    admit: np.ndarray  # bool: worth storing in some tier
    tier: np.ndarray  # int8, index into TIERS; the coldest where no tier is worth it


class CachePolicy(Protocol):
    """Decides what KV cache is worth: everything that a cache of chunks has to ask.

    Chunks are named by int64 keys, each of which stands for all of the prompt up to it.
    """

    def begin(
        self,
        keys: np.ndarray,
        now_s: float,
        prompt_tokens: int | None = None,
        hints: Mapping[str, Any] | None = None,
    ) -> int:
        """Take note of a request with these complete chunks; returns its number, 0, 1, 2, ..."""

    def end(
        self, number: int, now_s: float, finish_reason: str | None = None, output_tokens: int = 0
    ) -> None:
        """Take note of the end of a request's generation, and of how it ended."""

    def ask(self, keys: np.ndarray, now_s: float, prices=None) -> Answer:
        """Say what the chunks of a prompt are worth now, at given prices of the tiers.

        It changes nothing: no later answer depends on it.
        """

    def make_room(self, chunks: int, now_s: float) -> np.ndarray:
        """Choose so many chunks to go from the hottest tier; returns their keys."""

    def state(self) -> dict[str, np.ndarray]:
        """Return all that was learned and is known, to be saved."""

    def load(self, state: Mapping[str, np.ndarray]) -> None:
        """Go on where `state` was taken, on an object made with the same arguments."""


class OnlinePolicy:
    """A `CachePolicy` to build on: what goes first is the oldest use.

    Subclasses set `ORDER`, or decide TTLs and tiers in `decide`; see `template`.

    Parameters
    ----------
    capacity : int, or sequence of int or None
        Chunks that gpu holds, or gpu, disk and remote; None: no limit.
    chunk_tokens : int
        Tokens in a chunk.
    remember : int, optional
        Chunks that are known at most, beside those that tiers hold, those in use, and a quarter.
        Default: four times the capacity, 262,144 at least.
    fit : bool
        What becomes of chunks without room: they are stored, and room is made after; True: of a
        prompt the first that fit are stored.

    Examples
    --------
    >>> policy = OnlinePolicy(capacity=3, chunk_tokens=16)
    >>> for second, prompt in enumerate(([1, 2], [3, 4], [1, 2])):
    ...     policy.end(policy.begin(prompt, second), second)
    >>> policy.make_room(1, 3.0).tolist()
    [4]
    """

    ORDER = RECENCY
    KEEPS_TAILS = True  # in replays: incomplete last chunks are chunks

    def __init__(self, capacity=None, chunk_tokens: int = 256, *, remember=None, fit: bool = False):
        limits = list(capacity) if isinstance(capacity, (list, tuple)) else [capacity]
        if not 1 <= len(limits) <= len(TIERS) or not all(_is_count(c) for c in limits):
            raise ValueError(f"capacity must be chunks >= 0, one or up to 3, got {capacity!r:.80}")
        if not _is_count(chunk_tokens) or not chunk_tokens:
            raise ValueError(f"chunk_tokens must be a whole number >= 1, got {chunk_tokens!r:.80}")
        self.levels, self.limits = len(limits), tuple(-1 if c is None else int(c) for c in limits)
        total = sum(c or 0 for c in limits)
        self.remember = max(4 * total, 1 << 18) if remember is None else remember
        bounds = np.full(LEVELS, ABSENT)
        sums = np.cumsum([c or 0 for c in limits])
        for level in range(len(limits)):
            unlimited = None in limits[: level + 1]
            bounds[REAL + level] = FOLLOWED if unlimited else sums[level]
        if self.ORDER == INDEX:
            bounds[LRU_SHADOW:REAL] = bounds[REAL]
        self.rules = Rules(bounds, int(chunk_tokens), self.ORDER, *self._settings(), bool(fit))
        self.runs, self.now = new_runs(), new_now()
        self.hits = np.zeros(LEVELS, np.int64)  # of the last request, chunks by level
        self.path, self._from, self._last = np.empty(64, np.int32), None, 0.0
        self.loads = np.zeros(len(TIERS))  # see `kvttl.policies.worth.ask`

    def _settings(self):
        return Learning(), 240.0, 5.0, 0.002, 0.1, 0.0

    def begin(self, keys, now_s, prompt_tokens=None, hints=None) -> int:
        keys = np.ascontiguousarray(keys, np.int64)
        self.reserve(1, len(keys))
        tokens = len(keys) * self.rules.chunk_tokens
        tokens = tokens if prompt_tokens is None else max(int(prompt_tokens), 0)
        now_s = self._time(now_s)
        state = self.runs, self.now, self.rules
        room_in_shadows(*state, now_s)
        runs, known = begin(*state, keys, now_s, tokens, self.path, self.hits)
        self.decide(self.path[:runs], known, now_s, hints or {})
        return int(self.runs.counter[SEEN]) - 1

    def decide(self, path: np.ndarray, known: int, now_s: float, hints: Mapping) -> None:
        """Decide about a request's runs, first to last, of which the first `known` were known.

        Columns of ``self.runs.run[path]`` to set: ``expires_s`` (seconds, on the policy's own
        clock, as `now_s`; infinite if left alone), ``tier`` (index into TIERS). To read:
        ``count`` uses, this one included, ``gap_s`` since the one before, ``depth`` and
        ``length`` in chunks, and what else `kvttl.policies.runs.RUN` has.
        """

    def end(self, number, now_s, finish_reason=None, output_tokens=0) -> None:
        finish = FINISH_REASONS.get(finish_reason, UNKNOWN)
        advance(self.runs, self.now, self.rules, self._time(now_s))
        told = finish, max(int(output_tokens or 0), 0)
        end(self.runs, self.now, self.rules, number, self._last, *told)

    def ask(self, keys, now_s, prices=None) -> Answer:
        keys = np.ascontiguousarray(keys, np.int64)
        value, ttl_s, tier = np.empty(len(keys)), np.empty(len(keys)), np.empty(len(keys), np.int8)
        levels = self.prices() if prices is None else np.asarray(prices, np.float64)
        now_s, start_s = float(now_s), self._from
        known = start_s is not None and math.isfinite(now_s)
        own_s = max(now_s - start_s, self._last) if known else self._last
        state = self.runs, self.now, self.rules, keys, own_s
        ask(*state, levels, self.loads, MAX_TTL_S, (value, ttl_s, tier))
        return Answer(value, ttl_s, tier < len(levels), np.minimum(tier, len(levels) - 1))

    def prices(self) -> np.ndarray:
        """Return what a place in each tier costs now, (tiers,): the value of what went last."""
        return self.now.price[REAL : REAL + len(TIERS)]

    def make_room(self, chunks, now_s) -> np.ndarray:
        held = int(self.runs.counter[REAL])
        state = self.runs, self.now, self.rules
        recent = by_recency(self.now, self.rules, REAL)
        target = max(held - max(int(chunks), 0), 0)
        now_s = self._time(now_s)
        room_in_shadows(*state, now_s)
        gone = make_room(*state, REAL, target, recent, now_s)
        return _keys_after(self.runs, *gone)

    def sweep(self, now_s, rules=(0.0, 1.0, 0.0)) -> None:
        """Make room in all tiers and shadows; see `kvttl.policies.eviction.sweep_due`."""
        sweep_due(self.runs, self.now, self.rules, rules, self._time(now_s))

    def held_at(self, now_s: float) -> tuple[np.ndarray, np.ndarray]:
        """Return what each level holds, chunks, and has held, chunk-seconds, on its own clock."""
        runs = self.runs.run[: self.runs.size[N_RUNS]]
        alive = (runs["expires_s"] >= now_s)[:, None]
        span_s = np.minimum(runs["expires_s"], now_s) - runs["begin_s"]
        return (runs["held"] * alive).sum(axis=0), self.now.area + span_s @ runs["held"]

    def dropped(self, keys, kept: int) -> None:
        """Take note that of a prompt only the first `kept` chunks are in the hottest tier."""
        keys = np.ascontiguousarray(keys, np.int64)
        self.reserve(0, len(keys))
        runs, _ = walk(self.runs, keys, self.path)
        for run in self.path[:runs]:
            record = self.runs.run[run]
            held = min(max(kept - record["depth"], 0), record["held"][REAL])
            self.runs.counter[REAL] -= record["held"][REAL] - held
            record["held"][REAL] = held

    def state(self) -> dict[str, np.ndarray]:
        parts = self.runs._asdict() | self.now._asdict() | self.now.hazard._asdict()
        parts |= {"times": np.array([np.nan if self._from is None else self._from, self._last])}
        return {name: value.copy() for name, value in parts.items() if name != "hazard"}

    def load(self, state) -> None:
        copies = {name: np.array(value) for name, value in state.items()}
        for name, mine in self.state().items():  # compiled code would not look
            given, grows = copies[name], name in Runs._fields[:-2]
            shapes = [a.shape[1:] if grows else a.shape for a in (given, mine)]
            if given.dtype != mine.dtype or given.ndim != mine.ndim or shapes[0] != shapes[1]:
                raise ValueError(f"{name} is not of this version: {given.dtype}, {given.shape}")
        self.runs = Runs(**{name: copies[name] for name in Runs._fields})
        hazard = Hazard(**{name: copies[name] for name in Hazard._fields})
        self.now = Now(hazard, **{name: copies[name] for name in Now._fields[1:]})
        start, self._last = copies["times"].tolist()
        self._from = None if math.isnan(start) else start

    def reserve(self, requests: int, chunks: int) -> None:
        """Have room for so many requests and all their chunks; forgets what is too old."""
        if self.runs.size[N_KEYS] > self.remember * 5 // 4:
            bounded = np.flatnonzero(self.rules.capacity >= 0)
            moved = forget(self.runs, self.remember, bounded)
            opened = self.now.open_run >= 0
            self.now.open_run[opened] = moved[self.now.open_run[opened]]
            self.now.head[:] = 0
        tidy(self.runs, self.now)
        self.runs = with_room(self.runs, requests, chunks, chunks + 2 * requests)
        if len(self.path) < chunks + 2:
            self.path = np.empty(chunks + 2, np.int32)

    def _time(self, now_s):
        """Return seconds on the policy's own clock, which never goes back; NaN is no time."""
        now_s = float(now_s)
        if math.isfinite(now_s):
            self._from = now_s if self._from is None else min(self._from, now_s - self._last)
            self._last = now_s - self._from
        return self._last


def _is_count(value):
    whole = isinstance(value, (int, np.integer)) and not isinstance(value, bool)
    return value is None or (whole and value >= 0)


@njit(cache=True)
def _keys_after(s, runs, gone):
    """Return the keys of what has gone from the ends of runs' shares of the hottest tier."""
    keys, at = np.empty(gone.sum(), np.int64), 0
    for k in range(len(runs) - 1, -1, -1):
        first = s.run[runs[k]].start + s.run[runs[k]].held[REAL]
        keys[at : at + gone[k]] = s.keys[first : first + gone[k]]
        at += gone[k]
    return keys
