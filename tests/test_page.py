"""The page of `make app` without a browser: tabs, tuning, and what a running server says."""

from __future__ import annotations

import asyncio
import json
import shutil
from pathlib import Path

import pandas as pd
import pytest
from prometheus_client import CollectorRegistry, start_http_server
from redis_fixtures import free_port

from caching_heuristics import HeuristicConfig
from kvttl.decisions.log import DecisionRecord
from kvttl.decisions.metrics import DecisionMetrics
from kvttl.lmcache.client import LMCacheError
from kvttl.settings import load_settings
from kvttl.sliders.live_source import OWN, LiveSource, Seen
from kvttl.sliders.live_tab import LiveTab
from kvttl.sliders.page import Page
from kvttl.sliders.tune_tab import TuneTab
from kvttl.traces.generator import agent_loops

DATA = Path(__file__).resolve().parents[1] / "data"
TRACE = agent_loops(60)


@pytest.fixture
def page(tmp_path, monkeypatch):
    monkeypatch.delenv("KV_TRACE_DIR", raising=False)
    for name in ("sample_decisions.jsonl", "sample_trace.jsonl.gz"):
        shutil.copy(DATA / name, tmp_path)
    return Page(tmp_path)


def test_the_page_opens_with_decisions_and_makes_the_others_when_asked(page):
    assert page.titles == ("Decisions", "Replay", "Tune", "Live")
    assert page.children[0] is page.explorer
    assert all("Loading" in tab.value for tab in page.children[1:])
    assert page.tab("Replay") is page.children[1] is page.tab("Replay")


def test_settings_go_along_from_tab_to_tab_valid_or_not(page):
    page.explorer.update(alpha=0.7)
    page.selected_index = 1
    replay = page.tab("Replay")
    assert replay.config.alpha == 0.7
    replay.controls["hot_threshold"].entry.value = 99.0  # above the cold one
    page.selected_index = 0
    assert set(page.explorer.errors) == {"hot_threshold", "cold_threshold"}
    page.explorer.undo()
    assert page.explorer.config == HeuristicConfig(alpha=0.7) and not page.explorer.errors


def test_a_tab_that_cannot_be_made_says_why_and_is_tried_again(page, monkeypatch, tmp_path):
    sample = tmp_path / "sample_trace.jsonl.gz"
    trace = sample.read_bytes()
    sample.write_bytes(b"no trace")
    page.selected_index = 1
    replay = page.tab("Replay")
    assert "\u26a0" in replay.readout.value and "sample_trace" in replay.readout.value
    replay.export_button.click()
    assert "nothing to export" in replay.status.value
    sample.write_bytes(trace)
    replay.update(alpha=0.3)
    assert "of tokens hit" in replay.readout.value
    monkeypatch.setattr(page, "_make", page._make | {"Tune": lambda: open(tmp_path / "<absent>")})
    assert "&lt;absent&gt;" in page.tab("Tune").value
    page._make["Tune"] = page._tune
    assert isinstance(page.tab("Tune"), TuneTab)


def test_files_of_the_trace_folder_can_be_chosen(page, tmp_path, monkeypatch):
    folder = tmp_path / "traces" / "mooncake"
    folder.mkdir(parents=True)
    line = '{"timestamp": 0, "input_length": 600, "output_length": 9, "hash_ids": [0, 1]}'
    (folder / "conversation_trace.jsonl").write_text(line)
    monkeypatch.setenv("KV_TRACE_DIR", str(tmp_path / "traces"))
    replay = page.tab("Replay")
    assert replay.trace.options == ("sample", "mooncake/conversation_trace.jsonl")
    replay.trace.value = replay.trace.options[1]
    assert replay.view.result.trace.requests == 1
    replay.file.value = str(tmp_path / "no such file")
    assert "\u26a0" in replay.readout.value and "no such file" in replay.readout.value


# --- replay -------------------------------------------------------------------------------


def test_a_capacity_limits_the_setting_and_its_peers(page):
    replay = page.tab("Replay")
    replay.share.value = 0.05
    assert replay.capacity.value == "0.05"
    capacities = {
        each.capacity_blocks for each in (replay.view.result, *replay.view.peers.values())
    }
    assert len(capacities) == 1
    found = replay.view.figures
    assert found["optimal"]["token_hit_ratio"] >= found["recency"]["token_hit_ratio"] > 0
    assert 0 < found["this"]["per_mtok"] <= found["no_cache"]["per_mtok"]
    replay.capacity.value = "0.01,0.1,unlimited"
    assert replay.view.result.capacity_blocks[2] == -1
    view = replay.view
    replay.capacity.value = "some"
    assert "CAPACITY must be" in replay.readout.value and replay.view is view


# --- tune ---------------------------------------------------------------------------------


def test_a_search_is_watched_stopped_goes_on_and_is_taken_over(tmp_path):
    taken = []
    tab = TuneTab({"loops": TRACE}, taken.append, tmp_path)
    tab.policy.value, tab.trials.value = "ttl", 24
    assert tab.over.disabled and tab.save.disabled and tab.stop.disabled

    async def stop_after_a_batch():
        running = asyncio.create_task(tab.run())
        while tab.bar.value == 0 and not running.done():
            await asyncio.sleep(0.01)
        tab.stop.click()
        await running

    asyncio.run(stop_after_a_batch())
    assert "goes on from here" in tab.status.value and tab.over.disabled
    assert 8 <= tab.bar.value < 24 and bytes(tab.image.value).startswith(b"\x89PNG")
    asyncio.run(tab.run())
    assert "24 trials" in tab.readout.value and tab.bar.value == 24
    tab.over.click()
    assert taken == [tab.tuning.config] == [load_settings(tmp_path / "heuristics.yaml")]
    tab.save.click()
    assert len(pd.read_csv(tmp_path / "exports" / "tune.csv")) == 24
    tab.goal.value, tab.against.value = "hits", "hits"
    asyncio.run(tab.run())
    assert "AGAINST must be another measure" in tab.status.value and tab.over.disabled


# --- live ---------------------------------------------------------------------------------


def test_a_manager_outside_is_read_by_its_metrics(tmp_path):
    metrics = DecisionMetrics()
    record = {"prompt_tokens": 400, "wanted_tier": "disk", "ttl_s": 60.0}
    metrics.observe(DecisionRecord(0.0, "a", hit_tokens={"gpu": 100, "remote": 50}, **record))
    server = metrics.serve(0)
    try:
        tab = LiveTab(f"http://127.0.0.1:{server.port}/metrics", tmp_path)
        asyncio.run(tab.refresh())
        assert "a manager outside" in tab.said.value
        assert "25.0%" in tab.panels["hits"].value and "12.5%" in tab.panels["hits"].value
        assert "Nothing yet" in tab.panels["regret"].value
        for policy, hit in (("lru", 100), ("optimum", 160)):
            metrics.add("shadow_prompt_tokens_total", 400, policy)
            metrics.add("shadow_hit_tokens_total", hit, policy)
        asyncio.run(tab.refresh())
        assert tab.seen.regret() == {OWN: 0.25, "lru": 0.25, "optimum": 0.4}
        assert "40.0% (+15.0)" in tab.panels["regret"].value
        csv, facts = tab.export()
        assert csv.exists()
        assert json.loads(facts.read_text())["samples"]["kvttl_prompt_tokens_total"] == {"": 400}
    finally:
        server.close()
    asyncio.run(tab.refresh())
    assert "is away" in tab.said.value and "What is shown is of" in tab.said.value
    assert "40.0%" in tab.panels["regret"].value


def test_what_is_no_server_of_ours_is_said(tmp_path):
    empty, thread = start_http_server(0, addr="127.0.0.1", registry=CollectorRegistry())
    tab = LiveTab(f"127.0.0.1:{empty.server_port}", tmp_path)
    with pytest.raises(LMCacheError, match="serves no metrics of this kit"):
        LiveSource(tab.url.value).read()
    asyncio.run(tab.refresh())
    assert "serves no metrics of this kit" in tab.said.value
    empty.shutdown()
    thread.join()
    empty.server_close()
    tab.url.value = f"127.0.0.1:{free_port()}"
    asyncio.run(tab.refresh())
    assert "Connection refused" in tab.said.value
    with pytest.raises(ValueError, match="no server has answered yet"):
        tab.export()


def test_live_reads_while_it_is_looked_at_and_then_no_more(page):
    async def look():
        page.selected_index = 3
        live = page.tab("Live")
        live.url.value = f"127.0.0.1:{free_port()}"
        while "is away" not in live.said.value:
            await asyncio.sleep(0.01)
        assert live._task is not None
        page.selected_index = 0
        assert live._task is None

    asyncio.run(look())


def test_prices_are_the_newest_of_each_tier():
    old, new = ({"decided": [{"tier": "gpu", "price": p}]} for p in (1.0, 2.0))
    seen = Seen(0.0, {}, {}, (new, old, {"decided": [{"tier": "disk", "price": 0.5}]}))
    assert seen.prices() == {"gpu": 2.0, "disk": 0.5}
