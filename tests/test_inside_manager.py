"""A manager outside on an LMCache server that decides by itself: it hands its decisions over."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import urllib.request

import pytest
from conftest import SharedEngine, new_stack
from waiting import wait_until

from caching_heuristics import HeuristicConfig
from kvttl.lmcache.lease import AlreadyManaged
from kvttl.session.launch import managed
from tiered_caching import MultiTierCache

HOT = {"perplexity": 5.0, "time_variance": 0.0}
CONFIG = HeuristicConfig(base_ttl=2, min_ttl=0.1, disk_ttl_factor=1, remote_ttl_factor=2)


@pytest.fixture(scope="module")
def stack(tmp_path_factory, redis_url):
    with new_stack(tmp_path_factory.mktemp("inside"), redis_url, inside=True) as running:
        yield running


@pytest.fixture(scope="module")
def llm(stack):
    engine = SharedEngine(stack)
    yield engine.get()
    engine.close()


@pytest.fixture
def managers(stack, llm):
    """A function that makes managers of the engine; the last one leads."""
    made = []

    def make(config=CONFIG, **options):
        made.append(managed(stack, llm, config, **{"sweep_every_s": None, **options}))
        return made[-1]

    yield make
    for cache in made:
        cache.close()


def tiers_of(cache, text):
    layout = cache.controller.layout(cache.controller.tokenize(text))
    return [tiers[0] if tiers else None for tiers in layout.of(cache.controller.instance_id)]


def ask(stack, path, body=None):
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(stack.config.server_http_url + path, data)
    try:
        with urllib.request.urlopen(request) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def test_a_prompt_goes_down_the_ladder_as_the_clock_outside_says(managers, llm, greedy, fresh_text):
    now = [1000.0]
    cache = managers(clock=lambda: now[0])
    text = fresh_text()
    plain = llm.generate(text + " ", greedy, use_tqdm=False)[0]
    first = cache.generate_and_manage(text, greedy, HOT)
    (record,) = cache.records
    assert record.error == "" and record.time_s == 1000.0
    assert (record.wanted_tier, record.chunks) == ("gpu", len(tiers_of(cache, text)))
    assert set(record.metadata_sources.values()) == {"caller", "history"}
    assert greedy.extra_args is None and plain.outputs
    assert len(cache.claims) >= 1 and 1001.0 < cache.claims.next_due_s < 1003.0
    wait_until(lambda: set(tiers_of(cache, text)) == {"gpu"})
    for passed_s, tier in ((2.3, "disk"), (2.3, "remote"), (4.6, None)):
        now[0] += passed_s
        swept = cache.sweep()
        mine = [each for each in swept if each.prompt_digest == record.prompt_digest]
        assert [(each.wanted_tier, each.error) for each in mine] == [(tier, "")]
        wait_until(lambda tier=tier: set(tiers_of(cache, text)) == {tier})
    assert cache.generate_and_manage(text, greedy, HOT) == first
