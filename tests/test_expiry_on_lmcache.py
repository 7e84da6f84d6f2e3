"""TTLs that end on the real stack: the ladder, renewal, shared prompts, a killed process."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import redis
from local_managers import assert_replay_decides_the_same
from waiting import wait_for_checkpoint, wait_until

from cache_controller import LMCacheController
from caching_heuristics import TIERS, HeuristicConfig
from kvttl.decisions.log import DecisionLog, read_records
from kvttl.policies.adaptive import Adaptive
from kvttl.replay.costs import TierCosts
from kvttl.session.demo_model import prompt_perplexity
from kvttl.session.texts import example_prompts
from kvttl.stack.services import checkpoint_path
from tiered_caching import MultiTierCache

ROOT = Path(__file__).parents[1]
HOT = {"perplexity": 12.0, "time_variance": 0.0, "access_count": 0}
COLD = {"perplexity": 80.0, "time_variance": 0.0, "access_count": 0}
# perplexity 12 gives 1.1 x base_ttl: about 2.2 s in gpu, 2.2 s on disk, 4.4 s in Redis
SHORT = HeuristicConfig(base_ttl=2, min_ttl=0.1, disk_ttl_factor=1, remote_ttl_factor=2)


def controller_of(stack):
    return LMCacheController(stack.host, stack.port, instance_id=stack.instance_id)


@pytest.fixture
def managers(stack, llm):
    """A function that makes managers with short TTLs; all are closed at the end."""
    made = []

    def make(**options):
        made.append(
            MultiTierCache(
                controller_of(stack), llm, **{"config": SHORT, "notify": None, **options}
            )
        )
        return made[-1]

    yield make
    for manager in made:
        manager.close()


def tiers_of(cache, text):
    """Return the hottest tier of each chunk, by the directory."""
    layout = cache.controller.layout(cache.controller.tokenize(text))
    return [tiers[0] if tiers else None for tiers in layout.of(cache.controller.instance_id)]


def written_down(cache, text):
    """Whether LMCache has made all copies of a prompt's chunks that it makes by itself."""
    layout = cache.controller.layout(cache.controller.tokenize(text))
    return all(set(tiers) == set(TIERS) for tiers in layout.of(cache.controller.instance_id))


def wait_for(cache, text, tier):
    wait_until(lambda: set(tiers_of(cache, text)) == {tier})


def generations(cache):
    return [record for record in cache.records if record.kind == "generation"]


def test_one_prompt_goes_down_the_whole_ladder_and_a_renewed_one_stays(
    managers, llm, greedy, fresh_text
):
    now = [1000.0]
    cache = managers(clock=lambda: now[0], sweep_every_s=None)
    text, renewed = fresh_text(), fresh_text()
    first = cache.generate_and_manage(text, greedy, HOT)
    cache.generate_and_manage(renewed, greedy, HOT)
    wait_until(lambda: written_down(cache, text))  # a demotion of less would wait for its turn
    served = []
    for passed_s, tier in ((2.3, "disk"), (2.3, "remote"), (4.6, None)):
        for _ in range(4):  # the other prompt is used four times in that time
            now[0] += passed_s / 4
            assert [r.error for r in cache.sweep() if r.error] == []
            cache.generate_and_manage(renewed, greedy, HOT)
        wait_for(cache, text, tier)  # the directory shows it nowhere above
        wait_for(cache, renewed, "gpu")
        # The engine alone, so that the generation does not renew the claim.
        output = llm.generate(text, greedy, use_tqdm=False)[0]
        served.append(output.num_cached_tokens or 0)
        assert output.outputs[0].text == first
    tokens = len(cache.controller.tokenize(text))
    assert served[0] == served[1] >= tokens // 32 * 32 - 1 and served[2] == 0  # recomputed
    mine = {r.prompt_digest for r in generations(cache)}  # KV of other tests is adopted
    expiries = [r for r in cache.records if r.kind == "expiry" and r.prompt_digest in mine]
    assert {r.prompt_digest for r in expiries} == {generations(cache)[0].prompt_digest}
    steps = [(r.from_tier, r.wanted_tier) for r in expiries]
    assert steps == [("gpu", "disk"), ("disk", "remote"), ("remote", None)]
    assert {tier for r in generations(cache)[2:] for tier in r.hit_tokens} == {"gpu"}


def test_the_sweeper_does_it_by_itself_and_the_next_generation_is_served_from_there(
    managers, greedy, fresh_text
):
    slower = HeuristicConfig(base_ttl=2, min_ttl=0.1, disk_ttl_factor=50)
    cache = managers(config=slower, sweep_every_s=0.2)
    text = fresh_text()
    first = cache.generate_and_manage(text, greedy, HOT)
    wait_for(cache, text, "disk")
    assert cache.generate_and_manage(text, greedy, HOT) == first
    renewed = generations(cache)[-1]
    assert set(renewed.hit_tokens) == {"disk"} and set(renewed.tier_after) == {"gpu"}
    wait_for(cache, text, "disk")


def test_a_shared_system_prompt_stays_hot_while_one_of_its_two_users_expires(
    managers, greedy, fresh_text
):
    now = [1000.0]
    cache = managers(clock=lambda: now[0], sweep_every_s=None)
    system = fresh_text(200)
    leaving, staying = system + " first " + fresh_text(60), system + " second " + fresh_text(60)
    cache.generate_and_manage(leaving, greedy, HOT)
    now[0] += 1.5
    cache.generate_and_manage(staying, greedy, HOT)
    shared = generations(cache)[-1].hit_tokens["gpu"] // 32
    assert shared >= 3
    now[0] += 1.0
    (record,) = cache.sweep()
    assert record.prompt_digest == generations(cache)[0].prompt_digest and not record.error
    wait_for(cache, staying, "gpu")
    placed = tiers_of(cache, leaving)
    assert set(placed[:shared]) == {"gpu"} and set(placed[shared:]) == {"disk"}


def test_expiry_while_lmcache_is_away_is_made_up_for(managers, stack, greedy, fresh_text):
    now = [1000.0]
    patient = HeuristicConfig(base_ttl=2, min_ttl=0.1, disk_ttl_factor=1000)
    cache = managers(config=patient, clock=lambda: now[0], sweep_every_s=None)
    text = fresh_text()
    cache.generate_and_manage(text, greedy, HOT)
    tokens, here = cache.controller.tokenize(text), cache.controller.instance_id
    wait_until(lambda: cache.controller.lookup(tokens).get(here) == ["gpu", "disk", "remote"])
    wait_for_checkpoint(stack)  # or it forgets the copies below
    stack.kill("coordinator")
    now[0] += 2.3
    (record,) = cache.sweep()
    assert "LMCacheUnavailable" in record.error and record.wanted_tier == "disk"
    stack.start_one("coordinator")

    def settled():
        now[0] += 0.1
        cache.sweep()
        return set(_tiers_or_none(cache, text)) == {"disk"}

    wait_until(settled)
    assert cache.records[-1].kind == "settled" and not cache.records[-1].error


@pytest.mark.parametrize("restarted", [False, True])
def test_kv_that_a_restarted_coordinator_has_forgotten_still_expires(
    managers, stack, greedy, fresh_text, tmp_path, restarted
):
    now = [1000.0]
    config = HeuristicConfig(base_ttl=2, min_ttl=0.1, disk_ttl_factor=1, remote_ttl_factor=1)
    options = {"config": config, "clock": lambda: now[0], "sweep_every_s": None}
    cache = managers(**options, log=DecisionLog(tmp_path))
    text = fresh_text()
    cache.generate_and_manage(text, greedy, HOT)
    tokens, here = cache.controller.tokenize(text), cache.controller.instance_id
    wait_until(lambda: cache.controller.lookup(tokens).get(here) == ["gpu", "disk", "remote"])
    files = files_of(stack, cache, text)
    assert files
    stack.kill("coordinator")
    checkpoint_path(stack.config).unlink()
    stack.start_one("coordinator")
    if restarted:  # the manager, too: it has never seen the earlier coordinator
        cache.close()
        cache = managers(**options)
        wait_until(lambda: cache.controller.fleet().get(here))
        cache.generate_and_manage(fresh_text(), greedy, HOT)  # shows what LMCache's keys look like
        assert cache.recover(tmp_path)["claims"] == 1

    def gone():
        now[0] += 1.0
        cache.sweep()
        return not any(path.exists() for path in files)

    wait_until(gone)
    assert cache.generate(text, greedy)[0].output.num_cached_tokens == 0  # not in memory either


def test_final_expiry_takes_copies_that_the_directory_does_not_show(
    managers, stack, greedy, fresh_text
):
    """As a Redis that comes back from a snapshot has them: they would stay for ever."""
    now = [1000.0]
    config = HeuristicConfig(base_ttl=2, min_ttl=0.1, disk_ttl_factor=1, remote_ttl_factor=1)
    cache = managers(config=config, clock=lambda: now[0], sweep_every_s=None)
    text, controller = fresh_text(), cache.controller
    cache.generate_and_manage(text, greedy, HOT)
    tokens, here = controller.tokenize(text), controller.instance_id
    wait_until(lambda: controller.lookup(tokens).get(here) == ["gpu", "disk", "remote"])
    layout = controller.layout(tokens)
    with redis.Redis.from_url(stack.config.redis_url) as connection:
        names = [n for n in connection.keys() if any(key in n.decode() for key in layout.keys)]
        values = connection.mget(names)
        handles = [handle for key in layout.keys for handle in layout.handles[key]]
        controller._http.delete(here, ["remote"], handles)
        wait_until(lambda: controller.lookup(tokens).get(here) == ["gpu", "disk"])
        connection.mset(dict(zip(names, values)))
        assert connection.exists(*names) == len(names) == len(layout.keys)

        def gone():
            now[0] += 1.0
            cache.sweep()
            return not connection.exists(*names)

        wait_until(gone)


def files_of(stack, cache, text):
    """Return the disk tier's files of a prompt's chunks."""
    keys = cache.controller.layout(cache.controller.tokenize(text)).keys
    return [
        path for path in Path(stack.config.disk_path).iterdir() if any(k in path.name for k in keys)
    ]


def _tiers_or_none(cache, text):
    try:
        return tiers_of(cache, text)
    except Exception:  # its breaker is still open
        return [None]


# ---- measured perplexities --------------------------------------------------------------


@pytest.mark.parametrize("source", ["generation", "prompt"])
def test_perplexities_order_prompts_as_expected(managers, greedy, source):
    scorer = prompt_perplexity if source == "prompt" else None
    from vllm import SamplingParams

    cache = managers(config=HeuristicConfig(), perplexity_source=source, scorer=scorer)
    sampling = SamplingParams(temperature=0.0, max_tokens=16)
    for name in ("template", "prose", "noise"):
        cache.generate_and_manage(example_prompts()[name], sampling)
    template, prose, noise = generations(cache)
    assert not any(record.error for record in cache.records)
    values = [record.metadata["perplexity"] for record in (template, prose, noise)]
    assert values == sorted(values) and values[2] > 1.5 * values[1] > 1.5 * values[0]
    assert {r.metadata_sources["perplexity"] for r in (template, prose, noise)} == {source}
    assert [r.wanted_tier for r in (template, prose, noise)] == ["gpu", "disk", "remote"]
    assert sampling.logprobs is None  # the caller's object is as it was


def test_scoring_hits_never_touches_the_engine(managers, greedy, fresh_text):
    """prompt_logprobs on a prompt that hits LMCache would kill it."""
    cache = managers(perplexity_source="prompt", scorer=prompt_perplexity)
    text = fresh_text()
    for _ in range(3):
        cache.generate_and_manage(text, greedy)
    assert [bool(r.hit_tokens) for r in generations(cache)] == [False, True, True]
    assert [r.metadata_sources["perplexity"] for r in generations(cache)] == ["prompt"] * 3
    assert [r.metadata["access_count"] for r in generations(cache)] == [0, 1, 2]


# ---- a killed process ---------------------------------------------------------------------

_VICTIM = """
import json, sys
from cache_controller import LMCacheController
from caching_heuristics import HeuristicConfig
from kvttl.decisions.log import DecisionLog
from tiered_caching import MultiTierCache

host, port, instance, model, folder = json.loads(sys.argv[1])
controller = LMCacheController(host, port, model, instance_id=instance)

class Served:  # the engine's answers: its KV is in LMCache already
    def __init__(self, tokens):
        self.prompt_token_ids, self.num_cached_tokens = tokens, len(tokens)
    outputs = [type("Completion", (), {"text": "", "logprobs": None})]

class Engine:
    def generate(self, prompt, sampling_params):
        return [Served(prompt)]

cache = MultiTierCache(
    controller, Engine(), config=HeuristicConfig(base_ttl=100), notify=None, log=DecisionLog(folder)
)
prompts = json.loads(sys.stdin.readline())
print("ready", flush=True)
for turn in range(1000):
    for tokens in prompts:
        perplexity = (80.0, 12.0, 35.0)[(turn + len(tokens)) % 3]
        cache.generate_and_manage(tokens, None, {"perplexity": perplexity})
"""


def run_victim(stack, controller, folder, prompts, decisions):
    """Let a process manage `prompts` in a loop, and kill it after so many decisions."""
    arguments = [stack.host, stack.port, stack.instance_id, controller.model, str(folder)]
    victim = subprocess.Popen(
        [sys.executable, "-c", _VICTIM, json.dumps(arguments)],
        env=os.environ | {"PYTHONPATH": str(ROOT / "src")},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    victim.stdin.write(json.dumps(prompts) + "\n")
    victim.stdin.flush()
    assert victim.stdout.readline() == "ready\n"
    before = _logged_lines(folder)
    wait_until(lambda: _logged_lines(folder) >= before + decisions)
    victim.send_signal(signal.SIGKILL)
    assert victim.wait() == -signal.SIGKILL


def _logged_lines(folder):
    return sum(path.read_bytes().count(b"\n") for path in Path(folder).glob("*.jsonl"))


def test_a_process_killed_during_moves_loses_no_claim_and_leaves_no_kv_for_ever(
    managers, stack, llm, greedy, fresh_text, tmp_path
):
    now = [time.time()]
    config = HeuristicConfig(base_ttl=100, disk_ttl_factor=1, remote_ttl_factor=1)
    log = DecisionLog(tmp_path / "log")
    cache = managers(config=config, clock=lambda: now[0], sweep_every_s=None, log=log)
    texts = [fresh_text() for _ in range(6)]
    prompts = [cache.controller.tokenize(text) for text in texts]
    answers = [llm.generate(text, greedy, use_tqdm=False)[0].outputs[0].text for text in texts]
    after = cache
    for round_, decisions in enumerate((4, 11, 19)):
        after.close()  # an LMCache server has one manager
        run_victim(stack, cache.controller, tmp_path / "log", prompts, decisions)
        after = managers(config=config, clock=lambda: now[0], sweep_every_s=None, log=log)
        now[0] = time.time()
        logged = {
            record.prompt_digest: record
            for record in read_records(tmp_path / "log", kinds=("claim", "generation"))
        }
        found = after.recover(tmp_path / "log")  # logs the claims on KV that it adopts
        assert found["claims"] >= len(logged) > 0, round_
        assert all(after.claims.wanted(r.chunk_keys, now[0]) for r in logged.values())

        def settled(after=after, logged=logged):
            now[0] += 0.5
            after.sweep()
            return _all_where_logged(after, logged, now[0])

        wait_until(settled)
        for text, answer in zip(texts, answers):  # from wherever it is: the same tokens
            assert llm.generate(text, greedy, use_tqdm=False)[0].outputs[0].text == answer
    now[0] += 1000.0  # beyond the whole ladder

    def nothing_is_left():  # Redis is asked for what it lost every 10 s
        now[0] += 1.0
        after.sweep()
        return not any(after.controller.layout_of().of(stack.instance_id))

    wait_until(nothing_is_left)
    assert len(after.claims) == 0


def _all_where_logged(cache, logged, now_s):
    """Say whether no chunk is hotter than the last logged decisions want it."""
    order = {"gpu": 0, "disk": 1, "remote": 2}
    for record in logged.values():
        wanted = cache.claims.wanted(record.chunk_keys, now_s)
        held = cache.controller.layout_of(record.chunk_keys).of(cache.controller.instance_id)
        if any(t and w and order[t[0]] < order[w] for t, w in zip(held, wanted)):
            return False
    return True


def test_tiers_follow_a_policy_that_decides_as_it_goes_and_its_ttls_end(
    managers, greedy, fresh_text, tmp_path
):
    """Rooms of 12 chunks each for 8 conversations of some seven chunks."""
    now, made = [1000.0], ((12, 12, 12), 32)
    policy, prompts = Adaptive(*made, costs=TierCosts()), [fresh_text() for _ in range(8)]
    with DecisionLog(tmp_path) as log:
        cache = managers(policy=policy, clock=lambda: now[0], sweep_every_s=None, log=log)
        for turn in range(3):
            for at in range(len(prompts)):
                prompts[at] += fresh_text(40) if turn else ""
                cache.generate_and_manage(prompts[at], greedy)
                now[0] += 2.0
                cache.sweep()
        records = generations(cache)
        assert {(r.policy, r.error, r.policy_error) for r in records} == {("Adaptive", "", "")}
        assert {r.finish_reason for r in records} <= {"stop", "length"}
        assert {part["tier"] for r in records for part in r.decided} >= {"gpu"}
        wait_until(lambda: cache.sweep() or all(as_wanted(cache, p, now) for p in prompts))
        left = {tier for prompt in prompts for tier in tiers_of(cache, prompt)}
        assert left > {"gpu"}
        now[0] += 3600.0  # nothing of this is worth its place by then
        cache.sweep()
        wait_until(lambda: cache.sweep() or not any(any(tiers_of(cache, p)) for p in prompts))
    assert_replay_decides_the_same(records, tmp_path, Adaptive(*made, costs=TierCosts()))


def as_wanted(cache, prompt, now):
    keys = cache.controller.layout(cache.controller.tokenize(prompt)).keys
    return tiers_of(cache, prompt) == cache.claims.wanted(keys, now[0])


def test_adaptive_by_its_name_knows_the_memory_tiers_room(managers, greedy, fresh_text, stack):
    cache = managers(policy="adaptive", sweep_every_s=None)
    cache.generate_and_manage(fresh_text(), greedy)
    (record,) = generations(cache)
    assert (record.policy, record.policy_error, record.wanted_tier) == ("adaptive", "", "gpu")
    chunk_bytes = 32 * 1024  # of the demo model: 4 layers, 2 x 1 head of 64 values of 2 bytes
    assert (
        cache.controller.room_chunks()
        == (stack.config.l1_size_gb * 2**30 // chunk_bytes,) + (None,) * 2
    )
