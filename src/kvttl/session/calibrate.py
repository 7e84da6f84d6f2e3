"""Measures what a hit in each tier costs, on a real stack."""

import random
import time
from types import SimpleNamespace

from caching_heuristics import TIERS
from kvttl.replay.costs import TierCosts, fit_costs
from kvttl.session.launch import greedy
from kvttl.session.texts import random_words
from kvttl.stack.process import comes_true


def calibrate(
    cache: object,
    words: tuple[int, ...] = (30, 240, 480),
    repeats: int = 3,
    bytes_per_token: float = TierCosts.bytes_per_token,
    seed: int = 0,
) -> TierCosts:
    """Measure the running stack: new prompts, then the same from gpu, disk and remote.

    Before each generation LMCache has nothing left to write. The time is that of the first
    token where the engine says it, else the call's.

    Parameters
    ----------
    cache : MultiTierCache
        With an engine; `kvttl.session.launch.managed` makes one.
    words : sequence of int
        Lengths of the prompts, two or more different ones; three show prefill's quadratic part.
    repeats : int
        Prompts of each length, after one of each to warm up.
    bytes_per_token : float
        KV cache of a token of the served model.
    seed : int
        Of the prompts' text.

    Raises
    ------
    RuntimeError
        LMCache goes on writing, so that nothing can be measured.
    """
    if len(set(words)) < 2 or min(words) < 1 or repeats < 1:
        raise ValueError(f"words must be two different lengths >= 1, got {words!r}")
    rng, records, number = random.Random(seed), [], 0
    while number <= repeats or (number <= repeats + _MORE and _unseen(records)):
        for length in words:
            made = _serve_from_each_tier(cache, random_words(rng, length))
            records += made if number else []  # the first ones warm up
        number += 1
    costs = TierCosts(bytes_per_token=bytes_per_token)
    return fit_costs(records, costs, [record.stored_tokens for record in records])


_REST_S = 120.0  # the longest wait for LMCache to have written what it was given
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


_UNSTORED = {"extra_args": {"kv_transfer_params": {"lmcache.max_offload_tokens": 0}}}


def _serve_from_each_tier(cache, prompt):
    """Generate twice anew, the first time without storing, and once from each tier."""
    _wait(cache)
    start_s = time.perf_counter()  # past the manager, which allows nobody not to store
    (output,) = cache.llm.generate([prompt], greedy(1, **_UNSTORED), use_tqdm=False)
    took_s, tokens = time.perf_counter() - start_s, len(output.prompt_token_ids)
    records = [_measured(output, took_s, tokens, {}, 0)]
    for metadata in (*_PLACING, _PLACING[0]):
        _wait(cache)
        (managed,) = cache.generate(prompt, greedy(1), metadata)
        record = managed.decision.result()
        tokens, hits = record.prompt_tokens, record.hit_tokens
        new = tokens - sum(hits.values())
        records.append(_measured(managed.output, record.generate_s, tokens, hits, new))
    return records


def _wait(cache):
    if not comes_true(lambda: not cache.controller.work_left(), _REST_S):
        raise RuntimeError(f"LMCache is still writing after {_REST_S:g} s")


def _measured(output, took_s, prompt_tokens, hit_tokens, stored_tokens):
    """Return what `fit_costs` needs of a generation."""
    took_s = getattr(getattr(output, "metrics", None), "first_token_latency", 0.0) or took_s
    about = {"prompt_tokens": prompt_tokens, "hit_tokens": hit_tokens}
    return SimpleNamespace(**about, generate_s=took_s, stored_tokens=stored_tokens)
