"""libCacheSim's policies on the same accesses; its LRU and FIFO equal ours exactly."""

from __future__ import annotations

import math

import numpy as np
import pytest
import trace_fixtures as fixtures

from kvttl.replay.baselines import (
    BASELINES,
    LEAST_BLOCKS,
    BaselineFile,
    next_accesses,
    replay_baseline,
)
from kvttl.replay.costs import result_costs
from kvttl.replay.engine import replay
from kvttl.traces.builder import make_trace
from kvttl.traces.generator import agent_loops

SHARES = (0.01, 0.05, 0.1, 0.25, 0.5, 1.0)
SMALL = agent_loops(150, seed=4)


def test_exactly_these_baselines_are_known():
    assert list(BASELINES) == ("FIFO LRU LFU ARC S3-FIFO SIEVE W-TinyLFU GDSF LIRS Belady".split())


@pytest.mark.parametrize("name", ["sample", "conversation", "agentic"])
def test_lru_and_fifo_hit_exactly_as_often_as_libcachesims(name):
    """Where a real trace is not at hand, a generated one stands in."""
    stand_in = agent_loops(400, seed=len(name))
    trace = fixtures.real_or_sample().get(name, stand_in)
    with BaselineFile(trace) as file:
        for share in SHARES:
            for policy in ("LRU", "FIFO"):
                ours = replay(trace, policy.lower(), share).block_level_hits
                assert ours == file.hits(policy, share), (policy, share)


@pytest.mark.parametrize("seed", range(5))
def test_lru_and_fifo_equal_on_random_traces(seed):
    trace = fixtures.random_trace(seed, requests=200)
    with BaselineFile(trace) as file:
        for blocks in (1, 2, 3, 10, 50, trace.unique_blocks):
            for policy in ("LRU", "FIFO"):
                ours = replay(trace, policy.lower(), blocks)
                assert ours.block_level_hits == file.hits(policy, blocks)
                theirs = replay_baseline(trace, policy, blocks)
                assert theirs.block_level_hits == ours.block_level_hits
                assert np.array_equal(theirs.hit_tokens, ours.hit_tokens)


@pytest.mark.parametrize("policy", BASELINES)
def test_both_ways_count_the_same_hits(policy):
    with BaselineFile(SMALL) as file:
        for share in (0.15, 0.5):
            result = replay_baseline(SMALL, policy, share)
            assert result.block_level_hits == file.hits(policy, share)
            assert result.hit_blocks.sum() <= result.block_level_hits
            assert result.token_hit_ratio <= replay(SMALL, "infinite").token_hit_ratio
        assert result.hit_blocks.sum() > 0


@pytest.mark.parametrize("policy", BASELINES)
def test_every_baseline_hits_with_half_of_the_sample(policy):
    sample = fixtures.sample()
    with BaselineFile(sample) as file:
        assert file.hits(policy, 0.5) > 0
    assert replay_baseline(sample, policy, 0.5).token_hit_ratio > 0


@pytest.mark.parametrize("policy, least", LEAST_BLOCKS.items())
def test_below_its_least_blocks_a_policy_is_not_known(policy, least):
    sample = fixtures.sample()
    with BaselineFile(sample) as file:
        for blocks in (1, least - 1):  # libcachesim would abort the process with one
            assert math.isnan(file.hits(policy, blocks))
            result = replay_baseline(sample, policy, blocks)
            assert math.isnan(result.token_hit_ratio) and math.isnan(result.block_hit_ratio)
            assert math.isnan(result.since(60.0)["token_hit_ratio"])
            assert result.block_level_hits is None
            assert math.isnan(result_costs(result)["ttft_mean_s"])
        assert file.hits(policy, 0) == 0
        assert file.hits(policy, least) >= 0
    assert replay_baseline(sample, policy, least).token_hit_ratio >= 0


@pytest.mark.parametrize("share", [0.02, 0.1, 0.4])
def test_no_baseline_hits_more_blocks_than_belady(share):
    with BaselineFile(SMALL) as file:
        hits = {policy: file.hits(policy, share) for policy in BASELINES}
    assert np.nanmax(list(hits.values())) == hits["Belady"]


def test_no_baseline_beats_the_prefix_optimum():
    for share in (0.05, 0.2):
        best = replay(SMALL, "optimal", share).block_hit_ratio
        for policy in BASELINES:
            assert not replay_baseline(SMALL, policy, share).block_hit_ratio > best, policy


def test_next_accesses():
    assert next_accesses(np.array([0, 1, 0, 1, 2], np.int32)).tolist() == [2, 3, -1, -1, -1]


def test_empty_traces_no_capacity_and_unknown_names():
    empty = make_trace([])
    with BaselineFile(empty) as file:
        assert file.hits("LRU", 5) == 0
    assert replay_baseline(empty, "LRU", 5).block_hit_ratio == 0.0
    assert replay_baseline(SMALL, "LRU", 0).hit_blocks.sum() == 0
    with pytest.raises(ValueError, match="unknown policy"):
        replay_baseline(SMALL, "lru", 5)
