"""`make run` as a whole, and the parts of it that need no engine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from local_managers import CHUNK, HOT, LADDER_S, WARM, hottest, local_manager

from caching_heuristics import TIERS, HeuristicConfig
from kvttl.decisions.log import DecisionRecord, read_records
from kvttl.manager.clock import SessionClock
from kvttl.plots.decision_plots import TIER_COLOURS, plot_session
from kvttl.session.run import session_requests, session_summary, session_table

ROOT = Path(__file__).parents[1]


def run_cli(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "kvttl.session.run", *map(str, arguments)],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT / "src")},
        capture_output=True,
        text=True,
        timeout=280,
    )


def test_the_whole_run_on_a_real_redis(tmp_path, redis_url):
    done = run_cli("--generations", 6, "--redis-url", redis_url, "--out", tmp_path / "run")
    assert done.returncode == 0, done.stderr[-2000:]
    assert list((tmp_path / "run").glob("decisions-*.jsonl"))
    records = list(read_records(tmp_path / "run"))
    generations = [record for record in records if record.kind == "generation"]
    assert len(generations) == 6 and not any(record.error for record in records)
    assert all(record.prompt is None for record in records)  # the text only on request
    assert {"prompt", "history"} <= set(generations[0].metadata_sources.values())
    assert (tmp_path / "run" / "timeline.png").read_bytes().startswith(b"\x89PNG")
    for words in ("6 generations", "hit tokens", "chunks moved", "TTLs that ended", "managing"):
        assert words in done.stdout
    assert "of-the-tests" not in done.stdout + done.stderr  # Redis' password
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--llm", "no/such-model"], "no/such-model"),
        (["--generations", 0], "count must be >= 1"),
        (["--config", "absent.yaml"], "absent.yaml"),
        (["--redis-url", "http://localhost:1"], "redis_url"),
    ],
)
def test_wrong_settings_are_one_clear_line(arguments, message):
    done = run_cli(*arguments)
    assert done.returncode == 1
    assert message in done.stderr and "Traceback" not in done.stderr


def test_sessions_are_seeded_and_shared():
    one, same, other = (session_requests(60, seed) for seed in (1, 1, 2))
    assert one == same != other
    prompts = [request.prompt for request in one]
    assert len(set(prompts)) < len(prompts)  # some come back
    systems = {prompt.split('"""\n')[0] for prompt in prompts}
    assert len(systems) == 3  # three agents share theirs
    assert len({request.kind for request in one}) == 4
    arrivals_s = [request.arrival_s for request in one]
    assert arrivals_s[0] == 0.0 and arrivals_s == sorted(arrivals_s)


def test_a_session_clock_goes_where_it_is_told_and_never_back():
    clock = SessionClock(start_s=100.0)
    seen = []
    for to_s in (0.0, 25.0, 10.0, 25.0, 30.0):
        clock.advance(to_s)
        seen.append(clock())
    assert seen == [100.0, 125.0, 125.0, 125.0, 130.0]


class Upper:
    """An engine without tokenizer or token counts."""

    def generate(self, prompt, sampling_params):
        return prompt.upper()


@pytest.fixture
def local_cache():
    with local_manager(llm=Upper(), config=HeuristicConfig()) as cache:
        yield cache


def test_sixteen_threads_lose_no_text_and_no_record(local_cache):
    def work(number):
        for turn in range(20):
            prompt = f"shared system prompt, thread {number % 4}, turn {turn}"
            metadata = {"perplexity": (12.0, 35.0, 80.0)[turn % 3]}
            assert local_cache.generate_and_manage(prompt, None, metadata) == prompt.upper()

    threads = [threading.Thread(target=work, args=(n,)) for n in range(16)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert len(local_cache.records) == 16 * 20
    assert not [record.error for record in local_cache.records if record.error]


def test_short_and_empty_prompts(local_cache):
    assert local_cache.generate_and_manage("short", None) == "SHORT"
    assert local_cache.generate_and_manage("", None) == ""
    assert [record.chunks for record in local_cache.records] == [0, 0]
    assert not any(record.error or record.moves for record in local_cache.records)


def run_locally(requests):
    """What `kvttl.session.run` yields, without vLLM; and the manager."""
    clock = SessionClock(1e9)
    cache = local_manager(clock=clock, background=True, perplexity_source="off")
    rows = []
    for request in requests:
        clock.advance(request.arrival_s)
        rows += [(None, record) for record in cache.sweep()]
        (managed,) = cache.generate(request.prompt, None)
        rows.append((request, managed.decision.result(120)))
    return rows, cache


def test_table_summary_and_picture_say_what_the_records_say():
    requests = session_requests(12)
    rows, cache = run_locally(requests)
    assert [record.prompt for request, record in rows if request] == [r.prompt for r in requests]
    failed = DecisionRecord(rows[-1][1].time_s, "f0", error="LMCache is away")
    rows.append((requests[0], failed))
    lines = session_table(rows).splitlines()[-len(rows) :]
    for (request, record), line in zip(rows, lines):
        if request is None:
            assert f"TTL in {record.from_tier} ended" in line
            assert all(f"{move['from']}→{move['to']}" in line for move in record.moves)
            continue
        assert request.agent in line and str(record.prompt_tokens) in line
        assert (record.wanted_tier or "?") in line
    assert "LMCache is away" in lines[-1]
    records = [record for _, record in rows]
    ended = len(rows) - 13
    assert ended > 0
    for words in ("13 generations", "1 not managed", f"TTLs that ended {ended}:"):
        assert words in session_summary(records)

    records = [record for request, record in rows if request]
    tiers = plot_session(records).axes[1]
    drawn = {tier: 0 for tier in (*TIERS, "none")}
    from matplotlib.colors import to_hex

    for bar in tiers.patches:
        name = next(n for n, c in TIER_COLOURS.items() if c.lower() == to_hex(bar.get_facecolor()))
        drawn[name] += bar.get_width()
    expected = {tier: sum(r.tier_after.get(tier, 0) for r in records) for tier in drawn}
    assert drawn == expected and sum(expected.values()) > 0


def test_records_are_json(local_cache):
    local_cache.generate_and_manage("a prompt of some length", None, {"perplexity": 80.0})
    values = json.loads(local_cache.records[-1].to_json())
    assert values["wanted_tier"] == "remote" and values["tier_after"] == {"remote": 2}


def test_a_list_of_prompts_is_refused_before_anything_is_generated(local_cache):
    for prompts in (["one", "two"], []):
        with pytest.raises(TypeError, match="one prompt"):
            local_cache.generate_and_manage(prompts, None)
    assert not local_cache.records


def test_a_longer_prompt_leaves_the_shared_chunks_where_they_are(local_cache):
    controller, here = local_cache.controller, local_cache.controller.instance_id
    tokens = controller.tokenize("0123456789abcdef")
    controller.store(tokens, [b"real", b"bytes"])
    controller.move([here, "gpu"], [here, "remote"], tokens)
    longer = controller.tokenize("0123456789abcdef, and more")
    controller.note_generated(longer)
    held = controller.layout(longer).of(here)
    assert held == (("remote",), ("remote",), ("gpu", "disk", "remote"))
    assert controller.load(longer)[:2] == [b"real", b"bytes"]


def test_ended_claims_are_forgotten():
    cache = local_manager()
    for number in range(50):
        cache.generate_and_manage(f"prompt number {number}", None, HOT)
        cache.clock.now_s += LADDER_S  # beyond gpu, disk and remote
    assert len(cache.claims) <= 2
    cache.sweep()
    assert len(cache.claims) == 0 and not any(cache.controller.layout_of().tiers)


class NoCopies:
    """Makes a controller one that, like LMCache, cannot write a missing copy to disk."""

    def __init__(self, controller):
        self._controller, self._move = controller, controller.move

    def __call__(self, source, target, *args, **options):
        held = self._controller.backends[target[1]]
        keys = options.get("keys") or self._controller.layout(options["tokens"]).keys
        if any(held.get(key) is None for key in keys):
            late = {"status": "timeout", "reason": f"no copy in {target[1]} seen"}
            ends = {"from": source[1], "to": target[1]}
            nothing = {"moved_chunks": 0, "moved_tokens": 0, "skipped": {}, "layout": None}
            return {**late, **ends, **nothing}
        return self._move(source, target, *args, **options)


def test_a_demotion_is_tried_again_until_its_copy_is_there(monkeypatch):
    """LMCache's store was slow: the copy appears after the move has given up."""
    cache = local_manager()
    controller, prompt = cache.controller, "the slow prompt!"
    store = controller.note_generated

    def slow_store(tokens):
        store(tokens)
        for key in controller.layout(tokens).keys:
            for tier in ("disk", "remote"):
                controller.backends[tier].delete(key)

    monkeypatch.setattr(controller, "move", NoCopies(controller))
    monkeypatch.setattr(controller, "note_generated", slow_store)
    cache.generate_and_manage(prompt, None, WARM)
    assert cache.records[-1].moves[0]["status"] == "timeout"
    for _ in range(5):  # nothing to fall back on: it stays queued
        cache.clock.now_s += 4
        assert cache.sweep() == []
        assert cache._decider.settler.unsettled == 1 and hottest(cache, prompt) == ["gpu", "gpu"]
    for key in controller.layout(controller.tokenize(prompt)).keys:
        controller.backends["disk"].set(key, b"late", 60)
    cache.clock.now_s += 60  # the longest pause between two tries
    (record,) = cache.sweep()
    assert (record.kind, record.wanted_tier, record.error) == ("settled", "disk", "")
    assert cache._decider.settler.unsettled == 0
    assert hottest(cache, prompt) == ["disk", "disk"]
    assert controller.load(controller.tokenize(prompt)) == [b"late"] * (len(prompt) // CHUNK)


def test_a_failing_second_move_keeps_the_first_in_the_record(monkeypatch):
    cache = local_manager()
    controller, move = cache.controller, cache.controller.move
    shared = "0" * CHUNK  # once in gpu, it has to go to disk; the new chunk comes from gpu too
    cache.generate_and_manage(shared + "1" * CHUNK, None, WARM)
    cold = {**HOT, "perplexity": 90.0}

    def fails_from_gpu(old, new, *args, **options):
        if old[1] == "gpu":
            raise ConnectionError("Redis is away")
        return move(old, new, *args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(controller, "move", fails_from_gpu)
        cache.clock.now_s += 200  # the first claim has gone to remote
        cache.generate_and_manage(shared + "2" * CHUNK, None, cold)
        record = cache.records[-1]
        assert record.error == "ConnectionError: Redis is away"
        assert [(move["from"], move["to"], move["status"]) for move in record.moves] == [
            ("disk", "remote", "done")
        ]
        cache.generate_and_manage("another prompt, warm", None, WARM)
        assert cache.records[-1].error == "ConnectionError: Redis is away"  # its own
        assert cache._decider.settler.unsettled == 2
        cache.generate_and_manage("short", None, WARM)
        assert not cache.records[-1].error  # a failing retry is not booked here
    cache.clock.now_s += 1
    kinds = sorted(record.kind for record in cache.sweep())
    assert kinds == ["expiry", "settled", "settled"] and cache._decider.settler.unsettled == 0
    assert hottest(cache, shared + "2" * CHUNK) == ["remote", "remote"]
