"""Two real LMCache servers under one coordinator: each manager minds its own."""

from __future__ import annotations

import time

import pytest
from redis_fixtures import redis_server
from waiting import wait_for_checkpoint, wait_until

from cache_controller import LMCacheController, LMCacheUnavailable
from caching_heuristics import TIERS, HeuristicConfig
from kvttl.stack.lifecycle import LMCacheStack, StackError, load_config
from tiered_caching import MultiTierCache

HOT = {"perplexity": 12.0, "time_variance": 0.0}
WARM = {"perplexity": 35.0, "time_variance": 0.1}
COLD = {"perplexity": 80.0, "time_variance": 0.0}
OTHER = "host-b"


@pytest.fixture(scope="module")
def other(stack, tmp_path_factory):
    """A second server, with a folder and a Redis of its own, under the first one's coordinator."""
    with redis_server("of-host-b") as url:
        with LMCacheStack(settings(tmp_path_factory, url), coordinator_of=stack) as running:
            yield running


def settings(tmp_path_factory, redis_url, **overrides):
    folder = tmp_path_factory.mktemp("host-b")
    values = {"disk_path": str(folder / "disk"), "run_dir": str(folder / "run")}
    return load_config(
        inside=False,
        **{"instance_id": OTHER, "redis_url": redis_url, "l1_size_gb": 0.1, **values, **overrides},
    )


@pytest.fixture(scope="module")
def other_llm(other):
    from vllm import LLM

    from kvttl.session.demo_model import model_path

    engine = LLM(**other.engine_kwargs(model_path()))
    yield engine
    engine.llm_engine.engine_core.shutdown()  # before its server stops, or it hangs at exit


def manager_of(stack, engine, cache_salt="", **options):
    controller = LMCacheController(
        stack.host, stack.port, instance_id=stack.instance_id, cache_salt=cache_salt
    )
    return MultiTierCache(
        controller, engine, **{"notify": None, "config": HeuristicConfig(), **options}
    )


@pytest.fixture
def both(stack, llm, other, other_llm):
    """The two servers' managers."""
    managers = manager_of(stack, llm), manager_of(other, other_llm)
    yield managers
    for manager in managers:
        manager.close()


def lookup(manager, text):
    return manager.controller.lookup(manager.controller.tokenize(text))


def wait_for(manager, text, **tiers):
    """Wait until the directory shows exactly these servers with these tiers."""
    names = {"first": "lmcache_default_instance", "other": OTHER}
    wanted = {"found": True} | {names[name]: held for name, held in tiers.items()}
    wait_until(lambda: lookup(manager, text) == wanted)


# ---- where prompts are -------------------------------------------------------------------


def test_a_prompt_of_both_servers_is_found_on_both_and_placed_on_each_as_decided(
    both, greedy, fresh_text
):
    first, other = both
    text = fresh_text()
    answers = {
        first.generate_and_manage(text, greedy, COLD),
        other.generate_and_manage(text, greedy, HOT),
    }
    assert len(answers) == 1
    wait_for(first, text, first=["remote"], other=list(TIERS))
    wait_for(other, text, first=["remote"], other=list(TIERS))  # one directory
    other.generate_and_manage(text, greedy, WARM)
    wait_for(first, text, first=["remote"], other=["disk", "remote"])
    first.generate_and_manage(text, greedy, HOT)
    wait_for(first, text, first=["gpu", "remote"], other=["disk", "remote"])
    assert set(first.records[-1].hit_tokens) == {"remote"}  # not the other server's disk


def test_a_prompt_of_one_server_is_found_there_only(both, greedy, fresh_text):
    first, other = both
    text = fresh_text()
    other.generate_and_manage(text, greedy, HOT)
    wait_for(first, text, other=list(TIERS))


def test_what_expires_on_one_server_stays_on_the_other(both, greedy, fresh_text):
    first, other = both
    text = fresh_text()
    first.generate_and_manage(text, greedy, COLD)
    other.generate_and_manage(text, greedy, COLD)
    wait_for(first, text, first=["remote"], other=["remote"])
    first.sweep(time.time() + 1e7)  # `remote` ends: dropped
    wait_for(first, text, other=["remote"])
    output = other._llm.generate(text, greedy, use_tqdm=False)[0]
    assert output.num_cached_tokens >= len(output.prompt_token_ids) // 32 * 32 - 1


def test_a_manager_leaves_a_prompt_alone_that_lives_elsewhere(both, llm, greedy, fresh_text):
    first, other = both
    text = fresh_text()
    other.generate_and_manage(text, greedy, HOT)
    wait_for(first, text, other=list(TIERS))
    first.set_llm(Elsewhere())
    first.generate_and_manage(text, greedy, COLD)
    record = first.records[-1]
    assert record.tier_before == record.tier_after == {"none": record.chunks} and record.chunks
    assert [move["moved_chunks"] for move in record.moves] == [0]
    first.sweep(time.time() + 1e7)
    wait_for(first, text, other=list(TIERS))
    assert other.sweep() == [] and len(other.claims) == 1


class Elsewhere:
    """An engine that stored nothing on this server."""

    def generate(self, prompt, sampling_params):
        return "text"


def test_everything_of_one_server_is_only_its_own(stack, llm, other, other_llm, greedy, fresh_text):
    tenant = "all-of-it"  # what an earlier test's aborted request has locked is no part of it
    first, second = (
        manager_of(*each, cache_salt=tenant) for each in ((stack, llm), (other, other_llm))
    )
    with first, second:
        text, longer = fresh_text(), fresh_text() * 2
        for manager in (first, second):
            manager.generate_and_manage(text, greedy, HOT)
            manager.generate_and_manage(longer, greedy, HOT)
        here, moves = first.controller.instance_id, []
        for each in (text, longer):
            wait_for(first, each, first=list(TIERS), other=list(TIERS))
        asked = first.controller
        chunks = {key for each in (text, longer) for key in asked.layout(asked.tokenize(each)).keys}

        def all_moved():  # without tokens: everything; what the engine still reads goes next time
            moves.append(first.controller.move([here, "gpu"], [here, "remote"]))
            assert moves[-1]["status"] in ("done", "partial", "timeout"), moves
            return moves[-1]["status"] == "done"

        wait_until(all_moved)
        assert sum(move["moved_chunks"] for move in moves) == len(chunks) >= 6
        for each in (text, longer):
            wait_for(first, each, first=["remote"], other=list(TIERS))
        assert second.controller.fleet()[OTHER]["gpu"] >= len(chunks)


def test_the_fleet_lists_all_servers(both, greedy, fresh_text):
    first, other = both
    before = first.controller.fleet()
    assert set(before) == {first.controller.instance_id, OTHER}
    text = fresh_text()
    other.generate_and_manage(text, greedy, HOT)
    wait_for(first, text, other=list(TIERS))
    chunks = len(first.controller.layout(first.controller.tokenize(text)).keys)
    after = other.controller.fleet()
    assert after[OTHER] == {tier: before[OTHER][tier] + chunks for tier in TIERS}
    assert after[first.controller.instance_id] == before[first.controller.instance_id]


# ---- moves between servers -----------------------------------------------------------------


@pytest.mark.parametrize("tiers", [("gpu", "gpu"), ("gpu", "disk"), ("remote", "gpu")])
def test_a_move_between_servers_is_refused_and_says_what_to_do(both, greedy, fresh_text, tiers):
    first, other = both
    text = fresh_text()
    first.generate_and_manage(text, greedy, HOT)
    wait_for(first, text, first=list(TIERS))
    tokens, here = first.controller.tokenize(text), first.controller.instance_id
    for manager in both:
        status = manager.controller.move([here, tiers[0]], [OTHER, tiers[1]], tokens)
        assert status["status"] == "unsupported" and status["moved_chunks"] == 0
        assert f"generate the prompt on {OTHER}" in status["reason"]
    other.generate_and_manage(text, greedy, HOT)  # what the reason says to do
    wait_for(first, text, first=list(TIERS), other=list(TIERS))  # nothing was taken away
    first.sweep(time.time() + 3600 * 1.2)  # and the first one's TTL in gpu ends
    wait_for(first, text, first=["disk", "remote"], other=list(TIERS))


# ---- starting -------------------------------------------------------------------------------


def test_the_second_stack_starts_a_server_only(stack, other):
    assert other.started == ["server"] and other.port == stack.port
    assert other.server_port != stack.server_port
    assert other.health()["coordinator"]["ready"]
    with pytest.raises(StackError, match="left alone"):
        other.kill("coordinator")


@pytest.mark.parametrize("field", ["instance_id", "disk_path", "redis"])
def test_servers_that_would_share_are_refused(stack, other, tmp_path_factory, field):
    shared = {
        "instance_id": {"instance_id": stack.instance_id},
        "disk_path": {"disk_path": stack.config.disk_path, "instance_id": "third"},
        "redis": {"redis_url": other.redis_url, "instance_id": "third"},
    }[field]
    third = settings(tmp_path_factory, **{"redis_url": None, **shared})
    with pytest.raises(StackError, match=f"has {field} = .* of its own") as caught:
        LMCacheStack(third, coordinator_of=stack).start()
    assert "of-host-b" not in str(caught.value)
    assert set(LMCacheController(stack.host, stack.port).fleet()) == {stack.instance_id, OTHER}


def test_a_folder_is_one_servers_whatever_its_coordinator(stack, tmp_path_factory):
    third = settings(tmp_path_factory, disk_path=stack.config.disk_path, redis_url=None)
    with pytest.raises(StackError, match="disk_path = .*: another LMCache server uses it"):
        LMCacheStack(third).start()


# ---- what breaks -----------------------------------------------------------------------------


def managed(manager, greedy, text, tier="disk"):
    """Generate, and wait until the KV is where it was decided: the server is managed."""
    manager.generate_and_manage(text, greedy, WARM)
    here, colder = manager.controller.instance_id, list(TIERS)[TIERS.index(tier) :]
    return wait_until(lambda: lookup(manager, text).get(here) == colder)


def test_a_coordinator_that_comes_back_manages_both_again(both, stack, greedy, fresh_text):
    texts = [fresh_text(), fresh_text()]
    for manager, text in zip(both, texts):
        managed(manager, greedy, text)
    wait_for_checkpoint(stack)
    stack.kill("coordinator")
    for manager in both:
        assert manager.generate_and_manage(fresh_text(), greedy, WARM)
        assert "LMCacheUnavailable" in manager.records[-1].error
    stack.start_one("coordinator")

    def both_know_two_servers():
        try:
            return all(len(manager.controller.fleet()) == 2 for manager in both)
        except LMCacheUnavailable:  # looked for again every second, not at each call
            return False

    wait_until(both_know_two_servers)
    for manager, text in zip(both, texts):
        assert lookup(manager, text) == {
            "found": True,
            manager.controller.instance_id: ["disk", "remote"],
        }
        managed(manager, greedy, fresh_text())


def test_one_server_dies_and_the_other_goes_on(both, other, greedy, fresh_text):
    first, second = both
    kept, text = fresh_text(), fresh_text()
    answer = second.generate_and_manage(kept, greedy, COLD)
    wait_for(first, kept, other=["remote"])
    other.kill("server")
    managed(first, greedy, text)
    assert second.generate_and_manage(fresh_text(), greedy, COLD)  # the text, nonetheless
    assert any(r.error or any(m["status"] == "timeout" for m in r.moves) for r in second.records)
    assert lookup(first, kept)[OTHER] == ["remote"]  # Redis has it still
    other.start_one("server")
    managed(first, greedy, fresh_text())

    def served():
        output = second._llm.generate(kept, greedy, use_tqdm=False)[0]
        assert output.outputs[0].text == answer
        return output.num_cached_tokens

    wait_until(served)  # the engine has found its server again
    managed(second, greedy, fresh_text())
