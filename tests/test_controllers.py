"""The contract of a controller, on LMCache itself and on the local backends alike."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import re
import time
from types import SimpleNamespace

import pytest

import kvttl
from cache_controller import (
    BaseController,
    LMCacheController,
    LMCacheError,
    LMCacheUnavailable,
    LocalLMCacheController,
)
from caching_heuristics import TIERS
from kvttl.lmcache.model import LMCacheModel, ServerModuleModel
from kvttl.server.controller import InsideController
from tiered_caching import InMemoryBackend, LocalDiskBackend, RemoteBackend

DEMOTIONS = [("gpu", "disk"), ("disk", "remote"), ("gpu", "remote")]
PROMOTIONS = [("disk", "gpu"), ("remote", "gpu")]


class OnLMCache:
    """Real coordinator, server and engine: KV comes into being by generating."""

    def __init__(self, stack, llm, sampling):
        self.controller = LMCacheController(stack.host, stack.port, instance_id=stack.instance_id)
        self.controller.attach_engine(llm)
        self._llm, self._sampling = llm, sampling

    def put(self, text):
        tokens = self.controller.tokenize(text)
        self._llm.generate(text, self._sampling, use_tqdm=False)
        return tokens


class OnBackends:
    """Memory, disk and fakeredis: KV is stored by the test."""

    def __init__(self, folder):
        backends = {
            "gpu": InMemoryBackend(),
            "disk": LocalDiskBackend(folder),
            "remote": RemoteBackend(),
        }
        self.controller = LocalLMCacheController(chunk_size_tokens=32, backends=backends)

    def put(self, text):
        tokens = self.controller.tokenize(text)
        self.controller.store(tokens)
        return tokens


class OnModel:
    """LMCache's rules without LMCache: KV comes into being by serving; a token is a byte."""

    def __init__(self):
        self.controller = LMCacheModel(hot_chunks=10_000)
        bytes_alone = SimpleNamespace(encode=lambda text: list(text.encode()))
        self.controller.attach_engine(SimpleNamespace(get_tokenizer=lambda: bytes_alone))

    def put(self, text):
        tokens = self.controller.tokenize(text)
        self.controller.serve(tokens)
        return tokens


SIDES = {
    "lmcache": (LMCacheController, ("stack", "llm", "greedy"), OnLMCache),
    "local": (LocalLMCacheController, ("tmp_path",), OnBackends),
    "model": (LMCacheModel, (), OnModel),
}


@pytest.fixture(params=SIDES)
def on(request):
    _, fixtures, side_of = SIDES[request.param]
    side = side_of(*(request.getfixturevalue(name) for name in fixtures))
    yield side
    side.controller.close()


def wait_for(controller, tokens, tiers, limit_s=5.0):
    """The directory is eventually consistent: wait until it shows exactly these tiers."""
    deadline_s = time.monotonic() + limit_s
    while time.monotonic() < deadline_s:
        found = controller.lookup(tokens)
        if found.get(controller.instance_id) == tiers:
            return found
        time.sleep(0.02)
    raise AssertionError(f"expected {tiers}, the directory shows {found}")


def move(controller, source, target, tokens, **options):
    here = controller.instance_id
    return controller.move([here, source], [here, target], tokens, **options)


def bring_to(controller, tokens, tier):
    """Put a prompt that is in all tiers into a state whose hottest tier is `tier`."""
    wait_for(controller, tokens, list(TIERS))
    if tier != "gpu":
        assert move(controller, "gpu", tier, tokens)["status"] == "done"


def subclasses(cls):
    """Return all classes that are derived from `cls`, in whatever module of this kit."""
    return {sub for direct in cls.__subclasses__() for sub in {direct, *subclasses(direct)}}


def test_every_controller_of_the_kit_is_under_this_contract():
    for module in pkgutil.walk_packages(kvttl.__path__, "kvttl."):
        importlib.import_module(module.name)
    found = {cls for cls in subclasses(BaseController) if not cls.__module__.startswith("test")}
    # Of a server with the module (tests/test_inside.py), and like it (tests/test_truth.py): there
    # nothing is in all tiers at first.
    found -= {InsideController, ServerModuleModel}
    assert {cls for cls in found if not inspect.isabstract(cls)} == {
        side[0] for side in SIDES.values()
    }


def test_requirements_signature():
    parameters = inspect.signature(LMCacheController).parameters
    defaults = {name: parameters[name].default for name in ("host", "port", "model")}
    assert defaults == {"host": "localhost", "port": 9000, "model": "gemma-3-270m-it"}
    assert list(parameters)[:3] == ["host", "port", "model"]
    for cls in (LMCacheController, LocalLMCacheController):
        assert list(inspect.signature(cls.move).parameters)[1:4] == [
            "old_position",
            "new_position",
            "tokens",
        ]


def test_stored_kv_is_in_all_tiers(on, fresh_text):
    tokens = on.put(fresh_text())
    wait_for(on.controller, tokens, ["gpu", "disk", "remote"])
    layout = on.controller.layout(tokens)
    chunks = len(tokens) // on.controller.chunk_size_tokens
    assert chunks >= 3 and len(layout.keys) == chunks
    assert layout.of(on.controller.instance_id) == (TIERS,) * chunks


def test_unknown_and_short_prompts_are_not_found(on, fresh_text):
    tokens = on.controller.tokenize(fresh_text())
    assert on.controller.lookup(tokens) == {"found": False}
    assert on.controller.lookup([]) == {"found": False}
    assert on.controller.lookup(tokens[: on.controller.chunk_size_tokens - 1]) == {"found": False}


@pytest.mark.parametrize(("source", "target"), DEMOTIONS)
def test_demotion(on, fresh_text, source, target):
    tokens = on.put(fresh_text())
    bring_to(on.controller, tokens, source)
    status = move(on.controller, source, target, tokens)
    chunks = len(tokens) // on.controller.chunk_size_tokens
    assert status["status"] == "done", status
    assert (status["from"], status["to"]) == (source, target)
    assert status["moved_chunks"] == chunks
    assert status["moved_tokens"] == chunks * on.controller.chunk_size_tokens
    assert status["latency_s"] > 0
    left = list(TIERS[TIERS.index(target) :])
    assert on.controller.lookup(tokens) == {"found": True, on.controller.instance_id: left}


@pytest.mark.parametrize(("source", "target"), PROMOTIONS)
def test_promotion_keeps_the_colder_copies(on, fresh_text, source, target):
    tokens = on.put(fresh_text())
    bring_to(on.controller, tokens, source)
    status = move(on.controller, source, target, tokens)
    assert status["status"] == "done", status
    assert status["moved_chunks"] == len(tokens) // on.controller.chunk_size_tokens
    left = ["gpu", *TIERS[TIERS.index(source) :]]
    assert on.controller.lookup(tokens)[on.controller.instance_id] == left


def test_demotion_and_promotion_of_some_chunks_only(on, fresh_text):
    tokens = on.put(fresh_text())
    bring_to(on.controller, tokens, "gpu")
    status = move(on.controller, "gpu", "disk", tokens, chunks=[1, 2])
    assert (status["status"], status["moved_chunks"]) == ("done", 2)
    held = on.controller.layout(tokens).of(on.controller.instance_id)
    assert [tiers[0] for tiers in held[:4]] == ["gpu", "disk", "disk", "gpu"]
    assert on.controller.lookup(tokens)[on.controller.instance_id] == ["disk", "remote"]
    status = move(on.controller, "disk", "gpu", tokens, chunks=[1])
    assert (status["status"], status["moved_chunks"]) == ("done", 1)


def test_moving_twice_is_a_noop(on, fresh_text):
    tokens = on.put(fresh_text())
    bring_to(on.controller, tokens, "disk")
    again = move(on.controller, "gpu", "disk", tokens)
    assert (again["status"], again["moved_tokens"]) == ("noop", 0)
    same = move(on.controller, "disk", "disk", tokens)
    assert same["status"] == "noop"


def test_moving_nothing_is_a_noop(on, fresh_text):
    tokens = on.controller.tokenize(fresh_text())
    status = move(on.controller, "disk", "remote", tokens)
    assert (status["status"], status["moved_tokens"]) == ("noop", 0)
    assert "disk" in status["reason"]


def test_between_instances_is_unsupported(on, fresh_text):
    tokens = on.put(fresh_text())
    status = on.controller.move([on.controller.instance_id, "gpu"], ["other", "disk"], tokens)
    assert status["status"] == "unsupported" and "instances" in status["reason"]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("gpu", ["i", "disk"], "old_position must be"),
        (["i", "vram"], ["i", "disk"], "gpu, disk, remote, got 'vram'"),
        (["i", "gpu"], ["i"], "new_position must be"),
        (["i", "gpu"], ["i", None], "new_position must be"),
    ],
)
def test_malformed_positions(on, old, new, message):
    with pytest.raises(ValueError, match=message):
        on.controller.move(old, new, [1, 2, 3])


@pytest.mark.parametrize("token", [-1, 1.5, "a", True, None])
def test_malformed_tokens(on, token):
    with pytest.raises(ValueError, match="tokens must be integers >= 0"):
        on.controller.lookup([1, token])


def test_shared_prefix_has_shared_keys(on, fresh_text):
    system = fresh_text(150)
    one = on.controller.tokenize(system + " first question " + fresh_text(60))
    two = on.controller.tokenize(system + " second question " + fresh_text(60))
    keys = [on.controller.layout(tokens).keys for tokens in (one, two)]
    shared = sum(a == b for a, b in zip(*keys))
    common_tokens = next(i for i, (a, b) in enumerate(zip(one, two)) if a != b)
    assert shared == common_tokens // on.controller.chunk_size_tokens >= 3
    assert keys[0][shared:] != keys[1][shared:]


def test_remote_to_disk(on, fresh_text):
    """The server cannot, and says so; the local controller can."""
    tokens = on.put(fresh_text())
    bring_to(on.controller, tokens, "remote")
    status = move(on.controller, "remote", "disk", tokens)
    if not isinstance(on, OnBackends):
        assert status["status"] == "unsupported" and "L2-to-L2" in status["reason"]
        assert on.controller.lookup(tokens)[on.controller.instance_id] == ["remote"]
    else:
        assert status["status"] == "done"
        assert on.controller.lookup(tokens)[on.controller.instance_id] == ["disk", "remote"]


def test_the_layout_by_keys_is_the_layout_by_tokens(on, fresh_text):
    first, second = (on.put(fresh_text()) for _ in range(2))
    for tokens in (first, second):
        wait_for(on.controller, tokens, list(TIERS))
    one, two = on.controller.layout(first), on.controller.layout(second)
    here = on.controller.instance_id
    both = on.controller.layout_of(one.keys + two.keys[:1])
    assert both.keys == one.keys + two.keys[:1]
    assert both.of(here) == one.of(here) + two.of(here)[:1]
    assert on.controller.layout_of([]).keys == ()
    everything = dict(zip((whole := on.controller.layout_of()).keys, whole.of(here)))
    assert set(one.keys + two.keys) <= set(everything)
    assert all(everything[key] == TIERS for key in one.keys)


@pytest.mark.parametrize(("source", "target"), DEMOTIONS)
def test_demotion_by_keys_moves_these_chunks_only(on, fresh_text, source, target):
    tokens = on.put(fresh_text())
    bring_to(on.controller, tokens, source)
    keys = on.controller.layout(tokens).keys
    status = move(on.controller, source, target, None, keys=keys[1:])
    assert (status["status"], status["moved_chunks"]) == ("done", len(keys) - 1)
    held = on.controller.layout(tokens).of(on.controller.instance_id)
    assert [tiers[0] for tiers in held] == [source] + [target] * (len(keys) - 1)


def test_discarded_chunks_are_in_no_tier(on, fresh_text):
    tokens = on.put(fresh_text())
    wait_for(on.controller, tokens, list(TIERS))
    keys = on.controller.layout(tokens).keys
    deadline_s = time.monotonic() + 10
    while on.controller.discard(keys[1:]):  # still being written somewhere
        assert time.monotonic() < deadline_s
    held = on.controller.layout_of(keys).of(on.controller.instance_id)
    assert held == (TIERS, *[()] * (len(keys) - 1))
    assert on.controller.discard(keys[1:]) == 0  # nothing left: fine


def test_a_layout_in_hand_saves_the_look_up_and_the_last_one_comes_back(
    on, fresh_text, monkeypatch
):
    tokens = on.put(fresh_text())
    bring_to(on.controller, tokens, "gpu")
    here, layout = on.controller.instance_id, on.controller.layout(tokens)
    monkeypatch.setattr(on.controller, "layout", None)  # a second look-up would fail
    status = move(on.controller, "gpu", "disk", tokens, chunks=[0, 2], layout=layout)
    assert (status["status"], status["moved_chunks"]) == ("done", 2)
    assert status["layout"].keys == (layout.keys[0], layout.keys[2])
    assert status["layout"].of(here) == (("disk", "remote"),) * 2
    status = move(on.controller, "gpu", "remote", None, keys=layout.keys[1:2], layout=layout)
    assert (status["moved_chunks"], status["layout"].keys) == (1, layout.keys[1:2])
    fresh = on.controller.layout_of(layout.keys)
    assert [tiers[0] for tiers in fresh.of(here)[:4]] == ["disk", "remote", "disk", "gpu"]
    status = move(on.controller, "disk", "gpu", tokens, layout=fresh, chunks=[2])
    assert (status["moved_chunks"], status["layout"].of(here)) == (1, (TIERS,))
    again = move(on.controller, "gpu", "gpu", tokens)
    assert (again["status"], again["layout"]) == ("noop", None)


def test_keys_and_tokens_together_are_refused(on):
    with pytest.raises(ValueError, match="keys, or tokens"):
        move(on.controller, "gpu", "disk", [1, 2], keys=["ab"])


def test_a_new_controller_finds_chunks_by_their_keys_alone(stack, llm, greedy, fresh_text):
    side = OnLMCache(stack, llm, greedy)
    tokens = side.put(fresh_text())
    wait_for(side.controller, tokens, list(TIERS))
    keys = side.controller.layout(tokens).keys
    later = LMCacheController(stack.host, stack.port, model=side.controller.model)
    assert later.layout_of(keys).of(later.instance_id) == (TIERS,) * len(keys)
    stranger = LMCacheController(stack.host, stack.port, model="another model")
    assert (
        stranger.layout_of(keys).of(stranger.instance_id) == () and stranger.layout_of().keys == ()
    )
    for controller in (side.controller, later, stranger):
        controller.close()


def test_everything_at_a_position(on, fresh_text):
    prompts = [on.put(fresh_text()) for _ in range(2)]
    for tokens in prompts:
        bring_to(on.controller, tokens, "gpu")
    status = move(on.controller, "gpu", "disk", None)
    # On the shared stack other tests left chunks that have no disk copy to fall back on.
    assert status["status"] in ("done", "partial"), status
    assert status["moved_chunks"] >= sum(
        len(tokens) // on.controller.chunk_size_tokens for tokens in prompts
    )
    for tokens in prompts:
        assert on.controller.lookup(tokens)[on.controller.instance_id] == ["disk", "remote"]


def test_everything_of_a_tier_is_this_models_and_this_tenants_only(stack, llm, greedy, fresh_text):
    """Equal tokens have equal hashes whatever the tenant: none may move or delete another's."""
    side, text = OnLMCache(stack, llm, greedy), fresh_text()
    mine, tokens = side.controller, side.put(text)
    llm.generate({"prompt": text, "cache_salt": "another"}, greedy, use_tqdm=False)
    options = {"model": mine.model, "instance_id": stack.instance_id}
    tenant = LMCacheController(stack.host, stack.port, cache_salt="another", **options)
    stranger = LMCacheController(stack.host, stack.port, **{**options, "model": "another model"})
    for controller in (mine, tenant):
        wait_for(controller, tokens, list(TIERS))
    keys = mine.layout(tokens).keys
    assert tenant.layout(tokens).keys == tenant.layout_of().keys == keys
    assert move(stranger, "gpu", "disk", None)["status"] == "noop"
    assert move(tenant, "gpu", "remote", None)["moved_chunks"] == len(keys)
    assert tenant.lookup(tokens)[tenant.instance_id] == ["remote"]
    while tenant.discard(keys):
        time.sleep(0.05)
    assert tenant.lookup(tokens) == {"found": False}
    assert mine.lookup(tokens)[mine.instance_id] == list(TIERS)
    for controller in (mine, tenant, stranger):
        controller.close()


# ---- LMCache only: the engine must agree with the directory ----------------------


def chunks_read_from(redis_url, act):
    """Return what `act` returns, and whether chunks were read from Redis meanwhile."""
    import redis

    client = redis.Redis.from_url(redis_url)
    with client.monitor() as monitor:
        done = act()
        client.get("the last one")
        lines = iter(lambda: monitor.next_command()["command"], "GET the last one")
        commands = list(lines)
    return done, any(re.match(r"M?GET .*@", line) and "probe" not in line for line in commands)


@pytest.mark.parametrize(
    ("path", "served_from"),
    [
        (["gpu"], "gpu"),
        (["gpu", "disk"], "disk"),
        (["gpu", "disk", "remote"], "remote"),
        (["gpu", "remote"], "remote"),
        (["gpu", "disk", "gpu"], "gpu"),
        (["gpu", "remote", "gpu"], "gpu"),
    ],
)
def test_generation_agrees_with_the_directory(
    stack, llm, greedy, fresh_text, redis_url, path, served_from
):
    side = OnLMCache(stack, llm, greedy)
    controller, text = side.controller, fresh_text()
    tokens = controller.tokenize(text)
    without_cache = llm.generate(text, greedy, use_tqdm=False)[0]
    assert without_cache.num_cached_tokens == 0
    wait_for(controller, tokens, list(TIERS))
    for source, target in zip(path, path[1:]):
        assert move(controller, source, target, tokens)["status"] == "done"

    held = controller.lookup(tokens)[controller.instance_id]
    assert held[0] == served_from
    (output,), from_redis = chunks_read_from(
        redis_url, lambda: llm.generate(text, greedy, use_tqdm=False)
    )
    size = controller.chunk_size_tokens
    assert output.num_cached_tokens == min(len(tokens) // size * size, len(tokens) - 1)
    assert output.outputs[0].token_ids == without_cache.outputs[0].token_ids
    assert from_redis == (served_from == "remote")
    assert controller.lookup(tokens)[controller.instance_id] == held  # reading moves nothing
    controller.close()


def test_last_copy_is_never_deleted(stack, llm, greedy, fresh_text):
    """gpu + remote, wanted on disk: no copy there, so nothing is deleted."""
    side = OnLMCache(stack, llm, greedy)
    tokens = side.put(fresh_text())
    bring_to(side.controller, tokens, "remote")
    assert move(side.controller, "remote", "gpu", tokens)["status"] == "done"
    status = move(side.controller, "gpu", "disk", tokens, timeout_s=0.2)
    assert status["status"] == "timeout" and "no copy in disk" in status["reason"]
    assert side.controller.lookup(tokens)[side.controller.instance_id] == ["gpu", "remote"]
    side.controller.close()


def test_promotion_needs_the_prompt(stack, llm, greedy):
    controller = OnLMCache(stack, llm, greedy).controller
    status = move(controller, "disk", "gpu", None)
    assert status["status"] == "unsupported" and "pass the prompt's tokens" in status["reason"]
    controller.close()


def test_tokenize_without_engine_says_what_to_do(stack):
    controller = LMCacheController(stack.host, stack.port)
    with pytest.raises(LMCacheError, match="set_llm"):
        controller.tokenize("text")
    controller.close()


def test_coordinator_away_is_one_clear_error(redis_url):
    import redis_fixtures

    controller = LMCacheController("127.0.0.1", redis_fixtures.free_port())
    with pytest.raises(LMCacheUnavailable, match="Connection refused"):
        controller.lookup([1, 2, 3])
    with pytest.raises(LMCacheError, match="Connection refused"):  # the breaker is open
        controller.lookup([1, 2, 3])
    controller.close()


def test_unknown_instance_is_named(stack):
    controller = LMCacheController(stack.host, stack.port, instance_id="nobody")
    with pytest.raises(LMCacheUnavailable, match="'nobody'.*lmcache_default_instance"):
        controller.check_health()
    controller.close()
