"""When will a run of chunks be used again? An additive logistic hazard, learned online.

Ages are counted in bins from the end of the generation that used a run last. While it runs nobody
knows how it will end: then ages count from the use, by a model of its own, which learns from all
uses without what ends told. The log odds of the next use in bin j, if it has not come before, are
the sum of the bin's own weight and of one weight for each signal's code and group of bins. A run
that outlives a bin unused is an example against, its next use one in favour. Steps are Adagrad's
(Duchi et al., 2011), which forgets; weights in force are an average (Polyak, 1992), so that single
examples do not move decisions.

From the hazard comes the index (Gittins, 1979; as "hit density": Beckmann et al., LHD, 2018): the
most hits per second of memory that a run can still give, over all times to keep it.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numba import njit

from kvttl.policies.runs import BINS, SIGNALS

# Seconds: 0, 1, 1.5, 2.25, ... 3325; the last bin has no end.
EDGES_S = np.concatenate([[0.0], np.round(1.5 ** np.arange(BINS - 1), 2)])
GROUP = np.clip((np.arange(BINS) - 2) // 3, 0, 6)  # bins that share the signals' weights
GROUPS = int(GROUP[-1]) + 1
# Codes of the signals, in the order of `signals`, and of two crosses:
# uses x tokens after, uses x output.
SIZES = (9, 3, 9, 11, 11, 9, 10, 11, 6, 4, 9 * 6, 9 * 9)
TERMS = len(SIZES)
BASE = np.cumsum([0, *SIZES])
WEIGHTS = BINS + int(BASE[-1]) * GROUPS
_TAIL_S = 2000.0  # what the last bin counts for
LEAST = 1e-9  # a second: of a hazard, an index, a price


class Hazard(NamedTuple):
    """Two models, by age since the end (0) and since the use (1), and how far learning is."""

    weight: np.ndarray  # (2, WEIGHTS)
    square: np.ndarray  # (2, WEIGHTS): Adagrad's sums
    mean: np.ndarray  # (2, WEIGHTS): in force
    bin_at: np.ndarray  # (2, BINS) int64: places in the log up to which each bin has been learned
    steps: np.ndarray  # (2,): of the average; when the last was, seconds


class Learning(NamedTuple):
    """Settings of `Hazard`."""

    rate: float = 0.05
    every_s: float = 30.0  # between two steps of forgetting and of the average
    average_s: float = 300.0  # half life
    forget_s: float = 1200.0  # half life of Adagrad's sums, never under 1


def new_hazard() -> Hazard:
    """Return the prior: hazard 0.3 / (30 + age) a second for all, which orders as LRU does."""
    weight = np.zeros((2, WEIGHTS))
    weight[:, : BINS - 1] = np.log(np.expm1(np.diff(EDGES_S) * 0.3 / (30 + EDGES_S[:-1])))
    weight[:, BINS - 1] = -1.0
    at, steps = np.zeros((2, BINS), np.int64), np.array([1.0, 0.0])
    return Hazard(weight, np.ones((2, WEIGHTS)), weight.copy(), at, steps)


@njit(cache=True)
def places(codes, at):
    """Fill in where the weights of a run's codes are, for the first group of bins."""
    for k in range(SIGNALS):
        at[k] = BINS + (BASE[k] + codes[k]) * GROUPS
    at[SIGNALS] = BINS + (BASE[SIGNALS] + np.int64(codes[0]) * 6 + codes[8]) * GROUPS
    at[SIGNALS + 1] = BINS + (BASE[SIGNALS + 1] + np.int64(codes[0]) * 9 + codes[2]) * GROUPS


@njit(cache=True)
def hide_end(at):
    """Take what the end of the generation tells out of the places of a run's weights."""
    use = (at[0] - BINS) // GROUPS
    at[1], at[2] = BINS + BASE[1] * GROUPS, BINS + BASE[2] * GROUPS
    at[SIGNALS + 1] = BINS + (BASE[SIGNALS + 1] + use * 9) * GROUPS


@njit(cache=True)
def bin_of(age_s, j):
    """Return the bin of an age, looked for from bin j on."""
    while EDGES_S[j] > age_s:
        j -= 1
    while j < BINS - 1 and EDGES_S[j + 1] <= age_s:
        j += 1
    return j


@njit(cache=True)
def learn(h, which, at, j, used, size, rate):
    """One step: runs with weights at `at` were used in bin j (1.0) or outlived it (0.0)."""
    weight, square = h.weight[which], h.square[which]
    odds = weight[j]
    for k in range(TERMS):
        odds += weight[at[k] + GROUP[j]]
    gradient = (1.0 / (1.0 + np.exp(-odds)) - used) * size
    for k in range(-1, TERMS):
        i = j if k < 0 else at[k] + GROUP[j]
        square[i] += gradient * gradient
        weight[i] -= rate * gradient / np.sqrt(square[i])


@njit(cache=True)
def average(h, steps, setting):
    """Forget, and move the weights in force, as after so many steps."""
    h.steps[0] += steps
    fade = 0.5 ** (steps * setting.every_s / setting.forget_s)
    share = max(1.0 - 0.5 ** (steps * setting.every_s / setting.average_s), 1.0 / h.steps[0])
    for which in range(2):  # as arrays this would take seconds to compile
        for i in range(WEIGHTS):
            h.square[which, i] = max(h.square[which, i] * fade, 1.0)
            h.mean[which, i] += share * (h.weight[which, i] - h.mean[which, i])


@njit(cache=True)
def hazard_row(weight, codes, hazard):
    """Fill in the hazard of a run in each bin, (BINS,) a second."""
    at = np.empty(TERMS, np.int64)
    places(codes, at)
    shared = np.zeros(GROUPS)
    for k in range(TERMS):
        for g in range(GROUPS):
            shared[g] += weight[at[k] + g]
    for j in range(BINS - 1):
        odds = np.log1p(np.exp(weight[j] + shared[GROUP[j]]))
        hazard[j] = max(odds / (EDGES_S[j + 1] - EDGES_S[j]), LEAST)
    hazard[BINS - 1] = 0.5 * hazard[BINS - 2]


@njit(cache=True)
def index_row(weight, codes, row):
    """Fill in the index of a run at the start of each bin, (BINS,).

    The most of P(use) / E[time held] over all times to stop is the slope of the first piece of
    the least concave majorant; joining pieces from the back finds it in one pass.
    """
    hits, held, left = np.empty(BINS), np.empty(BINS), np.empty(BINS)  # of the pieces so far
    after = np.empty(BINS, np.int64)  # the piece that follows each
    hazard = np.empty(BINS)
    hazard_row(weight, codes, hazard)
    for j in range(BINS - 1, -1, -1):
        width_s = EDGES_S[j + 1] - EDGES_S[j] if j < BINS - 1 else _TAIL_S
        left[j] = np.exp(-hazard[j] * width_s)
        hits[j] = 1.0 - left[j]
        held[j] = hits[j] / hazard[j]
        after[j] = j + 1
        while after[j] < BINS:
            k = after[j]
            if hits[k] * held[j] <= hits[j] * held[k]:
                break
            hits[j] += left[j] * hits[k]
            held[j] += left[j] * held[k]
            left[j] *= left[k]
            after[j] = after[k]
        row[j] = hits[j] / held[j]


@njit(cache=True)
def index_at(row, age_s):
    """Return the index at an age: linear between the bins' starts, ~ 1 / age after the last."""
    return index_in(row, bin_of(age_s, 0), age_s)


@njit(cache=True)
def index_in(row, j, age_s):
    """Return the index at an age in bin j."""
    if j == BINS - 1:
        return row[j] * EDGES_S[j] / max(age_s, EDGES_S[j])
    share = (age_s - EDGES_S[j]) / (EDGES_S[j + 1] - EDGES_S[j])
    return row[j] * (1.0 - share) + row[j + 1] * share


@njit(cache=True)
def seconds_above(row, age_s, price):
    """Return how long from an age on the index stays above a price, at most for ever."""
    before_s, before = age_s, index_at(row, age_s)
    if before <= price:
        return 0.0
    for j in range(bin_of(age_s, 0) + 1, BINS):
        if row[j] <= price:
            share = (before - price) / (before - row[j])
            return before_s + (EDGES_S[j] - before_s) * share - age_s
        before_s, before = EDGES_S[j], row[j]
    return row[BINS - 1] * EDGES_S[BINS - 1] / price - age_s
