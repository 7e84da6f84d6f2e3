"""A manager outside on an LMCache server that decides by itself: it hands its decisions over."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import urllib.error
import urllib.request
from types import SimpleNamespace

import pytest
from conftest import new_stack
from inside_server import CHUNK, MODEL, Client, prompt
from waiting import wait_until

from cache_controller import LMCacheController
from caching_heuristics import HeuristicConfig
from kvttl.lmcache.client import LMCacheError, LMCacheUnavailable
from kvttl.lmcache.lease import AlreadyManaged
from kvttl.session import launch
from kvttl.session.demo_model import model_path
from kvttl.stack import services
from tiered_caching import MultiTierCache

HOT, COLD = {"perplexity": 5.0, "time_variance": 0.0}, {"perplexity": 90.0, "time_variance": 0.9}
CONFIG = HeuristicConfig(base_ttl=2, min_ttl=0.1, disk_ttl_factor=1, remote_ttl_factor=2)
HANDOVER_S = 5.0
PLAIN = SimpleNamespace(extra_args=None, logprobs=None, n=1)


@pytest.fixture(scope="module")
def stack(tmp_path_factory, redis_url):
    """A server that decides, and waits some seconds only for a manager outside."""

    usual = services.arguments_of

    def arguments_of(name, config):
        arguments = usual(name, config)
        if name == "server":
            at = arguments.index("--server-module") + 1
            module = json.loads(arguments[at])
            module["config"]["handover_s"] = HANDOVER_S
            arguments[at] = json.dumps(module)
        return arguments

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(services, "arguments_of", arguments_of)
        with new_stack(tmp_path_factory.mktemp("inside"), redis_url, inside=True) as running:
            yield running


class Engine:
    """Stores and loads KV cache as vLLM's worker does, and says so."""

    def __init__(self, stack):
        self.client = Client(f"tcp://{stack.host}:{stack.config.server_port}")
        self.asked = []

    def generate(self, tokens, sampling_params):
        self.asked.append(sampling_params)
        given = (sampling_params.extra_args or {}).get("kv_transfer_params", {})
        hints = {name.removeprefix("lmcache.kvttl."): value for name, value in given.items()}
        hits = self.client.serve(tokens, **hints)
        text = SimpleNamespace(text=str(hits), token_ids=[1], finish_reason="stop", logprobs=None)
        facts = {"prompt_token_ids": tokens, "num_cached_tokens": hits * CHUNK}
        return [SimpleNamespace(**facts, outputs=[text])]


@pytest.fixture(scope="module")
def engine(stack):
    engine = Engine(stack)
    yield engine
    engine.client.close()


def controller_of(stack):
    return LMCacheController(stack.host, stack.port, MODEL, instance_id=stack.instance_id)


@pytest.fixture
def managers(stack, engine):
    """A function that makes managers of the engine; the last one leads."""
    made = []

    def make(config=CONFIG, **options):
        quiet = {"sweep_every_s": None, "notify": None, "config": config}
        made.append(MultiTierCache(controller_of(stack), engine, **{**quiet, **options}))
        return made[-1]

    yield make
    for cache in made:
        cache.close()


def tiers_of(cache, tokens):
    layout = cache.controller.layout(tokens)
    return [tiers[0] if tiers else None for tiers in layout.of(cache.controller.instance_id)]


def ask(stack, path, body=None):
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(stack.config.server_http_url + path, data)
    try:
        with urllib.request.urlopen(request) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def test_a_prompt_goes_down_the_ladder_as_the_clock_outside_says(managers, engine):
    now, tokens = [1000.0], prompt(1, 5)
    cache = managers(clock=lambda: now[0])
    cache.generate_and_manage(tokens, PLAIN, HOT)
    (record,) = cache.records
    assert (record.error, record.time_s, record.wanted_tier, record.chunks) == (
        "",
        1000.0,
        "gpu",
        5,
    )
    assert record.metadata_sources["perplexity"] == "caller"
    assert record.metadata_sources["access_count"] == "history"
    assert PLAIN.extra_args is None and engine.asked[-1].extra_args is not None
    assert len(cache.claims) == 1 and 1001.0 < cache.claims.next_due_s < 1003.0
    assert cache.claims.wanted(record.chunk_keys, now[0]) == ["gpu"] * 5
    assert set(tiers_of(cache, tokens)) == {"gpu"}
    for tier in ("disk", "remote", None):
        now[0] = cache.claims.next_due_s
        (swept,) = cache.sweep()
        assert (swept.wanted_tier, swept.error, swept.kind) == (tier, "", "expiry")
        assert set(tiers_of(cache, tokens)) == {tier}
    assert len(cache.claims) == 0 and engine.client.look_up(tokens) == 0
    assert [record.kind for record in cache.records] == ["generation"] + 3 * ["expiry"]


def test_the_controller_moves_in_every_direction(managers, engine, stack):
    tokens = prompt(2, 5)
    cache = managers()
    cache.generate_and_manage(tokens, PLAIN, COLD)
    assert cache.records[-1].tier_after == {"remote": 5}
    controller = controller_of(stack)
    here, tiers = controller.instance_id, ["remote", "disk", "gpu", "disk", "remote", "gpu"]
    for source, target in zip(tiers, tiers[1:]):
        moved = controller.move([here, source], [here, target], tokens)
        assert (moved["status"], moved["moved_chunks"]) == ("done", 5), (source, target, moved)
        found = controller.lookup(tokens)
        assert found["found"] and found[here][0] == target
    assert engine.client.look_up(tokens) == 5
    keys = controller.layout(tokens).keys
    moved = controller.move([here, "gpu"], [here, "disk"], keys=keys[:2])
    held = controller.layout_of(keys).of(here)
    assert moved["moved_chunks"] == 2 and [tiers[0] for tiers in held] == ["disk"] * 2 + ["gpu"] * 3
    assert set(keys) <= set(controller.layout_of().keys)
    room, *unknown = controller.room_chunks()
    assert room > 100 and unknown == [None, None] and controller.tier_errors() == {}
    assert controller.discard(keys) == 0
    assert controller.lookup(tokens) == {"found": False} and engine.client.look_up(tokens) == 0


def test_nothing_is_found_of_a_model_that_no_engine_has_come_with(stack):
    controller = LMCacheController(stack.host, stack.port, "m", instance_id=stack.instance_id)
    tokens = prompt(9, 5)
    assert controller.lookup(tokens) == {"found": False}
    assert len(controller.layout(tokens).keys) == 5 and controller.layout_of().keys == ()
    assert controller.room_chunks() == (None, None, None) and controller.tier_errors() == {}
    with pytest.raises(LMCacheError, match="no engine of 'm' has come to this server yet"):
        controller.discard(["00"])


def test_tenants_are_told_apart(managers, stack):
    tokens, cache = prompt(3, 3), managers()
    cache.manage({"prompt_token_ids": tokens, "cache_salt": "tenant-a"}, answer_of(tokens))
    record = cache.records[-1]
    assert record.cache_salt == "tenant-a" and record.error == ""
    assert all(key.endswith("@tenant-a") for key in record.chunk_keys)
    its = LMCacheController(
        stack.host, stack.port, MODEL, instance_id=stack.instance_id, cache_salt="tenant-a"
    )
    assert its.layout(tokens).keys == record.chunk_keys


def answer_of(tokens):
    first = SimpleNamespace(text="", token_ids=[1], finish_reason="length", logprobs=None)
    return SimpleNamespace(prompt_token_ids=tokens, num_cached_tokens=0, outputs=[first])


def made(cache):
    return [record for record in cache.records if record.kind == "generation"]


def test_what_nobody_hands_over_the_server_decides_alone(managers, engine, stack):
    cache, tokens = managers(), prompt(4, 4)
    hinted = cache.measurable(PLAIN)
    engine.generate(tokens, hinted)  # its manager dies now
    wait_until(lambda: cache.sweep() is None or made(cache))
    (record,) = made(cache)
    assert (record.chunks, record.error) == (4, "")
    assert record.ttl_s > 1000  # by the server's settings
    engine.generate(prompt(5, 4), hinted)
    cache.manage(prompt(5, 4), answer_of(prompt(5, 4)), HOT)
    engine.generate(prompt(4, 4), hinted)  # the last one that waits
    wait_until(lambda: cache.sweep() is None or len(made(cache)) == 3)
    assert [record.ttl_s < 10 for record in made(cache)] == [False, True, False]


OTHER = """
import sys
from cache_controller import LMCacheController
from kvttl.lmcache.lease import AlreadyManaged
from tiered_caching import MultiTierCache
host, port, instance = sys.argv[1:]
try:
    MultiTierCache(LMCacheController(host, int(port), instance_id=instance), sweep_every_s=None)
    print("leads")
except AlreadyManaged as error:
    print(error)
"""


def other_process(stack):
    where = [stack.host, str(stack.port), stack.instance_id]
    return subprocess.run([sys.executable, "-c", OTHER, *where], capture_output=True, text=True)


def test_one_manager_leads(managers, stack):
    first = managers()
    refused = other_process(stack)
    assert "has a manager already, process" in refused.stdout, refused.stderr
    second = managers()  # of this process: it takes over
    with pytest.raises(AlreadyManaged, match="later manager of this process"):
        first.sweep()
    first.manage(prompt(6, 2), answer_of(prompt(6, 2)))
    assert "later manager of this process" in first.records[-1].error
    second.close()
    assert other_process(stack).stdout == "leads\n"

    def is_forgotten():  # it ended without a word
        with contextlib.suppress(AlreadyManaged):
            return managers()

    wait_until(is_forgotten)


def test_a_manager_that_decides_by_itself_is_refused(managers, stack, monkeypatch):
    controller = controller_of(stack)
    controller._http._has_module[stack.instance_id] = False  # as on the day before
    with pytest.raises(AlreadyManaged, match="has a manager already"):
        MultiTierCache(controller)
    monkeypatch.setattr(LMCacheController, "lease", lambda self: None)  # on another machine
    cache = MultiTierCache(controller, sweep_every_s=None, notify=None)
    controller._http._has_module.clear()
    cache.manage(prompt(7, 2), answer_of(prompt(7, 2)))
    assert "decides by itself now (kvttl.server): make a new manager" in cache.records[-1].error


def test_another_policy_than_the_servers_is_refused(managers):
    with pytest.raises(ValueError, match="policy must be 'formula', which .* got 'recency'"):
        managers(policy="recency")
    managers()


@pytest.mark.parametrize(
    "call, body, sentence",
    [
        ("layout", {"world_size": 1}, "missing required field `model`"),
        ("layout", {"model": "nobody's", "keys": ["00"]}, "no engine of"),
        ("manage", {"model": MODEL, "tokens": [1]}, "missing required field `who`"),
        ("move", {"model": MODEL, "keys": [], "source": "gpu", "target": "tape"}, "tape"),
        ("discard", {"model": MODEL, "keys": ["no hash"]}, "hexadecimal"),
        ("claims", [], "must be a JSON object"),
    ],
)
def test_what_is_wrong_is_refused_with_a_sentence(stack, engine, call, body, sentence):
    status, answer = ask(stack, f"/kvttl/{call}", body)
    assert status == 400 and sentence in answer


def test_a_real_engine_is_managed_with_the_same_texts(stack, greedy, fresh_text):
    texts, before = [fresh_text(), fresh_text()], alone(stack)
    others = ask(stack, "/kvttl/status")[1]["open_requests"]  # look-ups that nobody ends
    with launch.engine(stack, model_path()) as llm:
        with launch.managed(stack, llm, HeuristicConfig(), sweep_every_s=None) as cache:
            first = cache.generate_and_manage_batch(texts, greedy, [HOT, COLD])
            assert [record.error for record in cache.records] == ["", ""]
            assert [record.wanted_tier for record in cache.records] == ["gpu", "remote"]
            cold = cache.controller.tokenize(texts[1])
            wait_until(lambda: cache.sweep() is None or set(tiers_of(cache, cold)) == {"remote"})
            assert cache.generate_and_manage_batch(texts, greedy, [HOT, COLD]) == first
            again = made(cache)[2:]
            assert sum(again[1].hit_tokens.values()) >= len(cold) // CHUNK * CHUNK - 1
            assert greedy.extra_args is None
            wait_until(lambda: ask(stack, "/kvttl/status")[1]["open_requests"] <= others)
    assert alone(stack) == before


def alone(stack):
    """How many requests the server has decided about by itself."""
    records = ask(stack, "/kvttl/decisions?limit=1000")[1]["records"]
    generations = [record for record in records if record["kind"] == "generation"]
    return sum(record["hints"].get("manager") != "handed over" for record in generations)


def test_a_server_that_is_away_costs_no_text_and_is_found_again(managers, engine, stack):
    cache = managers()
    stack.kill("server")
    cache.manage(prompt(8, 3), answer_of(prompt(8, 3)), HOT)
    assert "LMCacheUnavailable" in cache.records[-1].error and cache.sweep() == []
    with pytest.raises(LMCacheUnavailable):
        len(cache.claims)
    stack.start_one("server")
    engine.client = Client(f"tcp://{stack.host}:{stack.config.server_port}")
    wait_until(
        lambda: cache.generate_and_manage(prompt(8, 3), PLAIN, HOT) and not cache.records[-1].error
    )
    assert len(cache.claims) >= 1  # and what the journal has brought back
