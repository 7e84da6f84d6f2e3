"""`make run` as a whole, and the parts of it that need no engine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from caching_heuristics import TIERS
from decision_log import DecisionRecord, read_records
from decision_plots import TIER_COLOURS, plot_session
from local_controller import LocalLMCacheController
from run_session import session_requests, summary, table
from storage_backends import InMemoryBackend
from tiered_caching import MultiTierCache

ROOT = Path(__file__).parents[1]


def run_cli(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "run_session", *map(str, arguments)],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT / "src")},
        capture_output=True,
        text=True,
        timeout=280,
    )


def test_the_whole_run_on_a_real_redis(tmp_path, redis_url):
    done = run_cli("--generations", 6, "--redis-url", redis_url, "--out", tmp_path / "run")
    assert done.returncode == 0, done.stderr[-2000:]
    records = list(read_records(tmp_path / "run" / "decisions.jsonl"))
    assert len(records) == 6 and not any(record.error for record in records)
    assert (tmp_path / "run" / "timeline.png").read_bytes().startswith(b"\x89PNG")
    for words in ("6 generations", "hit tokens", "chunks moved", "TTL", "managing took"):
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
    assert len({request.kind for request in one}) == 5


class Upper:
    """An engine without tokenizer or token counts."""

    def generate(self, prompt, sampling_params):
        return prompt.upper()


@pytest.fixture
def local_cache():
    backends = {tier: InMemoryBackend() for tier in TIERS}
    controller = LocalLMCacheController(chunk_size_tokens=8, backends=backends)
    return MultiTierCache(controller, Upper(), notify=None)


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


def test_table_summary_and_picture_say_what_the_records_say(local_cache):
    requests = session_requests(5)
    for request in requests:
        local_cache.generate_and_manage(request.prompt, None, request.metadata)
    failed = DecisionRecord(0.0, "x", metadata=requests[0].metadata, error="LMCache is away")
    requests, records = [*requests, requests[0]], [*local_cache.records, failed]
    rows = table(requests, records).splitlines()[-6:]
    for request, record, row in zip(requests, records, rows):
        assert request.agent in row and str(record.prompt_tokens) in row
        assert (record.wanted_tier or "?") in row
    assert "LMCache is away" in rows[-1]
    assert "6 generations" in summary(records) and "1 not managed" in summary(records)

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


def test_ended_claims_are_forgotten(local_cache):
    now = [0.0]
    local_cache._clock = lambda: now[0]
    for number in range(50):
        local_cache.generate_and_manage(f"prompt number {number}", None)
        now[0] += 4000.0  # beyond the TTL of an hour
    assert len(local_cache.claims) <= 2


def test_a_demotion_is_tried_again_until_its_copy_is_there(local_cache, monkeypatch):
    """LMCache's store was slow: the copy appears after the move has given up."""
    controller, here = local_cache.controller, local_cache.controller.instance_id
    move = type(controller).move
    late = {"status": "timeout", "reason": "no copy in disk seen", "moved_chunks": 0}
    with monkeypatch.context() as patch:
        answer = {**late, "from": "gpu", "to": "disk", "moved_tokens": 0, "skipped": {}}
        patch.setattr(controller, "move", lambda *_args, **_options: answer)
        local_cache.generate_and_manage("the slow prompt", None, {"perplexity": 35.0})
        tokens = controller.tokenize("the slow prompt")
        for backend in (controller.backends["disk"], controller.backends["remote"]):
            for key in controller.layout(tokens).keys:
                backend.delete(key)
        for number in range(3):  # nothing to fall back on: it stays queued
            local_cache.generate_and_manage(f"other {number}", None)
        assert list(local_cache._deferred)
    assert move is type(controller).move
    value = b"late"
    for key in controller.layout(tokens).keys:
        controller.backends["disk"].set(key, value, 60)
    local_cache.generate_and_manage("yet another", None)
    assert not local_cache._deferred
    assert controller.lookup(tokens)[here] == ["disk"]


def test_a_failing_second_move_keeps_the_first_in_the_record(local_cache, monkeypatch):
    controller = local_cache.controller
    local_cache.generate_and_manage("01234567 the hot prompt", None, {"perplexity": 12.0})
    move = controller.move

    def fails_to_disk(old, new, *args, **options):
        if new[1] == "remote":
            raise ConnectionError("Redis is away")
        return move(old, new, *args, **options)

    monkeypatch.setattr(controller, "move", fails_to_disk)
    local_cache.generate_and_manage("76543210 a cold prompt", None, {"perplexity": 80.0})
    record = local_cache.records[-1]
    assert record.error == "ConnectionError: Redis is away" and record.moves == ()
    assert list(local_cache._deferred) == [record.prompt_digest]
    local_cache.generate_and_manage("another prompt, warm", None, {"perplexity": 35.0})
    assert not local_cache.records[-1].error  # the failing retry is not booked here
    assert record.prompt_digest in local_cache._deferred
