"""The regret meter: its sampled caches against full ones, what it counts and cannot break."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import bench_meter
import numpy as np
import pytest
from local_managers import (
    CHUNK,
    COLD,
    CONFIG,
    HOT,
    HOT_TTL_S,
    Clock,
    local_controller,
    local_manager,
)
from test_decision_metrics import scrape

from kvttl.decisions.log import DecisionRecord
from kvttl.decisions.metrics import METRICS, DecisionMetrics
from kvttl.lmcache.client import LMCacheUnavailable
from kvttl.meter.live import SHADOWS, RegretMeter
from kvttl.meter.shadows import POLICIES, Asked, Shadows
from kvttl.session.launch import managed
from kvttl.stack.config import StackConfig
from kvttl.traces.generator import agent_loops

DASHBOARD = Path(__file__).parents[1] / "data" / "grafana_dashboard.json"


# --- how far the sample is off ----------------------------------------------------------------


@pytest.fixture(scope="module")
def trace():
    return agent_loops(1_500, seed=1)


@pytest.fixture(scope="module")
def full(trace):
    return bench_meter.full_ratios(trace, trace.unique_blocks // 10)


def test_without_a_sample_it_counts_what_a_replay_of_the_whole_trace_does(trace, full):
    metered, one_of = bench_meter.metered_ratios(trace, trace.unique_blocks // 10)
    assert one_of == 1 and set(metered) == set(SHADOWS) == {*POLICIES, "optimum"}
    assert metered == pytest.approx(full, abs=1e-9)
    assert full["lru"] < full["optimum"]


def test_a_sample_is_within_a_hundredth(trace, full):
    capacity = trace.unique_blocks // 10
    runs = [bench_meter.metered_ratios(trace, capacity, capacity // 2, seed) for seed in range(4)]
    assert {one_of for _, one_of in runs} == {4} if capacity % 2 else {2}
    for name, ratio in full.items():
        assert np.mean([metered[name] for metered, _ in runs]) == pytest.approx(ratio, abs=0.01)
        assert all(abs(metered[name] - ratio) < 0.02 for metered, _ in runs), name


def test_one_chunk_that_all_share_does_not_decide_the_ratio():
    """In or out of the sample, a system prompt counts as often as it is asked for."""
    rng = np.random.default_rng(0)
    prompts = [rng.integers(-(2**63), 2**63, 3) for _ in range(2_000)]
    found = []
    for seed in range(12):
        shared = np.random.default_rng(100 + seed).integers(-(2**63), 2**63, 1)
        shadows = Shadows(4_096, 16, sampled=1_024)
        asked = [
            Asked(np.concatenate([shared, rest]), float(at), float(at), 64)
            for at, rest in enumerate(prompts)
        ]
        tokens = shadows.play(asked)["lru"]
        found.append(tokens.hit / tokens.asked)
    assert shadows.bits == 2
    assert found == pytest.approx([0.25] * 12, abs=0.02)


# --- in a manager ------------------------------------------------------------------------------


def metered_manager(**options):
    """A local manager with a meter, and its metrics and clock."""
    controller, metrics, clock = local_controller(), DecisionMetrics(), Clock()
    meter = RegretMeter(controller, CONFIG, metrics, every_s=3600.0)
    made = {"clock": clock, "metrics": metrics, "meter": meter, **options}
    return local_manager(controller, **made), metrics, clock, meter


def test_a_manager_counts_what_other_policies_would_have_hit():
    cache, metrics, clock, meter = metered_manager()
    prompt = "x" * (3 * CHUNK + 2)
    with cache:
        for pause_s in (0.0, 200.0, 1000.0):
            clock.now_s += pause_s
            cache.generate_and_manage(prompt, None, HOT)
        meter.measure()
        clock.now_s += 8_000.0
        cache.generate_and_manage(prompt, None, HOT)
        meter.measure()
        found = scrape(metrics)
    asked, whole = found["kvttl_shadow_prompt_tokens_total", "lru"], 3 * CHUNK
    assert asked == 4 * len(prompt)
    hits = {name: found["kvttl_shadow_hit_tokens_total", name] for name in SHADOWS}
    # TTLs: 300 s, an hour, and the formula's 100 s.
    assert hits == {
        "lru": 3 * whole, "fixed_5m": whole, "fixed_1h": 2 * whole, "formula": 0,
        "adaptive": 3 * whole, "optimum": 2 * whole,
    }  # fmt: skip
    assert found["kvttl_shadow_prompt_tokens_total", "optimum"] == 3 * len(prompt)
    assert found["kvttl_meter_failures_total",] == meter.failures == 0


def test_tenants_and_short_prompts():
    cache, metrics, _clock, meter = metered_manager()
    prompt = "x" * (2 * CHUNK)
    with cache:
        for salt in ("a", "b", "a"):
            output = SimpleNamespace(prompt_token_ids=list(prompt.encode()), outputs=[])
            cache.manage(prompt, output, HOT, cache_salt=salt)
        cache.generate_and_manage("short", None, HOT)
        meter.measure()
        found = scrape(metrics)
    assert found["kvttl_shadow_hit_tokens_total", "lru"] == 2 * CHUNK
    assert found["kvttl_shadow_prompt_tokens_total", "lru"] == 6 * CHUNK + 5


def test_why_tokens_are_computed_again():
    cache, metrics, clock, _meter = metered_manager()
    prompt = "y" * (3 * CHUNK + 1)
    with cache:
        cache.generate_and_manage(prompt, None, HOT)
        assert cache.records[-1].wanted_again == {}
        cache.generate_and_manage(prompt, None, HOT)  # a hit
        assert cache.records[-1].wanted_again == {}
        keys = cache.controller.layout(list(prompt.encode())).keys
        cache.controller.discard(keys[1:])  # as LMCache does when it needs room
        cache.generate_and_manage(prompt, None, HOT)
        assert cache.records[-1].wanted_again == {"room": 2 * CHUNK}
        cache.controller.discard(keys)
        cache.controller.tier_errors = lambda: {"gpu": "no room"}
        cache.generate_and_manage(prompt, None, HOT)
        assert cache.records[-1].wanted_again == {"tier_error": 3 * CHUNK}
        clock.now_s += 1_000 * HOT_TTL_S  # down the whole ladder
        cache.sweep()
        cache.generate_and_manage(prompt, None, HOT)
        assert cache.records[-1].wanted_again == {"ttl": 3 * CHUNK}
        found = scrape(metrics)
    lost = {reason: found["kvttl_wanted_again_tokens_total", reason] / CHUNK for reason in
            ("room", "tier_error", "ttl")}  # fmt: skip
    assert lost == {"room": 2, "tier_error": 3, "ttl": 3}


def test_bytes_times_seconds_of_each_tier(monkeypatch):
    monkeypatch.setattr("kvttl.meter.live.time.monotonic", lambda: now_s[0])
    controller, metrics, now_s = local_controller(), DecisionMetrics(), [50.0]
    controller.chunk_bytes = lambda: 1_000
    controller.held_chunks = lambda: Counter(gpu=3, disk=5)
    meter = RegretMeter(controller, CONFIG, metrics)
    now_s[0] += 10.0
    meter.measure()
    assert scrape(metrics)["kvttl_byte_seconds_total", "gpu"] == 30_000
    assert scrape(metrics)["kvttl_byte_seconds_total", "disk"] == 50_000
    assert scrape(metrics)["kvttl_byte_seconds_total", "remote"] == 0


# --- what it cannot break ------------------------------------------------------------------------


def test_what_fails_in_it_costs_no_generation_and_no_other_metric(caplog):
    cache, metrics, _clock, meter = metered_manager()
    cache.controller.room_chunks = lambda: 1 / 0
    with cache:
        for _ in range(5):
            assert cache.generate_and_manage("z" * 40, None, HOT) == "Z" * 40
            meter.measure()
    assert scrape(metrics)["kvttl_meter_failures_total",] == meter.failures >= 3
    assert scrape(metrics)["kvttl_decisions_total", "gpu"] == 5
    assert not any(record.error for record in cache.records)
    assert len(meter._waiting) <= 3, "at rest it keeps nothing"
    assert "the meter failed, for the 1. time" in caplog.text


def test_while_the_server_is_away_requests_wait():
    cache, metrics, _clock, meter = metered_manager()

    def away():
        raise LMCacheUnavailable("nobody answers")

    room, cache.controller.room_chunks = cache.controller.room_chunks, away
    with cache:
        cache.generate_and_manage("z" * 40, None, HOT)
        meter.measure()
        assert scrape(metrics)["kvttl_shadow_prompt_tokens_total", "lru"] == 0
        cache.controller.room_chunks = room
        meter.measure()
    assert scrape(metrics)["kvttl_shadow_prompt_tokens_total", "lru"] == 40
    assert meter.failures == 0


def test_memory_is_bounded():
    controller = local_controller()
    meter = RegretMeter(controller, CONFIG, DecisionMetrics(), every_s=3600.0)
    keys = tuple(f"{number:064x}" for number in range(1_000))
    for second in range(2_500):
        meter.observe(DecisionRecord(float(second), "a", prompt_tokens=9, chunk_keys=keys))
    assert sum(each[0].nbytes for each in meter._waiting) <= 16 * 2**20
    meter.close()
    rng, shadows = np.random.default_rng(0), Shadows(1_000_000, 16, sampled=256)
    for minute in range(6):
        fresh = [rng.integers(-(2**63), 2**63, 40_000) for _ in range(8)]
        shadows.play([Asked(each, 60.0 * minute, 60.0 * minute, 16 * 40_000) for each in fresh])
        shadows.optimum(60.0 * minute)
    held = [sum(v.nbytes for v in p.state().values()) for p in shadows._policies.values()]
    assert sum(held) < 2**23, held


def test_a_clock_that_is_set_back_goes_on():
    shadows = Shadows(100, 16, sampled=1_000)
    asked = Asked(np.arange(8), 1e9, 1e9, 128)
    shadows.play([asked])
    found = shadows.play([asked._replace(begin_s=1e6 + s, end_s=1e6 + s) for s in (0.0, 400.0)])
    assert (found["lru"].hit, found["fixed_5m"].hit) == (256, 128)


def test_the_setting_switches_it_off():
    stack = SimpleNamespace(host="127.0.0.1", port=1, instance_id="none")
    for settings, is_there in (({}, True), ({"meter": False}, False), ({"inside": True}, False)):
        stack.config = StackConfig(**{"inside": False, **settings})
        with managed(stack, None, metrics=DecisionMetrics()) as cache:
            assert (cache._records.meter is not None) == is_there, settings
    with managed(stack, None) as cache:  # without metrics nobody would see it
        assert cache._records.meter is None


# --- Grafana -------------------------------------------------------------------------------------


def queries():
    """Every query of the dashboard: title, expression."""
    panels = json.loads(DASHBOARD.read_text())["panels"]
    return [(panel["title"], target["expr"], target["legendFormat"]) for panel in panels
            for target in panel["targets"]]  # fmt: skip


@pytest.fixture(scope="module")
def served():
    """Labels and their values by the name of each sample that a scraper gets."""
    cache, metrics, clock, meter = metered_manager()
    with cache:
        for metadata in (HOT, COLD, {"perplexity": -1}):
            cache.generate_and_manage("w" * 40, None, metadata)
        clock.now_s += 1e6
        cache.sweep()
        meter.measure()
        metrics.observe(replace(cache.records[0], kind="shed"))
        samples = [s for family in metrics.registry.collect() for s in family.samples]
    labels: dict[str, dict[str, set]] = {}
    for sample in samples:
        mine = labels.setdefault(sample.name, {})
        for name, value in sample.labels.items():
            mine.setdefault(name, set()).add(value)
    return labels


@pytest.mark.parametrize("title, query, legend", queries())
def test_every_query_names_metrics_and_labels_that_are_served(title, query, legend, served):
    clause = r"(?:by \(([^)]*)\) )?\((?:\w+\()?(kvttl_\w+)(?:{([^}]*)})?"
    names = re.findall(clause, query)
    assert len(names) == query.count("kvttl_")
    assert names and query.count("(") == query.count(")"), query
    for grouped, name, selected in names:
        assert name in served, name
        for label, value in re.findall(r'(\w+)="([^"]*)"', selected):
            assert value in served[name].get(label, ()), (name, label, value)
        assert set(filter(None, grouped.split(", "))) <= set(served[name]), (name, grouped)
    assert set(re.findall(r"{{(\w+)}}", legend)) <= set(names[0][0].split(", ")), legend
    assert not re.search(r"[a-z]+_total\b(?![{\[])", query), "a counter without a range"


def test_the_dashboard_shows_each_kind_of_metric_of_the_meter():
    shown = set(re.findall(r"kvttl_\w+", " ".join(query for _, query, _ in queries())))
    meters = {n for n in METRICS if re.search("shadow|byte_seconds|wanted_again|meter", n)}
    assert meters and meters <= shown
    assert math.isclose(len({title for title, *_ in queries()}), 13)
