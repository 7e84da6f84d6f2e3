"""What stands on the replay engines: costs, tables, figures, the tab, the two commands."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import trace_fixtures as fixtures

from caching_heuristics import HeuristicConfig
from kvttl.bench import replay as replay_bench
from kvttl.plots.replay_plots import plot_over_time, plot_policies, plot_trade_off
from kvttl.replay import command as replay_command
from kvttl.replay import engine, tables
from kvttl.replay.baselines import replay_baseline
from kvttl.replay.costs import TierCosts, fit_costs, queued_ttft_s, result_costs
from kvttl.replay.engine import replay, replay_without_capacity
from kvttl.replay.runs import index_runs
from kvttl.replay.tables import (
    at_same_memory,
    export,
    mean_blocks_held,
    policy_table,
    trade_off,
    wide,
)
from kvttl.session.calibrate import calibrate
from kvttl.sliders import replay_tab
from kvttl.sliders.replay_tab import ReplayPicture, ReplayTab, replay_readout, replay_view
from kvttl.traces.builder import make_trace
from kvttl.traces.generator import agent_loops
from kvttl.traces.reading import traces_at_hand

ROOT = Path(__file__).resolve().parents[1]
TRACE = agent_loops(300, seed=5)
PNG = b"\x89PNG"


# --- costs --------------------------------------------------------------------------------


def test_default_costs_give_back_what_was_measured():
    costs = TierCosts()
    for code, seconds in enumerate((0.76, 0.83, 1.14)):
        hits = np.zeros(3)
        hits[code] = 1545
        assert costs.request_ttft_s(hits, 1545) == pytest.approx(seconds)
    assert 7.9 <= costs.request_ttft_s([0, 0, 0], 1545) <= 10.9


def test_ttft_adds_loads_and_prefill():
    costs = TierCosts((0.1, 0.2, 0.4), (100.0, 50.0, 10.0), 1.0, 10.0)
    ttft_s = costs.request_ttft_s([[0, 0, 0], [100, 0, 0], [50, 50, 10]], [20, 100, 120])
    assert ttft_s.tolist() == pytest.approx([2.0, 1.1, 0.1 + 0.2 + 0.4 + 0.5 + 1.0 + 1.0 + 1.0])
    with_start = replace(costs, start_s=0.5).request_ttft_s([[0, 0, 0], [100, 0, 0]], [20, 100])
    assert with_start.tolist() == pytest.approx([2.5, 1.6])
    assert TierCosts().start_s == 0.0


def test_costs_of_a_replay_beside_no_cache():
    costs = TierCosts(price_per_gib_hour=(1.0, 0.0, 0.0), engine_price_per_hour=3600.0)
    result = replay(TRACE, "recency", 0.3)
    figures = result_costs(result, costs)
    assert figures["speedup"] > 1
    assert figures["price"] == pytest.approx(figures["engine_price"] + figures["memory_price"])
    mean_s = TRACE.prompt_tokens.sum() / costs.prefill_tokens_per_s
    assert figures["price_without_cache"] == pytest.approx(mean_s)
    gib_hours = result.token_seconds[0] * costs.bytes_per_token / 2**30 / 3600
    assert figures["memory_price"] == pytest.approx(gib_hours)
    assert result_costs(replay(make_trace([]), "lru"))["speedup"] == 1.0


@pytest.mark.parametrize(
    "bad",
    [
        {"latency_s": (0, 0)},
        {"latency_s": (0, -1, 0)},
        {"bytes_per_s": (1, 0, 1)},
        {"prefill_tokens_per_s": 0},
        {"bytes_per_token": float("nan")},
        {"engine_price_per_hour": -1},
        {"start_s": -0.1},
        {"prefill_s_per_pair": -1e-9},
        {"store_s_per_token": float("inf")},
        {"lookup_s_per_token": (0, 0)},
        {"lookup_s_per_token": (0, -1, 0)},
    ],
)
def test_bad_costs_are_named(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        TierCosts(**bad)


def record(prompt_tokens, seconds, **hits):
    return SimpleNamespace(prompt_tokens=prompt_tokens, generate_s=seconds, hit_tokens=hits)


def test_costs_are_fitted_to_records():
    """Records made from known costs give those costs back."""
    true = TierCosts((0.1, 0.2, 0.3), (4e6, 2e6, 1e6), 1000.0, 100.0)
    records = [record(n, n / 100.0) for n in (50, 200, 400)]
    for code, tier in enumerate(("gpu", "disk", "remote")):
        for n in (64, 256):
            load_s = true.latency_s[code] + n * 1000.0 / true.bytes_per_s[code]
            records.append(record(n + 8, load_s + 8 / 100.0, **{tier: n}))
    records.append(record(100, 55.0, gpu=30, disk=30))  # two tiers: not used
    fitted = fit_costs(records, TierCosts(bytes_per_token=1000.0))
    assert fitted.latency_s == pytest.approx(true.latency_s)
    assert fitted.bytes_per_s == pytest.approx(true.bytes_per_s)
    assert fitted.prefill_tokens_per_s == pytest.approx(100.0)


def test_the_fit_finds_the_engines_fixed_time():
    """Seconds at lengths that were not fitted are predicted, cold and hit."""
    records = [record(n, 0.05 + n / 1000) for n in (50, 200, 400)]
    tiers = ("gpu", "disk", "remote")
    records += [record(n, 0.05 + n / 1e5, **{tier: n}) for tier in tiers for n in (64, 256)]
    fitted = fit_costs(records, TierCosts(bytes_per_token=1000.0))
    assert fitted.start_s == pytest.approx(0.05) and max(fitted.latency_s) < 1e-6
    for n in (10, 100, 1_000, 20_000):
        assert fitted.request_ttft_s([0, 0, 0], n) == pytest.approx(0.05 + n / 1000, rel=0.01)
        for hits in np.eye(3) * n:
            assert fitted.request_ttft_s(hits, n) == pytest.approx(0.05 + n / 1e5, rel=0.01)


def test_the_prefill_curve_and_a_store_are_found_in_a_noisy_log():
    """Slow generations among them, of other lengths than those that are predicted."""
    true = TierCosts((0.1, 0.2, 0.3), (4e6, 2e6, 1e6), 1000.0, 1000.0, start_s=0.02)
    true = replace(true, prefill_s_per_pair=2e-6, store_s_per_token=1e-4)
    rng, records, stored = np.random.default_rng(0), [], []
    for n in (100, 900, 1800) * 8:
        hits = np.vstack([np.zeros((2, 3)), np.eye(3) * (n - 8)])
        for hit, kept in zip(hits, (0, n, 8, 8, 8)):
            slow = 3.0 if rng.random() < 0.08 else 1 + rng.exponential(0.03)
            served = dict(zip(("gpu", "disk", "remote"), hit))
            records.append(record(n, true.request_ttft_s(hit, n, kept) * slow, **served))
            stored.append(kept)
    fitted = fit_costs(records, TierCosts(bytes_per_token=1000.0), stored)
    assert fitted.prefill_s_per_pair == pytest.approx(2e-6, rel=0.3)
    assert fitted.store_s_per_token == pytest.approx(1e-4, rel=0.5)
    for n in (50, 500, 1200, 1900):
        for hit in np.vstack([np.zeros(3), np.eye(3) * n / 2]):
            predicted, wanted = fitted.request_ttft_s(hit, n), true.request_ttft_s(hit, n)
            assert predicted == pytest.approx(wanted, rel=0.08)
    again = fit_costs(records, replace(true, lookup_s_per_token=(0.0, 1e-5, 0.0)))
    assert (again.store_s_per_token, max(again.lookup_s_per_token)) == (1e-4, 1e-5)  # kept


def test_ttft_counts_attention_stores_and_the_slowest_look_up():
    costs = TierCosts((0.0,) * 3, (1e9,) * 3, 1.0, 100.0, prefill_s_per_pair=0.001)
    assert costs.prefill_s(0, 100) == pytest.approx(1.0 + 0.001 * 100**2 / 2)
    assert costs.prefill_s(60, 100) == pytest.approx(0.4 + 0.001 * (100**2 - 60**2) / 2)
    both = costs.prefill_s(0, 60) + costs.prefill_s(60, 100)
    assert both == pytest.approx(costs.prefill_s(0, 100))
    more = replace(costs, store_s_per_token=0.01, lookup_s_per_token=(0.0, 0.002, 0.001))
    added_s = more.request_ttft_s([60, 0, 0], 100) - costs.request_ttft_s([60, 0, 0], 100)
    assert added_s == pytest.approx(0.01 * 40 + 0.002 * 100)
    refused_s = more.request_ttft_s([60, 0, 0], 100, stored_tokens=0)
    assert refused_s == pytest.approx(costs.request_ttft_s([60, 0, 0], 100) + 0.2)


def test_clients_that_ask_at_once_wait_for_the_engines_steps():
    costs = TierCosts((0.5, 0.0, 0.0), (1e9,) * 3, 1.0, 1000.0, start_s=0.1)
    alone = costs.request_ttft_s([[0, 0, 0], [600, 0, 0]], [800, 800])
    apart = queued_ttft_s(costs, [50.0, 0.0], [[0, 0, 0], [600, 0, 0]], [800, 800])
    assert apart.tolist() == pytest.approx(alone.tolist())
    # One step has room for both; the second's load is in it.
    both = queued_ttft_s(costs, [0.0, 0.0], [[0, 0, 0], [600, 0, 0]], [800, 800])
    assert both.tolist() == pytest.approx([0.1 + 0.8 + 0.2 + 0.5] * 2, abs=1e-5)
    # 1,000 tokens a step: what is left of the second one, and who came meanwhile, are next.
    split = queued_ttft_s(costs, [0, 0, 0.9], [[0, 0, 0]] * 3, [800, 700, 100], batch_tokens=1000)
    assert split.tolist() == pytest.approx([1.1, 1.1 + 0.1 + 0.5 + 0.1, 1.8 - 0.9])
    assert queued_ttft_s(costs, [], [], []).tolist() == []
    with pytest.raises(ValueError, match="batch_tokens"):
        queued_ttft_s(costs, [0.0], [[0, 0, 0]], [8], batch_tokens=0)


def test_the_fitted_fixed_time_is_never_below_0():
    records = [record(n, n / 100 - 0.1) for n in (50, 200)]
    assert fit_costs(records).start_s == 0.0
    faster_than_the_engine = [record(n, 0.5 + n / 1000) for n in (50, 200)]
    faster_than_the_engine += [record(n, 0.2, gpu=n) for n in (50, 200)]
    assert fit_costs(faster_than_the_engine).latency_s[0] == 0.0


def test_what_cannot_be_fitted_keeps_its_default():
    start = TierCosts(start_s=0.25)
    assert fit_costs([], start) == start
    faster_when_longer = [record(10, 1.0, gpu=10), record(20, 0.5, gpu=20)]
    assert 0.5 <= fit_costs(faster_when_longer, TierCosts()).latency_s[0] <= 1.0


def test_calibrate_measures_the_running_stack(stack, llm):
    from kvttl.session.launch import managed

    cache = managed(stack, llm)
    try:
        costs = calibrate(cache, repeats=2, bytes_per_token=1024.0)
        records = list(cache.records)
        served = {tier for r in records for tier, n in r.hit_tokens.items() if n}
    finally:
        cache.close()
    assert served == {"gpu", "disk", "remote"}, [(r.hit_tokens, r.error) for r in records]
    assert costs.prefill_tokens_per_s != TierCosts().prefill_tokens_per_s
    assert all(0 <= s < 30 for s in costs.latency_s), costs
    assert all(rate > 0 for rate in costs.bytes_per_s)
    with pytest.raises(ValueError, match="words must be"):
        calibrate(cache, words=(5, 5))


# --- tables and figures -------------------------------------------------------------------


def test_policy_table_holds_what_replays_give(tmp_path):
    table = policy_table(TRACE, (0.05, 0.5), ("lru", "heuristic", "optimal", "Belady"))
    assert table.shape == (8, 9)
    row = table[(table.policy == "lru") & (table.share == 0.5)].iloc[0]
    result = replay(TRACE, "lru", 0.5)
    assert row["token_hit_ratio"] == result.token_hit_ratio
    assert row["mean_blocks_held"] == mean_blocks_held(result)
    assert set(wide(table).index[:2]) == {"optimal", "Belady"}
    paths = export(tmp_path / "new", "policies", table, plot_policies(table))
    assert paths[0].read_text().startswith("policy,share,capacity_blocks,block_hit_ratio")
    assert paths[1].read_bytes().startswith(PNG)


def test_points_that_are_not_known_are_left_out(tmp_path):
    """W-TinyLFU below 100 blocks: a gap in the line, an empty cell."""
    shares = (50 / TRACE.unique_blocks, 0.5)
    table = policy_table(TRACE, shares, ("lru", "W-TinyLFU"))
    ratios = wide(table).loc["W-TinyLFU"]
    assert np.isnan(ratios.iloc[0]) and ratios.iloc[1] > 0
    figure = plot_policies(table)
    (drawn,) = (line for line in figure.axes[0].lines if line.get_label() == "W-TinyLFU")
    assert np.isfinite(drawn.get_ydata()).tolist() == [False, True]
    csv, png = export(tmp_path, "gap", table, figure)
    row = next(line for line in csv.read_text().splitlines() if line.startswith("W-TinyLFU"))
    assert row.split(",")[3:] == [""] * 6 and png.read_bytes().startswith(PNG)
    alone = plot_policies(policy_table(TRACE, shares[:1], ("W-TinyLFU",)))
    alone.savefig(tmp_path / "alone.png")


def test_a_warm_up_does_not_count():
    table = policy_table(TRACE, (0.5,), ("lru",), since_s=TRACE.span_s / 2)
    expected = replay(TRACE, "lru", 0.5).since(TRACE.span_s / 2)["token_hit_ratio"]
    assert table["token_hit_ratio"][0] == expected


def test_trade_off_grows_with_the_ttl_and_the_optimum_is_above(tmp_path):
    sweep = trade_off(index_runs(TRACE), base_ttls_s=(1, 10, 100, 1000))
    assert np.all(np.diff(sweep["heuristic"]) >= 0)
    assert np.all(sweep["optimal"] >= sweep["recency"] - 1e-12)
    result = replay_without_capacity(TRACE, HeuristicConfig(base_ttl=50))
    plot_trade_off(sweep, result).savefig(tmp_path / "a.png")
    plot_over_time(result).savefig(tmp_path / "b.png")
    assert (tmp_path / "a.png").read_bytes().startswith(PNG)


def test_peers_have_the_same_memory():
    index = index_runs(TRACE)
    result = replay_without_capacity(index, HeuristicConfig(base_ttl=20))
    for peer in at_same_memory(index, result).values():
        assert peer.capacity_blocks[0] == round(mean_blocks_held(result))


# --- the tab ------------------------------------------------------------------------------


def test_the_tab_follows_its_sliders(tmp_path):
    tab = ReplayTab({"one": TRACE, "two": fixtures.random_trace(1)}, folder=tmp_path)
    first, picture = tab.view.summary(), bytes(tab.image.value)
    assert picture.startswith(PNG)
    tab.controls["base_ttl"].entry.value = 3.0
    tab.controls["min_ttl"].entry.value = 0.2
    for name in ("disk_ttl_factor", "remote_ttl_factor"):
        tab.controls[name].slider.value = 0.1
    assert tab.view.summary()["token_hit_ratio"] < first["token_hit_ratio"]
    assert bytes(tab.image.value) != picture
    assert f"{tab.view.summary()['token_hit_ratio']:.1%}" in tab.readout.value
    tab.has_perplexity.value = True
    tab.perplexity.value = 90.0
    assert tab.view.result.hit_tokens[:, :2].sum() == 0  # cold: all in remote
    settings = tab.view
    tab.policy.value = "adaptive"
    assert tab.view.result.policy == "adaptive"
    assert tab.view.result.capacity_blocks == settings.peers["recency"].capacity_blocks
    tab.trace.value = "two"
    assert tab.view.result.trace.requests == 60


def test_the_tab_exports_what_it_shows(tmp_path):
    tab = ReplayTab({"one/<b>": TRACE}, folder=tmp_path / "a<b")
    csv, png = tab.export()
    assert (csv.name, png.name) == ("replay_one_b_.csv", "replay_one_b_.png")
    assert csv.read_text().startswith(
        "trace,policy,capacity,base_ttl"
    ) and png.read_bytes().startswith(PNG)
    assert np.isnan(pd.read_csv(csv)["perplexity"][0])
    tab.perplexity.value, tab.has_perplexity.value = 55.0, True
    tab.controls["hot_threshold"].entry.value = 500.0  # above the cold one: not drawn
    assert set(tab.errors) == {"hot_threshold", "cold_threshold"}
    tab.export_button.click()
    assert "exported to" in tab.status.value and "a&lt;b" in tab.status.value
    assert "the last valid settings" in tab.status.value
    row = pd.read_csv(csv).iloc[0]
    assert row["perplexity"] == 55.0 and row["hot_threshold"] == tab.config.hot_threshold
    assert row["token_hit_ratio"] == pytest.approx(tab.view.summary()["token_hit_ratio"])


def test_an_export_that_fails_is_told(tmp_path):
    (tmp_path / "a<file").write_text("not a folder")
    tab = ReplayTab({"one": TRACE}, folder=tmp_path / "a<file" / "exports")
    tab.export_button.click()
    assert "⚠" in tab.status.value and "a&lt;file" in tab.status.value
    tab.folder = tmp_path
    tab.export_button.click()
    assert "replay_one.csv and" in tab.status.value and "⚠" not in tab.status.value


def test_impossible_settings_are_named_and_the_last_picture_stays():
    tab = ReplayTab({"one": TRACE})
    picture = bytes(tab.image.value)
    tab.controls["gamma"].entry.value = 7.0
    assert "must be 0..1, got 7" in tab.controls["gamma"].message.value
    assert bytes(tab.image.value) == picture
    tab.controls["gamma"].entry.value = 0.5
    assert not tab.errors and tab.config.gamma == 0.5
    tab.controls["base_ttl"].entry.value = 60.0
    assert bytes(tab.image.value) != picture


def test_every_slider_is_a_setting_and_moves_the_replay():
    tab = ReplayTab({"one": TRACE}, HeuristicConfig(base_ttl=20, min_ttl=1))
    assert list(tab.controls) == list(HeuristicConfig().to_dict())
    first = tab.values
    for control in tab.controls.values():
        slider = control.slider
        for end in (slider.min, slider.max):
            slider.value = 10**end if type(slider).__name__ == "FloatLogSlider" else end
            assert 0 <= tab.view.summary()["token_hit_ratio"] <= 1
        control.entry.value = first[control.name]
        assert not tab.errors and "of tokens hit" in tab.readout.value


def test_the_thresholds_move_prompts_between_tiers():
    tab = ReplayTab({"one": TRACE})
    tab.perplexity.value, tab.has_perplexity.value = 50.0, True
    for low, high, tier in ((20.0, 40.0, 2), (20.0, 90.0, 1), (60.0, 90.0, 0)):
        tab.controls["cold_threshold"].entry.value = high
        tab.controls["hot_threshold"].entry.value = low
        assert tab.view.result.hit_tokens.sum(axis=0).argmax() == tier


def test_a_slider_step_is_one_replay_and_its_two_peers(monkeypatch):
    """No grouping of the trace, no curves anew; `make bench-replay` takes the times."""
    tab, calls = ReplayTab({"one": TRACE}), Counter()

    def counted(module, name):
        function = getattr(module, name)

        def call(*given, **options):
            calls[name] += 1
            return function(*given, **options)

        monkeypatch.setattr(module, name, call)

    counted(replay_tab, "replay_without_capacity")
    counted(replay_tab, "index_runs")
    counted(replay_tab, "replay")
    counted(tables, "replay")
    counted(engine, "index_runs")
    for steps, base_ttl in enumerate((30.0, 40.0, 200.0), start=1):
        tab.controls["base_ttl"].entry.value = base_ttl
        assert calls == {"replay_without_capacity": steps, "replay": 2 * steps}


def test_traces_at_hand_are_the_sample_and_those_in_the_folder(tmp_path, monkeypatch):
    monkeypatch.delenv("KV_TRACE_DIR", raising=False)
    assert list(traces_at_hand(cache_dir=tmp_path)) == ["sample"]
    (tmp_path / "mooncake").mkdir()
    line = '{"timestamp": 0, "input_length": 600, "output_length": 9, "hash_ids": [0, 1]}'
    (tmp_path / "mooncake" / "conversation_trace.jsonl").write_text(line)
    monkeypatch.setenv("KV_TRACE_DIR", str(tmp_path))
    assert list(traces_at_hand(cache_dir=tmp_path)) == ["conversation", "sample"]


def test_the_plain_functions_work_without_widgets():
    index = index_runs(TRACE)
    view = replay_view(index, HeuristicConfig(base_ttl=30))
    picture = ReplayPicture(index)
    empty = picture.png()
    picture.update(view)
    assert picture.png() != empty and "points above recency" in replay_readout(view)
    with pytest.raises(ValueError, match="at least one trace"):
        ReplayTab({})


# --- commands -----------------------------------------------------------------------------


def replay_json(capsys, *arguments):
    assert replay_command.main(["--cache-dir", "", *arguments]) == 0
    out = capsys.readouterr().out.strip().splitlines()
    return json.loads(out[-1])


@pytest.mark.parametrize(
    "policy", ["infinite", "lru", "fifo", "ttl", "heuristic", "optimal", "heuristic_order", "ARC"]
)
def test_make_replay_ends_with_one_line_of_json(capsys, policy):
    figures = replay_json(capsys, "--policy", policy, "--capacity", "0.05")
    sample = fixtures.sample()
    assert figures["accesses"] == sample.accesses
    assert figures["unique_blocks"] == sample.unique_blocks
    assert 0 < figures["block_hit_ratio"] < 1 and 0 < figures["token_hit_ratio"] < 1
    wanted = "hit_blocks hit_tokens block_seconds token_seconds moved_tokens moved_bytes ttft_p50_s"
    assert set(wanted.split()) <= set(figures)
    if policy == "lru":
        assert figures["block_hit_ratio"] == replay(sample, "lru", 0.05).block_hit_ratio


def test_what_a_baseline_cannot_answer_is_null_and_nan_not_zero(capsys):
    def no_constant(name):
        raise AssertionError(f"{name} is no JSON")

    assert (
        replay_command.main(["--cache-dir", "", "--policy", "W-TinyLFU", "--capacity", "12"]) == 0
    )
    line = capsys.readouterr().out.strip().splitlines()[-1]
    figures = json.loads(line, parse_constant=no_constant)
    assert figures["token_hit_ratio"] is None and figures["ttft_p50_s"] is None
    unknown = replay_baseline(TRACE, "W-TinyLFU", 5)
    for frame in (unknown.over_time(), unknown.by_session()):
        assert len(frame) and frame["token_hit_ratio"].isna().all()
        assert (frame["requests"] > 0).all()


def test_make_replay_takes_tiers_and_settings(capsys):
    tiers = ["--policy", "heuristic", "--capacity", "50,0.2,unlimited"]
    figures = replay_json(capsys, *tiers, "--set", "base_ttl=40", "gamma=0")
    assert figures["capacity_blocks"] == {"gpu": 50, "disk": 259, "remote": None}
    assert figures["settings"]["base_ttl"] == 40
    assert figures["hit_tokens"]["disk"] > 0


@pytest.mark.parametrize(
    "arguments, reason",
    [
        (["--policy", "clock"], "unknown POLICY 'clock': "),
        (["--capacity", "many"], "CAPACITY must be"),
        (["--capacity", "1,2"], "CAPACITY must be one value"),
        (["--set", "speed=3"], "unknown setting 'speed': "),
        (["--set", "base_ttl=x"], "base_ttl must be a number"),
        (["--set", "base_ttl=-1"], "base_ttl must be > 0"),
        (["--trace", "absent.jsonl"], "there is no trace"),
    ],
)
def test_make_replay_names_what_is_wrong(capsys, arguments, reason):
    assert replay_command.main(["--cache-dir", "", *arguments]) == 1
    assert reason in capsys.readouterr().err


def test_make_replay_from_the_command_line(tmp_path):
    """As make calls it, from another folder."""
    command = [
        sys.executable,
        "-m",
        "kvttl.replay.command",
        "--policy",
        "optimal",
        "--capacity",
        "100",
    ]
    command += ["--trace", str(fixtures.SAMPLE_FILE), "--cache-dir", str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    for _ in range(2):  # the second time from the compact copy
        done = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["capacity_blocks"]["gpu"] == 100
    assert len(list(tmp_path.glob("*.npz"))) == 1


def test_bench_replay_reports_its_keys(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(replay_bench, "bench_trace", lambda: TRACE)
    monkeypatch.setattr(replay_bench, "_GROWTH", (10_000, 30_000))
    arguments = ["--repeats", "1", "--largest", "30000", "--report", str(tmp_path / "r.json")]
    assert replay_bench.main(arguments) == 0
    figures = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    wanted = "ttl_accesses_per_s tiers_accesses_per_s libcachesim_accesses_per_s slider_step_ms"
    assert set(wanted.split()) <= set(figures)
    assert figures["lru_hits_equal_libcachesim"] is True
    report = json.loads((tmp_path / "r.json").read_text())
    assert report["growth"] and report["versions"]["libcachesim"] == "0.3.5"


def test_the_committed_report_holds_its_goals():
    report = json.loads((ROOT / "data" / "reports" / "replay.json").read_text())
    assert report["ttl_accesses_per_s"] >= 50e6 and report["tiers_accesses_per_s"] >= 20e6
    assert report["slider_step_ms"] <= 50
    assert [round(row["accesses"] / 1e6) for row in report["growth"]] == [1, 10, 100]
