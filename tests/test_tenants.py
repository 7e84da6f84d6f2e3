"""Tenants: KV of equal texts under two salts is two tenants', in every step of the manager."""

from __future__ import annotations

import json
import math
from types import SimpleNamespace

import pytest
from local_managers import (
    CHUNK,
    COLD,
    HOT,
    WARM,
    Clock,
    assert_all_claimed_and_none_too_hot,
    assert_nothing_is_immortal,
    local_controller,
    local_manager,
)

from cache_controller import LMCacheController
from caching_heuristics import TIERS
from kvttl.decisions.log import DecisionLog, read_records, to_frame
from kvttl.decisions.metrics import DecisionMetrics
from kvttl.decisions.record import DecisionRecord
from kvttl.lmcache.client import LMCacheUnavailable
from kvttl.lmcache.salts import salt_of
from kvttl.manager.metadata import PromptHistory
from kvttl.traces.reading import read_trace

PROMPT = "the same text of everybody."
CHUNKS = len(PROMPT) // CHUNK
A, B = {"prompt": PROMPT, "cache_salt": "tenant-a"}, {"prompt": PROMPT, "cache_salt": "tenant-b"}


class Engine:
    """Stands for vLLM with LMCache: takes KV from where it is under the prompt's salt."""

    def __init__(self, controller):
        self._controller, self.asked = controller, []

    def generate(self, prompts, sampling_params):
        prompts = prompts if isinstance(prompts, list) else [prompts]
        self.asked += prompts
        return [self._answer(prompt) for prompt in prompts]

    def _answer(self, prompt):
        fields = prompt if isinstance(prompt, dict) else {"prompt": prompt}
        tokens = list(fields["prompt"].encode())
        found = self._controller.load(tokens, fields.get("cache_salt", ""))
        return SimpleNamespace(
            prompt_token_ids=tokens,
            num_cached_tokens=CHUNK * len(found),
            outputs=[SimpleNamespace(text=fields["prompt"].upper(), logprobs=None)],
        )


def manager(controller=None, **options):
    controller = controller or local_controller()
    return local_manager(controller, llm=Engine(controller), **options)


def tiers(cache, salt=""):
    """The hottest tier of each chunk of a tenant's; empty = not there."""
    layout = cache.controller.layout(list(PROMPT.encode()), salt)
    held = layout.of(cache.controller.instance_id)
    return {each[0] for each in held if each}


def test_each_tenant_has_its_own_kv_ttl_and_tier():
    cache = manager()
    assert cache.generate_and_manage(A, None, HOT) == PROMPT.upper()
    cache.generate_and_manage(PROMPT, None, COLD)
    cache.generate_and_manage(PROMPT, None, WARM, cache_salt="tenant-b")
    assert [tiers(cache, salt) for salt in ("tenant-a", "", "tenant-b")] == [
        {"gpu"},
        {"remote"},
        {"disk"},
    ]
    assert [r.cache_salt for r in cache.records] == ["tenant-a", "", "tenant-b"]
    assert len({r.prompt_digest for r in cache.records}) == 3
    assert {r.hit_tokens.get("gpu", 0) for r in cache.records} == {0}
    assert_all_claimed_and_none_too_hot(cache)
    assert_nothing_is_immortal(cache)


def test_a_tenants_use_is_seen_by_itself_only():
    cache = manager()
    for _ in range(3):
        cache.generate_and_manage(A, None, {"perplexity": 20.0})
    cache.generate_and_manage(B, None, {"perplexity": 20.0})
    cache.generate_and_manage(PROMPT, None, {"perplexity": 20.0})
    cache.generate_and_manage(A, None, {"perplexity": 20.0})
    assert [r.metadata["access_count"] for r in cache.records] == [0, 1, 2, 0, 0, 3]
    assert cache.records[3].hit_tokens == {} != cache.records[5].hit_tokens


def test_the_history_tells_salts_apart_and_is_the_old_one_without():
    history = PromptHistory(2)
    tokens = [1, 2, 3, 4]
    keys = {history.observe(tokens, 0, salt).key for salt in ("", "a", "b", "a")}
    assert len(keys) == 3 and history.observe(tokens, 1).access_count == 1
    assert PromptHistory(2).observe(tokens, 0).key in keys
    history.note_perplexity(history.observe(tokens, 2, "a").key, 7.0)
    assert history.perplexity(history.observe(tokens, 3, "b").key) is None


def test_expiry_demotes_and_drops_the_tenants_own_only():
    clock = Clock()
    cache = manager(clock=clock)
    cache.generate_and_manage(A, None, WARM)
    clock.now_s += 90
    cache.generate_and_manage(B, None, HOT)
    clock.now_s += 20  # A's 100 s are over
    (record,) = cache.sweep()
    assert (record.cache_salt, record.kind, record.wanted_tier) == ("tenant-a", "expiry", "remote")
    assert (tiers(cache, "tenant-a"), tiers(cache, "tenant-b")) == ({"remote"}, {"gpu"})
    for _ in range(2000):  # B comes back all the time, A never
        clock.now_s += 80
        cache.generate_and_manage(B, None, HOT)
        cache.sweep()
        if not tiers(cache, "tenant-a"):
            break
    assert (tiers(cache, "tenant-a"), tiers(cache, "tenant-b")) == (set(), {"gpu"})
    assert_nothing_is_immortal(cache)


def test_moves_and_deletes_are_of_one_tenant():
    controller = local_controller()
    tokens, here = list(PROMPT.encode()), controller.instance_id
    for salt in ("", "tenant-a", "ünï a"):
        assert controller.store(tokens, cache_salt=salt) == CHUNKS

    def held(salt):
        return controller.lookup(tokens, salt).get(here, [])

    def move(**what):
        return controller.move([here, "gpu"], [here, "remote"], **what)["moved_chunks"]

    assert move(tokens=tokens, cache_salt="tenant-a") == CHUNKS
    assert [held(salt) for salt in ("", "tenant-a", "ünï a")] == [[*TIERS], ["remote"], [*TIERS]]
    assert move(tokens=None, cache_salt="ünï a") == CHUNKS  # everything of this tenant
    assert [held(salt) for salt in ("", "ünï a")] == [[*TIERS], ["remote"]]
    assert move(tokens=None) == CHUNKS  # everything that nobody has salted
    keys = controller.layout(tokens, "tenant-a").keys
    assert controller.discard(keys) == 0
    assert [held(salt) for salt in ("", "tenant-a", "ünï a")] == [["remote"], [], ["remote"]]
    assert controller.load(tokens, "tenant-a") == []
    assert len(controller.load(tokens, "ünï a")) == CHUNKS


def test_claims_that_wait_for_lmcache_are_made_under_their_salts():
    cache = manager()
    layout, away = cache.controller.layout, [True]

    def sometimes(*args, **options):
        if away[0]:
            raise LMCacheUnavailable("away")
        return layout(*args, **options)

    cache.controller.layout = sometimes
    for prompt in (A, B, PROMPT):
        cache.generate_and_manage(prompt, None, COLD)
        assert cache.records[-1].error.startswith("LMCacheUnavailable")
    away[0] = False
    cache.clock.now_s += 1
    cache.sweep()
    assert len(cache.claims) == 3
    assert [tiers(cache, salt) for salt in ("tenant-a", "tenant-b", "")] == [{"remote"}] * 3
    assert_nothing_is_immortal(cache)


def test_a_restart_knows_whose_kv_it_is(tmp_path):
    controller, clock = local_controller(), Clock()
    with DecisionLog(tmp_path) as log:
        first = manager(controller, clock=clock, log=log)
        first.generate_and_manage(A, None, WARM)
        first.generate_and_manage(B, None, COLD)
    controller.store(list(PROMPT.encode()))  # by a process that died before it could write
    controller.store(list(PROMPT.encode()), cache_salt="tenant-c")
    logged = list(read_records(tmp_path, kinds=None))
    assert {r.cache_salt for r in logged} == {"tenant-a", "tenant-b"}
    assert all(salt_of(key) == r.cache_salt for r in logged for key in r.chunk_keys)
    with DecisionLog(tmp_path) as log:
        second = manager(controller, clock=clock, log=log)
        found = second.recover(tmp_path)
    assert (found["claims"], found["adopted"]) == (2, 2 * CHUNKS)
    assert_all_claimed_and_none_too_hot(second)
    adopted = [r for r in read_records(tmp_path, kinds=None) if r not in logged]
    assert len({r.prompt_digest for r in adopted}) == 2 * CHUNKS  # equal hashes, other owners
    third = manager(controller, clock=clock)
    assert third.recover(tmp_path)["adopted"] == 0
    assert_nothing_is_immortal(third)


def test_a_log_without_the_field_is_read():
    from kvttl.decisions.record import parse_record

    values = json.loads(DecisionRecord(1.0, "ab", chunk_keys=("00ff",)).to_json())
    del values["cache_salt"]
    assert parse_record(json.dumps(values)).cache_salt == ""


def test_a_controller_of_one_tenant_takes_its_requests_only():
    with pytest.raises(ValueError, match="of a controller must be 1 to 64 letters.* got 'ü'"):
        LMCacheController(cache_salt="ü")
    tenant = local_controller()
    tenant.cache_salt = "tenant-a"
    cache = manager(tenant)
    assert cache.admit(PROMPT, None) == (A, "tenant-a")
    assert cache.admit(A, None) == (A, "tenant-a")
    with pytest.raises(ValueError, match="'tenant-b' of the prompt is not possible: 'tenant-a'"):
        cache.admit(B, None)


def test_refused_requests_reach_neither_engine_nor_records():
    cache = manager()
    with pytest.raises(ValueError, match="cache_salt must be a text"):
        cache.generate_and_manage({"prompt": PROMPT, "cache_salt": "a/b"}, None)
    with pytest.raises(ValueError, match="prompt_logprobs .* not possible"):
        cache.generate([PROMPT, PROMPT], [None, SimpleNamespace(prompt_logprobs=1)])
    with pytest.raises(ValueError, match="soft_prompt is not possible"):
        cache.generate_and_manage_batch([PROMPT, {"prompt": PROMPT, "soft_prompt": 1}], None)
    assert cache._llm.asked == [] and len(cache.records) == 0
    done = cache.manage({"prompt": PROMPT, "soft_prompt": 1}, SimpleNamespace()).result()
    assert done.error.startswith("ValueError: soft_prompt is not possible")


def test_what_others_have_generated_is_managed_under_its_salt():
    cache = manager()
    output = cache._llm.generate([A], None)[0]
    assert cache.manage(A, output, COLD).result().cache_salt == "tenant-a"
    assert cache.manage(PROMPT, output, HOT, 0.0, "tenant-b").result().wanted_tier == "gpu"
    assert (tiers(cache, "tenant-a"), tiers(cache, "tenant-b")) == ({"remote"}, {"gpu"})


def test_records_metrics_and_frames_show_tenants_without_a_label_for_each():
    metrics = DecisionMetrics()
    cache = manager(metrics=metrics)
    for number in range(5):
        cache.generate_and_manage(PROMPT, None, HOT, cache_salt=f"tenant-{number}")
    cache.generate_and_manage(PROMPT, None, HOT)
    assert metrics.registry.get_sample_value("kvttl_salted_decisions_total") == 5
    assert metrics.registry.get_sample_value("kvttl_decisions_total", {"tier": "gpu"}) == 6
    frame = to_frame(cache.records)
    assert frame["cache_salt"].tolist() == [f"tenant-{number}" for number in range(5)] + [""]


def test_a_replay_of_the_log_shares_nothing_between_tenants(tmp_path):
    with DecisionLog(tmp_path) as log:
        cache = manager(log=log)
        for prompt in (PROMPT, A, A, B):
            cache.generate_and_manage(prompt, None, HOT)
    trace = read_trace(tmp_path)
    blocks = [tuple(trace.request(number)) for number in range(4)]
    assert blocks[1] == blocks[2] and not set(blocks[0]) & set(blocks[1])
    assert not set(blocks[3]) & set(blocks[0] + blocks[1])
    assert math.isfinite(trace.arrival_s[-1])
