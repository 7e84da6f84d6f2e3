"""One seeded session on a real engine: the manager's decisions, and the module's, are the same."""

from __future__ import annotations

import json
import random

import pytest
from inside_server import Client, inside_server, prompt, stack_of
from lmcache.v1.multiprocess.protocols.server_module import ServerModuleCallRequest
from waiting import wait_until

from cache_controller import LMCacheController
from kvttl.server.requests import Ended, Endings
from kvttl.session.demo_model import model_path
from kvttl.session.workload import session_requests
from tiered_caching import MultiTierCache

pytestmark = pytest.mark.timeout(900)  # three engines are started, on a busy machine too
REQUESTS, SEED = 16, 14
# What depends on nothing but the session. The rest of a record is times, and where chunks are,
# which is not the same: outside all is written through, and seen a moment later.
COMPARED = (
    *("prompt_digest", "prompt_tokens", "chunks", "chunk_keys", "cache_salt"),
    *("metadata", "metadata_sources", "ttl_s", "wanted_tier", "finish_reason", "output_tokens"),
)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """One decision after the other, in the order of the requests."""
    with inside_server(tmp_path_factory.mktemp("session"), {"workers": 1}, l1_chunks=2**14) as made:
        yield made


@pytest.fixture(scope="module")
def inside_llm(server):
    from vllm import LLM

    engine = LLM(**stack_of(server, server.log.parent).engine_kwargs(model_path()))
    yield engine
    engine.llm_engine.engine_core.shutdown()


@pytest.fixture
def client(server):
    client = Client(server.url, 99, model="another-model")
    yield client
    client.close()


def made(client, count, known=0):
    """The newest records of generations, once there are so many more than those known."""

    def new():
        return client.generations()[known:]

    return wait_until(lambda: len(new()) >= count and new())


def known(client):
    wait_until(lambda: not client.status()["waiting_decisions"])
    return len(client.generations())


def greedy(hints=None, max_tokens=6, **options):
    from vllm import SamplingParams

    named = {f"lmcache.kvttl.{name}": value for name, value in (hints or {}).items()}
    extra = {"extra_args": {"kv_transfer_params": named}} if named else {}
    return SamplingParams(temperature=0.0, max_tokens=max_tokens, **extra, **options)


def answer_of(llm, asked, sampling):
    (output,) = llm.generate(asked, sampling, use_tqdm=False)
    return output


def test_a_session_is_decided_alike_outside_and_inside(stack, llm, inside_llm, plain_llm, client):
    """Times come as metadata, as hints inside; how often a prompt came is counted by each."""
    rng, prompts = random.Random(SEED), [r.prompt for r in session_requests(REQUESTS, SEED)]
    plain = [answer_of(plain_llm, text, greedy()).outputs[0] for text in prompts]
    # Every other answer ends by itself, at its third token if it has so many.
    ends = [answer.token_ids[:3][-1] for answer in plain]
    stops = [{"stop_token_ids": [end]} if n % 2 else {} for n, end in enumerate(ends)]
    said = [
        {
            "perplexity": rng.uniform(5.0, 60.0),
            "time_variance": rng.random(),
            "seconds_since_access": rng.uniform(0.0, 3600.0),
        }
        for _ in prompts
    ]
    asked = list(zip(prompts, stops, said))
    texts = [answer_of(plain_llm, text, greedy(**stop)).outputs[0].text for text, stop, _ in asked]
    controller = LMCacheController(stack.host, stack.port, instance_id=stack.instance_id)
    with MultiTierCache(controller, llm, notify=None, perplexity_source="off") as cache:
        outside = [cache.generate(text, greedy(**stop), each)[0] for text, stop, each in asked]
    before = known(client)
    inside = [answer_of(inside_llm, text, greedy(each, **stop)) for text, stop, each in asked]
    records = made(client, len(asked), before)
    assert [output.outputs[0].text for output in inside] == texts
    assert [managed.output.outputs[0].text for managed in outside] == texts
    assert sum(output.num_cached_tokens > 0 for output in inside) > REQUESTS // 4
    # An engine's word may come a moment after the next request's end.
    records = {record.metadata["perplexity"]: record for record in records}
    for managed, each in zip(outside, said, strict=True):
        record = records[each["perplexity"]]
        wanted = json.loads(managed.decision.result().to_json())
        assert {n: getattr(record, n) for n in COMPARED} == {n: wanted[n] for n in COMPARED}
        assert wanted["error"] == record.error == ""
    records = list(records.values())
    assert {record.finish_reason for record in records} == {"stop", "length"}
    assert {record.wanted_tier for record in records} == {"gpu", "disk", "remote"}
    assert max(record.metadata["access_count"] for record in records) >= 2


def test_an_engine_says_how_an_answer_ended_unless_the_request_does(inside_llm, client, fresh_text):
    before, asked = known(client), fresh_text()
    said = answer_of(inside_llm, asked, greedy()).outputs[0]
    hints = {"finish": "tool_calls", "output_tokens": 40}
    answer_of(inside_llm, asked, greedy(hints))
    endless = greedy(max_tokens=600, ignore_eos=True, stop=[said.text[:1]])
    stopped = answer_of(inside_llm, asked, endless).outputs[0]
    ends = [(record.finish_reason, record.output_tokens) for record in made(client, 3, before)]
    assert ends[:2] == [("length", 6), ("tool_calls", 40)]
    # To the engine a stop string looks like a client that has left.
    assert stopped.finish_reason == "stop" and ends[2][0] is None


def test_an_engines_word_and_a_requests_end_meet_in_either_order():
    decided = []
    endings = Endings(decided.append)

    def end(number):
        endings.meet(f"r{number}", Ended(number, [], 0, 0.0, 0.0))

    def tell(number):
        endings.meet(f"r{number}", {"finish": "stop", "output_tokens": number})

    end(1)  # nobody has spoken yet
    assert decided == [Ended(1, [], 0, 0.0, 0.0)]
    tell(2), end(2), end(3), tell(3)
    assert [(each.key, each.finish, each.output_tokens) for each in decided[1:]] == [
        (2, "stop", 2),
        (3, "stop", 3),
    ]
    end(4), tell(5), endings.release(3600.0)
    assert len(decided) == 3
    endings.release(0.0), end(5)
    assert [(each.key, each.finish) for each in decided[3:]] == [(4, None), (5, "stop")]


def test_a_request_without_a_word_is_decided_about_all_the_same(client):
    before = known(client)

    def tell(*word):
        call = ServerModuleCallRequest("kvttl.ended", json.dumps(word).encode())
        return client._call("server_module_call", call).success

    assert tell("told", "stop", 7)
    client.serve(prompt(1, 2), "told")
    client.serve(prompt(2, 2), "not-told")
    ends = [(record.finish_reason, record.output_tokens) for record in made(client, 2, before)]
    assert ends == [("stop", 7), (None, 0)]
    wrong = (["a"], ["a", 5, 1], ["a", "stop", -1], ["a", "stop", "many"], [["a"], "stop", 1])
    assert not any(tell(*word) for word in wrong)
