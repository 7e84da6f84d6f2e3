"""Measures what a hit in each tier costs, on a real stack."""

import random
import time

from caching_heuristics import TIERS
from kvttl.replay.costs import TierCosts, fit_costs
from kvttl.session.launch import greedy
from kvttl.session.texts import random_words


def calibrate(
    cache: object,
    words: tuple[int, ...] = (60, 240),
    repeats: int = 3,
    bytes_per_token: float = TierCosts.bytes_per_token,
    seed: int = 0,
) -> TierCosts:
    """Measure the running stack: new prompts, then the same from gpu, disk and remote.

    Parameters
    ----------
    cache : MultiTierCache
        With an engine; `kvttl.session.launch.managed` makes one.
    words : sequence of int
        Lengths of the prompts, two or more different ones.
    repeats : int
        Prompts of each length, after one of each to warm up.
    bytes_per_token : float
        KV cache of a token of the served model.
    seed : int
        Of the prompts' text.
    """
    if len(set(words)) < 2 or min(words) < 1 or repeats < 1:
        raise ValueError(f"words must be two different lengths >= 1, got {words!r}")
    rng, records, number = random.Random(seed), [], 0
    while number <= repeats or (number <= repeats + _MORE and _unseen(records)):
        for length in words:
            made = _serve_from_each_tier(cache, random_words(rng, length))
            records += made if number else []  # the first ones warm up
        number += 1
    return fit_costs(records, TierCosts(bytes_per_token=bytes_per_token))


# Before each generation: LMCache writes through after the answer; a load meanwhile takes longer.
_PAUSE_S = 0.2
_MORE = 4  # rounds more while a tier has served nothing: a busy server moves late


def _unseen(records):
    """Return the tiers that served none of the records alone."""
    alone = [{tier for tier, n in record.hit_tokens.items() if n} for record in records]
    return [tier for tier in TIERS if {tier} not in alone]


_PLACING = (  # metadata that place a prompt in gpu, disk, remote, for the next time
    {"perplexity": 9.0, "time_variance": 0.0},
    {"perplexity": 30.0, "time_variance": 0.9},
    {"perplexity": 90.0, "time_variance": 0.0},
)


def _serve_from_each_tier(cache, prompt):
    """Generate once anew and once from each tier; returns the four records."""
    sampling, records = greedy(1), []
    for metadata in (*_PLACING, _PLACING[0]):
        time.sleep(_PAUSE_S)
        (managed,) = cache.generate(prompt, sampling, metadata)
        records.append(managed.decision.result())
    return records
