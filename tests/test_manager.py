"""The manager without servers: background work, batches, metadata, the ladder, what fails."""

from __future__ import annotations

import gc
import threading
import time
import tracemalloc
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
from local_managers import (
    COLD,
    CONFIG,
    HOT,
    HOT_TTL_S,
    WARM,
    Clock,
    assert_all_claimed_and_none_too_hot,
    assert_nothing_is_immortal,
    hottest,
    local_controller,
    local_manager,
)

from cache_controller import LocalLMCacheController
from caching_heuristics import TIERS, HeuristicConfig
from kvttl.decisions.log import DecisionLog, read_records
from kvttl.decisions.metrics import DecisionMetrics
from kvttl.lmcache.client import LMCacheUnavailable
from kvttl.manager.draft import Wish
from kvttl.plots.decision_plots import plot_session
from kvttl.session.launch import managed
from kvttl.session.run import session_summary
from kvttl.stack.config import StackConfig
from tiered_caching import InMemoryBackend, MultiTierCache, Policy

PROMPT = "0123456789abcdef"  # two chunks
FIELDS = ("access_count", "time_variance", "seconds_since_access", "perplexity")


@pytest.fixture
def cache():
    with local_manager() as manager:
        yield manager


def kinds(cache):
    return [record.kind for record in cache.records]


# ---- off the request path ------------------------------------------------------------


@contextmanager
def slow_manager(**options):
    """A manager in background mode whose controller answers when the event is set."""
    gate, asked = threading.Event(), threading.Event()
    controller = local_controller()
    layout = controller.layout

    def slow_layout(tokens):
        asked.set()
        assert gate.wait(20)
        return layout(tokens)

    controller.layout = slow_layout
    cache = local_manager(controller, background=True, **options)
    try:
        yield cache, gate, asked
    finally:
        gate.set()
        cache.close()


def test_the_text_comes_at_once_while_the_controller_works():
    with slow_manager() as (cache, gate, asked):
        start_s = time.perf_counter()
        assert cache.generate_and_manage(PROMPT, None, WARM) == PROMPT.upper()
        assert time.perf_counter() - start_s < 5.0  # the gate is still shut
        assert asked.wait(10) and not cache.records
        assert cache.flush(0.02) is False  # the queue is empty, its last job is not done
        gate.set()
        assert cache.flush(10) is True
        assert [record.error for record in cache.records] == [""]
        assert hottest(cache, PROMPT) == ["disk", "disk"]


def test_close_makes_the_decision_under_way_and_those_that_wait():
    with slow_manager() as (cache, gate, asked):
        closed = []
        cache.controller.close = lambda: closed.append(len(cache.records))
        for number in range(4):
            cache.generate_and_manage(f"{number}{PROMPT}", None, WARM)
        assert asked.wait(10)
        threading.Timer(0.05, gate.set).start()
        cache.close()
        assert closed == [4] and not any(record.error for record in cache.records)
        assert [record.prompt for record in cache.records] == [f"{n}{PROMPT}" for n in range(4)]


def test_close_waits_for_the_last_job_even_if_the_queue_is_empty():
    with slow_manager() as (cache, gate, asked):
        closed = []
        cache.controller.close = lambda: closed.append(len(cache.records))
        cache.generate_and_manage(PROMPT, None, WARM)
        assert asked.wait(10)
        threading.Timer(0.05, gate.set).start()
        cache.close()
        assert closed == [1]


@pytest.mark.parametrize("background", [True, False])
def test_a_generation_after_close_has_its_text_and_a_record(background):
    cache = local_manager(background=background)
    cache.generate_and_manage(PROMPT, None, WARM)
    cache.close()
    cache.close()
    assert cache.generate_and_manage(PROMPT, None, WARM) == PROMPT.upper()
    assert cache.generate_and_manage_batch([PROMPT, PROMPT], None) == [PROMPT.upper()] * 2
    assert cache.flush(10) and len(cache.records) == 4
    if background:
        reasons = [record.error for record in cache.records][1:]
        assert reasons == ["RuntimeError: the manager is closed"] * 3


def test_a_full_queue_sheds_the_oldest_decision_and_counts_it():
    metrics = DecisionMetrics()
    with slow_manager(max_queue=2, metrics=metrics) as (cache, gate, asked):
        prompts = [f"{number}{PROMPT}" for number in range(6)]
        assert cache.generate_and_manage(prompts[0], None, WARM) == prompts[0].upper()
        assert asked.wait(10)  # the worker holds it
        texts = [cache.generate_and_manage(prompt, None, WARM) for prompt in prompts[1:]]
        assert texts == [prompt.upper() for prompt in prompts[1:]]  # never a generation
        assert kinds(cache) == ["shed"] * 3 and cache.shed_decisions == 3
        assert all("full" in record.error and record.time_s == 1000.0 for record in cache.records)
        assert metrics.registry.get_sample_value("kvttl_queue_depth") == 2
        gate.set()
        assert cache.flush(10)
        made = [record.prompt for record in cache.records if record.kind == "generation"]
        assert made == [prompts[0], prompts[4], prompts[5]]
        assert metrics.registry.get_sample_value("kvttl_shed_total") == 3


@pytest.mark.parametrize("max_queue", [10_000, 3])
def test_sixteen_threads_lose_no_text_and_no_record_in_background(max_queue):
    metrics, metadata = DecisionMetrics(), (HOT, WARM, COLD)
    cache = local_manager(
        background=True, max_queue=max_queue, metrics=metrics, sweep_every_s=0.001
    )
    wrong = []

    def work(number):
        for turn in range(15):
            prompt = f"shared system prompt, thread {number % 4}, turn {turn}"
            text = cache.generate_and_manage(prompt, None, metadata[turn % 3])
            wrong.extend([prompt] if text != prompt.upper() else [])

    threads = [threading.Thread(target=work, args=(n,)) for n in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    cache.close()
    shed = kinds(cache).count("shed")
    assert not wrong and kinds(cache).count("generation") + shed == 16 * 15
    assert shed == cache.shed_decisions == metrics.registry.get_sample_value("kvttl_shed_total")
    assert shed == 0 or max_queue == 3
    assert not [r.error for r in cache.records if r.error and r.kind != "shed"]
    if not shed:
        assert_all_claimed_and_none_too_hot(cache)
        assert_nothing_is_immortal(cache)


def test_a_decision_is_about_the_moment_of_its_generation():
    with slow_manager() as (cache, gate, asked):
        metadata = dict(WARM)
        cache.generate_and_manage(PROMPT, None, metadata)
        cache.generate_and_manage(PROMPT, None, metadata)
        metadata["perplexity"] = 90.0  # an agent reuses its dictionary
        cache.clock.now_s += 50
        gate.set()
        assert cache.flush(10)
        assert [(r.time_s, r.wanted_tier) for r in cache.records] == [(1000.0, "disk")] * 2


def test_the_sweeper_starts_and_stops_with_the_manager():
    before = threading.active_count()
    cache = local_manager(background=True, sweep_every_s=0.002)
    cache.generate_and_manage(PROMPT, None, HOT)
    cache.flush(10)
    cache.clock.now_s += HOT_TTL_S
    deadline_s = time.monotonic() + 10
    while "expiry" not in kinds(cache) and time.monotonic() < deadline_s:
        time.sleep(0.002)
    assert hottest(cache, PROMPT) == ["disk", "disk"]
    cache.close()
    assert threading.active_count() <= before


# ---- batches -------------------------------------------------------------------------


def test_a_batch_is_one_engine_call_with_texts_in_order(cache):
    prompts = [f"{number} {PROMPT}" for number in range(5)]
    sampling = object()
    texts = cache.generate_and_manage_batch(prompts, sampling, WARM)
    assert texts == [prompt.upper() for prompt in prompts]
    assert cache._llm.calls == [(prompts, sampling)]
    assert [record.prompt for record in cache.records] == prompts
    assert {record.wanted_tier for record in cache.records} == {"disk"}
    assert len({record.generate_s for record in cache.records}) == 1  # its share of the batch
    assert all(hottest(cache, prompt) == ["disk"] * 2 for prompt in prompts)


def test_a_batch_with_metadata_of_its_own_for_each(cache):
    prompts = [f"{number} {PROMPT}" for number in range(4)]
    cache.generate_and_manage_batch(tuple(prompts), None, [HOT, WARM, COLD, None])
    assert [r.wanted_tier for r in cache.records][:3] == ["gpu", "disk", "remote"]
    assert set(cache.records[2].metadata_sources.values()) == {"caller"}
    assert "caller" not in cache.records[3].metadata_sources.values()
    cache.generate_and_manage_batch(prompts[:2], None, ({"perplexity": -1}, WARM))
    assert "perplexity must be > 0" in cache.records[-2].error  # only its own decision
    assert cache.records[-1].error == ""


@pytest.mark.parametrize(
    ("metadata", "reason"),
    [
        ({"perplexity": [12.0]}, "perplexity must be a number (> 0 and finite), got [12.0]"),
        ({"perplexity": [12.0, 13.0]}, "perplexity must be a number"),
        ({"perplexty": 90.0}, "unknown metadata field 'perplexty': did you mean 'perplexity'?"),
    ],
)
def test_metadata_that_is_refused_is_a_reason_and_no_decision(cache, metadata, reason):
    assert cache.generate_and_manage(PROMPT, None, metadata) == PROMPT.upper()
    record = cache.records[-1]
    assert reason in record.error and (record.wanted_tier, record.metadata) == (None, {})
    plot_session(cache.records)


def test_metadata_that_is_unknown_is_measured(cache):
    cache.generate_and_manage(PROMPT, None, {"perplexity": None, "access_count": float("nan")})
    sources = cache.records[-1].metadata_sources
    assert (sources["perplexity"], sources["access_count"]) == ("absent", "history")
    assert cache.records[-1].error == ""


def test_batches_that_are_refused_before_anything_is_generated(cache):
    for metadata in ([WARM], [WARM] * 3, []):
        with pytest.raises(ValueError, match=f"metadata must have 2 items .*, got {len(metadata)}"):
            cache.generate_and_manage_batch([PROMPT, "other"], None, metadata)
    with pytest.raises(TypeError, match="list of prompts, got one prompt"):
        cache.generate_and_manage_batch(PROMPT, None)
    assert cache._llm.calls == [] and not cache.records


def test_an_empty_batch_asks_nobody(cache):
    assert cache.generate_and_manage_batch([], None) == []
    assert cache.generate_and_manage_batch([], [], []) == []
    assert cache._llm.calls == [] and not cache.records


def test_sampling_parameters_one_each_are_asked_for_logprobs_on_copies(cache):
    class Scored:
        model_config = SimpleNamespace(max_logprobs=5, get_vocab_size=lambda: 100)
        llm_engine = SimpleNamespace(vllm_config=SimpleNamespace(model_config=model_config))
        generate = cache._llm.generate

    cache.set_llm(Scored())
    params = [SimpleNamespace(n=1, logprobs=wanted) for wanted in (None, 2, 9)]
    texts = cache.generate_and_manage_batch(["a", "b", "c"], params)
    assert texts == ["A", "B", "C"]
    asked = cache._llm.generate.__self__.calls[-1][1]
    assert [one.logprobs for one in asked] == [5, 5, 9]
    assert [one.logprobs for one in params] == [None, 2, 9]  # the caller's stay


def test_a_batch_in_background_keeps_every_decision():
    with slow_manager() as (cache, gate, _):
        prompts = [f"{number} {PROMPT}" for number in range(7)]
        assert cache.generate_and_manage_batch(prompts, None, WARM) == [p.upper() for p in prompts]
        assert not cache.records
        gate.set()
        assert cache.flush(10) and [r.prompt for r in cache.records] == prompts


def test_the_engines_own_error_passes_through_and_no_engine_is_said(cache):
    def broken(_prompts, _sampling_params):
        raise OverflowError("too long")

    cache._llm.generate = broken
    with pytest.raises(OverflowError, match="too long"):
        cache.generate_and_manage(PROMPT, None)
    with pytest.raises(OverflowError, match="too long"):
        cache.generate_and_manage_batch([PROMPT], None)
    cache._llm = None
    with pytest.raises(RuntimeError, match="set_llm"):
        cache.generate_and_manage(PROMPT, None)
    assert not cache.records


@pytest.mark.parametrize("interrupt", [KeyboardInterrupt, TimeoutError])
def test_an_interrupted_call_has_records_and_claims(cache, interrupt):
    def interrupted(_prompts, _sampling_params):
        raise interrupt

    cache._llm.generate, generate = interrupted, cache._llm.generate
    prompts = [PROMPT, f"another {PROMPT}"]
    with pytest.raises(interrupt):
        cache.generate_and_manage_batch(prompts, None, WARM)
    assert [(r.prompt, r.error) for r in cache.records] == [
        (prompt, f"{interrupt.__name__}: ") for prompt in prompts
    ]
    cache.controller.note_generated(cache.controller.tokenize(PROMPT))  # it had got that far
    cache.sweep(cache.clock())
    assert len(cache.claims) > 0
    cache._llm.generate = generate
    assert cache.generate_and_manage(PROMPT, None, WARM) == PROMPT.upper()


def test_an_interrupted_decision_keeps_no_ttl_from_ending(cache):
    place, prompts = cache.controller.note_generated, [f"{n} {PROMPT}" for n in range(3)]

    def interrupted(tokens):
        if tokens == cache.controller.tokenize(prompts[1]):
            raise KeyboardInterrupt
        place(tokens)

    cache.controller.note_generated = interrupted
    with pytest.raises(KeyboardInterrupt):
        cache.generate(prompts, None, WARM)
    errors = [record.error.partition(":")[0] for record in cache.records]
    assert errors == ["", "KeyboardInterrupt", "KeyboardInterrupt"]
    assert [record.prompt for record in cache.records] == prompts
    ended = cache.sweep(cache.clock() + 1e6)
    assert [record.prompt_digest for record in ended if record.kind == "expiry"]


# ---- metadata ------------------------------------------------------------------------


def test_explicit_metadata_is_what_decides(cache):
    cache.generate_and_manage(PROMPT, None, COLD)
    record = cache.records[-1]
    assert dict(record.metadata) == COLD
    assert record.metadata_sources == dict.fromkeys(FIELDS, "caller")
    assert (record.wanted_tier, record.ttl_s) == ("remote", CONFIG.ttl(COLD))
    assert hottest(cache, PROMPT) == ["remote", "remote"]


def test_what_is_not_given_is_measured(cache):
    cache.generate_and_manage(PROMPT, None, {"perplexity": 35.0})
    sources = {**dict.fromkeys(FIELDS, "history"), "perplexity": "caller"}
    assert cache.records[-1].metadata_sources == sources
    assert cache.records[-1].wanted_tier == "disk"
    cache.generate_and_manage(PROMPT, None)
    assert cache.records[-1].metadata_sources["perplexity"] == "absent"


def test_access_counts_grow_with_repeats_and_with_shared_prefixes(cache):
    for _ in range(3):
        cache.generate_and_manage(PROMPT, None)
        cache.clock.now_s += 60
    cache.generate_and_manage(PROMPT + " and more", None)
    seen = [record.metadata for record in cache.records]
    assert [metadata["access_count"] for metadata in seen] == [0, 1, 2, 3]
    assert [metadata["seconds_since_access"] for metadata in seen] == [0.0, 60.0, 60.0, 60.0]
    assert [metadata["time_variance"] for metadata in seen] == [0.0] * 4
    assert len({record.metadata_sources["access_count"] for record in cache.records}) == 1


def test_a_scorer_is_asked_once_a_new_prompt_and_may_fail():
    asked = []

    def score(tokens):
        asked.append(len(tokens))
        return 80.0 if len(tokens) == len(PROMPT) else 1 / 0

    cache = local_manager(perplexity_source="prompt", scorer=score)
    for prompt in (PROMPT, PROMPT, PROMPT * 2):
        assert cache.generate_and_manage(prompt, None) == prompt.upper()
    assert asked == [16, 32]
    assert [r.metadata_sources["perplexity"] for r in cache.records][:2] == ["prompt", "prompt"]
    assert [r.wanted_tier for r in cache.records][:2] == ["remote", "remote"]
    assert cache.records[2].error == "" and "perplexity" not in cache.records[2].metadata


# ---- the ladder ----------------------------------------------------------------------


def test_down_the_whole_ladder_and_served_from_every_rung(cache):
    start_s = cache.clock.now_s
    cache.generate_and_manage(PROMPT, None, HOT)
    ends_s = start_s
    for tier, below, factor in (("gpu", "disk", 1), ("disk", "remote", 4), ("remote", None, 24)):
        ends_s += HOT_TTL_S * factor
        cache.clock.now_s = ends_s - 0.01
        assert cache.sweep() == [] and hottest(cache, PROMPT) == [tier] * 2
        cache.clock.now_s = ends_s
        (record,) = cache.sweep()
        assert hottest(cache, PROMPT) == [below] * 2
        assert (record.kind, record.from_tier, record.wanted_tier) == ("expiry", tier, below)
        assert record.error == "" and [move["status"] for move in record.moves] == ["done"]
        assert record.time_s == ends_s
    assert len(cache.claims) == 0 and cache.sweep() == []


@pytest.mark.parametrize(("rungs", "served"), [(0, "gpu"), (1, "disk"), (2, "remote"), (3, None)])
def test_the_next_generation_is_served_from_where_the_ladder_put_it(cache, rungs, served):
    first = cache.generate_and_manage(PROMPT, None, HOT)
    for factor in (1, 4, 24)[:rungs]:
        cache.clock.now_s += HOT_TTL_S * factor
        cache.sweep()
    assert cache.generate_and_manage(PROMPT, None, HOT) == first
    assert cache.records[-1].hit_tokens == ({served: len(PROMPT)} if served else {})
    assert hottest(cache, PROMPT) == ["gpu", "gpu"]  # promoted, or stored anew
    assert_nothing_is_immortal(cache)


def test_a_sweep_that_is_late_takes_all_rungs_at_once(cache):
    cache.generate_and_manage(PROMPT, None, HOT)
    cache.clock.now_s += HOT_TTL_S * 5 + 1
    (record,) = cache.sweep()
    assert (record.from_tier, record.wanted_tier) == ("gpu", "remote")
    assert hottest(cache, PROMPT) == ["remote"] * 2


def test_access_renews(cache):
    for _ in range(5):
        cache.generate_and_manage(PROMPT, None, HOT)
        cache.clock.now_s += HOT_TTL_S - 1
        assert cache.sweep() == [] and hottest(cache, PROMPT) == ["gpu"] * 2
    assert len(cache.claims) == 1
    cache.clock.now_s += 1
    assert len(cache.sweep()) == 1 and hottest(cache, PROMPT) == ["disk"] * 2


def test_a_shared_system_prompt_stays_hot_while_one_of_two_users_expires(cache):
    one, two = PROMPT + "question", PROMPT + "QUESTION"  # two chunks shared, one each
    cache.generate_and_manage(one, None, HOT)
    cache.clock.now_s += 50
    cache.generate_and_manage(two, None, HOT)
    cache.clock.now_s += HOT_TTL_S - 50
    (record,) = cache.sweep()
    assert record.moves[0]["moved_chunks"] == 1
    assert hottest(cache, one) == ["gpu", "gpu", "disk"]
    assert hottest(cache, two) == ["gpu", "gpu", "gpu"]
    cache.clock.now_s += 50
    cache.sweep()
    assert hottest(cache, one) == hottest(cache, two) == ["disk"] * 3
    assert_nothing_is_immortal(cache)


def test_many_expired_claims_are_taken_down_in_one_sweep(cache):
    prompts = [f"{number:08d}" for number in range(600)]  # more than two batches
    cache.generate_and_manage_batch(prompts, None, HOT)
    cache.clock.now_s += HOT_TTL_S
    assert len(cache.sweep()) == 600
    assert {tier for prompt in prompts for tier in hottest(cache, prompt)} == {"disk"}


# ---- what fails ----------------------------------------------------------------------


class Away:
    """Makes a controller's method raise LMCacheUnavailable until `back`; counts the calls."""

    def __init__(self, controller, name):
        self.calls, self._controller, self._name = 0, controller, name
        setattr(controller, name, self)

    def __call__(self, *_args, **_options):
        self.calls += 1
        raise LMCacheUnavailable("LMCache is away")

    def back(self):
        delattr(self._controller, self._name)


@pytest.mark.parametrize(
    ("method", "rung", "below"),
    [("layout_of", 0, "disk"), ("move", 0, "disk"), ("move", 1, "remote"), ("discard", 2, None)],
)
def test_a_sweep_that_fails_is_recorded_once_and_tried_again_later(cache, method, rung, below):
    start_s = cache.clock.now_s
    cache.generate_and_manage(PROMPT, None, HOT)
    for factor in (1, 4)[:rung]:
        cache.clock.now_s += HOT_TTL_S * factor
        cache.sweep()
    away = Away(cache.controller, method)
    cache.clock.now_s += HOT_TTL_S * (1, 4, 24)[rung]
    (failed,) = cache.sweep()
    assert failed.error == "LMCacheUnavailable: LMCache is away"
    tries = []
    for _ in range(80):  # 20 s
        cache.clock.now_s += 0.25
        before = away.calls
        assert cache.sweep() == []  # no record for each vain try
        tries.extend([cache.clock.now_s] if away.calls > before else [])
    pauses = [later - earlier for earlier, later in zip([start_s, *tries], tries)]
    assert pauses[1:] == [2.0, 4.0, 8.0]
    away.back()
    cache.clock.now_s += 16
    (done,) = cache.sweep()
    assert (done.kind, done.error, done.wanted_tier) == ("settled", "", below)
    assert hottest(cache, PROMPT) == [below] * 2
    assert cache._decider.settler.unsettled == 0
    assert_nothing_is_immortal(cache)


def test_pauses_between_tries_are_at_most_a_minute(cache):
    cache.generate_and_manage(PROMPT, None, HOT)
    cache.clock.now_s += HOT_TTL_S
    away = Away(cache.controller, "move")
    for _ in range(600):
        cache.sweep()
        cache.clock.now_s += 0.5
    assert 9 <= away.calls <= 12  # 1 + 2 + 4 .. 32 s, then every 60 s


@pytest.mark.parametrize("metadata", [HOT, WARM, COLD])
def test_a_claim_that_could_not_be_made_is_made_late(cache, metadata):
    away, start_s = Away(cache.controller, "layout"), cache.clock.now_s
    assert cache.generate_and_manage(PROMPT, None, metadata) == PROMPT.upper()
    record = cache.records[-1]
    assert "LMCache is away" in record.error and record.wanted_tier and record.ttl_s
    assert len(cache.claims) == 0 and cache._decider.settler.unsettled == 1
    cache.clock.now_s += 10
    cache.sweep()
    assert len(cache.claims) == 0
    away.back()
    cache.sweep()
    assert len(cache.claims) == 1 and cache._decider.settler.unsettled == 0
    tier = record.wanted_tier
    assert hottest(cache, PROMPT) == [tier] * 2  # also moved where it belongs
    cache.clock.now_s = start_s + record.ttl_s - 0.01  # counted from the access
    assert cache.sweep() == []
    cache.clock.now_s = start_s + record.ttl_s
    assert len(cache.sweep()) == 1
    assert hottest(cache, PROMPT) == [{"gpu": "disk", "disk": "remote", "remote": None}[tier]] * 2
    assert_nothing_is_immortal(cache)


def test_a_late_claim_does_not_replace_a_newer_one(cache):
    away = Away(cache.controller, "layout")
    cache.generate_and_manage(PROMPT, None, COLD)
    away.back()
    cache.clock.now_s += 50
    cache.generate_and_manage(PROMPT, None, HOT)
    cache.sweep()
    assert hottest(cache, PROMPT) == ["gpu", "gpu"]
    cache.clock.now_s += HOT_TTL_S - 1
    assert cache.sweep() == [] and hottest(cache, PROMPT) == ["gpu", "gpu"]


def test_one_prompt_that_always_fails_does_not_hold_up_the_others(cache):
    away = Away(cache.controller, "layout")
    for prompt in ("poisoned " + PROMPT, PROMPT):
        cache.generate_and_manage(prompt, None, WARM)
    away.back()
    layout, poison = cache.controller.layout, ord("p")

    def choosy(tokens):
        if tokens[0] == poison:
            raise ValueError("this one never works")
        return layout(tokens)

    cache.controller.layout = choosy
    cache.sweep()
    assert hottest(cache, PROMPT) == ["disk", "disk"]
    cache.sweep()  # what cannot be claimed as a prompt is claimed chunk by chunk
    assert cache._decider.settler.unsettled == 0
    cache.controller.layout = layout
    assert_all_claimed_and_none_too_hot(cache)


def test_a_move_that_fails_at_generation_time_is_made_by_a_sweep(cache):
    away = Away(cache.controller, "move")
    assert cache.generate_and_manage(PROMPT, None, COLD) == PROMPT.upper()
    assert cache.records[-1].error == "LMCacheUnavailable: LMCache is away"
    away.back()
    cache.clock.now_s += 1
    (record,) = cache.sweep()
    assert (record.kind, record.error, record.wanted_tier) == ("settled", "", "remote")
    assert hottest(cache, PROMPT) == ["remote"] * 2


def test_a_new_decision_makes_what_was_left_of_the_last_one_needless(cache):
    away = Away(cache.controller, "move")
    cache.generate_and_manage(PROMPT, None, COLD)
    away.back()
    cache.generate_and_manage(PROMPT, None, WARM)
    assert hottest(cache, PROMPT) == ["disk"] * 2 and cache._decider.settler.unsettled == 0
    cache.clock.now_s += 61
    assert cache.sweep() == []


def test_kv_that_appears_after_the_health_check_failed_is_moved_by_a_sweep(cache, monkeypatch):
    """The server is away: nothing is shown, check_health says why; the store comes later."""
    controller = cache.controller
    with monkeypatch.context() as patch:
        patch.setattr(controller, "note_generated", lambda tokens: None)
        away = Away(controller, "check_health")
        assert cache.generate_and_manage(PROMPT, None, WARM) == PROMPT.upper()
        assert "LMCache is away" in cache.records[-1].error
        away.back()
    controller.note_generated(controller.tokenize(PROMPT))
    cache.clock.now_s += 1
    cache.sweep()
    assert hottest(cache, PROMPT) == ["disk", "disk"]


def test_a_promotion_that_breaks_off_half_way_still_expires(cache):
    """The copy came although the answer did not: it must not be taken for a load's buffer."""
    controller, move = cache.controller, cache.controller.move
    cache.generate_and_manage(PROMPT, None, WARM)
    assert hottest(cache, PROMPT) == ["disk", "disk"]

    def moved_and_gone(*args, **options):
        move(*args, **options)
        raise LMCacheUnavailable("LMCache is away")

    controller.move = moved_and_gone
    cache.generate_and_manage(PROMPT, None, HOT)
    assert "LMCache is away" in cache.records[-1].error
    controller.move = move
    assert hottest(cache, PROMPT) == ["gpu", "gpu"]
    cache.clock.now_s += HOT_TTL_S
    cache.sweep()
    assert hottest(cache, PROMPT) == ["disk", "disk"]


def test_a_sweep_survives_any_error_and_a_clock_that_fails(cache):
    cache.generate_and_manage(PROMPT, None, HOT)
    cache.clock.now_s += HOT_TTL_S

    def bug(*_args, **_options):
        raise ZeroDivisionError("a bug")

    cache.controller.layout_of = bug
    assert [record.error for record in cache.sweep()] == ["ZeroDivisionError: a bug"]
    del cache.controller.layout_of
    cache.clock.now_s += 1
    cache.sweep()
    assert hottest(cache, PROMPT) == ["disk", "disk"]
    cache.clock, clock = bug, cache.clock
    assert cache.generate_and_manage(PROMPT, None, HOT) == PROMPT.upper()
    assert cache.records[-1].error == "ZeroDivisionError: a bug"
    cache.clock = clock


# ---- log, metrics and notices ----------------------------------------------------------


class FullDisk:
    """A log that cannot be written."""

    def append(self, record):
        raise OSError(28, "No space left on device")


def test_a_log_that_cannot_be_written_breaks_nothing(tmp_path):
    (tmp_path / "file").write_text("not a folder")
    for log in (FullDisk(), DecisionLog(tmp_path / "file" / "log")):
        cache = local_manager(log=log)
        assert cache.generate_and_manage(PROMPT, None, WARM) == PROMPT.upper()
        assert "the decision log cannot be written" in cache.records[-1].error
        assert hottest(cache, PROMPT) == ["disk", "disk"]
        cache.clock.now_s += 100
        (record,) = cache.sweep()
        assert "log cannot be written" in record.error
        assert hottest(cache, PROMPT) == ["remote", "remote"]
        assert_nothing_is_immortal(cache)


@pytest.mark.parametrize("background", [False, True])
def test_metrics_and_notices_that_fail_break_nothing(background):
    def broken(*_args):
        raise ZeroDivisionError

    metrics = DecisionMetrics()
    metrics.observe = broken
    for options in ({"metrics": metrics}, {"notify": broken}):
        with local_manager(background=background, **options) as cache:
            assert cache.generate_and_manage(PROMPT, None, WARM) == PROMPT.upper()
            assert cache.flush(10)
            assert cache.records[-1].error == ""
            cache.clock.now_s += 100
            assert len(cache.sweep()) == 1


def test_a_claim_is_in_the_log_before_anything_moves(tmp_path):
    cache = local_manager(log=DecisionLog(tmp_path))
    move, seen = cache.controller.move, []

    def watched(*args, **options):
        seen.append(list(read_records(tmp_path, kinds=None)))
        return move(*args, **options)

    cache.controller.move = watched
    cache.generate_and_manage(PROMPT, None, WARM)
    ((claim,),) = seen
    record = cache.records[-1]
    assert claim.kind == "claim"
    for name in ("time_s", "prompt_digest", "chunks", "chunk_keys", "ttl_s", "wanted_tier"):
        assert getattr(claim, name) == getattr(record, name), name
    assert len(claim.chunk_keys) == 2 and claim.prompt is None
    cache.generate_and_manage("fedcba9876543210", None, HOT)  # stays: nothing to write ahead
    assert [r.kind for r in read_records(tmp_path, kinds=None)] == [
        "claim",
        "generation",
        "generation",
    ]


@pytest.mark.parametrize("metadata", [{"perplexity": -1.0}, [1, 2]])
def test_kv_whose_metadata_were_refused_is_claimed_all_the_same(metadata):
    clock = Clock()
    cache = local_manager(clock=clock)
    cache.controller.note_generated(cache.controller.tokenize(PROMPT))  # LMCache does it by itself
    cache.generate_and_manage(PROMPT, None, metadata)
    assert cache.records[-1].error and len(cache.claims) == 0
    cache.sweep()
    assert len(cache.claims) == 1 and hottest(cache, PROMPT) == ["gpu"] * 2
    clock.now_s += 1e7
    cache.sweep()
    assert hottest(cache, PROMPT) == [None] * 2 and len(cache.claims) == 0


def test_kv_whose_decision_was_shed_is_claimed_all_the_same():
    clock = Clock()
    cache = local_manager(clock=clock, background=True, max_queue=1)
    go = threading.Event()
    layout = cache.controller.layout
    cache.controller.layout = lambda tokens: go.wait(10) and layout(tokens)
    for number in range(4):
        cache.generate_and_manage(f"{number} {PROMPT}", None)
    go.set()
    assert cache.flush(10) and cache.shed_decisions >= 2
    cache.sweep()
    assert len(cache.claims) == 4
    cache.close()


def test_recovered_claims_end_without_any_generation(tmp_path):
    """The sweeper runs from `recover` on, not only from the first generation."""
    controller = local_controller()
    with DecisionLog(tmp_path) as log:
        cache = local_manager(controller, log=log)
        cache.generate_and_manage(PROMPT, None, HOT)
    later = local_manager(controller, clock=Clock(1e7), sweep_every_s=0.01)
    later.recover(tmp_path)
    deadline_s = time.monotonic() + 10
    while any(hottest(later, PROMPT)):
        assert time.monotonic() < deadline_s
        time.sleep(0.01)
    later.close()


def test_restarts_do_not_renew_adopted_kv(tmp_path):
    """KV that no record names gets one TTL, however often the process is restarted."""
    controller, clock = local_controller(), Clock()
    controller.note_generated(controller.tokenize(PROMPT))
    for restart in range(4):
        with DecisionLog(tmp_path) as log:
            cache = local_manager(controller, clock=clock, log=log)
            found = cache.recover(tmp_path)
            assert found["adopted"] == (2 if restart == 0 else 0)
            clock.now_s += 0.6 * CONFIG.base_ttl
            cache.sweep()
    assert "gpu" not in hottest(cache, PROMPT)


def test_an_access_whose_decision_waits_is_not_overtaken_by_the_sweeper():
    clock = Clock()
    cache = local_manager(clock=clock, background=True)
    cache.generate_and_manage(PROMPT, None, HOT)
    assert cache.flush(10)
    clock.now_s += HOT_TTL_S - 1
    go, observe = threading.Event(), cache._measured.complete
    cache._measured.complete = lambda *given: go.wait(10) and observe(*given)
    cache.generate_and_manage(PROMPT, None, HOT)  # in time; its decision hangs
    clock.now_s += 2
    sweeper = threading.Thread(target=cache.sweep)
    sweeper.start()
    go.set()
    sweeper.join()
    assert cache.flush(10) and cache.sweep() == []
    assert hottest(cache, PROMPT) == ["gpu"] * 2
    cache.close()


def test_one_bad_reading_of_the_clock_does_not_end_expiry():
    clock = Clock()
    cache = local_manager(clock=clock)
    clock.now_s = float("nan")
    assert cache.generate_and_manage("first " + PROMPT, None, HOT)
    clock.now_s = 1000.0
    cache.generate_and_manage(PROMPT, None, HOT)
    clock.now_s += 1e7
    cache.sweep()
    cache.sweep()
    clock.now_s += 1e7
    cache.sweep()
    assert_nothing_is_immortal(cache)


def test_a_generator_of_prompts_is_a_batch(cache):
    texts = cache.generate_and_manage_batch((f"{n} {PROMPT}" for n in range(3)), None)
    assert len(texts) == 3 and len(cache.records) == 3


def test_no_more_threads_costs_no_text(monkeypatch):
    cache = local_manager(background=True, sweep_every_s=1.0)
    with monkeypatch.context() as patch:
        patch.setattr(
            threading.Thread,
            "start",
            lambda self: (_ for _ in ()).throw(RuntimeError("can't start new thread")),
        )
        assert cache.generate_and_manage(PROMPT, None, HOT)
    assert "can't start new thread" in cache.records[-1].error
    assert cache.generate_and_manage(PROMPT, None, HOT) and cache.flush(10)
    assert cache.records[-1].error == ""
    cache.close()


# ---- decisions handed back -------------------------------------------------------------


def test_generate_hands_back_the_engines_own_outputs_with_their_decisions(cache):
    prompts = [f"{number} {PROMPT}" for number in range(3)]
    made = cache.generate(prompts, None, [HOT, WARM, COLD])
    assert [output.outputs[0].text for output, _ in made] == [p.upper() for p in prompts]
    assert [output.prompt_token_ids for output, _ in made] == [list(p.encode()) for p in prompts]
    assert [m.decision.result(0) for m in made] == list(cache.records)
    assert [m.decision.result(0).wanted_tier for m in made] == ["gpu", "disk", "remote"]
    (one,) = cache.generate(PROMPT, None, WARM)
    assert one.decision.result(0) is cache.records[-1]
    assert cache.generate([], None) == []


def test_in_the_background_the_decision_comes_later():
    with slow_manager() as (cache, gate, asked):
        (made,) = cache.generate(PROMPT, None, WARM)
        assert asked.wait(10) and not made.decision.done()
        assert not made.decision.cancel()  # the KV is there: somebody has to decide
        gate.set()
        assert made.decision.result(10) is cache.records[-1]
        assert made.decision.result().wanted_tier == "disk"


def test_a_decision_always_comes_to_a_record():
    """Refused, given up, closed, not even tokenized: the future has the record that says so."""
    with slow_manager(max_queue=1) as (cache, gate, asked):
        first = cache.manage(PROMPT, None, WARM)
        assert asked.wait(10)
        shed = cache.manage(PROMPT + "1", None, WARM)
        refused = cache.manage(PROMPT + "2", None, {"perplexity": -1.0})
        broken = cache.manage(None, SimpleNamespace(prompt_token_ids=["a"]))
        gate.set()
        cache.close()
        closed = cache.manage(PROMPT, None, WARM)
        results = [future.result(10) for future in (first, shed, refused, broken, closed)]
    assert results[0].error == "" and results[1].kind == "shed"
    reasons = [record.error for record in results[1:]]
    parts = ("queue", "perplexity must be > 0", "TypeError", "the manager is closed")
    assert all(part in reason for part, reason in zip(parts, reasons)), reasons
    assert sorted(map(id, results)) == sorted(map(id, cache.records))


def test_a_callback_that_fails_breaks_nothing():
    with slow_manager() as (cache, gate, _):
        (made,) = cache.generate(PROMPT, None, WARM)
        made.decision.add_done_callback(lambda future: 1 / 0)
        gate.set()
        assert cache.flush(10) and cache.records[-1].error == ""
        assert cache.manage(PROMPT, None, WARM).result(10).error == ""  # the worker lives


def test_the_engine_is_called_by_one_thread_at_a_time():
    """vllm.LLM must not be entered twice."""
    cache = local_manager()
    inside, most, answer = [], [], cache._llm.generate

    def generate(prompts, sampling_params):
        inside.append(prompts)
        most.append(len(inside))
        time.sleep(0.002)  # another thread would come in here
        inside.remove(prompts)
        return answer(prompts, sampling_params)

    cache._llm.generate = generate
    texts = []

    def work(number):
        for turn in range(5):
            prompt = f"{number} {turn} {PROMPT}"
            (made,) = cache.generate(prompt, None, WARM)
            texts.append((prompt, made.output.outputs[0].text, made.decision.result(0)))

    threads = [threading.Thread(target=work, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert max(most) == 1 and len(texts) == 40
    for prompt, text, record in texts:  # each has its own
        assert text == prompt.upper() and record.prompt == prompt and record.error == ""


# ---- settings and policies ------------------------------------------------------------


def test_a_manager_reads_no_settings_of_the_folder_it_stands_in(tmp_path, monkeypatch):
    """The same service has the same TTLs wherever it is started; commands load settings."""
    (tmp_path / "data").mkdir()
    saved = tmp_path / "data" / "heuristics.yaml"
    saved.write_text("base_ttl: 31\n")
    monkeypatch.delenv("KV_HEURISTICS_FILE", raising=False)
    monkeypatch.chdir(tmp_path)
    assert MultiTierCache(local_controller()).config == HeuristicConfig()
    stack = SimpleNamespace(host="127.0.0.1", port=9, instance_id="x", config=StackConfig())
    with managed(stack, None) as cache:  # what commands and notebooks call
        assert cache.config.base_ttl == 31.0
    with managed(stack, None, HeuristicConfig(base_ttl=32.0)) as cache:
        assert cache.config.base_ttl == 32.0
    saved.write_text("learning_rate: 0.1\n")  # somebody else's file
    assert MultiTierCache(local_controller()).config == HeuristicConfig()


class ByLength:
    """A policy of one's own: what is used often is kept in gpu."""

    base_ttl = 7.0
    ladder = {"gpu": 1.0, "disk": 2.0, "remote": 3.0}

    def __init__(self, answer=None):
        self.answer, self.seen = answer, []

    def ttl(self, metadata):
        self.seen.append(dict(metadata))
        return 10.0 + metadata["access_count"]

    def tier(self, metadata):
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer or ("gpu" if metadata["access_count"] else "remote")


def test_a_policy_of_ones_own_decides():
    policy: Policy = ByLength()
    cache = local_manager(config=policy)
    decided = [cache.generate(PROMPT, None)[0].decision.result(0) for _ in range(2)]
    assert [(r.wanted_tier, r.ttl_s, r.error) for r in decided] == [
        ("remote", 10.0, ""),
        ("gpu", 11.0, ""),
    ]
    assert hottest(cache, PROMPT) == ["gpu", "gpu"]
    assert set(policy.seen[0]) == {"access_count", "time_variance", "seconds_since_access"}
    cache.clock.now_s += 11.0
    assert [r.wanted_tier for r in cache.sweep()] == ["disk"]
    cache.clock.now_s += 22.0  # its own ladder: twice as long on disk
    assert [r.wanted_tier for r in cache.sweep()] == ["remote"]


@pytest.mark.parametrize("answer", ["tape", ZeroDivisionError("no policy is perfect")])
def test_a_policy_that_fails_costs_no_text_and_leaves_no_immortal_kv(answer):
    cache = local_manager(config=ByLength(answer))
    assert cache.generate_and_manage(PROMPT, None) == PROMPT.upper()
    reason = "tier must be one of" if answer == "tape" else "no policy is perfect"
    assert reason in cache.records[-1].error and len(cache.claims) == 0
    cache.sweep()
    assert cache.claims.next_due_s == 1007.0  # its base_ttl, from the access on
    assert_nothing_is_immortal(cache)


# ---- of two wishes the later access counts ------------------------------------------------


def wanted(cache, prompt):
    keys = cache.controller.layout(cache.controller.tokenize(prompt)).keys
    return set(cache.claims.wanted(keys, cache.clock()))


def test_a_decision_that_is_given_up_late_does_not_replace_a_newer_one():
    """It waited while a newer one about the same prompt was made, and is shed only then."""
    with slow_manager(max_queue=1) as (cache, gate, asked):
        cache.generate_and_manage("other " + PROMPT, None, HOT)
        assert asked.wait(10)
        cache.generate_and_manage(PROMPT, None, HOT)  # waits
        cache.clock.now_s += 10
        shed = cache._decider._shed
        given_up = []
        cache._decider._jobs._shed = given_up.append  # the putting thread is held up here
        cache.generate_and_manage(PROMPT, None, COLD)
        gate.set()
        assert cache.flush(10) and wanted(cache, PROMPT) == {"remote"}
        shed(*given_up)
        cache.clock.now_s += 1
        cache.sweep()
        assert wanted(cache, PROMPT) == {"remote"} and hottest(cache, PROMPT) == ["remote"] * 2
        assert cache.shed_decisions == kinds(cache).count("shed") == 1


def test_of_two_late_claims_the_newer_is_made(cache):
    away = Away(cache.controller, "layout")
    cache.generate_and_manage(PROMPT, None, HOT)
    cache.clock.now_s += 10
    cache.generate_and_manage(PROMPT, None, COLD)
    tokens = cache.controller.tokenize(PROMPT)
    digest = cache.records[-1].prompt_digest
    cache._decider.settler.claim_later(digest, tokens, Wish("gpu", 1005.0, 100.0))  # comes late
    away.back()
    cache.sweep()
    assert wanted(cache, PROMPT) == {"remote"} and hottest(cache, PROMPT) == ["remote"] * 2


def test_recovery_does_not_replace_what_was_decided_since(tmp_path):
    """A server that takes requests before it has recovered."""
    first = local_manager(log=DecisionLog(tmp_path))
    first.generate_and_manage(PROMPT, None, COLD)
    first.clock.now_s += 10
    second = local_manager(first.controller, first.clock)
    second.generate_and_manage(PROMPT, None, HOT)
    second.recover(tmp_path)
    assert wanted(second, PROMPT) == {"gpu"}
    second.sweep()
    assert hottest(second, PROMPT) == ["gpu"] * 2


# ---- nothing that is kept grows with the length of prompts ---------------------------------


LONG = 100_000  # tokens


class LongAnswers:
    """Stands for vLLM: long prompts, and 20 log-probabilities for each token of the answer."""

    def generate(self, prompts, sampling_params):
        position = {token: SimpleNamespace(logprob=-3.0) for token in range(20)}
        sequence = SimpleNamespace(text="x", logprobs=[dict(position) for _ in range(50)])
        first = ord(prompts[0])
        return [
            SimpleNamespace(
                prompt_token_ids=[first] + [7] * (LONG - 1),
                num_cached_tokens=0,
                outputs=[sequence],
            )
        ]


def long_manager(**options):
    """Return a manager that is asked about long prompts and keeps no KV itself."""
    memory = {tier: InMemoryBackend() for tier in TIERS}
    controller = LocalLMCacheController(chunk_size_tokens=250, backends=memory)
    controller.note_generated = lambda tokens: None
    return local_manager(controller, llm=LongAnswers(), keep_prompts=False, **options)


def kept_bytes(cache, numbers):
    """Return what a manager keeps of each of some long prompts, in bytes."""
    gc.collect()
    before = tracemalloc.get_traced_memory()[0]
    for number in numbers:
        cache.generate_and_manage(chr(200 + number) + "x" * 4 * LONG, None, None)
    gc.collect()
    return (tracemalloc.get_traced_memory()[0] - before) / len(numbers)


@pytest.fixture
def traced():
    tracemalloc.start()
    yield
    tracemalloc.stop()


def test_what_waits_for_a_worker_keeps_facts_within_a_budget(traced):
    cache = long_manager(background=True, max_queue_bytes=10 * 4 * LONG)
    gate, asked = threading.Event(), threading.Event()
    cache._measured.complete = lambda *_given: asked.set() or gate.wait(60) and {}["no decision"]
    kept_bytes(cache, [0])
    assert asked.wait(10)
    assert 4 * LONG <= kept_bytes(cache, range(1, 9)) < 5 * LONG  # token ids: no text, no answer
    kept_bytes(cache, range(20, 25))
    assert len(cache._decider._jobs) == 10 and cache.shed_decisions == 3
    gate.set()
    cache.close()


def test_records_are_bounded_in_bytes(monkeypatch):
    monkeypatch.setattr("kvttl.decisions.keeper._MAX_BYTES", 300_000)
    cache = long_manager()
    for number in range(10):
        cache.generate_and_manage(chr(200 + number), None)
    assert cache.records[-1].prompt is None and cache.records[-1].error == ""
    assert len(cache.records[-1].chunk_keys) == LONG // 250
    assert len(cache.records) == 300_000 // (2_000 + 120 * LONG // 250)


def test_claims_that_wait_for_lmcache_are_bounded_in_bytes(traced, monkeypatch):
    monkeypatch.setattr("kvttl.manager.settling._MAX_LATE_BYTES", 5 * 4 * LONG)
    cache = long_manager()
    Away(cache.controller, "layout")
    kept_bytes(cache, [0])
    assert 4 * LONG <= kept_bytes(cache, range(1, 5)) < 6 * LONG
    assert kept_bytes(cache, range(10, 18)) < LONG  # as many give way
    assert cache._decider.settler.unsettled == 5 and cache._decider.settler.has_unclaimed


# ---- one TTL ends once ----------------------------------------------------------------------


def test_a_ttl_whose_first_move_waits_in_vain_is_counted_and_announced_once():
    lines, metrics = [], DecisionMetrics()
    cache = local_manager(notify=lines.append, metrics=metrics)
    cache.generate_and_manage(PROMPT, None, HOT)
    cache.clock.now_s += HOT_TTL_S
    controller, move = cache.controller, cache.controller.move
    reason = "no copy in disk seen"
    vain = {"status": "timeout", "reason": reason, "moved_chunks": 0, "layout": None}
    controller.move = lambda *_args, **_options: dict(vain)
    cache.sweep()
    controller.move = move
    cache.clock.now_s += 5
    cache.sweep()
    assert kinds(cache) == ["generation", "expiry", "settled"]
    assert cache.records[1].moves[0]["reason"] == reason
    assert [record.from_tier for record in cache.records] == [None, "gpu", None]
    labels = {"from_tier": "gpu", "to_tier": "disk"}
    assert metrics.registry.get_sample_value("kvttl_expiries_total", labels) == 1
    assert "TTLs that ended 1: gpu→disk done 2" in session_summary(list(cache.records))
    assert [line for line in lines if "ended" in line] == [
        "✓ TTL in gpu ended: KV now belongs in disk (TTL: 419s)"
    ]
    assert lines[-1] == "✓ Moved KV from gpu to disk (TTL: 419s)"
