"""The whole loop on the real stack: generate, decide, move, survive what breaks."""

from __future__ import annotations

import threading

import pytest
import requests
from waiting import wait_until

from cache_controller import LMCacheController
from caching_heuristics import HeuristicConfig
from tiered_caching import MultiTierCache

HOT = {"perplexity": 12.0, "time_variance": 0.05}
WARM = {"perplexity": 35.0, "time_variance": 0.1}
COLD = {"perplexity": 80.0, "time_variance": 0.1}


@pytest.fixture
def cache(stack, llm):
    manager = MultiTierCache(
        LMCacheController(stack.host, stack.port, instance_id=stack.instance_id), llm, notify=None
    )
    yield manager
    manager.close()


def tiers_of(cache, text):
    """Return the hottest tier of each chunk, by the directory."""
    layout = cache.controller.layout(cache.controller.tokenize(text))
    return [tiers[0] if tiers else None for tiers in layout.of(cache.controller.instance_id)]


def all_in(cache, text, tier):
    return wait_until(lambda: set(tiers_of(cache, text)) == {tier})


# ---- what the requirements document shows ------------------------------------------


def test_usage_of_the_requirements_document(stack, llm, greedy, capsys, fresh_text):
    lmcache_controller = LMCacheController(host="127.0.0.1", port=stack.port)
    sampling_params, prompt = greedy, "What is machine learning? " + fresh_text()

    cache_manager = MultiTierCache(lmcache_controller)
    cache_manager.set_llm(llm)
    metadata = {"perplexity": 35.0, "time_variance": 0.5}
    output = cache_manager.generate_and_manage(prompt, sampling_params, metadata)

    assert output == llm.generate(prompt, sampling_params, use_tqdm=False)[0].outputs[0].text
    assert capsys.readouterr().out == "✓ Moved KV from gpu to disk (TTL: 1767s)\n"
    cache_manager.generate_and_manage(prompt, sampling_params, {"perplexity": 35.0})
    # 3534 s on first sight; one earlier access, which the manager has counted, gives more
    assert capsys.readouterr().out == "✓ KV in disk, TTL: 4146s\n"
    cache_manager.close()


def test_without_engine_is_a_clear_error(stack):
    with pytest.raises(RuntimeError, match="set_llm"):
        MultiTierCache(LMCacheController(stack.host, stack.port)).generate_and_manage("x", None)


def test_metadata_is_optional_and_measured(cache, greedy, fresh_text):
    text = fresh_text()
    for uses in range(3):
        assert cache.generate_and_manage(text, greedy)
        record = cache.records[-1]
        assert record.error == "" and record.metadata["access_count"] == uses
        assert record.metadata["perplexity"] >= 1.0
        assert record.metadata_sources == {
            "perplexity": "generation",
            "access_count": "history",
            "time_variance": "history",
            "seconds_since_access": "history",
        }
    assert 0.0 < record.metadata["seconds_since_access"] < 60.0
    assert 0.0 <= record.metadata["time_variance"] < 0.6
    config = cache.config
    assert (record.ttl_s, record.wanted_tier) == (
        config.ttl(record.metadata),
        config.tier(record.metadata),
    )


# ---- decisions become placements, and placements serve ------------------------------


def test_first_generation_is_in_all_three_tiers(cache, greedy, fresh_text):
    text = fresh_text()
    cache.generate_and_manage(text, greedy, HOT)
    tokens = cache.controller.tokenize(text)
    wait_until(lambda: cache.controller.lookup(tokens).get(cache.controller.instance_id)
               == ["gpu", "disk", "remote"])  # fmt: skip
    assert cache.records[-1].hit_tokens == {}


@pytest.mark.parametrize(
    "path",
    [
        [(HOT, "gpu"), (WARM, "disk"), (COLD, "remote"), (HOT, "gpu")],
        [(WARM, "disk"), (HOT, "gpu"), (COLD, "remote")],
        [(COLD, "remote"), (WARM, "remote")],  # LMCache cannot write a missing disk copy
    ],
)
def test_each_decision_moves_and_the_next_generation_is_served_from_there(
    cache, llm, greedy, fresh_text, path
):
    text, texts, before = fresh_text(), set(), None
    for metadata, expected in path:
        texts.add(cache.generate_and_manage(text, greedy, metadata))
        record = cache.records[-1]
        assert record.error == ""
        all_in(cache, text, expected)
        if before:  # every complete chunk came from where the last decision had put it
            assert set(record.hit_tokens) == {before}
            chunk_tokens = record.chunks * cache.controller.chunk_size_tokens
            assert record.hit_tokens[before] in (chunk_tokens, record.prompt_tokens - 1)
        before = expected
    assert len(texts) == 1  # the tokens are those of the first, uncached generation


def test_shared_prefix_survives_another_prompts_demotion(cache, llm, greedy, fresh_text):
    system = fresh_text(200)
    hot, cold = system + " first " + fresh_text(60), system + " second " + fresh_text(60)
    cache.generate_and_manage(hot, greedy, HOT)
    cache.generate_and_manage(cold, greedy, COLD)
    shared = cache.records[-1].hit_tokens["gpu"] // cache.controller.chunk_size_tokens
    assert shared >= 3
    placed = wait_until(lambda: "remote" in (t := tiers_of(cache, cold)) and None not in t and t)
    assert set(placed[:shared]) == {"gpu"} and set(placed[shared:]) == {"remote"}
    all_in(cache, hot, "gpu")
    before = cache.controller.tokenize(hot)
    cache.generate_and_manage(hot, greedy, HOT)
    assert set(cache.records[-1].hit_tokens) == {"gpu"}
    assert sum(cache.records[-1].hit_tokens.values()) >= len(before) // 32 * 32 - 1


def test_shared_prefix_follows_when_the_last_hot_claim_has_ended(stack, llm, greedy, fresh_text):
    now = [1000.0]
    cache = MultiTierCache(
        LMCacheController(stack.host, stack.port, instance_id=stack.instance_id),
        llm,
        config=HeuristicConfig(base_ttl=100, min_ttl=1),
        notify=None,
        clock=lambda: now[0],
    )
    system = fresh_text(200)
    hot, cold = system + " first " + fresh_text(60), system + " second " + fresh_text(60)
    cache.generate_and_manage(hot, greedy, HOT)
    all_in(cache, hot, "gpu")
    now[0] += 1000.0  # far beyond the TTL
    cache.generate_and_manage(cold, greedy, COLD)
    all_in(cache, cold, "remote")
    cache.close()


# ---- nothing in the decision path breaks a generation ---------------------------------


@pytest.mark.parametrize(
    ("metadata", "reason"),
    [
        ({"perplexity": -1}, "perplexity must be > 0"),
        ({"time_variance": 3}, "time_variance must be 0..1, got 3"),
        ({"access_count": "many"}, "access_count must be a number"),
        ([1, 2], "metadata"),
        ({"perplexity": [1.0, 2.0]}, "perplexity must be a number"),
        ({"perplexty": 90.0}, "did you mean 'perplexity'"),
    ],
)
def test_bad_metadata_becomes_a_record(cache, greedy, fresh_text, metadata, reason):
    assert cache.generate_and_manage(fresh_text(), greedy, metadata)
    assert cache.records[-1].error and reason in cache.records[-1].error


def test_a_bug_anywhere_in_the_decision_path_costs_no_text(cache, greedy, fresh_text, monkeypatch):
    def broken(*_args, **_kwargs):
        raise ZeroDivisionError("a bug")

    for owner, name in [
        (cache.controller, "layout"),
        (cache.claims, "claim"),
        (cache, "clock"),
        (cache._records, "notify"),
    ]:
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, broken)
            assert cache.generate_and_manage(fresh_text(), greedy, WARM)
            if name != "notify":
                assert cache.records[-1].error == "ZeroDivisionError: a bug"


def test_the_engines_own_error_passes_through(cache, greedy):
    with pytest.raises(Exception, match="maximum context length"):
        cache.generate_and_manage("word " * 5000, greedy, HOT)  # beyond max_model_len


# ---- services die (kept last: the whole session shares them) ---------------------------


def managed_again(cache, fresh_text, greedy, metadata=WARM, tier="disk"):
    """Return once a new prompt is generated, managed and where it should be."""

    def attempt():
        text = fresh_text()
        assert cache.generate_and_manage(text, greedy, metadata)
        record = cache.records[-1]
        return not record.error and set(record.tier_after) == {tier}

    return wait_until(attempt)


@pytest.fixture
def asked(monkeypatch):
    """The URLs that this thread asks, on which generations wait; a thread may try another."""
    urls, request, us = [], requests.Session.request, threading.current_thread()

    def noting(session, method, url, **options):
        if threading.current_thread() is us:
            urls.append(url)
        return request(session, method, url, **options)

    monkeypatch.setattr(requests.Session, "request", noting)
    return urls


def test_coordinator_killed(stack, cache, asked, greedy, fresh_text):
    managed_again(cache, fresh_text, greedy)
    stack.kill("coordinator")
    assert cache.generate_and_manage(fresh_text(), greedy, WARM)
    record = cache.records[-1]
    assert "LMCacheUnavailable" in record.error and str(stack.port) in record.error
    assert (record.wanted_tier, record.ttl_s) == ("disk", pytest.approx(3180, abs=2))
    assert asked
    asked.clear()
    for _ in range(3):
        assert cache.generate_and_manage(fresh_text(), greedy, WARM)
        assert cache.records[-1].error
    assert not asked  # no generation waits for what is known to be away
    stack.start_one("coordinator")
    managed_again(cache, fresh_text, greedy)


def test_server_killed(stack, cache, asked, greedy, fresh_text):
    managed_again(cache, fresh_text, greedy)
    stack.kill("server")
    assert cache.generate_and_manage(fresh_text(), greedy, WARM)
    assert "LMCacheUnavailable" in cache.records[-1].error
    asked.clear()
    for _ in range(3):
        assert cache.generate_and_manage(fresh_text(), greedy, WARM)
        assert cache.records[-1].error
    assert asked and not [url for url in asked if url.startswith(stack.server_http_url)]
    stack.start_one("server")
    managed_again(cache, fresh_text, greedy)


def test_redis_killed(stack, cache, greedy, fresh_text, real_redis):
    managed_again(cache, fresh_text, greedy, COLD, "remote")
    real_redis.kill()
    text = fresh_text()
    assert cache.generate_and_manage(text, greedy, COLD)
    record = cache.records[-1]
    assert record.moves[0]["status"] == "timeout"
    assert "no copy in remote" in record.moves[0]["reason"]
    assert set(tiers_of(cache, text)) == {"gpu"}  # the source is kept
    managed_again(cache, fresh_text, greedy, WARM, "disk")  # disk still takes moves
    real_redis.start()
    stack.restart("server")  # LMCache 0.5.6 does not reconnect to a Redis that was away
    managed_again(cache, fresh_text, greedy, COLD, "remote")
