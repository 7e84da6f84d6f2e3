"""What the models of LMCache and the costs predict, beside real servers and constructed logs."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from inside_server import CHUNK, MODEL, Client, inside_server
from waiting import wait_until

from caching_heuristics import TIERS, HeuristicConfig
from kvttl.bench.contenders import CONTENDERS, LMCACHE, PEER
from kvttl.bench.speedup_report import truth_text
from kvttl.bench.truth import replay_truth
from kvttl.bench.workloads import CHUNK_TOKENS, make_workload
from kvttl.lmcache.client import Service
from kvttl.lmcache.inside import Handover, ServerModule
from kvttl.lmcache.layout import hits_by_tier
from kvttl.lmcache.model import ServerModuleModel
from kvttl.manager.clock import SessionClock
from kvttl.replay.costs import TierCosts
from kvttl.replay.engine import replay
from kvttl.replay.on_lmcache import replay_on_lmcache
from kvttl.session.demo_model import model_path
from kvttl.traces.generator import agent_loops

ROOM, LOW = 64, 0.75
SHORT = HeuristicConfig(base_ttl=240.0, min_ttl=1.0)


def tokens_of(trace, row):
    """A token a block: equal blocks are equal chunks."""
    return [int(block) + 1 for block in trace.request(row) for _ in range(CHUNK)]


def served_inside(running, trace, config):
    """Hit tokens by request and tier of a real server that decides, on a session's clock."""
    client, http = Client(running.url), Service(f"http://127.0.0.1:{running.http_port}")
    ask = SimpleNamespace(
        ask_module=lambda _, path, body=None: http.call("POST" if body else "GET", path, body)
    )
    where = f"inside-{running.url.rpartition(':')[2]}"
    module, clock = ServerModule(ask, where, lambda: (MODEL, 1, "")), SessionClock(0.0)
    lead = Handover(module, config.ladder, clock, "formula").begin()
    hits, decided = np.zeros((trace.requests, 3), int), []

    def at_rest():
        status = client.status()
        used, total = status["gpu_bytes"]
        decided.extend(r for r in lead.sweep(clock()) if r["kind"] == "generation")
        busy = status["open_requests"] + status["waiting_decisions"]
        return not busy and used <= 0.85 * total and len(decided) == row + 1

    for row in range(trace.requests):
        while (due_s := lead.next_due_s + 0.001) < trace.arrival_s[row]:
            clock.advance(due_s)
            lead.sweep(clock())
        clock.advance(float(trace.arrival_s[row]))
        lead.sweep(clock())
        tokens = tokens_of(trace, row)
        held = module.layout(tokens).of(where)
        found = hits_by_tier(held, client.serve(tokens) * CHUNK, CHUNK)
        hits[row] = [found.get(tier, 0) for tier in TIERS]
        wait_until(at_rest)
    lead.release()
    client.close()
    return hits


@pytest.mark.timeout(600)
def test_the_model_of_the_server_module_hits_what_a_real_one_hits(tmp_path, redis_port):
    shape = {"system_blocks": 6, "turn_blocks": 3.0, "turns": 5.0, "sessions_per_hour": 60.0}
    trace = agent_loops(40, seed=3, block_tokens=CHUNK, **shape)
    settings = {"heuristics": SHORT.to_dict(), "high": 0.85, "low": LOW}
    with inside_server(tmp_path, settings, redis=redis_port, l1_chunks=ROOM) as running:
        hits = served_inside(running, trace, SHORT)
    prompts = [tokens_of(trace, row) for row in range(trace.requests)]
    rules = {"watermark": 0.85, "ratio": 1 - LOW / 0.85}
    model = replay_on_lmcache(trace, prompts, ROOM, SHORT, inside=True, **rules).hit_tokens
    assert hits[:, 0].any() and hits[:, 1:].any()
    differ = np.flatnonzero((hits != model).any(axis=1))
    # The server's watermark may come between a store and its decision; the model's never does.
    assert len(differ) <= 2, [(row, hits[row], model[row]) for row in differ]


# ---- the module's rules, one by one --------------------------------------------------------


def prompt(number, chunks):
    return [number * 1000 + n for n in range(4 * chunks)]


def decide(model, tokens, ends_s, tier="gpu"):
    """Note a decision of second 0."""
    keys = model.layout(tokens).keys
    wish = {"wanted_tier": tier, "ttl_s": ends_s, "time_s": 0.0}
    model.note(SimpleNamespace(chunk_keys=keys, **wish), True)


def held(model, tokens):
    return model.layout(tokens).of(model.instance_id)


def test_room_is_made_before_a_store_and_what_ends_first_goes_its_end_first():
    model = ServerModuleModel(5, chunk_size_tokens=4, watermark=1.0)
    for number, ends_s in ((1, 90.0), (2, 60.0)):
        model.serve(prompt(number, 2))
        assert held(model, prompt(number, 2)) == (("gpu",),) * 2  # nothing is written at birth
        decide(model, prompt(number, 2), ends_s)
        assert held(model, prompt(number, 2)) == (("gpu", "disk"),) * 2  # but at the end
    model.serve(prompt(3, 2))
    assert model.stored_tokens == [8]
    assert held(model, prompt(2, 2)) == (("gpu", "disk"), ("disk",))
    model.serve(prompt(4, 3))  # nothing is decided about 3: it would go last
    assert held(model, prompt(3, 2)) == (("gpu",),) * 2
    assert held(model, prompt(1, 2)) == (("disk",),) * 2
    model.serve(prompt(5, 6))  # more than there is room for
    assert model.stored_tokens == [0]


def test_above_the_high_mark_gpu_is_relieved_and_what_is_wanted_is_written_down():
    model = ServerModuleModel(10, chunk_size_tokens=4, watermark=0.8, ratio=0.25)
    for number in (1, 2, 3):
        model.serve(prompt(number, 3))
        decide(model, prompt(number, 3), 10.0 * number, tier="remote")
    wanted = {key: "remote" for key in model.layout(prompt(1, 3)).keys}
    model.wanted = lambda keys: [wanted.get(key) for key in keys]
    model.evict()
    assert held(model, prompt(1, 3)) == (("gpu",), ("gpu",), ("disk",))
    assert held(model, prompt(2, 3)) == held(model, prompt(3, 3)) == (("gpu",), ("gpu",), ())


def test_of_a_hit_below_what_a_claim_wants_stays_in_gpu_and_every_way_is_possible():
    model = ServerModuleModel(8, chunk_size_tokens=4)
    here, tokens = model.instance_id, prompt(1, 3)
    model.serve(tokens)
    ways = (("gpu", "remote"), ("remote", "disk"), ("disk", "gpu"), ("gpu", "disk"))
    for source, target in ways:
        assert model.move([here, source], [here, target], tokens)["moved_chunks"] == 3
        assert held(model, tokens)[0][0] == target
    first = model.layout(tokens).keys[0]
    model.wanted = lambda keys: ["gpu" if key == first else "disk" for key in keys]
    assert model.serve(tokens) == {"disk": 12}
    assert model.serve(tokens) == {"gpu": 4, "disk": 8}


def test_prompts_that_come_at_once_are_looked_up_before_any_is_stored():
    model = ServerModuleModel(20, chunk_size_tokens=4)
    assert model.serve_at_once([prompt(1, 3), prompt(1, 4)]) == [{}, {}]
    assert model.stored_tokens == [12, 4]
    assert model.serve(prompt(1, 4)) == {"gpu": 16}


# ---- two models, one answer ----------------------------------------------------------------


@pytest.fixture
def no_traces(monkeypatch):
    monkeypatch.delenv("KV_TRACE_DIR", raising=False)


@pytest.mark.parametrize("name", ["agentic", "chat"])
def test_trace_replay_and_the_model_agree_on_what_both_can_express(no_traces, name):
    """TTLs and the ladder with room for all; the order of recency in a small gpu."""
    load = make_workload(name, 1, 40, model_path())
    run = load.trace, load.prompts
    rules = {"inside": True, "watermark": 1.01, "ratio": 0.0}
    for ttl_s in (20.0, 60.0):  # gamma: a claim lasts as long as the longest of its TTLs
        one = {"hot_threshold": 1e6, "cold_threshold": 1e6, "variance_threshold": 1.0}
        config = HeuristicConfig(base_ttl=ttl_s, min_ttl=1.0, gamma=0.0, **one)
        fast = replay(load.trace, "heuristic", (None, None, None), config).hit_tokens
        assert (replay_on_lmcache(*run, 10_000, config, **rules).hit_tokens == fast).all()
        assert np.count_nonzero(fast.sum(axis=0)) >= 2
    fast = replay(load.trace, "recency", (80, None, None)).hit_tokens
    config = HeuristicConfig()
    small = replay_on_lmcache(*run, 80, config, policy="recency", **rules).hit_tokens
    assert (small[:, 0] == fast[:, 0]).all()
    assert fast[:, 1].any()  # it did not hold all


# ---- the report ----------------------------------------------------------------------------


def test_the_report_finds_what_was_made_wrong_in_a_log(no_traces):
    """Hits of the model itself, times of known costs: three requests are changed."""
    true = TierCosts((0.01, 0.02, 0.05), (1e7,) * 3, 1024.0, 2000.0, start_s=0.01)
    true = replace(true, prefill_s_per_pair=1e-7)
    rows, totals, loads = [], [], {}
    for seed in (0, 1):
        load = loads["chat", seed] = make_workload("chat", seed, 30, model_path())
        hot = 60
        for name in (LMCACHE, PEER):
            at = {"workload": "chat", "hot_share": 0.1, "contender": name, "seed": seed}
            totals.append(at | {"hot_tokens": hot * CHUNK_TOKENS})
            made = replay_on_lmcache(load.trace, load.prompts, hot, **CONTENDERS[name].rules)
            for row, hit in enumerate(made.hit_tokens):
                served = {f"hit_{tier}": n for tier, n in zip(TIERS, hit.tolist())}
                served |= {"request": row, "perplexity": np.nan}
                served |= {"prompt_tokens": len(load.prompts[row])}
                took_s = float(true.request_ttft_s(hit, len(load.prompts[row])))
                rows.append(at | served | {"ttft_s": took_s})
    frame = pd.DataFrame(rows)
    changed = frame.query("contender == @PEER and seed == 1").index[:3]
    frame.loc[changed, "hit_gpu"] += CHUNK_TOKENS
    result = SimpleNamespace(requests=frame, totals=pd.DataFrame(totals), workloads=loads)
    result.costs, result.policy = replace(true, start_s=1.0), "formula"
    table = replay_truth(result, {}).set_index("contender")
    assert table["model_differ"].to_dict() == {LMCACHE: 0, PEER: 3}
    assert table["model_equal"].to_dict() == {LMCACHE: 1.0, PEER: pytest.approx(57 / 60)}
    assert (table["ttft_error_p90"] < 0.02).all()
    assert (table["ttft_error_calibrated"] > 0.5).all()  # those were wrong
    assert (table["ttft_noise"] < 1e-9).all()
    assert "95.0%  (3 of 60 differ)" in truth_text(table.reset_index())
