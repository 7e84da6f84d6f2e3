"""What a policy is made with, and what changes while it runs, beside its runs."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from kvttl.policies.hazard import LEAST, Hazard, Learning, new_hazard
from kvttl.policies.runs import LEVELS, SIGNALS

RECENCY, INDEX, EXPIRY = 0, 1, 2  # what goes first: the oldest use, the lowest index, what expired
LRU_SHADOW, INDEX_SHADOW, REAL = 0, 1, 2  # levels; REAL and those after it are nested tiers
OPEN = 1 << 14  # generations that may run at once
FOLLOWED = -1  # as a capacity: what is stored is followed, nothing is evicted
ABSENT = -2  # as a capacity: there is no such level


class Rules(NamedTuple):
    """What does not change during a policy's life."""

    capacity: np.ndarray  # (LEVELS,) int64 chunks; FOLLOWED or ABSENT
    chunk_tokens: int
    order: int  # RECENCY, INDEX or EXPIRY
    learning: Learning
    refresh_s: float  # every row is made anew within it
    turnovers: float  # half life of the duel, in times the cache was filled
    lead: float  # share of tokens by which the index must lead to come into force
    price_memory: float  # share of the capacity over which a price is averaged
    deeper: float  # of the cost to compute a chunk: what each token before it adds, a share
    fit: bool  # what fits is stored; else all, and room is made after


class Now(NamedTuple):
    """What changes, beside the runs."""

    hazard: Hazard
    open_run: np.ndarray  # (OPEN,) int32: last run of the generation, by its number; -1: ended
    open_touch: np.ndarray  # (OPEN,) int64
    price: np.ndarray  # (LEVELS,): index of what goes last, a second
    last_age: np.ndarray  # (LEVELS,): seconds since its use, of what went last by recency
    duel: np.ndarray  # (5,): lead, tokens, halved; 1: index in force; squares until 1: it once was
    clock: (
        np.ndarray
    )  # (5,): now; last refresh, its place; sweeps with victims since a step; next sweep
    head: np.ndarray  # (LEVELS,) int64: places in order below which a cache holds nothing
    area: np.ndarray  # (LEVELS,): chunks x seconds
    stored: np.ndarray  # (LEVELS,) int64: chunks that came in
    codes: np.ndarray  # (SIGNALS,) uint8, scratch


CLOCK, REFRESH, CURSOR, GONE, SWEEP = 0, 1, 2, 3, 4


def new_now() -> Now:
    """Return what holds before the first request."""
    generations = np.full(OPEN, -1, np.int32), np.full(OPEN, -1, np.int64)
    prices = np.full(LEVELS, LEAST), np.full(LEVELS, np.inf)
    counts = np.zeros(5), np.zeros(5), np.zeros(LEVELS, np.int64), np.zeros(LEVELS)
    scratch = np.zeros(SIGNALS, np.uint8)
    return Now(new_hazard(), *generations, *prices, *counts, np.zeros(LEVELS, np.int64), scratch)
